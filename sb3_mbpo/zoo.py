"""
The RL Zoo's own commands, with ``mbpo`` among its algorithms (extra ``zoo``)::

    python -m sb3_mbpo.zoo train --algo mbpo --env Pendulum-v1
    python -m sb3_mbpo.zoo enjoy --algo mbpo --env Pendulum-v1 -f logs
    python -m sb3_mbpo.zoo train --algo mbpo --env Pendulum-v1 --optimize --n-trials 20

``all_plots``, ``plot_train`` and ``plot_from_file`` follow. Everything behind the command is the Zoo's.
"""

import sys
from pathlib import Path
from typing import Any

import optuna
import rl_zoo3
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

from sb3_mbpo.mbpo import MBPO

HYPERPARAMS = Path(__file__).parent / "hyperparams" / "mbpo.yml"


def sample_mbpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    What ``--optimize`` searches: the parameters that are MBPO's own, and the learning rate.

    :param trial: of Optuna
    :param n_actions: not used; the Zoo's signature
    :param n_envs: not used
    :param additional_args: not used
    """
    trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True)
    trial.suggest_int("gradient_steps", 1, 20, log=True)
    trial.suggest_int("rollout_length", 1, 5)
    trial.suggest_int("dynamics_train_freq", 100, 1000, log=True)
    trial.suggest_float("real_ratio", 0.02, 0.5, log=True)
    return convert_mbpo_params(trial.params)


def convert_mbpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """:return: the same: what was sampled are MBPO's parameters by name"""
    return dict(sampled_params)


def register() -> None:
    """Makes ``mbpo`` known to the Zoo in this process."""
    rl_zoo3.ALGOS["mbpo"] = MBPO
    HYPERPARAMS_SAMPLER["mbpo"] = sample_mbpo_params
    HYPERPARAMS_CONVERTER["mbpo"] = convert_mbpo_params


def main() -> None:
    """The Zoo's command line; the settings of this package stand in for those that the Zoo has not."""
    register()
    from rl_zoo3.cli import main as zoo_main  # builds its list of algorithms now

    if sys.argv[1:2] == ["train"] and "mbpo" in sys.argv and not {"-conf", "--conf-file"} & set(sys.argv):
        sys.argv += ["--conf-file", str(HYPERPARAMS)]
    zoo_main()


if __name__ == "__main__":
    main()
