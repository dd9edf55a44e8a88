"""
What makes DHMBPO steady? Variants of it that are no options of the package, for the suite beside this file::

    PYTHONPATH=tests python -m sb3_mbpo.benchmark run tests/ablations.yml --out ablations
    python -m sb3_mbpo.benchmark report ablations --baseline DHMBPO
"""

from typing import Any
from unittest import mock

import torch as th
from stable_baselines3 import SAC

from sb3_mbpo import DHMBPO, double_horizon
from sb3_mbpo.double_horizon import ImaginedPath, soft_return
from sb3_mbpo.dynamics import Dynamics
from sb3_mbpo.type_aliases import FitResult, Step

#: A number that is finite, but no observation: imagination drops what is so far from the data.
FAR_AWAY = 1e30


class PlainCritics(DHMBPO):
    """SB3's critics: no layer normalisation, last layers that do not begin at zero."""

    policy_aliases = SAC.policy_aliases


class RenewedOptimizers(DHMBPO):
    """As in the authors' code, Adam forgets its averages of the policy's and the critics' gradients after each fit."""

    def fit_dynamics(self) -> FitResult:
        result = super().fit_dynamics()
        for optimizer in (self.actor.optimizer, self.critic.optimizer, self.ent_coef_optimizer):
            optimizer.state.clear()
        return result


class WithoutModelGradient(DHMBPO):
    """
    Value expansion only: the targets come from H imagined steps, but no gradient passes through the dynamics. The actor's
    update is SAC's, at the last states.
    """

    def _setup_dynamics(self) -> None:
        super()._setup_dynamics()
        self.dynamics.__class__ = DetachedDynamics

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        with mock.patch.object(double_horizon, "soft_return", soft_return_of_the_last_action):
            super().train(gradient_steps, batch_size)


def soft_return_of_the_last_action(path: ImaginedPath, *args: Any) -> th.Tensor:
    """The entropies before it give no gradient: without the dynamics', they would only make the actor wide."""
    log_prob = th.cat((path.log_prob[:-1].detach(), path.log_prob[-1:]))
    return soft_return(path._replace(log_prob=log_prob), *args)


class DetachedDynamics(Dynamics):
    def step(self, *args: Any) -> Step:
        return Step(*(part.detach() for part in super().step(*args)))


class EndsAtDisagreement(DHMBPO):
    """Long rollouts end, without that step, where the members disagree ``LIMIT`` times as much as on the holdout."""

    LIMIT = 3.0

    def _setup_dynamics(self) -> None:
        super()._setup_dynamics()
        self.dynamics.__class__ = CautiousDynamics
        self.dynamics.most_disagreement = th.inf

    def imagine(self) -> int:
        self.dynamics.most_disagreement = self.LIMIT * self.fit_result.disagreement
        try:
            return super().imagine()
        finally:
            self.dynamics.most_disagreement = th.inf


class CautiousDynamics(Dynamics):
    most_disagreement: float

    def step(self, observations: th.Tensor, actions: th.Tensor, members: th.Tensor, generator: th.Generator) -> Step:
        step = super().step(observations, actions, members, generator)
        if self.most_disagreement == th.inf:
            return step
        disagreement = (self.predict(observations, actions).disagreement() / self.target_scaler.divisor).mean(dim=-1)
        too_much = (disagreement > self.most_disagreement).unsqueeze(-1)
        return step._replace(next_observations=step.next_observations.masked_fill(too_much, FAR_AWAY))
