"""When the dynamics is due: fit, imagine, store, log. Holds no state of its own; the counters lie on the model."""

import time
from typing import TYPE_CHECKING

from stable_baselines3.common.callbacks import BaseCallback

from sb3_mbpo.type_aliases import FitResult

if TYPE_CHECKING:
    from sb3_mbpo.mbpo import MBPO


class DynamicsCallback(BaseCallback):
    """
    Runs at the end of SB3's rollouts, when the new transitions are stored and before ``train``. ``MBPO`` attaches a
    new one for every call of ``learn``.
    """

    model: "MBPO"

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.model.dynamics_due():
            self._log_fit(self.model.fit_dynamics())
            start = time.perf_counter()
            self.model.imagine()
            self._log_imagination(time.perf_counter() - start)

    def _log_fit(self, result: FitResult) -> None:
        elite_mse = sum(result.holdout_mse[member] for member in result.elites) / len(result.elites)
        values = {
            "holdout_mse": elite_mse,
            "holdout_mse_state": result.holdout_mse_state,
            "holdout_mse_reward": result.holdout_mse_reward,
            "train_nll": result.train_nll,
            "predicted_std": result.predicted_std,
            "disagreement": result.disagreement,
            "epochs": result.epochs,
            "gradient_steps": result.gradient_steps,
            "diverged": float(result.diverged),
            "fit_seconds": result.seconds,
            "termination_precision": result.termination_precision,
            "termination_recall": result.termination_recall,
        }
        for key, value in values.items():
            if value is not None:
                self.logger.record(f"dynamics/{key}", value)

    def _log_imagination(self, seconds: float) -> None:
        result, buffer = self.model.imagination_result, self.model.imagined_buffer
        assert result is not None and buffer is not None  # `dynamics_due` said so
        self.logger.record("imagined/rollout_length", self.model.current_rollout_length())
        self.logger.record("imagined/rows", result.rows)
        self.logger.record("imagined/ended", result.terminated / max(result.rows, 1))
        self.logger.record("imagined/not_finite", result.not_finite)
        self.logger.record("imagined/far_from_data", result.far_from_data)
        self.logger.record("imagined/buffer_fill", len(buffer) / buffer.capacity)
        self.logger.record("imagined/seconds", seconds)
