"""The counts hold for any sizes, not only for those of the other tests. Each is held against a plain list or loop."""

import itertools
import math
import warnings
from collections import deque
from dataclasses import astuple
from fractions import Fraction

import numpy as np
import pytest
import torch as th
from conftest import ACTIVE, LineEnv, make_dynamics
from gymnasium import spaces
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from test_imagination import CountingDynamics, no_action, starts

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.buffers import ModelAugmentedReplayBuffer, count_usable, draw_observations, real_transitions
from sb3_mbpo.fit import MIN_TRANSITIONS
from sb3_mbpo.imagination import imagine, imagine_round
from sb3_mbpo.imagined_buffer import ImaginedBuffer
from sb3_mbpo.observations import ObservationLayout
from sb3_mbpo.schedules import check_rollout_length, imagined_capacity, real_ratio_at, rollout_length_at
from sb3_mbpo.type_aliases import Transitions

CPU = th.device("cpu")
ACTION = spaces.Box(-1.0, 1.0, (2,), np.float32)
BOX = spaces.Box(-1.0, 1.0, (3,), np.float64)
DICT = spaces.Dict({"z": spaces.Box(-1.0, 1.0, (1, 2), np.float32), "a": spaces.Box(-1.0, 1.0, (1,), np.float64)})


def repeatable(max_examples: int, **more) -> settings:
    return settings(max_examples=max_examples, deadline=None, derandomize=True, **more)


def imagined(tags, obs_dim: int = 3, action_dim: int = 2) -> Transitions:
    """No two rows, and no two columns of a row, are the same. Actions are negative."""
    rewards = th.as_tensor(tags, dtype=th.float32)
    observations = rewards[:, None] + th.arange(obs_dim) / 8
    actions = -rewards[:, None] - th.arange(action_dim) / 8
    return Transitions(observations, actions, observations + 5000, rewards, rewards % 3 == 0)


def same(got: Transitions, expected: Transitions) -> bool:
    return all(a.dtype == b.dtype and th.equal(a, b) for a, b in zip(got, expected, strict=True))


def store(buffer: ReplayBuffer, n_steps: int, outcomes: str) -> list[list[tuple[float, ...]]]:
    """Per step and environment: begin, following, reward, done, timeout. ``-`` goes on, ``e`` ends, ``t`` times out."""

    def observation(values):
        space = buffer.observation_space
        shapes = {key: part.shape for key, part in space.items()} if isinstance(space, spaces.Dict) else {"": space.shape}
        parts = {key: np.stack([np.full(shape, value) for value in values]) for key, shape in shapes.items()}
        return parts.get("", parts)

    numbers, repeated = itertools.count(1), itertools.cycle(outcomes)
    begins, steps = [next(numbers) for _ in range(buffer.n_envs)], []
    for _ in range(n_steps):
        following, outcome = [[next(source) for _ in begins] for source in (numbers, repeated)]
        rewards, dones = [-begin / 2 for begin in begins], [end != "-" for end in outcome]
        infos = [{"TimeLimit.truncated": end == "t"} for end in outcome]
        arrays = [np.array(values) for values in ([[begin, begin] for begin in begins], rewards, dones)]
        buffer.add(observation(begins), observation(following), *arrays, infos)
        steps.append(list(zip(begins, following, rewards, dones, [end == "t" for end in outcome], strict=True)))
        begins = [next(numbers) if done else value for value, done in zip(following, dones, strict=True)]
    return steps


sizes, environments, lives = st.integers(1, 40), st.integers(1, 5), st.dictionaries(st.integers(0, 30), st.integers(1, 6))
outcomes = st.text("-et", min_size=1, max_size=7)


operations = ["add", "add", "resize", "grow", "newest", "sample", "round trip"]


@repeatable(600)
@given(
    sizes, st.integers(1, 4), st.integers(1, 3), st.integers(0, 80),
    st.lists(st.tuples(st.sampled_from(operations), st.integers(0, 120)), max_size=16),
)  # fmt: skip
def test_the_ring_is_a_list_of_the_newest_rows(capacity, obs_dim, action_dim, reserved, operations):
    ring, generator = ImaginedBuffer(capacity, obs_dim, action_dim, CPU, reserved), th.Generator().manual_seed(0)
    held, tags = deque(maxlen=capacity), itertools.count(1)
    for operation, amount in [*operations, ("newest", 10**6), ("sample", 200)]:
        memory = ring._rows
        if operation == "add":
            new = [next(tags) for _ in range(amount)]
            ring.add(imagined(new, obs_dim, action_dim))
            held.extend(new)
        elif operation in ("resize", "grow"):
            capacity = capacity + amount // 10 if operation == "grow" else amount // 3 + 1
            is_within = ring.capacity <= capacity <= len(memory)
            ring.resize(capacity)
            assert not is_within or ring._rows is memory
            held = deque(held, maxlen=capacity)
        elif operation == "round trip":
            rows, pos = ring.ring()
            assert sorted(row[-2] for row in rows.tolist()) == sorted(held)
            ring = ImaginedBuffer(1, obs_dim, action_dim, CPU, reserved + amount % 3)
            ring.set_ring(capacity, rows.copy(), pos)
        elif operation == "newest":
            expected = list(held)[max(0, len(held) - amount) :]
            assert same(ring.newest(amount), imagined(expected, obs_dim, action_dim))
        elif held:
            drawn = ring.sample(amount, generator)
            drawn_tags = [int(reward) for reward in drawn.rewards]
            assert len(drawn_tags) == amount and set(drawn_tags) <= set(held)
            assert same(drawn, imagined(drawn_tags, obs_dim, action_dim))
        assert (ring.capacity, len(ring)) == (capacity, len(held))
        stored, _ = ring.ring()
        assert sorted(stored[:, -2].tolist()) == sorted(held)


@repeatable(300)
@given(sizes, environments, st.integers(0, 50), outcomes, st.sampled_from(["box", "dict", "memory-optimised"]))
def test_real_transitions_are_a_list_of_the_last_steps(buffer_size, n_envs, n_steps, outcomes, kind):
    optimised, space = kind == "memory-optimised", DICT if kind == "dict" else BOX
    buffer_class = DictReplayBuffer if kind == "dict" else ReplayBuffer
    saving = dict(optimize_memory_usage=optimised, handle_timeout_termination=not optimised)
    buffer = buffer_class(buffer_size, space, ACTION, CPU, n_envs, **saving)
    slots = max(1, buffer_size // n_envs)
    stored = store(buffer, n_steps, outcomes)
    held = sorted(range(max(0, n_steps - slots), n_steps), key=lambda step: step % slots)
    if optimised and n_steps >= slots:
        held.remove(n_steps - slots)  # the newest next observation lies in its place
    begins = [row[0] for step in held for row in stored[step]]
    expected = [row for step in held for row in stored[step] if not (optimised and row[3])]
    data = real_transitions(buffer, ObservationLayout(space), CPU)
    assert count_usable(buffer) == data.n_rows == len(expected)
    assert [field.shape[1:] for field in data] == [(3,), (2,), (3,), (), ()]
    assert [field.dtype for field in data] == [th.float32] * 4 + [th.bool]
    fields = [*(data.observations.T), *(data.actions.T), *(data.next_observations.T), data.rewards, data.terminated]
    got = list(zip(*(field.tolist() for field in fields), strict=True))
    assert got == [(b, b, b, b, b, f, f, f, r, done and not late) for b, f, r, done, late in expected]
    if begins:
        observations = draw_observations(buffer, ObservationLayout(space), 20 * len(begins), th.Generator().manual_seed(0))
        assert observations.dtype == th.float32 and observations.shape == (20 * len(begins), 3)
        assert {tuple(row) for row in observations.tolist()} == {(begin,) * 3 for begin in begins}


@repeatable(200)
@given(
    st.sampled_from([ReplayBuffer, DictReplayBuffer, NStepReplayBuffer]), sizes, environments, st.integers(1, 50), outcomes,
    st.integers(1, 5), sizes, st.integers(0, 100), st.floats(0, 1), st.integers(1, 5), st.integers(1, 150),
)  # fmt: skip
def test_every_batch_has_its_share_and_its_rows_are_whole(
    buffer_class, buffer_size, n_envs, n_stored, outcomes, n_steps, capacity, n_imagined, real_ratio, n_batches, batch_size
):
    space, is_n_step = DICT if buffer_class is DictReplayBuffer else BOX, buffer_class is NStepReplayBuffer
    real = buffer_class(buffer_size, space, ACTION, CPU, n_envs, **(dict(n_steps=n_steps, gamma=0.5) if is_n_step else {}))
    steps = store(real, n_stored, outcomes)[-max(1, buffer_size // n_envs) :]
    real_rows = {row[0]: row[1:] for rows in steps for row in rows}
    ring, generator = ImaginedBuffer(capacity, 3, 2, CPU), th.Generator().manual_seed(0)
    ring.add(imagined(range(1, n_imagined + 1)))
    n_real = round(real_ratio * batch_size) if n_imagined else batch_size
    buffer = ModelAugmentedReplayBuffer(real, ring, ObservationLayout(space), real_ratio, 0.75, generator)

    def flat(part):
        return th.cat([part[key].reshape(batch_size, -1) for key in space.spaces], dim=1) if space is DICT else part

    batches = list(buffer.sample_batches(n_batches, batch_size))
    assert len(batches) == n_batches
    for batch in batches:
        fields = [flat(batch.observations), batch.actions, flat(batch.next_observations), batch.rewards, batch.dones]
        assert [field.shape for field in fields] == [(batch_size, width) for width in (3, 2, 3, 1, 1)]
        assert all(field.dtype == th.float32 for field in fields)
        is_real = batch.actions[:, 0] > 0
        assert is_real.sum() == n_real
        for begin, action, following, reward, done in zip(*(field[is_real].tolist() for field in fields), strict=True):
            end, earned, is_done, is_late = real_rows[action[0]]
            assert begin == [action[0]] * 3 and action[0] == action[1]
            assert is_n_step or (following, reward, done) == ([end] * 3, [earned], [is_done and not is_late])
        tags = [-int(action) for action in batch.actions[~is_real, 0]]
        assert set(tags) <= set(range(max(1, n_imagined - capacity + 1), n_imagined + 1))
        whole = Transitions(*(field[~is_real] for field in fields[:3]), *(field[~is_real, 0] for field in fields[3:]))
        assert same(whole._replace(terminated=whole.terminated > 0), imagined(tags))
        if is_n_step:
            assert set(batch.discounts[is_real].flatten().tolist()) <= {0.5**power for power in range(1, n_steps + 1)}
            assert batch.discounts[~is_real].flatten().tolist() == [0.75] * len(tags)


def schedules(max_step: int, max_length: int) -> st.SearchStrategy:
    steps = st.tuples(*[st.integers(0, max_step)] * 2).map(sorted)
    return st.builds(lambda ends, lengths: (*ends, *lengths), steps, st.tuples(*[st.integers(1, max_length)] * 2))


def plain_length(step: int, rollout_length: int | tuple[int, int, int, int]) -> int:
    if isinstance(rollout_length, int):
        return rollout_length
    start_step, end_step, k_first, k_last = rollout_length
    if not start_step < step < end_step:
        return k_last if step >= end_step else k_first
    return math.floor(k_first + (k_last - k_first) * Fraction(step - start_step, end_step - start_step))


def plain_capacity(batch: int, length: int, retain: int, freq: int) -> int:
    return max(batch * length, math.floor(Fraction(batch * length * retain, freq)))


@repeatable(300)
@given(schedules(10_000, 100), st.lists(st.integers(0, 10_000), max_size=30))
def test_rollout_lengths_go_one_way_from_the_first_to_the_last(schedule, steps):
    assert check_rollout_length(schedule) == check_rollout_length(list(schedule)) == schedule
    start_step, end_step, k_first, k_last = schedule
    steps = sorted([*steps, start_step - 1, start_step, end_step])
    lengths = [rollout_length_at(step, schedule) for step in steps]
    assert lengths == [plain_length(step, schedule) for step in steps]
    assert (lengths[steps.index(start_step - 1)], lengths[-1]) == (k_first, k_last)
    assert all(min(k_first, k_last) <= length <= max(k_first, k_last) for length in lengths)
    assert lengths == sorted(lengths, reverse=k_last < k_first)


@repeatable(200)
@given(*[st.integers(1, 10**6)] * 4)
def test_the_imagined_capacity_is_exact_and_holds_a_round(batch, length, retain, freq):
    assert imagined_capacity(batch, length, retain, freq) == plain_capacity(batch, length, retain, freq)


@repeatable(200)
@given(st.floats(), st.floats(0, 1))
def test_a_real_ratio_is_a_share_or_refused(ratio, progress):
    assert real_ratio_at(progress, lambda remaining: remaining) == real_ratio_at(0.5, progress) == progress
    for value in (ratio, lambda _: ratio):
        if 0 <= ratio <= 1:
            assert real_ratio_at(progress, value) == ratio
        else:
            with pytest.raises(ValueError, match="real_ratio"):
                real_ratio_at(progress, value)


@repeatable(100)
@given(st.integers(1, 200), st.integers(1, 6), st.sets(st.integers(0, 2), min_size=1), st.floats(-3, 8, width=32))
def test_branches_begin_where_the_living_ones_came_to(batch, length, elites, limit):
    generator = th.Generator().manual_seed(batch)
    dynamics, members = make_dynamics(generator, net_arch=[4]), []
    dynamics.termination_fn = lambda observations, actions, following: following[:, 0] > limit
    step = dynamics.step
    dynamics.step = lambda *arguments: members.extend(arguments[2].tolist()) or step(*arguments)
    begins = th.randn(batch, 2, generator=generator)
    rows, _ = imagine(dynamics, lambda observations: observations[:, :1].tanh(), begins, length, sorted(elites), generator)
    alive, position = begins.tolist(), 0
    for _ in range(length):
        here = rows.rows(th.arange(position, position + len(alive)))
        assert here.observations.tolist() == alive
        assert here.terminated.tolist() == [following > limit for following in here.next_observations[:, 0].tolist()]
        position += len(alive)
        alive = [following for following in here.next_observations.tolist() if following[0] <= limit]
    assert rows.n_rows == len(members) == position and set(members) <= elites
    assert (rows.actions == rows.observations[:, :1].tanh()).all()


@repeatable(100)
@given(st.integers(1, 200), st.integers(1, 6), lives, lives, st.integers(1, 300))
def test_every_branch_lives_until_it_ends_or_breaks(batch, length, ends, breaks, block_size):
    n_steps = [min(length, ends.get(name, length), breaks.get(name, length)) for name in range(batch)]
    n_rows = [steps - (breaks.get(name) == steps) for name, steps in enumerate(n_steps)]
    dynamics, blocks = CountingDynamics(ends, breaks), []
    arguments = dynamics, no_action, starts(batch), length, [0], th.Generator().manual_seed(0), blocks.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_mbpo.imagination.BLOCK_SIZE", block_size)
        if not any(n_rows):
            with pytest.raises(ValueError, match="No imagined row is finite"):
                imagine_round(*arguments)
            return
        result = imagine_round(*arguments)
    names = th.cat([block.observations[:, 0] for block in blocks]).tolist()
    assert len(blocks) == math.ceil(batch / block_size)
    assert all(block.n_rows <= block_size * length for block in blocks)
    n_broken = sum(breaks.get(name) == steps for name, steps in enumerate(n_steps))
    n_ended = sum(ends.get(name) == steps != breaks.get(name) for name, steps in enumerate(n_steps))
    assert astuple(result) == (sum(n_rows), n_ended, n_broken, 0)
    assert [names.count(name) for name in range(batch)] == n_rows and sum(dynamics.batch_sizes) == sum(n_steps)


def n_updates(optimizer: th.optim.Optimizer) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values()}


@repeatable(80, phases=[Phase.generate])  # to shrink a failure takes minutes
@given(
    st.integers(1, 4), st.fixed_dictionaries(dict(
        buffer_size=sizes | st.integers(1, 400), batch_size=st.integers(1, 300), learning_starts=st.integers(1, 40),
        train_freq=st.integers(1, 7), gradient_steps=st.sampled_from([-1, 1, 3]), n_steps=st.sampled_from([1, 3]),
        rollout_length=st.integers(1, 5) | schedules(100, 5), rollout_batch_size=st.integers(1, 200),
        rollout_retain_steps=st.integers(1, 200), dynamics_train_freq=st.integers(1, 50), policy_delay=st.integers(1, 4),
        real_ratio=st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0, lambda progress: progress]),
        termination_fn=st.sampled_from([None, lambda obs, action, following: abs(following[:, 0]) > 3]),
    )),
)  # fmt: skip
def test_any_settings_learn_and_count_exactly(n_envs, kwargs):
    dynamics_kwargs = ACTIVE["dynamics_kwargs"] | dict(max_gradient_steps=3)
    tiny = dict(policy_kwargs=dict(net_arch=[4]), dynamics_kwargs=dynamics_kwargs, seed=0, device="cpu")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr("sb3_mbpo.fit.TERMINATION_STEPS", 3)
        model = MBPO("MlpPolicy", make_vec_env(LineEnv, n_envs), **tiny, **kwargs).learn(83)  # prime: rollouts overshoot

    per_call, batch, freq = kwargs["train_freq"] * n_envs, kwargs["rollout_batch_size"], kwargs["dynamics_train_freq"]
    slots = max(1, kwargs["buffer_size"] // n_envs)
    steps = updates = fits = fewest = most = last_fit = 0
    capacity = plain_capacity(batch, plain_length(0, kwargs["rollout_length"]), kwargs["rollout_retain_steps"], freq)
    while steps < 83:
        steps += per_call
        if steps <= kwargs["learning_starts"]:
            continue
        is_enough = min(steps // n_envs, slots) * n_envs >= MIN_TRANSITIONS
        if kwargs["real_ratio"] != 1 and is_enough and (fits == 0 or steps // freq > last_fit // freq):
            fits, last_fit, length = fits + 1, steps, plain_length(steps, kwargs["rollout_length"])
            capacity = plain_capacity(batch, length, kwargs["rollout_retain_steps"], freq)
            fewest, most = min(capacity, fewest + batch), min(capacity, most + batch * length)
        updates += per_call if kwargs["gradient_steps"] == -1 else kwargs["gradient_steps"]

    buffer, ring = model.replay_buffer, model.imagined_buffer
    n_stored = steps // n_envs
    assert (model.num_timesteps, buffer.size(), buffer.pos) == (steps, min(n_stored, slots), n_stored % slots)
    assert ring.capacity == capacity and fewest <= len(ring) <= most
    assert n_updates(model.dynamics_optimizer) == ({3 * fits} if fits else set())
    assert {model._n_updates} == n_updates(model.critic.optimizer) == {updates}
    delay = 1 if model.idle_reason() else kwargs["policy_delay"]
    assert (model.idle_reason() is None) == (slots * n_envs >= MIN_TRANSITIONS)
    assert n_updates(model.actor.optimizer) == n_updates(model.ent_coef_optimizer) == {-(-updates // delay)}
    assert all(part.isfinite().all() for part in [*model.policy.parameters(), model.log_ent_coef, *ring.newest(len(ring))])


@repeatable(20, phases=[Phase.generate])
@given(
    st.integers(1, 4), st.fixed_dictionaries(dict(
        buffer_size=sizes | st.integers(1, 400), batch_size=st.integers(1, 300), learning_starts=st.integers(1, 40),
        train_freq=st.integers(1, 7), gradient_steps=st.sampled_from([-1, 1, 3]),
        rollout_length=st.integers(1, 5) | schedules(100, 5), rollout_batch_size=st.integers(1, 200),
        rollout_freq=st.integers(1, 50), gradient_horizon=st.integers(1, 3), dynamics_train_freq=st.integers(1, 50),
        termination_fn=st.sampled_from([None, lambda obs, action, following: abs(following[:, 0]) > 3]),
    )),
)  # fmt: skip
def test_any_settings_of_dhmbpo_learn_and_count_exactly(n_envs, kwargs):
    dynamics_kwargs = ACTIVE["dynamics_kwargs"] | dict(max_gradient_steps=3)
    tiny = dict(policy_kwargs=dict(net_arch=[4], n_critics=2), dynamics_kwargs=dynamics_kwargs, seed=0, device="cpu")
    imagined_at = []

    class Noting(DHMBPO):
        def imagine(self):
            imagined_at.append((self.num_timesteps, self._n_updates))
            return super().imagine()

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr("sb3_mbpo.fit.TERMINATION_STEPS", 3)
        model = Noting("MlpPolicy", make_vec_env(LineEnv, n_envs), **tiny, **kwargs).learn(83)

    per_call, freq = kwargs["train_freq"] * n_envs, kwargs["dynamics_train_freq"]
    slots = max(1, kwargs["buffer_size"] // n_envs)
    steps = updates = fits = last_fit = last_round = 0
    rounds = []
    while steps < 83:
        steps += per_call
        if steps <= kwargs["learning_starts"]:
            continue
        is_enough = min(steps // n_envs, slots) * n_envs >= MIN_TRANSITIONS
        is_idle = slots * n_envs < MIN_TRANSITIONS  # it runs as SAC
        if is_enough and (fits == 0 or steps // freq > last_fit // freq):
            fits, last_fit, last_round = fits + 1, steps, updates
            rounds.append((steps, updates))
        if is_idle or fits:
            for _ in range(per_call if kwargs["gradient_steps"] == -1 else kwargs["gradient_steps"]):
                if fits and updates - last_round >= kwargs["rollout_freq"]:
                    last_round = updates
                    rounds.append((steps, updates))
                updates += 1

    ring = model.imagined_buffer
    assert model.num_timesteps == steps and imagined_at == rounds
    assert n_updates(model.dynamics_optimizer) == ({3 * fits} if fits else set())
    length = plain_length(rounds[-1][0] if rounds else 0, kwargs["rollout_length"])
    assert ring.capacity == 10 * kwargs["rollout_batch_size"] * length
    assert {model._n_updates} == n_updates(model.actor.optimizer) == n_updates(model.ent_coef_optimizer) == {updates}
    assert n_updates(model.critic.optimizer) == {updates + fits * round(freq / 4)}
    assert all(part.isfinite().all() for part in [*model.policy.parameters(), model.log_ent_coef, *ring.newest(len(ring))])
