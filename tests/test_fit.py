import copy

import pytest
import torch as th
from conftest import linear_gaussian, make_dynamics

from sb3_mbpo.dynamics import DynamicsConfig
from sb3_mbpo.fit import (
    BestWeights,
    check_termination,
    ensemble_loss,
    fit_ensemble,
    fit_termination,
    make_optimizer,
    split_holdout,
)
from sb3_mbpo.tasks import takes_tensors
from sb3_mbpo.type_aliases import Transitions


@pytest.fixture(scope="module")
def fitted():
    """A fit to a linear-Gaussian system with known noise, with the default network and stopping rule."""
    th.set_num_threads(1)
    generator = th.Generator().manual_seed(1)
    data, _ = linear_gaussian(16_000, generator)
    dynamics = make_dynamics(generator, net_arch=[200] * 4, weight_decay=DynamicsConfig.weight_decay)
    initial_bounds = dynamics.ensemble.max_log_var.detach().clone(), dynamics.ensemble.min_log_var.detach().clone()
    result = fit_ensemble(dynamics, make_optimizer(dynamics), data, generator)
    return dynamics, result, initial_bounds


def test_the_known_noise_and_mean_of_a_linear_gaussian_system_are_recovered(fitted, generator):
    dynamics, result, _ = fitted
    fresh, clean = linear_gaussian(2000, generator)
    for member in result.elites:
        prediction = dynamics.predict(fresh.observations, fresh.actions, th.full((2000,), member))
        assert prediction.std.mean(dim=0).tolist() == pytest.approx([0.05, 0.2, 0.1], rel=0.1)
        errors = (prediction.mean - clean).square().mean(dim=0).sqrt()
        assert (errors < 0.25 * th.tensor([0.05, 0.2, 0.1])).all()


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


def test_loss_against_a_slow_loop(generator):
    ensemble = make_dynamics(generator).ensemble
    inputs, targets = th.randn(3, 10, 3, generator=generator), th.randn(3, 10, 3, generator=generator)
    loss, likelihood = ensemble_loss(ensemble, inputs, targets)
    mean, log_var = ensemble(inputs)
    terms = [
        [
            ((mean[e, b, d] - targets[e, b, d]) ** 2 / log_var[e, b, d].exp() + log_var[e, b, d]).item()
            for b in range(10)
            for d in range(3)
        ]
        for e in range(3)
    ]
    per_member = [sum(values) / len(values) for values in terms]
    assert likelihood.item() == pytest.approx(sum(per_member) / 3, rel=1e-4)
    assert loss.item() == pytest.approx(sum(per_member) + 0.01 * 3 * (0.5 + 10.0), rel=1e-4)


def test_weight_decay_is_the_papers_penalty_per_layer(generator):
    decays = (0.1, 0.2, 0.3)
    by_adam = make_dynamics(generator, weight_decay=decays)
    by_loss = copy.deepcopy(by_adam)
    optimizer = make_optimizer(by_adam)
    plain = th.optim.Adam(by_loss.ensemble.parameters(), lr=1e-3)
    inputs, targets = th.randn(3, 20, 3, generator=generator), th.randn(3, 20, 3, generator=generator)
    for _ in range(10):
        optimizer.zero_grad()
        ensemble_loss(by_adam.ensemble, inputs, targets)[0].backward()
        optimizer.step()
        plain.zero_grad()
        weights = by_loss.ensemble.weights
        penalty = sum(0.5 * decay * weight.square().sum() for decay, weight in zip(decays, weights, strict=True))
        (ensemble_loss(by_loss.ensemble, inputs, targets)[0] + penalty).backward()
        plain.step()
    for ours, reference in zip(by_adam.ensemble.parameters(), by_loss.ensemble.parameters(), strict=True):
        th.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_members_differ_because_their_data_do(generator):
    """The same start and the same batches' order: only the bootstrap can part the members."""
    data, _ = linear_gaussian(200, generator)
    dynamics = make_dynamics(generator, max_gradient_steps=50)
    with th.no_grad():
        for parameter in [*dynamics.ensemble.weights, *dynamics.ensemble.biases]:
            parameter.copy_(parameter[:1].expand_as(parameter))
    fit_ensemble(dynamics, make_optimizer(dynamics), data, generator)
    first, second, third = dynamics.predict(data.observations, data.actions).mean
    assert (first - second).abs().max() > 1e-3 and (second - third).abs().max() > 1e-3


def test_each_bootstrap_draws_with_replacement_once_per_fit(generator, monkeypatch):
    """Tag every row by its reward, and watch what each member is shown in each epoch."""
    data, _ = linear_gaussian(100, generator)
    data = data._replace(rewards=th.arange(100.0))
    dynamics = make_dynamics(generator, batch_size=16, max_gradient_steps=15, normalize_targets=False)
    shown: list[th.Tensor] = []

    def watch(ensemble, inputs, targets):
        shown.append(targets[..., -1].clone())
        return ensemble_loss(ensemble, inputs, targets)

    monkeypatch.setattr("sb3_mbpo.fit.ensemble_loss", watch)
    fit_ensemble(dynamics, make_optimizer(dynamics), data, generator)
    epochs = [th.cat(shown[epoch * 5 : epoch * 5 + 5], dim=1).sort(dim=1).values for epoch in range(3)]
    assert epochs[0].shape == (3, 80)  # 20 of 100 rows are held out
    for epoch in epochs[1:]:
        assert (epoch == epochs[0]).all()  # the same rows in every epoch ...
    assert not (epochs[0][0] == epochs[0][1]).all()  # ... but others for each member
    for member in range(3):  # with replacement: about 1 - 1/e of the rows are there
        assert 40 <= epochs[0][member].unique().numel() <= 62


def test_each_member_returns_to_its_own_best_epoch(generator):
    ensemble = make_dynamics(generator).ensemble
    best = BestWeights(ensemble, improvement=0.01)
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


def test_the_fit_ends_with_the_weights_of_lowest_error(generator, monkeypatch):
    """The errors that are reported are those of the restored weights, on the holdout, by an independent computation."""
    data, _ = linear_gaussian(300, generator)
    dynamics = make_dynamics(generator, batch_size=32, patience=3)
    holdouts = []
    monkeypatch.setattr(
        "sb3_mbpo.fit.split_holdout", lambda *arguments: holdouts.append(split_holdout(*arguments)) or holdouts[-1]
    )
    kept, restore = [], BestWeights.restore
    monkeypatch.setattr(BestWeights, "restore", lambda best: kept.append(best.errors.tolist()) or restore(best))
    result = fit_ensemble(dynamics, make_optimizer(dynamics), data, generator)
    assert list(result.holdout_mse) == pytest.approx(kept[0], rel=1e-4)  # the lowest of every epoch
    holdout = holdouts[0][1]
    truth = th.cat((holdout.next_observations, holdout.rewards[:, None]), dim=1)
    for member in range(3):
        prediction = dynamics.predict(holdout.observations, holdout.actions, th.full((holdout.n_rows,), member))
        scaled = (prediction.mean - truth) / dynamics.target_scaler.std
        assert scaled.square().mean().item() == pytest.approx(result.holdout_mse[member], rel=1e-3)


def test_the_fit_stops_after_more_than_patience_epochs_without_gain(generator):
    noise = linear_gaussian(200, generator)[0]._replace(rewards=th.randn(200, generator=generator))
    # hardly anything counts as a gain; 160 rows make 16 batches of 10, or 5 of 32, or one of 256
    for batch_size, steps_per_epoch, epochs_per_look in [(10, 16, 1), (32, 5, 2), (256, 1, 10)]:
        dynamics = make_dynamics(generator, patience=4, improvement=0.99, batch_size=batch_size)
        result = fit_ensemble(dynamics, make_optimizer(dynamics), noise, generator)
        assert result.epochs == (1 + 5) * epochs_per_look  # the first look always improves on nothing
        assert result.gradient_steps == result.epochs * steps_per_epoch


def test_max_gradient_steps_is_a_bound(generator):
    data, _ = linear_gaussian(1000, generator)
    dynamics = make_dynamics(generator, max_gradient_steps=7)
    result = fit_ensemble(dynamics, make_optimizer(dynamics), data, generator)
    assert (result.gradient_steps, result.epochs) == (7, 2)  # four batches of 256 to an epoch


def test_weights_and_adam_state_carry_over(generator):
    data, _ = linear_gaussian(500, generator)
    dynamics = make_dynamics(generator, max_gradient_steps=400)
    optimizer = make_optimizer(dynamics)
    first = fit_ensemble(dynamics, optimizer, data, generator)
    steps = optimizer.state[dynamics.ensemble.weights[0]]["step"].item()
    second = fit_ensemble(dynamics, optimizer, data, generator)
    assert optimizer.state[dynamics.ensemble.weights[0]]["step"].item() == steps + second.gradient_steps
    assert steps == first.gradient_steps
    cold = fit_ensemble(new := make_dynamics(generator, max_gradient_steps=2), make_optimizer(new), data, generator)
    dynamics.config.__dict__["max_gradient_steps"] = 2
    warm = fit_ensemble(dynamics, optimizer, data, generator)
    assert max(warm.holdout_mse) < 0.5 * min(cold.holdout_mse)


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


# ---------------------------------------------------------------- what breaks


def test_a_loss_that_is_not_finite_ends_the_fit_at_the_best_weights(generator, monkeypatch):
    data, _ = linear_gaussian(2000, generator)
    dynamics = make_dynamics(generator)
    optimizer = make_optimizer(dynamics)
    before = fit_ensemble(dynamics, optimizer, data, generator)
    assert not before.diverged
    calls = []

    def exploding_loss(ensemble, inputs, targets):
        calls.append(len(calls))
        loss, likelihood = ensemble_loss(ensemble, inputs, targets)
        return (loss * th.nan, likelihood * th.nan) if len(calls) == 30 else (loss, likelihood)

    monkeypatch.setattr("sb3_mbpo.fit.ensemble_loss", exploding_loss)
    result = fit_ensemble(dynamics, optimizer, data, generator)
    assert result.diverged and result.gradient_steps == len(calls) == 42  # looks come after 14 steps
    assert all(parameter.isfinite().all() for parameter in dynamics.ensemble.parameters())
    assert max(result.holdout_mse) < 1.2 * max(before.holdout_mse)
    monkeypatch.undo()
    again = fit_ensemble(dynamics, optimizer, data, generator)  # Adam has forgotten the NaN
    assert not again.diverged and max(again.holdout_mse) < 1.2 * max(before.holdout_mse)


def test_data_that_no_network_can_hold_are_named(generator):
    data, _ = linear_gaussian(100, generator)
    dynamics = make_dynamics(generator)
    with pytest.raises(ValueError, match=r"cannot be fitted: its holdout errors are .*nan.*the largest reward inf"):
        fit_ensemble(dynamics, make_optimizer(dynamics), data._replace(rewards=data.rewards * th.inf), generator)


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
