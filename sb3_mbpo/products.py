"""Matrix products of float32, on AMD's CPUs by oneDNN, which PyTorch brings along but uses for convolutions only."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn


def faster_than_mkl(processor: str) -> Any:
    """
    PyTorch multiplies by MKL, which uses half of AMD's processors; oneDNN makes its kernels for the processor at hand. On
    Intel's, MKL is the faster one (measured: README, "Speed").

    :param processor: what the system says of it
    :return: oneDNN's product, as ``torch.compile`` uses it; ``None`` where PyTorch's own is faster, or the only one
    """
    has_onednn = th.backends.mkldnn.is_available()
    return getattr(th.ops.mkldnn, "_linear_pointwise", None) if has_onednn and "AuthenticAMD" in processor else None


_CPUINFO = Path("/proc/cpuinfo")
ONEDNN = faster_than_mkl(_CPUINFO.read_text() if _CPUINFO.exists() else platform.processor())
#: In narrower matrices, preparing oneDNN's kernel costs more than it gains.
MIN_WIDTH = 16


def uses_onednn(inputs: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None) -> bool:
    """Whether :func:`linear` multiplies these by oneDNN, which has no gradients and knows no other type than float32 here."""
    sources = (inputs, weight) if bias is None else (inputs, weight, bias)
    is_recorded = th.is_grad_enabled() and any(source.requires_grad for source in sources)
    is_wide = min(*weight.shape, len(inputs)) >= MIN_WIDTH
    return ONEDNN is not None and is_wide and inputs.device.type == "cpu" and inputs.dtype == th.float32 and not is_recorded


def linear(inputs: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None, relu: bool = False) -> th.Tensor:
    """
    ``inputs @ weight.T + bias``, and its positive part on demand. Where autograd records, it is PyTorch's own.

    :param inputs: (batch, fan_in), or the transpose of such a matrix
    :param weight: (fan_out, fan_in), or the transpose of such a matrix
    :param bias: (fan_out,)
    :param relu: whether to set negative outputs to zero
    :return: (batch, fan_out)
    """
    if uses_onednn(inputs, weight, bias):
        product: th.Tensor = ONEDNN(inputs, weight, bias, "relu" if relu else "none", [], "")
        return product
    product = F.linear(inputs, weight, bias)
    return product.relu_() if relu else product


class _Linear(th.autograd.Function):
    """:func:`linear` with its gradients."""

    @staticmethod
    def forward(ctx: Any, inputs: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_output: th.Tensor) -> tuple[th.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        for_inputs, for_weight, for_bias = ctx.needs_input_grad
        return (
            linear(d_output, weight.t()) if for_inputs else None,
            linear(d_output.t(), inputs.t()) if for_weight else None,
            d_output.sum(dim=0) if for_bias else None,
        )


def differentiable_linear(inputs: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """:func:`linear`, by oneDNN also where autograd records."""
    if ONEDNN is None:
        return F.linear(inputs, weight, bias)
    outputs: th.Tensor = _Linear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return outputs


@contextmanager
def faster_layers(module: nn.Module) -> Iterator[None]:
    """
    While this lasts, the linear layers of a module multiply by oneDNN, forwards and backwards, where that is faster.

    :param module: its ``nn.Linear`` layers are meant, not their subclasses
    """
    plain = [layer for layer in module.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    layers = [] if ONEDNN is None else plain
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, inputs: th.Tensor) -> th.Tensor:
    if inputs.dim() != 2:
        return F.linear(inputs, layer.weight, layer.bias)
    return differentiable_linear(inputs, layer.weight, layer.bias)
