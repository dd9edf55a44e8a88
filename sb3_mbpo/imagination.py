"""Short rollouts of the current policy inside the learned dynamics."""

from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch as th
from stable_baselines3.sac.policies import Actor

from sb3_mbpo.dynamics import Dynamics
from sb3_mbpo.type_aliases import ActionSampler, ImaginationResult, Transitions

#: Rows that are simulated together: enough to keep the processor busy, few enough for its cache.
BLOCK_SIZE = 4096


def imagine_round(
    dynamics: Dynamics,
    sample_actions: ActionSampler,
    starts: th.Tensor,
    length: int,
    elites: Sequence[int],
    generator: th.Generator,
    store: Callable[[Transitions], None],
) -> ImaginationResult:
    """
    :func:`imagine` for any number of starts, block by block.

    :param store: takes the rows of each block
    :return: the counts of all blocks
    :raises ValueError: when no row is finite
    """
    counts = []
    for block in starts.split(BLOCK_SIZE):
        rows, result = imagine(dynamics, sample_actions, block, length, elites, generator)
        store(rows)
        counts.append(astuple(result))
    total = ImaginationResult(*map(sum, zip(*counts, strict=True)))
    if total.rows == 0 and total.far_from_data == 0:
        raise ValueError("No imagined row is finite. Check `reward_fn`, and the scale of the observations.")
    return total


@th.no_grad()
def imagine(
    dynamics: Dynamics,
    sample_actions: ActionSampler,
    starts: th.Tensor,
    length: int,
    elites: Sequence[int],
    generator: th.Generator,
) -> tuple[Transitions, ImaginationResult]:
    """
    Branched rollouts (Janner et al. 2019, algorithm 2). Each row draws a new elite at each step, an action from the
    policy and a next state from that elite's Gaussian. A row whose task has ended is simulated no further; a step that
    is not finite, or that leads far from the data (:meth:`Dynamics.near_data`), is dropped and ends its branch too.
    The last step of a branch is no end of the task.

    :param dynamics: fitted
    :param sample_actions: the policy
    :param starts: (batch, obs_dim), raw observations to branch from
    :param length: k, steps per branch
    :param elites: members that take part
    :param generator: draws members and next states
    :return: from none to ``batch * length`` rows, step by step, and their counts
    """
    elite_members = th.tensor(elites, device=starts.device)
    steps: list[Transitions] = []
    not_finite = far_from_data = 0
    observations = starts
    for _ in range(length):
        choice = th.randint(len(elite_members), (len(observations),), generator=generator, device=starts.device)
        actions = sample_actions(observations)
        step = dynamics.step(observations, actions, elite_members[choice], generator)
        finite = step.next_observations.isfinite().all(dim=-1) & step.rewards.isfinite()
        kept = finite & dynamics.near_data(step.next_observations)
        not_finite += int((~finite).sum())
        far_from_data += int((finite & ~kept).sum())
        transitions = Transitions(observations, actions, *step)
        steps.append(transitions if bool(kept.all()) else transitions.rows(kept))
        observations = step.next_observations[kept & ~step.terminated]
        if len(observations) == 0:
            break
    rows = Transitions(*(th.cat(fields) for fields in zip(*steps, strict=True)))
    return rows, ImaginationResult(rows.n_rows, int(rows.terminated.sum()), not_finite, far_from_data)


@th.no_grad()
def sample_actions(actor: Actor, observations: th.Tensor | dict[str, th.Tensor]) -> th.Tensor:
    """
    A draw of its own for each row. With gSDE the actor itself would move every row by the same noise matrix.

    :param actor: in evaluation mode; draws from PyTorch's global stream, as SB3 does
    :param observations: as the policy expects them, (batch, ...)
    :return: (batch, action_dim), in [-1, 1]
    """
    if not actor.use_sde:
        actions: th.Tensor = actor(observations)
        return actions
    mean, log_std, latent = actor.get_action_dist_params(observations)
    actor.action_dist.proba_distribution(mean, log_std, **latent)
    actions = actor.action_dist.distribution.sample().tanh()
    return actions
