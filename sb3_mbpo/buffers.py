"""
Real and imagined transitions side by side.

SB3's replay buffer stays what it is. The imagined rows lie in a buffer of their own; a batch for the update is drawn
from both and is normalised once, as SB3 does on sampling. Nothing here knows a network.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.imagined_buffer import ImaginedBuffer
from sb3_mbpo.observations import ObservationLayout, normalize_rewards
from sb3_mbpo.type_aliases import Transitions

Samples: TypeAlias = ReplayBufferSamples | DictReplayBufferSamples

#: Batches that are drawn and normalised together: enough to save time, few enough to save memory.
BATCHES_AT_ONCE = 64


def _flat(source: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """(buffer_size, n_envs, ...) -> (slots * n_envs, ...)"""
    flat: np.ndarray = source[slots].reshape(-1, *source.shape[2:])
    return flat


def _flat_observations(source: Any, where: Any, layout: ObservationLayout) -> np.ndarray:
    """
    (buffer_size, n_envs, *shape), or a dict of them -> (rows, obs_dim)

    :param where: slots, of all environments; or slots and environments, one of each for each row
    """
    return layout.flatten({key: part[where] for key, part in source.items()} if isinstance(source, dict) else source[where])


def _slots(buffer: ReplayBuffer) -> np.ndarray:
    """:return: those that hold transitions"""
    slots = np.arange(buffer.size())
    if buffer.optimize_memory_usage and buffer.full:
        slots = slots[slots != buffer.pos]  # it holds the next observation of the last transition
    return slots


def _usable(buffer: ReplayBuffer) -> tuple[np.ndarray, np.ndarray]:
    """
    :return: the slots that hold transitions, and a mask of shape (slots * n_envs,): which ones hold their true next
        observation. ``optimize_memory_usage`` overwrites those at the end of an episode; for others see
        :func:`mark_lost_terminals`
    """
    slots = _slots(buffer)
    mask = np.ones(len(slots) * buffer.n_envs, dtype=bool)
    if buffer.optimize_memory_usage:
        mask &= _flat(buffer.dones, slots) == 0
    if hasattr(buffer, "lost_terminals"):
        mask &= ~_flat(buffer.lost_terminals, slots)
    return slots, mask


def count_usable(buffer: ReplayBuffer) -> int:
    """How many transitions :func:`real_transitions` returns."""
    return int(_usable(buffer)[1].sum())


def real_transitions(buffer: ReplayBuffer, layout: ObservationLayout, device: th.device) -> Transitions:
    """
    All real transitions whose next observation is known, of any of SB3's buffers and any number of environments.

    :param buffer: SB3's own
    :param layout: of the observations
    :param device: of the result
    :return: raw observations and rewards, scaled actions, slot by slot
    """
    slots, mask = _usable(buffer)
    next_slots, next_source = slots, getattr(buffer, "next_observations", None)
    if buffer.optimize_memory_usage:
        next_slots, next_source = (slots + 1) % buffer.buffer_size, buffer.observations

    timeouts = _flat(buffer.timeouts, slots).astype(bool)
    data = Transitions(
        observations=th.as_tensor(_flat_observations(buffer.observations, slots, layout)[mask]),
        actions=th.as_tensor(_flat(buffer.actions, slots)[mask].astype(np.float32, copy=False)),
        next_observations=th.as_tensor(_flat_observations(next_source, next_slots, layout)[mask]),
        rewards=th.as_tensor(_flat(buffer.rewards, slots)[mask]),
        terminated=th.as_tensor((_flat(buffer.dones, slots).astype(bool) & ~timeouts)[mask]),
    )
    return Transitions(*(field.to(device) for field in data))


def draw_observations(buffer: ReplayBuffer, layout: ObservationLayout, n_rows: int, generator: th.Generator) -> th.Tensor:
    """
    Uniform, with replacement, from all observations that a real transition began from.

    :param buffer: SB3's own, with a transition at least
    :param layout: of the observations
    :param n_rows: how many
    :param generator: draws them; the result is on its device
    :return: (n_rows, obs_dim), raw
    """
    slots, n_envs = _slots(buffer), buffer.n_envs
    rows = th.randint(len(slots) * n_envs, (n_rows,), generator=generator, device=generator.device).numpy(force=True)
    where = slots[rows // n_envs], rows % n_envs
    return th.as_tensor(_flat_observations(buffer.observations, where, layout), device=generator.device)


def check_finite(
    last_observations: np.ndarray | dict[str, np.ndarray] | tuple[np.ndarray, ...] | None,
    observations: np.ndarray | dict[str, np.ndarray],
    rewards: np.ndarray,
    infos: list[dict[str, Any]],
    env: VecNormalize | None,
) -> None:
    """
    Call this before a transition is stored.

    :param last_observations: (n_envs, *shape), or a dict of them, raw: where the step began
    :param observations: the same, as the environment returned them
    :param rewards: (n_envs,)
    :param infos: one dict per environment, with the last observation of an episode, which ``VecNormalize`` has clipped
    :param env: if given, it has the raw values of the others
    :raises ValueError: for NaN or infinity in an observation or a reward
    """
    if env is not None:
        observations, rewards = env.get_original_obs(), env.get_original_reward()
    sources: list[tuple[str, Any]] = [("observation", last_observations), ("observation", observations), ("reward", rewards)]
    ends = [info.get("terminal_observation") for info in infos]
    sources += [("terminal observation", end) for end in ends if end is not None]
    for name, source in sources:
        for values in source.values() if isinstance(source, dict) else [source]:
            if not np.isfinite(values).all():
                raise ValueError(
                    f"Expected finite numbers from the environment, but its {name} is {values}. "
                    "It was not stored. Mend the environment, or let it end the episode first."
                )


def mark_lost_terminals(
    buffer: ReplayBuffer, dones: np.ndarray, infos: list[dict[str, Any]], env: VecNormalize | None
) -> None:
    """
    Call this before a transition is stored. ``VecNormalize`` clips the last observation of an episode before SB3 gets
    to un-normalise and store it, so a clipped one is wrong. Where the environment does not give it, SB3 stores the first one
    of the next episode. The marks lie on the buffer, from the first one on, to be saved with it.

    :param buffer: about to store the transition at ``buffer.pos``
    :param dones: (n_envs,)
    :param infos: one dict per environment
    :param env: the wrapper that clips, if there is one
    """
    lost = [bool(done) and _is_lost(info.get("terminal_observation"), env) for done, info in zip(dones, infos, strict=True)]
    if any(lost) and not hasattr(buffer, "lost_terminals"):
        buffer.lost_terminals = np.zeros(buffer.dones.shape, dtype=bool)  # type: ignore[attr-defined]
    if hasattr(buffer, "lost_terminals"):
        buffer.lost_terminals[buffer.pos] = lost


def _is_lost(observation: np.ndarray | dict[str, np.ndarray] | None, env: VecNormalize | None) -> bool:
    if observation is None:
        return True
    if env is None or not env.norm_obs:
        return False
    parts = [observation[key] for key in env.norm_obs_keys or ()] if isinstance(observation, dict) else [observation]
    return any(bool(np.any(np.abs(part) >= env.clip_obs)) for part in parts)


class ModelAugmentedReplayBuffer:
    """
    Draws batches of ``round(real_ratio * batch_size)`` real rows and, below them, imagined ones. Before there are
    imagined rows, all are real.

    :param real: SB3's own buffer; draws as it always does, from NumPy's global stream
    :param imagined: the imagined rows
    :param layout: of the observations
    :param real_ratio: share of real rows in every batch
    :param gamma: discount of an imagined row, where the real ones bring their own (n-step returns)
    :param generator: draws the imagined rows
    """

    def __init__(
        self,
        real: ReplayBuffer,
        imagined: ImaginedBuffer,
        layout: ObservationLayout,
        real_ratio: float,
        gamma: float,
        generator: th.Generator,
    ) -> None:
        self.real = real
        self.imagined = imagined
        self.layout = layout
        self.real_ratio = real_ratio
        self.gamma = gamma
        self.generator = generator

    def n_real(self, batch_size: int) -> int:
        """Real rows in a batch of this size."""
        return round(self.real_ratio * batch_size) if len(self.imagined) else batch_size

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Samples:
        """
        :param batch_size: rows
        :param env: normalises observations and rewards, if given
        :return: one mixed batch
        """
        return next(self.sample_batches(1, batch_size, env))

    def sample_batches(self, n_batches: int, batch_size: int, env: VecNormalize | None = None) -> Iterator[Samples]:
        """
        All batches of one call of ``train``, a block of them at a time.

        :param n_batches: how many
        :param batch_size: rows of each
        :param env: normalises observations and rewards, if given
        """
        n_real = self.n_real(batch_size)
        for first in range(0, n_batches, BATCHES_AT_ONCE):
            n_block = min(BATCHES_AT_ONCE, n_batches - first)
            sources: list[Samples] = []
            if n_real > 0:
                sources.append(self.real.sample(n_block * n_real, env=env))
            if n_real < batch_size:
                sources.append(self._imagined_samples(n_block * (batch_size - n_real), env))
            # one list of batches per source, then one joined batch for each index
            batches = [_split(source, n_block) for source in sources]
            yield from (_join(list(parts)) for parts in zip(*batches, strict=True))

    def _imagined_samples(self, n_rows: int, env: VecNormalize | None) -> Samples:
        rows = self.imagined.sample(n_rows, self.generator)
        rewards = normalize_rewards(rows.rewards, env)
        return ReplayBufferSamples(
            observations=self.layout.policy_input(rows.observations, env),  # type: ignore[arg-type]
            actions=rows.actions,
            next_observations=self.layout.policy_input(rows.next_observations, env),  # type: ignore[arg-type]
            dones=rows.terminated.float().unsqueeze(-1),
            rewards=rewards.unsqueeze(-1),
            discounts=th.full_like(rewards, self.gamma).unsqueeze(-1),
        )


def _split(samples: Samples, n_batches: int) -> list[Samples]:
    """
    Into equal batches, as views. SB3 samples what the environment gave, float64 too: the policy wants float32. A buffer of
    the user's may sample more fields than SB3's, which no update here reads.
    """
    kind = DictReplayBufferSamples if isinstance(samples.observations, dict) else ReplayBufferSamples
    fields: list[list[Any]] = []
    for field in (getattr(samples, name) for name in kind._fields):
        if field is None:
            fields.append([None] * n_batches)
        elif isinstance(field, dict):
            chunks = {key: part.float().chunk(n_batches) for key, part in field.items()}
            fields.append([{key: parts[index] for key, parts in chunks.items()} for index in range(n_batches)])
        else:
            fields.append(list(field.float().chunk(n_batches)))
    return [kind(*batch) for batch in zip(*fields, strict=True)]


def _join(parts: list[Samples]) -> Samples:
    """One batch out of a real and an imagined part. Without n-step returns, every discount is the algorithm's gamma."""
    if len(parts) == 1:
        return parts[0]
    fields: list[Any] = []
    for values in zip(*parts, strict=True):
        if any(value is None for value in values):
            fields.append(None)
        elif isinstance(values[0], dict):
            fields.append({key: th.cat([value[key] for value in values]) for key in values[0]})
        else:
            fields.append(th.cat(values))
    return type(parts[0])(*fields)
