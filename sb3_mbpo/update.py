"""SAC's gradient steps on given batches."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
import torch.nn.functional as F
from stable_baselines3 import SAC
from stable_baselines3.common.utils import polyak_update

from sb3_mbpo.closed_form import ClosedForm, covers
from sb3_mbpo.products import faster_layers


def sac_updates(model: SAC, batches: Iterable[Any], policy_delay: int) -> dict[str, float]:
    """
    One critic update per batch, and at every ``policy_delay``-th one of the actor and the entropy coefficient.
    With a delay of 1, the same mathematics and the same draws as SB3's ``SAC.train`` (Haarnoja et al. 2018, section 5).

    :param model: its actor, critics, entropy coefficient and target networks are updated in place
    :param batches: SB3's ``ReplayBufferSamples``, normalised, float32
    :param policy_delay: critic updates per actor update, counted over the life of the model
    :return: the means that SB3 logs, by name
    :raises ValueError: when a loss is NaN
    """
    model.policy.set_training_mode(True)  # this affects batch norm and dropout
    prepare_optimizers(model)
    parameters, target_parameters = (
        [parameter.detach() for parameter in critic.parameters()] for critic in (model.critic, model.critic_target)
    )
    networks: Any = ClosedForm(model) if covers(model) else Autograd(model)
    losses: dict[str, list[th.Tensor]] = {"ent_coef": [], "actor_loss": [], "critic_loss": [], "ent_coef_loss": []}
    with faster_layers(model.policy), unchecked_distributions():
        for step, (batch, ahead) in enumerate(with_same_policy(batches, model._n_updates, policy_delay)):
            updates_actor = model._n_updates % policy_delay == 0
            if model.use_sde:
                model.actor.reset_noise()
            # the actor's draw comes first and is used last, as in SB3
            draw = networks.act(batch.observations) if updates_actor else None

            if model.log_ent_coef is not None:
                ent_coef = model.log_ent_coef.detach().exp()
                if draw is not None:
                    losses["ent_coef_loss"].append(update_ent_coef(model, draw.log_prob))
            else:
                ent_coef = model.ent_coef_tensor
            losses["ent_coef"].append(ent_coef)

            with th.no_grad():
                if ahead:
                    next_draws = networks.act_ahead([later.next_observations for later in ahead])
                next_actions, next_log_prob = next(next_draws)
                next_values = networks.target_values(batch.next_observations, next_actions) - ent_coef * next_log_prob
                discounts = model.gamma if batch.discounts is None else batch.discounts
                targets = batch.rewards + (1 - batch.dones) * discounts * next_values
            losses["critic_loss"].append(networks.set_critic_gradients(batch.observations, batch.actions, targets))
            model.critic.optimizer.step()
            if draw is not None:
                losses["actor_loss"].append(networks.set_actor_gradients(batch.observations, draw, ent_coef))
                model.actor.optimizer.step()

            if step % model.target_update_interval == 0:
                for target, parameter in zip(target_parameters, parameters, strict=True):
                    target.lerp_(parameter, model.tau)
                polyak_update(model.batch_norm_stats, model.batch_norm_stats_target, 1.0)
            model._n_updates += 1
    return checked_means(losses)


def with_same_policy(batches: Iterable[Any], n_updates: int, policy_delay: int) -> Iterator[tuple[Any, list[Any]]]:
    """
    Between two updates of the actor, all batches can draw their next actions at once.

    :param batches: for one update each
    :param n_updates: before the first of them
    :param policy_delay: critic updates per update of the actor
    :return: each batch with a list: the first one of the same actor with all that the actor draws for, itself included, the
        others with an empty one
    """
    batches = iter(batches)
    while ahead := list(itertools.islice(batches, (-n_updates) % policy_delay + 1)):
        n_updates += len(ahead)
        yield ahead[0], ahead
        yield from ((batch, []) for batch in ahead[1:])


def checked_means(losses: Mapping[str, Sequence[th.Tensor]]) -> dict[str, float]:
    """
    :param losses: by name, one number for each update
    :return: their means, without those that have none
    :raises ValueError: when one is NaN
    """
    means = {name: th.stack([value.squeeze() for value in values]).mean().item() for name, values in losses.items() if values}
    if any(math.isnan(mean) for mean in means.values()):
        raise ValueError(
            f"The networks of SAC are lost, its losses are no numbers any more: {means}. Go back to a saved model, and check "
            "the scale of the rewards and the learning rate."
        )
    return means


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """PyTorch's distributions look at all their parameters whenever one is made: on a GPU, that waits for all before."""
    is_checked = th.distributions.Distribution._validate_args
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(is_checked)


def prepare_optimizers(model: SAC) -> None:
    """For a call of ``train``: the learning rate of this moment, and one kernel for all parameters where that can be."""
    optimizers = [model.actor.optimizer, model.critic.optimizer]
    optimizers += [] if model.ent_coef_optimizer is None else [model.ent_coef_optimizer]
    model._update_learning_rate(optimizers)
    for optimizer in optimizers:
        fuse(optimizer)


def fuse(optimizer: th.optim.Optimizer) -> None:
    """Updates all parameters in one kernel, where the optimizer can and nobody chose otherwise."""
    for group in optimizer.param_groups:
        on_cpu = all(parameter.device.type == "cpu" and parameter.is_floating_point() for parameter in group["params"])
        is_chosen = group.get("foreach") is not None or group.get("differentiable")
        if on_cpu and not is_chosen and group.get("fused", False) is None:
            group["fused"] = True


def update_ent_coef(model: SAC, log_prob: th.Tensor) -> th.Tensor:
    """
    One step of its optimizer, down the gradient of

    .. math:: J(\\alpha) = E[-\\log\\alpha (\\log\\pi(a|s) + \\bar H)]

    :param model: whose coefficient is learned
    :param log_prob: of drawn actions, (batch, 1) or (batch,)
    :return: the loss
    """
    assert model.log_ent_coef is not None and model.ent_coef_optimizer is not None
    assert isinstance(model.target_entropy, float)
    surplus = (log_prob.detach() + model.target_entropy).mean()
    model.log_ent_coef.grad = -surplus.expand_as(model.log_ent_coef)
    loss = -(model.log_ent_coef.detach() * surplus).mean()
    model.ent_coef_optimizer.step()
    return loss


def backward_to_actor(model: SAC, loss: th.Tensor) -> None:
    """New gradients for the actor, if it is trained at all, and none for the critics, where nobody wants them here."""
    model.actor.optimizer.zero_grad()
    trained = [parameter for parameter in model.actor.parameters() if parameter.requires_grad]
    if trained:
        loss.backward(inputs=trained)


class ActorDraw(NamedTuple):
    """Actions that the actor drew, (batch, action_dim), and their log-probability, (batch, 1)."""

    actions: th.Tensor
    log_prob: th.Tensor


class Autograd:
    """
    The networks of any SAC model, and their gradients by autograd.

    :param model: of any policy
    """

    def __init__(self, model: SAC) -> None:
        self._model = model

    def act(self, observations: Any) -> ActorDraw:
        """:param observations: as the policy expects them, (batch, ...)"""
        actions, log_prob = self._model.actor.action_log_prob(observations)
        return ActorDraw(actions, log_prob.reshape(-1, 1))

    def act_ahead(self, observations: Sequence[Any]) -> Iterator[ActorDraw]:
        """
        The same for several batches, one at a time.

        :param observations: one entry per batch, (batch, ...) each
        """
        return (self.act(batch) for batch in observations)

    def target_values(self, observations: Any, actions: th.Tensor) -> th.Tensor:
        """:return: (batch, 1), the lowest of the target networks' values"""
        return th.cat(self._model.critic_target(observations, actions), dim=1).min(dim=1, keepdim=True).values

    def set_critic_gradients(self, observations: Any, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        .. math:: J(Q) = \\tfrac12 E[(Q(s, a) - r - \\gamma (1 - d)(\\min_i \\bar Q_i(s', a') - \\alpha\\log\\pi(a'|s')))^2]

        :param observations: s, as the policy expects them, (batch, ...)
        :param actions: a, (batch, action_dim), in [-1, 1]
        :param targets: (batch, 1)
        :return: the loss
        """
        values = self._model.critic(observations, actions)
        loss = 0.5 * th.stack([F.mse_loss(value, targets) for value in values]).sum()
        self._model.critic.optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def set_actor_gradients(self, observations: Any, draw: ActorDraw, ent_coef: th.Tensor) -> th.Tensor:
        """
        .. math:: J(\\pi) = E[\\alpha\\log\\pi(a|s) - \\min_i Q_i(s, a)]

        :param observations: s, as the policy expects them, (batch, ...)
        :param draw: a, the actor's own for these observations
        :param ent_coef: alpha, a number
        :return: the loss
        """
        values = th.cat(self._model.critic(observations, draw.actions), dim=1).min(dim=1, keepdim=True).values
        loss = (ent_coef * draw.log_prob - values).mean()
        backward_to_actor(self._model, loss)
        return loss.detach()
