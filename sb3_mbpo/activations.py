"""Activations for networks that gradients are to pass through."""

import torch as th
import torch.nn.functional as F
from torch import nn


class LayerNormSiLU(nn.Module):
    """
    SiLU, then a layer normalisation without parameters: smooth, and of the same size for inputs of any size. As an
    ``activation_fn`` it stands between the layers of a policy, a critic or the dynamics.
    """

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """:param inputs: (..., width)"""
        return F.layer_norm(F.silu(inputs), inputs.shape[-1:])
