"""Which spaces can be modelled, how observations lie flat, and how the policy sees them."""

import math
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer


class UnsupportedActionSpaceError(ValueError, AssertionError):
    """A wrong action space. Also an ``AssertionError``, because that is what SB3's algorithms raise."""


def why_not_modelled(observation_space: spaces.Space[Any], replay_buffer_class: type[ReplayBuffer]) -> str | None:
    """
    :param observation_space: the environment's
    :param replay_buffer_class: the class that holds the real transitions
    :return: why MBPO cannot learn the dynamics of these observations; ``None`` when it can
    """
    if issubclass(replay_buffer_class, HerReplayBuffer):
        return "HerReplayBuffer changes the goals of stored transitions, which imagined ones do not have"
    parts = observation_space.spaces.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    for part in parts:
        if isinstance(part, spaces.Box) and len(part.shape) >= 3:
            return f"its dynamics is not made for images, but the observations hold {part}"
        if not isinstance(part, spaces.Box) or not np.issubdtype(part.dtype, np.floating):
            return f"its dynamics predicts real numbers, but the observations hold {part}"
    return None


class ObservationLayout:
    """
    Between observations as the environment gives them (arrays, or dicts of arrays) and flat vectors, which the
    dynamics and the imagined rows use. A dict is flattened in its space's own order.

    :param observation_space: a Box, or a Dict of Boxes
    """

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        self._is_dict = isinstance(observation_space, spaces.Dict)
        parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        self._shapes: dict[str, tuple[int, ...]] = {key: tuple(space.shape or ()) for key, space in parts.items()}
        self._sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        self.obs_dim = sum(self._sizes)

    def flatten(self, observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        :param observations: (batch, *shape), or a dict of them
        :return: (batch, obs_dim), float32
        """
        parts = [observations[key] for key in self._shapes] if isinstance(observations, dict) else [observations]
        columns = [part.reshape(-1, size) for part, size in zip(parts, self._sizes, strict=True)]
        flat: np.ndarray = np.concatenate(columns, axis=1, dtype=np.float32)
        return flat

    def policy_input(self, observations: th.Tensor, vec_normalize: VecNormalize | None) -> th.Tensor | dict[str, th.Tensor]:
        """
        :param observations: (batch, obs_dim), raw and flat
        :param vec_normalize: whose current statistics normalise them; they are not updated
        :return: (batch, *shape), or a dict of them, float32: what the policy expects; differentiable
        """
        columns = observations.split(self._sizes, dim=-1)
        parts = {key: column.reshape(-1, *shape) for column, (key, shape) in zip(columns, self._shapes.items(), strict=True)}
        if vec_normalize is not None and vec_normalize.norm_obs:
            statistics: Any = vec_normalize.obs_rms if self._is_dict else {"": vec_normalize.obs_rms}
            for key, statistic in statistics.items():
                parts[key] = _standardize(parts[key], statistic, vec_normalize)
        return parts if self._is_dict else parts[""]


def normalize_rewards(rewards: th.Tensor, vec_normalize: VecNormalize | None) -> th.Tensor:
    """
    :param rewards: (..., batch), raw
    :param vec_normalize: whose current statistics scale them; they are not updated
    :return: of the same shape: what the critics are fed
    """
    if vec_normalize is None or not vec_normalize.norm_reward:
        return rewards
    scaled = rewards.double() / math.sqrt(vec_normalize.ret_rms.var + vec_normalize.epsilon)
    return scaled.clamp(-vec_normalize.clip_reward, vec_normalize.clip_reward).float()


def _standardize(values: th.Tensor, statistics: RunningMeanStd, vec_normalize: VecNormalize) -> th.Tensor:
    """What SB3's ``normalize_obs`` does, in the same precision, but differentiable."""
    mean, var = (th.as_tensor(moment, device=values.device) for moment in (statistics.mean, statistics.var))
    scaled = (values.double() - mean) / (var + vec_normalize.epsilon).sqrt()
    return scaled.clamp(-vec_normalize.clip_obs, vec_normalize.clip_obs).float()
