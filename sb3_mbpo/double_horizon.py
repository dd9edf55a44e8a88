"""
Double-horizon updates: a few differentiable steps inside the dynamics (Kubo et al. 2025, arXiv 2512.15439, section 4).

From a start state :math:`s_0` the policy acts for H imagined steps, every draw reparameterised. With :math:`m_t` = 1 until
the task has ended, and 0 from then on, the objective of the start state is

.. math::
    J(s_0) = \\sum_{t=0}^{H-1} \\gamma^t m_t (r_t - \\alpha \\log \\pi(a_t|s_t))
    + \\gamma^H m_H (Q(s_H, a_H) - \\alpha \\log \\pi(a_H|s_H))

*Actor and entropy coefficient.* The actor ascends :math:`J`, through the rewards, the states and Q, which is here the mean of
all critics. The entropy coefficient is SAC's, with the entropy at :math:`s_0`.

*Critics.* All regress :math:`Q(s_0, a_0)` on :math:`J(s_0) + \\alpha \\log \\pi(a_0|s_0)`, as an action's own entropy is no
part of its value. Here Q is the smaller one of two target critics, chosen anew for each batch, and held between bounds, see
:class:`ValueBounds`.

A path with a step that is not finite, or that leads far from the data, is left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch as th
from stable_baselines3.common.utils import polyak_update
from torch import nn

from sb3_mbpo.dynamics import Dynamics
from sb3_mbpo.observations import normalize_rewards
from sb3_mbpo.products import faster_layers
from sb3_mbpo.update import backward_to_actor, checked_means, prepare_optimizers, unchecked_distributions, update_ent_coef

if TYPE_CHECKING:
    from sb3_mbpo.dhmbpo import DHMBPO

#: ``raw observations (batch, obs_dim) -> actions (batch, action_dim), log-probabilities (batch,)``, both reparameterised.
DifferentiablePolicy = Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]]
#: Share of the way from the old bounds of the values to those of the newest batch.
BOUNDS_RATE = 3e-4


class ImaginedPath(NamedTuple):
    """H steps, and the state and action after the last one."""

    observations: th.Tensor  # (H + 1, batch, obs_dim), raw
    actions: th.Tensor  # (H + 1, batch, action_dim), in [-1, 1]
    log_prob: th.Tensor  # (H + 1, batch)
    rewards: th.Tensor  # (H, batch), raw
    alive: th.Tensor  # (H + 1, batch), float: 1 until the task has ended, then 0
    valid: th.Tensor  # (batch,), float: 1 if every step is finite and near the data, else 0


class ValueBounds(nn.Module):
    """
    Between which values the target critics are believed: what a task without end would pay if each step paid the 1 % or the
    99 % quantile of the rewards with their entropies. 0, the value of a task that has ended, always lies between them. Without
    a discount, and until one of the quantiles is not 0, there are no bounds.

    Their distance is also the unit of what the critics put out, so that values of hundreds are learned as soon as values of
    tenths.
    """

    lowest: th.Tensor
    highest: th.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lowest", th.tensor(-th.inf))
        self.register_buffer("highest", th.tensor(th.inf))

    def update(self, soft_rewards: th.Tensor, gamma: float) -> None:
        """
        Moves the bounds by ``BOUNDS_RATE`` towards those of a batch, unless these are both 0.

        :param soft_rewards: (batch,), rewards with their entropies; perhaps none
        :param gamma: discount factor
        """
        if gamma == 1.0:
            self.lowest.fill_(-th.inf)
            self.highest.fill_(th.inf)
        if gamma == 1.0 or not len(soft_rewards):
            return
        low, high = th.quantile(soft_rewards, soft_rewards.new_tensor([0.01, 0.99])) / (1 - gamma)
        if not (low < 0.0 or high > 0.0):  # hardly any step pays, which gives no unit
            return
        for bound, newest in ((self.lowest, low.clamp(max=0.0)), (self.highest, high.clamp(min=0.0))):
            bound.copy_(th.where(bound.isinf(), newest, bound.lerp(newest.to(bound.dtype), BOUNDS_RATE)))

    def scale(self, outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: of critics, of any shape
        :return: the values that they stand for
        """
        distance = self.highest - self.lowest
        return outputs * th.where(distance.isfinite() & (distance > 0), distance, 1.0)

    def clamp(self, values: th.Tensor) -> th.Tensor:
        """:return: the values, held between the bounds"""
        return values.clamp(self.lowest, self.highest)


def imagine_path(
    dynamics: Dynamics,
    policy: DifferentiablePolicy,
    starts: th.Tensor,
    horizon: int,
    elites: Sequence[int],
    generator: th.Generator,
) -> ImaginedPath:
    """
    Differentiable in the policy's parameters. The rows keep their places: one that has ended waits where it was, and gives no
    gradient from then on. Where the gradient of a row is not finite, it goes no further back.

    :param dynamics: fitted
    :param policy: the current one
    :param starts: (batch, obs_dim), raw
    :param horizon: H, steps
    :param elites: members that take part; each row draws one at each step, and all get as many rows
    :param generator: draws members and next states
    """
    elite_members = th.tensor(elites, device=starts.device)
    alive, valid = (th.ones(len(starts), dtype=th.bool, device=starts.device) for _ in range(2))
    states, masks, rewards = [starts], [alive], []
    draws = [policy(starts)]
    for _ in range(horizon):
        observations = states[-1]
        _stop_at_infinite_gradients(observations, draws[-1][0])
        places = th.randperm(len(starts), generator=generator, device=starts.device)
        step = dynamics.step(observations, draws[-1][0], elite_members[places % len(elites)], generator)
        _stop_at_infinite_gradients(step.next_observations)
        usable = step.next_observations.isfinite().all(dim=-1) & step.rewards.isfinite()
        usable &= dynamics.near_data(step.next_observations)
        valid = valid & (usable | ~alive)
        rewards.append(th.where(alive & usable, step.rewards, 0.0))
        alive = alive & usable & ~step.terminated
        states.append(th.where(alive.unsqueeze(-1), step.next_observations, observations.detach()))
        masks.append(alive)
        draws.append(policy(states[-1]))
    actions, log_prob = (th.stack(part) for part in zip(*draws, strict=True))
    alive_steps = th.stack(masks).to(starts.dtype)
    return ImaginedPath(th.stack(states), actions, log_prob, th.stack(rewards), alive_steps, valid.to(starts.dtype))


def _stop_at_infinite_gradients(*tensors: th.Tensor) -> None:
    """
    A reward that is NaN is left out, but its gradient would be zero times NaN.

    :param tensors: (batch, ...) each
    """
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient.where(gradient.isfinite().all(dim=-1, keepdim=True), 0.0))


def soft_return(
    path: ImaginedPath, rewards: th.Tensor, last_values: th.Tensor, ent_coef: th.Tensor, gamma: float
) -> th.Tensor:
    """
    The objective :math:`J(s_0)`.

    :param path: H steps
    :param rewards: (H, batch), its rewards as the critics know them
    :param last_values: (batch,), Q at its end
    :param ent_coef: alpha, one number
    :param gamma: discount factor
    :return: (batch,)
    """
    soft = th.cat((rewards, last_values.unsqueeze(0))) - ent_coef * path.log_prob
    discounts = gamma ** th.arange(len(soft), device=soft.device, dtype=soft.dtype)
    return discounts @ (path.alive * soft)


def double_horizon_updates(model: "DHMBPO", n_critic_updates: int, n_updates: int, batch_size: int) -> dict[str, float]:
    """
    First some updates of the critics alone, then some of all networks. Whenever it is due, the model imagines new states.

    With gSDE, all rows and steps of an update share one noise matrix, as the rows do in SB3.

    :param model: its networks, target critics, entropy coefficient, value bounds and imagined states are updated in place
    :param n_critic_updates: of the critics alone; they are not counted in ``_n_updates``
    :param n_updates: of critics, actor and entropy coefficient
    :param batch_size: start states of each
    :return: the means that are logged, by name
    :raises ValueError: when a loss is NaN
    """
    assert model.dynamics is not None and model.imagined_buffer is not None
    prepare_optimizers(model)
    losses: dict[str, list[th.Tensor]] = {}
    with faster_layers(model.policy), unchecked_distributions(), frozen(model.dynamics), forgotten_draws(model):
        for step in range(n_critic_updates + n_updates):
            if model.states_due():
                model.imagine()
            if not len(model.imagined_buffer):
                break  # the dynamics leads nowhere near the data: the next fit may
            model.policy.set_training_mode(True)
            if model.use_sde:
                model.actor.reset_noise()
            starts = model.imagined_buffer.sample(batch_size, model._generator).observations
            updates_actor = step >= n_critic_updates
            for name, value in double_horizon_update(model, starts, updates_actor).items():
                losses.setdefault(name, []).append(value)
            if step % model.target_update_interval == 0:
                polyak_update(model.critic.parameters(), model.critic_target.parameters(), model.tau)
                polyak_update(model.batch_norm_stats, model.batch_norm_stats_target, 1.0)
            model._n_updates += updates_actor
    return checked_means(losses)


@contextmanager
def forgotten_draws(model: "DHMBPO") -> Iterator[None]:
    """SB3's distribution remembers its last draw, and with it all that led there. After this, it has none."""
    try:
        yield
    finally:
        if not model.use_sde:
            remembered = vars(model.actor.action_dist)
            remembered.pop("distribution", None)
            remembered["gaussian_actions"] = None


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """While this lasts, gradients pass through a module, but its parameters get none."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def double_horizon_update(model: "DHMBPO", starts: th.Tensor, updates_actor: bool) -> dict[str, th.Tensor]:
    """
    One update of the critics and, on demand, of the actor and the entropy coefficient.

    :param model: its critics, value bounds, actor and entropy coefficient are updated in place; its dynamics must not ask for
        gradients
    :param starts: (batch, obs_dim), raw
    :param updates_actor: whether actor and entropy coefficient are trained, too
    :return: losses and shares by the names of the log, one number each
    """
    assert model.dynamics is not None and model.fit_result is not None
    ent_coef = model.ent_coef_tensor if model.log_ent_coef is None else model.log_ent_coef.detach().exp()
    with th.set_grad_enabled(updates_actor):
        tools = (model.gradient_horizon, model.fit_result.elites, model._generator)
        path = imagine_path(model.dynamics, model.draw_actions, starts, *tools)
        rewards = normalize_rewards(path.rewards, model.get_vec_normalize_env())
    weights = path.valid / path.valid.sum().clamp(min=1.0)
    actions = path.actions.detach()

    with th.no_grad():
        soft_rewards = rewards - ent_coef * path.log_prob[:-1]
        model.value_bounds.update(soft_rewards[path.alive[:-1] * path.valid > 0], model.gamma)
        last_values = model.q_values(model.critic_target, path.observations[-1], actions[-1])
        chosen = th.randperm(len(last_values), generator=model._generator, device=starts.device)[:2]
        last_values = model.value_bounds.clamp(last_values[chosen].amin(dim=0))
        targets = soft_return(path, rewards, last_values, ent_coef, model.gamma) + ent_coef * path.log_prob[0]
    errors = model.q_values(model.critic, starts, actions[0]) - targets
    critic_loss = 0.5 * (weights * errors.square()).sum()
    model.critic.optimizer.zero_grad()
    critic_loss.backward()
    model.critic.optimizer.step()
    losses = {"critic_loss": critic_loss.detach(), "ent_coef": ent_coef, "valid_paths": path.valid.mean()}
    if not updates_actor:
        return losses

    last_values = model.q_values(model.critic, path.observations[-1], path.actions[-1]).mean(dim=0)
    actor_loss = -(weights * soft_return(path, rewards, last_values, ent_coef, model.gamma)).sum()
    backward_to_actor(model, actor_loss)
    model.actor.optimizer.step()
    losses["actor_loss"] = actor_loss.detach()
    if model.log_ent_coef is not None:
        losses["ent_coef_loss"] = update_ent_coef(model, path.log_prob[0])
    return losses
