"""
Kills a training run again and again, whatever it is doing, resumes it each time, and compares its end with that of a run
which was left alone.

    python tests/fault_campaign.py --kills 50 --steps 3000 --algorithm MBPO
"""

import argparse
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from torch.utils._pytree import tree_leaves

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.checkpoint import CheckpointCallback, checkpoints, load_checkpoint
from sb3_mbpo.run_state import blob_names
from sb3_mbpo.storage import BlobStore, DamagedFileError, read_json

ALGORITHMS = {"MBPO": MBPO, "DHMBPO": DHMBPO}
SETTINGS: dict[str, Any] = dict(
    learning_starts=100,
    gradient_steps=2,
    dynamics_train_freq=50,
    rollout_batch_size=1000,
    dynamics_kwargs=dict(ensemble_size=3, n_elites=2, net_arch=[64, 64], weight_decay=1e-5, max_gradient_steps=100),
)
#: What the kills aim at, and for how many seconds it goes on, roughly.
LONGEST: dict[str | None, float] = {"fit": 0.15, "imagination": 0.005, "update": 0.02, "checkpoint": 0.1}
PHASES = list(LONGEST)


class Worker:
    """One life of the run, in a process of its own. Its files tell the parent what it was doing when it was killed."""

    def __init__(self, folder: Path, algorithm: str) -> None:
        self.algorithm = algorithm
        self.checkpoints = folder / "checkpoints"
        self.phase_file = folder / "phase"
        self.saved_file = folder / "saved"
        self.end_file = folder / "end.json"

    def announce(self, phase: str) -> None:
        with self.phase_file.open("r+b", buffering=0) as file:
            file.write(phase.ljust(16).encode())  # at one stroke: a reader never sees half of it

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.current_phase()
        self.announce(name)
        yield
        self.announce(before)

    def current_phase(self) -> str:
        return self.phase_file.read_text().strip()

    def run(self, steps: int) -> None:
        worker = self

        class Watched(ALGORITHMS[self.algorithm]):
            def fit_dynamics(self):
                with worker.phase("fit"):
                    return super().fit_dynamics()

            def imagine(self):
                with worker.phase("imagination"):
                    return super().imagine()

            def train(self, *args, **kwargs):
                with worker.phase("update"):
                    super().train(*args, **kwargs)

        class WatchedCallback(CheckpointCallback):
            def _save(self):
                with worker.phase("checkpoint"):
                    super()._save()
                    write_beside(worker.saved_file, str(self.model.num_timesteps))

        th.set_num_threads(1)
        env = gym.make("InvertedPendulum-v5")
        if checkpoints(self.checkpoints):
            model = load_checkpoint(self.checkpoints, env, Watched)
        else:
            model = Watched("MlpPolicy", env, seed=0, device="cpu", **SETTINGS)
        callback = WatchedCallback(50, self.checkpoints, at_episode_end=True)
        self.announce("step")
        model.learn(steps - model.num_timesteps, callback, reset_num_timesteps=False)
        end = {"digest": digest(model), "transitions": model.replay_buffer.size(), "steps": model.num_timesteps}
        write_beside(self.end_file, json.dumps(end))

    def start(self, steps: int) -> subprocess.Popen[bytes]:
        self.phase_file.write_text("start")
        options = ["--worker", str(self.phase_file.parent), "--algorithm", self.algorithm, "--steps", str(steps)]
        return subprocess.Popen([sys.executable, __file__, *options])

    def steps_safe(self) -> int:
        """Environment steps in the newest whole checkpoint; 0: there is none."""
        for path in checkpoints(self.checkpoints):
            store = BlobStore(self.checkpoints / "blobs")
            with contextlib.suppress(DamagedFileError):
                for name in blob_names(read_json(path)):
                    store.read(name)
                return int(path.name.split("_")[1])
        return 0


def write_beside(path: Path, text: str) -> None:
    path.with_suffix(".partial").write_text(text)
    path.with_suffix(".partial").rename(path)


def digest(model: MBPO) -> str:
    """Of every number that the run has made: networks, optimizers, real and imagined transitions."""
    buffer = model.replay_buffer
    leaves = tree_leaves(model.get_parameters())
    leaves += [array[: buffer.size()] for array in (buffer.observations, buffer.actions, buffer.rewards)]
    leaves += [buffer.dones[: buffer.size() - 1]]  # resuming ends an episode that the last step left open
    leaves += [] if model.imagined_buffer is None else list(model.imagined_buffer.newest(len(model.imagined_buffer)))
    result = hashlib.sha256()
    for leaf in leaves:
        array = leaf.numpy() if isinstance(leaf, th.Tensor) else leaf
        result.update(array.tobytes() if isinstance(array, np.ndarray) else repr(array).encode())
    return result.hexdigest()


def campaign(folder: Path, algorithm: str, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """
    :return: what was seen
    :raises AssertionError: when something was lost, or the ends differ
    """
    alone, killed = Worker(folder / "alone", algorithm), Worker(folder / "killed", algorithm)
    for worker in (alone, killed):
        worker.checkpoints.mkdir(parents=True)
    assert alone.start(steps).wait() == 0

    chance, phases = random.Random(seed), Counter[str]()
    lives = 0
    while sum(phases.values()) < kills:
        process, lives = killed.start(steps), lives + 1
        moment, target = chance.expovariate(1.0), chance.choice([*PHASES, None])
        while killed.current_phase() == "start" and process.poll() is None:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        while target is not None and killed.current_phase() != target and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, LONGEST.get(target, 0.0)))
        if process.poll() is not None:
            break  # it came to its end
        process.kill()
        process.wait()
        phases[killed.current_phase()] += 1
        reported = int(killed.saved_file.read_text()) if killed.saved_file.exists() else 0
        assert killed.steps_safe() >= reported, f"{reported} steps had been saved, but only {killed.steps_safe()} are there"
    if not killed.end_file.exists():
        assert killed.start(steps).wait() == 0
        lives += 1
    ends = [json.loads(worker.end_file.read_text()) for worker in (alone, killed)]
    assert ends[0] == ends[1], (
        f"the run left alone ended with {ends[0]}, the one killed {sum(phases.values())} times {ends[1]}"
    )
    return {"kills": sum(phases.values()), "lives": lives, "killed_in": dict(phases), "end": ends[1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="MBPO")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        Worker(arguments.worker, arguments.algorithm).run(arguments.steps)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            start = time.perf_counter()
            size = (arguments.kills, arguments.steps, arguments.seed)
            print(json.dumps(campaign(Path(temporary), arguments.algorithm, *size), indent=2))
            print(f"{time.perf_counter() - start:.0f} s")
