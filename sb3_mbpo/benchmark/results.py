"""
What the runs of a benchmark have written.

A run lies in ``<environment>/<algorithm>/seed_<n>``: ``run.json`` says what it is, ``evaluations.csv`` what came out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

#: What tells runs apart.
NAMES = ("environment", "algorithm", "seed")
#: Of ``evaluations.csv``.
COLUMNS = ("steps", "return_mean", "return_std", "length_mean", "updates", "seconds")


class RunFiles(NamedTuple):
    """What lies in the folder of one run."""

    folder: Path
    #: ``run.json``
    info: dict[str, Any]
    #: ``evaluations.csv``, in the order of steps; perhaps without a row
    evaluations: pd.DataFrame

    def __str__(self) -> str:
        return f"{self.info['environment']}: {self.info['algorithm']}, seed {self.info['seed']}"


def load_results(folder: str | Path) -> pd.DataFrame:
    """
    :param folder: of the runs, in ``<environment>/<algorithm>/seed_<n>``
    :return: one row per evaluation: environment, algorithm and seed, then the columns of ``evaluations.csv``, in the order of
        these four: environment, algorithm, seed, steps. If a run has two rows of the same step, the later one counts
    :raises ValueError: when there is no run, none has an evaluation, two are the same, or a file is not what it should be
    """
    return join_runs(read_runs(Path(folder)))


def read_runs(folder: Path) -> list[RunFiles]:
    """
    :param folder: see :func:`load_results`
    :return: all runs, those without an evaluation, too
    :raises ValueError: when there is none, two are the same, or a file is not what it should be
    """
    runs: dict[str, RunFiles] = {}
    for path in sorted(folder.glob("**/seed_*/run.json")):
        run = _read_run(path)
        if str(run) in runs:
            raise ValueError(f"{runs[str(run)].folder} and {run.folder} are both {run}: take one of them away.")
        runs[str(run)] = run
    if not runs:
        raise ValueError(f"No run in {str(folder)!r}: expected <environment>/<algorithm>/seed_<n>/run.json in it.")
    return list(runs.values())


def join_runs(runs: Sequence[RunFiles]) -> pd.DataFrame:
    """
    :param runs: of :func:`read_runs`
    :return: see :func:`load_results`
    :raises ValueError: when none has an evaluation
    """
    tables = [run.evaluations.assign(**{name: run.info[name] for name in NAMES}) for run in runs if len(run.evaluations)]
    if not tables:
        raise ValueError(f"None of the runs has an evaluation yet ({runs[0]}, ...): wait for the first.")
    return pd.concat(tables)[[*NAMES, *COLUMNS]].sort_values([*NAMES, "steps"], ignore_index=True)


def check_scores(environment: str, scores: Any) -> None:
    """
    :param environment: its name
    :param scores: the returns that count as 0 and 1
    :raises ValueError: when they are not two numbers, the lower one first
    """
    numbers = isinstance(scores, list) and all(isinstance(score, int | float) for score in scores)
    if not (numbers and len(scores) == 2 and scores[0] < scores[1]):
        raise ValueError(f"`scores` of {environment} must be two returns, the lower one first, but got {scores!r}.")


def _read_run(path: Path) -> RunFiles:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        info |= {"environment": str(info["environment"]), "algorithm": str(info["algorithm"])}
        info |= {"seed": int(info["seed"]), "steps": int(info["steps"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not describe a run ({error!r}): expected a JSON object with environment, algorithm, seed and steps."
        ) from error
    table = path.with_name("evaluations.csv")
    try:
        evaluations = pd.read_csv(table, usecols=list(COLUMNS), dtype=float).astype({"steps": int})
    except (FileNotFoundError, pd.errors.EmptyDataError):
        evaluations = pd.DataFrame(columns=list(COLUMNS), dtype=float)
    except ValueError as error:
        raise ValueError(f"{table} is not a table of evaluations ({error}): expected numbers in {COLUMNS}.") from error
    return RunFiles(path.parent, info, evaluations.drop_duplicates("steps", keep="last").sort_values("steps"))
