import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from conftest import linear_gaussian, make_dynamics
from gymnasium import spaces
from torch import nn

from sb3_mbpo.dynamics import Dynamics, DynamicsConfig
from sb3_mbpo.fit import (
    KeptWeights,
    check_termination,
    ensemble_loss,
    fit_dynamics,
    fit_ensemble,
    fit_termination,
    make_optimizer,
    split_holdout,
)
from sb3_mbpo.rules import takes_tensors
from sb3_mbpo.type_aliases import FitResult, Transitions


@pytest.fixture(scope="module")
def fitted():
    """A fit to a linear-Gaussian system with known noise, with the default network, learning rate and number of steps."""
    th.set_num_threads(1)
    generator = th.Generator().manual_seed(1)
    data, _ = linear_gaussian(16_000, generator)
    dynamics = make_dynamics(generator, net_arch=[200] * 4, weight_decay=DynamicsConfig.weight_decay)
    initial_bounds = dynamics.ensemble.max_log_var.detach().clone(), dynamics.ensemble.min_log_var.detach().clone()
    result = fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
    return dynamics, result, initial_bounds


def test_the_known_noise_and_mean_of_a_linear_gaussian_system_are_recovered(fitted, generator):
    dynamics, result, _ = fitted
    fresh, clean = linear_gaussian(2000, generator)
    for member in result.elites:
        prediction = dynamics.predict(fresh.observations, fresh.actions, th.full((2000,), member))
        assert prediction.std.mean(dim=0).tolist() == pytest.approx([0.05, 0.2, 0.1], rel=0.1)
        errors = (prediction.mean - clean).square().mean(dim=0).sqrt()
        assert (errors < 0.25 * th.tensor([0.05, 0.2, 0.1])).all()


def test_constant_noise_is_the_error_on_the_holdout(generator, monkeypatch):
    data, _ = linear_gaussian(4000, generator)
    dynamics = make_dynamics(generator, constant_noise=True, max_gradient_steps=600)
    holdouts = []
    monkeypatch.setattr("sb3_mbpo.fit.split_holdout", lambda *args: holdouts.append(split_holdout(*args)) or holdouts[-1])
    result = fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
    holdout = holdouts[0][1]
    prediction = dynamics.predict(holdout.observations, holdout.actions)
    targets = th.cat((holdout.next_observations, holdout.rewards.unsqueeze(-1)), dim=1)
    errors = (prediction.mean - targets).square().mean(dim=1).sqrt()
    th.testing.assert_close(prediction.std, errors.unsqueeze(1).expand_as(prediction.std), rtol=1e-4, atol=1e-6)
    assert errors[list(result.elites)].mean(dim=0).tolist() == pytest.approx([0.05, 0.2, 0.1], rel=0.15)


def test_constant_noise_has_a_likelihood_without_weights_and_bounds(generator):
    ensemble = make_dynamics(generator, constant_noise=True).ensemble
    inputs, targets = th.randn(3, 10, 3, generator=generator), th.randn(3, 10, 3, generator=generator)
    th.nn.init.normal_(ensemble.constant_log_var, generator=generator)
    mean, log_var = ensemble(inputs)
    negative_likelihood = -2 * th.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(targets) - math.log(2 * math.pi)
    for beta in (0.0, 1.0):
        loss, _ = ensemble_loss(ensemble, inputs, targets, beta)
        assert loss.item() == pytest.approx(negative_likelihood.mean(dim=(1, 2)).sum().item(), rel=1e-5)


def test_log_variance_bounds_move(fitted):
    dynamics, _, (max_log_var, min_log_var) = fitted
    assert (dynamics.ensemble.max_log_var < max_log_var - 0.01).all()
    assert (dynamics.ensemble.min_log_var > min_log_var + 0.01).all()


def test_elites_are_the_members_of_lowest_holdout_error(fitted):
    _, result, _ = fitted
    ranked = sorted(range(3), key=lambda member: result.holdout_mse[member])
    assert list(result.elites) == ranked[:2]


def test_holdout_error_is_in_scaled_units_and_split(fitted):
    # the share of the noise in each target's variance; uniform inputs on [-1, 1] have variance 1/3
    _, result, _ = fitted
    noise = [0.05**2 / (0.05**2 + 0.38 / 3), 0.2**2 / (0.2**2 + 0.42 / 3), 0.1**2 / (0.1**2 + 2.25 / 3)]
    assert result.holdout_mse_state == pytest.approx((noise[0] + noise[1]) / 2, rel=0.15)
    assert result.holdout_mse_reward == pytest.approx(noise[2], rel=0.3)
    elite_mse = sum(result.holdout_mse[member] for member in result.elites) / 2
    assert elite_mse == pytest.approx((2 * result.holdout_mse_state + result.holdout_mse_reward) / 3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_against_a_slow_loop(generator, beta):
    ensemble = make_dynamics(generator).ensemble
    inputs, targets = th.randn(3, 10, 3, generator=generator), th.randn(3, 10, 3, generator=generator)
    loss, likelihood = ensemble_loss(ensemble, inputs, targets, beta)
    mean, log_var = (prediction.tolist() for prediction in ensemble(inputs))
    plain = weighted = 0.0
    for e, b, d in itertools.product(range(3), range(10), range(3)):
        variance = math.exp(log_var[e][b][d])
        error = (mean[e][b][d] - targets[e, b, d].item()) ** 2 / variance + math.log(variance)
        plain += error / 30
        weighted += variance**beta * error / 30
    assert likelihood.item() == pytest.approx(plain / 3, rel=1e-4)
    assert loss.item() == pytest.approx(weighted + 0.01 * 3 * (0.5 + 10.0), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_weights_of_the_likelihood_scale_gradients_and_have_none_themselves(generator, monkeypatch, beta):
    """With ``beta=1`` the mean has the gradient of the squared error, whatever the variance."""
    mean, log_var = (th.randn(3, 10, 3, generator=generator, requires_grad=True) for _ in range(2))
    targets = th.randn(3, 10, 3, generator=generator)
    ensemble = make_dynamics(generator).ensemble
    monkeypatch.setattr(ensemble, "forward", lambda _: (mean, log_var))
    ensemble_loss(ensemble, th.empty(0), targets, beta)[0].backward()
    error, variance = (mean - targets).detach(), log_var.detach().exp()
    th.testing.assert_close(mean.grad, 2 * error * variance ** (beta - 1) / 30)
    th.testing.assert_close(log_var.grad, variance**beta * (1 - error**2 / variance) / 30)


def test_weight_decay_is_the_papers_penalty_per_layer(generator):
    decays = (0.1, 0.2, 0.3)
    by_adam = make_dynamics(generator, weight_decay=decays)
    by_loss = copy.deepcopy(by_adam)
    optimizer = make_optimizer(by_adam)
    plain = th.optim.Adam(by_loss.ensemble.parameters(), lr=3e-3)
    inputs, targets = th.randn(3, 20, 3, generator=generator), th.randn(3, 20, 3, generator=generator)
    for _ in range(10):
        optimizer.zero_grad()
        ensemble_loss(by_adam.ensemble, inputs, targets, 0.5)[0].backward()
        optimizer.step()
        plain.zero_grad()
        weights = by_loss.ensemble.weights
        penalty = sum(0.5 * decay * weight.square().sum() for decay, weight in zip(decays, weights, strict=True))
        (ensemble_loss(by_loss.ensemble, inputs, targets, 0.5)[0] + penalty).backward()
        plain.step()
    for ours, reference in zip(by_adam.ensemble.parameters(), by_loss.ensemble.parameters(), strict=True):
        th.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_the_parameters_of_an_activation_are_trained_and_return_with_the_members(generator):
    data, _ = linear_gaussian(200, generator)
    dynamics = make_dynamics(generator, activation_fn=nn.PReLU, max_gradient_steps=20)
    optimizer = make_optimizer(dynamics)
    fit_ensemble(dynamics, optimizer, data, generator, is_first=True)
    slope = dynamics.ensemble.activation.weight
    learned = slope.item()
    assert learned != 0.25
    kept = KeptWeights(dynamics.ensemble, improvement=None)
    slope.data.fill_(3.0)
    kept.restore()
    assert slope.item() == learned


def test_members_differ_because_their_data_do(generator):
    """The same start and the same batches' order: only the bootstrap can part the members."""
    data, _ = linear_gaussian(200, generator)
    dynamics = make_dynamics(generator, max_gradient_steps=50)
    with th.no_grad():
        for parameter in [*dynamics.ensemble.weights, *dynamics.ensemble.biases]:
            parameter.copy_(parameter[:1].expand_as(parameter))
    fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
    first, second, third = dynamics.predict(data.observations, data.actions).mean
    assert (first - second).abs().max() > 1e-3 and (second - third).abs().max() > 1e-3


def test_each_bootstrap_draws_with_replacement_once_per_fit(generator, monkeypatch):
    """Tag every row by its reward, and watch what each member is shown in each epoch."""
    data, _ = linear_gaussian(100, generator)
    data = data._replace(rewards=th.arange(100.0))
    dynamics = make_dynamics(generator, batch_size=16, max_gradient_steps=15, normalize_targets=False)
    shown: list[th.Tensor] = []

    def watch(ensemble, inputs, targets, beta):
        shown.append(targets[..., -1].clone())
        return ensemble_loss(ensemble, inputs, targets, beta)

    monkeypatch.setattr("sb3_mbpo.fit.ensemble_loss", watch)
    fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
    epochs = [th.cat(shown[epoch * 5 : epoch * 5 + 5], dim=1).sort(dim=1).values for epoch in range(3)]
    assert epochs[0].shape == (3, 80)  # 20 of 100 rows are held out
    for epoch in epochs[1:]:
        assert (epoch == epochs[0]).all()  # the same rows in every epoch ...
    assert not (epochs[0][0] == epochs[0][1]).all()  # ... but others for each member
    for member in range(3):  # with replacement: about 1 - 1/e of the rows are there
        assert 40 <= epochs[0][member].unique().numel() <= 62


def test_each_member_returns_to_its_own_best_epoch(generator):
    ensemble = make_dynamics(generator).ensemble
    best = KeptWeights(ensemble, improvement=0.01)
    # epoch:              0    1    2    3 (member 0 improves by less than 1 %)
    errors = th.tensor([[5.0, 4.0, 3.98, 9.0], [5.0, 6.0, 7.0, 8.0], [5.0, 4.0, 3.0, 2.0]])
    for epoch in range(4):
        with th.no_grad():
            for parameter in [*ensemble.weights, *ensemble.biases]:
                parameter.fill_(epoch)
        improved = best.update(errors[:, epoch])
        assert improved  # member 2 gets better all the time
    best.restore()
    for parameter in [*ensemble.weights, *ensemble.biases]:
        assert [parameter[member].unique().tolist() for member in range(3)] == [[1.0], [0.0], [3.0]]


@pytest.mark.parametrize("max_gradient_steps", [None, 200])
def test_the_errors_are_those_of_the_weights_that_a_fit_ends_with(generator, monkeypatch, max_gradient_steps):
    """On the holdout, by an independent computation."""
    data, _ = linear_gaussian(300, generator)
    dynamics = make_dynamics(generator, batch_size=32, patience=3, max_gradient_steps=max_gradient_steps)
    holdouts = []
    monkeypatch.setattr(
        "sb3_mbpo.fit.split_holdout", lambda *arguments: holdouts.append(split_holdout(*arguments)) or holdouts[-1]
    )
    kept, restore = [], KeptWeights.restore
    monkeypatch.setattr(KeptWeights, "restore", lambda best: kept.append(best.errors.tolist()) or restore(best))
    result = fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
    assert list(result.holdout_mse) == pytest.approx(kept[0], rel=1e-4)
    holdout = holdouts[0][1]
    truth = th.cat((holdout.next_observations, holdout.rewards[:, None]), dim=1)
    for member in range(3):
        prediction = dynamics.predict(holdout.observations, holdout.actions, th.full((holdout.n_rows,), member))
        scaled = (prediction.mean - truth) / dynamics.target_scaler.std
        assert scaled.square().mean().item() == pytest.approx(result.holdout_mse[member], rel=1e-3)


@pytest.mark.parametrize("max_grad_norm", [10.0, None])
def test_a_few_collisions_drown_everything_in_noise_unless_gradients_are_short(generator, max_grad_norm):
    """Twenty of 2000 transitions are thrown far away. For the others the noise is still small: it is 0.01, theirs is 20."""
    data, clean = linear_gaussian(2000, generator)
    outcomes = clean + 0.01 * th.randn(2000, 3, generator=generator)
    data = data._replace(next_observations=outcomes[:, :2], rewards=outcomes[:, 2])
    settings = dict(net_arch=[64, 64, 64], max_gradient_steps=(500, 250), max_grad_norm=max_grad_norm)
    dynamics = make_dynamics(generator, **settings)
    optimizer = make_optimizer(dynamics)
    fit_ensemble(dynamics, optimizer, data, generator, is_first=True)
    hits = data.observations[:, 0].argsort(descending=True)[:20]
    data.next_observations[hits] += 20 * th.randn(20, 2, generator=generator)
    for _ in range(2):
        fit_ensemble(dynamics, optimizer, data, generator, is_first=False)
    noise = dynamics.predict(data.observations, data.actions).std[..., :2].median(dim=1).values.mean()
    assert noise < 0.3 if max_grad_norm else noise > 0.5


def ball_between_walls(n_rows, generator):
    """A push changes the velocity of a ball on [-1, 1]. Two rows in a hundred are at an end, and most of them hit it, which
    throws the ball back.
    """
    at_end = th.rand(n_rows, generator=generator) < 0.02
    position = th.empty(n_rows).uniform_(-0.3, 0.3, generator=generator)
    velocity, action = th.randn(n_rows, generator=generator), th.empty(n_rows).uniform_(-1.0, 1.0, generator=generator)
    position = th.where(at_end, position.sign() * (1.0 - position.abs() / 3.0), position)
    velocity = th.where(at_end, position.sign() * velocity.abs(), velocity)
    observations = th.stack((position, velocity), dim=1)
    velocity = velocity + 0.3 * action
    position = position + 0.1 * velocity
    hits = position.abs() > 1.0
    outcomes = th.stack((position.clamp(-1.0, 1.0), th.where(hits, -velocity, velocity)), dim=1)
    never = th.zeros(n_rows, dtype=th.bool)
    return Transitions(observations, action[:, None], outcomes, th.zeros(n_rows), never), hits


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_rare_collisions_are_learned_where_the_likelihood_is_weighted(generator, beta):
    """The variance alone explains them otherwise. The yardstick is the error of "nothing happens"."""
    data, _ = ball_between_walls(3000, generator)
    dynamics = make_dynamics(generator, net_arch=[64, 64, 64], max_gradient_steps=(1000, 250), likelihood_beta=beta)
    optimizer = make_optimizer(dynamics)
    for is_first in (True, False, False):
        fit_ensemble(dynamics, optimizer, data, generator, is_first)
    fresh, hits = ball_between_walls(20_000, generator)
    velocity = dynamics.predict(fresh.observations, fresh.actions, th.zeros(20_000, dtype=th.long)).mean[:, 1]
    errors = (velocity - fresh.next_observations[:, 1]).square()
    nothing = (fresh.observations - fresh.next_observations)[hits, 1].square().mean()
    assert errors[~hits].mean() < 0.01
    assert errors[hits].mean() > 0.7 * nothing if beta == 0.0 else errors[hits].mean() < 0.1 * nothing


def test_gradients_are_as_long_as_they_may_be(generator):
    data, _ = linear_gaussian(500, generator)
    longest = {}
    for max_grad_norm in (None, 0.5, 10.0):
        dynamics = make_dynamics(th.Generator().manual_seed(0), max_gradient_steps=20, max_grad_norm=max_grad_norm)
        norms, optimizer = [], make_optimizer(dynamics)
        parameters = list(dynamics.ensemble.parameters())
        optimizer.register_step_pre_hook(
            lambda *_, norms=norms, parameters=parameters: norms.append(th.cat([p.grad.flatten() for p in parameters]).norm())
        )
        fit_ensemble(dynamics, optimizer, data, th.Generator().manual_seed(0), is_first=True)
        assert len(norms) == 20
        longest[max_grad_norm] = max(norms).item()
    assert longest[0.5] == pytest.approx(0.5, rel=1e-4) and 0.5 < longest[None]
    assert longest[10.0] == min(longest[None], 10.0)


def test_counted_steps_end_by_their_number_alone(generator):
    dynamics = make_dynamics(generator, patience=0, improvement=0.99, max_gradient_steps=20)
    result = fit_ensemble(dynamics, make_optimizer(dynamics), linear_gaussian(100, generator)[0], generator, is_first=True)
    assert result.gradient_steps == 20


def test_by_the_papers_rule_the_fit_stops_after_more_than_patience_looks_without_gain(generator):
    noise = linear_gaussian(200, generator)[0]._replace(rewards=th.randn(200, generator=generator))
    # hardly anything counts as a gain; 160 rows make 16 batches of 10, or 5 of 32, or one of them all
    for batch_size, steps_per_epoch, epochs_per_look in [(10, 16, 1), (32, 5, 2), (256, 1, 10)]:
        dynamics = make_dynamics(generator, patience=4, improvement=0.99, batch_size=batch_size, max_gradient_steps=None)
        result = fit_ensemble(dynamics, make_optimizer(dynamics), noise, generator, is_first=True)
        assert result.epochs == (1 + 5) * epochs_per_look  # the first look always improves on nothing
        assert result.gradient_steps == result.epochs * steps_per_epoch


def steps_and_looks(monkeypatch, data, generator, is_first=True, watched=lambda dynamics: None, **config):
    """Fits, and follows it from outside. :return: learning rate of each step, steps before each look, FitResult"""
    dynamics = make_dynamics(generator, **dict(batch_size=32) | config)
    optimizer, looks = make_optimizer(dynamics), []
    rates = count_steps(optimizer)

    class Watch(KeptWeights):
        def update(self, errors):
            looks.append(len(rates))
            return super().update(errors)

    monkeypatch.setattr("sb3_mbpo.fit.KeptWeights", Watch)
    result = fit_ensemble(dynamics, optimizer, data, generator, is_first)
    return rates, looks, result


def count_steps(optimizer):
    """:return: a list that gets the learning rate of each step from now on; it must be one for all parameters"""
    rates = []

    def before_step(optimizer, *_):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        rates.append(rate)

    optimizer.register_step_pre_hook(before_step)
    return rates


@pytest.mark.parametrize(
    ("max_gradient_steps", "is_first", "looks"),
    [
        ((50, 20), True, [10, 20, 30, 40, 50]),
        ((50, 20), False, [4, 8, 12, 16, 20]),
        ([50, 20], False, [4, 8, 12, 16, 20]),
        (20, True, [4, 8, 12, 16, 20]),
        (20, False, [4, 8, 12, 16, 20]),
        (23, True, [5, 10, 15, 20, 23]),
        (5, True, [1, 2, 3, 4, 5]),
        (3, True, [1, 2, 3]),
        (1, True, [1]),
    ],
)
def test_a_fit_has_its_number_of_steps_and_five_looks(monkeypatch, generator, max_gradient_steps, is_first, looks):
    data, _ = linear_gaussian(300, generator)
    rates, seen, result = steps_and_looks(monkeypatch, data, generator, is_first, max_gradient_steps=max_gradient_steps)
    assert seen == looks and len(rates) == result.gradient_steps == looks[-1]
    assert result.epochs == math.ceil(looks[-1] / 7)  # 240 rows are trained on: seven full batches of 32


def test_by_default_the_first_fit_makes_2000_steps_and_a_later_one_250(generator):
    config = DynamicsConfig.from_kwargs(None)
    assert [config.max_gradient_steps_of(first) for first in (True, False)] == [2000, 250]
    data, _ = linear_gaussian(50, generator)
    dynamics = Dynamics(2, spaces.Box(-1, 1, (1,)), DynamicsConfig.from_kwargs(dict(net_arch=[4])), generator)
    optimizer = make_optimizer(dynamics)
    for is_first, n_steps in [(True, 2000), (False, 250)]:
        rates = count_steps(optimizer)
        assert fit_ensemble(dynamics, optimizer, data, generator, is_first).gradient_steps == len(rates) == n_steps
        assert rates[0] == rates[n_steps // 2] == 3e-3


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [  # constant for the first four fifths, then a line that is zero at the step after the last
        (20, [0.01] * 17 + [0.0075, 0.005, 0.0025]),
        (10, [0.01] * 9 + [0.005]),
        (8, [0.01] * 7 + [0.00625]),
        (1, [0.01]),
    ],
)
def test_the_learning_rate_falls_to_zero_in_the_last_fifth(monkeypatch, generator, n_steps, expected):
    data, _ = linear_gaussian(300, generator)
    for steps, is_first in [(n_steps, True), ((1000, n_steps), False)]:
        rates, _, _ = steps_and_looks(monkeypatch, data, generator, is_first, max_gradient_steps=steps, learning_rate=0.01)
        assert rates == pytest.approx(expected)


def test_by_the_papers_rule_the_learning_rate_stays(monkeypatch, generator):
    data, _ = linear_gaussian(300, generator)
    rates, looks, _ = steps_and_looks(monkeypatch, data, generator, max_gradient_steps=None, learning_rate=0.01)
    assert set(rates) == {0.01} and looks == list(range(14, len(rates) + 1, 14))  # two epochs of seven batches


@pytest.mark.parametrize("max_gradient_steps", [10, None])
def test_where_the_learning_rate_ended_does_not_matter_to_the_next_fit(generator, max_gradient_steps):
    data, _ = linear_gaussian(300, generator)
    untouched = make_dynamics(generator, max_gradient_steps=max_gradient_steps)
    twins, fits = [], []
    for learning_rate in (3e-3, 1e-9, 123.0):
        twins.append(copy.deepcopy(untouched))
        optimizer = make_optimizer(twins[-1])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        fits.append(fit_ensemble(twins[-1], optimizer, data, th.Generator().manual_seed(1), is_first=False))
    assert fits[0].holdout_mse == fits[1].holdout_mse == fits[2].holdout_mse
    for parameters in zip(*(twin.parameters() for twin in twins), strict=True):
        assert th.equal(parameters[0], parameters[1]) and th.equal(parameters[0], parameters[2])


def test_the_cost_of_a_fit_grows_with_the_data_by_the_papers_rule_alone(monkeypatch, generator):
    small, large = (linear_gaussian(n_rows, generator)[0] for n_rows in (500, 2000))
    for max_gradient_steps, factor in [((25, 10), 1), (None, 4)]:
        costs = []
        for data in (small, large):
            settings = dict(max_gradient_steps=max_gradient_steps, patience=0, improvement=0.99)
            _, looks, _ = steps_and_looks(monkeypatch, data, generator, **settings)
            costs.append(looks[0])
        assert costs[1] == pytest.approx(factor * costs[0], rel=0.1)


def test_batches_are_full_and_each_order_leaves_out_another_rest(generator, monkeypatch):
    """80 rows are trained on, in batches of 32: two to an order, and 16 rows left out of each."""
    data = linear_gaussian(100, generator)[0]._replace(rewards=th.arange(100.0))
    dynamics = make_dynamics(generator, batch_size=32, max_gradient_steps=200, normalize_targets=False)
    drawn: list[th.Tensor] = []
    # without the bootstrap, whose rows repeat: each member is shown the rows in their order
    monkeypatch.setattr("sb3_mbpo.fit.th.randint", lambda n_rows, shape, **_: th.arange(n_rows).expand(shape))
    monkeypatch.setattr(
        "sb3_mbpo.fit.ensemble_loss", lambda *arguments: drawn.append(arguments[2][0, :, -1]) or ensemble_loss(*arguments)
    )
    fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
    assert [len(rows) for rows in drawn] == [32] * 200
    orders = [th.cat(drawn[first : first + 2]).tolist() for first in range(0, 200, 2)]
    assert all(len(set(order)) == 64 for order in orders)  # no row twice in an order, across looks as well
    counts = th.bincount(th.tensor(orders).long().flatten(), minlength=100)
    assert (counts > 0).sum() == 80
    # of 100 orders each row is in 80 on average, with a standard deviation of 4
    assert counts[counts > 0].min() > 80 - 5 * 4 and counts.max() <= 100 and len(set(map(tuple, orders))) == 100


@pytest.mark.parametrize(("max_gradient_steps", "kept_looks"), [(None, [1, 3, 0]), (20, [4, 4, 4])])
def test_a_fit_ends_with_the_best_look_by_the_papers_rule_and_else_with_the_last(
    generator, monkeypatch, max_gradient_steps, kept_looks
):
    data, _ = linear_gaussian(300, generator)
    dynamics = make_dynamics(generator, max_gradient_steps=max_gradient_steps, patience=0)
    weights = []
    errors = [[3.0, 1.0, 2.0, 2.0, 2.0], [3.0, 2.5, 2.0, 1.0, 1.5], [1.0, 2.0, 2.0, 2.0, 2.0]]

    class Told(KeptWeights):
        def update(self, _):
            weights.append([weight.detach().clone() for weight in dynamics.ensemble.weights])
            return super().update(th.tensor(errors)[:, len(weights) - 1])

    monkeypatch.setattr("sb3_mbpo.fit.KeptWeights", Told)
    fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
    assert len(weights) == 5
    for member, best_look in enumerate(kept_looks):
        for layer, weight in enumerate(dynamics.ensemble.weights):
            assert th.equal(weight[member], weights[best_look][layer][member])


def test_few_steps_recover_a_linear_gaussian_system_about_as_well_as_the_papers_rule():
    """Errors of the mean where there is no noise, on rows that neither fit has seen; in units of the noise."""
    errors = {}
    for name, config in {
        "few": dict(max_gradient_steps=(2000, 250), learning_rate=3e-3),
        "paper": dict(max_gradient_steps=None, learning_rate=1e-3),
    }.items():
        generator = th.Generator().manual_seed(3)
        data, _ = linear_gaussian(4000, generator)
        fresh, clean = linear_gaussian(2000, generator)
        dynamics = make_dynamics(generator, **config)
        result = fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
        mean = dynamics.predict(fresh.observations, fresh.actions).mean[list(result.elites)]
        errors[name] = ((mean - clean) / th.tensor([0.05, 0.2, 0.1])).square().mean().item()
        noise = [0.05**2 / (0.05**2 + 0.38 / 3), 0.2**2 / (0.2**2 + 0.42 / 3), 0.1**2 / (0.1**2 + 2.25 / 3)]
        assert sum(result.holdout_mse) / 3 == pytest.approx(sum(noise) / 3, rel=0.2)
    assert errors["few"] < 0.05 and errors["few"] < 1.5 * errors["paper"]


def test_weights_and_adam_state_carry_over(generator):
    data, _ = linear_gaussian(500, generator)
    dynamics = make_dynamics(generator, max_gradient_steps=400)
    optimizer = make_optimizer(dynamics)
    first = fit_ensemble(dynamics, optimizer, data, generator, is_first=True)
    steps = optimizer.state[dynamics.ensemble.weights[0]]["step"].item()
    second = fit_ensemble(dynamics, optimizer, data, generator, is_first=False)
    assert optimizer.state[dynamics.ensemble.weights[0]]["step"].item() == steps + second.gradient_steps
    assert steps == first.gradient_steps
    cold = fit_ensemble(
        new := make_dynamics(generator, max_gradient_steps=2), make_optimizer(new), data, generator, is_first=True
    )
    dynamics.config.__dict__["max_gradient_steps"] = 2
    warm = fit_ensemble(dynamics, optimizer, data, generator, is_first=False)
    assert max(warm.holdout_mse) < 0.5 * min(cold.holdout_mse)


def test_a_fit_holds_back_as_many_rows_as_it_is_told_and_scales_by_the_others(generator, monkeypatch):
    data, _ = linear_gaussian(200, generator)
    splits = []
    split = split_holdout
    monkeypatch.setattr("sb3_mbpo.fit.split_holdout", lambda *args: splits.append(split(*args)) or splits[-1])
    for settings, n_holdout in ((dict(holdout_ratio=0.25), 50), (dict(holdout_ratio=0.5, max_holdout=30), 30)):
        dynamics = make_dynamics(generator, max_gradient_steps=2, **settings)
        fit_ensemble(dynamics, make_optimizer(dynamics), data, generator, is_first=True)
        train, holdout = splits[-1]
        assert (train.n_rows, holdout.n_rows) == (200 - n_holdout, n_holdout)
        np.testing.assert_allclose(dynamics.target_scaler.std[2], train.rewards.numpy().std(), rtol=1e-5)
        np.testing.assert_allclose(dynamics.input_scaler.mean[:2], train.observations.numpy().mean(axis=0), atol=1e-6)


def test_the_holdout_is_new_bounded_and_disjoint(generator):
    data = Transitions(th.zeros(100, 2), th.zeros(100, 1), th.zeros(100, 2), th.arange(100.0), th.zeros(100, dtype=th.bool))
    train, holdout = split_holdout(data, 0.2, 5000, generator)
    assert (train.n_rows, holdout.n_rows) == (80, 20)
    assert sorted([*train.rewards.tolist(), *holdout.rewards.tolist()]) == list(range(100))
    assert split_holdout(data, 0.2, 5000, generator)[1].rewards.tolist() != holdout.rewards.tolist()
    assert split_holdout(data, 0.2, 7, generator)[1].n_rows == 7
    assert split_holdout(data.rows(th.arange(2)), 0.2, 7, generator)[1].n_rows == 1


def test_state_and_reward_targets_are_standardised_apart(generator):
    data, _ = linear_gaussian(1000, generator)
    data = data._replace(rewards=1000 * data.rewards)
    dynamics = make_dynamics(generator)
    dynamics.fit_scalers(data)
    assert dynamics.scaled_targets(data).std(dim=0).tolist() == pytest.approx([1, 1, 1], rel=1e-2)
    plain = make_dynamics(generator, normalize_targets=False)
    plain.fit_scalers(data)
    th.testing.assert_close(plain.scaled_targets(data)[:, 2], data.rewards)


def half_plane(n_rows: int, generator: th.Generator, threshold: float) -> Transitions:
    """The task has ended where the first coordinate of the next observation lies above the threshold."""
    rows = th.randn(n_rows, 7, generator=generator)
    return Transitions(rows[:, :2], rows[:, 2:3], rows[:, 3:5], rows[:, 5], rows[:, 3] > threshold)


@pytest.mark.parametrize("threshold", [0.5, 2.3])  # 31 % and 1 % of the rows
def test_rare_terminations_are_learned_and_their_frequency_kept(generator, threshold):
    dynamics = make_dynamics(generator)
    data = half_plane(4000, generator, threshold)
    dynamics.fit_scalers(data)
    optimizer = th.optim.Adam(dynamics.termination_head.parameters(), lr=3e-3)
    for _ in range(3):
        precision, recall = fit_termination(dynamics, optimizer, data, generator)
    fresh = half_plane(20_000, generator, threshold)
    predicted = dynamics.terminated(fresh.observations, fresh.actions, fresh.next_observations)
    correct = (predicted & fresh.terminated).sum().item()
    fresh_precision, fresh_recall = correct / predicted.sum().item(), correct / fresh.terminated.sum().item()
    assert fresh_precision > 0.85 and fresh_recall > 0.7
    assert (precision, recall) == pytest.approx((fresh_precision, fresh_recall), abs=0.3 if threshold == 2.3 else 0.05)
    assert predicted.float().mean().item() == pytest.approx(fresh.terminated.float().mean().item(), rel=0.25)


def test_without_a_termination_in_the_data_the_head_says_never(generator):
    dynamics = make_dynamics(generator)
    data = half_plane(500, generator, threshold=100.0)
    optimizer = th.optim.Adam(dynamics.termination_head.parameters(), lr=3e-3)
    precision, recall = fit_termination(dynamics, optimizer, data, generator)
    assert precision != precision and recall != recall  # NaN: nothing was there
    assert not dynamics.terminated(data.observations, data.actions, data.next_observations).any()


def test_where_every_step_ends_the_task_the_head_says_always(generator):
    dynamics = make_dynamics(generator)
    data = half_plane(500, generator, threshold=-100.0)
    optimizer = th.optim.Adam(dynamics.termination_head.parameters(), lr=3e-3)
    assert fit_termination(dynamics, optimizer, data, generator) == (1.0, 1.0)
    data = half_plane(500, generator, threshold=0.0)
    precision, recall = fit_termination(dynamics, optimizer, data, generator)  # and it learns better later
    assert precision > 0.9 and recall > 0.9


def test_a_known_rule_that_contradicts_the_log_is_an_error_that_names_rows(generator):
    dynamics = make_dynamics(generator)
    data = half_plane(500, generator, threshold=1.0)
    dynamics.termination_fn = takes_tensors(lambda obs, action, next_obs: next_obs[:, 0] > 1.0)
    check_termination(dynamics, data)
    one_off = data.terminated.clone()
    one_off[17] = ~one_off[17]
    with pytest.raises(ValueError, match=r"in 1 of 500 transitions, rows \[17\]"):
        check_termination(dynamics, data._replace(terminated=one_off))
    dynamics.termination_fn = takes_tensors(lambda obs, action, next_obs: next_obs[:, 0] > 1.5)
    first = int((data.terminated & (data.next_observations[:, 0] <= 1.5)).nonzero()[0])
    with pytest.raises(ValueError, match=rf"rows \[{first}, .*for row {first} it says False.*Pass a `termination_fn`"):
        check_termination(dynamics, data)


def test_a_rule_may_be_wrong_about_one_termination_in_a_hundred(generator):
    dynamics = make_dynamics(generator)
    data = half_plane(2000, generator, threshold=0.0)
    dynamics.termination_fn = takes_tensors(lambda obs, action, next_obs: next_obs[:, 0] > 0.0)
    n_terminations = int(data.terminated.sum())
    wrong = data.terminated.nonzero()[: n_terminations // 100 + 1, 0]
    data.terminated[wrong[:-1]] = False
    check_termination(dynamics, data)
    data.terminated[wrong[-1]] = False
    with pytest.raises(ValueError, match=f"in {len(wrong)} of 2000 transitions"):
        check_termination(dynamics, data)


def test_the_rule_is_held_against_the_log_until_the_task_has_ended_there(generator):
    """A fit of data in which nothing ended has not checked it; one that has is the last, unless it diverges."""
    dynamics = make_dynamics(generator, max_gradient_steps=2)
    data = half_plane(500, generator, threshold=1.0)
    quiet = data.rows(data.next_observations[:, 0] <= 1.0)

    def fit(rule: float, rows: Transitions, last: FitResult | None) -> FitResult:
        dynamics.termination_fn = takes_tensors(lambda obs, action, next_obs: next_obs[:, 0] > rule)
        return fit_dynamics(dynamics, make_optimizer(dynamics), None, rows, generator, last)

    first = fit(1.5, quiet, None)
    second = fit(1.5, quiet, first)
    with pytest.raises(ValueError, match="The termination rule disagrees"):
        fit(1.5, data, second)
    third = fit(1.0, data, second)
    assert [result.rule_checked for result in (first, second, third)] == [False, False, True]
    assert fit(1.5, data, third).rule_checked
    for last in (None, replace(third, diverged=True)):
        with pytest.raises(ValueError, match="The termination rule disagrees"):
            fit(1.5, data, last)


# ---------------------------------------------------------------- what breaks


@pytest.mark.parametrize(("max_gradient_steps", "n_steps"), [(None, 36), ((400, 100), 40)])  # looks after 12 and 20 steps
def test_a_loss_that_is_not_finite_ends_the_fit_at_the_weights_before(generator, monkeypatch, max_gradient_steps, n_steps):
    data, _ = linear_gaussian(2000, generator)
    dynamics = make_dynamics(generator, max_gradient_steps=max_gradient_steps)
    optimizer = make_optimizer(dynamics)
    before = fit_ensemble(dynamics, optimizer, data, generator, is_first=True)
    assert not before.diverged
    calls = []

    def exploding_loss(*arguments):
        calls.append(len(calls))
        loss, likelihood = ensemble_loss(*arguments)
        return (loss * th.nan, likelihood * th.nan) if len(calls) == 30 else (loss, likelihood)

    monkeypatch.setattr("sb3_mbpo.fit.ensemble_loss", exploding_loss)
    result = fit_ensemble(dynamics, optimizer, data, generator, is_first=False)
    assert result.diverged and result.gradient_steps == len(calls) == n_steps
    assert all(parameter.isfinite().all() for parameter in dynamics.ensemble.parameters())
    assert max(result.holdout_mse) < 1.2 * max(before.holdout_mse)
    monkeypatch.undo()
    again = fit_ensemble(dynamics, optimizer, data, generator, is_first=False)  # Adam has forgotten the NaN
    assert not again.diverged and max(again.holdout_mse) < 1.2 * max(before.holdout_mse)


def test_data_that_no_network_can_hold_are_named(generator):
    data, _ = linear_gaussian(100, generator)
    dynamics = make_dynamics(generator)
    with pytest.raises(ValueError, match=r"cannot be fitted: its holdout errors are .*nan.*the largest reward inf"):
        fit_ensemble(
            dynamics, make_optimizer(dynamics), data._replace(rewards=data.rewards * th.inf), generator, is_first=True
        )


def test_near_data_is_ten_standard_deviations_beyond_the_extremes(generator):
    dynamics = make_dynamics(generator)
    assert dynamics.near_data(th.tensor([[1e30, 0.0]])).all()  # before the first fit there is no data to be far from
    values = th.linspace(-1, 3, 101)
    observations = th.stack((values, th.full_like(values, 5.0)), dim=1)
    zeros = th.zeros(101, 1)
    dynamics.fit_scalers(Transitions(observations, zeros, observations, zeros[:, 0], zeros[:, 0].bool()))
    limit = 10 * values.numpy().std()
    points = [(-1 - 0.99 * limit, 5), (-1 - 1.01 * limit, 5), (3 + 0.99 * limit, 5), (3 + 1.01 * limit, 5)]
    points += [(0, 14.9), (0, 15.1), (0, -4.9), (0, -5.1)]  # a constant dimension has a standard deviation of 1
    assert dynamics.near_data(th.tensor(points)).tolist() == [True, False] * 4
    following = observations.clone()
    following[:2, 0] = th.tensor([-21.0, 23.0])  # where two steps led belongs to the data, too
    dynamics.fit_scalers(Transitions(observations, zeros, following, zeros[:, 0], zeros[:, 0].bool()))
    points = [(-21 - 0.99 * limit, 5), (-21 - 1.01 * limit, 5), (23 + 0.99 * limit, 5), (23 + 1.01 * limit, 5)]
    assert dynamics.near_data(th.tensor(points)).tolist() == [True, False] * 2
