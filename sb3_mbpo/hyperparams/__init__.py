"""
Settings per environment in the RL Zoo's format: ``mbpo.yml``, ours; ``mbpo_paper.yml``, those of the paper; ``dhmbpo.yml``,
those of DHMBPO.

The Zoo reads the files by itself; the benchmark and the examples call :func:`load_settings`.
"""

import inspect
import math
import re
from copy import deepcopy
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

FOLDER = Path(__file__).parent


class Settings(NamedTuple):
    """What a file says about one environment."""

    n_timesteps: int
    policy: str
    n_envs: int
    #: Keyword arguments of ``gymnasium.make``.
    env_kwargs: dict[str, Any]
    #: Keyword arguments of ``VecNormalize``; ``None``: no normalisation.
    normalize: dict[str, Any] | None
    #: Keyword arguments of the algorithm, as the file has them; see :func:`as_arguments`.
    kwargs: dict[str, Any]


def settings_file(name: str | Path) -> Path:
    """
    :param name: of a file here, such as ``"mbpo"`` or ``"mbpo_paper"``, or the path of a YAML file of your own
    :raises ValueError: when there is no such file
    """
    return named_file(FOLDER, name, "file of settings")


def named_file(folder: Path, name: str | Path, kind: str) -> Path:
    """
    :param folder: of our YAML files
    :param name: of one of them, without its ending, or the path of another YAML file
    :param kind: what such a file is called
    :raises ValueError: when there is no such file
    """
    path = folder / f"{name}.yml" if Path(name).suffix not in (".yml", ".yaml") else Path(name)
    if not path.is_file():
        ours = sorted(file.stem for file in folder.glob("*.yml"))
        raise ValueError(f"There is no {kind} {str(name)!r}: pass one of {ours} or the path of a YAML file.")
    return path


def load_settings(env_id: str, name: str | Path = "mbpo") -> Settings:
    """
    :param env_id: of Gymnasium; what the file does not list gets its ``default``
    :param name: see :func:`settings_file`
    :return: what the file says about the environment
    :raises ValueError: when there is no such file, it is no YAML mapping of mappings, or has a key twice; when neither the
        environment nor a ``default`` is in it, or no ``n_timesteps`` or ``policy`` there; when a value is of the wrong type,
        such as ``policy_kwargs`` in Python code, which only the Zoo runs; or when ``VecNormalize`` has no such argument
    """
    path = settings_file(name)
    content = read_yaml(path)
    found = content.get(env_id, content.get("default"))
    if found is None:
        raise ValueError(f"{path} has neither {env_id!r} nor 'default', only {sorted(content)}.")
    if not isinstance(found, dict):
        raise ValueError(f"{path} needs a mapping for {env_id!r}, but it has {found!r}.")
    missing = sorted({"n_timesteps", "policy"} - set(found))
    if missing:
        raise ValueError(f"{path} has no {missing} for {env_id!r}: add them.")
    for argument, value in found.items():
        if argument.endswith("_kwargs") and isinstance(value, str):
            raise ValueError(
                f"Expected a YAML mapping as `{argument}` of {env_id!r} in {path}, but got {value!r}: only the Zoo runs code."
            )
    kwargs = dict(found)
    normalize = normalize_kwargs(kwargs.pop("normalize", False))
    n_timesteps, policy = kwargs.pop("n_timesteps"), kwargs.pop("policy")
    n_envs, env_kwargs = kwargs.pop("n_envs", 1), kwargs.pop("env_kwargs", {})
    for argument, value, fits, expected in (
        (
            "n_timesteps",
            n_timesteps,
            isinstance(n_timesteps, Real) and 1 <= float(n_timesteps) < math.inf,
            "a number of at least 1",
        ),
        ("policy", policy, isinstance(policy, str), "text"),
        ("n_envs", n_envs, isinstance(n_envs, Integral) and int(n_envs) >= 1, "an int of at least 1"),
        ("env_kwargs", env_kwargs, isinstance(env_kwargs, dict), "a YAML mapping"),
    ):
        if not fits:
            raise ValueError(f"Expected {expected} as `{argument}` of {env_id!r} in {path}, but got {value!r}.")
    return Settings(int(n_timesteps), policy, n_envs, env_kwargs, normalize, kwargs)


def as_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    :param kwargs: of a file, or of a suite
    :return: a copy in words of Python: a list becomes a tuple, and a learning rate "lin_3e-4", the Zoo's word for one that
        falls to zero until the end of ``learn``, a schedule
    :raises ValueError: when what follows "lin_" is no positive number
    """
    return {name: _as_argument(name, value) for name, value in kwargs.items()}


def _as_argument(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if name != "learning_rate" or not isinstance(value, str):
        return deepcopy(value)  # SB3 changes what it gets
    match = re.fullmatch(r"lin_(\d+\.?\d*(e-?\d+)?)", value)
    if match is None or float(match[1]) == 0.0:
        raise ValueError(
            f"Expected a positive number, or 'lin_' and one, as `learning_rate`, but got {value!r}. (To YAML, 3.0e-4 is a "
            "number and 3e-4 is text.)"
        )
    return LinearSchedule(float(match[1]), 0.0, 1.0)


def read_yaml(path: Path) -> dict[Any, Any]:
    """
    :param path: of a YAML file
    :return: its mapping, which is empty if the file is
    :raises ValueError: when it is no YAML, a key is repeated, or it is something else than a mapping
    """
    try:
        content = yaml.load(path.read_text(), _Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a YAML mapping in {path}, but got {content!r}.")
    return content


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's own would keep the last of several equal keys, and drop the others without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def normalize_kwargs(normalize: bool | dict[str, Any]) -> dict[str, Any] | None:
    """
    :param normalize: the Zoo's word: whether to wrap the environments in ``VecNormalize``, or its keyword arguments
    :return: its keyword arguments, or ``None``
    :raises ValueError: for anything else, such as an expression, which the Zoo would evaluate, or an argument it does not have
    """
    if not isinstance(normalize, bool | dict):
        raise ValueError(f"Expected true, false or a YAML mapping as `normalize`, but got {normalize!r}.")
    if isinstance(normalize, bool):
        return {} if normalize else None
    known = sorted(set(inspect.signature(VecNormalize).parameters) - {"venv"})
    if unknown := sorted(set(normalize) - set(known), key=str):
        raise ValueError(f"`normalize` has {unknown}, which VecNormalize does not know. It may have {known}.")
    return dict(normalize)
