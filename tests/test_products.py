from contextlib import nullcontext

import pytest
import torch as th

from sb3_mbpo import products
from sb3_mbpo.products import MIN_WIDTH, faster_layers, faster_than_mkl, linear, uses_onednn


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """oneDNN's product, in use here whatever the processor."""
    product = faster_than_mkl("vendor_id : AuthenticAMD")
    monkeypatch.setattr(products, "ONEDNN", product)
    return product


needs_onednn = pytest.mark.skipif(faster_than_mkl("AuthenticAMD") is None, reason="PyTorch was built without oneDNN")


@needs_onednn
def test_only_amds_processors_multiply_by_onednn():
    assert faster_than_mkl("AMD64 Family 25 Model 1 Stepping 1, AuthenticAMD") is th.ops.mkldnn._linear_pointwise
    for other in ("vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor", "arm", ""):
        assert faster_than_mkl(other) is None


def matrix(rows: int, columns: int, layout: str, generator: th.Generator) -> th.Tensor:
    """The same kind of numbers, laid out differently in memory."""
    if layout == "transposed":
        return th.randn(columns, rows, generator=generator).t()
    if layout == "slice of a transpose":
        return th.randn(columns, 2 * rows, generator=generator)[:, rows:].t()
    if layout == "slice":
        return th.randn(rows, 3 * columns, generator=generator)[:, columns : 2 * columns]
    return th.randn(rows, columns, generator=generator)


def reference(inputs, weight, bias=None, relu=False) -> th.Tensor:
    product = th.einsum("bi,oi->bo", inputs.double(), weight.double())
    product = product if bias is None else product + bias.double()
    return product.clamp(min=0) if relu else product


@needs_onednn
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("weight_layout", ["plain", "transposed", "slice", "slice of a transpose"])
@pytest.mark.parametrize("input_layout", ["plain", "transposed", "slice", "slice of a transpose"])
def test_product_equals_that_of_float64(input_layout, weight_layout, has_bias, relu, generator):
    for rows, fan_in, fan_out in [(64, 24, 40), (MIN_WIDTH, MIN_WIDTH, MIN_WIDTH), (129, 200, 17)]:
        inputs = matrix(rows, fan_in, input_layout, generator)
        weight = matrix(fan_out, fan_in, weight_layout, generator)
        bias = 3 * th.randn(fan_out, generator=generator) if has_bias else None
        assert uses_onednn(inputs, weight)
        got = linear(inputs, weight, bias, relu)
        assert got.dtype == th.float32 and got.shape == (rows, fan_out)
        th.testing.assert_close(got.double(), reference(inputs, weight, bias, relu), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows, fan_in, fan_out", [(0, 20, 20), (1, 20, 20), (15, 20, 20), (20, 15, 20), (20, 20, 15)])
def test_narrow_products_are_pytorchs_own(rows, fan_in, fan_out, relu, generator):
    inputs, weight = matrix(rows, fan_in, "plain", generator), matrix(fan_out, fan_in, "transposed", generator)
    bias = th.randn(fan_out, generator=generator)
    assert not uses_onednn(inputs, weight)
    got = linear(inputs, weight, bias, relu)
    th.testing.assert_close(got.double(), reference(inputs, weight, bias, relu), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_float64_keeps_its_precision(relu, generator):
    inputs, weight, bias = (matrix(*shape, "plain", generator).double() for shape in [(32, 32), (32, 32), (1, 32)])
    assert not uses_onednn(inputs, weight)
    got = linear(inputs, weight, bias[0], relu)
    th.testing.assert_close(got, reference(inputs, weight, bias[0], relu), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("trained", ["inputs", "weight", "bias"])
def test_gradients_flow_where_autograd_records(trained, relu, generator):
    tensors = dict(
        inputs=matrix(32, 24, "plain", generator),
        weight=matrix(40, 24, "plain", generator),
        bias=th.randn(40, generator=generator),
    )
    twin = tensors[trained].double().requires_grad_()
    tensors[trained].requires_grad_()
    linear(**tensors, relu=relu).square().sum().backward()
    reference(**(tensors | {trained: twin}), relu=relu).square().sum().backward()
    th.testing.assert_close(tensors[trained].grad.double(), twin.grad, rtol=1e-4, atol=1e-3)


@needs_onednn
def test_parameters_go_to_onednn_only_where_nothing_is_recorded(generator):
    inputs, weight = matrix(32, 24, "plain", generator), matrix(40, 24, "plain", generator)
    assert uses_onednn(inputs, weight)
    for trained in (inputs, weight):
        trained.requires_grad_()
        assert not uses_onednn(inputs, weight)
        with th.no_grad():
            assert uses_onednn(inputs, weight)
        trained.requires_grad_(False)


@pytest.mark.parametrize("relu", [False, True])
def test_pytorchs_own_product_gives_the_same(relu, generator, monkeypatch):
    inputs, weight = matrix(32, 24, "transposed", generator), matrix(40, 24, "transposed", generator)
    bias = th.randn(40, generator=generator)
    monkeypatch.setattr(products, "ONEDNN", None)
    assert not uses_onednn(inputs, weight)
    got = linear(inputs, weight, bias, relu)
    th.testing.assert_close(got.double(), reference(inputs, weight, bias, relu), rtol=1e-5, atol=1e-5)


class Nested(th.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = th.nn.Sequential(th.nn.Linear(24, 40), th.nn.Tanh(), th.nn.Linear(40, 17, bias=False))
        self.outer = th.nn.Bilinear(17, 17, 3)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        hidden = self.inner(inputs)
        return self.outer(hidden, hidden)


def test_faster_layers_change_no_output_and_no_gradient(generator):
    module, inputs = Nested(), matrix(32, 24, "plain", generator).requires_grad_()
    results = []
    for context in (nullcontext(), faster_layers(module)):
        module.zero_grad()
        inputs.grad = None
        with context:
            outputs = module(inputs)
            outputs.square().sum().backward()
        results.append([outputs.detach(), inputs.grad, *(parameter.grad for parameter in module.parameters())])
    for expected, got in zip(*results, strict=True):
        th.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_faster_layers_multiply_by_onednn_only_while_they_last(generator, monkeypatch, onednn):
    calls, module, inputs = [], Nested(), matrix(32, 24, "plain", generator)
    monkeypatch.setattr(products, "ONEDNN", lambda *args: calls.append(args) or onednn(*args))
    with pytest.raises(KeyError), faster_layers(module):
        module(inputs).sum().backward()
        n_calls = len(calls)
        raise KeyError
    assert n_calls == 2 + 3  # forwards; backwards for two weights and one hidden layer
    module(inputs).sum().backward()
    assert len(calls) == n_calls and not any("forward" in vars(layer) for layer in module.modules())


def test_faster_layers_leave_layers_alone_where_pytorchs_own_product_is_faster(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", None)
    module = Nested()
    with faster_layers(module):
        assert not any("forward" in vars(layer) for layer in module.modules())


def test_second_derivatives_pass_through_faster_layers(generator):
    layer, inputs = th.nn.Linear(24, 40), matrix(32, 24, "plain", generator).requires_grad_()
    seconds = []
    for context in (nullcontext(), faster_layers(layer)):
        with context:
            (slope,) = th.autograd.grad(layer(inputs).pow(3).sum(), inputs, create_graph=True)
            seconds.append(th.autograd.grad(slope.square().sum(), layer.weight)[0])
    th.testing.assert_close(*seconds, rtol=1e-4, atol=1e-2)
