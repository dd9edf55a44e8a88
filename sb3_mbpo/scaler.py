"""Standardisation whose statistics are module buffers, so that they follow the device and are saved with the weights."""

import torch as th
from torch import nn

MIN_STD = 1e-6


class Standardizer(nn.Module):
    """
    Scales each dimension to zero mean and unit variance. Until it is fitted it changes nothing. A dimension whose standard
    deviation lies below ``MIN_STD`` counts as constant, with a ``std`` of 0: ``scale`` only centres it, and whatever is
    unscaled becomes its mean.

    :param dim: number of dimensions
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(dim))
        self.register_buffer("std", th.ones(dim))

    def fit(self, values: th.Tensor) -> None:
        """:param values: (batch, dim)"""
        values = values.double()  # float32 sums lose small variances around large means
        std = values.std(dim=0, correction=0)
        self.mean.copy_(values.mean(dim=0))
        self.std.copy_(th.where(std < MIN_STD, 0.0, std))

    def reset(self) -> None:
        """It changes nothing again."""
        self.mean.fill_(0.0)
        self.std.fill_(1.0)

    @property
    def divisor(self) -> th.Tensor:
        """(dim,), what ``scale`` divides by: the standard deviation, and 1 where a dimension is constant"""
        return th.where(self.std > 0.0, self.std, 1.0)

    def scale(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: (..., dim), raw, of any precision
        :return: in that of the statistics, as the networks need them
        """
        return ((values - self.mean) / self.divisor).to(self.mean.dtype)

    def unscale(self, values: th.Tensor) -> th.Tensor:
        """:param values: (..., dim), scaled"""
        return values * self.std + self.mean
