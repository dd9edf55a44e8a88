"""The report on made-up results whose answers are known, and its statistics against loops and rliable."""

import json
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from sb3_mbpo.benchmark import __main__ as command_line
from sb3_mbpo.benchmark.figures import COLORS, MARKERS, make_styles
from sb3_mbpo.benchmark.report import _number, write_report
from sb3_mbpo.benchmark.results import load_results
from sb3_mbpo.benchmark.statistics import (
    common_evaluations,
    interquartile_mean,
    last_evaluations,
    probability_of_improvement,
    score_range,
    steps_to_threshold,
)

HEADER = "steps,return_mean,return_std,length_mean,updates,seconds"


def write_run(folder, environment, algorithm, seed, returns, *, planned=None, every=1000, **info):
    """A run with an evaluation every 1000 steps: 3 seconds and 2000 updates each."""
    run = folder / environment / algorithm.replace(" ", "_") / f"seed_{seed}"
    run.mkdir(parents=True)
    rows = [f"{n * every},{value},1.5,100,{2000 * n},{3 * n}" for n, value in enumerate(returns, start=1)]
    (run / "evaluations.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    steps = len(returns) * every if planned is None else planned
    described = dict(environment=environment, algorithm=algorithm, seed=seed, steps=steps, scores=None)
    (run / "run.json").write_text(json.dumps(described | dict(versions={}, machine={}, commit=None) | info))
    return run


def table_after(report, words):
    """The rows of the first table below these words, as lists of cells without its header."""
    lines = report[report.index(words) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append(re.split(r" (?<!\\)\| ", line[2:-2]))
    return {row[0]: row[1:] for row in rows}


def report_of(folder, **options):
    return write_report(folder, **options).read_text(encoding="utf-8")


def rng():
    return np.random.default_rng(0)


def slow_iqm(runs):
    """Sorted, a quarter rounded down off each end, averaged."""
    values = sorted(float(value) for value in runs)
    cut = len(values) // 4
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept)


def slow_improvement(samples, baselines):
    probabilities = []
    for runs, others in zip(samples, baselines, strict=True):
        wins = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in runs for y in others)
        probabilities.append(wins / (len(runs) * len(others)))
    return sum(probabilities) / len(probabilities)


def slow_interval(statistic, samples, resamples=4000):
    """Run by run and environment by environment, with a stream of another kind."""
    stream, values = np.random.RandomState(7), []
    for _ in range(resamples):
        values.append(statistic([[runs[stream.randint(len(runs))] for _ in runs] for runs in samples]))
    return np.percentile(values, 2.5), np.percentile(values, 97.5)


# Statistics


@pytest.mark.parametrize("sizes", [(1,), (3,), (4,), (5, 2), (10, 10, 10), (7, 3, 4)])
def test_the_interquartile_mean_is_that_of_a_slow_loop(sizes):
    """It pools the runs of all environments, however many each has."""
    samples = [np.random.default_rng(size).normal(size=size) ** 3 for size in sizes]
    assert interquartile_mean(samples, rng()).value == pytest.approx(slow_iqm(np.concatenate(samples)), rel=1e-12)


def test_the_interquartile_mean_by_hand():
    """Of eight runs two are cut from either end; of three none."""
    assert interquartile_mean([np.array([1.0, 2, 3, 4]), np.array([5.0, 6, 7, 800])], rng()).value == 4.5
    assert interquartile_mean([np.array([0.0, 0, 9])], rng()).value == 3.0


@pytest.mark.parametrize("sizes", [((3, 4),), ((5, 5), (2, 8)), ((1, 1), (6, 2), (3, 3))])
def test_the_probability_of_improvement_is_that_of_a_double_loop(sizes):
    """Ties, of which rounded numbers have many, count one half. Each environment weighs the same."""
    stream = np.random.default_rng(3)
    samples = [stream.integers(0, 5, size=x).astype(float) for x, _ in sizes]
    baselines = [stream.integers(0, 4, size=y).astype(float) for _, y in sizes]
    value = probability_of_improvement(samples, baselines, rng()).value
    assert value == pytest.approx(slow_improvement(samples, baselines), rel=1e-12)


def test_equal_runs_improve_with_probability_one_half():
    """Also where all returns are one number, as on a solved task."""
    solved = [np.full(3, 1000.0)]
    assert [float(part) for part in probability_of_improvement(solved, solved, rng())] == [0.5, 0.5, 0.5]


def test_the_interval_of_the_mean_is_that_of_a_slow_bootstrap():
    """Runs are drawn within their environment: drawn from all, the interval would be many times wider."""
    stream = np.random.default_rng(1)
    samples = [stream.normal(0, 1, 10), stream.normal(100, 3, 6)]
    value, low, high = interquartile_mean(samples, rng())
    slow_low, slow_high = slow_interval(lambda drawn: slow_iqm(np.concatenate(drawn)), samples)
    assert low < value < high
    np.testing.assert_allclose([low, high], [slow_low, slow_high], atol=0.04 * (slow_high - slow_low))


def test_the_interval_of_the_improvement_is_that_of_a_slow_bootstrap():
    """Algorithm and baseline are drawn independently, within each environment."""
    stream = np.random.default_rng(2)
    samples = [stream.normal(0.6, 1, 9), stream.normal(10, 1, 7)]
    baselines = [stream.normal(0, 1, 8), stream.normal(10, 1, 10)]
    value, low, high = probability_of_improvement(samples, baselines, rng())
    slow = slow_interval(lambda drawn: slow_improvement(drawn[:2], drawn[2:]), [*samples, *baselines], resamples=2000)
    assert low < value < high
    np.testing.assert_allclose([low, high], slow, atol=0.05 * (slow[1] - slow[0]))


def test_95_percent_intervals_cover_the_truth_about_as_often():
    """Of 200 samples of 30 normal runs; the percentile bootstrap comes out a little short."""
    samples = np.random.default_rng(5).normal(size=(200, 30))
    _, low, high = interquartile_mean([samples], rng())
    assert 0.89 < np.mean((low < 0) & (high > 0)) < 0.97


def test_the_interval_of_three_seeds_reaches_from_the_lowest_to_the_highest():
    """As the report says: all three draws are the lowest in 1/27 of the cases, more than 2.5 %."""
    assert tuple(map(float, interquartile_mean([np.array([5.0, 1.0, 3.0])], rng()))) == (3.0, 1.0, 5.0)


def test_curves_get_the_estimate_of_each_evaluation():
    """(evaluations, seeds) in, (evaluations,) out."""
    returns = np.random.default_rng(4).normal(size=(6, 8))
    value, low, high = interquartile_mean([returns], rng())
    np.testing.assert_allclose(value, [slow_iqm(row) for row in returns])
    assert low.shape == high.shape == (6,) and (low < value).all() and (value < high).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_trimmed_away(bad):
    """A quarter is cut from either end, and sorting puts NaN at one of them. The other evaluations stay."""
    returns = np.arange(16.0).reshape(2, 8)
    returns[0, 3] = bad
    for estimate in (
        interquartile_mean([returns], rng()),
        probability_of_improvement([returns], [np.arange(16.0).reshape(2, 8)], rng()),
    ):
        assert np.isnan(estimate).T.tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("sizes", [(1,), (5, 1)])
def test_one_seed_gets_no_interval(sizes):
    """The value stays."""
    samples = [np.arange(size, dtype=float) for size in sizes]
    for estimate in (interquartile_mean(samples, rng()), probability_of_improvement(samples, samples, rng())):
        assert np.isfinite(estimate.value) and np.isnan(estimate.low) and np.isnan(estimate.high)


def test_the_same_generator_gives_the_same_interval():
    """And another one another."""
    samples = [np.random.default_rng(0).normal(size=9)]
    first, again, other = (interquartile_mean(samples, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again and first.low != other.low


def evaluations_of(seeds, algorithm="A"):
    rows = [
        dict(environment="E", algorithm=algorithm, seed=seed, steps=1000 * n, return_mean=float(value))
        for seed, returns in seeds.items()
        for n, value in enumerate(returns, start=1)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ({0: [1, 5, 9], 1: [6, 1, 1], 2: [1, 1, 7]}, (2000, 3, 3)),  # after 2000, 1000 and 3000
        ({0: [1, 5], 1: [5, 1], 2: [1, 1]}, (2000, 2, 3)),
        ({0: [1, 5], 1: [1, 1]}, (2000, 1, 2)),  # exactly half
        ({0: [9, 9], 1: [1, 5]}, (1000, 2, 2)),  # the lower of two medians
        ({0: [1, 5], 1: [1, 1], 2: [1, 1]}, (None, 1, 3)),
        ({0: [1, 2]}, (None, 0, 1)),
        ({0: [float("nan"), 5]}, (2000, 1, 1)),
        ({0: [float("inf"), 1]}, (None, 0, 1)),
        ({0: [1], 1: [1, 1, 5]}, (3000, 1, 2)),  # a run that has not finished counts as one that has not reached it
    ],
)
def test_steps_to_a_threshold_by_hand(seeds, expected):
    """The threshold is 5, and 5 reaches it."""
    assert steps_to_threshold(evaluations_of(seeds), 5.0) == expected


def test_the_mean_of_equal_returns_is_reached_by_them():
    """Three times 0.1, summed and divided by three, is more than 0.1."""
    threshold = float(np.mean([0.1, 0.1, 0.1]))
    assert threshold > 0.1 and steps_to_threshold(evaluations_of({0: [0.1]}), threshold).steps == 1000


def test_common_evaluations_are_those_of_all_seeds_of_an_algorithm():
    """Other algorithms do not matter."""
    both = pd.concat([evaluations_of({0: [1, 2, 3], 1: [4, 5]}), evaluations_of({0: [7, 8, 9]}, "B")])
    common = common_evaluations(both)
    assert common.groupby(["algorithm", "seed"]).size().to_dict() == {("A", 0): 2, ("A", 1): 2, ("B", 0): 3}
    assert last_evaluations(common)["return_mean"].tolist() == [2, 5, 9]
    assert last_evaluations(common, 2)["return_mean"].tolist() == [1, 2, 4, 5, 8, 9]


def test_the_range_of_scores_is_that_of_means_over_seeds():
    """A has the means 2, 3 and 8, B has -1 alone; single seeds reach further, and what is not finite does not count."""
    both = pd.concat([evaluations_of({0: [0, 1, 9], 1: [4, 5, 7]}), evaluations_of({0: [-1, float("nan")]}, "B")])
    assert score_range(both) == (-1.0, 8.0)


# Reading


def test_results_are_read_as_one_table(tmp_path):
    """One row per evaluation, in order, whatever the folders are called."""
    write_run(tmp_path, "Hopper-v5", "SAC", 10, [3.0, 4.0])
    write_run(tmp_path, "Hopper-v5", "SAC", 9, [1.0, 2.0])
    write_run(tmp_path, "Ant-v5", "MBPO (paper)", 0, [5.0])
    table = load_results(tmp_path)
    assert list(table.columns) == ["environment", "algorithm", "seed", *HEADER.split(",")]
    assert table["environment"].tolist() == ["Ant-v5"] + ["Hopper-v5"] * 4
    assert table["algorithm"].tolist() == ["MBPO (paper)"] + ["SAC"] * 4
    assert table["seed"].tolist() == [0, 9, 9, 10, 10] and table["steps"].tolist() == [1000, 1000, 2000, 1000, 2000]
    assert table["return_mean"].tolist() == [5, 1, 2, 3, 4] and table["seconds"].tolist() == [3, 3, 6, 3, 6]


def test_a_step_that_was_evaluated_twice_counts_once(tmp_path):
    """A run that was resumed repeats evaluations; the later ones count."""
    run = write_run(tmp_path, "E", "A", 0, [1.0, 2.0, 3.0])
    with (run / "evaluations.csv").open("a") as file:
        file.write("2000,20,1,100,4000,6\n")
    assert load_results(tmp_path)["return_mean"].tolist() == [1, 20, 3]
    assert "not finished" not in report_of(tmp_path)  # the last row is not the last step


def test_no_runs_are_an_error(tmp_path):
    """It names the folder, and what was expected in it."""
    with pytest.raises(ValueError, match=r"No run in .*expected <environment>/<algorithm>/seed_<n>/run.json"):
        load_results(tmp_path)
    write_run(tmp_path, "E", "A", 0, [])
    with pytest.raises(ValueError, match=r"None of the runs has an evaluation yet .E: A, seed 0"):
        load_results(tmp_path)


def test_the_same_run_twice_is_an_error(tmp_path):
    """Else it would count as two seeds."""
    write_run(tmp_path, "E", "A", 0, [1.0])
    write_run(tmp_path / "copy", "E", "A", 0, [1.0])
    with pytest.raises(ValueError, match="seed_0 are both E: A, seed 0"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", "run.json does not describe a run"),
        ("run.json", '{"environment": "E", "algorithm": "A", "seed": 0}', "KeyError.'steps'.*expected a JSON object"),
        ("run.json", "[]", "run.json does not describe a run"),
        ("evaluations.csv", "steps,return_mean\n1,2\n", "evaluations.csv is not a table of evaluations .*seconds"),
        ("evaluations.csv", f"{HEADER}\n1,?,1,1,1,1\n", "evaluations.csv is not a table of evaluations .*expected numbers"),
        ("evaluations.csv", f"{HEADER}\n,1,1,1,1,1\n", "evaluations.csv is not a table of evaluations"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, name, content, message):
    """With what was expected."""
    (write_run(tmp_path, "E", "A", 0, [1.0]) / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_results(tmp_path)


# The report


@pytest.fixture
def two_scales(tmp_path):
    """
    Small: A ends at 0.2, 0.4 and 0.9, the baseline at 0.1, 0.3 and 0.5; 0 and 1 are the scores. Large: A ends at 3000 and
    1000, the baseline at 2000 and 2000; 1000 and 5000 are the scores.
    """
    for seed, (end, base) in enumerate(zip((0.2, 0.4, 0.9), (0.1, 0.3, 0.5), strict=True)):
        write_run(tmp_path, "Small", "A", seed, [0.0, 0.1, end], scores=[0, 1])
        write_run(tmp_path, "Small", "Base", seed, [0.0, 0.05, base], scores=[0, 1])
    for seed, end in enumerate((3000, 1000)):
        write_run(tmp_path, "Large", "A", seed, [900, 2500, end], scores=[1000, 5000])
        write_run(tmp_path, "Large", "Base", seed, [800, 900, 2000], scores=[1000, 5000])
    return tmp_path


def test_environments_of_different_scales_are_averaged_as_scores(two_scales):
    """A's scores are 0.2, 0.4, 0.9, 0.5 and 0: without one from either end, their mean is 1.1 / 3."""
    report = report_of(two_scales, baseline="Base")
    rows = table_after(report, "Scores at the end")
    assert rows["A"][:3] == ["2", "5", "0.37"] and rows["Base"][:3] == ["2", "5", "0.27"]  # 0.1, 0.3, 0.5, 0.25, 0.25
    low, high = map(float, rows["A"][3].split(" to "))
    slow = slow_interval(lambda drawn: slow_iqm(np.concatenate(drawn)), [[0.2, 0.4, 0.9], [0.5, 0.0]])
    assert (low, high) == pytest.approx(slow, abs=0.03)
    improvement = table_after(report, "The probability that a run ends")
    # Small: A wins 1 + 2 + 3 of 9; Large: 2 of 4
    assert set(improvement) == {"A"} and improvement["A"][:2] == ["2", f"{(6 / 9 + 0.5) / 2:.2f}"]
    assert table_after(report, "The returns that count") == {
        "Large": ["1,000", "5,000", "given in `run.json`"],
        "Small": ["0", "1.00", "given in `run.json`"],
    }


def test_the_table_of_an_environment_by_hand(two_scales):
    """Mean and standard deviation (of a sample) of the last evaluation, and of the last three evaluations."""
    report = report_of(two_scales, baseline="Base")
    returns, seeds, last_three, steps, minutes, updates = table_after(report, "## Large")["A"]
    assert returns == "2,000 ± 1,414" and seeds == "0: 3,000; 1: 1,000"
    assert last_three == "1,800 ± 471"  # (900 + 2500 + 3000) / 3 and (900 + 2500 + 1000) / 3
    assert (steps, minutes, updates) == ("3,000", "0.150", "667")  # 9 seconds, 6000 updates
    assert table_after(report, "## Small")["A"][0] == "0.500 ± 0.361"


def test_thresholds_in_words(two_scales):
    """On Large A passes 2000 at its second evaluation, on Small two of three seeds reach 0.3 at their last."""
    report = report_of(two_scales, baseline="Base")
    assert "\n- **A** reaches Base's 3,000-step return (2,000) after 2,000 steps.\n" in report
    assert "\n- **A** reaches Base's 3,000-step return (0.300) after 3,000 steps (2 of 3 seeds).\n" in report
    assert table_after(report, "return (2,000):") == {"A": ["2,000", "2 of 2"], "Base": ["3,000", "2 of 2"]}
    assert "**Base** reaches" not in report


def test_it_says_where_the_baseline_has_learned_little(tmp_path):
    """Its end is a score of 0.09 in E and of 0.1 in F."""
    for environment, end in (("E", 9.0), ("F", 10.0)):
        write_run(tmp_path, environment, "SAC", 0, [0.0, end], scores=[0, 100])
        write_run(tmp_path, environment, "A", 0, [20.0, 30.0], scores=[0, 100])
    report = report_of(tmp_path)
    assert report.count("SAC has learned little here") == 1
    assert (
        "\n\nSAC has learned little here: that return is a score of 0.09."
        in report[report.index("## E") : report.index("## F")]
    )


def test_a_threshold_that_few_seeds_reach_makes_no_sentence(tmp_path):
    """The table tells."""
    for seed in range(3):
        write_run(tmp_path, "E", "SAC", seed, [5.0])
        write_run(tmp_path, "E", "A", seed, [9.0 if seed == 0 else 1.0])
    report = report_of(tmp_path)
    assert table_after(report, "Steps to SAC's")["A"] == ["fewer than half", "1 of 3"] and "**A**" not in report


def test_without_given_scores_the_range_of_the_means_is_used(tmp_path):
    """And the report says so. Returns of -4 to 6 make 4 a score of 0.8."""
    for seed, shift in enumerate((-1, 1)):
        write_run(tmp_path, "E", "A", seed, [-4 + shift, 4 + shift])
        write_run(tmp_path, "E", "B", seed, [0 + shift, 6 + shift])
    report = report_of(tmp_path)
    zero, one, source = table_after(report, "The returns that count")["E"]
    assert (zero, one) == ("\N{MINUS SIGN}4.00", "6.00") and source.startswith("lowest and highest mean")
    assert table_after(report, "Scores at the end")["A"][2] == "0.80"
    assert "The baseline is A." in report  # the first, as there is no SAC


def test_unfinished_runs_end_the_curve_of_their_algorithm(tmp_path):
    """At the last evaluation that all seeds have. The other algorithms go on, and the report says it all."""
    write_run(tmp_path, "E", "A", 0, [1, 2, 3, 9])
    write_run(tmp_path, "E", "A", 1, [3, 4], planned=4000)
    write_run(tmp_path, "E", "SAC", 0, [0, 0, 0, 9])
    report = report_of(tmp_path)
    assert "- E: A, seed 1: not finished, 2,000 of 4,000 steps.\n" in report
    assert "- E: A ends at 2,000 steps, not all seeds have the rest up to 4,000.\n" in report
    assert "- E: the algorithms end at different steps: A 2,000; SAC 4,000.\n" in report
    assert "seed 0: not finished" not in report
    row = table_after(report, "## E")["A"]
    assert row[0] == "3.00 ± 1.41" and row[3] == "2,000"
    assert table_after(report, "Steps to SAC's 4,000-step return (9.00)")["A"] == ["4,000", "1 of 2"]  # all count here


def test_it_says_where_algorithms_have_different_seeds(tmp_path):
    """And nothing where they have the same ones."""
    for environment, seeds in (("E", {"A": [0], "SAC": [1, 0]}), ("F", {"A": [0, 1], "SAC": [0, 1]})):
        for algorithm, of_algorithm in seeds.items():
            for seed in of_algorithm:
                write_run(tmp_path, environment, algorithm, seed, [1.0, 2.0 + seed])
    report = report_of(tmp_path)
    assert "- E: the algorithms have different seeds: A 0; SAC 0, 1. Compare them seed by seed.\n" in report
    assert report.count("different seeds") == 1


def test_seeds_without_a_common_evaluation_are_left_out_and_named(tmp_path):
    """The others stay; if there is no other, the environment has neither picture nor table."""
    write_run(tmp_path, "E", "A", 0, [1, 2])
    write_run(tmp_path, "E", "A", 1, [1, 2], every=1500)
    write_run(tmp_path, "E", "SAC", 0, [5, 6])
    for seed in range(2):
        write_run(tmp_path, "F", "A", seed, [1, 2], every=900 + seed)
    report = report_of(tmp_path)
    assert "- E: A left out, its seeds have no evaluation in common." in report
    assert set(table_after(report, "## E")) == {"SAC"}
    assert table_after(report, "The returns that count")["F"] == ["", "", "left out: no two means differ"]
    assert "## F\n\nNo algorithm here has an evaluation that all its seeds have." in report


def test_runs_without_an_evaluation_are_left_out_and_named(tmp_path):
    """Whether the file is empty, has a header only, or is not there."""
    write_run(tmp_path, "E", "SAC", 0, [1.0, 2.0])
    write_run(tmp_path, "E", "SAC", 1, [], planned=2000)
    (write_run(tmp_path, "E", "SAC", 2, [1.0]) / "evaluations.csv").write_text("")
    (write_run(tmp_path, "F", "B", 3, [1.0]) / "evaluations.csv").unlink()
    report = report_of(tmp_path)
    for run in ("E: SAC, seed 1", "E: SAC, seed 2", "F: B, seed 3"):
        assert f"- {run}: left out, it has no evaluation." in report
    assert "1 run of 1 algorithm on 1 environment" in report


def test_one_seed_one_algorithm_one_evaluation(tmp_path):
    """No interval, no standard deviation, no probability of improvement, no score, and no crash."""
    write_run(tmp_path, "E", "MBPO", 0, [7.0])
    report = report_of(tmp_path)
    assert table_after(report, "## E")["MBPO"][0] == "7.00"
    assert table_after(report, "The returns that count")["E"] == ["", "", "left out: no two means differ"]
    assert "probability that" not in report and "The runs do not say." in report


def test_one_seed_has_a_score_without_an_interval(tmp_path):
    """The cell says that there is none."""
    write_run(tmp_path, "E", "A", 0, [1.0, 7.0], scores=[0, 10])
    write_run(tmp_path, "E", "SAC", 0, [1.0, 2.0], scores=[0, 10])
    report = report_of(tmp_path)
    assert table_after(report, "Scores at the end")["A"] == ["1", "1", "0.70", "none"]
    assert table_after(report, "The probability that")["A"] == ["1", "1.00", "none"]
    assert "- E: A has one seed, so neither its curve there nor its score has an interval." in report


def test_returns_that_are_not_finite_are_reported(tmp_path):
    """Named with their run, and no number is made of them; other algorithms are not touched."""
    for seed in range(8):
        write_run(tmp_path, "E", "A", seed, [1.0, "nan" if seed == 0 else 2.0])
        write_run(tmp_path, "E", "SAC", seed, [1.0, 5.0])
    report = report_of(tmp_path)
    assert "- E: A, seed 0: the return is not finite in 1 evaluation, first at 2,000 steps." in report
    row = table_after(report, "## E")["A"]
    assert row[0] == row[2] == "not finite ± not finite" and row[1].startswith("0: not finite; 1: 2.00")
    assert table_after(report, "Scores at the end")["A"][2:] == ["not finite", "none"]
    assert table_after(report, "The probability that")["A"][1:] == ["not finite", "none"]
    assert table_after(report, "Scores at the end")["SAC"][2] == "1.00"
    assert "There is no finite return of A here to be reached." in report_of(tmp_path, baseline="A")


def test_many_returns_that_are_not_finite_are_reported_too(tmp_path):
    """On long curves the markers stand apart, and here there is no point to put one on."""
    write_run(tmp_path, "E", "A", 0, ["nan"] * 12)
    write_run(tmp_path, "E", "SAC", 0, [1.0] * 12)
    assert "- E: A, seed 0: the return is not finite in 12 evaluations" in report_of(tmp_path)


def test_the_table_has_the_decimals_of_the_returns_at_the_end(tmp_path):
    """However bad the untrained policy was. And zero has no sign."""
    for seed, end in enumerate((0.71, 0.81)):
        write_run(tmp_path, "E", "A", seed, [-1e6, end])
        write_run(tmp_path, "E", "SAC", seed, [-3.0, -0.0001])
    report = report_of(tmp_path)
    assert table_after(report, "## E")["A"][:2] == ["0.760 ± 0.071", "0: 0.710; 1: 0.810"]
    assert table_after(report, "## E")["SAC"][0] == "0.000 ± 0.000"


def test_a_mean_is_rounded_as_its_seeds_are():
    """NumPy's own rounding would make 123.4 of it."""
    assert _number(np.float64(123.45), 1) == _number(123.45, 1) == "123.5"


def test_the_improvement_counts_environments_that_both_have_only(tmp_path):
    """A is better on E and worse on F, which SAC has not; B has nothing in common with SAC."""
    for seed in range(2):
        write_run(tmp_path, "E", "SAC", seed, [1.0, 2.0])
        write_run(tmp_path, "E", "A", seed, [1.0, 3.0])
        write_run(tmp_path, "F", "A", seed, [1.0, 0.0])
        write_run(tmp_path, "F", "B", seed, [1.0, 5.0])
    report = report_of(tmp_path)
    assert table_after(report, "The probability that") == {"A": ["1", "1.00", "1.00 to 1.00"]}
    assert "There is no finite return of SAC here" in report[report.index("## F") :]


def test_scores_of_different_environments_are_said_to_be(tmp_path):
    """As soon as one algorithm lacks an environment that another one has."""
    sentence = "- Not all algorithms have the same environments, so their scores are means of different tasks."
    for environment, algorithm in [("E", "SAC"), ("E", "A"), ("F", "SAC")]:
        write_run(tmp_path, environment, algorithm, 0, [1.0, 2.0])
    assert sentence in report_of(tmp_path)
    write_run(tmp_path, "F", "A", 0, [1.0, 2.0])
    assert sentence not in report_of(tmp_path)


def test_what_it_was_run_with_lists_all_values(tmp_path):
    """One if all runs agree, else each with its number of runs."""
    for seed, torch in enumerate(("2.13.0", "2.13.0", "2.15.0")):
        info = dict(versions={"torch": torch, "numpy": "2.4.6"}, machine={"processor": "a|b"}, commit="abc123")
        write_run(tmp_path, "E", "SAC", seed, [1.0], **info, **({"date": "2026-11-22"} if seed else {}))
    assert table_after(report_of(tmp_path), "## What it was run with") == {
        "torch": ["2.13.0 (2 runs); 2.15.0 (1 run)"],
        "numpy": ["2.4.6"],
        "processor": [r"a\|b"],
        "commit": ["abc123"],
        "date": ["2026-11-22 (2 runs)"],
    }


def test_a_run_that_went_on_with_something_else_counts_for_both(tmp_path):
    """And once for what stayed."""
    first = dict(versions={"torch": "2.11.0"}, machine={"cores": 2}, commit="abc")
    second = dict(versions={"torch": "2.13.0"}, machine={"cores": 2}, commit="def", from_step=100)
    write_run(tmp_path, "E", "SAC", 0, [1.0], **first, continued=[second])
    write_run(tmp_path, "E", "SAC", 1, [1.0], **first)
    assert table_after(report_of(tmp_path), "## What it was run with") == {
        "torch": ["2.11.0 (2 runs); 2.13.0 (1 run)"],
        "cores": ["2"],
        "commit": ["abc (2 runs); def (1 run)"],
    }


def test_it_says_where_minutes_are_of_different_machines(tmp_path, figures):
    """In E and G, where A was or went on elsewhere. In F all that say so were on the same one."""

    def on(processor, cores, torch):
        return {"machine": {"processor": processor, "cores": cores}, "versions": {"torch": torch}}

    for environment in "EFG":
        write_run(tmp_path, environment, "SAC", 0, [1.0], **on("P", 2, "2.13.0"))
        write_run(tmp_path, environment, "B", 0, [1.0])
    write_run(tmp_path, "E", "A", 0, [1.0], **on("P", 2, "2.13.0"), continued=[on("Q", 2, "2.13.0")])
    write_run(tmp_path, "F", "A", 0, [1.0], **on("P", 2, "2.13.0"))
    write_run(tmp_path, "G", "A", 0, [1.0], **on("P", 16, "2.13.0"))
    write_run(tmp_path, "G", "C", 0, [1.0], **on("P", 2, "2.11.0"))
    report = report_of(tmp_path)
    sentence = "minutes do not compare across machines and versions of PyTorch"
    first, second = "processor P, cores 2, torch 2.13.0", "processor Q, cores 2, torch 2.13.0"
    assert f"\n- E: {sentence}. {first}: A; SAC. {second}: A.\n" in report
    second, third = "processor P, cores 16, torch 2.13.0", "processor P, cores 2, torch 2.11.0"
    assert f"\n- G: {sentence}. {second}: A. {third}: C. {first}: SAC.\n" in report
    assert "F: minutes" not in report
    labels = [figures[f"{name}.png"].axes[1].get_xlabel() for name in "EFG"]
    assert labels == [f"minutes of training{where}" for where in (", on different machines", "", ", on different machines")]


def test_an_unknown_baseline_is_an_error(two_scales):
    """It lists those that there are."""
    with pytest.raises(ValueError, match=r"baseline 'SAC': pass one of \['A', 'Base'\]"):
        write_report(two_scales, baseline="SAC")


def test_equal_scores_may_be_written_differently(tmp_path):
    write_run(tmp_path, "E", "SAC", 0, [0.5], scores=[0, 1])
    write_run(tmp_path, "E", "SAC", 1, [0.5], scores=[0.0, 1.0])
    assert table_after(report_of(tmp_path), "The returns that count") == {"E": ["0", "1.00", "given in `run.json`"]}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (([0, 1], [0, 2]), "disagree about `scores`"),
        (([1, 0], [1, 0]), "the lower one first, but got .1, 0."),
        (([1], [1]), "must be two returns"),
        ((["a", 1], ["a", 1]), "must be two returns"),
    ],
)
def test_scores_that_make_no_sense_are_an_error(tmp_path, scores, message):
    """Runs without scores leave it to the others."""
    for seed, pair in enumerate((*scores, None)):
        write_run(tmp_path, "E", "A", seed, [0.5], scores=pair)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test_all_links_point_to_pictures_that_are_there(two_scales):
    """Beside the report, and no other pictures lie there."""
    for seed in range(2):
        write_run(two_scales, "ALE/Pong, odd (name)", "A", seed, [1.0, 2.0])
    path = write_report(two_scales, baseline="Base")
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", path.read_text())
    assert path == two_scales / "report" / "report.md"
    assert sorted(links) == sorted(picture.name for picture in path.parent.glob("*.png")) and len(links) == 4


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_pictures_are_opaque_light_cards_with_dark_text(two_scales, style):
    """Whatever the user's own style of Matplotlib is, which stays as it was."""
    with matplotlib.rc_context():
        matplotlib.style.use(style)
        matplotlib.rcParams["savefig.transparent"] = True
        before = dict(matplotlib.rcParams)
        report = write_report(two_scales, baseline="Base")
        assert dict(matplotlib.rcParams) == before
    pictures = list(report.parent.glob("*.png"))
    assert len(pictures) == 3
    for picture in pictures:
        pixels = imread(picture)
        opaque = pixels[..., 3] if pixels.shape[2] == 4 else np.ones(pixels.shape[:2])
        assert (opaque == 1).all() and pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3].min() > 0.9
        assert pixels[..., :3].max(axis=2).min() < 0.2 and pixels.shape[1] >= 1200


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, by the name of its file, not saved."""
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.update({path.name: figure}))
    return drawn


def test_the_curves_are_those_of_the_common_evaluations(tmp_path, figures):
    """Over steps and over the mean time of the seeds, with the band of the interval and the number of seeds."""
    returns = np.random.default_rng(6).normal(size=(3, 4))
    for seed, values in enumerate(returns):
        run = write_run(tmp_path, "E", "A", seed, values)
        table = pd.read_csv(run / "evaluations.csv")
        table.assign(seconds=60.0 * table["steps"] / 1000 * (1 + seed)).to_csv(run / "evaluations.csv", index=False)
    write_run(tmp_path, "E", "SAC", 0, [1.0])
    write_report(tmp_path)
    by_steps, by_time = figures["E.png"].axes
    for axes, x in ((by_steps, [1000, 2000, 3000, 4000]), (by_time, [2, 4, 6, 8])):
        line, point = axes.lines
        np.testing.assert_allclose(line.get_xdata(), x)
        np.testing.assert_allclose(line.get_ydata(), [slow_iqm(values) for values in returns.T])
        assert len(point.get_xdata()) == 1
        band = axes.collections[0].get_paths()[0].vertices
        for step, values in zip(x, returns.T, strict=True):
            ends = band[np.isclose(band[:, 0], step), 1]
            assert (ends.min(), ends.max()) == pytest.approx((values.min(), values.max()))
    assert [text.get_text() for text in figures["E.png"].legends[0].get_texts()] == ["A (3 seeds)", "SAC (1 seed)"]
    assert by_time.get_xlabel() == "minutes of training"


def test_long_runs_are_shown_in_hours(tmp_path, figures):
    """From two hours on."""
    run = write_run(tmp_path, "E", "A", 0, [1.0, 2.0])
    table = pd.read_csv(run / "evaluations.csv")
    table.assign(seconds=[3600.0, 7200.0]).to_csv(run / "evaluations.csv", index=False)
    write_report(tmp_path)
    axes = figures["E.png"].axes[1]
    assert axes.get_xlabel() == "hours of training" and axes.lines[0].get_xdata().tolist() == [1, 2]


def test_an_algorithm_keeps_its_colour_in_all_pictures(tmp_path, figures):
    """Also where others are missing."""
    for environment, names in {"E": ("A", "B", "SAC"), "F": ("B", "SAC")}.items():
        for name in names:
            write_run(tmp_path, environment, name, 0, [1.0, 2.0])
    write_report(tmp_path)
    first, second = ([line.get_color() for line in figures[name].axes[0].lines] for name in ("E.png", "F.png"))
    assert first[1:] == second and len(set(first)) == 3
    points = [line for line in figures["all.png"].axes[0].lines if line.get_marker() != "None"]
    assert [line.get_color() for line in points] == first


def test_the_aggregate_shows_scores_and_probabilities(two_scales, figures):
    """The numbers of the tables, one row per algorithm; the baseline has no probability."""
    report = report_of(two_scales, baseline="Base")
    scores, probabilities = figures["all.png"].axes
    assert [label.get_text() for label in scores.get_yticklabels()] == ["A", "Base"]
    interval, point = scores.lines[:2]
    value, low, high = point.get_xdata()[0], *interval.get_xdata()
    shown = [f"{value:.2f}", f"{low:.2f} to {high:.2f}"]
    assert table_after(report, "Scores at the end")["A"][2:] == shown and low < value < high
    rows = [line.get_ydata()[0] for line in probabilities.lines if line.get_marker() != "None"]
    assert rows == [0] and probabilities.get_xlabel() == "probability of improvement over Base"


def test_every_algorithm_looks_different_and_the_same_everywhere():
    """Colour and marker together, for as many as anybody compares; the first seven differ in colour, too."""
    names = [str(number) for number in range(len(COLORS) * len(MARKERS))]
    styles = make_styles(names)
    assert len(set(styles.values())) == len(names)
    assert len({styles[name].color for name in names[:7]}) == 7


def test_the_same_results_give_the_same_report(two_scales):
    """To the letter, and to the bits of the pictures."""
    first, second = (write_report(two_scales, two_scales / name, "Base").parent for name in ("first", "second"))
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir()) and len(files) == 4
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_the_command_writes_the_report(two_scales, monkeypatch, capsys):
    """Into the folder that it is told, and prints where."""
    out = two_scales / "elsewhere" / "deep"
    options = ["report", str(two_scales), "--out", str(out), "--baseline", "Base"]
    monkeypatch.setattr("sys.argv", ["benchmark", *options])
    command_line.main()
    assert "The baseline is Base." in (out / "report.md").read_text()
    assert f"Wrote {out / 'report.md'}." in capsys.readouterr().out
    assert not (two_scales / "report").exists()


# rliable


def test_rliable_agrees_on_values_and_intervals():
    """On three environments with ten runs each, and ten of a baseline. Both draw at random."""
    pytest.importorskip("rliable")
    from rliable import library, metrics

    stream = np.random.default_rng(11)
    x, y = (stream.normal(mean, [1.0, 0.5, 2.0], size=(10, 3)).round(1) for mean in (0.5, 0.0))
    np.random.seed(0)  # rliable's stream
    reps = dict(reps=5000)
    value, interval = library.get_interval_estimates({"x": x}, lambda s: np.array([metrics.aggregate_iqm(s)]), **reps)
    ours = interquartile_mean(list(x.T), rng())
    assert ours.value == pytest.approx(value["x"][0], rel=1e-12)
    width = np.ptp(interval["x"])
    np.testing.assert_allclose([ours.low, ours.high], interval["x"][:, 0], atol=0.05 * width)

    improvement = lambda a, b: np.array([metrics.probability_of_improvement(a, b)])  # noqa: E731
    value, interval = library.get_interval_estimates({"x": (x, y)}, improvement, **reps)
    ours = probability_of_improvement(list(x.T), list(y.T), rng())
    assert ours.value == pytest.approx(value["x"][0], rel=1e-12)
    np.testing.assert_allclose([ours.low, ours.high], interval["x"][:, 0], atol=0.05 * np.ptp(interval["x"]))
