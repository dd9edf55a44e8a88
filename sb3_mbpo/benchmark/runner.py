"""
All runs of a suite, in processes of this machine or on a Ray cluster, and how far they are.

A run's state is in its folder, so that it goes on wherever it is started again: the machines of a cluster share the folder
of the results.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from sb3_mbpo.benchmark.callbacks import read_rows
from sb3_mbpo.benchmark.suite import Run
from sb3_mbpo.benchmark.training import is_finished, steps_so_far, train, update_scores

#: Starts a run, given the folder of the results.
Submit = Callable[[Run, Path], "Future[None]"]


@contextmanager
def local_processes(jobs: int) -> Iterator[Submit]:
    """
    An error of the command itself, or Ctrl-C, ends all of them at once. Started again, they go on from their checkpoints.

    :param jobs: runs at a time, each in a process of its own
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")

    def train_in_own_process(run: Run, results: Path) -> None:
        # if it dies, it takes no other run with it
        with ProcessPoolExecutor(1, mp_context=context, initializer=_die_with_the_command) as process:
            process.submit(train, run, results).result()

    threads = ThreadPoolExecutor(jobs)
    futures: list[Future[None]] = []

    def submit(run: Run, results: Path) -> "Future[None]":
        futures.append(threads.submit(train_in_own_process, run, results))
        return futures[-1]

    try:
        yield submit
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):  # a process that is about to start is none yet
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            time.sleep(0.05)
        raise
    finally:
        threads.shutdown(cancel_futures=True)


def _die_with_the_command() -> None:
    """In a run's process, which would go on without the command, and then wait forever for another run."""
    command = multiprocessing.parent_process()

    def wait_and_die() -> None:
        if command is not None:
            command.join()
            os._exit(1)

    threading.Thread(target=wait_and_die, daemon=True).start()


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Submit]:
    """
    One core for each run; a run whose worker or machine dies goes on elsewhere from its checkpoint, ten times at most
    (Ray counts those that ran out of memory apart).

    :param address: of a cluster, such as ``"auto"``; ``None``: a new one on this machine, even where another runs
    :raises ValueError: when Ray is not installed, or there is no such cluster
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError('The backend "ray" needs Ray: `pip install "sb3_mbpo[ray]"`.') from error
    try:
        ray.init(address=address or "local", log_to_driver=False)
    except ConnectionError as error:
        raise ValueError(f"There is no Ray cluster at {address!r}: {error}") from error
    remote_train = ray.remote(num_cpus=1, max_retries=10)(train)
    try:
        yield lambda run, results: remote_train.remote(run, results).future()
    finally:
        ray.shutdown()


def run_all(runs: Sequence[Run], results: Path, submit: Submit, console: Console) -> list[Run]:
    """
    Starts all runs that are not finished and shows how far they are.

    :param runs: of a suite
    :param results: folder for all results; a run has its own below it
    :param submit: starts one
    :param console: to show it on
    :return: the runs that failed. One that fails stops no other
    """
    results = results.resolve()
    todo = [run for run in runs if _is_to_be_trained(run, results)]
    if len(todo) < len(runs):
        console.print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already.")
    futures = {submit(run, results): run for run in todo}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        everything = progress.add_task("all runs", total=sum(run.steps for run in todo))
        bars = {run.folder: progress.add_task(escape(str(run)), total=run.steps, visible=False) for run in todo}
        before = {run.folder: steps_so_far(run, results) for run in todo}  # of an earlier command
        pending = set(futures)
        while pending:
            ended, pending = wait(pending, timeout=2, return_when=FIRST_COMPLETED)
            for future in ended:
                console.print(_last_words(futures[future], results, future.exception()))
            steps = {run.folder: steps_so_far(run, results) for run in todo}
            for future, run in futures.items():
                under_way = future in pending and steps[run.folder] != before[run.folder]
                progress.update(bars[run.folder], completed=steps[run.folder], visible=under_way)
            progress.update(everything, completed=sum(steps.values()))
    return [run for future, run in futures.items() if future.exception() is not None]


def _is_to_be_trained(run: Run, results: Path) -> bool:
    """One whose folder is damaged, too: it says so and fails, and stops no other."""
    try:
        update_scores(run, results)
        return not is_finished(run, results)
    except (OSError, ValueError):
        return True


def _last_words(run: Run, results: Path, error: BaseException | None) -> str:
    """In Rich's markup, which would take what stands in brackets for its own."""
    if error is not None:
        return f"[red]{escape(f'{run} failed: {error!r}')}[/red]"
    last = read_rows(results / run.folder / "evaluations.csv")[-1]
    end = f"{last['return_mean']:.1f} after {last['steps']:,.0f} steps in {last['seconds'] / 60:.1f} minutes"
    return f"{escape(str(run))}: {end}"


class _Speed(ProgressColumn):
    """Environment steps per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} steps/s", style="progress.data.speed")
