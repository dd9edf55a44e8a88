import re

import numpy as np
import pytest
import torch as th
from conftest import linear_gaussian, make_dynamics
from gymnasium import spaces

from sb3_mbpo import takes_tensors
from sb3_mbpo.dynamics import Dynamics, DynamicsConfig


@pytest.fixture
def dynamics(generator):
    """Scalers that do something, and members that can be told apart."""
    dynamics = make_dynamics(generator)
    dynamics.input_scaler.fit(3 + 2 * th.randn(100, 3, generator=generator))
    dynamics.target_scaler.fit(th.tensor([1.0, -2.0, 5.0]) + th.randn(100, 3, generator=generator) * th.tensor([1, 2, 9]))
    return dynamics


def test_a_step_has_the_distribution_of_the_members_gaussian(dynamics, generator):
    """Moments of 20 000 draws of one row, against mean and variance by hand from the member's own output."""
    observation, action = th.tensor([[0.3, -0.7]]), th.tensor([[0.5]])
    n_draws = 20_000
    for member in range(3):
        inputs = (th.cat((observation, action), dim=1) - dynamics.input_scaler.mean) / dynamics.input_scaler.std
        mean, log_var = (output[member, 0] for output in dynamics.ensemble(inputs))
        expected_mean = mean * dynamics.target_scaler.std + dynamics.target_scaler.mean
        expected_mean[:2] += observation[0]
        expected_std = log_var.exp().sqrt() * dynamics.target_scaler.std
        step = dynamics.step(
            observation.expand(n_draws, -1), action.expand(n_draws, -1), th.full((n_draws,), member), generator
        )
        draws = th.cat((step.next_observations, step.rewards[:, None]), dim=1)
        z = (draws - expected_mean) / expected_std
        assert z.mean(dim=0).abs().max() < 4 / n_draws**0.5
        assert (z.var(dim=0) - 1).abs().max() < 4 * (2 / n_draws) ** 0.5
        covariance = (z.T @ z / n_draws) - th.eye(3)
        assert covariance.abs().max() < 0.06  # independent dimensions
        assert z.abs().max() > 3 and (z**4).mean().item() == pytest.approx(3, rel=0.1)  # Gaussian tails


def test_what_was_constant_in_the_data_stays_as_it_is(dynamics, generator):
    """
    Not even a little noise: VecNormalize divides by the standard deviation of the real observations, which is next to nothing
    there, and would show the policy noise at the clipping bounds.
    """
    data = linear_gaussian(500, generator)[0]
    observations, next_observations = data.observations.clone(), data.next_observations.clone()
    observations[:, 1] = next_observations[:, 1] = 0.7
    dynamics.fit_scalers(data._replace(observations=observations, next_observations=next_observations))
    step = dynamics.step(observations, data.actions, th.arange(500) % 3, generator)
    assert (step.next_observations[:, 1] == observations[:, 1]).all()
    assert ((step.next_observations - observations)[:, 0] != 0).all() and step.rewards.std() > 0


def test_members_differ_and_all_of_them_can_be_asked(dynamics, generator):
    observations, actions = th.randn(10, 2, generator=generator), th.randn(10, 1, generator=generator)
    together = dynamics.predict(observations, actions)
    assert together.mean.shape == together.std.shape == (3, 10, 3)
    for member in range(3):
        alone = dynamics.predict(observations, actions, th.full((10,), member))
        th.testing.assert_close(alone.mean, together.mean[member])
        th.testing.assert_close(alone.std, together.std[member])
    th.testing.assert_close(together.disagreement(), th.from_numpy(together.mean.detach().numpy().std(axis=0)))


def test_observations_may_come_as_gymnasium_has_them_in_float64(dynamics, generator):
    observations, actions = th.randn(32, 2, generator=generator), th.randn(32, 1, generator=generator)
    prediction = dynamics.predict(observations.double(), actions)
    assert prediction.mean.dtype == th.float64
    for got, expected in zip(prediction, dynamics.predict(observations, actions), strict=True):
        th.testing.assert_close(got.float(), expected)


def test_a_step_is_differentiable_in_observation_and_action(dynamics):
    """Against finite differences in double precision, with the noise frozen by the seed."""
    dynamics = dynamics.double()
    members = th.tensor([0, 1, 2, 1])

    def step(observations, actions):
        result = dynamics.step(observations, actions, members, th.Generator().manual_seed(3))
        return result.next_observations, result.rewards

    observations = th.randn(4, 2, dtype=th.float64, requires_grad=True)
    actions = th.randn(4, 1, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(step, (observations, actions))


def test_noise_comes_from_the_generator_alone(dynamics):
    observations, actions, members = th.zeros(5, 2), th.zeros(5, 1), th.zeros(5, dtype=th.long)
    state = th.get_rng_state()
    draws = [dynamics.step(observations, actions, members, th.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()
    assert (th.get_rng_state() == state).all()


def make_bounded(generator, **functions) -> Dynamics:
    action_space = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32))
    config = DynamicsConfig.from_kwargs(dict(ensemble_size=2, n_elites=1, net_arch=[8], weight_decay=0.0))
    return Dynamics(2, action_space, config, generator, **functions)


@pytest.mark.parametrize("in_torch", [False, True])
def test_user_functions_get_raw_units_in_the_kind_they_ask_for(generator, in_torch):
    seen = {}

    def reward(obs, action, next_obs):
        seen["reward"] = (obs, action, next_obs)
        return action[:, 0] + action[:, 1]

    def terminated(obs, action, next_obs):
        seen["terminated"] = (obs, action, next_obs)
        return next_obs[:, 0] > obs[:, 0]

    mark = takes_tensors if in_torch else lambda fn: fn
    dynamics = make_bounded(generator, termination_fn=mark(terminated), reward_fn=mark(reward))
    observations, actions = th.randn(4, 2), th.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.5, -0.5]])
    step = dynamics.step(observations, actions, th.zeros(4, dtype=th.long), generator)
    assert step.rewards.tolist() == pytest.approx([-1.0, 13.0, 6.0, 4.5])  # actions in the environment's units
    assert step.terminated.tolist() == (step.next_observations[:, 0] > observations[:, 0]).tolist()
    expected_type = th.Tensor if in_torch else np.ndarray
    for arguments in seen.values():
        assert all(isinstance(argument, expected_type) for argument in arguments)
        assert (th.as_tensor(arguments[0]) == observations).all()
        assert (th.as_tensor(arguments[2]) == step.next_observations).all()


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (
            dict(termination_fn=lambda o, a, n: n[:, :1] > 0),
            r"`termination_fn` must return one bool .* shape \(4,\), .*\(4, 1\)",
        ),
        (dict(termination_fn=lambda o, a, n: n[:, 0]), r"`termination_fn` must return one bool .* float32"),
        (
            dict(termination_fn=lambda o, a, n: None),
            r"`termination_fn` must return a numpy.ndarray .* NoneType.*takes_tensors",
        ),
        (dict(termination_fn=lambda o, a, n: True), r"`termination_fn` must return a numpy.ndarray"),
        (dict(reward_fn=lambda o, a, n: n), r"`reward_fn` must return one float .* shape \(4,\), .*\(4, 2\)"),
        (dict(reward_fn=lambda o, a, n: n[:, 0] > 0), r"`reward_fn` must return one float .* bool"),
        (dict(reward_fn=takes_tensors(lambda o, a, n: n[:, 0].detach().numpy())), r"must return a torch.Tensor .* ndarray"),
    ],
)
def test_user_functions_that_return_something_else_are_refused(generator, functions, message):
    dynamics = make_bounded(generator, **functions)
    with pytest.raises(ValueError, match=message):
        dynamics.step(th.randn(4, 2), th.zeros(4, 2), th.zeros(4, dtype=th.long), generator)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(n_elite=3), r"got \['n_elite'\], which it does not know. It may hold: ensemble_size, n_elites"),
        (dict(ensemble_size=3), r"'n_elites'\] must be from 1 to `ensemble_size`=3, but got 5"),
        (dict(net_arch=[8], weight_decay=[1e-5]), r"'weight_decay'\] must be a float, or 2 floats"),
        (dict(holdout_ratio=1.0), "'holdout_ratio'.*above 0 and below 1, but got 1.0"),
        (dict(learning_rate=0.0), "'learning_rate'"),
        (dict(likelihood_beta=1.5), r"'likelihood_beta'\] must be from 0 to 1, but got 1.5"),
        (dict(likelihood_beta=-0.5), r"'likelihood_beta'\] must be from 0 to 1, but got -0.5"),
        (dict(max_grad_norm=0.0), r"'max_grad_norm'\] must be None, or above 0, but got 0.0"),
        (dict(ensemble_size=5.5), r"'ensemble_size'\] must be an int, but got 5.5"),
        (dict(weight_decay=[]), "'weight_decay'"),
        (dict(learning_rate="1e-3"), r"'learning_rate'\] must be a number, but got '1e-3'"),
        (dict(max_grad_norm="10"), r"'max_grad_norm'\] must be None, or a number, but got '10'"),
        (dict(weight_decay="1e-4"), r"'weight_decay'\] must be a float, or a list of one per layer, but got '1e-4'"),
        (dict(net_arch=200), r"'net_arch'\] must be a list of layer widths such as \[200, 200\], but got 200"),
        (dict(net_arch=[200.0]), "'net_arch'.*but got .200.0."),
        (dict(net_arch=[200, 0]), "'net_arch'.*but got .200, 0."),
        (dict(net_arch=[[200], 200]), "'net_arch'.*but got ..200., 200."),
        (dict(weight_decay=np.array(0.1)), "'weight_decay'.*a list of one per layer, but got array"),
        (dict(weight_decay=[0.1, float("nan")], net_arch=[8]), "'weight_decay'.*at least 0, but got"),
        (
            dict(activation_fn="relu"),
            r"'activation_fn'\] must be a class that needs no arguments, such as torch.nn.SiLU, but got 'relu'",
        ),
        (
            dict(activation_fn=th.nn.SiLU()),
            r"'activation_fn'\] must be a class that needs no arguments, such as torch.nn.SiLU, but got SiLU\(\)",
        ),
        (dict(activation_fn=th.tanh), r"'activation_fn'\] must be a class that needs no arguments"),
        (dict(activation_fn=int), r"'activation_fn'\] must be a class that needs no arguments"),
        (dict(patience=True), r"'patience'\] must be an int, but got True"),
        (dict(net_arch=[200, True]), "'net_arch'.*but got .200, True."),
        (dict(constant_noise="no"), r"'constant_noise'\] must be True or False, but got 'no'"),
    ],
)
def test_bad_dynamics_kwargs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DynamicsConfig.from_kwargs(kwargs)


@pytest.mark.parametrize(
    "steps", [0, -1, 2.0, "ab", "", (), (1,), (1, 0), (0, 1), (1.5, 2), (2, 1.5), (1, 2, 3), (None, 5), [5, None]]
)
def test_bad_numbers_of_gradient_steps_are_refused(steps):
    expected = "dynamics_kwargs['max_gradient_steps'] must be None, an int of at least 1, or two of them"
    with pytest.raises(ValueError, match=re.escape(f"{expected}, but got {steps!r}.")):
        DynamicsConfig.from_kwargs(dict(max_gradient_steps=steps))


def test_the_gradient_steps_of_a_fit_are_a_number_each_one_for_all_or_not_given():
    for steps, expected in [((7, 3), [7, 3]), ([7, 3], [7, 3]), (5, [5, 5]), (np.int64(5), [5, 5]), (None, [None, None])]:
        config = DynamicsConfig.from_kwargs(dict(max_gradient_steps=steps))
        assert [config.max_gradient_steps_of(first_fit) for first_fit in (True, False)] == expected


def test_the_default_weight_decay_follows_the_number_of_layers():
    assert DynamicsConfig.from_kwargs(None).layer_decays == (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    assert DynamicsConfig.from_kwargs(dict(net_arch=[64, 64])).layer_decays == pytest.approx((2.5e-5, 7.5e-5, 1e-4))
    assert DynamicsConfig.from_kwargs(dict(net_arch=[64], weight_decay=0.1)).layer_decays == (0.1, 0.1)
    assert DynamicsConfig.from_kwargs(dict(net_arch=[64], weight_decay=np.float32(0.5))).layer_decays == (0.5, 0.5)


def test_a_method_may_take_tensors():
    class Task:
        def reward(self, obs, action, next_obs):
            return next_obs[:, 0]

    assert takes_tensors(Task().reward).takes_tensors
