import math

import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_mbpo.ensemble import GaussianEnsemble, TerminationHead
from sb3_mbpo.scaler import Standardizer


@pytest.fixture
def ensemble(generator) -> GaussianEnsemble:
    return GaussianEnsemble(5, 3, ensemble_size=4, net_arch=[16, 8], activation_fn=nn.SiLU, generator=generator)


def slow_forward(ensemble: GaussianEnsemble, row: th.Tensor, member: int) -> tuple[th.Tensor, th.Tensor]:
    """One row through one member, layer by layer."""
    hidden = row
    for layer in range(3):
        hidden = hidden @ ensemble.weights[layer][member] + ensemble.biases[layer][member, 0]
        hidden = F.silu(hidden) if layer < 2 else hidden
    mean, log_var = hidden[:3], hidden[3:]
    log_var = ensemble.max_log_var - th.log(1 + th.exp(ensemble.max_log_var - log_var))
    return mean, ensemble.min_log_var + th.log(1 + th.exp(log_var - ensemble.min_log_var))


def test_batched_and_grouped_forward_equal_a_slow_loop(ensemble, generator):
    for bias in ensemble.biases:
        nn.init.normal_(bias, generator=generator)
    inputs = th.randn(50, 5, generator=generator)
    members = th.randint(4, (50,), generator=generator)
    mean, log_var = ensemble.forward_members(inputs, members)
    all_means, all_log_vars = ensemble(inputs)
    for index, member in enumerate(members.tolist()):
        slow_mean, slow_log_var = slow_forward(ensemble, inputs[index], member)
        for got, expected in [(mean[index], slow_mean), (log_var[index], slow_log_var)]:
            th.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        th.testing.assert_close(all_means[member, index], slow_mean, rtol=1e-4, atol=1e-5)
        th.testing.assert_close(all_log_vars[member, index], slow_log_var, rtol=1e-4, atol=1e-5)


def test_members_may_be_absent_or_alone(ensemble, generator):
    inputs = th.randn(6, 5, generator=generator)
    for members in (th.full((6,), 3), th.tensor([0, 0, 2, 2, 0, 2])):
        mean, _ = ensemble.forward_members(inputs, members)
        th.testing.assert_close(mean, ensemble(inputs)[0][members, th.arange(6)])
    assert ensemble.forward_members(inputs[:0], members[:0])[0].shape == (0, 3)


def test_each_row_costs_one_member(ensemble, generator):
    """Rows of other members do not touch a member's weights: their gradient is zero."""
    ensemble.forward_members(th.randn(8, 5, generator=generator), th.full((8,), 1))[0].sum().backward()
    touched = ensemble.weights[0].grad.abs().sum(dim=(1, 2)) > 0
    assert touched.tolist() == [False, True, False, False]


def test_initial_weights_are_truncated_normals(generator):
    ensemble = GaussianEnsemble(100, 50, 7, [200, 200], nn.SiLU, generator)
    for weight in ensemble.weights:
        std = 1 / (2 * math.sqrt(weight.shape[1]))
        assert weight.abs().max() <= 2 * std
        # a normal cut at two standard deviations keeps 0.8796 of its standard deviation
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)
    assert all((bias == 0).all() for bias in ensemble.biases)
    assert (ensemble.max_log_var == 0.5).all() and (ensemble.min_log_var == -10).all()


def test_log_variance_stays_between_the_bounds(ensemble, generator):
    inputs = 1e4 * th.randn(100, 5, generator=generator)
    log_var = ensemble(inputs)[1]
    assert log_var.max() <= 0.5 + 1e-3 and log_var.min() >= -10 - 1e-3


def test_standardizer_against_numpy_and_with_a_constant_dimension(generator):
    values = th.randn(1000, 3, generator=generator) * th.tensor([2.0, 0.0, 1e-3]) + th.tensor([1e4, 7.0, 0.0])
    scaler = Standardizer(3)
    th.testing.assert_close(scaler.scale(values), values)  # not fitted: changes nothing
    scaler.fit(values)
    scaled = scaler.scale(values)
    assert scaled.numpy().mean(axis=0) == pytest.approx([0, 0, 0], abs=1e-3)
    assert scaled.numpy().std(axis=0) == pytest.approx([1, 0, 1], abs=1e-3)
    assert scaler.std[1] == 1.0
    th.testing.assert_close(scaler.unscale(scaled), values)


def test_termination_head_says_never_before_its_first_fit(generator):
    head = TerminationHead(4, 8, generator)
    assert not head.terminated(100 * th.randn(500, 4, generator=generator)).any()
