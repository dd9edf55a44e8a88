"""Learning on a task whose best return is known, with a threshold that crippled versions do not reach."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import LineEnv, SpaceEnv, best_return
from stable_baselines3 import SAC

from sb3_mbpo import DHMBPO, MBPO

SAC_KWARGS = dict(
    device="cpu", gamma=0.95, learning_rate=1e-3, learning_starts=100, batch_size=128, policy_kwargs=dict(net_arch=[64, 64])
)
MBPO_KWARGS = dict(
    gradient_steps=10,
    dynamics_train_freq=50,
    rollout_batch_size=2000,
    dynamics_kwargs=dict(ensemble_size=5, n_elites=3, net_arch=[64, 64], weight_decay=1e-5, max_gradient_steps=(600, 100)),
)


def regret(model: SAC, env: gym.Env) -> float:
    """What the policy's return lacks to the best one, mean of 20 starts."""
    lacking = []
    for seed in range(20):
        observation, _ = env.reset(seed=1000 + seed)
        best, total, done = best_return(observation), 0.0, False
        while not done:
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        lacking.append(best - total)
    return float(np.mean(lacking))


def test_mbpo_learns_what_sac_with_as_many_updates_does_not():
    """From 150 transitions in four dimensions, with 40 updates for each after the 100th: what is missing is the dynamics."""
    of_mbpo = MBPO_KWARGS | dict(reward_fn=lambda obs, action, next_obs: -np.linalg.norm(next_obs, axis=1))
    ours, theirs = 0.0, 0.0
    for seed in (0, 1):
        settings = SAC_KWARGS | dict(seed=seed, gradient_steps=40)
        ours += regret(MBPO("MlpPolicy", SpaceEnv(), **(of_mbpo | settings)).learn(150), SpaceEnv())
        theirs += regret(SAC("MlpPolicy", SpaceEnv(), **settings).learn(150), SpaceEnv())
    assert ours < 0.75 * theirs


@pytest.mark.parametrize("seed", [0, 1])
def test_mbpo_learns_rewards_and_terminations_too(seed):
    """The next test is of what it cannot do with wrong ones."""
    assert regret(MBPO("MlpPolicy", LineEnv(), seed=seed, **SAC_KWARGS, **MBPO_KWARGS).learn(300), LineEnv()) < 3.5


def test_it_learns_from_what_it_imagines():
    """With imagined rewards of zero, the few real rows of each batch do not carry it as far."""
    crippled = MBPO(
        "MlpPolicy", LineEnv(), seed=0, **SAC_KWARGS, **MBPO_KWARGS, reward_fn=lambda obs, action, next_obs: 0.0 * obs[:, 0]
    )
    assert regret(crippled.learn(300), LineEnv()) > 5.0


@pytest.mark.parametrize("seed", [0, 1])
def test_dhmbpo_learns_with_one_update_per_step(seed):
    """And a quarter as many of the critics alone. SAC does not by as many as both."""
    policy_kwargs = dict(net_arch=[32, 32], n_critics=2)
    dynamics_kwargs = dict(ensemble_size=3, n_elites=3, net_arch=[32, 32], max_gradient_steps=(600, 100))
    settings = SAC_KWARGS | dict(dynamics_train_freq=50, rollout_length=5, policy_kwargs=policy_kwargs)
    ours = DHMBPO("MlpPolicy", LineEnv(), seed=seed, dynamics_kwargs=dynamics_kwargs, **settings)
    assert regret(ours.learn(300), LineEnv()) < 3.5
    theirs = SAC("MlpPolicy", LineEnv(), seed=seed, train_freq=4, gradient_steps=5, **SAC_KWARGS)
    assert regret(theirs.learn(300), LineEnv()) > 5.0
