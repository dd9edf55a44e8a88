"""The networks: an ensemble of Gaussian perceptrons in one batched computation, and a classifier of terminations."""

import itertools
import math

import torch as th
import torch.nn.functional as F
from torch import nn


class GaussianEnsemble(nn.Module):
    """
    Perceptrons that share nothing but two bounds, each with the mean and the log-variance of its output
    (Chua et al. 2018, section 4; Janner et al. 2019, section 4.1 and their code).

    The log-variance is softly held between two learned vectors, because off the data it would explode.

    :param input_dim: dimensions of the (scaled) input
    :param output_dim: dimensions of the (scaled) output
    :param ensemble_size: number of members
    :param net_arch: widths of the hidden layers
    :param activation_fn: activation between the layers
    :param generator: draws the initial weights
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        ensemble_size: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        generator: th.Generator,
    ) -> None:
        super().__init__()
        self.ensemble_size = ensemble_size
        self.activation = activation_fn()
        widths = [input_dim, *net_arch, 2 * output_dim]
        self.weights = nn.ParameterList()  # (ensemble, fan_in, fan_out) each
        self.biases = nn.ParameterList()  # (ensemble, 1, fan_out) each
        for fan_in, fan_out in itertools.pairwise(widths):
            weight = th.empty(ensemble_size, fan_in, fan_out, device=generator.device)
            std = 1.0 / (2.0 * math.sqrt(fan_in))
            self.weights.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator))
            self.biases.append(th.zeros(ensemble_size, 1, fan_out))
        self.max_log_var = nn.Parameter(th.full((output_dim,), 0.5))
        self.min_log_var = nn.Parameter(th.full((output_dim,), -10.0))

    def forward(self, inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Every member on its own rows.

        :param inputs: (ensemble, batch, input_dim), or (batch, input_dim) to give all members the same rows
        :return: mean and log-variance, (ensemble, batch, output_dim) each
        """
        hidden = inputs.expand(self.ensemble_size, -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = th.baddbmm(bias, self.activation(hidden) if layer else hidden, weight)
        return self._gaussian(hidden)

    def forward_members(self, inputs: th.Tensor, members: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Each row through one member only: the rows are grouped by member, so no product is computed in vain.

        :param inputs: (batch, input_dim)
        :param members: (batch,), the member of each row
        :return: mean and log-variance, (batch, output_dim) each
        """
        order = th.argsort(members)
        groups = inputs[order].split(th.bincount(members, minlength=self.ensemble_size).tolist())
        outputs = th.cat([self._forward_member(group, member) for member, group in enumerate(groups)])
        return self._gaussian(outputs[th.argsort(order)])

    def _forward_member(self, hidden: th.Tensor, member: int) -> th.Tensor:
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = th.addmm(bias[member], self.activation(hidden) if layer else hidden, weight[member])
        return hidden

    def _gaussian(self, outputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, log_var = outputs.chunk(2, dim=-1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        log_var = self.min_log_var + F.softplus(log_var - self.min_log_var)
        return mean, log_var


class TerminationHead(nn.Module):
    """
    Logit of the probability that a transition ended the task, for environments whose rule nobody has written down.

    Terminations are rare, so it is fitted on batches that hold as many of them as of other rows; ``log_prior_odds``
    (how rare they really are) is added back, so its probabilities fit the data as they are. At first it says "never".

    :param input_dim: dimensions of the (scaled) observation, action and next observation together
    :param width: width of its two hidden layers
    :param generator: draws the initial weights
    """

    log_prior_odds: th.Tensor

    def __init__(self, input_dim: int, width: int, generator: th.Generator) -> None:
        super().__init__()
        widths = [input_dim, width, width, 1]
        self.weights = nn.ParameterList()  # (fan_out, fan_in) each
        self.biases = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            weight = th.empty(fan_out, fan_in, device=generator.device)
            self.weights.append(nn.init.normal_(weight, std=1.0 / math.sqrt(fan_in), generator=generator))
            self.biases.append(th.zeros(fan_out))
        self.register_buffer("log_prior_odds", th.full((1,), -math.inf))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        The logit on balanced data.

        :param inputs: (batch, input_dim), scaled
        :return: (batch,)
        """
        hidden = inputs
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = F.linear(F.silu(hidden) if layer else hidden, weight, bias)
        return hidden.squeeze(-1)

    def terminated(self, inputs: th.Tensor) -> th.Tensor:
        """
        Whether a termination is the likelier outcome.

        :param inputs: (batch, input_dim), scaled
        :return: (batch,), bool
        """
        logit: th.Tensor = self(inputs)
        return logit + self.log_prior_odds > 0.0
