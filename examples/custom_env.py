"""
An environment of your own, with its rules handed to MBPO, wrapped in VecNormalize.

    python examples/custom_env.py

A rocket shall hover one metre above the ground. When it ends and what it earns is known, so imagined steps follow
these rules, not learned ones.
"""

import argparse

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo import MBPO


def terminated(obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """On the ground, or out of sight. Raw observations: (batch, 2), height in m and speed in m/s."""
    return (next_obs[:, 0] <= 0.0) | (next_obs[:, 0] >= 3.0)


def reward(obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """Stay close to one metre and save fuel. The thrust comes in newtons, as the environment takes it."""
    return 2.0 - np.abs(next_obs[:, 0] - 1.0) - 0.002 * action[:, 0] ** 2


class Rocket(gym.Env):
    """One kilogram on a vertical axis, thrust from 0 to 20 N, 20 steps a second, at most 10 seconds."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(0.0, 20.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps = 0
        self.state = np.array([self.np_random.uniform(0.5, 2.0), self.np_random.uniform(-0.5, 0.5)], dtype=np.float32)
        return self.state, {}

    def step(self, action: np.ndarray):
        height, speed = self.state
        speed = speed + 0.05 * (action[0] - 9.81)
        before, self.state = self.state, np.array([height + 0.05 * speed, speed], dtype=np.float32)
        self.steps += 1
        rows = before[None], np.asarray(action)[None], self.state[None]
        return self.state, float(reward(*rows)[0]), bool(terminated(*rows)[0]), self.steps >= 200, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="environment steps")
    parser.add_argument("--learning-starts", type=int, default=300, help="steps with random actions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    env = VecNormalize(make_vec_env(Rocket, seed=args.seed), norm_reward=False)
    model = MBPO(
        "MlpPolicy",
        env,
        learning_starts=args.learning_starts,
        gradient_steps=10,
        termination_fn=terminated,
        reward_fn=reward,
        seed=args.seed,
    )
    model.learn(args.steps, progress_bar=True)

    eval_env = VecNormalize(make_vec_env(Rocket, seed=args.seed + 10_000), training=False, norm_reward=False)
    eval_env.obs_rms = env.obs_rms
    mean, spread = evaluate_policy(model, eval_env, n_eval_episodes=20)
    print(f"Mean return of 20 episodes after {args.steps} steps: {mean:.0f} ± {spread:.0f} (at most 200 steps of 2 each).")
    print(f"Holdout error of the learned motion, as a share of its variance: {model.fit_result.holdout_mse_state:.1e}.")


if __name__ == "__main__":
    main()
