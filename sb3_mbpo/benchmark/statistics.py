"""
What the report computes. Interquartile means, probabilities of improvement and their intervals follow Agarwal et al. 2021
(arXiv 2108.13264) and their library rliable.

Tables of evaluations are those of :func:`sb3_mbpo.benchmark.results.load_results`, or parts of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, mannwhitneyu, trim_mean

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A statistic and its 95 % interval; NaN where there is none."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Reached(NamedTuple):
    """How many seeds reached a threshold."""

    #: After these environment steps half of the seeds had reached it; ``None``: fewer ever did.
    steps: int | None
    seeds: int
    all_seeds: int


def interquartile_mean(samples: Sequence[np.ndarray], rng: np.random.Generator) -> Estimate:
    """
    The mean of the middle half of all runs of all environments: a quarter, rounded down, is cut from either end. So the
    mean of fewer than four runs is their plain mean.

    :param samples: one array per environment, (..., runs of this environment)
    :param rng: draws the runs of the bootstrap anew, within each environment
    :return: arrays of shape (...). All NaN where a run is not finite; no interval if an environment has a single run
    """

    def statistic(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(trim_mean(np.concatenate(resampled, axis=axis), proportiontocut=0.25, axis=axis))

    return _estimate(statistic, samples, rng)


def probability_of_improvement(
    samples: Sequence[np.ndarray], baselines: Sequence[np.ndarray], rng: np.random.Generator
) -> Estimate:
    """
    How probable it is that a run beats a run of the baseline on the same environment; a tie counts one half. The mean of
    the environments.

    :param samples: one array per environment, (..., runs)
    :param baselines: the runs of the baseline on the same environments, in the same order
    :param rng: draws the runs of the bootstrap anew, within each environment and of each algorithm
    :return: as of :func:`interquartile_mean`
    """
    n_environments = len(samples)

    def statistic(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        pairs = zip(resampled[:n_environments], resampled[n_environments:], strict=True)
        return np.asarray(np.mean([_share_of_wins(runs, others, axis) for runs, others in pairs], axis=0))

    return _estimate(statistic, [*samples, *baselines], rng)


def _share_of_wins(runs: np.ndarray, others: np.ndarray, axis: int) -> np.ndarray:
    test = mannwhitneyu(runs, others, axis=axis, method="asymptotic")
    return np.asarray(test.statistic / (runs.shape[axis] * others.shape[axis]))


def _estimate(statistic: Callable[..., np.ndarray], samples: Sequence[np.ndarray], rng: np.random.Generator) -> Estimate:
    finite = np.all([np.isfinite(runs).all(axis=-1) for runs in samples], axis=0)
    samples = [np.where(finite[..., None], runs, 0.0) for runs in samples]  # else trimming would hide a NaN
    value = statistic(*samples)
    low = high = np.full_like(value, np.nan)
    if min(runs.shape[-1] for runs in samples) > 1:
        options = {"n_resamples": RESAMPLES, "batch": 1000, "method": "percentile", "vectorized": True, "axis": -1}
        low, high = bootstrap(samples, statistic, confidence_level=0.95, rng=rng, **options).confidence_interval
    return Estimate(*(np.where(finite, part, np.nan) for part in (value, low, high)))


def common_evaluations(evaluations: pd.DataFrame) -> pd.DataFrame:
    """:return: the rows at steps that all seeds of this algorithm on this environment were evaluated at"""
    seeds = evaluations.groupby(["environment", "algorithm"])["seed"].transform("nunique")
    seeds_here = evaluations.groupby(["environment", "algorithm", "steps"])["seed"].transform("nunique")
    return evaluations[seeds_here == seeds]


def last_evaluations(common: pd.DataFrame, number: int = 1) -> pd.DataFrame:
    """
    :param common: see :func:`common_evaluations`
    :param number: of evaluations
    :return: the last rows of each run
    """
    return common.groupby(["environment", "algorithm", "seed"]).tail(number)


def score_range(common: pd.DataFrame) -> tuple[float, float]:
    """
    :param common: evaluations of one environment, see :func:`common_evaluations`
    :return: the lowest and the highest mean over the seeds that any algorithm had at any evaluation
    """
    means = common.groupby(["algorithm", "steps"])["return_mean"].agg(lambda returns: returns.mean(skipna=False))
    means = means[np.isfinite(means)]
    return float(means.min()), float(means.max())


def steps_to_threshold(evaluations: pd.DataFrame, threshold: float) -> Reached:
    """
    The median over the seeds of the first evaluation that reaches the threshold. A seed that never does counts as
    infinitely late, and of two medians the lower one is taken: so there is one as soon as half of the seeds reach it.

    :param evaluations: of one algorithm on one environment
    :param threshold: a return
    """
    returns = evaluations["return_mean"]
    reaches = (returns >= threshold) | np.isclose(returns, threshold, rtol=1e-9, atol=0)  # a mean of equals is rounded
    first = sorted(evaluations[reaches & np.isfinite(returns)].groupby("seed")["steps"].min())
    seeds = evaluations["seed"].nunique()
    middle = (seeds - 1) // 2
    return Reached(int(first[middle]) if len(first) > middle else None, len(first), seeds)
