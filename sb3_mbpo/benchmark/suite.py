"""
Suites: YAML files that say what to run, algorithms by environments by seeds::

    eval_freq: 500          # environment steps between two evaluations; there is one at the end, too
    eval_episodes: 10
    seeds: [0, 1, 2]
    environments:
      Pendulum-v1: {steps: 3000, scores: [-1246, -150]}
    algorithms:
      MBPO: {class: sb3_mbpo.MBPO, settings: mbpo}
      SAC: {class: stable_baselines3.SAC}

An environment of yours is written as Gymnasium does, ``my_package:MyEnv-v0``: the module registers it when it is imported. An
environment may have its own ``eval_freq`` and ``eval_episodes``; ``env_kwargs`` for ``gymnasium.make`` are those of
``hyperparams/mbpo.yml`` unless it says otherwise, the same for all algorithms. ``scores`` are the returns that count as 0 and
1 in a report.

An algorithm's ``settings`` are a file in ``hyperparams`` or one of yours. An algorithm other than MBPO takes from it all (the
warm-up, the updates per step, the target entropy, what is normalised) but what only MBPO and DHMBPO have, and MBPO's defaults
for the first two: so SAC runs at MBPO's ratio of updates to steps, and nothing but the model is missing. ``kwargs`` go on
top, ``normalize`` and ``n_envs`` replace those of the settings.
"""

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.benchmark.results import check_scores
from sb3_mbpo.hyperparams import Settings, as_arguments, load_settings, named_file, normalize_kwargs, read_yaml
from sb3_mbpo.schedules import check_positive

FOLDER = Path(__file__).parent / "suites"
COMMON = {"eval_freq": 1000, "eval_episodes": 10}
IN_SUITE = {"seeds", "environments", "algorithms", *COMMON}
IN_ENVIRONMENT = {"steps", "env_kwargs", "scores", *COMMON}
IN_ALGORITHM = {"class", "settings", "kwargs", "normalize", "n_envs"}


@dataclass(frozen=True)
class Run:
    """
    One algorithm on one environment with one seed.

    :param environment: id of Gymnasium, perhaps with the module that registers it
    :param algorithm: its name in the suite
    :param seed: of the algorithm and its environments
    :param steps: environment steps
    :param eval_freq: environment steps between two evaluations
    :param eval_episodes: of each evaluation
    :param class_name: of the algorithm, with its module
    :param policy: its first argument
    :param kwargs: its other arguments
    :param n_envs: training environments
    :param env_kwargs: for ``gymnasium.make``
    :param normalize: for ``VecNormalize``; ``None``: none
    :param scores: the returns that count as 0 and 1
    """

    environment: str
    algorithm: str
    seed: int
    steps: int
    eval_freq: int
    eval_episodes: int
    class_name: str
    policy: str
    kwargs: dict[str, Any]
    n_envs: int
    env_kwargs: dict[str, Any]
    normalize: dict[str, Any] | None
    scores: list[float] | None

    @property
    def folder(self) -> Path:
        """Below the folder of the results."""
        return Path(re.sub(r"[/:]", "_", self.environment), _slug(self.algorithm), f"seed_{self.seed}")

    def __str__(self) -> str:
        return f"{self.environment}, {self.algorithm}, seed {self.seed}"


def load_suite(name: str | Path) -> list[Run]:
    """
    :param name: of a suite here, such as ``"quick"``, or the path of a YAML file
    :return: its runs; all environments and algorithms of the first seed come first
    :raises ValueError: when there is no such file, or it says what nobody understands
    """
    path = named_file(FOLDER, name, "suite")
    suite = read_yaml(path)
    _check_keys(str(path), suite, IN_SUITE, {"seeds", "environments", "algorithms"})
    for part, kind in {"seeds": list, "environments": dict, "algorithms": dict}.items():
        if not (isinstance(suite[part], kind) and suite[part]):
            what = "list" if kind is list else "mapping"
            raise ValueError(f"Expected a {what} of at least one entry as `{part}` in {path}, but got {suite[part]!r}.")
    runs = [
        _make_run(environment, suite["environments"][environment], algorithm, suite["algorithms"][algorithm], seed, suite)
        for seed in suite["seeds"]
        for environment in suite["environments"]
        for algorithm in suite["algorithms"]
    ]
    if len({run.folder for run in runs}) < len(runs):
        raise ValueError(f"Two runs of {path} would share a folder: repeat no seed, and give the algorithms distinct names.")
    return runs


def algorithm_class(name: str) -> type[OffPolicyAlgorithm]:
    """
    :param name: such as ``"stable_baselines3.SAC"``
    :raises ValueError: when there is none
    """
    try:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"There is no algorithm {name!r}: write its module and class, such as 'sb3_contrib.TQC' ({error})."
        ) from error
    if not (isinstance(found, type) and issubclass(found, OffPolicyAlgorithm)):
        raise ValueError(f"{name!r} is no off-policy algorithm of Stable-Baselines3, and the benchmark compares only those.")
    return found


def _make_run(
    environment: str, of_environment: Any, algorithm: str, of_algorithm: Any, seed: Any, suite: Mapping[str, Any]
) -> Run:
    _check_keys(environment, of_environment, IN_ENVIRONMENT, {"steps"})
    _check_keys(algorithm, of_algorithm, IN_ALGORITHM, {"class"})
    env_id = _registered(environment)
    for what, text in (("the name of an algorithm", algorithm), ("`settings`", of_algorithm.get("settings", ""))):
        if not isinstance(text, str):
            raise ValueError(f"Expected text as {what}, but got {text!r}: write it in quotes.")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"Expected seeds that are ints from 0 on, but got {seed!r}.")
    for name, found in (("env_kwargs", of_environment.get("env_kwargs", {})), ("kwargs", of_algorithm.get("kwargs", {}))):
        if not isinstance(found, dict):
            raise ValueError(f"Expected a mapping as `{name}`, but got {found!r}.")
    scores = of_environment.get("scores")
    if scores is not None:
        check_scores(environment, scores)
    common = {**COMMON, **suite, **of_environment}
    usual = load_settings(env_id)
    settings = Settings(usual.n_timesteps, "MlpPolicy", 1, {}, None, {})
    if "settings" in of_algorithm:
        settings = load_settings(env_id, of_algorithm["settings"])
        if "env_kwargs" not in of_environment and settings.env_kwargs not in ({}, usual.env_kwargs):
            raise ValueError(
                f"The settings {of_algorithm['settings']!r} have env_kwargs {settings.env_kwargs} for {environment}, but "
                f"{usual.env_kwargs} are usual. Write those that all algorithms are to have as `env_kwargs` of the suite's "
                "environment."
            )
    steps = check_positive("steps", of_environment["steps"])
    return Run(
        environment=environment,
        algorithm=algorithm,
        seed=seed,
        steps=steps,
        eval_freq=check_positive("eval_freq", common["eval_freq"]),
        eval_episodes=check_positive("eval_episodes", common["eval_episodes"]),
        class_name=of_algorithm["class"],
        policy=settings.policy,
        # no run can fill a larger buffer, and a checkpoint is as large as its buffer
        kwargs={"buffer_size": steps, **_keyword_arguments(of_algorithm, settings)},
        n_envs=check_positive("n_envs", of_algorithm.get("n_envs", settings.n_envs)),
        env_kwargs=of_environment.get("env_kwargs", usual.env_kwargs),
        normalize=normalize_kwargs(of_algorithm["normalize"]) if "normalize" in of_algorithm else settings.normalize,
        scores=scores,
    )


def _registered(environment: str) -> str:
    """:return: its id, without the module, which is imported"""
    module, _, env_id = str(environment).rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except (ImportError, TypeError) as error:
        raise ValueError(f"The module of {environment!r} cannot be imported: {error}.") from error
    if env_id not in gym.registry:
        raise ValueError(
            f"Gymnasium knows no environment {environment!r}. Write one of yours as 'my_package:MyEnv-v0', where importing "
            "the module registers it."
        )
    return env_id


def _keyword_arguments(of_algorithm: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    algorithm = algorithm_class(of_algorithm["class"])
    parameters = inspect.signature(algorithm).parameters
    known = set(parameters) - {"policy", "env", "seed", "device"}  # the run has its own
    kwargs = settings.kwargs
    if "settings" in of_algorithm and not issubclass(algorithm, MBPO):
        of_mbpo = inspect.signature(MBPO).parameters
        defaults = {name: of_mbpo[name].default for name in ("learning_starts", "gradient_steps")}
        model_based = {*of_mbpo, *inspect.signature(DHMBPO).parameters} - set(parameters)
        kwargs = {name: value for name, value in {**defaults, **kwargs}.items() if name not in model_based}
    kwargs = {**kwargs, **of_algorithm.get("kwargs", {})}
    if unknown := set(kwargs) - known:
        raise ValueError(f"{of_algorithm['class']} has no parameters {sorted(unknown)}; it has {sorted(known)}.")
    as_arguments(kwargs)  # now, before anything runs, it says what it cannot read
    return kwargs


def _check_keys(name: str, entry: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(entry, Mapping) or not needed <= set(entry) <= known:
        found = sorted(map(str, entry)) if isinstance(entry, Mapping) else entry
        raise ValueError(f"{name} needs {sorted(needed)} and may have {sorted(known - needed)}, but it has {found}.")


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")
