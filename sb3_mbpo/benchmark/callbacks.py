"""What a run of the benchmark does beside training: evaluate, tell how far it is, save what it needs to go on."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_mbpo.benchmark.results import COLUMNS
from sb3_mbpo.storage import sync_file, sync_folder, write_whole


class Evaluation(BaseCallback):
    """
    Runs the deterministic policy whenever the environment steps pass a multiple of ``eval_freq``, and at the end of training,
    and writes a row: the steps, mean and standard deviation of the returns, the mean length of the episodes, the updates so
    far, and the seconds of training so far, without those of evaluations and of what else was ``uncounted``.

    :param eval_env: one environment with true returns
    :param eval_freq: environment steps
    :param episodes: of each evaluation
    :param seed: of the evaluations; each starts its episodes from a seed of its own
    :param path: of the CSV file. Rows of steps that the model has not made yet are dropped, the others stay
    """

    def __init__(self, eval_env: VecEnv, eval_freq: int, episodes: int, seed: int, path: Path) -> None:
        super().__init__()
        self.eval_env, self.eval_freq, self.episodes, self.seed, self.path = eval_env, eval_freq, episodes, seed, path

    def _on_training_start(self) -> None:
        self.rows = [row for row in read_rows(self.path) if row["steps"] <= self.num_timesteps]
        self.start = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)

    def _on_step(self) -> bool:
        if self.num_timesteps // self.eval_freq > (self.num_timesteps - self.training_env.num_envs) // self.eval_freq:
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        if not self.rows or self.rows[-1]["steps"] < self.num_timesteps:
            self._evaluate()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What happens inside takes no seconds of training."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def _evaluate(self) -> None:
        seconds = time.perf_counter() - self.start
        with self.uncounted():
            self._write_row(seconds)

    def _write_row(self, seconds: float) -> None:
        sync_envs_normalization(self.training_env, self.eval_env)
        self.eval_env.seed(self.seed + self.num_timesteps)
        returns, lengths = evaluate_policy(self.model, self.eval_env, self.episodes, return_episode_rewards=True)
        averages = [np.mean(returns), np.std(returns), np.mean(lengths)]
        row = [self.num_timesteps, *averages, self.model._n_updates, seconds]
        self.rows.append(dict(zip(COLUMNS, row, strict=True)))
        write_whole(self.path, pd.DataFrame(self.rows).to_csv(index=False).encode())


class Uncounted(CallbackList):
    """
    A callback that saves at the start or between two rollouts, which takes no seconds of training.

    :param callback: that saves
    :param evaluation: that counts the seconds; its training has started before
    """

    def __init__(self, callback: BaseCallback, evaluation: Evaluation) -> None:
        super().__init__([callback])
        self.evaluation = evaluation

    def _on_training_start(self) -> None:
        with self.evaluation.uncounted():
            super()._on_training_start()

    def _on_rollout_start(self) -> None:
        with self.evaluation.uncounted():
            super()._on_rollout_start()


class StepsFile(BaseCallback):
    """
    Writes the environment steps so far, every two seconds.

    :param path: of the file
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.due = path, 0.0

    def _on_step(self) -> bool:
        if time.monotonic() >= self.due:
            self._write()
            self.due = time.monotonic() + 2.0
        return True

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(str(self.num_timesteps))
        with contextlib.suppress(PermissionError):  # Windows: somebody reads it just now
            partial.replace(self.path)  # without waiting for the disk, which would count as training


class PlainCheckpoints(BaseCallback):
    """
    Checkpoints of any off-policy algorithm of SB3: the model, its replay buffer and ``VecNormalize``'s statistics. A run
    goes on with them, if not to the same bits.

    :param save_freq: environment steps
    :param folder: where the newest one is kept
    """

    model: OffPolicyAlgorithm

    def __init__(self, save_freq: int, folder: Path) -> None:
        super().__init__()
        self.save_freq, self.folder = save_freq, folder

    def _on_training_start(self) -> None:
        self.last = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps // self.save_freq > self.last // self.save_freq:
            self.last = self.num_timesteps
            self._save()

    def _save(self) -> None:
        earlier = plain_checkpoints(self.folder)
        partial = self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.model.save(partial / "model.zip")
        self.model.save_replay_buffer(partial / "replay_buffer.pkl")
        if (normalization := self.model.get_vec_normalize_env()) is not None:
            normalization.save(str(partial / "vec_normalize.pkl"))
        for file in partial.iterdir():
            sync_file(file)
        sync_folder(partial)
        partial.rename(self.folder / f"steps_{self.num_timesteps}")
        sync_folder(self.folder)
        for folder in earlier:
            shutil.rmtree(folder)


def plain_checkpoints(folder: Path) -> list[Path]:
    """:return: the folders that :class:`PlainCheckpoints` wrote, oldest first"""
    return sorted(folder.glob("steps_*"), key=lambda path: int(path.name.split("_")[1]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """:return: the rows that :class:`Evaluation` wrote, if it has"""
    return pd.read_csv(path).to_dict("records") if path.exists() else []
