"""The command line of the benchmarks."""

import argparse
import json
import os
from pathlib import Path

from rich.console import Console

from sb3_mbpo.benchmark.speed import measure_speed, speed_tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sb3_mbpo.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    speed = commands.add_parser("speed", help="updates, fit, imagination and a short run, as ratios within one run")
    speed.add_argument("--threads", type=_positive, default=1, help="of PyTorch (default: %(default)s)")
    speed.add_argument(
        "--rounds", type=_positive, default=15, help="repetitions that medians are taken of (default: %(default)s)"
    )
    speed.add_argument("--width", type=_positive, default=256, help="of SAC's two hidden layers (default: %(default)s)")
    speed.add_argument("--run-steps", type=int, default=500, help="of the run after warm-up; 0: no run (default: %(default)s)")
    speed.add_argument("--memory", action="store_true", help="also fill the imagined buffers of long rollouts (minutes)")
    speed.add_argument("--device", default="cpu", help="of the networks, such as cuda (default: %(default)s)")
    speed.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    speed.set_defaults(command=_speed)

    run = commands.add_parser("run", help="train all runs of a suite, or go on where it was stopped")
    run.add_argument("suite", help="quick, laptop, mujoco, or a YAML file")
    run.add_argument("--out", type=Path, help="folder of the results (default: results/SUITE)")
    run.add_argument("--backend", choices=("local", "ray"), default="local", help="(default: %(default)s)")
    run.add_argument("--jobs", type=_positive, default=_cores(), help="local: runs at a time (default: %(default)s)")
    run.add_argument("--address", help="ray: of the cluster (default: a new one on this machine)")
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="tables and pictures of the runs of a suite, finished or not")
    report.add_argument("results", type=Path, metavar="RESULTS", help="folder of the results")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where the report goes (default: RESULTS/report)")
    report.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default: SAC, or the first)")
    report.set_defaults(command=_report)

    arguments = parser.parse_args()
    try:
        arguments.command(arguments)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    except ModuleNotFoundError as error:
        parser.exit(2, f'{error}. Install what the benchmark needs: pip install "sb3_mbpo[benchmark]"\n')


def _cores() -> int:
    """:return: those that this process may use, which on a shared machine are not all"""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int of at least 1, but got {text!r}")
    return int(text)


def _speed(arguments: argparse.Namespace) -> None:
    result = measure_speed(
        arguments.threads, arguments.rounds, arguments.width, arguments.run_steps, arguments.memory, arguments.device
    )
    for table in speed_tables(result):
        Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2))


def _run(arguments: argparse.Namespace) -> None:
    from sb3_mbpo.benchmark.runner import local_processes, ray_cluster, run_all  # their packages come with the extra
    from sb3_mbpo.benchmark.suite import load_suite

    if arguments.address is not None and arguments.backend != "ray":
        raise ValueError("`--address` is that of a Ray cluster: add `--backend ray`, or leave it out.")
    runs = load_suite(arguments.suite)
    results = arguments.out or Path("results", Path(arguments.suite).stem)
    backend = ray_cluster(arguments.address) if arguments.backend == "ray" else local_processes(arguments.jobs)
    with backend as submit:
        failed = run_all(runs, results, submit, Console())
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed. The same command tries them again.")


def _report(arguments: argparse.Namespace) -> None:
    from sb3_mbpo.benchmark.report import write_report

    print(f"Wrote {write_report(arguments.results, arguments.out, arguments.baseline)}.")


if __name__ == "__main__":
    main()
