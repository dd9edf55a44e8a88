"""The command line of the benchmarks."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from sb3_mbpo.benchmark.speed import measure_speed, speed_tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sb3_mbpo.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    speed = commands.add_parser("speed", help="updates, fit, imagination and a short run, as ratios within one run")
    speed.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    speed.add_argument("--rounds", type=int, default=15, help="repetitions that medians are taken of (default: %(default)s)")
    speed.add_argument("--width", type=int, default=256, help="of SAC's two hidden layers (default: %(default)s)")
    speed.add_argument("--run-steps", type=int, default=500, help="of the run after warm-up; 0: no run (default: %(default)s)")
    speed.add_argument("--memory", action="store_true", help="also fill the imagined buffers of long rollouts (minutes)")
    speed.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    speed.set_defaults(execute=_speed)

    report = commands.add_parser("report", help="tables and pictures of runs (needs the extra `benchmark`)")
    report.add_argument("results", type=Path, metavar="RESULTS", help="folder of the runs")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where the report goes (default: RESULTS/report)")
    report.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default: SAC, or the first)")
    report.set_defaults(execute=_report)

    arguments = parser.parse_args()
    arguments.execute(arguments)


def _speed(arguments: argparse.Namespace) -> None:
    result = measure_speed(arguments.threads, arguments.rounds, arguments.width, arguments.run_steps, arguments.memory)
    for table in speed_tables(result):
        Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2))


def _report(arguments: argparse.Namespace) -> None:
    from sb3_mbpo.benchmark.report import write_report  # its packages come with the extra

    print(f"Wrote {write_report(arguments.results, arguments.out, arguments.baseline)}.")


if __name__ == "__main__":
    main()
