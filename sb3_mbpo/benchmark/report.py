"""The report on what :mod:`sb3_mbpo.benchmark.results` has read: ``report.md`` and its pictures."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sb3_mbpo.benchmark.figures import Curve, Style, count, draw_aggregate, draw_curves, make_styles
from sb3_mbpo.benchmark.results import RunFiles, check_scores, join_runs, read_runs
from sb3_mbpo.benchmark.statistics import (
    RESAMPLES,
    Estimate,
    common_evaluations,
    interquartile_mean,
    last_evaluations,
    probability_of_improvement,
    score_range,
    steps_to_threshold,
)

HOW_TO_READ = f"""\
Returns are those of the deterministic policy, means of several episodes. The end of an algorithm is the last evaluation that
all its seeds have; "last three evaluations" has the mean and standard deviation, over the seeds, of each seed's mean in its
last three. Minutes include the time that a run was paused. The interquartile mean is the mean of the middle half of all runs:
a quarter of them, rounded down, is cut from either end, so that of fewer than four runs is the plain mean. Intervals are 95 %
percentile intervals of a stratified bootstrap: {RESAMPLES:,} times the runs are drawn anew, within each environment. They tell
of other seeds, not of other environments, and need two seeds at least on every environment. Of two or three seeds on one
environment they reach from the lowest to the highest. From few runs they come out too narrow: "1.00 to 1.00" says that every
run won, not that every other one will."""

#: A score below this is said to be little.
LITTLE = 0.1


class Benchmark(NamedTuple):
    """All that the sections of the report are made of."""

    runs: list[RunFiles]
    #: See :func:`sb3_mbpo.benchmark.results.load_results`.
    evaluations: pd.DataFrame
    #: Those that all seeds have.
    common: pd.DataFrame
    baseline: str
    #: By algorithm, in the order of the report.
    styles: dict[str, Style]
    out: Path
    rng: np.random.Generator

    @property
    def environments(self) -> list[str]:
        return sorted(self.evaluations["environment"].unique())


def write_report(folder: str | Path, out: str | Path | None = None, baseline: str | None = None) -> Path:
    """
    The same results give the same report: the bootstrap draws from a seed of its own.

    :param folder: see :func:`sb3_mbpo.benchmark.results.load_results`
    :param out: where the report and its pictures go; ``None``: ``report`` in ``folder``
    :param baseline: the algorithm that the others are compared with; ``None``: "SAC", or the first one by name
    :return: the report, ``report.md``
    :raises ValueError: as there, for an unknown baseline, or when runs disagree about the scores
    """
    runs = read_runs(Path(folder))
    evaluations = join_runs(runs)
    algorithms = sorted(evaluations["algorithm"].unique())
    if baseline is None:
        baseline = "SAC" if "SAC" in algorithms else algorithms[0]
    if baseline not in algorithms:
        raise ValueError(f"No run of {str(folder)!r} has the baseline {baseline!r}: pass one of {algorithms}.")
    out = Path(folder) / "report" if out is None else Path(out)
    common, rng = common_evaluations(evaluations), np.random.default_rng(0)
    benchmark = Benchmark(runs, evaluations, common, baseline, make_styles(algorithms), out, rng)
    ranges = {environment: _score_range(benchmark, environment) for environment in benchmark.environments}

    out.mkdir(parents=True, exist_ok=True)
    sections = ["# Benchmark", _summary(benchmark), *_what_to_know(benchmark), *_aggregate(benchmark, ranges)]
    for environment in benchmark.environments:
        sections += _environment(benchmark, environment, ranges[environment][:2])
    report = out / "report.md"
    sections += ["## How to read this", HOW_TO_READ, "## What it was run with", _provenance(runs)]
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return report


def _summary(benchmark: Benchmark) -> str:
    runs = count(len(benchmark.evaluations.groupby(["environment", "algorithm", "seed"])), "run")
    algorithms = count(len(benchmark.styles), "algorithm")
    environments = count(len(benchmark.environments), "environment")
    names = "; ".join(benchmark.styles)
    return f"{runs} of {algorithms} on {environments}: {names}. The baseline is {benchmark.baseline}."


def _what_to_know(benchmark: Benchmark) -> list[str]:
    """What is missing or odd, named run by run."""
    lines = []
    for run in benchmark.runs:
        table = run.evaluations
        if not len(table):
            lines.append(f"{run}: left out, it has no evaluation.")
            continue
        if table["steps"].iloc[-1] < run.info["steps"]:
            lines.append(f"{run}: not finished, {table['steps'].iloc[-1]:,} of {run.info['steps']:,} steps.")
        bad = table["steps"][~np.isfinite(table["return_mean"])]
        if len(bad):
            where = f"{count(len(bad), 'evaluation')}, first at {bad.iloc[0]:,} steps"
            lines.append(f"{run}: the return is not finite in {where}. What it enters is not finite either.")
    for (environment, algorithm), table in benchmark.evaluations.groupby(["environment", "algorithm"]):
        common = benchmark.common.query("environment == @environment and algorithm == @algorithm")
        if common.empty:
            lines.append(f"{environment}: {algorithm} left out, its seeds have no evaluation in common.")
        elif common["steps"].max() < table["steps"].max():
            last, longest = common["steps"].max(), table["steps"].max()
            lines.append(f"{environment}: {algorithm} ends at {last:,} steps, not all seeds have the rest up to {longest:,}.")
    for environment in benchmark.environments:
        ends = last_evaluations(benchmark.common.query("environment == @environment")).groupby("algorithm")
        steps = ends["steps"].first()
        if steps.nunique() > 1:
            differing = "; ".join(f"{algorithm} {end:,}" for algorithm, end in steps.items())
            lines.append(f"{environment}: the algorithms end at different steps: {differing}.")
        seeds = ends["seed"].agg(lambda found: ", ".join(map(str, sorted(found))))
        if seeds.nunique() > 1:
            differing = "; ".join(f"{algorithm} {found}" for algorithm, found in seeds.items())
            lines.append(f"{environment}: the algorithms have different seeds: {differing}. Compare them seed by seed.")
        machines = _machines(benchmark, environment)
        if len(machines) > 1:
            differing = ". ".join(f"{name}: {'; '.join(sorted(found))}" for name, found in sorted(machines.items()))
            lines.append(f"{environment}: minutes do not compare across machines and versions of PyTorch. {differing}.")
    seeds_of = benchmark.common.groupby(["environment", "algorithm"])["seed"].nunique()
    for environment, algorithm in seeds_of[seeds_of == 1].index:
        lines.append(f"{environment}: {algorithm} has one seed, so neither its curve there nor its score has an interval.")
    found = benchmark.common.groupby("algorithm")["environment"].agg(frozenset)
    if found.nunique() > 1:
        lines.append("Not all algorithms have the same environments, so their scores are means of different tasks.")
    return ["## What to know first", "\n".join(f"- {line}" for line in lines)] if lines else []


def _machines(benchmark: Benchmark, environment: str) -> dict[str, set[str]]:
    """:return: processors, cores and PyTorch of the runs that say which, and the algorithms that ran with each"""
    algorithms: dict[str, set[str]] = {}
    for run in benchmark.runs:
        if run.info["environment"] == environment:
            for stage in _stages(run):
                if stage.get("machine"):
                    made_with = dict(_made_with(stage))
                    parts = [f"{name} {made_with[name]}" for name in ("processor", "cores", "torch") if name in made_with]
                    algorithms.setdefault(", ".join(parts), set()).add(run.info["algorithm"])
    return algorithms


def _score_range(benchmark: Benchmark, environment: str) -> tuple[float, float, str]:
    """:return: the returns that count as 0 and 1, and where they are from"""
    runs = [run for run in benchmark.runs if run.info["environment"] == environment]
    given = set()
    for scores in (run.info["scores"] for run in runs if run.info.get("scores") is not None):
        check_scores(environment, scores)
        given.add((float(scores[0]), float(scores[1])))
    if len(given) > 1:
        raise ValueError(f"The runs on {environment} disagree about `scores`: {sorted(given)}. Make them equal in run.json.")
    if given:
        return *given.pop(), "given in `run.json`"
    low, high = score_range(benchmark.common.query("environment == @environment"))
    return low, high, "lowest and highest mean over the seeds of an algorithm at any evaluation"


def _aggregate(benchmark: Benchmark, ranges: dict[str, tuple[float, float, str]]) -> list[str]:
    ends = last_evaluations(benchmark.common)
    returns: dict[str, dict[str, np.ndarray]] = {name: {} for name in benchmark.styles}
    for (environment, algorithm), rows in ends.groupby(["environment", "algorithm"]):
        returns[str(algorithm)][str(environment)] = rows["return_mean"].to_numpy()
    used = {environment: (low, high) for environment, (low, high, _) in ranges.items() if low < high}

    scores, improvements, score_rows, improvement_rows = {}, {}, [], []
    for algorithm, found in returns.items():
        samples = [(found[name] - low) / (high - low) for name, (low, high) in used.items() if name in found]
        if samples:
            scores[algorithm] = interquartile_mean(samples, benchmark.rng)
            n_runs = sum(map(len, samples))
            score_rows.append([algorithm, len(samples), n_runs, *_cells(scores[algorithm])])
        both = sorted(set(found) & set(returns[benchmark.baseline])) if algorithm != benchmark.baseline else []
        if both:
            baselines = [returns[benchmark.baseline][name] for name in both]
            improvements[algorithm] = probability_of_improvement([found[name] for name in both], baselines, benchmark.rng)
            improvement_rows.append([algorithm, len(both), *_cells(improvements[algorithm])])

    range_rows = [
        [name, *([_number(low), _number(high), source] if name in used else ["", "", "left out: no two means differ"])]
        for name, (low, high, source) in ranges.items()
    ]
    sections = ["## All environments"]
    if scores or improvements:
        draw_aggregate(benchmark.out / "all.png", scores, improvements, benchmark.baseline, benchmark.styles)
        sections.append("![Scores and probabilities of improvement, with intervals](all.png)")
    sections += [
        "Scores at the end of each algorithm, interquartile mean of all its runs on all its environments:",
        _table(["algorithm", "environments", "runs", "score", "95 % interval"], score_rows),
        "The returns that count as scores of 0 and 1:",
        _table(["environment", "0", "1", "source"], range_rows),
    ]
    if improvement_rows:
        sections += [
            f"The probability that a run ends with a higher return than one of {benchmark.baseline} on the same environment\n"
            "(a tie counts one half), mean of the environments that both have:",
            _table(["algorithm", "environments", "probability", "95 % interval"], improvement_rows),
        ]
    return sections


def _environment(benchmark: Benchmark, environment: str, score_range: tuple[float, float]) -> list[str]:
    """:param score_range: the returns that count as 0 and 1"""
    common = benchmark.common.query("environment == @environment")
    if common.empty:
        return [f"## {environment}", "No algorithm here has an evaluation that all its seeds have."]
    curves = {str(name): _curve(rows, benchmark.rng) for name, rows in common.groupby("algorithm")}
    picture = re.sub(r"[^A-Za-z0-9.-]", "_", environment) + ".png"
    time = "training, on different machines" if len(_machines(benchmark, environment)) > 1 else "training"
    draw_curves(benchmark.out / picture, environment, curves, benchmark.styles, time)
    header = ["algorithm", "return at the end", "each seed", "last three evaluations", "steps", "minutes", "updates / second"]
    returns = last_evaluations(common)["return_mean"].abs()
    decimals = _decimals(returns[np.isfinite(returns)].max())
    return [
        f"## {environment}",
        f"![Learning curves on {environment}, by environment steps and by wall-clock time]({picture})",
        "Interquartile mean of the seeds and its 95 % interval, over environment steps and over the time of training.",
        _table(header, [[name, *_end(rows, decimals)] for name, rows in common.groupby("algorithm")]),
        "Mean ± standard deviation of the seeds. Minutes are those of training, without evaluations, mean of the seeds.",
        *_thresholds(benchmark, environment, score_range, decimals),
    ]


def _curve(rows: pd.DataFrame, rng: np.random.Generator) -> Curve:
    """:param rows: of one algorithm on one environment, at common steps"""
    returns = rows.pivot(index="steps", columns="seed", values="return_mean")
    seconds = rows.groupby("steps")["seconds"].mean()
    estimate = interquartile_mean([returns.to_numpy()], rng)
    return Curve(returns.index.to_numpy(), seconds.to_numpy(), estimate, returns.shape[1])


def _end(rows: pd.DataFrame, decimals: int) -> list[str]:
    """The cells of one algorithm on one environment."""
    end = last_evaluations(rows)
    last_three = last_evaluations(rows, 3).groupby("seed")["return_mean"].agg(lambda returns: returns.mean(skipna=False))
    return [
        _spread(end["return_mean"], decimals),
        "; ".join(f"{seed}: {_number(value, decimals)}" for seed, value in zip(end["seed"], end["return_mean"], strict=True)),
        _spread(last_three, decimals),
        f"{end['steps'].iloc[0]:,}",
        _number(end["seconds"].mean() / 60),
        _number(end["updates"].sum() / end["seconds"].sum()),
    ]


def _thresholds(benchmark: Benchmark, environment: str, score_range: tuple[float, float], decimals: int) -> list[str]:
    baseline = benchmark.baseline
    end = last_evaluations(benchmark.common.query("environment == @environment and algorithm == @baseline"))
    threshold = float(end["return_mean"].mean(skipna=False)) if len(end) else np.nan
    if not np.isfinite(threshold):
        return [f"There is no finite return of {baseline} here to be reached."]
    goal = f"{baseline}'s {end['steps'].iloc[0]:,}-step return ({_number(threshold, decimals)})"
    rows, sentences = [], []
    for algorithm, evaluations in benchmark.evaluations.query("environment == @environment").groupby("algorithm"):
        reached = steps_to_threshold(evaluations, threshold)
        after = f"{reached.steps:,}" if reached.steps is not None else "fewer than half"
        rows.append([algorithm, after, f"{reached.seeds} of {reached.all_seeds}"])
        if reached.steps is not None and algorithm != baseline:
            some = f" ({reached.seeds} of {reached.all_seeds} seeds)" if reached.seeds < reached.all_seeds else ""
            sentences.append(f"- **{algorithm}** reaches {goal} after {after} steps{some}.")
    sections = ["\n".join(sentences)] if sentences else []
    low, high = score_range
    if low < high and (score := (threshold - low) / (high - low)) < LITTLE:
        little = f"that return is a score of {_number(score, 2)}. To reach it says little, too."
        sections.append(f"{baseline} has learned little here: {little}")
    return [
        f"Steps to {goal}: the first evaluation that reaches it, median of the seeds. Seeds that\n"
        "never do count as infinitely late, and of two medians the lower one is taken:",
        _table(["algorithm", "steps", "reached by seeds"], rows),
        *sections,
    ]


def _provenance(runs: Sequence[RunFiles]) -> str:
    values: dict[str, Counter[str]] = {}
    for run in runs:
        for name, value in dict.fromkeys(entry for stage in _stages(run) for entry in _made_with(stage)):
            values.setdefault(name, Counter())[value] += 1
    rows = []
    for name, counter in values.items():
        if len(counter) == 1 and counter.total() == len(runs):
            rows.append([name, *counter])
        else:
            rows.append([name, "; ".join(f"{value} ({count(number, 'run')})" for value, number in sorted(counter.items()))])
    return _table(["", "value"], rows) if rows else "The runs do not say."


def _stages(run: RunFiles) -> list[dict[str, Any]]:
    """:return: what the run says of itself, then what it says each time that it went on"""
    return [run.info, *run.info.get("continued", [])]


def _made_with(stage: dict[str, Any]) -> list[tuple[str, str]]:
    """:return: names and values of what a stage of a run was made with"""
    entries = [*(stage.get("versions") or {}).items(), *(stage.get("machine") or {}).items()]
    entries += [(name, stage[name]) for name in ("commit", "date") if stage.get(name) is not None]
    return [(name, str(value)) for name, value in entries]


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _cells(estimate: Estimate) -> list[str]:
    value, low, high = (float(part) for part in estimate)
    return [_number(value, 2), "none" if np.isnan(low) else f"{_number(low, 2)} to {_number(high, 2)}"]


def _spread(values: pd.Series, decimals: int) -> str:
    mean = _number(values.mean(skipna=False), decimals)
    return f"{mean} ± {_number(values.std(skipna=False), decimals)}" if len(values) > 1 else mean


def _decimals(value: float) -> int:
    """:return: the decimals of three digits of a number"""
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 0


def _number(value: float, decimals: int | None = None) -> str:
    """
    :param value: any number
    :param decimals: ``None``: as many as three digits need
    """
    if not math.isfinite(value):
        return "not finite"
    decimals = _decimals(value) if decimals is None else decimals
    rounded = round(float(value), decimals) + 0.0  # no negative zero
    return f"{rounded:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")
