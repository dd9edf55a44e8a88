"""
The RL Zoo's own commands, with ``mbpo`` and ``dhmbpo`` among its algorithms (extra ``zoo``)::

    python -m sb3_mbpo.zoo train --algo mbpo --env Pendulum-v1 --eval-freq 500
    python -m sb3_mbpo.zoo enjoy --algo mbpo --env Pendulum-v1 -f logs
    python -m sb3_mbpo.zoo train --algo mbpo --env Pendulum-v1 --optimize --n-trials 20

``all_plots``, ``plot_train``, ``plot_from_file``, ``record_video`` and ``benchmark`` follow. Everything behind the command
is the Zoo's, but for :class:`Experiment`.
"""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    import optuna
    import rl_zoo3.train
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'{error}. Install what the Zoo needs: pip install "sb3_mbpo[zoo]"') from error

from sb3_mbpo.dhmbpo import DHMBPO
from sb3_mbpo.hyperparams import settings_file
from sb3_mbpo.mbpo import MBPO

ALGORITHMS: dict[str, type[MBPO]] = {"mbpo": MBPO, "dhmbpo": DHMBPO}


def sample_mbpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    What ``--optimize`` searches: the parameters that are MBPO's own, and SAC's that matter most with them. What lies in a
    mapping (``policy_kwargs``, ``dynamics_kwargs``) stays as the settings have it. With 100,000 rollouts per round, no trial
    keeps more than 8 million imagined rows.

    :param trial: of Optuna
    :param n_actions: dimensions of the action, which the target entropy is measured in
    :param n_envs: not used; the Zoo's signature
    :param additional_args: not used
    """
    trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True)
    trial.suggest_int("gradient_steps", 1, 40, log=True)
    trial.suggest_float("target_entropy", -1.0 * n_actions, -0.05 * n_actions)
    trial.suggest_int("dynamics_train_freq", 125, 1000, log=True)
    trial.suggest_int("rollout_length", 1, 5)
    trial.suggest_int("rollout_retain_steps", 250, 2000, log=True)
    trial.suggest_float("real_ratio", 0.02, 0.5, log=True)
    return sampled_by_name(trial.params)


def sample_dhmbpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    The same for DHMBPO.

    :param trial: of Optuna
    :param n_actions: dimensions of the action, which the target entropy is measured in
    :param n_envs: not used; the Zoo's signature
    :param additional_args: not used
    """
    trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True)
    trial.suggest_float("tau", 2e-3, 2e-2, log=True)
    trial.suggest_int("gradient_steps", 1, 4)
    trial.suggest_float("target_entropy", -1.0 * n_actions, -0.05 * n_actions)
    trial.suggest_int("dynamics_train_freq", 125, 1000, log=True)
    trial.suggest_int("rollout_length", 5, 40, log=True)
    trial.suggest_int("gradient_horizon", 1, 8)
    return sampled_by_name(trial.params)


def sampled_by_name(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """:return: the same: what was sampled are the algorithm's parameters by name"""
    return dict(sampled_params)


class Experiment(ExperimentManager):
    """The Zoo's, which looks for our algorithms' settings here, and evaluates in the environment that it trains in."""

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        For our algorithms, ``--conf-file`` may be the name of one of our files; without it, it is that of the algorithm. What
        else it may be, a path or a dotted Python module, is as in the Zoo. The Zoo makes only the training environment with
        the ``env_kwargs`` of the settings; here, evaluation and ``record_video`` have them, too.

        :raises ValueError: when there are no such settings, or they ask for ``ParallelTrainCallback``
        """
        ours = self.algo in ALGORITHMS
        name = self.args.conf_file or self.algo
        if ours and Path(name).suffix in ("", ".yml", ".yaml"):
            self.config = str(settings_file(name))
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        if ours and "rl_zoo3.callbacks.ParallelTrainCallback" in str(hyperparams.get("callback")):
            raise ValueError(
                "`ParallelTrainCallback` trains a copy of the model in a thread, and the copy would get neither the fitted "
                f"dynamics nor imagined transitions. Leave it out for `{self.algo}`."
            )
        if "env_kwargs" in hyperparams:
            self.args.env_kwargs = hyperparams["env_kwargs"]
            self.eval_env_kwargs = self.args.eval_env_kwargs or hyperparams["env_kwargs"]
        return hyperparams, saved_hyperparams


def register() -> None:
    """Makes our algorithms known to the Zoo in this process."""
    rl_zoo3.ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update(mbpo=sample_mbpo_params, dhmbpo=sample_dhmbpo_params)
    HYPERPARAMS_CONVERTER.update(dict.fromkeys(ALGORITHMS, sampled_by_name))
    vars(rl_zoo3.train)["ExperimentManager"] = Experiment  # `train` looks it up there


def run_script(name: str) -> None:
    """
    A script of the Zoo that its own command line leaves out.

    :param name: ``record_video``, or ``benchmark``, which starts ``python enjoy.py`` and gets our ``enjoy`` instead
    """
    call = subprocess.call

    def call_with_our_enjoy(command: list[str], **kwargs: Any) -> int:
        ours = [sys.executable, "-m", "sb3_mbpo.zoo", "enjoy", *command[2:]]
        return call(ours if command[:2] == ["python", "enjoy.py"] else command, **kwargs)

    vars(subprocess)["call"] = call_with_our_enjoy
    runpy.run_module(f"rl_zoo3.{name}", run_name="__main__")


def main() -> None:
    """The Zoo's command line."""
    register()
    from rl_zoo3.cli import main as zoo_main  # builds its list of algorithms now

    if sys.argv[1:2] in (["benchmark"], ["record_video"]):
        run_script(sys.argv.pop(1))
    else:
        zoo_main()


if __name__ == "__main__":
    main()
