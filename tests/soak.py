"""
A long run on a toy task, with fits, imagination and checkpoints all the way: does its memory stay flat?

    python tests/soak.py --steps 200000
"""

import argparse
import tempfile
from pathlib import Path

import torch as th
from conftest import LineEnv
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mbpo import MBPO
from sb3_mbpo.checkpoint import CheckpointCallback


class Memory(BaseCallback):
    """Prints the resident memory of this process (Linux) at regular steps."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(f"{self.num_timesteps:>9,} steps  {pages * 4096 / 2**20:8.1f} MiB", flush=True)
        return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=200_000)
    steps = parser.parse_args().steps
    th.set_num_threads(1)
    model = MBPO(
        "MlpPolicy",
        LineEnv(),
        seed=0,
        buffer_size=steps // 10,
        train_freq=10,
        gradient_steps=1,
        rollout_length=2,
        rollout_batch_size=2000,
        dynamics_train_freq=500,
        dynamics_kwargs=dict(max_gradient_steps=50),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.learn(steps, [Memory(steps // 20), CheckpointCallback(steps // 20, folder)])
    print(
        f"{model._n_updates:,} updates, last fit at {model._last_fit_timestep:,}, {len(model.imagined_buffer):,} imagined rows"
    )
