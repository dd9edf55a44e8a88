"""
The RL Zoo's own commands, with ``mbpo`` and ``dhmbpo`` among its algorithms (extra ``zoo``)::

    python -m sb3_mbpo.zoo train --algo mbpo --env Pendulum-v1 --eval-freq 500
    python -m sb3_mbpo.zoo enjoy --algo mbpo --env Pendulum-v1 -f logs
    python -m sb3_mbpo.zoo train --algo mbpo --env Pendulum-v1 --optimize --n-trials 20

``all_plots``, ``plot_train``, ``plot_from_file``, ``record_video`` and ``benchmark`` follow. Everything behind the command
is the Zoo's, but for :class:`Experiment`.
"""

import argparse
import importlib.util
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
COMMANDS = "train", "enjoy", "plot_train", "plot_from_file", "all_plots"
SCRIPTS = "record_video", "benchmark"  # of the Zoo, too, but its own command line leaves them out


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
    return trial.params


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
    return trial.params


class Experiment(ExperimentManager):
    """The Zoo's, which looks for our algorithms' settings here, and evaluates in the environment that it trains in."""

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        For our algorithms, ``--conf-file`` may be the name of one of our files; without it, it is that of the algorithm. What
        else it may be, a path or a Python module, is as in the Zoo. The Zoo makes only the training environment with the
        ``env_kwargs`` of the settings; here, evaluation and ``record_video`` have them, too. The Zoo takes trial 0 for none.

        :raises ValueError: when there are no such settings, they ask for ``ParallelTrainCallback``, or the agent to go on
            with saw normalised observations and these settings do not normalise, or the other way round
        """
        ours = self.algo in ALGORITHMS
        if ours:
            self.config = self._our_config(self.args.conf_file or self.algo)
        if self.trial_id == 0 and self.storage and self.study_name:
            trial = self.load_trial(self.storage, self.study_name, 0)
            self.custom_hyperparams = trial | (self.custom_hyperparams or {})
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        if ours and self.continue_training:
            normalize = hyperparams.get("normalize")  # an empty dict normalises, too
            self._check_statistics(bool(normalize) or isinstance(normalize, dict))
        if ours and "rl_zoo3.callbacks.ParallelTrainCallback" in str(hyperparams.get("callback")):
            raise ValueError(
                "`ParallelTrainCallback` trains a copy of the model in a thread, and the copy would get neither the fitted "
                f"dynamics nor imagined transitions. Leave it out for `{self.algo}`."
            )
        if "env_kwargs" in hyperparams:
            self.args.env_kwargs = hyperparams["env_kwargs"]
            self.eval_env_kwargs = self.args.eval_env_kwargs or hyperparams["env_kwargs"]
        return hyperparams, saved_hyperparams

    @staticmethod
    def _our_config(name: str) -> str:
        try:
            return str(settings_file(name))
        except ValueError:
            if not name.endswith(".py") and not _is_module(name):
                raise
            return name

    def _check_statistics(self, normalize: bool) -> None:
        statistics = Path(self.trained_agent).parent / self.env_name / "vecnormalize.pkl"
        if statistics.exists() and not normalize:
            raise ValueError(
                f"{self.trained_agent} saw observations normalised with {statistics}, but the settings of {self.config} do "
                "not normalise. `-i` reads the settings anew: pass the `--conf-file` and the `-params` of its run again."
            )
        if normalize and not statistics.exists():
            raise ValueError(
                f"The settings of {self.config} normalise, but {statistics} is not there, with which {self.trained_agent} "
                "would have to go on. If its run did not normalise, pass its `--conf-file` and its `-params` again: `-i` "
                "reads the settings anew. If it was stopped before the Zoo saved the statistics (at a new best evaluation "
                "and at the end), they are lost."
            )


def _is_module(name: str) -> bool:
    try:
        found = importlib.util.find_spec(name)
    except ImportError:  # of a package that is not there
        return False
    return found is not None and found.has_location


def register() -> None:
    """Makes our algorithms known to the Zoo in this process."""
    rl_zoo3.ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update(mbpo=sample_mbpo_params, dhmbpo=sample_dhmbpo_params)
    for algorithm in ALGORITHMS:
        HYPERPARAMS_CONVERTER[algorithm] = lambda sampled_params: sampled_params  # they are arguments by name
    vars(rl_zoo3.train)["ExperimentManager"] = Experiment  # `train` looks it up there


def run_script(name: str) -> None:
    """
    Runs one of the Zoo's scripts.

    :param name: of :data:`SCRIPTS`; ``benchmark`` starts ``python enjoy.py`` and gets our ``enjoy`` instead
    """
    call = subprocess.call

    def call_with_our_enjoy(command: list[str], **kwargs: Any) -> int:
        ours = [sys.executable, "-m", "sb3_mbpo.zoo", "enjoy", *command[2:]]
        return call(ours if command[:2] == ["python", "enjoy.py"] else command, **kwargs)

    vars(subprocess)["call"] = call_with_our_enjoy
    runpy.run_module(f"rl_zoo3.{name}", run_name="__main__")


def main() -> None:
    """The Zoo's command line. What follows the command is read by the command."""
    parser = argparse.ArgumentParser("python -m sb3_mbpo.zoo", description="The RL Zoo's commands, with mbpo and dhmbpo.")
    parser.add_argument("command", choices=[*COMMANDS, *SCRIPTS], help="say `COMMAND --help` for its options")
    command = parser.parse_args(sys.argv[1:2]).command
    register()
    from rl_zoo3.cli import main as zoo_main  # builds its list of algorithms now

    if command in SCRIPTS:
        run_script(sys.argv.pop(1))
    else:
        zoo_main()


if __name__ == "__main__":
    main()
