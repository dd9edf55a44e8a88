"""The double-horizon update against closed forms, finite differences, slow loops and SB3's own target."""

import copy
from functools import partial

import numpy as np
import pytest
import torch as th
from conftest import ACTIVE, LineEnv
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import SACPolicy

from sb3_mbpo import DHMBPO, takes_tensors
from sb3_mbpo.double_horizon import BOUNDS_RATE, ImaginedPath, ValueBounds, double_horizon_update, imagine_path, soft_return
from sb3_mbpo.observations import normalize_rewards
from sb3_mbpo.type_aliases import Step


def make(env=None, steps: int = 0, policy: str = "MlpPolicy", **kwargs) -> DHMBPO:
    """A small model of LineEnv, ready for its first update, or trained for some steps."""
    settings = ACTIVE | dict(seed=0, device="cpu", policy_kwargs=dict(net_arch=[16, 16]), rollout_length=4) | kwargs
    model = DHMBPO(policy, env or LineEnv(), **settings)
    if steps:
        return model.learn(steps)
    model.gradient_steps = 0
    model.learn(45)
    model._critic_updates_due = 0
    assert model.fit_result is not None and model._n_updates == 0
    model.dynamics.requires_grad_(False)
    return model


def starts_of(model: DHMBPO, n_rows: int = 32) -> th.Tensor:
    return model.imagined_buffer.sample(n_rows, model._generator).observations


def set_bounds(model: DHMBPO, monkeypatch, lowest: float, highest: float) -> None:
    """They stay as they are."""
    model.value_bounds.lowest.fill_(lowest)
    model.value_bounds.highest.fill_(highest)
    monkeypatch.setattr(ValueBounds, "update", lambda self, *args: None)


class Linear:
    """s' = A s + B u, r = -(|s'|^2 + 0.1 |u|^2), no noise. It can end rows, and break or lead astray some, by their number."""

    def __init__(self, dtype=th.float64, ends=None, breaks=None, leaves=None) -> None:
        self.A = th.tensor([[0.9, 0.2], [-0.1, 0.8]], dtype=dtype)
        self.B = th.tensor([[0.1], [0.5]], dtype=dtype)
        self.events = [events or {} for events in (ends, breaks, leaves)]
        self.members: list[th.Tensor] = []

    def step(self, observations, actions, members, generator):
        self.members.append(members)
        following = observations @ self.A.T + actions @ self.B.T
        rewards = -(following.square().sum(dim=1) + 0.1 * actions.square().sum(dim=1))
        ended, broken, self.gone = (
            th.tensor([events.get(row) == len(self.members) for row in range(len(observations))]) for events in self.events
        )
        return Step(th.where(broken.unsqueeze(-1), th.inf, following), rewards, ended)

    def near_data(self, observations):
        return ~self.gone


def linear_policy(gain: th.Tensor):
    """u = -K s, without noise; its log-probability is made up, to be told apart."""
    return lambda observations: (-observations @ gain.T, 0.3 + observations.square().sum(dim=1))


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_the_gradient_is_that_of_the_linear_quadratic_regulator(horizon, generator):
    """
    Under u = -K s the value is -s'Ps with P from Lyapunov's equation, whatever the horizon; the gradient with respect to K
    of an H-step return that ends in that value is the sum over the steps of 2 (...) s s', known from LQR theory.
    """
    gamma, dynamics = 0.95, Linear()
    gain = th.tensor([[0.3, 0.7]], dtype=th.float64, requires_grad=True)
    A, B, K = dynamics.A, dynamics.B, gain.detach()
    closed_loop, Q, R = A - B @ K, th.eye(2, dtype=th.float64), 0.1 * th.eye(1, dtype=th.float64)
    P = th.zeros(2, 2, dtype=th.float64)
    for _ in range(2000):  # reward on the next state: cost(s) = |Ms|^2 + 0.1 |Ks|^2 with M the closed loop
        P = closed_loop.T @ (Q + gamma * P) @ closed_loop + K.T @ R @ K
    starts = th.randn(6, 2, generator=generator, dtype=th.float64)

    path = imagine_path(dynamics, linear_policy(gain), starts, horizon, [0], generator)
    last = path.observations[-1]
    returns = soft_return(path, path.rewards, -(last @ P * last).sum(dim=1), th.zeros(1, dtype=th.float64), gamma)
    np.testing.assert_allclose(returns.detach(), -(starts @ P * starts).sum(dim=1), rtol=1e-10)

    (gradient,) = th.autograd.grad(returns.sum(), gain)
    expected, states = th.zeros(1, 2, dtype=th.float64), starts
    for step in range(horizon):  # the last value counts as that of the old gain: its own gradient is left out
        advantage = R @ K - B.T @ (Q + gamma * P) @ closed_loop
        expected -= 2 * gamma**step * advantage @ states.T @ states
        states = states @ closed_loop.T
    np.testing.assert_allclose(gradient, expected, rtol=1e-8)


def test_the_gradient_of_the_actor_is_that_of_finite_differences(monkeypatch):
    """Double precision, the same noise each time; networks, entropy, normalisation and all."""
    model = make(ent_coef=0.3, learning_rate=0.0, gradient_horizon=3)
    # which would round them to float32
    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", lambda observations, *args, **kwargs: observations)
    model.policy.double()
    model.dynamics.double()
    starts = starts_of(model).double()
    state = model._generator.get_state()
    set_bounds(model, monkeypatch, -20.0, 30.0)
    for parameter in model.critic.parameters():  # their last layers begin at zero
        parameter.data += 0.1 * th.randn(parameter.shape, dtype=th.float64, generator=th.Generator().manual_seed(0))

    def loss() -> float:
        th.manual_seed(3)
        model._generator.set_state(state)
        return double_horizon_update(model, starts, updates_actor=True)["actor_loss"].item()

    loss()
    checked = 0
    for parameter in model.actor.parameters():
        gradient, flat = parameter.grad.flatten().clone(), parameter.data.view(-1)
        for index in range(0, len(flat), 1 + len(flat) // 5):
            value = flat[index].item()
            values = []
            for shift in (1e-6, -1e-6):
                flat[index] = value + shift
                values.append(loss())
            flat[index] = value
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient[index].item(), rel=1e-4, abs=1e-7)
            checked += abs(gradient[index].item()) > 1e-4
    assert checked > 10


def random_path(generator, horizon=3, n_rows=5) -> ImaginedPath:
    alive = (th.rand(horizon + 1, n_rows, generator=generator) > 0.3).cumprod(dim=0).double()
    alive[0] = 1.0
    shape = (horizon + 1, n_rows)
    log_prob, rewards = (th.randn(shape, generator=generator, dtype=th.float64) for _ in range(2))
    empty = th.zeros(*shape, 1)
    return ImaginedPath(empty, empty, log_prob, rewards[:-1], alive, th.ones(n_rows))


def test_the_return_is_that_of_a_slow_loop(generator):
    path, gamma, ent_coef = random_path(generator), 0.9, th.tensor([0.2], dtype=th.float64)
    last = th.randn(5, generator=generator, dtype=th.float64)
    returns = soft_return(path, path.rewards, last, ent_coef, gamma)
    assert 0 < path.alive[-1].sum() < 5
    for row in range(5):
        expected = 0.0
        for step in range(4):
            if path.alive[step, row]:
                gain = path.rewards[step, row] if step < 3 else last[row]
                expected += gamma**step * (gain - 0.2 * path.log_prob[step, row]).item()
        assert returns[row].item() == pytest.approx(expected, abs=1e-12)


def test_what_follows_the_end_of_the_task_has_no_value_and_no_gradient(generator):
    """Row 1 ends with step 2: its objective is that of two steps, and so is its gradient."""
    gain = th.tensor([[0.3, 0.7]], dtype=th.float64, requires_grad=True)
    starts, nothing = th.randn(2, 2, generator=generator, dtype=th.float64), th.zeros(1, dtype=th.float64)
    long, short = (
        imagine_path(Linear(ends=ends), linear_policy(gain), starts, horizon, [0], generator)
        for ends, horizon in (({1: 2}, 4), ({}, 2))
    )
    assert long.alive[:, 1].tolist() == [1, 1, 0, 0, 0] and (long.alive[:, 0] == 1).all() and (long.valid == 1).all()
    assert (long.rewards[2:, 1] == 0).all() and (long.observations[2:, 1] == long.observations[1, 1]).all()
    values = [
        soft_return(path, path.rewards, end * path.observations[-1].sum(dim=1), nothing + 0.5, 0.9)[1]
        for path, end in ((long, 1e9), (short, 0.0))
    ]
    log_prob = 0.9**2 * 0.5 * short.log_prob[2, 1]  # at the state where the short path ends, and the long one ended
    assert values[0].item() == pytest.approx((values[1] + log_prob).item())
    gradients = [th.autograd.grad(value, gain, retain_graph=True)[0] for value in (values[0], values[1] + log_prob)]
    np.testing.assert_allclose(*gradients, rtol=1e-12)


def test_a_path_that_breaks_or_leaves_the_data_is_marked_and_its_numbers_stay_finite(generator):
    gain = th.tensor([[0.3, 0.7]], dtype=th.float64, requires_grad=True)
    dynamics = Linear(breaks={0: 2}, leaves={1: 1, 3: 3}, ends={3: 2})
    path = imagine_path(dynamics, linear_policy(gain), th.ones(4, 2, dtype=th.float64), 3, [0], generator)
    assert path.valid.tolist() == [0, 0, 1, 1]  # row 3 had ended when it left
    assert all(part.isfinite().all() for part in path)
    (gradient,) = th.autograd.grad(soft_return(path, path.rewards, path.rewards[-1], th.ones(1), 0.9).sum(), gain)
    assert gradient.isfinite().all()


def test_each_elite_gets_the_same_number_of_rows_and_each_row_another_elite(generator):
    dynamics = Linear()
    imagine_path(dynamics, linear_policy(th.zeros(1, 2, dtype=th.float64)), th.ones(12, 2).double(), 50, [4, 1, 6], generator)
    members = th.stack(dynamics.members)
    assert all(sorted(step.tolist()) == [1] * 4 + [4] * 4 + [6] * 4 for step in members)
    share = (members == 4).double().mean(dim=0)
    assert share.min() > 0.1 and share.max() < 0.6 and (members[1:] != members[:-1]).any(dim=1).all()


def test_the_critics_learn_sacs_target_over_one_step(monkeypatch):
    """
    With H = 1 and two critics: r + gamma (1 - d) (min Q' - alpha log pi), all of it imagined. SAC's gradients follow. What the
    critics put out counts 160 times, the distance of their bounds.
    """
    model = make(gradient_horizon=1, policy_kwargs=dict(net_arch=[16, 16], n_critics=2), ent_coef=0.3)
    paths = []
    monkeypatch.setattr("sb3_mbpo.double_horizon.imagine_path", lambda *args: paths.append(imagine_path(*args)) or paths[0])
    set_bounds(model, monkeypatch, -70.0, 90.0)
    for parameter in model.critic_target.parameters():
        parameter.data += 0.02 * th.randn(parameter.shape)
    critic, critic_target = copy.deepcopy(model.critic), copy.deepcopy(model.critic_target)
    loss = double_horizon_update(model, starts_of(model), updates_actor=False)["critic_loss"]
    path = paths[0]
    assert path.valid.all() and 0 < path.alive[1].sum()
    with th.no_grad():
        values = 160 * th.cat(critic_target(path.observations[1], path.actions[1]), dim=1)
        assert values.min() > -70 and values.max() < 90 and values.std() > 0.1
        value = values.amin(dim=1) - 0.3 * path.log_prob[1]
        target = path.rewards[0] + model.gamma * path.alive[1] * value
    outputs = critic(path.observations[0], path.actions[0])
    expected = 0.5 * sum(((160 * output.squeeze() - target) ** 2).mean() for output in outputs)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(model.critic.parameters(), critic.parameters(), strict=True):
        np.testing.assert_allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_the_target_is_the_smaller_one_of_two_random_critics_within_the_bounds(monkeypatch):
    """Five target critics that say 1 to 5 everywhere: of two, the smaller one is 1 in four of ten pairs, never 5."""
    model, targets = make(gradient_horizon=1, ent_coef=0.1), []
    monkeypatch.setattr("sb3_mbpo.double_horizon.soft_return", lambda *args: targets.append(args[2]) or args[2])
    for bounds, expected in (((-9.0, 9.0), {1, 2, 3, 4}), ((1.5, 2.5), {1.5, 2, 2.5})):
        targets.clear()
        set_bounds(model, monkeypatch, *bounds)
        for value, network in enumerate(model.critic_target.q_networks, start=1):
            network[-1].weight.data.zero_()
            network[-1].bias.data.fill_(value / (bounds[1] - bounds[0]))
        for _ in range(200):
            double_horizon_update(model, starts_of(model), updates_actor=False)
        means = [round(target.mean().item(), 4) for target in targets]
        assert all(target.std() < 1e-4 for target in targets) and set(means) == expected
        if bounds[1] == 9.0:
            assert means.count(1) == pytest.approx(80, abs=25)


def test_value_bounds_are_those_of_quantiles_and_move_slowly():
    bounds, unbounded = ValueBounds(), th.tensor([-1e9, 1e9])
    bounds.update(th.linspace(-1.0, 3.0, 401), gamma=1.0)
    assert bounds.scale(th.tensor([2.5])) == 2.5
    assert (bounds.clamp(unbounded) == unbounded).all()  # without a discount, and before the first update
    for hardly_any in (th.zeros(5), th.zeros(0), th.eye(1, 1000).squeeze(), -th.eye(1, 1000).squeeze()):
        bounds.update(hardly_any, gamma=0.9)  # no unit yet: bounds of 0 would hide all values
    assert bounds.scale(th.tensor([2.5])) == 2.5 and (bounds.clamp(unbounded) == unbounded).all()
    bounds.update(th.linspace(-1.0, 3.0, 401), gamma=0.9)
    assert bounds.clamp(unbounded).tolist() == pytest.approx([-9.6, 29.6], rel=1e-4)
    assert bounds.scale(th.tensor([-0.5, 1.0])).tolist() == pytest.approx([-19.6, 39.2], rel=1e-4)
    bounds.update(th.linspace(1.0, 3.0, 401), gamma=0.9)  # 0 belongs to them: an ended task pays nothing
    assert bounds.clamp(unbounded).tolist() == pytest.approx([-9.6 * (1 - BOUNDS_RATE), 29.6 + BOUNDS_RATE * 0.2], rel=1e-4)
    bounds.update(th.linspace(-1.0, 3.0, 401), gamma=1.0)
    assert (bounds.clamp(unbounded) == unbounded).all()


def test_an_update_leaves_the_dynamics_alone_and_moves_all_else():
    model = make(steps=45)
    weights = [parameter.detach().clone() for parameter in model.dynamics.parameters()]
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    log_ent_coef, updates = model.log_ent_coef.item(), model._n_updates
    model.train(3, 16)
    assert all(parameter.requires_grad for parameter in model.dynamics.parameters())  # again, for the next fit
    assert all((a == b).all() for a, b in zip(weights, model.dynamics.parameters(), strict=True))
    assert all((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.log_ent_coef.item() != log_ent_coef and model._n_updates == updates + 3


@pytest.mark.parametrize("is_dict", [False, True])
def test_observations_and_rewards_are_shown_as_vec_normalize_shows_them(is_dict):
    env = VecNormalize(make_vec_env(partial(LineEnv, dict_observation=is_dict), 1), clip_obs=1.5, clip_reward=0.7)
    model = make(env, policy="MultiInputPolicy" if is_dict else "MlpPolicy", rollout_length=2)
    raw = (4 * th.randn(50, model._layout.obs_dim)).requires_grad_()
    seen = model._layout.policy_input(raw, env)
    arrays = raw.detach().numpy()
    expected = env.normalize_obs(dict(memory=arrays[:, :1], position=arrays[:, 1:]) if is_dict else arrays)
    for got, array, key in ((seen[key], expected[key], key) for key in seen) if is_dict else [(seen, expected, "")]:
        assert (got.detach().numpy() == array).all() and (np.abs(array) == 1.5).any()
        (gradient,) = th.autograd.grad(got.sum(), raw, retain_graph=True)
        statistics = env.obs_rms[key] if is_dict else env.obs_rms
        slope = (np.abs(array) < 1.5) / np.sqrt(statistics.var + env.epsilon)
        np.testing.assert_allclose(
            gradient.numpy()[:, ["memory", "position"].index(key) if is_dict else 0], slope[:, 0], rtol=1e-5
        )
    rewards = 3 * th.randn(4, 50)
    assert (normalize_rewards(rewards, env).numpy() == env.normalize_reward(rewards.numpy())).all()


def return_by_hand(path, rewards, last_values, alpha, gamma):
    """For each row, the entropies of all its actions included."""
    steps = [*rewards, last_values]
    return sum(gamma**t * path.alive[t] * (step - alpha * path.log_prob[t]) for t, step in enumerate(steps))


def test_an_update_by_hand_under_vec_normalize(monkeypatch):
    """What the networks see, the losses and the bounds of the values; every other path has left the data."""
    env = VecNormalize(make_vec_env(LineEnv, 1), clip_obs=1.5, clip_reward=0.25)
    networks = dict(policy_kwargs=dict(net_arch=[16, 16], n_critics=2), ent_coef="auto_0.3", learning_rate=1e-3)
    model = make(env, gradient_horizon=2, **networks)
    model.value_bounds.lowest.fill_(-70.0)
    model.value_bounds.highest.fill_(90.0)
    bounded, paths, seen, draw = [], [], [], model.actor.action_log_prob
    monkeypatch.setattr(ValueBounds, "update", lambda self, values, gamma: bounded.append(values))

    def imagine_and_break(*args):
        path = imagine_path(*args)
        paths.append(path._replace(valid=(th.arange(32) % 2).float()))
        return paths[-1]

    monkeypatch.setattr("sb3_mbpo.double_horizon.imagine_path", imagine_and_break)
    model.actor.action_log_prob = lambda observations: seen.append(observations.detach()) or draw(observations)
    for parameter in [*model.critic.parameters(), *model.critic_target.parameters()]:
        parameter.data += 0.02 * th.randn(parameter.shape)
    before, alpha = copy.deepcopy(model.critic), model.log_ent_coef.exp().item()
    losses = double_horizon_update(model, starts_of(model), updates_actor=True)

    def shown(observations):
        return th.as_tensor(env.normalize_obs(observations.detach().numpy()))

    def values(critic, t):
        return 160 * th.cat(critic(shown(path.observations[t]), path.actions[t]), dim=1)

    (path,) = paths
    log_prob = path.log_prob.detach()
    for got, raw in zip(seen, path.observations, strict=True):
        th.testing.assert_close(got, shown(raw))
    with th.no_grad():
        rewards = th.as_tensor(env.normalize_reward(path.rewards.detach().numpy()))
        assert (rewards.abs() == 0.25).any() and (rewards.abs() < 0.25).any()
        last = values(model.critic_target, 2)
        assert last.min() > -70 and last.max() < 90
        target = return_by_hand(path, rewards, last.amin(dim=1), alpha, 0.995) + alpha * log_prob[0]
        expected = 0.5 * ((values(before, 0) - target.unsqueeze(1))[1::2] ** 2).sum() / 16
        assert losses["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
        value = return_by_hand(path, rewards, values(model.critic, 2).mean(dim=1), alpha, 0.995)  # critics as they are now
        assert losses["actor_loss"].item() == pytest.approx(-value[1::2].mean().item(), rel=1e-4)
    surplus = (log_prob[0] + model.target_entropy).mean().item()
    assert losses["ent_coef_loss"].item() == pytest.approx(-np.log(alpha) * surplus, rel=1e-4)
    assert model.log_ent_coef.grad.item() == pytest.approx(-surplus, rel=1e-4)
    soft = [rewards[t, row] - alpha * log_prob[t, row] for t in range(2) for row in range(1, 32, 2) if path.alive[t, row]]
    th.testing.assert_close(bounded[0].sort().values, th.stack(soft).sort().values)


def test_updates_start_from_imagined_states_and_move_the_targets_by_tau(monkeypatch):
    model, starts = make(tau=0.3), []

    def watched(model, states, updates_actor):
        starts.append(states)
        return double_horizon_update(model, states, updates_actor)

    monkeypatch.setattr("sb3_mbpo.double_horizon.double_horizon_update", watched)
    before = copy.deepcopy(model.critic_target)
    model.train(1, 64)
    known = model.imagined_buffer.newest(model.imagined_buffer.capacity).observations
    assert starts[0].shape == (64, 1) and all((known == row).all(dim=1).any() for row in starts[0])
    networks = (network.parameters() for network in (model.critic_target, before, model.critic))
    for target, old, critic in zip(*networks, strict=True):
        th.testing.assert_close(target, old + 0.3 * (critic - old))


def test_a_reward_that_is_not_finite_does_not_reach_the_networks(monkeypatch):
    """Through `where`, its gradient would be zero times NaN; one of infinite slope has a finite value, too."""

    @takes_tensors
    def reward(obs, action, next_obs):
        x = next_obs[:, 0]
        return th.where(x > 0.5, (0.0 * x).sqrt(), (x.abs() - 0.2).sqrt())

    model = make(steps=41, reward_fn=reward)
    model.train(3, 64)
    assert 0.0 < model.logger.name_to_value["train/valid_paths"] < 1.0
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy"])
def test_the_critics_are_normalised_and_begin_at_zero_and_the_actor_is_not(policy):
    env = LineEnv(dict_observation=policy == "MultiInputPolicy")
    model = DHMBPO(policy, env, policy_kwargs=dict(net_arch=[16, 8]), **ACTIVE)
    kinds = [type(layer).__name__ for layer in model.critic.qf0]
    assert kinds == ["Linear", "SiLU", "LayerNorm", "Linear", "SiLU", "LayerNorm", "Linear"]
    assert not any(isinstance(layer, th.nn.LayerNorm) for layer in model.actor.modules())
    features = model.critic.qf0[:-1](100 * th.randn(50, model.critic.qf0[0].in_features))
    np.testing.assert_allclose(features.mean(dim=1).detach(), 0.0, atol=1e-5)
    np.testing.assert_allclose(features.std(dim=1, correction=0).detach(), 1.0, rtol=1e-3)
    for critic in (model.critic, model.critic_target):
        assert len(critic.q_networks) == 5 and all((network[-1].weight == 0).all() for network in critic.q_networks)


def test_it_does_not_learn_before_it_can_imagine(tmp_path):
    """As a model that was saved during its warm-up. SAC's updates would teach the critics in other units."""
    make(steps=20).save(tmp_path / "model")
    loaded = DHMBPO.load(tmp_path / "model", env=LineEnv(), learning_starts=5)
    before = [parameter.detach().clone() for parameter in loaded.policy.parameters()]
    loaded.replay_buffer.reset()
    loaded.train(5)
    assert loaded._n_updates == 0
    assert all((a == b).all() for a, b in zip(before, loaded.policy.parameters(), strict=True))


def test_a_loaded_model_goes_on_from_the_first_real_states_that_it_sees(tmp_path):
    make(steps=61).save(tmp_path / "model")
    loaded = DHMBPO.load(tmp_path / "model", env=LineEnv())
    updates, bounds = loaded._n_updates, loaded.value_bounds.highest.clone()
    loaded.learn(2, reset_num_timesteps=False)
    assert loaded._n_updates == updates + 2 * loaded.gradient_steps and loaded.replay_buffer.size() == 2
    assert len(loaded.imagined_buffer) > 0 and 0 < abs(loaded.value_bounds.highest - bounds) < 0.01 * abs(bounds)


def test_without_a_discount_it_learns_without_bounds():
    model = make(steps=61, gamma=1.0)
    assert model.value_bounds.highest == th.inf and model._n_updates > 0
    assert all((network[-1].weight != 0).all() for network in model.critic.q_networks)  # where they begin


def test_a_dynamics_that_leads_nowhere_stops_the_updates_until_the_next_fit():
    model = make(steps=61, dynamics_train_freq=20)
    weights = copy.deepcopy(model.dynamics.state_dict())
    model.imagined_buffer.clear()
    model.dynamics.ensemble.biases[-1].data += 1e4
    updates = model._n_updates
    model.train(3)
    assert model._n_updates == updates and len(model.imagined_buffer) == 0
    model.dynamics.load_state_dict(weights)
    model.train(3)
    assert model._n_updates == updates + 3


def test_its_defaults_fill_up_what_the_user_leaves_open(tmp_path):
    model = make(dynamics_kwargs=dict(ensemble_size=5, max_gradient_steps=20))
    config = model.dynamics.config
    assert (config.ensemble_size, config.n_elites, config.constant_noise, config.max_gradient_steps) == (5, 5, True, 20)
    assert config.max_grad_norm is None
    model.save(tmp_path / "model")
    loaded = DHMBPO.load(tmp_path / "model", env=LineEnv(), dynamics_kwargs=dict(ensemble_size=5, max_gradient_steps=30))
    assert loaded.dynamics.config.constant_noise and loaded.dynamics.config.max_gradient_steps == 30


def test_after_a_fit_by_hand_the_next_updates_have_new_states():
    model = make(steps=45)
    model.fit_dynamics()
    assert not model.dynamics_due() and not len(model.imagined_buffer)
    model.gradient_steps = 1
    model.learn(3, reset_num_timesteps=False)
    assert model._last_fit_timestep == 45 and len(model.imagined_buffer) > 0


class SharingPolicy(SACPolicy):
    """It shares its extractor without being asked to."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "share_features_extractor": True})


def test_what_no_gradient_can_pass_is_refused():
    with pytest.raises(ValueError, match=r"`reward_fn` is not marked as one for torch.*takes_tensors"):
        make(reward_fn=lambda obs, action, next_obs: -np.abs(next_obs[:, 0]))
    for policy, policy_kwargs in [("MlpPolicy", dict(share_features_extractor=True)), (SharingPolicy, {})]:
        with pytest.raises(ValueError, match=r"With `share_features_extractor` no gradient passes"):
            make(policy=policy, policy_kwargs=policy_kwargs)
    with pytest.raises(ValueError, match="gradient_horizon"):
        make(gradient_horizon=0)


def test_new_states_come_with_each_fit_and_every_so_many_updates(monkeypatch):
    model, rounds = make(steps=45, rollout_freq=7, dynamics_train_freq=1000), []
    monkeypatch.setattr(model, "imagine", lambda: rounds.append(model._n_updates) or DHMBPO.imagine(model))
    begun = model._n_updates
    model.train(30, 16)
    assert np.diff(rounds).tolist() == [7] * (len(rounds) - 1) and rounds[0] <= begun + 7 and len(rounds) in (4, 5)
    assert len(model.imagined_buffer) > 64 * 4
    model.fit_dynamics()
    assert len(model.imagined_buffer) == 0  # what the old dynamics imagined is gone
    critics = [parameter.detach().clone() for parameter in model.critic.parameters()]
    actor = [parameter.detach().clone() for parameter in model.actor.parameters()]
    model.imagine()
    model.train(0, 16)  # the critics alone
    assert not any((a == b).all() for a, b in zip(critics, model.critic.parameters(), strict=True))
    assert all((a == b).all() for a, b in zip(actor, model.actor.parameters(), strict=True))


def test_a_trained_model_can_be_copied_and_its_states_outlive_it(tmp_path):
    model = make(steps=61)
    bounds = model.value_bounds.clamp(th.tensor([-1e9, 1e9])).tolist()
    assert bounds[0] < bounds[1] and copy.deepcopy(model).value_bounds.clamp(th.tensor([-1e9, 1e9])).tolist() == bounds
    model.save(tmp_path / "model")
    loaded = DHMBPO.load(tmp_path / "model", env=LineEnv())
    assert loaded.value_bounds.clamp(th.tensor([-1e9, 1e9])).tolist() == bounds and loaded.gradient_horizon == 5
    with pytest.raises(TypeError, match=r"This file was saved by DHMBPO: load it with `DHMBPO.load`"):
        SAC.load(tmp_path / "model", env=LineEnv())
