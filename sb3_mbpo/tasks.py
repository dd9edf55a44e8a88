"""
Termination and reward rules of Gymnasium's environments, read off the environment's own parameters.

Sources: gymnasium ``envs/mujoco/*_v4.py`` and ``*_v5.py``, ``envs/classic_control/{pendulum,continuous_mountain_car}.py``.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbpo.rules import takes_tensors
from sb3_mbpo.type_aliases import RewardFn, TerminationFn

#: Wrappers that change neither observations, nor actions, nor rewards, nor terminations; the patched one is the RL Zoo's.
_TRANSPARENT_WRAPPERS = "(Patched)?TimeLimit|OrderEnforcing|PassiveEnvChecker|Monitor|RecordEpisodeStatistics|RecordVideo"


class _Task(NamedTuple):
    """An environment that this module knows by name, and the way to its parameters."""

    name: str
    version: int
    env: VecEnv

    def read(self, attribute: str) -> Any:
        """
        The value that all environments share.

        :raises LookupError: when they differ
        """
        first, *others = self.env.get_attr(attribute)
        if any(not np.array_equal(first, other) for other in others):
            raise LookupError(attribute)
        return first

    def skipped(self, positions: int) -> int:
        """
        Columns before the first one that every layout has.

        :param positions: x, or x and y, that may be left out
        """
        return 0 if self.read("_exclude_current_positions_from_observation") else positions


def _identify(env: VecEnv | None) -> _Task | None:
    if env is None:
        return None
    if not isinstance(env, VecEnv):
        raise ValueError(f"Expected a VecEnv, but got {type(env).__name__}: make it with SB3's `make_vec_env`.")
    try:
        # as text: a `spec` may hold functions, which cannot be sent from another process
        descriptions, inner_spaces = env.env_method("__str__"), env.get_attr("observation_space")
    except (AttributeError, NotImplementedError, TypeError):  # a VecEnv that is not made of Gymnasium's environments
        return None
    if env.observation_space.shape != inner_spaces[0].shape:  # stacked frames, for example
        return None
    first, *others = (_name_and_version(str(description)) for description in descriptions)
    return _Task(*first, env) if first is not None and all(other == first for other in others) else None


def _name_and_version(description: str) -> tuple[str, int] | None:
    """
    :param description: what Gymnasium calls an environment and its wrappers, ``<TimeLimit<PendulumEnv<Pendulum-v1>>>``
    :return: ``("Pendulum", 1)``; ``None`` without an id, or with a wrapper that may change something
    """
    match = re.fullmatch(rf"<(?:(?:{_TRANSPARENT_WRAPPERS})<)*\w+<(?P<name>\w+)-v(?P<version>\d+)>+", description)
    return (match["name"], int(match["version"])) if match else None


def known_termination_fn(env: VecEnv | None) -> TerminationFn | None:
    """
    The termination rule of a Gymnasium environment, with the thresholds and the observation layout that this
    instance has.

    :param env: a (wrapped) VecEnv
    :return: a function of torch tensors; ``None`` when the environment is unknown, wrapped in something that may
        change its observations, or differs from env to env
    """
    return _rule(env, _TERMINATION_RULES)


def known_reward_fn(env: VecEnv | None) -> RewardFn | None:
    """
    The reward of a Gymnasium environment, where it is a function of observation, action and next observation:
    Pendulum, MountainCarContinuous, InvertedPendulum, InvertedDoublePendulum, Reacher and Pusher. The others reward
    a displacement that their observations leave out.

    :param env: a (wrapped) VecEnv
    :return: a function of torch tensors, for ``reward_fn``; ``None`` when it is not known
    """
    return _rule(env, _REWARD_RULES)


def _rule(env: VecEnv | None, rules: dict[str, tuple[set[int], Callable[[_Task], Any]]]) -> Callable[..., Any] | None:
    task = _identify(env)
    if task is None or task.name not in rules:
        return None
    versions, make_rule = rules[task.name]
    if task.version not in versions:
        return None
    try:
        rule = make_rule(task)
    except LookupError:
        return None
    return takes_tensors(rule)


def _inside(column: th.Tensor, bounds: tuple[float, float]) -> th.Tensor:
    """Strictly between the bounds; False for NaN."""
    return (column > bounds[0]) & (column < bounds[1])


def _never(task: _Task) -> TerminationFn:
    def terminated(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return th.zeros(len(next_obs), dtype=th.bool, device=next_obs.device)

    return terminated


def _unless_healthy(task: _Task, healthy: Callable[[th.Tensor], th.Tensor]) -> TerminationFn:
    if not task.read("_terminate_when_unhealthy"):
        return _never(task)

    def terminated(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return ~healthy(next_obs)

    return terminated


def _hopper(task: _Task) -> TerminationFn:
    z = task.skipped(1)  # columns: (x,) z, angle, three joints, six velocities
    z_range, angle_range, state_range = (task.read(f"_healthy_{part}_range") for part in ("z", "angle", "state"))

    def healthy(obs: th.Tensor) -> th.Tensor:
        in_state = _inside(obs[:, z + 1 :], state_range).all(dim=-1)
        return in_state & _inside(obs[:, z], z_range) & _inside(obs[:, z + 1], angle_range)

    return _unless_healthy(task, healthy)


def _walker2d(task: _Task) -> TerminationFn:
    z = task.skipped(1)
    z_range, angle_range = task.read("_healthy_z_range"), task.read("_healthy_angle_range")
    return _unless_healthy(task, lambda obs: _inside(obs[:, z], z_range) & _inside(obs[:, z + 1], angle_range))


def _ant(task: _Task) -> TerminationFn:
    z = task.skipped(2)
    low, high = task.read("_healthy_z_range")  # inclusive, unlike the others
    return _unless_healthy(task, lambda obs: obs.isfinite().all(dim=-1) & (obs[:, z] >= low) & (obs[:, z] <= high))


def _humanoid(task: _Task) -> TerminationFn:
    z = task.skipped(2)
    z_range = task.read("_healthy_z_range")
    return _unless_healthy(task, lambda obs: _inside(obs[:, z], z_range))


def _inverted_pendulum(task: _Task) -> TerminationFn:
    def terminated(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return ~next_obs.isfinite().all(dim=-1) | (next_obs[:, 1].abs() > 0.2)

    return terminated


def _double_pendulum_tip(task: _Task) -> Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]]:
    """x and height of the tip, from the columns x, sin1, sin2, cos1, cos2 and the lengths of the two poles."""
    lengths = {(float(model.body_pos[-1, 2]), float(model.site_pos[0, 2])) for model in task.env.get_attr("model")}
    if len(lengths) > 1:
        raise LookupError("model")
    ((first, second),) = lengths

    def tip(obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        x, sin1, sin2, cos1, cos2 = obs[:, :5].unbind(dim=-1)
        height = first * cos1 + second * (cos1 * cos2 - sin1 * sin2)
        return x + first * sin1 + second * (sin1 * cos2 + cos1 * sin2), height

    return tip


def _inverted_double_pendulum(task: _Task) -> TerminationFn:
    tip = _double_pendulum_tip(task)

    def terminated(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return ~(tip(next_obs)[1] > 1.0)

    return terminated


def _mountain_car(task: _Task) -> TerminationFn:
    goal_position, goal_velocity = task.read("goal_position"), task.read("goal_velocity")

    def terminated(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        return th.logical_and(next_obs[:, 0] >= goal_position, next_obs[:, 1] >= goal_velocity)

    return terminated


def _mountain_car_reward(task: _Task) -> RewardFn:
    terminated = _mountain_car(task)

    def reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        bonus: th.Tensor = 100.0 * terminated(obs, action, next_obs)
        return bonus - 0.1 * action[:, 0].square()

    return reward


def _pendulum_reward(task: _Task) -> RewardFn:
    max_torque = task.read("max_torque")

    def reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        angle, torque = th.atan2(obs[:, 1], obs[:, 0]), action[:, 0].clamp(-max_torque, max_torque)
        cost: th.Tensor = angle.square() + 0.1 * obs[:, 2].square() + 0.001 * torque.square()
        return -cost

    return reward


def _inverted_pendulum_reward(task: _Task) -> RewardFn:
    terminated, is_v4 = _inverted_pendulum(task), task.version == 4

    def reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        if is_v4:  # pays for the last step too
            return th.ones_like(next_obs[:, 0])
        paid: th.Tensor = ~terminated(obs, action, next_obs)
        return paid.float()

    return reward


def _inverted_double_pendulum_reward(task: _Task) -> RewardFn:
    tip, terminated = _double_pendulum_tip(task), _inverted_double_pendulum(task)
    is_v4 = task.version == 4
    alive_bonus = 10.0 if is_v4 else task.read("_healthy_reward")

    def reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        x, height = tip(next_obs)
        penalty = 0.01 * x.square() + (height - 2.0).square()
        penalty = penalty + 1e-3 * next_obs[:, 6].square() + 5e-3 * next_obs[:, 7].square()
        paid = th.ones_like(x) if is_v4 else (~terminated(obs, action, next_obs)).float()
        return alive_bonus * paid - penalty

    return reward


def _reacher_reward(task: _Task) -> RewardFn:
    is_v4 = task.version == 4
    distance_weight, control_weight = (
        (1.0, 1.0) if is_v4 else (task.read("_reward_dist_weight"), task.read("_reward_control_weight"))
    )

    def reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        state = obs if is_v4 else next_obs  # v4 measures the distance before it moves
        cost: th.Tensor = distance_weight * state[:, 8:].norm(dim=-1) + control_weight * action.square().sum(dim=-1)
        return -cost

    return reward


def _pusher_reward(task: _Task) -> RewardFn:
    is_v4 = task.version == 4
    near, distance, control = (
        (0.5, 1.0, 0.1) if is_v4 else tuple(task.read(f"_reward_{part}_weight") for part in ("near", "dist", "control"))
    )

    def reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        state = obs if is_v4 else next_obs
        arm, thing, goal = state[:, 14:17], state[:, 17:20], state[:, 20:23]
        cost: th.Tensor = near * (thing - arm).norm(dim=-1) + distance * (thing - goal).norm(dim=-1)
        cost = cost + control * action.square().sum(dim=-1)
        return -cost

    return reward


_MUJOCO = {4, 5}
_TERMINATION_RULES: dict[str, tuple[set[int], Callable[[_Task], TerminationFn]]] = {
    "Pendulum": ({1}, _never),
    "MountainCarContinuous": ({0}, _mountain_car),
    "InvertedPendulum": (_MUJOCO, _inverted_pendulum),
    "InvertedDoublePendulum": (_MUJOCO, _inverted_double_pendulum),
    "Hopper": (_MUJOCO, _hopper),
    "Walker2d": (_MUJOCO, _walker2d),
    "HalfCheetah": (_MUJOCO, _never),
    "Ant": (_MUJOCO, _ant),
    "Humanoid": (_MUJOCO, _humanoid),
    "Swimmer": (_MUJOCO, _never),
    "Reacher": (_MUJOCO, _never),
    "Pusher": (_MUJOCO, _never),
}
_REWARD_RULES: dict[str, tuple[set[int], Callable[[_Task], RewardFn]]] = {
    "Pendulum": ({1}, _pendulum_reward),
    "MountainCarContinuous": ({0}, _mountain_car_reward),
    "InvertedPendulum": (_MUJOCO, _inverted_pendulum_reward),
    "InvertedDoublePendulum": (_MUJOCO, _inverted_double_pendulum_reward),
    "Reacher": (_MUJOCO, _reacher_reward),
    "Pusher": (_MUJOCO, _pusher_reward),
}
