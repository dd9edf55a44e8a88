"""
What a checkpoint costs late in a run, in seconds and bytes.

    python tests/checkpoint_cost.py Hopper-v5 --steps 300000
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch as th

from sb3_mbpo import MBPO
from sb3_mbpo.checkpoint import load_checkpoint, save_checkpoint


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("env")
    parser.add_argument("--steps", type=int, default=300_000, help="real steps in the replay buffer, of random actions")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    settings = dict(learning_starts=arguments.steps, gradient_steps=1, dynamics_kwargs=dict(max_gradient_steps=10))
    model = MBPO("MlpPolicy", arguments.env, seed=0, **settings)
    model.learn(arguments.steps + 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def save() -> tuple[float, int]:
            before, start = set(folder.rglob("*")), time.perf_counter()
            save_checkpoint(model, folder)
            seconds = time.perf_counter() - start
            return seconds, sum(path.stat().st_size for path in set(folder.rglob("*")) - before if path.is_file())

        print(
            f"first: {save()[0]:.2f} s, {bytes_in(folder) / 2**20:.0f} MiB, {len(model.imagined_buffer):,} imagined rows in it"
        )
        later = []
        for _ in range(5):
            model.learn(200, reset_num_timesteps=False)
            later.append(save())
        print(f"every 200 steps: median {statistics.median(seconds for seconds, _ in later):.2f} s, new bytes in MiB:")
        print("  ", [round(size / 2**20, 1) for _, size in later])
        start = time.perf_counter()
        load_checkpoint(folder, model.env)
        print(f"loading: {time.perf_counter() - start:.2f} s, folder with two of them {bytes_in(folder) / 2**20:.0f} MiB")
