"""The learned dynamics: raw observations and scaled actions in, a Gaussian over the raw next observation and reward out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_mbpo.ensemble import GaussianEnsemble, TerminationHead
from sb3_mbpo.rules import evaluate_reward, evaluate_termination
from sb3_mbpo.scaler import Standardizer
from sb3_mbpo.schedules import is_positive_int
from sb3_mbpo.type_aliases import RewardFn, Step, TerminationFn, Transitions

#: An imagined observation this many standard deviations beyond the real ones is an error of the model, not a discovery.
MAX_STDS_FROM_DATA = 10.0


@dataclass(frozen=True)
class DynamicsConfig:
    """
    What ``dynamics_kwargs`` may hold. The defaults are the paper's (Janner et al. 2019, code), but for the learning rate
    (there 1e-3), ``max_grad_norm``, ``max_gradient_steps`` and ``normalize_targets``.

    :param ensemble_size: number of members
    :param n_elites: members that imagine, those of lowest holdout error
    :param net_arch: widths of the hidden layers
    :param activation_fn: activation between the layers
    :param learning_rate: of Adam
    :param weight_decay: lambda of the penalty ``0.5 * lambda * |W|**2``, one for all layers or one for each. The default
        grows from the first layer to the last; for another number of layers it is interpolated
    :param likelihood_beta: each term of the likelihood is weighted by its predicted variance to this power (Seitzer et al.
        2022, arXiv 2203.09168). 0 is the paper's: rare transitions that are hard to foresee, such as collisions, are soon
        explained as noise, and what comes of them is hardly learned. 0.5, which Seitzer et al. recommend, learns them, at
        the price of some precision where the noise is small; weight decay and the pull on the bounds of the variance count
        more. With ``constant_noise`` it has no effect
    :param max_grad_norm: norm to which longer gradients, of all members together, are shortened; ``None``, which is the
        paper's, leaves them as they are. Without, a few transitions that no member foresees, such as collisions, can push the
        variances so far beyond their bound that they stay there, for all inputs. Most gradients are longer than the default;
        to Adam a common factor is nothing, but ``weight_decay``, which is not shortened with them, counts more
    :param batch_size: rows per member and gradient step
    :param holdout_ratio: share of the real transitions that is kept from training and ranks the members
    :param max_holdout: upper bound of the holdout, in rows
    :param max_gradient_steps: of the first fit and of each later one, or one int for all. The learning rate falls to zero in
        the last fifth. ``None``: the paper's rule: as many epochs as ``patience`` allows, the learning rate stays
    :param patience: by the paper's rule, a fit stops after more than this many epochs in which no member improved; epochs of
        less than 10 gradient steps count together
    :param improvement: by the paper's rule, the relative fall of a member's holdout error that counts as an improvement
    :param normalize_targets: whether to standardise the targets too, each dimension by itself (arXiv 2510.01457);
        ``False`` is the paper's
    :param constant_noise: whether the predicted standard deviation is one number per member and dimension, the same for all
        inputs: the root of its mean squared error on the holdout. ``False`` is the paper's
    """

    ensemble_size: int = 7
    n_elites: int = 5
    net_arch: tuple[int, ...] = (200, 200, 200, 200)
    activation_fn: type[nn.Module] = nn.SiLU
    learning_rate: float = 3e-3
    weight_decay: float | tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    likelihood_beta: float = 0.0
    max_grad_norm: float | None = 10.0
    batch_size: int = 256
    holdout_ratio: float = 0.2
    max_holdout: int = 5000
    max_gradient_steps: int | tuple[int, int] | None = (2000, 250)
    patience: int = 5
    improvement: float = 0.01
    normalize_targets: bool = True
    constant_noise: bool = False

    @classmethod
    def from_kwargs(cls, dynamics_kwargs: dict[str, Any] | None) -> "DynamicsConfig":
        """
        :param dynamics_kwargs: any of the fields by name
        :raises ValueError: for an unknown name, or a value of the wrong type or out of range
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(dynamics_kwargs or {}) - set(known))
        if unknown:
            raise ValueError(f"`dynamics_kwargs` got {unknown}, which it does not know. It may hold: {', '.join(known)}.")
        config = cls(**(dynamics_kwargs or {}))
        config._check_types()
        config = replace(config, learning_rate=float(config.learning_rate))  # PyTorch saves NumPy's numbers, but loads none
        if "weight_decay" not in (dynamics_kwargs or {}):
            depths = np.linspace(0, len(config.layer_decays) - 1, len(config.net_arch) + 1)
            decays = np.interp(depths, range(len(config.layer_decays)), config.layer_decays)
            config = replace(config, weight_decay=tuple(decays.tolist()))
        config._check_ranges()
        return config

    def _check_types(self) -> None:
        kinds: dict[str, tuple[type, list[str]]] = {
            "an int": (Integral, ["ensemble_size", "n_elites", "batch_size", "max_holdout", "patience"]),
            "a number": (Real, ["learning_rate", "likelihood_beta", "holdout_ratio", "improvement"]),
            "True or False": (bool, ["normalize_targets", "constant_noise"]),
        }
        rules = [
            (name, isinstance(value := getattr(self, name), kind) and isinstance(value, bool) == (kind is bool), expected)
            for expected, (kind, names) in kinds.items()
            for name in names
        ]
        net_arch, decays, norm, activation = self.net_arch, self.weight_decay, self.max_grad_norm, self.activation_fn
        are_widths = isinstance(net_arch, Sequence) and all(map(is_positive_int, net_arch))
        are_decays = all(isinstance(decay, Real) for decay in (decays if isinstance(decays, Sequence) else [decays]))
        rules += [
            ("net_arch", are_widths, "a list of layer widths such as [200, 200]"),
            ("weight_decay", are_decays, "a float, or a list of one per layer"),
            ("max_grad_norm", norm is None or isinstance(norm, Real), "None, or a number"),
            ("activation_fn", _makes_modules(activation), "a class that needs no arguments, such as torch.nn.SiLU"),
        ]
        self._check(rules)

    def _check_ranges(self) -> None:
        n_layers = len(self.net_arch) + 1
        rules = [
            ("ensemble_size", self.ensemble_size >= 1, "at least 1"),
            ("n_elites", 1 <= self.n_elites <= self.ensemble_size, f"from 1 to `ensemble_size`={self.ensemble_size}"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("weight_decay", len(self.layer_decays) == n_layers, f"a float, or {n_layers} floats, one per layer"),
            ("weight_decay", all(decay >= 0 for decay in self.layer_decays), "at least 0"),
            ("likelihood_beta", 0 <= self.likelihood_beta <= 1, "from 0 to 1"),
            ("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "None, or above 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("holdout_ratio", 0 < self.holdout_ratio < 1, "above 0 and below 1"),
            ("max_holdout", self.max_holdout >= 1, "at least 1"),
            ("patience", self.patience >= 0, "at least 0"),
            ("improvement", 0 <= self.improvement < 1, "at least 0 and below 1"),
            ("max_gradient_steps", _are_steps(self.max_gradient_steps), "None, an int of at least 1, or two of them"),
        ]
        self._check(rules)

    def _check(self, rules: list[tuple[str, bool, str]]) -> None:
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"dynamics_kwargs[{name!r}] must be {expected}, but got {getattr(self, name)!r}.")

    def max_gradient_steps_of(self, first_fit: bool) -> int | None:
        """Of the first fit, or of a later one. ``None``: the paper's rule."""
        steps = self.max_gradient_steps
        return steps[0 if first_fit else 1] if isinstance(steps, Sequence) else steps

    @property
    def layer_decays(self) -> tuple[float, ...]:
        """The weight decay of each layer, first to last."""
        if isinstance(self.weight_decay, Sequence):
            return tuple(map(float, self.weight_decay))
        return (float(self.weight_decay),) * (len(self.net_arch) + 1)


def _are_steps(steps: Any) -> bool:
    numbers = steps if isinstance(steps, Sequence) and len(steps) == 2 else [steps]
    return steps is None or all(map(is_positive_int, numbers))


def _makes_modules(activation_fn: Any) -> bool:
    try:
        return isinstance(activation_fn(), nn.Module)
    except TypeError:  # it cannot be called, or not without arguments
        return False


class GaussianPrediction(NamedTuple):
    """
    Independent Gaussians over the next observation and, last, the reward: (..., batch, obs_dim + 1) each.
    """

    mean: th.Tensor
    std: th.Tensor

    def sample(self, generator: th.Generator) -> th.Tensor:
        """
        One draw of the same shape, differentiable in mean and std.

        :param generator: of the noise
        """
        noise = th.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def disagreement(self) -> th.Tensor:
        """
        Standard deviation between the members' means, (batch, obs_dim + 1), in the units of the prediction.
        Asks for a prediction of several members, (members, batch, obs_dim + 1).
        """
        return self.mean.std(dim=0, correction=0)


class Dynamics(nn.Module):
    """
    An ensemble with its scalers, and the rules by which a step ends a task and earns a reward.

    Observations are raw and flat, actions scaled to [-1, 1]. It is differentiable in both and knows nothing of
    buffers, policies or callbacks.

    :param obs_dim: dimensions of the flattened observation
    :param action_space: the environment's; gives user functions their actions back in its units
    :param config: sizes and targets
    :param generator: draws the initial weights
    :param termination_fn: known rule; ``None``: the learned head decides
    :param reward_fn: known reward; ``None``: the ensemble predicts it
    """

    _action_low: th.Tensor
    _action_range: th.Tensor
    lowest: th.Tensor
    highest: th.Tensor

    def __init__(
        self,
        obs_dim: int,
        action_space: spaces.Box,
        config: DynamicsConfig,
        generator: th.Generator,
        termination_fn: TerminationFn | None = None,
        reward_fn: RewardFn | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.termination_fn = termination_fn
        self.reward_fn = reward_fn
        low, high = (th.as_tensor(bound.reshape(-1), dtype=th.float32) for bound in (action_space.low, action_space.high))
        self.register_buffer("_action_low", low, persistent=False)
        self.register_buffer("_action_range", high - low, persistent=False)
        input_dim, output_dim = obs_dim + len(low), obs_dim + 1
        sizes = (input_dim, output_dim, config.ensemble_size, list(config.net_arch))
        self.ensemble = GaussianEnsemble(*sizes, config.activation_fn, generator, config.constant_noise)
        self.input_scaler = Standardizer(input_dim)
        self.target_scaler = Standardizer(output_dim)
        self.register_buffer("lowest", th.full((obs_dim,), -th.inf))
        self.register_buffer("highest", th.full((obs_dim,), th.inf))
        self.termination_head = TerminationHead(input_dim + obs_dim, 64, generator)

    def fit_scalers(self, data: Transitions) -> None:
        """:param data: the training split, (batch, ...), raw"""
        self.input_scaler.fit(th.cat((data.observations, data.actions), dim=-1))
        if self.config.normalize_targets:
            self.target_scaler.fit(self._raw_targets(data))
        else:
            self.target_scaler.reset()  # a loaded one has the units of its file
        margin = MAX_STDS_FROM_DATA * self.input_scaler.divisor[: data.observations.shape[-1]]
        self.lowest.copy_(th.minimum(data.observations, data.next_observations).amin(dim=0) - margin)
        self.highest.copy_(th.maximum(data.observations, data.next_observations).amax(dim=0) + margin)

    def scaled_inputs(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param observations: (batch, obs_dim), raw
        :param actions: (batch, action_dim), in [-1, 1]
        :return: (batch, obs_dim + action_dim), what the ensemble sees
        """
        return self.input_scaler.scale(th.cat((observations, actions), dim=-1))

    def scaled_targets(self, data: Transitions) -> th.Tensor:
        """
        :param data: (batch, ...), raw
        :return: (batch, obs_dim + 1), scaled ``[next_observation - observation, reward]``
        """
        return self.target_scaler.scale(self._raw_targets(data))

    def termination_inputs(self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """
        :param observations: (batch, obs_dim), raw
        :param actions: (batch, action_dim), in [-1, 1]
        :param next_observations: (batch, obs_dim), raw
        :return: (batch, 2 * obs_dim + action_dim), scaled, what the termination head sees
        """
        scaled_next = self.scaled_inputs(next_observations, actions)[..., : next_observations.shape[-1]]
        return th.cat((self.scaled_inputs(observations, actions), scaled_next), dim=-1)

    def predict(self, observations: th.Tensor, actions: th.Tensor, members: th.Tensor | None = None) -> GaussianPrediction:
        """
        The distribution of the next observation and the reward.

        :param observations: (batch, obs_dim), raw
        :param actions: (batch, action_dim), in [-1, 1]
        :param members: (batch,), the member that predicts each row; ``None``: every member predicts every row,
            and the shapes gain a leading ensemble dimension
        :return: mean and standard deviation, (batch, obs_dim + 1), raw: the next observation and, last, the reward
        """
        inputs = self.scaled_inputs(observations, actions)
        mean, log_var = self.ensemble(inputs) if members is None else self.ensemble.forward_members(inputs, members)
        mean = self.target_scaler.unscale(mean)
        std = (0.5 * log_var).exp() * self.target_scaler.std
        next_mean = observations + mean[..., :-1]
        return GaussianPrediction(th.cat((next_mean, mean[..., -1:]), dim=-1), std)

    def step(self, observations: th.Tensor, actions: th.Tensor, members: th.Tensor, generator: th.Generator) -> Step:
        """
        One imagined step: a draw from each row's member, then termination and reward.

        :param observations: (batch, obs_dim), raw
        :param actions: (batch, action_dim), in [-1, 1]
        :param members: (batch,), the member of each row
        :param generator: of the noise
        :raises ValueError: when a user's function returns a wrong shape or type
        """
        outcome = self.predict(observations, actions, members).sample(generator)
        next_observations, rewards = outcome[..., :-1], outcome[..., -1]
        if self.reward_fn is not None:
            rewards = evaluate_reward(self.reward_fn, observations, self.unscale_actions(actions), next_observations)
        return Step(next_observations, rewards, self.terminated(observations, actions, next_observations))

    def terminated(self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """
        By the known rule, else by the learned head.

        :param observations: (batch, obs_dim), raw
        :param actions: (batch, action_dim), in [-1, 1]
        :param next_observations: (batch, obs_dim), raw
        :return: (batch,), bool
        """
        if self.termination_fn is None:
            return self.termination_head.terminated(self.termination_inputs(observations, actions, next_observations))
        return evaluate_termination(self.termination_fn, observations, self.unscale_actions(actions), next_observations)

    def near_data(self, observations: th.Tensor) -> th.Tensor:
        """
        Whether no dimension lies more than ``MAX_STDS_FROM_DATA`` standard deviations of the last fit's observations
        below their smallest or above their largest value. (Where all were equal, the standard deviation counts as 1.)

        :param observations: (batch, obs_dim), raw
        :return: (batch,), bool
        """
        return ((observations >= self.lowest) & (observations <= self.highest)).all(dim=-1)

    def unscale_actions(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: (batch, action_dim), in [-1, 1]
        :return: the same in the environment's units
        """
        return self._action_low + 0.5 * (actions + 1.0) * self._action_range

    @staticmethod
    def _raw_targets(data: Transitions) -> th.Tensor:
        return th.cat((data.next_observations - data.observations, data.rewards.unsqueeze(-1)), dim=-1)
