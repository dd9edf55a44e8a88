"""SAC's gradient steps on given batches."""

from collections.abc import Iterable
from typing import Any

import torch as th
import torch.nn.functional as F
from stable_baselines3 import SAC
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update


def sac_updates(model: SAC, batches: Iterable[Any], policy_delay: int) -> dict[str, float]:
    """
    One critic update per batch, and at every ``policy_delay``-th one of the actor and the entropy coefficient.
    With a delay of 1, the same mathematics and the same draws as SB3's ``SAC.train`` (Haarnoja et al. 2018, section 5).

    :param model: its actor, critics, entropy coefficient and target networks are updated in place
    :param batches: SB3's ``ReplayBufferSamples``, normalised
    :param policy_delay: critic updates per actor update, counted over the life of the model
    :return: the means that SB3 logs, by name
    """
    model.policy.set_training_mode(True)  # this affects batch norm and dropout
    optimizers = [model.actor.optimizer, model.critic.optimizer]
    optimizers += [] if model.ent_coef_optimizer is None else [model.ent_coef_optimizer]
    model._update_learning_rate(optimizers)
    losses: dict[str, list[th.Tensor]] = {"ent_coef": [], "actor_loss": [], "critic_loss": [], "ent_coef_loss": []}
    for step, batch in enumerate(batches):
        updates_actor = model._n_updates % policy_delay == 0
        if model.use_sde:
            model.actor.reset_noise()
        # the actor's draw comes first and is used last, as in SB3
        actions, log_prob = model.actor.action_log_prob(batch.observations) if updates_actor else (None, None)

        if model.log_ent_coef is not None:
            ent_coef = model.log_ent_coef.detach().exp()
            if log_prob is not None:
                losses["ent_coef_loss"].append(_update_ent_coef(model, log_prob))
        else:
            ent_coef = model.ent_coef_tensor
        losses["ent_coef"].append(ent_coef)
        losses["critic_loss"].append(_update_critic(model, batch, ent_coef))
        if actions is not None and log_prob is not None:
            losses["actor_loss"].append(_update_actor(model, batch, actions, log_prob, ent_coef))

        if step % model.target_update_interval == 0:
            polyak_update(model.critic.parameters(), model.critic_target.parameters(), model.tau)
            polyak_update(model.batch_norm_stats, model.batch_norm_stats_target, 1.0)
        model._n_updates += 1
    return {name: th.stack(values).mean().item() for name, values in losses.items() if values}


def _update_ent_coef(model: SAC, log_prob: th.Tensor) -> th.Tensor:
    """.. math:: J(\\alpha) = E[-\\log\\alpha (\\log\\pi(a|s) + \\bar H)]"""
    assert model.log_ent_coef is not None and model.ent_coef_optimizer is not None
    assert isinstance(model.target_entropy, float)
    loss = -(model.log_ent_coef * (log_prob.detach() + model.target_entropy)).mean()
    model.ent_coef_optimizer.zero_grad()
    loss.backward()
    model.ent_coef_optimizer.step()
    return loss.detach()


def _update_critic(model: SAC, batch: ReplayBufferSamples, ent_coef: th.Tensor) -> th.Tensor:
    """.. math:: J(Q) = \\tfrac12 E[(Q(s, a) - r - \\gamma (1 - d)(\\min_i \\bar Q_i(s', a') - \\alpha\\log\\pi(a'|s')))^2]"""
    discounts = model.gamma if batch.discounts is None else batch.discounts
    with th.no_grad():
        next_actions, next_log_prob = model.actor.action_log_prob(batch.next_observations)
        next_values = th.cat(model.critic_target(batch.next_observations, next_actions), dim=1).min(dim=1, keepdim=True).values
        next_values = next_values - ent_coef * next_log_prob.reshape(-1, 1)
        targets = batch.rewards + (1 - batch.dones) * discounts * next_values
    values = model.critic(batch.observations, batch.actions)
    loss = 0.5 * th.stack([F.mse_loss(value, targets) for value in values]).sum()
    model.critic.optimizer.zero_grad()
    loss.backward()
    model.critic.optimizer.step()
    return loss.detach()


def _update_actor(
    model: SAC, batch: ReplayBufferSamples, actions: th.Tensor, log_prob: th.Tensor, ent_coef: th.Tensor
) -> th.Tensor:
    """.. math:: J(\\pi) = E[\\alpha\\log\\pi(a|s) - \\min_i Q_i(s, a)]"""
    values = th.cat(model.critic(batch.observations, actions), dim=1).min(dim=1).values
    loss = (ent_coef * log_prob - values).mean()
    model.actor.optimizer.zero_grad()
    trained = [parameter for parameter in model.actor.parameters() if parameter.requires_grad]
    loss.backward(inputs=trained)  # spares the critics' gradients, which nobody wants here
    model.actor.optimizer.step()
    return loss.detach()
