import threading

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import LineEnv
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_mbpo.rules import evaluate_termination
from sb3_mbpo.tasks import known_reward_fn, known_termination_fn

WITH_POSITIONS = dict(exclude_current_positions_from_observation=False)
SHORT_ANT = dict(include_cfrc_ext_in_observation=False)
SHORT_HUMANOID = {f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}

TASKS = [
    *[
        (f"{name}-v{version}", {})
        for name in (
            "InvertedPendulum",
            "InvertedDoublePendulum",
            "Hopper",
            "Walker2d",
            "HalfCheetah",
            "Ant",
            "Humanoid",
            "Swimmer",
            "Reacher",
            "Pusher",
        )
        for version in (4, 5)
        if (name, version) != ("Pusher", 4)  # Gymnasium refuses it with today's MuJoCo
    ],
    ("Pendulum-v1", {}),
    ("MountainCarContinuous-v0", {}),
    ("MountainCarContinuous-v0", dict(goal_velocity=0.02)),
    *[(f"{name}-v5", WITH_POSITIONS) for name in ("Hopper", "Walker2d", "Ant", "Humanoid")],
    ("Ant-v5", SHORT_ANT),
    ("Ant-v4", dict(use_contact_forces=True)),
    ("Humanoid-v5", SHORT_HUMANOID),
    ("Hopper-v5", dict(terminate_when_unhealthy=False)),
    ("Hopper-v5", dict(healthy_z_range=(1.0, 1.4), healthy_angle_range=(-0.1, 0.3))),
    ("Walker2d-v5", dict(healthy_z_range=(1.0, 1.3), healthy_angle_range=(-0.3, 0.1))),
]
NEVER = {"HalfCheetah", "Swimmer", "Reacher", "Pusher", "Pendulum"}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def experience(env_id: str, env_kwargs: dict, n_steps: int) -> tuple[th.Tensor, th.Tensor, th.Tensor, np.ndarray, np.ndarray]:
    """What the real environment says to random actions (the mountain car is pushed along, to reach its goal)."""
    env = gym.make(env_id, **env_kwargs)
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    rows = []
    for _ in range(n_steps):
        action = env.action_space.sample()
        if env_id.startswith("MountainCar"):
            action = np.sign(observation[1:]) * np.abs(action) ** 0.2
        following, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        rows.append((observation, action, following, reward, terminated))
        observation = env.reset()[0] if terminated or truncated else following
    observations, actions, followings, rewards, ends = map(np.array, zip(*rows, strict=True))
    return *(th.as_tensor(part.astype(np.float32)) for part in (observations, actions, followings)), rewards, ends


@pytest.mark.parametrize(
    ("env_id", "env_kwargs"), TASKS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_known_rules_agree_with_the_real_environment(env_id, env_kwargs):
    env = make_vec_env(env_id, env_kwargs=env_kwargs)
    observations, actions, followings, rewards, ends = experience(env_id, env_kwargs, n_steps=2000)
    terminated = known_termination_fn(env)(observations, actions, followings)
    assert terminated.dtype == th.bool and terminated.shape == (2000,)
    assert (terminated.numpy() == ends).all()
    name = env_id.split("-")[0]
    assert ends.any() == (name not in NEVER and env_kwargs.get("terminate_when_unhealthy", True))
    reward_fn = known_reward_fn(env)
    if reward_fn is not None:
        errors = np.abs(reward_fn(observations, actions, followings).numpy() - rewards)
        # the double pendulum pays for its unclipped velocity, which differs when it falls
        assert errors[~ends].max() < (1e-3 if name == "InvertedDoublePendulum" else 1e-5)
        assert errors.max() < (0.05 if name == "InvertedDoublePendulum" else 1e-5)


def test_rewards_that_observations_do_not_determine_are_not_known():
    for name in ("Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid", "Swimmer"):
        assert known_reward_fn(make_vec_env(f"{name}-v5")) is None
    for env_id in ("Pendulum-v1", "MountainCarContinuous-v0", "Reacher-v5", "Pusher-v5", "InvertedPendulum-v5"):
        assert known_reward_fn(make_vec_env(env_id)) is not None


def healthy_hopper() -> th.Tensor:
    return th.tensor([[1.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize("value", [100.5, -100.5, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", range(2, 11))
def test_the_hopper_rule_rejects_large_states_of_either_sign(column, value):
    rule = known_termination_fn(make_vec_env("Hopper-v5"))
    state = healthy_hopper()
    assert not rule(state, state, state).item()
    state[0, column] = value
    assert rule(state, state, state).item()


@pytest.mark.parametrize("state", [(0.7, 0.0), (0.69, 0.0), (1.25, 0.2), (1.25, -0.2), (1.25, 0.21), (1.25, -0.21)])
def test_the_hopper_rule_at_its_thresholds(state):
    rule = known_termination_fn(make_vec_env("Hopper-v5"))
    row = healthy_hopper()
    row[0, :2] = th.tensor(state)
    assert rule(row, row, row).item()
    inside = healthy_hopper()
    inside[0, :2] = th.tensor([0.701, -0.199])
    assert not rule(inside, inside, inside).item()


def test_several_environments_in_processes_and_under_vec_normalize():
    env = VecNormalize(make_vec_env("Hopper-v5", 2, vec_env_cls=SubprocVecEnv, env_kwargs=dict(healthy_z_range=(1.0, 2.0))))
    rule = known_termination_fn(env)
    env.close()
    low = healthy_hopper()
    low[0, 0] = 0.9
    assert rule(low, low, low).item()
    pendulum = make_vec_env("InvertedDoublePendulum-v5", 2, vec_env_cls=SubprocVecEnv)
    assert known_termination_fn(pendulum) is not None
    pendulum.close()


def test_an_environment_whose_spec_cannot_be_sent_from_another_process():
    """The wrapper's function is part of the spec. A spec that is asked for would end the process."""

    def make():
        env = gym.make("Pendulum-v1")
        return TransformObservation(env, lambda observation: 0.5 * observation, env.observation_space)

    env = SubprocVecEnv([make, make])
    assert known_termination_fn(env) is None
    assert env.reset().shape == (2, 3)  # alive
    env.close()


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, TypeError])
def test_a_vec_env_that_is_not_made_of_gymnasiums_environments_is_unknown(error):
    class Foreign(DummyVecEnv):
        def env_method(self, *args, **kwargs):
            raise error

    assert known_termination_fn(Foreign([lambda: gym.make("Hopper-v5")])) is None


def test_user_functions_cannot_change_what_is_imagined():
    observations = th.ones(3, 2)

    def terminated(obs, action, next_obs):
        next_obs[:, 0] *= 0.0
        return next_obs[:, 0] > 0.5

    assert not evaluate_termination(terminated, observations, observations, observations).any()
    assert (observations == 1.0).all()


class Doubled(gym.ObservationWrapper):
    def observation(self, observation):
        return 2 * observation


def test_what_may_have_been_changed_is_not_known():
    def make(**kwargs):
        return lambda: gym.make("Hopper-v5", **kwargs)

    assert known_termination_fn(DummyVecEnv([make()])) is not None
    assert known_termination_fn(DummyVecEnv([make(), make(healthy_z_range=(0.5, 2.0))])) is None  # differ
    assert known_termination_fn(DummyVecEnv([lambda: Doubled(gym.make("Hopper-v5"))])) is None
    assert known_termination_fn(VecFrameStack(DummyVecEnv([make()]), 2)) is None
    assert known_termination_fn(DummyVecEnv([LineEnv])) is None  # unregistered
    assert known_termination_fn(None) is None
    assert known_termination_fn(make_vec_env("CartPole-v1")) is None
    with pytest.raises(ValueError, match="Expected a VecEnv, but got TimeLimit"):
        known_reward_fn(gym.make("Pendulum-v1"))


@pytest.mark.parametrize("env_id", [env_id for env_id, env_kwargs in TASKS if not env_kwargs])
def test_rules_hold_on_to_no_environment(env_id):
    """``save`` pickles them, and an environment can often not be pickled."""
    env = make_vec_env(env_id)
    env.lock = threading.Lock()
    for rule in (known_termination_fn(env), known_reward_fn(env)):
        assert len(cloudpickle.dumps(rule)) < 10_000
