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
    arguments = parser.parse_args()

    result = measure_speed(arguments.threads, arguments.rounds, arguments.width, arguments.run_steps, arguments.memory)
    for table in speed_tables(result):
        Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
