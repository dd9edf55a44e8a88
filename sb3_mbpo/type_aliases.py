"""The tuples that travel between the rooms, and the callables that users may hand in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th

#: ``(observations, actions, next_observations) -> bool array of shape (batch,)``, everything in the environment's units.
TerminationFn = Callable[[Any, Any, Any], Any]
#: ``(observations, actions, next_observations) -> float array of shape (batch,)``, everything in the environment's units.
RewardFn = Callable[[Any, Any, Any], Any]
#: ``raw observations (batch, obs_dim) -> scaled actions (batch, action_dim)``, drawn from the current policy.
ActionSampler = Callable[[th.Tensor], th.Tensor]
#: An int, or ``(start_step, end_step, k_first, k_last)`` in environment steps.
RolloutLength = int | tuple[int, int, int, int]


class Transitions(NamedTuple):
    """
    One-step transitions. Observations and rewards are raw (never normalised), actions are scaled to [-1, 1],
    as SB3's replay buffers store them.
    """

    observations: th.Tensor  # (batch, obs_dim)
    actions: th.Tensor  # (batch, action_dim)
    next_observations: th.Tensor  # (batch, obs_dim)
    rewards: th.Tensor  # (batch,)
    terminated: th.Tensor  # (batch,), bool: the task has ended; a timeout is not an end

    def rows(self, index: th.Tensor | slice) -> "Transitions":
        """:param index: row numbers, a slice, or a mask of shape (batch,)"""
        return Transitions(*(field[index] for field in self))

    @property
    def n_rows(self) -> int:
        """The size of the batch; ``len`` of a named tuple is its number of fields."""
        return len(self.rewards)


class Step(NamedTuple):
    """What the dynamics answers to a batch of actions, in raw units."""

    next_observations: th.Tensor  # (batch, obs_dim)
    rewards: th.Tensor  # (batch,)
    terminated: th.Tensor  # (batch,), bool


@dataclass(frozen=True)
class FitResult:
    """One fit of the ensemble. Errors are in the units of the targets; standardised, 1 is the spread of the data itself."""

    elites: tuple[int, ...]  # members of lowest holdout error, best first
    holdout_mse: tuple[float, ...]  # per member, of the weights that it returned to
    holdout_mse_state: float  # mean of the elites
    holdout_mse_reward: float  # mean of the elites
    train_nll: float  # mean over the members and the steps before the last look at the holdout
    predicted_std: float  # mean over the elites, the holdout and the dimensions
    disagreement: float  # standard deviation between the elites' means, same average
    epochs: int
    gradient_steps: int
    diverged: bool  # a loss was not finite and ended the fit
    seconds: float
    termination_precision: float | None = None  # None: the termination is known, not learned
    termination_recall: float | None = None
    rule_checked: bool = False  # a known termination rule has been held against data in which a task ended


@dataclass(frozen=True)
class ImaginationResult:
    """What became of one round of imagined steps."""

    rows: int  # stored
    terminated: int  # of these, how many ended the task
    not_finite: int  # dropped: NaN or infinity in the next observation or the reward
    far_from_data: int  # dropped: see ``Dynamics.near_data``
