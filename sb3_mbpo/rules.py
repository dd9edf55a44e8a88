"""The calling of termination and reward rules: those of users, written for NumPy or for torch, and the known ones."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

from sb3_mbpo.type_aliases import RewardFn, TerminationFn


def takes_tensors(fn: Callable[..., Any]) -> Callable[..., Any]:
    """
    Marks a ``termination_fn`` or ``reward_fn`` that is written for torch: it gets float32 tensors on the model's
    device and returns one, and leaves what it got as it is. An unmarked function gets NumPy float32 arrays of its own.
    """

    @functools.wraps(fn)
    def marked(*arguments: Any) -> Any:
        return fn(*arguments)

    marked.takes_tensors = True  # type: ignore[attr-defined]
    return marked


def check_rules(**rules: Callable[..., Any] | None) -> None:
    """
    :param rules: the parameters by name
    :raises ValueError: when one can be neither called nor left out
    """
    for name, fn in rules.items():
        if fn is not None and not callable(fn):
            raise ValueError(f"`{name}` must be a function (obs, action, next_obs), or None, but got {fn!r}.")


def evaluate_termination(fn: TerminationFn, obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
    """
    :param fn: the user's function or a known rule
    :param obs: (batch, obs_dim), raw
    :param action: (batch, action_dim), in the environment's units
    :param next_obs: (batch, obs_dim), raw
    :return: (batch,), bool
    :raises ValueError: when ``fn`` returns another shape or type
    """
    return _evaluate(fn, "termination_fn", th.bool, obs, action, next_obs)


def evaluate_reward(fn: RewardFn, obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
    """Like :func:`evaluate_termination`, for rewards: (batch,), float32."""
    return _evaluate(fn, "reward_fn", th.float32, obs, action, next_obs)


def _evaluate(fn: Callable[..., Any], name: str, dtype: th.dtype, *arguments: th.Tensor) -> th.Tensor:
    in_torch = getattr(fn, "takes_tensors", False)
    result = fn(*arguments) if in_torch else fn(*(argument.numpy(force=True).copy() for argument in arguments))
    batch, kind = len(arguments[0]), "bool" if dtype == th.bool else "float"
    expected_type = th.Tensor if in_torch else np.ndarray
    if not isinstance(result, expected_type):
        raise ValueError(
            f"`{name}` must return a {expected_type.__module__}.{expected_type.__name__} of shape ({batch},), "
            f"but returned {type(result).__name__}. Decorate it with `sb3_mbpo.takes_tensors` if it is written for torch."
        )
    tensor = th.as_tensor(result, device=arguments[0].device)
    of_kind = tensor.dtype == th.bool if dtype == th.bool else tensor.is_floating_point()
    if tuple(tensor.shape) != (batch,) or not of_kind:
        raise ValueError(
            f"`{name}` must return one {kind} per row, shape ({batch},), but returned shape {tuple(tensor.shape)} "
            f"of {str(tensor.dtype).removeprefix('torch.')}. It gets observations of shape {tuple(arguments[0].shape)} "
            f"and actions of shape {tuple(arguments[1].shape)}."
        )
    return tensor.to(dtype)
