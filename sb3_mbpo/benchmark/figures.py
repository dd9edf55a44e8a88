"""The pictures of the report: opaque light cards with dark text, for light and dark pages."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from sb3_mbpo.benchmark.statistics import Estimate

#: Okabe and Ito's colours, which colour-blind people can tell apart, but for yellow, which fades on a light page.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: 20,000 and 0.25
NUMBERS = StrMethodFormatter("{x:,.10g}")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
CARD, INK, RULE = "#FFFFFF", "#1F2328", "#D8DCE0"
LOOK: dict[Any, Any] = {
    "figure.facecolor": CARD,
    "axes.facecolor": CARD,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 14,
    "axes.titlesize": 15,
    "axes.labelsize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.06,
}


class Style(NamedTuple):
    """How an algorithm looks in all pictures."""

    color: str
    marker: str


class Curve(NamedTuple):
    """What one algorithm learned on one environment."""

    #: Environment steps of the evaluations, (evaluations,)
    steps: np.ndarray
    #: Wall-clock time until then, mean of the seeds, (evaluations,)
    seconds: np.ndarray
    #: Of the return over the seeds, (evaluations,)
    estimate: Estimate
    seeds: int


def make_styles(algorithms: Iterable[str]) -> dict[str, Style]:
    """:return: a colour and a marker for each algorithm; the pair is unique for the first 63"""
    return {
        name: Style(COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]) for number, name in enumerate(algorithms)
    }


def draw_curves(path: Path, environment: str, curves: Mapping[str, Curve], styles: Mapping[str, Style], time: str) -> None:
    """
    Learning curves by environment steps and by wall-clock time.

    :param path: of the PNG
    :param environment: its name, for the title
    :param curves: by algorithm; at least one
    :param styles: by algorithm
    :param time: what the wall-clock time is of
    """
    longest = max(curve.seconds.max() for curve in curves.values())
    unit, seconds = ("hours", 3600) if longest >= 7200 else ("minutes", 60)
    labels = {name: f"{name} ({count(curve.seeds, 'seed')})" for name, curve in curves.items()}
    columns = max(1, min(len(labels), int(12 / (1 + 0.1 * max(map(len, labels.values()))))))  # a letter takes 0.1 inch
    with _card(path, 12.0, 5.2 + 0.3 * math.ceil(len(labels) / columns)) as figure:
        by_steps, by_time = figure.subplots(1, 2, sharey=True)
        for name, curve in curves.items():
            _draw_curve(by_steps, curve.steps, curve, styles[name], labels[name])
            _draw_curve(by_time, curve.seconds / seconds, curve, styles[name])
        by_steps.set(xlabel="environment steps", ylabel="return")
        by_time.set(xlabel=f"{unit} of {time}")
        for axes in (by_steps, by_time):
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(NUMBERS)
            axes.yaxis.set_major_formatter(NUMBERS)
            axes.set_xlim(left=0)
        figure.suptitle(environment, fontsize=17, color=INK)
        figure.legend(loc="outside lower center", ncols=columns)


def _draw_curve(axes: Axes, x: np.ndarray, curve: Curve, style: Style, label: str | None = None) -> None:
    estimate = curve.estimate
    every = 0.08 if np.isfinite(estimate.value).sum() > 10 else 1  # all points, or as far apart as the eye wants them
    axes.plot(x, estimate.value, color=style.color, marker=style.marker, markevery=every, label=label)
    axes.fill_between(x, estimate.low, estimate.high, color=style.color, alpha=0.15, linewidth=0)


def draw_aggregate(
    path: Path,
    scores: Mapping[str, Estimate],
    improvements: Mapping[str, Estimate],
    baseline: str,
    styles: Mapping[str, Style],
) -> None:
    """
    Points with intervals, one row per algorithm.

    :param path: of the PNG
    :param scores: by algorithm
    :param improvements: probabilities of improvement over the baseline, by algorithm; if empty, they have no panel
    :param baseline: its name
    :param styles: by algorithm
    """
    names = list(styles)
    with _card(path, 12.0, 1.6 + 0.5 * len(names)) as figure:
        panels = figure.subplots(1, 2 if improvements else 1, sharey=True, squeeze=False, gridspec_kw={"wspace": 0.1})[0]
        for axes, estimates in zip(panels, (scores, improvements), strict=False):
            for row, name in enumerate(names):
                if name in estimates:
                    _draw_interval(axes, row, estimates[name], styles[name])
            axes.grid(axis="x")
            axes.tick_params(left=False)
            axes.spines["left"].set_visible(False)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        low, high = panels[0].get_xlim()
        panels[0].set_xlim(min(low, -0.03), max(high, 1.03))
        panels[0].set_xlabel("score at the end (interquartile mean)")
        if improvements:
            panels[1].axvline(0.5, color=INK, linestyle="--", linewidth=1.2)
            panels[1].set_xlim(-0.03, 1.03)
            panels[1].set_xlabel(f"probability of improvement over {baseline}")


def _draw_interval(axes: Axes, row: int, estimate: Estimate, style: Style) -> None:
    axes.plot([estimate.low, estimate.high], [row, row], color=style.color, alpha=0.35, linewidth=11, solid_capstyle="butt")
    axes.plot(estimate.value, row, color=style.color, marker=style.marker, markersize=9)


def count(number: int, what: str) -> str:
    """:return: "1 seed", "2 seeds" and so on"""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@contextmanager
def _card(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure (inches) that is saved at the end, whatever the user's own style of Matplotlib is."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=150)
