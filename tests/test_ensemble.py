import math

import pytest
import torch as th
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from sb3_mbpo.activations import LayerNormSiLU
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


@pytest.mark.parametrize("constant_noise", [False, True])
def test_equal_groups_give_the_same_values_and_gradients_as_all_others(constant_noise, generator):
    """Frozen, as where gradients pass through: equal groups are computed at once, others one by one."""
    ensemble = GaussianEnsemble(5, 3, 4, [16, 8], LayerNormSiLU, generator, constant_noise).requires_grad_(False)
    if constant_noise:
        nn.init.normal_(ensemble.constant_log_var, generator=generator)
    members = th.arange(4).repeat(6)[th.randperm(24, generator=generator)]
    results = []
    for n_rows in (24, 23):
        inputs = th.linspace(-2.0, 2.0, 24 * 5).view(24, 5).requires_grad_()
        outputs = ensemble.forward_members(inputs[:n_rows], members[:n_rows])
        (gradient,) = th.autograd.grad(sum(output[:23].square().sum() for output in outputs), inputs)
        results.append([*(output[:23] for output in outputs), gradient[:23]])
    for together, apart in zip(*results, strict=True):
        th.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_constant_noise_is_that_of_the_member_whatever_the_input(generator):
    ensemble = GaussianEnsemble(5, 3, 4, [16, 8], nn.SiLU, generator, constant_noise=True)
    nn.init.normal_(ensemble.constant_log_var, generator=generator)
    inputs, members = th.randn(7, 5, generator=generator), th.tensor([2, 0, 0, 3, 1, 2, 2])
    assert (ensemble.forward_members(inputs, members)[1] == ensemble.constant_log_var[members, 0]).all()
    mean, log_var = ensemble(inputs)
    assert mean.shape == log_var.shape == (4, 7, 3) and (log_var == ensemble.constant_log_var).all()


def plain_formula(ensemble: GaussianEnsemble, inputs: th.Tensor, weights, biases) -> tuple[th.Tensor, th.Tensor]:
    """All members at once, by autograd's own operators."""
    hidden = inputs.expand(ensemble.ensemble_size, -1, -1)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = th.baddbmm(bias, hidden if layer == 0 else ensemble.activation(hidden), weight)
    mean, log_var = hidden.chunk(2, dim=-1)
    log_var = ensemble.max_log_var - F.softplus(ensemble.max_log_var - log_var)
    return mean, ensemble.min_log_var + F.softplus(log_var - ensemble.min_log_var)


def with_biases(ensemble: GaussianEnsemble, generator: th.Generator) -> GaussianEnsemble:
    for bias in ensemble.biases:
        nn.init.normal_(bias, generator=generator)
    return ensemble


ACTIVATIONS = pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.Tanh])


@ACTIVATIONS
@pytest.mark.parametrize("net_arch", [[32, 24], [20], [], [8, 40, 16]])
@pytest.mark.parametrize("is_shared", [False, True], ids=["own rows", "shared rows"])
def test_outputs_and_gradients_equal_those_of_the_plain_formula(activation, net_arch, is_shared, generator):
    ensemble = with_biases(GaussianEnsemble(18, 9, 3, net_arch, activation, generator), generator)
    inputs = th.randn(*([] if is_shared else [3]), 40, 18, generator=generator).requires_grad_()
    weights, biases = ([p.detach().clone().requires_grad_() for p in ps] for ps in (ensemble.weights, ensemble.biases))
    twin = inputs.detach().clone().requires_grad_()
    factors = th.randn(2, 3, 40, 9, generator=generator)

    got, expected = ensemble(inputs), plain_formula(ensemble, twin, weights, biases)
    (factors[0] * got[0] + factors[1] * got[1].square()).sum().backward()
    bounds = [bound.grad.clone() for bound in (ensemble.max_log_var, ensemble.min_log_var)]
    (factors[0] * expected[0] + factors[1] * expected[1].square()).sum().backward()

    for ours, reference in zip(got, expected, strict=True):
        th.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    for ours, reference in zip([*ensemble.weights, *ensemble.biases, inputs], [*weights, *biases, twin], strict=True):
        assert reference.grad.abs().max() > 1e-2
        th.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-3)
    for bound, reference in zip((ensemble.max_log_var, ensemble.min_log_var), bounds, strict=True):
        th.testing.assert_close(bound.grad, 2 * reference, rtol=1e-4, atol=1e-4)  # both went into it


@ACTIVATIONS
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4)], ids=["own rows", "shared rows"])
def test_gradients_equal_finite_differences(activation, shape, generator):
    ensemble = with_biases(GaussianEnsemble(4, 2, 2, [3, 5], activation, generator), generator).double()
    names, parameters = zip(*ensemble.named_parameters(), strict=True)
    inputs = th.randn(shape, generator=generator).double().requires_grad_()

    def outputs(inputs, *parameters):
        return functional_call(ensemble, dict(zip(names, parameters, strict=True)), inputs)

    assert th.autograd.gradcheck(outputs, (inputs, *parameters))


@pytest.mark.parametrize("n_rows", [0, 1, 127, 128, 129, 300])
def test_forward_is_the_same_with_and_without_gradients(n_rows, generator):
    ensemble = with_biases(GaussianEnsemble(18, 9, 3, [32, 24], nn.SiLU, generator), generator)
    for inputs in (th.randn(n_rows, 18, generator=generator), th.randn(3, n_rows, 18, generator=generator)):
        recorded = ensemble(inputs)
        with th.no_grad():
            unrecorded = ensemble(inputs)
            expected = plain_formula(ensemble, inputs, ensemble.weights, ensemble.biases)
        assert recorded[0].requires_grad and not unrecorded[0].requires_grad
        for part, reference in enumerate(expected):
            assert recorded[part].shape == unrecorded[part].shape == (3, n_rows, 9)
            th.testing.assert_close(recorded[part], reference, rtol=1e-4, atol=1e-5)
            th.testing.assert_close(unrecorded[part], reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_rows", [129, 300, 1000])
def test_grouped_rows_equal_the_plain_formula_beyond_a_block(n_rows, generator):
    ensemble = with_biases(GaussianEnsemble(18, 9, 3, [32, 24], nn.SiLU, generator), generator)
    inputs, members = th.randn(n_rows, 18, generator=generator), th.randint(3, (n_rows,), generator=generator)
    with th.no_grad():
        got = ensemble.forward_members(inputs, members)
        expected = plain_formula(ensemble, inputs, ensemble.weights, ensemble.biases)
    for ours, reference in zip(got, expected, strict=True):
        th.testing.assert_close(ours, reference[members, th.arange(n_rows)], rtol=1e-4, atol=1e-5)


def test_frozen_members_pass_gradients_to_their_inputs(generator):
    ensemble = with_biases(GaussianEnsemble(18, 9, 3, [32, 24], nn.SiLU, generator), generator).requires_grad_(False)
    inputs = th.randn(3, 40, 18, generator=generator).requires_grad_()
    twin = inputs.detach().clone().requires_grad_()
    ensemble(inputs)[0].square().sum().backward()
    plain_formula(ensemble, twin, ensemble.weights, ensemble.biases)[0].square().sum().backward()
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    th.testing.assert_close(inputs.grad, twin.grad, rtol=1e-3, atol=1e-4)


def test_trained_biases_of_frozen_weights_get_their_gradients(generator):
    ensemble = with_biases(GaussianEnsemble(18, 9, 3, [32, 24], nn.SiLU, generator), generator)
    ensemble.weights.requires_grad_(False)
    inputs = th.randn(40, 18, generator=generator)
    biases = [bias.detach().clone().requires_grad_() for bias in ensemble.biases]
    ensemble(inputs)[0].square().sum().backward()
    plain_formula(ensemble, inputs, ensemble.weights, biases)[0].square().sum().backward()
    for bias, reference in zip(ensemble.biases, biases, strict=True):
        th.testing.assert_close(bias.grad, reference.grad, rtol=1e-3, atol=1e-3)
    assert all(weight.grad is None for weight in ensemble.weights)


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
    assert scaler.std[1] == 0.0 and scaler.scale(th.full((1, 3), 7.5))[0, 1] == 0.5  # centred, not scaled
    th.testing.assert_close(scaler.unscale(scaled), values)
    assert (scaler.unscale(scaled + 1.0)[:, 1] == 7.0).all()  # whatever was predicted


def test_termination_head_says_never_before_its_first_fit(generator):
    head = TerminationHead(4, 8, generator)
    assert not head.terminated(100 * th.randn(500, 4, generator=generator)).any()


@pytest.mark.parametrize("activation_fn", [nn.PReLU, lambda: nn.ReLU(inplace=True)], ids=["parameters", "in place"])
def test_other_activations_have_their_gradients_too(activation_fn, generator):
    ensemble = GaussianEnsemble(3, 2, 2, [5], activation_fn, generator)
    inputs = th.randn(2, 6, 3, generator=generator)
    mean, log_var = ensemble(inputs)
    (mean.square() + log_var).sum().backward()
    for member in range(2):
        hidden = inputs[member] @ ensemble.weights[0][member] + ensemble.biases[0][member]
        slope = getattr(ensemble.activation, "weight", th.zeros(1))
        outputs = th.where(hidden > 0, hidden, slope * hidden) @ ensemble.weights[1][member] + ensemble.biases[1][member]
        th.testing.assert_close(mean[member], outputs[:, :2])
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in ensemble.parameters())
