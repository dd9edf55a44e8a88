import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests compare with models on the CPU

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbpo.dynamics import Dynamics, DynamicsConfig
from sb3_mbpo.type_aliases import Transitions

#: Settings that wake the model within a few dozen steps.
ACTIVE = dict(
    learning_starts=40,
    gradient_steps=1,
    dynamics_train_freq=20,
    rollout_batch_size=64,
    dynamics_kwargs=dict(ensemble_size=3, n_elites=2, net_arch=[16, 16], weight_decay=1e-5, max_gradient_steps=30),
)


@pytest.fixture(autouse=True)
def one_thread():
    th.set_num_threads(1)


@pytest.fixture
def generator() -> th.Generator:
    return th.Generator().manual_seed(0)


class LineEnv(gym.Env):
    """
    A point on a line: x' = x + 0.3 a, reward -|x'|, start in [-2, 2], 20 steps. It ends when |x| > 3, which costs 10.
    The best return from x is that of running to 0 at full speed.
    """

    def __init__(self, dict_observation: bool = False) -> None:
        box = spaces.Box(-10.0, 10.0, (1,), np.float64)
        self.dict_observation = dict_observation
        self.observation_space = spaces.Dict({"position": box, "memory": box}) if dict_observation else box
        self.action_space = spaces.Box(-2.0, 1.0, (1,), np.float32)  # asymmetric: a = (action + 0.5) / 1.5
        self.x = np.zeros(1)

    def _observation(self):
        return {"position": self.x.copy(), "memory": 2 * self.x} if self.dict_observation else self.x.copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(-2.0, 2.0, 1), 0
        return self._observation(), {}

    def step(self, action):
        self.x = self.x + 0.3 * (np.asarray(action, np.float64) + 0.5) / 1.5
        self.steps += 1
        ended = bool(abs(self.x[0]) > 3.0)
        return self._observation(), -abs(self.x[0]) - 10.0 * ended, ended, self.steps >= 20, {}


class SpaceEnv(gym.Env):
    """
    A point in four dimensions, each of which another action moves: x' = x + 0.3 MOVES a, within [-3, 3], reward -|x'|, start
    in [-2, 2], 20 steps. The best return is that of running to 0 in all dimensions.
    """

    MOVES = np.array([[0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, -1, 0, 0]])

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-3.0, 3.0, (4,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(-2.0, 2.0, 4), 0
        return self.x.copy(), {}

    def step(self, action):
        self.x = np.clip(self.x + 0.3 * self.MOVES @ np.asarray(action, np.float64), -3.0, 3.0)
        self.steps += 1
        return self.x.copy(), -np.linalg.norm(self.x), False, self.steps >= 20, {}


class NoiseEnv(gym.Env):
    """Observations and rewards that nothing explains, of any shape. Every 10th step ends an episode."""

    def __init__(self, shape: tuple[int, ...] = (3,), action_dim: int = 1) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self.steps = 0

    def _observation(self):
        return self.np_random.normal(size=self.observation_space.shape).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        return self._observation(), self.np_random.normal(), self.steps % 10 == 0, False, {}


def best_return(x: np.ndarray) -> float:
    """The known answer of :class:`LineEnv` and of :class:`SpaceEnv`."""
    return -sum(float(np.linalg.norm(np.maximum(np.abs(x) - 0.3 * step, 0.0))) for step in range(1, 21))


def linear_gaussian(n_rows: int, generator: th.Generator) -> tuple[Transitions, th.Tensor]:
    """
    s' = s + A [s, a] + noise and r = b [s, a] + noise, two dimensions of s and one of a, with noise of known size
    0.05, 0.2 and, for the reward, 0.1.

    :return: the transitions, and the noise-free [s', r] of shape (n_rows, 3)
    """
    inputs = th.rand(n_rows, 3, generator=generator) * 2 - 1
    weights = th.tensor([[0.5, -0.2, 0.3], [0.1, 0.4, -0.5], [1.0, -1.0, 0.5]])
    clean = inputs @ weights.T + th.cat((inputs[:, :2], th.zeros(n_rows, 1)), dim=1)
    noisy = clean + th.randn(n_rows, 3, generator=generator) * th.tensor([0.05, 0.2, 0.1])
    ended = th.zeros(n_rows, dtype=th.bool)
    return Transitions(inputs[:, :2], inputs[:, 2:], noisy[:, :2], noisy[:, 2], ended), clean


def make_dynamics(generator: th.Generator, obs_dim: int = 2, action_dim: int = 1, **config) -> Dynamics:
    settings = dict(ensemble_size=3, n_elites=2, net_arch=[32, 32], weight_decay=1e-5) | config
    action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
    return Dynamics(obs_dim, action_space, DynamicsConfig.from_kwargs(settings), generator)
