"""
SAC's update of SB3's usual networks, with the gradients written out: what autograd does in :mod:`sb3_mbpo.update`, sooner.

It covers perceptrons with ReLU on flat observations, on the CPU, without gSDE (see :func:`covers`). Their autograd spends
more time on bookkeeping than on matrix products. The derivation, for a batch of B rows:

*Layers.* :math:`h = \\mathrm{relu}(z)` with :math:`z = x W^T + b` turns a gradient :math:`g` of :math:`h` into

.. math:: g_z = g \\odot [h > 0], \\quad g_W = g_z^T x, \\quad g_b = \\sum_{rows} g_z, \\quad g_x = g_z W

*Critics.* :math:`J_Q = \\tfrac12 \\sum_i \\mathrm{mean}[(Q_i - y)^2]`, with the gradient :math:`(Q_i - y) / B`
of :math:`Q_i`.

*Actor.* With :math:`u = \\mu + \\sigma \\varepsilon` and :math:`a = \\tanh u`, SB3 has

.. math::
    \\log \\pi = -\\sum_{dims} [\\tfrac12 \\varepsilon^2 + \\log \\sigma + \\tfrac12 \\log 2 \\pi + \\log(1 - a^2 + 10^{-6})]

and minimises :math:`J_\\pi = \\mathrm{mean}[\\alpha \\log \\pi - \\min_i Q_i(s, a)]`. As :math:`da / du = 1 - a^2`,

.. math::
    g_\\mu = g_u = (1 - a^2) \\Big(\\frac{\\alpha}{B} \\frac{2 a}{1 - a^2 + 10^{-6}}
    - \\frac1B \\frac{\\partial \\min_i Q_i}{\\partial a}\\Big),
    \\quad g_{\\log \\sigma} = \\sigma \\varepsilon \\, g_u - \\frac{\\alpha}{B}

where the last is zero if SB3 clipped :math:`\\log \\sigma`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor
from torch import nn

from sb3_mbpo.products import linear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
#: SB3's guard against the logarithm of zero, in ``SquashedDiagGaussianDistribution``.
EPSILON = 1e-6


def covers(model: SAC) -> bool:
    """Whether the model's networks are those of this module: on the CPU, in float32, all trained, and nobody listens in."""
    actor, critic, target = model.actor, model.critic, model.critic_target
    if model.use_sde or type(actor) is not Actor or {type(critic), type(target)} != {ContinuousCritic}:
        return False
    trained: list[Any] = [[*actor.latent_pi, actor.mu], [*actor.latent_pi, actor.log_std], *critic.q_networks]
    extractors = [actor.features_extractor, critic.features_extractor, target.features_extractor]
    space = model.observation_space
    return (
        isinstance(space, spaces.Box)
        and np.issubdtype(space.dtype, np.floating)
        and all(type(extractor) is FlattenExtractor for extractor in extractors)
        and all(_is_relu_perceptron(list(network)) for network in [*trained, *target.q_networks])
        and all(parameter.requires_grad for network in trained for layer in network[::2] for parameter in layer.parameters())
        and not any(getattr(module, kind) for module in model.policy.modules() for kind in HOOKS)
        and not any(getattr(parameter, kind) for parameter in model.policy.parameters() for kind in PARAMETER_HOOKS)
    )


def _is_relu_perceptron(modules: list[nn.Module]) -> bool:
    layers, activations = modules[::2], modules[1::2]
    return (
        len(layers) == len(activations) + 1
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        and all(type(activation) is nn.ReLU for activation in activations)
        and all(p.dtype == th.float32 and p.device.type == "cpu" for layer in layers for p in layer.parameters())
    )


class RecordedDraw(NamedTuple):
    """Actions that the actor drew, and what its gradient needs of the forward pass."""

    actions: th.Tensor  # (batch, action_dim), in [-1, 1]
    log_prob: th.Tensor  # (batch, 1)
    noise: th.Tensor  # (batch, action_dim)
    std: th.Tensor  # (batch, action_dim)
    std_is_free: th.Tensor  # (batch, action_dim), bool: not clipped
    hidden: list[th.Tensor]  # the input, then the output of each hidden layer, (batch, width) each


class ClosedForm:
    """
    The networks of a SAC model, and their gradients.

    :param model: one that this module :func:`covers`
    """

    def __init__(self, model: SAC) -> None:
        actor: Any = model.actor
        self._mean, self._log_std = actor.mu, actor.log_std
        self._body = list(actor.latent_pi[::2])
        self._critics, self._target_critics = (
            [list(network[::2]) for network in critic.q_networks]  # type: ignore[index]
            for critic in (model.critic, model.critic_target)
        )

    @th.no_grad()
    def act(self, observations: th.Tensor) -> RecordedDraw:
        """
        Actions of the current policy, with noise from PyTorch's global stream, as SB3 draws it.

        :param observations: (batch, *shape)
        """
        hidden = _forward(self._body, observations.flatten(1))
        mean = F.linear(hidden[-1], self._mean.weight, self._mean.bias)
        raw_log_std = F.linear(hidden[-1], self._log_std.weight, self._log_std.bias)
        log_std = raw_log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        std, noise = log_std.exp(), th.randn_like(mean)
        actions = (mean + std * noise).tanh()
        terms = 0.5 * noise.square() + log_std + (1 - actions.square() + EPSILON).log()
        log_prob = -terms.sum(dim=1, keepdim=True) - 0.5 * math.log(2 * math.pi) * actions.shape[1]
        return RecordedDraw(actions, log_prob, noise, std, raw_log_std == log_std, hidden)

    def act_ahead(self, observations: Sequence[th.Tensor]) -> Iterator[tuple[th.Tensor, ...]]:
        """
        Draws for several batches at once, while the policy stays the same.

        :param observations: one entry per batch, (batch, *shape) each
        :return: actions and log-probabilities of each
        """
        draw = self.act(th.cat(list(observations)))
        sizes = [len(batch) for batch in observations]
        return zip(draw.actions.split(sizes), draw.log_prob.split(sizes), strict=True)

    @th.no_grad()
    def target_values(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """:return: (batch, 1), the lowest of the target networks' values"""
        inputs = th.cat((observations.flatten(1), actions), dim=1)
        passes = [_forward(critic[:-1], inputs) for critic in self._target_critics]
        return _values(self._target_critics, passes).amin(dim=1, keepdim=True)

    @th.no_grad()
    def set_critic_gradients(self, observations: th.Tensor, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        :param observations: (batch, *shape)
        :param actions: (batch, action_dim), in [-1, 1]
        :param targets: (batch, 1), of all critics
        :return: the loss; the gradients are those of the parameters
        """
        inputs = th.cat((observations.flatten(1), actions), dim=1)
        passes = [_forward(critic[:-1], inputs) for critic in self._critics]
        errors = _values(self._critics, passes) - targets
        d_values = (errors / len(errors)).t().contiguous()
        for critic, hidden, d_value in zip(self._critics, passes, d_values, strict=True):
            _set_gradients(critic, hidden, d_value.unsqueeze(1))
        return 0.5 * errors.square().mean(dim=0).sum()

    @th.no_grad()
    def set_actor_gradients(self, observations: th.Tensor, draw: RecordedDraw, ent_coef: th.Tensor) -> th.Tensor:
        """
        :param observations: (batch, *shape), for which the actor drew
        :param draw: what it drew
        :param ent_coef: alpha, one number
        :return: the loss; the gradients are those of the parameters
        """
        n_rows, action_dim = draw.actions.shape
        inputs = th.cat((observations.flatten(1), draw.actions), dim=1)
        passes = [_forward(critic[:-1], inputs) for critic in self._critics]
        lowest, which = _values(self._critics, passes).min(dim=1, keepdim=True)

        d_actions = th.zeros_like(draw.actions)
        for index, (critic, hidden) in enumerate(zip(self._critics, passes, strict=True)):
            d_value = (which == index).float() / -n_rows
            d_actions += _input_gradient(critic, hidden, d_value, action_dim)
        slope = 1 - draw.actions.square()
        d_mean = slope * (ent_coef / n_rows * 2 * draw.actions / (slope + EPSILON) + d_actions)
        d_log_std = (draw.std * draw.noise * d_mean - ent_coef / n_rows) * draw.std_is_free

        features = draw.hidden[-1]
        _set_layer_gradients(self._mean, features, d_mean)
        _set_layer_gradients(self._log_std, features, d_log_std)
        if self._body:
            d_features = d_mean @ self._mean.weight + d_log_std @ self._log_std.weight
            _set_gradients(self._body, draw.hidden[:-1], _through_relu(d_features, features))
        return (ent_coef * draw.log_prob - lowest).mean()


def _forward(layers: Sequence[nn.Linear], inputs: th.Tensor) -> list[th.Tensor]:
    """:return: the input, then the positive part of each layer's output"""
    hidden = [inputs]
    for layer in layers:
        hidden.append(linear(hidden[-1], layer.weight, layer.bias, relu=True))
    return hidden


def _values(critics: Sequence[Sequence[nn.Linear]], passes: Sequence[list[th.Tensor]]) -> th.Tensor:
    """:return: (batch, n_critics)"""
    heads = zip((critic[-1] for critic in critics), (hidden[-1] for hidden in passes), strict=True)
    return th.cat([F.linear(features, head.weight, head.bias) for head, features in heads], dim=1)


def _through_relu(d_positive: th.Tensor, positive: th.Tensor) -> th.Tensor:
    """
    :param d_positive: after it
    :param positive: its output
    :return: the gradient before ReLU
    """
    return th.ops.aten.threshold_backward(d_positive, positive, 0.0)  # type: ignore[no-any-return]


def _set_layer_gradients(layer: nn.Linear, inputs: th.Tensor, d_output: th.Tensor) -> None:
    if inputs.shape[1] < d_output.shape[1]:
        layer.weight.grad = linear(inputs.t(), d_output.t()).t().contiguous()
    else:
        layer.weight.grad = linear(d_output.t(), inputs.t())
    layer.bias.grad = d_output.sum(dim=0)


def _set_gradients(layers: Sequence[nn.Linear], hidden: list[th.Tensor], d_output: th.Tensor) -> None:
    """
    :param layers: first to last
    :param hidden: the input of each layer
    :param d_output: gradient of the last one's output, before its activation
    """
    for index in reversed(range(len(layers))):
        _set_layer_gradients(layers[index], hidden[index], d_output)
        if index > 0:
            d_output = _through_relu(linear(d_output, layers[index].weight.t()), hidden[index])


def _input_gradient(layers: Sequence[nn.Linear], hidden: list[th.Tensor], d_output: th.Tensor, columns: int) -> th.Tensor:
    """:return: the gradient of the last ``columns`` of the input"""
    for layer, inputs in zip(layers[:0:-1], hidden[:0:-1], strict=True):
        d_output = _through_relu(linear(d_output, layer.weight.t()), inputs)
    return d_output @ layers[0].weight[:, -columns:].contiguous()
