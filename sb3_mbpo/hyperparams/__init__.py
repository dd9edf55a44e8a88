"""
Settings per environment in the RL Zoo's format: ``mbpo.yml``, ours; ``mbpo_paper.yml``, those of the paper.

The Zoo reads the files by itself; the benchmark and the examples call :func:`load_settings`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

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
    #: Keyword arguments of the algorithm.
    kwargs: dict[str, Any]


def settings_file(name: str | Path) -> Path:
    """
    :param name: of a file here, such as ``"mbpo"`` or ``"mbpo_paper"``, or the path of a YAML file of your own
    :raises ValueError: when there is no such file
    """
    path = FOLDER / f"{name}.yml" if Path(name).suffix not in (".yml", ".yaml") else Path(name)
    if not path.is_file():
        ours = sorted(file.stem for file in FOLDER.glob("*.yml"))
        raise ValueError(f"There are no settings {str(name)!r}: pass one of {ours} or the path of a YAML file.")
    return path


def load_settings(env_id: str, name: str | Path = "mbpo") -> Settings:
    """
    :param env_id: of Gymnasium; what the file does not list gets its ``default``
    :param name: see :func:`settings_file`
    :return: what the file says about the environment
    :raises ValueError: when there is no such file, neither the environment nor a ``default`` in it, or no ``n_timesteps``
        or ``policy`` there; or when ``normalize`` is Python code in a string, which only the Zoo runs
    """
    path = settings_file(name)
    content = yaml.safe_load(path.read_text()) or {}
    found = content.get(env_id, content.get("default"))
    if found is None:
        raise ValueError(f"{path} has neither {env_id!r} nor 'default', only {sorted(content)}.")
    missing = sorted({"n_timesteps", "policy"} - set(found))
    if missing:
        raise ValueError(f"{path} has no {missing} for {env_id!r}: add them.")
    kwargs = dict(found)
    normalize = normalize_kwargs(kwargs.pop("normalize", False))
    n_timesteps, policy = int(kwargs.pop("n_timesteps")), kwargs.pop("policy")
    return Settings(n_timesteps, policy, kwargs.pop("n_envs", 1), kwargs.pop("env_kwargs", {}), normalize, kwargs)


def normalize_kwargs(normalize: bool | dict[str, Any]) -> dict[str, Any] | None:
    """
    :param normalize: the Zoo's word: whether to wrap the environments in ``VecNormalize``, or its keyword arguments
    :return: its keyword arguments, or ``None``
    :raises ValueError: for an expression, which the Zoo would evaluate
    """
    if isinstance(normalize, str):
        raise ValueError(f"Expected true, false or a YAML mapping as `normalize`, but got {normalize!r}.")
    if isinstance(normalize, bool):
        return {} if normalize else None
    return dict(normalize)
