"""
One run of a suite, from its start or from where it was stopped, to its end. Its folder holds

- ``run.json``: the run, the versions, the commit and the machine,
- ``evaluations.csv``: a row for each evaluation (:class:`Evaluation`),
- ``checkpoint``: while it is under way, and ``model.zip`` when it has ended,
- ``steps.txt``: the environment steps so far, for whoever watches, and ``log.txt``: what it printed.
"""

import contextlib
import json
import os
import shutil
import time
from copy import deepcopy
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch as th
from filelock import FileLock
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from sb3_mbpo import MBPO
from sb3_mbpo.benchmark.provenance import commit, processor, versions
from sb3_mbpo.benchmark.suite import Run, algorithm_class
from sb3_mbpo.checkpoint import CheckpointCallback, checkpoints, load_checkpoint

COLUMNS = ["steps", "return_mean", "return_std", "length_mean", "updates", "seconds"]


def train(run: Run, results: Path) -> None:
    """
    Trains on one thread. Whoever finds the run under way in another process waits until that one has ended.

    :param run: what to train
    :param results: the folder of all results
    :raises ValueError: when the run's folder holds another run
    """
    th.set_num_threads(1)
    folder = results / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.txt").open("a", buffering=1)
    with FileLock(folder / "lock"), log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        _claim(run, folder)
        if not is_finished(run, results):
            _train(run, folder)


def is_finished(run: Run, results: Path) -> bool:
    """Whether the run has come to its end."""
    return (results / run.folder / "model.zip").exists()


def steps_so_far(run: Run, results: Path) -> int:
    """:return: environment steps, as of a few seconds ago"""
    try:
        return int((results / run.folder / "steps.txt").read_text())
    except (OSError, ValueError):  # not begun, or being written
        return 0


class Evaluation(BaseCallback):
    """
    Runs the deterministic policy on an environment of its own, whose returns are never normalised, whenever the steps pass a
    multiple of ``run.eval_freq``. Each evaluation starts its episodes from its own seed.

    :param run: whose seed, frequency and number of episodes count
    :param folder: of ``evaluations.csv``; rows of steps that the model has not made yet are dropped
    """

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__()
        self.run, self.folder = run, folder

    def _on_training_start(self) -> None:
        self.eval_env = make_env(self.run, training=False)
        path = self.folder / "evaluations.csv"
        self.rows = [row for row in read_rows(path) if row["steps"] <= self.num_timesteps]
        self.earlier_seconds = self.rows[-1]["seconds"] if self.rows else 0.0
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps // self.run.eval_freq > (self.num_timesteps - self.training_env.num_envs) // self.run.eval_freq:
            self._evaluate()
        return True

    def _evaluate(self) -> None:
        seconds = self.earlier_seconds + time.perf_counter() - self.start
        before = time.perf_counter()
        sync_envs_normalization(self.training_env, self.eval_env)
        self.eval_env.seed(10_000 * (self.run.seed + 1) + self.num_timesteps)
        returns, lengths = evaluate_policy(
            self.model, self.eval_env, self.run.eval_episodes, return_episode_rewards=True, warn=False
        )
        values = [self.num_timesteps, np.mean(returns), np.std(returns), np.mean(lengths), self.model._n_updates, seconds]
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        write_whole(self.folder / "evaluations.csv", pd.DataFrame(self.rows).to_csv(index=False))
        self.start += time.perf_counter() - before  # evaluations cost no training time


class StepsFile(BaseCallback):
    """
    Writes the environment steps so far, every few seconds.

    :param path: of the file
    """

    def __init__(self, path: Path, every_seconds: float = 2.0) -> None:
        super().__init__()
        self.path, self.every_seconds, self.due = path, every_seconds, 0.0

    def _on_step(self) -> bool:
        if time.monotonic() >= self.due:
            write_whole(self.path, str(self.num_timesteps))
            self.due = time.monotonic() + self.every_seconds
        return True

    def _on_training_end(self) -> None:
        write_whole(self.path, str(self.num_timesteps))


class PlainCheckpoints(BaseCallback):
    """
    Checkpoints of any off-policy algorithm of SB3: the model, its replay buffer and ``VecNormalize``'s statistics. A run
    goes on with them, if not to the same bits.

    :param save_freq: environment steps
    :param folder: where the newest one is kept
    """

    model: OffPolicyAlgorithm

    def __init__(self, save_freq: int, folder: Path) -> None:
        super().__init__()
        self.save_freq, self.folder = save_freq, folder

    def _on_training_start(self) -> None:
        self.last = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps // self.save_freq > self.last // self.save_freq:
            self.last = self.num_timesteps
            self._save()

    def _save(self) -> None:
        earlier = plain_checkpoints(self.folder)
        partial = self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.model.save(partial / "model.zip")
        self.model.save_replay_buffer(partial / "replay_buffer.pkl")
        if (normalization := self.model.get_vec_normalize_env()) is not None:
            normalization.save(str(partial / "vec_normalize.pkl"))
        partial.rename(self.folder / f"steps_{self.num_timesteps}")
        for folder in earlier:
            shutil.rmtree(folder)


def plain_checkpoints(folder: Path) -> list[Path]:
    """:return: the folders that :class:`PlainCheckpoints` wrote, oldest first"""
    return sorted(folder.glob("steps_*"), key=lambda path: int(path.name.split("_")[1]))


def make_env(run: Run, training: bool) -> VecEnv:
    """:param training: whether it is for training; else it is one environment with true returns"""
    env = make_vec_env(run.environment, run.n_envs if training else 1, env_kwargs=run.env_kwargs)
    if run.normalize is None:
        return env
    return VecNormalize(env, **run.normalize) if training else VecNormalize(env, **{**run.normalize, **EVALUATED})


#: Whatever the run normalises, its evaluation neither learns from what it sees nor touches the returns.
EVALUATED = {"training": False, "norm_reward": False}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """:return: the rows of ``evaluations.csv``, if there is one"""
    return pd.read_csv(path).to_dict("records") if path.exists() else []


def write_whole(path: Path, text: str) -> None:
    """Nobody ever reads half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _claim(run: Run, folder: Path) -> None:
    """Writes ``run.json``, or makes sure that the one that is there says the same."""
    path, asked = folder / "run.json", json.loads(json.dumps(asdict(run)))
    if path.exists():
        found = json.loads(path.read_text())
        if different := [name for name in asked if found.get(name) != asked[name]]:
            there, wanted = ({name: run.get(name) for name in different} for run in (found, asked))
            raise ValueError(
                f"{folder} holds a run with {there}, but {run} is to have {wanted}. "
                "Choose another folder for the results, or delete this one."
            )
        return
    made_with = {
        "versions": versions(),
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    write_whole(path, json.dumps(asked | made_with, indent=2))


def _train(run: Run, folder: Path) -> None:
    saved = folder / "checkpoint"
    env = make_env(run, training=True)
    model = _load(run, env, saved) or algorithm_class(run.class_name)(
        run.policy, env, seed=run.seed, device="cpu", **_usable(run.kwargs)
    )
    saving = (CheckpointCallback if isinstance(model, MBPO) else PlainCheckpoints)(run.eval_freq, saved)
    callbacks = [Evaluation(run, folder), StepsFile(folder / "steps.txt"), saving]
    model.learn(run.steps - model.num_timesteps, callback=callbacks, reset_num_timesteps=False)
    model.save(folder / "partial.zip")
    (folder / "partial.zip").replace(folder / "model.zip")
    shutil.rmtree(saved, ignore_errors=True)


def _load(run: Run, env: VecEnv, folder: Path) -> OffPolicyAlgorithm | None:
    """:return: the model of the newest checkpoint, if there is one; ``env`` is wrapped as it was"""
    algorithm = algorithm_class(run.class_name)
    if issubclass(algorithm, MBPO):
        return load_checkpoint(folder, env, algorithm, device="cpu") if checkpoints(folder) else None
    found = plain_checkpoints(folder)
    if not found:
        return None
    if isinstance(env, VecNormalize):
        env = VecNormalize.load(str(found[-1] / "vec_normalize.pkl"), env.venv)
    model = algorithm.load(found[-1] / "model.zip", env, device="cpu")
    model.load_replay_buffer(found[-1] / "replay_buffer.pkl")
    model.set_random_seed(run.seed + model.num_timesteps)  # not the noise of the beginning once more
    return model


def _usable(kwargs: dict[str, Any]) -> dict[str, Any]:
    """YAML has no tuples, and SB3 changes what it gets."""
    return {name: tuple(value) if isinstance(value, list) else deepcopy(value) for name, value in kwargs.items()}
