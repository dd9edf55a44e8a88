import pickle
from collections import deque
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import pytest
import torch as th
from conftest import LineEnv
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mbpo.buffers import (
    BATCHES_AT_ONCE,
    ModelAugmentedReplayBuffer,
    check_finite,
    count_usable,
    mark_lost_terminals,
    real_transitions,
)
from sb3_mbpo.imagined_buffer import ImaginedBuffer
from sb3_mbpo.observations import ObservationLayout, why_not_modelled
from sb3_mbpo.type_aliases import Transitions

CPU = th.device("cpu")
BOX = spaces.Box(-10.0, 10.0, (2,), np.float64)
DICT = spaces.Dict({"z": spaces.Box(-10.0, 10.0, (1, 2), np.float32), "a": spaces.Box(-10.0, 10.0, (1,), np.float64)})
ACTION = spaces.Box(-1.0, 1.0, (1,), np.float32)


def imagined_rows(tags, obs_dim: int = 2) -> Transitions:
    """Rows that carry their tag in every field."""
    tags = th.as_tensor(tags, dtype=th.float32)
    wide = tags[:, None].expand(-1, obs_dim)
    return Transitions(wide, tags[:, None], wide + 0.5, tags, tags % 2 == 1)


def observation(space, value):
    if isinstance(space, spaces.Dict):
        return {key: observation(part, value) for key, part in space.items()}
    return np.full(space.shape, value, space.dtype)


def fill(buffer: ReplayBuffer, n_steps: int, n_envs: int, ends=(), timeouts=()) -> None:
    """Step t of environment e goes from 100 e + t to 100 e + t + 0.5 with reward -t."""

    def stack(values):
        parts = [observation(buffer.observation_space, value) for value in values]
        if isinstance(parts[0], dict):
            return {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        return np.stack(parts)

    for t in range(n_steps):
        infos = [{"TimeLimit.truncated": (t, env) in timeouts} for env in range(n_envs)]
        done = np.array([(t, env) in ends or (t, env) in timeouts for env in range(n_envs)])
        begin = [100 * env + t for env in range(n_envs)]
        following = [value + 0.5 for value in begin]
        buffer.add(stack(begin), stack(following), np.full((n_envs, 1), t / 100), np.full(n_envs, -t), done, infos)


# ---------------------------------------------------------------- the imagined ring


def test_the_ring_keeps_the_newest_rows():
    ring = ImaginedBuffer(5, 2, 1, CPU)
    assert len(ring) == 0
    ring.add(imagined_rows([0, 1, 2]))
    assert ring.newest(10).rewards.tolist() == [0, 1, 2]
    ring.add(imagined_rows([3, 4, 5, 6]))
    assert len(ring) == 5 and ring.newest(10).rewards.tolist() == [2, 3, 4, 5, 6]
    assert ring.newest(2).rewards.tolist() == [5, 6]
    ring.add(imagined_rows(range(7, 20)))  # more than fits
    assert ring.newest(5).rewards.tolist() == [15, 16, 17, 18, 19]


def test_a_row_comes_back_as_it_went_in():
    ring = ImaginedBuffer(8, 3, 1, CPU)
    rows = imagined_rows(range(6), obs_dim=3)
    ring.add(rows)
    for got, expected in zip(ring.newest(6), rows, strict=True):
        assert (got == expected).all() and got.dtype == expected.dtype


def test_resizing_keeps_the_newest_rows():
    ring = ImaginedBuffer(4, 2, 1, CPU)
    ring.add(imagined_rows(range(6)))
    ring.resize(7)
    assert (ring.capacity, len(ring)) == (7, 4) and ring.newest(7).rewards.tolist() == [2, 3, 4, 5]
    ring.add(imagined_rows([6, 7, 8, 9]))
    assert ring.newest(7).rewards.tolist() == [3, 4, 5, 6, 7, 8, 9]
    ring.resize(3)
    assert ring.newest(7).rewards.tolist() == [7, 8, 9]
    ring.add(imagined_rows([10]))
    assert ring.newest(7).rewards.tolist() == [8, 9, 10]


def test_the_ring_takes_the_bytes_of_its_rows():
    ring = ImaginedBuffer(1000, 2, 1, CPU)
    assert ring._rows.nbytes == 0  # until the first row arrives
    ring.add(imagined_rows([1]))
    assert ring._rows.nbytes == 1000 * (2 * 2 + 1 + 2) * 4


def ring_with_a_gap(n_added: int, capacity: int, wider: int, n_after: int = 0, reserved: int = 50) -> ImaginedBuffer:
    """Tags 0 to ``n_added - 1`` in a ring that then grew, ``n_after`` more after that; what is free holds NaN."""
    ring = ImaginedBuffer(capacity, 2, 1, CPU, reserved)
    ring.add(imagined_rows([0]))
    ring._rows[1:] = th.nan
    ring.add(imagined_rows(range(1, n_added)))
    rows = ring._rows
    ring.resize(wider)
    assert ring._rows is rows
    held = {float(tag) for tag in range(max(0, n_added - capacity), n_added)}
    free = th.tensor([slot for slot in range(len(rows)) if rows[slot, 0].item() not in held or slot in moved_away(ring)])
    rows[free.long()] = th.nan
    ring.add(imagined_rows(range(n_added, n_added + n_after)))
    return ring


def moved_away(ring: ImaginedBuffer) -> range:
    """Slots between the newest and the oldest row: they may still hold copies of what was moved to the end."""
    return range(ring._pos, ring._pos + ring.capacity - len(ring))


#: rows added, capacity, capacity after growing, rows added then
GAPS = [
    (13, 10, 12, 0), (13, 10, 11, 0), (13, 10, 25, 0), (13, 10, 25, 9), (13, 10, 25, 14), (13, 10, 12, 1), (13, 10, 12, 2),
    (19, 10, 17, 3), (11, 10, 30, 0), (10, 10, 14, 0), (20, 10, 14, 3), (6, 10, 14, 0), (6, 10, 14, 5), (13, 10, 25, 40),
]  # fmt: skip


@pytest.mark.parametrize(("n_added", "capacity", "wider", "n_after"), GAPS)
def test_growing_in_place_keeps_the_rows_and_their_order(n_added, capacity, wider, n_after):
    ring = ring_with_a_gap(n_added, capacity, wider, n_after)
    held = deque(deque(range(n_added), maxlen=capacity), maxlen=wider)
    held.extend(range(n_added, n_added + n_after))
    assert (ring.capacity, len(ring)) == (wider, len(held))
    assert ring.newest(100).rewards.tolist() == list(held)
    for n_rows in range(len(held) + 1):
        assert ring.newest(n_rows).rewards.tolist() == list(held)[len(held) - n_rows :]
    for tag in range(100, 130):  # the oldest give way, one by one
        ring.add(imagined_rows([tag]))
        held.append(tag)
        assert ring.newest(100).rewards.tolist() == list(held)


@pytest.mark.parametrize(("n_added", "capacity", "wider", "n_after"), GAPS)
def test_every_stored_row_is_drawn_equally_often_and_nothing_else(generator, n_added, capacity, wider, n_after):
    ring = ring_with_a_gap(n_added, capacity, wider, n_after)
    held = set(range(n_added)[-capacity:]) | set(range(n_added, n_added + n_after))
    held = sorted(held)[-wider:]
    n_draws = 500 * len(held)
    rows = ring.sample(n_draws, generator)
    assert rows.observations.isfinite().all() and rows.next_observations.isfinite().all() and rows.actions.isfinite().all()
    assert set(rows.rewards.tolist()) == set(held)
    counts = th.bincount(rows.rewards.long())[held]
    chi_square = ((counts - 500) ** 2 / 500).sum().item()
    n_free = len(held) - 1  # mean of chi-square, and half its variance
    assert chi_square < n_free + 5 * (2 * n_free) ** 0.5


@pytest.mark.parametrize(("n_added", "capacity", "wider", "n_after"), GAPS)
def test_a_ring_with_a_gap_goes_on_as_itself_after_a_round_trip(n_added, capacity, wider, n_after):
    ring = ring_with_a_gap(n_added, capacity, wider, n_after)
    rows, pos = ring.ring()
    assert len(rows) == len(ring) and np.isfinite(rows).all()
    for reserved in (0, 50):
        other, twin = ImaginedBuffer(3, 2, 1, CPU, reserved), deepcopy(ring)
        other.add(imagined_rows([1000, 1001]))
        other.set_ring(ring.capacity, rows.copy(), pos)
        for wider in [0, 0, 4] * 3:
            both = (twin, other)
            assert twin.newest(100).rewards.tolist() == other.newest(100).rewards.tolist()
            draws = [each.sample(50, th.Generator().manual_seed(1)).rewards.tolist() for each in both]
            assert draws[0] == draws[1] or reserved == 0  # every row in the slot where it was
            for each in both:
                each.resize(each.capacity + wider)
                each.add(imagined_rows([200, 201]))


def test_within_the_reserve_the_memory_stays_where_it_is():
    ring = ImaginedBuffer(10, 2, 1, CPU, reserved=40)
    assert ring._rows.nbytes == 0
    ring.add(imagined_rows(range(13)))
    place = ring._rows.data_ptr()
    assert ring._rows.nbytes == 40 * (2 * 2 + 1 + 2) * 4
    for capacity in (11, 20, 20, 39, 40):
        ring.resize(capacity)
        ring.add(imagined_rows(range(7)))
        assert ring._rows.data_ptr() == place and len(ring._rows) == 40
    ring.resize(41)  # more than was foreseen
    assert (len(ring._rows), len(ring)) == (41, 34)  # rows held: 10, 11, 18, 20, 27, 34
    ring.resize(5)
    assert len(ring._rows) == 40 and len(ring) == 5


def test_a_ring_that_never_held_a_row_takes_any_capacity():
    ring = ImaginedBuffer(10, 2, 1, CPU, reserved=20)
    for capacity in (15, 30, 4):
        ring.resize(capacity)
        assert (ring.capacity, len(ring), ring._rows.nbytes) == (capacity, 0, 0)
        assert ring.newest(5).n_rows == 0 and ring.ring()[0].shape == (0, 7)
    ring.add(imagined_rows(range(6)))
    assert ring.newest(10).rewards.tolist() == [2, 3, 4, 5]


def test_sampling_is_uniform_over_the_filled_part(generator):
    ring = ImaginedBuffer(100, 2, 1, CPU)
    ring.add(imagined_rows(range(10)))
    tags = ring.sample(20_000, generator).rewards
    counts = th.bincount(tags.long(), minlength=10)
    assert len(counts) == 10 and counts.min() > 1800 and counts.max() < 2200


# ---------------------------------------------------------------- real transitions as arrays


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("space", [BOX, DICT], ids=["box", "dict"])
def test_real_transitions_of_several_environments(n_envs, space):
    buffer_class = DictReplayBuffer if isinstance(space, spaces.Dict) else ReplayBuffer
    buffer = buffer_class(20 * n_envs, space, ACTION, n_envs=n_envs)
    fill(buffer, 6, n_envs, ends={(2, 0)}, timeouts={(4, 0)})
    data = real_transitions(buffer, ObservationLayout(space), CPU)
    assert data.n_rows == count_usable(buffer) == 6 * n_envs
    assert data.observations.dtype == th.float32
    for t in range(6):
        for env in range(n_envs):
            row = data.rows(th.tensor([t * n_envs + env]))
            assert (row.observations == 100 * env + t).all() and (row.next_observations == 100 * env + t + 0.5).all()
            assert row.rewards.item() == -t and row.actions.item() == pytest.approx(t / 100)
            assert row.terminated.item() == ((t, env) == (2, 0))  # the timeout is no end


def test_a_full_buffer_gives_what_it_holds():
    buffer = ReplayBuffer(5, BOX, ACTION)
    fill(buffer, 8, 1)
    data = real_transitions(buffer, ObservationLayout(BOX), CPU)
    assert sorted(data.observations[:, 0].tolist()) == [3, 4, 5, 6, 7]
    assert (data.next_observations == data.observations + 0.5).all()


@pytest.mark.parametrize("n_steps", [4, 12])  # half full; wrapped around
def test_a_memory_optimised_buffer_never_pairs_what_does_not_belong_together(n_steps):
    """Here a next observation lies where the next step's observation goes: t + 1, unless the episode ended at t."""
    buffer = ReplayBuffer(8, BOX, ACTION, optimize_memory_usage=True, handle_timeout_termination=False)
    for t in range(n_steps):
        done = t % 5 == 2
        begin = np.full((1, 2), float(t))
        following = np.full((1, 2), -1.0 if done else t + 1.0)
        buffer.add(begin, following, np.zeros((1, 1)), np.array([0.0]), np.array([done]), [{}])
    data = real_transitions(buffer, ObservationLayout(BOX), CPU)
    assert data.n_rows == count_usable(buffer)
    assert (data.next_observations == data.observations + 1).all()
    held = range(max(0, n_steps - 7), n_steps) if n_steps > 8 else range(n_steps)
    assert sorted(data.observations[:, 0].tolist()) == [t for t in held if t % 5 != 2]


def test_clipped_terminal_observations_are_left_out_and_the_marks_are_saved():
    env = VecNormalize(DummyVecEnv([LineEnv]), clip_obs=2.0)
    env.reset()
    buffer = ReplayBuffer(10, LineEnv().observation_space, ACTION)
    for t, (done, last) in enumerate([(False, None), (True, 1.9), (True, 2.0), (False, None)]):
        infos = [{} if last is None else {"terminal_observation": np.array([last])}]
        mark_lost_terminals(buffer, np.array([done]), infos, env)
        buffer.add(np.full((1, 1), t), np.full((1, 1), t), np.zeros((1, 1)), np.zeros(1), np.array([done]), infos)
    layout = ObservationLayout(buffer.observation_space)
    for copy in (buffer, pickle.loads(pickle.dumps(buffer))):
        assert real_transitions(copy, layout, CPU).observations[:, 0].tolist() == [0, 1, 3]
    assert type(buffer) is ReplayBuffer


def test_where_observations_are_not_normalised_none_is_clipped():
    env = VecNormalize(DummyVecEnv([LineEnv]), norm_obs=False, clip_obs=2.0)
    env.reset()
    buffer = ReplayBuffer(10, LineEnv().observation_space, ACTION)
    mark_lost_terminals(buffer, np.array([True]), [{"terminal_observation": np.array([5.0])}], env)
    assert not hasattr(buffer, "lost_terminals")


@pytest.mark.parametrize("normalises", [False, True])
def test_an_end_without_its_last_observation_is_left_out(normalises):
    """SB3 stores the first observation of the next episode in its place, which no dynamics leads to."""
    env = VecNormalize(DummyVecEnv([LineEnv])) if normalises else None
    buffer = ReplayBuffer(10, LineEnv().observation_space, ACTION)
    for t, (done, infos) in enumerate([(True, [{"terminal_observation": np.zeros(1)}]), (True, [{}]), (False, [{}])]):
        mark_lost_terminals(buffer, np.array([done]), infos, env)
        assert hasattr(buffer, "lost_terminals") == (t > 0)
        buffer.add(np.full((1, 1), t), np.full((1, 1), t), np.zeros((1, 1)), np.zeros(1), np.array([done]), infos)
    assert real_transitions(buffer, ObservationLayout(buffer.observation_space), CPU).observations[:, 0].tolist() == [0, 2]


# ---------------------------------------------------------------- mixing


def augmented(space, generator, real_ratio: float, n_imagined: int = 50, real=None) -> ModelAugmentedReplayBuffer:
    """Real rows have rewards up to 0, imagined ones from 1000."""
    layout = ObservationLayout(space)
    if real is None:
        real = (DictReplayBuffer if isinstance(space, spaces.Dict) else ReplayBuffer)(40, space, ACTION)
    fill(real, 20, 1)
    ring = ImaginedBuffer(100, layout.obs_dim, 1, CPU)
    if n_imagined:
        ring.add(imagined_rows(range(1000, 1000 + n_imagined), layout.obs_dim))
    return ModelAugmentedReplayBuffer(real, ring, layout, real_ratio, 0.9, generator)


@pytest.mark.parametrize("space", [BOX, DICT], ids=["box", "dict"])
@pytest.mark.parametrize(
    ("real_ratio", "batch_size", "n_real"), [(0.05, 256, 13), (0.0, 64, 0), (1.0, 64, 64), (0.5, 7, 4), (0.05, 1, 0)]
)
def test_every_batch_has_exactly_its_share_of_real_rows(space, generator, real_ratio, batch_size, n_real):
    buffer = augmented(space, generator, real_ratio)
    for batch in [buffer.sample(batch_size), *buffer.sample_batches(3, batch_size)]:
        assert batch.rewards.shape == batch.dones.shape == (batch_size, 1)
        assert int((batch.rewards <= 0).sum()) == n_real and int((batch.rewards >= 1000).sum()) == batch_size - n_real
        assert batch.discounts is None or n_real == 0


def test_batches_are_drawn_a_block_at_a_time(generator):
    """So that a call with many of them needs no more memory; none is drawn that nobody asks for."""
    buffer = augmented(BOX, generator, 0.5)
    drawn = []
    sample = buffer.real.sample
    buffer.real.sample = lambda n_rows, env: drawn.append(n_rows) or sample(n_rows, env)
    batches = buffer.sample_batches(2 * BATCHES_AT_ONCE + 3, 6)
    assert drawn == []
    next(batches)
    assert drawn == [3 * BATCHES_AT_ONCE]
    assert len(list(batches)) == 2 * BATCHES_AT_ONCE + 2 and drawn == [3 * BATCHES_AT_ONCE] * 2 + [9]


class WeightedSamples(NamedTuple):
    weights: th.Tensor
    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    discounts: None


class WeightedBuffer(ReplayBuffer):
    """One of the user's, which tells more than SB3's."""

    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        return WeightedSamples(np.ones(len(batch_inds)), *samples)


def test_batches_share_no_row_that_was_drawn(generator):
    """What is drawn for a block of batches is dealt out once."""
    buffer = augmented(BOX, generator, 0.5)
    real, imagined = [], []
    sample_real, sample_imagined = buffer.real.sample, buffer.imagined.sample
    buffer.real.sample = lambda *args, **kwargs: real.append(sample_real(*args, **kwargs)) or real[-1]
    buffer.imagined.sample = lambda *args: imagined.append(sample_imagined(*args)) or imagined[-1]
    batches = list(buffer.sample_batches(5, 20))
    assert th.cat([batch.rewards[:10] for batch in batches]).tolist() == real[0].rewards.tolist()
    assert th.cat([batch.rewards[10:, 0] for batch in batches]).tolist() == imagined[0].rewards.tolist()


def test_what_a_buffer_samples_beside_the_transitions_is_left_out(generator):
    real = WeightedBuffer(40, BOX, ACTION)
    for batch in augmented(BOX, generator, 0.3, real=real).sample_batches(4, 20):
        assert type(batch) is ReplayBufferSamples
        assert (batch.next_observations == batch.observations + 0.5).all()


@pytest.mark.parametrize("space", [BOX, DICT], ids=["box", "dict"])
def test_the_fields_of_a_row_stay_together(space, generator):
    for batch in augmented(space, generator, 0.3).sample_batches(4, 20):
        observations = batch.observations["a"] if isinstance(space, spaces.Dict) else batch.observations
        following = batch.next_observations["a"] if isinstance(space, spaces.Dict) else batch.next_observations
        tag = observations[:, :1]
        assert observations.dtype == th.float32
        assert (following == observations + 0.5).all()
        real = tag < 1000
        assert (batch.rewards == th.where(real, -tag, tag)).all()
        th.testing.assert_close(batch.actions, th.where(real, tag / 100, tag))
        assert (batch.dones == th.where(real, 0.0, tag % 2)).all()


def test_dicts_come_in_their_own_shapes(generator):
    batch = augmented(DICT, generator, 0.5).sample(10)
    assert {key: part.shape for key, part in batch.observations.items()} == {"a": (10, 1), "z": (10, 1, 2)}


def test_all_rows_are_real_before_there_are_imagined_ones(generator):
    assert (augmented(BOX, generator, 0.05, n_imagined=0).sample(64).rewards <= 0).all()


def test_n_step_returns_bring_their_discounts(generator):
    real = NStepReplayBuffer(40, BOX, ACTION, n_steps=3, gamma=0.9)
    batch = augmented(BOX, generator, 0.5, real=real).sample(64)
    imagined = batch.rewards[:, 0] >= 1000
    assert imagined.sum() == 32
    assert batch.discounts[imagined].flatten().tolist() == pytest.approx([0.9] * 32)
    steps = batch.discounts[~imagined].log() / np.log(0.9)  # three, or fewer at the end of the data
    assert set(steps.round().flatten().tolist()) <= {1.0, 2.0, 3.0} and (steps.round() == 3).sum() > 20
    th.testing.assert_close(steps, steps.round(), rtol=1e-4, atol=1e-4)


def test_both_parts_are_normalised_once_with_the_statistics_of_the_moment(generator):
    env = VecNormalize(DummyVecEnv([LineEnv]), clip_obs=1e9, clip_reward=1e9)
    space = LineEnv().observation_space
    real = ReplayBuffer(40, space, ACTION)
    buffer = augmented(space, generator, 0.5, real=real)
    for mean, var in [(0.0, 1.0), (3.0, 16.0)]:  # they drift
        env.obs_rms.mean, env.obs_rms.var, env.ret_rms.var = np.array([mean]), np.array([var]), np.array(25.0)
        batch = buffer.sample(40, env)
        raw = batch.observations * np.sqrt(var + env.epsilon) + mean
        rewards = batch.rewards * np.sqrt(25.0 + env.epsilon)
        th.testing.assert_close(rewards.abs(), raw, rtol=1e-3, atol=1e-3)
        following = batch.next_observations * np.sqrt(var + env.epsilon) + mean
        th.testing.assert_close(following, raw + 0.5, rtol=0, atol=2e-3)
        assert raw.min() >= -1e-3 and raw.max() >= 1000


# ---------------------------------------------------------------- what is modelled, and what is refused


def test_what_is_not_modelled_says_why():
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    assert why_not_modelled(BOX, ReplayBuffer) is None and why_not_modelled(DICT, DictReplayBuffer) is None
    for space in (image, spaces.Discrete(3), spaces.MultiBinary(4), spaces.Dict({"a": BOX, "b": image})):
        assert "the observations hold" in why_not_modelled(space, ReplayBuffer)
    assert "for images" in why_not_modelled(spaces.Box(0.0, 1.0, (3, 36, 36), np.float32), ReplayBuffer)
    assert "goals" in why_not_modelled(DICT, HerReplayBuffer)


@pytest.mark.parametrize(
    ("observations", "rewards", "infos", "name"),
    [
        (np.array([[np.nan, 0.0]]), np.zeros(1), [{}], "observation"),
        ({"a": np.zeros((1, 1)), "z": np.array([[np.inf]])}, np.zeros(1), [{}], "observation"),
        (np.zeros((1, 2)), np.array([np.nan]), [{}], "reward"),
        (np.zeros((1, 2)), np.zeros(1), [{"terminal_observation": np.array([0.0, np.nan])}], "terminal observation"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(observations, rewards, infos, name):
    with pytest.raises(ValueError, match=f"its {name} is .*was not stored"):
        check_finite(np.zeros((1, 2)), observations, rewards, infos, None)


def test_no_terminal_observation_is_none_that_is_not_finite():
    """SB3, too, takes ``None`` for an entry that is not there."""
    check_finite(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1), [{"terminal_observation": None}], None)


def test_a_reset_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="its observation is"):
        check_finite(np.array([[np.nan]]), np.zeros((1, 1)), np.zeros(1), [{}], None)


def test_dict_observations_are_flattened_in_the_spaces_own_order():
    layout = ObservationLayout(DICT)
    keys = list(DICT.spaces)
    parts = {"z": np.array([[[1.0, 2.0]]]), "a": np.array([[3.0]])}
    expected = np.concatenate([parts[key].reshape(1, -1) for key in keys], axis=1)
    flat = layout.flatten(parts)
    np.testing.assert_array_equal(flat, expected)
    back = layout.policy_input(th.as_tensor(flat), None)
    assert all((back[key] == th.as_tensor(parts[key])).all() for key in keys)
