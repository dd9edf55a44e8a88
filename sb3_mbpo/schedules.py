"""What changes with the number of environment steps, and the sizes that follow from it."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from sb3_mbpo.type_aliases import RolloutLength


def is_positive_int(value: Any) -> bool:
    """Whether it is an int of at least 1, NumPy's included; ``True`` is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_positive(name: str, value: int) -> int:
    """
    :param name: of a parameter
    :param value: that it was given
    :return: the same, as Python's own int
    :raises ValueError: when it is not an int of at least 1
    """
    if not is_positive_int(value):
        raise ValueError(f"`{name}` must be an int of at least 1, but got {value!r}.")
    return int(value)


def check_rollout_length(rollout_length: int | Sequence[int]) -> RolloutLength:
    """
    :param rollout_length: an int, or ``(start_step, end_step, k_first, k_last)``
    :return: the same, as an int or a tuple of four ints
    :raises ValueError: when it is neither, a length is below 1, or the schedule ends before it starts
    """
    remedy = "Pass an int such as 1, or (start_step, end_step, k_first, k_last) such as (20_000, 150_000, 1, 15)."
    values = tuple(rollout_length) if isinstance(rollout_length, Sequence) else (rollout_length,)
    if len(values) not in (1, 4) or not all(isinstance(value, Integral) for value in values):
        raise ValueError(f"`rollout_length` must be one int or four ints, but got {rollout_length!r}. {remedy}")
    if min(values[-2:]) < 1:
        raise ValueError(f"`rollout_length` must be at least 1 step, but got {rollout_length!r}. {remedy}")
    if len(values) == 1:
        return int(values[0])
    start_step, end_step, k_first, k_last = map(int, values)
    if end_step < start_step:
        raise ValueError(
            f"`rollout_length`={rollout_length!r} is a schedule that ends (step {end_step}) before it starts. {remedy}"
        )
    return start_step, end_step, k_first, k_last


def rollout_length_at(step: int, rollout_length: RolloutLength) -> int:
    """
    The length k of imagined rollouts: linear in environment steps, rounded down (Janner et al. 2019, appendix C).

    :param step: number of environment steps so far
    :param rollout_length: constant, or ``(start_step, end_step, k_first, k_last)``
    """
    if isinstance(rollout_length, int):
        return rollout_length
    start_step, end_step, k_first, k_last = rollout_length
    if step >= end_step:
        return k_last
    if step <= start_step:
        return k_first
    return int(k_first + (k_last - k_first) * (step - start_step) / (end_step - start_step))


def real_ratio_at(progress_remaining: float, real_ratio: float | Callable[[float], float]) -> float:
    """
    :param progress_remaining: from 1 (start of ``learn``) to 0 (its end); below, where SB3's last rollout overshoots, it
        counts as 0
    :param real_ratio: share of real rows in a batch, or a schedule of it
    :raises ValueError: when the share is no number, or lies outside [0, 1]
    """
    ratio = real_ratio(max(progress_remaining, 0.0)) if callable(real_ratio) else real_ratio
    if not isinstance(ratio, Real) or not 0.0 <= float(ratio) <= 1.0:
        raise ValueError(
            "`real_ratio` must be a number between 0 (only imagined rows) and 1 (plain SAC), or a schedule of such numbers, "
            f"but got {ratio!r}. The paper uses 0.05."
        )
    return float(ratio)


def imagined_capacity(
    rollout_batch_size: int, rollout_length: int, rollout_retain_steps: int, dynamics_train_freq: int
) -> int:
    """
    Rows that full-length rollouts fill in ``rollout_retain_steps`` environment steps; at least one round.

    :param rollout_batch_size: branches per round of imagination
    :param rollout_length: k, the steps of one branch
    :param rollout_retain_steps: environment steps
    :param dynamics_train_freq: environment steps between two rounds
    """
    round_size = rollout_batch_size * rollout_length
    return max(round_size, round_size * rollout_retain_steps // dynamics_train_freq)
