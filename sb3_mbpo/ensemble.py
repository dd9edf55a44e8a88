"""The networks: an ensemble of Gaussian perceptrons in one batched computation, and a classifier of terminations."""

import itertools
import math

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_mbpo.products import differentiable_linear

#: Numbers of rows that vary are filled up to a multiple of this: oneDNN makes, and keeps, one kernel for each shape.
ROWS_PER_BLOCK = 128


class GaussianEnsemble(nn.Module):
    """
    Perceptrons that share nothing but two bounds, each with the mean and the log-variance of its output
    (Chua et al. 2018, section 4; Janner et al. 2019, section 4.1 and their code).

    The log-variance is softly held between two learned vectors, because off the data it would explode. A constant one needs
    no bounds (Kubo et al. 2025, arXiv 2512.15439): it is the same for all inputs, a parameter of each member.

    :param input_dim: dimensions of the (scaled) input
    :param output_dim: dimensions of the (scaled) output
    :param ensemble_size: number of members
    :param net_arch: widths of the hidden layers
    :param activation_fn: activation between the layers
    :param generator: draws the initial weights
    :param constant_noise: whether the log-variance is the same for all inputs
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        ensemble_size: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        generator: th.Generator,
        constant_noise: bool = False,
    ) -> None:
        super().__init__()
        self.ensemble_size = ensemble_size
        self.activation = activation_fn()
        widths = [input_dim, *net_arch, output_dim if constant_noise else 2 * output_dim]
        self.weights = nn.ParameterList()  # (ensemble, fan_in, fan_out) each
        self.biases = nn.ParameterList()  # (ensemble, 1, fan_out) each
        for fan_in, fan_out in itertools.pairwise(widths):
            weight = th.empty(ensemble_size, fan_in, fan_out, device=generator.device)
            std = 1.0 / (2.0 * math.sqrt(fan_in))
            self.weights.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator))
            self.biases.append(th.zeros(ensemble_size, 1, fan_out))
        self.max_log_var = nn.Parameter(th.full((output_dim,), 0.5))
        self.min_log_var = nn.Parameter(th.full((output_dim,), -10.0))
        self.constant_log_var = nn.Parameter(th.zeros(ensemble_size, 1, output_dim)) if constant_noise else None

    def noise_parameters(self) -> list[nn.Parameter]:
        """What is learned about the noise beside the layers."""
        return [self.max_log_var, self.min_log_var] if self.constant_log_var is None else [self.constant_log_var]

    def forward(self, inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Every member on its own rows.

        :param inputs: (ensemble, batch, input_dim), or (batch, input_dim) to give all members the same rows
        :return: mean and log-variance, (ensemble, batch, output_dim) each
        """
        hidden = inputs.expand(self.ensemble_size, -1, -1)
        return self._gaussian(self._outputs(hidden), self.constant_log_var)

    def forward_members(self, inputs: th.Tensor, members: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Each row through one member only: the rows are grouped by member, so no product is computed in vain.

        :param inputs: (batch, input_dim)
        :param members: (batch,), the member of each row
        :return: mean and log-variance, (batch, output_dim) each
        """
        order = th.argsort(members)
        sizes = th.bincount(members, minlength=self.ensemble_size).tolist()
        if th.is_grad_enabled() and len(set(sizes)) == 1:  # all members at once, for which autograd has less to record
            outputs = self._outputs(inputs[order].unflatten(0, (self.ensemble_size, -1))).flatten(0, 1)
        else:
            groups = zip(inputs[order].split(sizes), self._members(), strict=True)
            outputs = th.cat([self._forward_member(*group) for group in groups])
        log_var = None if self.constant_log_var is None else self.constant_log_var[members, 0]
        return self._gaussian(outputs[th.argsort(order)], log_var)

    def _outputs(self, hidden: th.Tensor) -> th.Tensor:
        """
        :param hidden: (ensemble, batch, input_dim)
        :return: (ensemble, batch, fan_out of the last layer)
        """
        one_by_one = self.weights[0].requires_grad or not th.is_grad_enabled()
        if hidden.device.type == "cpu" and one_by_one:  # the values of one member stay in the cache
            return th.stack([self._forward_member(*pair) for pair in zip(hidden, self._members(), strict=True)])
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = th.baddbmm(bias, self.activation(hidden) if layer else hidden, weight)
        return hidden

    def _members(self) -> list[list[th.Tensor]]:
        """The weights of each member's layers, (fan_in, fan_out) each, then their biases, (1, fan_out) each."""
        return list(map(list, zip(*(parameter.unbind() for parameter in (*self.weights, *self.biases)), strict=True)))

    def _forward_member(self, hidden: th.Tensor, parameters: list[th.Tensor]) -> th.Tensor:
        n_rows, n_layers = len(hidden), len(self.weights)
        is_fit = th.is_grad_enabled() and parameters[0].requires_grad  # whose batches are all of one size
        if n_rows > ROWS_PER_BLOCK and n_rows % ROWS_PER_BLOCK and not is_fit:
            hidden = F.pad(hidden, (0, 0, 0, -n_rows % ROWS_PER_BLOCK))
        for layer, (weight, bias) in enumerate(zip(parameters[:n_layers], parameters[n_layers:], strict=True)):
            hidden = differentiable_linear(self.activation(hidden) if layer else hidden, weight.t(), bias[0])
        return hidden[:n_rows]

    def _gaussian(self, outputs: th.Tensor, constant_log_var: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        if constant_log_var is not None:
            return outputs, constant_log_var.expand_as(outputs)
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
