"""Everything that resuming needs, in one list: what ``model.save`` holds, and the four things that it leaves out."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.type_aliases import Transitions

MODEL = "model.zip"  # policy, dynamics, their optimizers, counters, elites
REPLAY_BUFFER = "replay_buffer.pkl"  # the real transitions
IMAGINED = "imagined.pt"  # the imagined ones
VEC_NORMALIZE = "vec_normalize.pkl"  # the running statistics, if there are any
RANDOM = "random.pt"  # the state of every random stream


def save_checkpoint(model: MBPO, folder: str | Path) -> None:
    """
    Saves all that :func:`load_checkpoint` needs. The folder appears whole or not at all; an older one is replaced.

    :param model: between two calls of ``learn``, or at the end of a rollout in a callback
    :param folder: to write
    """
    folder = Path(folder)
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save(partial / MODEL)
    model.save_replay_buffer(partial / REPLAY_BUFFER)
    if model.imagined_buffer is not None:
        th.save(tuple(model.imagined_buffer.newest(len(model.imagined_buffer))), partial / IMAGINED)
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        vec_normalize.save(str(partial / VEC_NORMALIZE))
    th.save(_random_state(model), partial / RANDOM)

    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: str | Path, env: GymEnv, **kwargs: Any) -> MBPO:
    """
    A model that goes on with ``learn(steps, reset_num_timesteps=False)`` as if it had never stopped. The environment
    starts a new episode: at the end of an episode, and with an environment that starts the same, the same bits follow.
    (``VecNormalize`` counts the observation of that reset twice.)

    Like SB3's own files, a checkpoint holds pickles: load only those you trust.

    :param folder: written by :func:`save_checkpoint`
    :param env: the environment; its ``VecNormalize``, if it has one, gets the saved statistics
    :param kwargs: attributes to change, as for ``MBPO.load``
    :raises ValueError: when there is no checkpoint, or only one of model and ``env`` has a ``VecNormalize``
    """
    folder = Path(folder)
    if not (folder / MODEL).exists():
        raise ValueError(f"Expected a folder with {MODEL} in it, but got {folder}: write it with `save_checkpoint`.")
    model = MBPO.load(folder / MODEL, env=env, **kwargs)
    vec_normalize = unwrap_vec_normalize(model.get_env())  # type: ignore[arg-type]
    if (vec_normalize is not None) != (folder / VEC_NORMALIZE).exists():
        raise ValueError(
            f"The checkpoint was saved {'with' if vec_normalize is None else 'without'} `VecNormalize`, but `env` is "
            f"{'not ' if vec_normalize is None else ''}wrapped in it: pass the environment wrapped as it was."
        )
    if vec_normalize is not None:
        saved = VecNormalize.load(str(folder / VEC_NORMALIZE), vec_normalize.venv)
        vec_normalize.__dict__.update(saved.__dict__)
    model.load_replay_buffer(folder / REPLAY_BUFFER)
    if model.imagined_buffer is not None:
        rows = Transitions(*th.load(folder / IMAGINED, map_location=model.device, weights_only=True))
        model.imagined_buffer.add(rows)
    _set_random_state(model, th.load(folder / RANDOM, weights_only=True))
    return model


def _random_state(model: MBPO) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "model": model._generator.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else [],
        "numpy": [name, th.as_tensor(np.asarray(keys, dtype=np.int64)), *rest],
        "python": list(random.getstate()),
    }


def _set_random_state(model: MBPO, state: dict[str, Any]) -> None:
    model._generator.set_state(state["model"])
    th.set_rng_state(state["torch"])
    if state["cuda"]:
        th.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
