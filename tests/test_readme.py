"""The README is run and held against the code."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_mbpo import LOGGED, LOGGED_BY_DHMBPO

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.benchmark.report import write_report
from sb3_mbpo.benchmark.results import load_results
from sb3_mbpo.benchmark.suite import load_suite
from sb3_mbpo.benchmark.training import _differences
from sb3_mbpo.dynamics import DynamicsConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def table(start):
    """:return: the cells of the header that starts so, and of each row below it, their numbers as Python writes them"""
    text = README[README.index(start) :].split("\n\n")[0].replace(",", "").replace("\N{MINUS SIGN}", "-")
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return header, rows


def test_the_first_two_blocks_are_one_command_line_each():
    for language, code in BLOCKS[:2]:
        assert language == "bash" and len(code.splitlines()) == 1
    assert "examples/pendulum.py" in BLOCKS[0][1] and "pytest" in BLOCKS[1][1]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_the_python_blocks_run(code, tmp_path, monkeypatch):
    """With fewer steps: a warm-up of 40, and 60 in all."""
    init, learn = MBPO.__init__, MBPO.learn

    def short_init(self, *args, **kwargs):
        given = inspect.signature(init).bind(self, *args, **kwargs)
        given.arguments |= dict(learning_starts=40, rollout_batch_size=100)
        init(*given.args, **given.kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MBPO, "__init__", short_init)
    monkeypatch.setattr(MBPO, "learn", lambda self, steps, *args, **kwargs: learn(self, min(steps, 60), *args, **kwargs))
    exec(compile(code, "README.md", "exec"), {})


def test_every_parameter_is_listed_with_its_default():
    listed = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", README, flags=re.MULTILINE))
    parameters = inspect.signature(MBPO.__init__).parameters
    own = [name for name in parameters if name not in inspect.signature(MBPO.__mro__[1].__init__).parameters]
    assert len(own) == 9
    for name in {*own, "learning_starts", "gradient_steps"} - {"dynamics_kwargs"}:
        assert listed[name].replace("_", "") == str(parameters[name].default), name
    of_dhmbpo = inspect.signature(DHMBPO.__init__).parameters
    assert set(of_dhmbpo) - set(parameters) == {"rollout_freq", "gradient_horizon"}
    assert set(parameters) - set(of_dhmbpo) == {"rollout_retain_steps", "real_ratio", "policy_delay"}
    for name in ("rollout_freq", "gradient_horizon"):
        assert listed[name] == str(of_dhmbpo[name].default)
    for field in fields(DynamicsConfig):
        expected = field.default.__name__ if field.name == "activation_fn" else str(field.default)
        assert listed[field.name] == expected, field.name


@pytest.mark.parametrize(
    ("suite", "results"),
    [
        ("laptop", ".results"),
        (ROOT / "tests" / "ablations.yml", ".ablations"),
        (ROOT / "tests" / "fits.yml", ".fits"),
        (ROOT / "tests" / "settings.yml", ".settings"),
        (ROOT / "tests" / "rounds.yml", ".rounds"),
    ],
)
def test_the_results_are_of_the_suite_as_it_is_now(suite, results):
    runs = [run for run in load_suite(suite) if (ROOT / results / run.folder).exists()]
    assert len(runs) == len(list((ROOT / results).rglob("run.json")))
    for run in runs:
        folder = ROOT / results / run.folder
        assert not _differences(run, folder), run
        steps = pd.read_csv(folder / "evaluations.csv")["steps"].tolist()
        assert steps == list(range(run.eval_freq, run.steps + 1, run.eval_freq)), run


def test_the_report_is_of_the_results(tmp_path, monkeypatch):
    """Its text, which the pictures are made with."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: None)
    assert write_report(ROOT / ".results", tmp_path).read_text() == (ROOT / ".results/report/report.md").read_text()


def test_the_ablations_are_what_the_runs_have_written():
    """The mean of the last three evaluations of each run in ``.ablations``."""
    header, rows = table("| variant |")
    seeds = [int(cell.split()[1]) for cell in header[1:]]
    shown = {(row[0].split(":")[0], seed): cell for row in rows for seed, cell in zip(seeds, row[1:], strict=True) if cell}
    evaluations = load_results(ROOT / ".ablations").groupby(["algorithm", "seed"])["return_mean"]
    assert shown == {name: f"{returns.tail(3).mean():.0f}" for name, returns in evaluations}


def test_the_results_are_what_the_runs_have_written():
    """Mean and standard deviation of the last evaluations in ``.results``, wherever seeds 0 to 2 are all there."""
    header, rows = table("| task, environment steps |")
    shown = {
        (row[0].split()[0], algorithm): (int(row[0].split()[1]), cell)
        for row in rows
        for algorithm, cell in zip(header[1:], row[1:], strict=True)
        if cell
    }
    ends = load_results(ROOT / ".results").groupby(["environment", "algorithm", "seed"]).last()
    for name, of_seeds in ends.groupby(["environment", "algorithm"]):
        if of_seeds.index.get_level_values("seed").tolist() != [0, 1, 2]:
            continue
        returns = of_seeds["return_mean"]
        steps, cell = shown.pop((name[0], name[1].replace(",", "")))
        assert set(of_seeds["steps"]) == {steps}
        assert cell == f"{returns.mean():.0f} \N{PLUS-MINUS SIGN} {returns.std():.0f}"
    assert not shown


def test_the_results_beside_the_published_ones_are_what_the_runs_have_written():
    """At the same steps, wherever seeds 0 to 2 are all there."""
    header, rows = table("| task | at step |")
    evaluations = load_results(ROOT / ".results").groupby(["environment", "algorithm", "steps"])
    returns = {name: part["return_mean"] for name, part in evaluations if sorted(part["seed"]) == [0, 1, 2]}
    for task, step, *cells in rows:
        for published, cell in zip(header[2::2], cells[1::2], strict=True):
            found = returns.get((task, published.split()[0], int(step)))
            assert cell == ("" if found is None else f"{found.mean():.0f} \N{PLUS-MINUS SIGN} {found.std():.0f}")


def test_the_returns_of_both_rules_of_fits_are_what_the_runs_have_written():
    """At three steps, and the mean of the evaluations after 5,000."""
    _, rows = table("| rule | seed |")
    evaluations = pd.concat([load_results(ROOT / ".results"), load_results(ROOT / ".fits")]).query(
        "environment == 'Hopper-v5'"
    )
    for rule, seed, _, *cells in rows:
        name = {"ours": "MBPO", "paper's": "paper's rule"}[rule]
        of_run = evaluations.query("algorithm == @name and seed == @seed", local_dict={"name": name, "seed": int(seed)})
        returns = of_run.set_index("steps")["return_mean"]
        expected = [*returns[[10_000, 15_000, 20_000]], returns[returns.index > 5000].mean()]
        assert cells == [f"{number:.0f}" for number in expected]


def test_what_the_settings_buy_is_what_the_runs_have_written():
    """At 8,000 steps, and the mean of the evaluations from 2,000 to there, of each of seeds 0 and 1."""
    header, rows = table("| one setting as in the paper |")
    shown = {
        (*column.split(" ", 1), "MBPO" if setting == "none: ours" else setting): cell
        for setting, *cells in rows
        for column, cell in zip(header[1:], cells, strict=True)
    }
    changed, ours = load_results(ROOT / ".settings"), load_results(ROOT / ".results").query("algorithm == 'MBPO'")
    evaluations = pd.concat([changed, ours[ours["environment"].isin(changed["environment"])]])
    evaluations = evaluations.query("seed < 2 and 2000 <= steps <= 8000")
    expected = {}
    for (environment, algorithm), part in evaluations.groupby(["environment", "algorithm"]):
        returns = part.groupby("seed")["return_mean"]
        for what, values in (("at 8000", returns.last()), ("mean", returns.mean())):
            expected[environment, what, algorithm] = "; ".join(f"{value:.0f}" for value in values)
    assert shown == expected


def test_what_the_rounds_buy_is_what_the_runs_have_written():
    """Means of the evaluations from 1,500 steps on, of each of seeds 0 and 1."""
    header, rows = table("| `rollout_retain_steps` |")
    evaluations = pd.concat([load_results(ROOT / ".results"), load_results(ROOT / ".rounds")])
    evaluations = evaluations.query("seed < 2 and steps >= 1500")
    means = evaluations.groupby(["environment", "algorithm", "seed"])["return_mean"].mean()
    for steps, *cells in rows:
        algorithm = {"1000": "MBPO", "250 (the paper's)": "rounds of 250 steps"}[steps]
        for environment, cell in zip(header[1:], cells, strict=True):
            assert cell.split("; ") == [f"{mean:.0f}" for mean in means[environment, algorithm]]
    assert set(header[1:]) == {"InvertedPendulum-v5", "InvertedDoublePendulum-v5"}


def test_the_table_of_dhmbpo_is_what_the_runs_have_written():
    """The mean of the last three evaluations that each of seeds 0 to 2 has at these steps."""
    _, rows = table("| task | environment steps | seeds 0; 1; 2 |")
    evaluations = load_results(ROOT / ".results").query("algorithm == 'DHMBPO'")
    for environment, steps, cell, *_ in rows:
        rows_of = (evaluations["environment"] == environment) & (evaluations["steps"] <= int(steps))
        returns = evaluations[rows_of].groupby("seed")["return_mean"]
        assert list(returns.groups) == [0, 1, 2]
        assert cell.split("; ") == [f"{of_seed.tail(3).mean():.0f}" for _, of_seed in returns]


def test_every_logged_key_is_in_the_glossary():
    assert set(re.findall(r"^\| `(\w+/\w+)` \|", README, flags=re.MULTILINE)) == LOGGED | LOGGED_BY_DHMBPO


def test_the_suite_can_be_loaded(tmp_path):
    (suite,) = [code for language, code in BLOCKS if language == "yaml"]
    (tmp_path / "mine.yml").write_text(suite)
    assert len(load_suite(tmp_path / "mine.yml")) == 3 * 5


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
