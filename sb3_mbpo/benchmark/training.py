"""
One run of a suite, from its start or from where it was stopped, to its end. Its folder holds

- ``run.json``: the run, versions, commit and machine, and these again, in ``continued``, each time that it went on,
- ``evaluations.csv``: a row for each evaluation,
- ``checkpoint``: while it is under way, and ``model.zip`` when it has ended,
- ``steps.txt``: the environment steps so far, for whoever watches, and ``log.txt``: what it printed, and where it failed.
"""

import contextlib
import io
import json
import os
import shutil
import traceback
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch as th
from filelock import FileLock, Timeout
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_mbpo import MBPO
from sb3_mbpo.benchmark.callbacks import Evaluation, PlainCheckpoints, StepsFile, Uncounted, plain_checkpoints
from sb3_mbpo.benchmark.provenance import commit, processor, versions
from sb3_mbpo.benchmark.suite import Run, algorithm_class
from sb3_mbpo.checkpoint import CheckpointCallback, checkpoints, load_checkpoint
from sb3_mbpo.hyperparams import as_arguments
from sb3_mbpo.run_state import end_last_episodes
from sb3_mbpo.storage import write_whole

#: Whatever a run normalises, its evaluation neither learns from what it sees nor touches the returns.
EVALUATED = {"training": False, "norm_reward": False}


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
        try:
            _check_that_it_is(run, folder)
            if not is_finished(run, results):
                _train(run, folder)
        except Exception:
            traceback.print_exc()
            raise


def is_finished(run: Run, results: Path) -> bool:
    """Whether the run has come to its end, with these settings and no others."""
    folder = results / run.folder
    return (folder / "model.zip").exists() and not _differences(run, folder)


def update_scores(run: Run, results: Path) -> None:
    """Those of the suite, which only the report reads, replace others in ``run.json``, if there is one of this run."""
    folder = results / run.folder
    path = folder / "run.json"
    if not path.exists() or _differences(run, folder):
        return
    with contextlib.suppress(Timeout), FileLock(folder / "lock", timeout=0):  # never while it is under way elsewhere
        info = _read(path)
        if info.get("scores") != run.scores:
            write_whole(path, json.dumps(info | {"scores": run.scores}, indent=2).encode())


def steps_so_far(run: Run, results: Path) -> int:
    """:return: environment steps, as of a few seconds ago"""
    try:
        return int((results / run.folder / "steps.txt").read_text())
    except (OSError, ValueError):  # not begun, or being written
        return 0


def make_env(run: Run, training: bool) -> VecEnv:
    """:param training: whether it is for training; else it is one environment with true returns"""
    env = make_vec_env(run.environment, run.n_envs if training else 1, env_kwargs=run.env_kwargs)
    if run.normalize is None:
        return env
    if not training:
        return VecNormalize(env, **{**run.normalize, **EVALUATED})
    # as in the Zoo, rewards are scaled by returns of the algorithm's own discount
    discount = {"gamma": run.kwargs["gamma"]} if "gamma" in run.kwargs else {}
    return VecNormalize(env, **{**run.normalize, **discount})


def _check_that_it_is(run: Run, folder: Path) -> None:
    if different := _differences(run, folder):
        there, wanted = ({name: pair[side] for name, pair in different.items()} for side in (0, 1))
        raise ValueError(
            f"{folder} holds a run with {there}, but {run} is to have {wanted}. "
            "Choose another folder for the results, or delete this one."
        )


def _describe(run: Run, folder: Path, from_step: int) -> None:
    """
    Writes ``run.json``.

    :param from_step: environment steps of the checkpoint that the run goes on from; 0: it begins
    """
    path = folder / "run.json"
    now = {
        "versions": versions(),
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    info = asdict(run) | now
    if from_step > 0:
        info = _read(path)
        info["continued"] = [*info.get("continued", []), {"from_step": from_step} | now]
    write_whole(path, json.dumps(info, indent=2).encode())


def _differences(run: Run, folder: Path) -> dict[str, tuple[Any, Any]]:
    """:return: by name, what ``run.json`` says and what the run is to have, where they are not the same and it matters"""
    path, asked = folder / "run.json", json.loads(json.dumps(asdict(run)))
    del asked["scores"]  # the report's alone
    found = _read(path) if path.exists() else asked
    return {name: (found.get(name), asked[name]) for name in asked if found.get(name) != asked[name]}


def _read(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete its folder, and the run begins anew.") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} is damaged: it holds {info!r}. Delete its folder, and the run begins anew.")
    return info


def _train(run: Run, folder: Path) -> None:
    saved = folder / "checkpoint"
    env = make_env(run, training=True)
    model = _load(run, env, saved) or algorithm_class(run.class_name)(
        run.policy, env, seed=run.seed, device="cpu", **as_arguments(run.kwargs)
    )
    _describe(run, folder, model.num_timesteps)
    saving = (CheckpointCallback if isinstance(model, MBPO) else PlainCheckpoints)(run.eval_freq, saved)
    evaluation = Evaluation(
        make_env(run, training=False), run.eval_freq, run.eval_episodes, 10_000 * (run.seed + 1), folder / "evaluations.csv"
    )
    callbacks = [evaluation, StepsFile(folder / "steps.txt"), Uncounted(saving, evaluation)]
    model.learn(run.steps - model.num_timesteps, callback=callbacks, reset_num_timesteps=False)
    file = io.BytesIO()
    model.save(file)
    write_whole(folder / "model.zip", file.getvalue())
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
    assert model.replay_buffer is not None
    end_last_episodes(model.replay_buffer)  # the environment begins new ones
    model.set_random_seed(run.seed + model.num_timesteps)  # not the noise of the beginning once more
    return model
