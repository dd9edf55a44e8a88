import pytest
import torch as th
from conftest import make_dynamics

from sb3_mbpo.imagination import imagine, imagine_round
from sb3_mbpo.type_aliases import Step, Transitions


class CountingDynamics:
    """
    A row's observation is its age, counted by one each step; its reward is the member that moved it. Rows whose first
    coordinate (their name) is listed end, break, or leave the data at the given age.
    """

    def __init__(self, ends=None, breaks=None, leaves=None) -> None:
        self.ends, self.breaks, self.leaves = ends or {}, breaks or {}, leaves or {}
        self.batch_sizes: list[int] = []

    def step(self, observations, actions, members, generator):
        self.batch_sizes.append(len(observations))
        names, ages = observations[:, 0].long().tolist(), (observations[:, 1] + 1).long().tolist()
        following = observations + th.tensor([0.0, 1.0])
        ended = th.tensor([self.ends.get(name) == age for name, age in zip(names, ages, strict=True)])
        broken = th.tensor([self.breaks.get(name) == age for name, age in zip(names, ages, strict=True)])
        following[broken] = th.nan
        self.gone = th.tensor([self.leaves.get(name) == age for name, age in zip(names, ages, strict=True)])
        return Step(following, members.float(), ended)

    def near_data(self, observations):
        return ~self.gone


def starts(n_rows: int) -> th.Tensor:
    return th.stack((th.arange(float(n_rows)), th.zeros(n_rows)), dim=1)


def no_action(observations: th.Tensor) -> th.Tensor:
    return th.zeros(len(observations), 1)


def test_ended_rows_are_stored_once_and_stepped_no_more(generator):
    dynamics = CountingDynamics(ends={0: 1, 3: 2, 4: 5})
    rows, _ = imagine(dynamics, no_action, starts(5), 5, [0], generator)
    assert dynamics.batch_sizes == [5, 4, 3, 3, 3]
    assert rows.n_rows == 18
    lengths = [int((rows.observations[:, 0] == name).sum()) for name in range(5)]
    assert lengths == [1, 5, 5, 2, 5]
    ended = rows.observations[rows.terminated, 0].tolist()
    assert sorted(ended) == [0, 3, 4]  # rows 1 and 2 reach the end of their branch: that is not terminal


def test_a_branch_goes_on_from_where_it_came_to(generator):
    rows, _ = imagine(CountingDynamics(), no_action, starts(3), 4, [0], generator)
    assert rows.observations[:, 1].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert (rows.next_observations[:, 1] == rows.observations[:, 1] + 1).all()
    assert not rows.terminated.any()


def test_it_stops_when_every_row_has_ended(generator):
    dynamics = CountingDynamics(ends={0: 1, 1: 2})
    assert imagine(dynamics, no_action, starts(2), 100, [0], generator)[0].n_rows == 3
    assert dynamics.batch_sizes == [2, 1]


def test_rows_that_are_not_finite_are_dropped_and_stepped_no_more(generator):
    dynamics = CountingDynamics(breaks={1: 2})
    rows, result = imagine(dynamics, no_action, starts(3), 3, [0], generator)
    assert dynamics.batch_sizes == [3, 3, 2]
    assert rows.n_rows == result.rows == 7
    assert rows.next_observations.isfinite().all()
    assert (result.not_finite, result.far_from_data, result.terminated) == (1, 0, 0)


def test_rows_that_leave_the_data_far_behind_are_dropped_and_stepped_no_more(generator):
    dynamics = CountingDynamics(ends={2: 1}, leaves={1: 2, 2: 1})
    rows, result = imagine(dynamics, no_action, starts(4), 3, [0], generator)
    assert dynamics.batch_sizes == [4, 3, 2]
    lengths = [int((rows.observations[:, 0] == name).sum()) for name in range(4)]
    assert lengths == [3, 1, 0, 3]
    assert (result.rows, result.not_finite, result.far_from_data, result.terminated) == (7, 0, 2, 0)


def test_a_round_in_which_all_rows_go_astray_is_empty(generator):
    rows, result = imagine(CountingDynamics(leaves={0: 1, 1: 1}), no_action, starts(2), 3, [0], generator)
    assert rows.n_rows == result.rows == 0 and result.far_from_data == 2


def round_in_blocks(monkeypatch, dynamics, n_starts, length, block_size, generator, policy=no_action):
    """:return: the rows of each block, as they were stored, and the counts of the round"""
    blocks: list[Transitions] = []
    monkeypatch.setattr("sb3_mbpo.imagination.BLOCK_SIZE", block_size)
    result = imagine_round(dynamics, policy, starts(n_starts), length, [0], generator, blocks.append)
    return blocks, result


@pytest.mark.parametrize(("n_starts", "block_size"), [(4097, 10), (4097, 4096), (30, 10), (3, 10), (10, 1)])
def test_a_round_stores_block_by_block_all_of_its_rows(monkeypatch, generator, n_starts, block_size):
    dynamics = CountingDynamics()
    blocks, result = round_in_blocks(monkeypatch, dynamics, n_starts, 3, block_size, generator)
    sizes = [block_size] * (n_starts // block_size) + [n_starts % block_size] * (n_starts % block_size > 0)
    assert [block.n_rows for block in blocks] == [3 * size for size in sizes]
    assert dynamics.batch_sizes == [size for size in sizes for _ in range(3)]  # no more rows at once
    assert (result.rows, result.terminated, result.not_finite, result.far_from_data) == (3 * n_starts, 0, 0, 0)
    first = 0
    for block, size in zip(blocks, sizes, strict=True):  # block by block, in each step by step, in each start by start
        assert block.observations[:, 0].tolist() == list(range(first, first + size)) * 3
        assert block.observations[:, 1].tolist() == [0] * size + [1] * size + [2] * size
        first += size


def test_a_block_is_stored_before_the_next_is_imagined(monkeypatch, generator):
    """So that the rows of no more than one block need memory beside the buffer."""
    dynamics, steps_before = CountingDynamics(), []
    monkeypatch.setattr("sb3_mbpo.imagination.BLOCK_SIZE", 2)
    arguments = starts(5), 4, [0], generator
    imagine_round(dynamics, no_action, *arguments, lambda rows: steps_before.append(len(dynamics.batch_sizes)))
    assert steps_before == [4, 8, 12]


def test_the_counts_of_a_round_are_those_of_all_blocks(monkeypatch, generator):
    ends, breaks, leaves = {0: 1, 11: 2, 12: 1, 24: 3}, {1: 1, 13: 2}, {2: 2, 14: 1, 23: 1}
    dynamics = CountingDynamics(ends, breaks, leaves)
    blocks, result = round_in_blocks(monkeypatch, dynamics, 25, 3, 10, generator)
    lost = sum(3 - age for age in ends.values()) + sum(4 - age for age in [*breaks.values(), *leaves.values()])
    assert (result.rows, result.terminated, result.not_finite, result.far_from_data) == (25 * 3 - lost, 4, 2, 3)
    assert [block.n_rows for block in blocks] == [30 - 2 - 3 - 2, 30 - 1 - 2 - 2 - 3, 15 - 3]


@pytest.mark.parametrize("block_size", [1, 2, 4096])
def test_when_no_row_of_a_round_is_finite_it_says_so(monkeypatch, generator, block_size):
    broken = dict.fromkeys(range(4), 1)
    with pytest.raises(ValueError, match="No imagined row is finite"):
        round_in_blocks(monkeypatch, CountingDynamics(breaks=broken), 4, 3, block_size, generator)


def test_a_block_without_a_finite_row_is_no_error(monkeypatch, generator):
    for broken in ([0, 1], [2, 3], [4]):  # the first block, another, the last
        dynamics = CountingDynamics(breaks=dict.fromkeys(broken, 1))
        blocks, result = round_in_blocks(monkeypatch, dynamics, 5, 2, 2, generator)
        assert result.rows == 2 * (5 - len(broken)) and result.not_finite == len(broken)
        assert sorted(th.cat([block.observations[:, 0] for block in blocks]).unique().tolist()) == sorted(
            set(range(5)) - set(broken)
        )


def test_a_round_that_is_far_from_the_data_or_not_finite_row_by_row_is_empty(monkeypatch, generator):
    dynamics = CountingDynamics(breaks={0: 1, 1: 1}, leaves={2: 1, 3: 1})
    _, result = round_in_blocks(monkeypatch, dynamics, 4, 2, 2, generator)
    assert (result.rows, result.not_finite, result.far_from_data) == (0, 2, 2)


def test_no_two_blocks_draw_the_same(monkeypatch, generator):
    dynamics, rows = make_dynamics(generator), []
    monkeypatch.setattr("sb3_mbpo.imagination.BLOCK_SIZE", 3)
    imagine_round(dynamics, no_action, th.zeros(9, 2), 1, [0, 2], generator, rows.append)
    assert th.cat([block.rewards for block in rows]).unique().numel() == 9


def test_elites_are_drawn_per_row_and_step_and_none_but_them(generator):
    rows, _ = imagine(CountingDynamics(), no_action, starts(3000), 2, [5, 1, 4], generator)
    first, second = rows.rewards[:3000], rows.rewards[3000:]
    for members in (first, second):
        for elite in (1, 4, 5):
            assert (members == elite).float().mean().item() == pytest.approx(1 / 3, abs=0.04)
    # independent from step to step: the same elite again in a third of the rows
    assert (first == second).float().mean().item() == pytest.approx(1 / 3, abs=0.04)


def test_actions_come_from_the_policy_at_each_step(generator):
    seen = []

    def policy(observations):
        seen.append(observations.clone())
        return observations[:, 1:] / 10

    rows, _ = imagine(CountingDynamics(), policy, starts(4), 3, [0], generator)
    assert (th.cat(seen) == rows.observations).all()
    th.testing.assert_close(rows.actions[:, 0], rows.observations[:, 1] / 10)


def test_the_real_dynamics_imagines_without_gradients(generator):
    dynamics = make_dynamics(generator)
    rows, _ = imagine(dynamics, no_action, th.randn(10, 2), 3, [0, 2], generator)
    assert rows.n_rows == 30 and not any(field.requires_grad for field in rows)
