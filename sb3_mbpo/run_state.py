"""Everything that resuming needs, in one list (:func:`collect`), as numbers that JSON and blobs can hold."""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.storage import BlobStore
from sb3_mbpo.streams import EpisodeStreams, begin_episodes, environment_streams, global_streams, set_global_streams
from sb3_mbpo.type_aliases import ImaginationResult

#: The layout of the list. A reader refuses what it does not know.
FORMAT = 1
#: VecNormalize's settings; its statistics are stored beside them.
SETTINGS = ("training", "norm_obs", "norm_reward", "norm_obs_keys", "clip_obs", "clip_reward", "gamma", "epsilon")

SomeMBPO = TypeVar("SomeMBPO", bound=MBPO)


def collect(model: MBPO, store: BlobStore) -> dict[str, Any]:
    """
    :param model: any; large arrays go to ``store``
    :return: all the rest. The blob ``model`` is what ``model.save`` writes: policy, dynamics, their optimizers, scalers,
        elites, counters, schedules and the spaces with their random streams
    """
    env = model.get_env()
    return {
        "format": FORMAT,
        "model": store.put_file(lambda path: _write_model(model, path)),
        "seed": model.seed,
        "replay_buffer": _collect_buffer(model.replay_buffer, store),
        "imagined": None if model.imagined_buffer is None else _collect_imagined(model, store),
        "vec_normalize": _collect_vec_normalize(model.get_vec_normalize_env()),
        "streams": global_streams(),
        "environments": None if env is None else _collect_environments(model, env),
    }


def restore(
    content: dict[str, Any], store: BlobStore, env: GymEnv, algorithm: type[SomeMBPO], kwargs: dict[str, Any]
) -> SomeMBPO:
    """
    :param content: made by :func:`collect`
    :param store: with the blobs
    :param env: as it was
    :param algorithm: the class of the model
    :param kwargs: for its ``load``
    :return: the model, its environments reset
    :raises DamagedFileError: when a blob is not what was written
    :raises ValueError: when the content does not fit
    """
    if content["format"] != FORMAT:
        raise ValueError(f"The checkpoint has format {content['format']}, but this version of sb3_mbpo reads {FORMAT}.")
    store.read(content["model"])  # damaged?
    # without the seed, which would start all streams anew
    model = algorithm.load(store.folder / content["model"], env=env, **{"seed": None, **kwargs})
    model.seed = content["seed"]
    _restore_buffer(model.replay_buffer, content["replay_buffer"], store)
    if content["imagined"] is not None:
        _restore_imagined(model, content["imagined"], store)
    vec_env, vec_normalize = model.get_env(), model.get_vec_normalize_env()
    assert vec_env is not None
    _restore_vec_normalize(vec_normalize, content["vec_normalize"])
    if content["environments"] is not None:
        _restore_environments(model, vec_env, content["environments"])
    if vec_normalize is not None:
        vec_normalize.training = content["vec_normalize"]["settings"]["training"]
    set_global_streams(content["streams"])
    return model


def episodes_begin(model: MBPO) -> bool:
    """Whether the last stored step was the last of its episode in every environment."""
    buffer = model.replay_buffer
    return buffer.size() > 0 and bool(buffer.dones[buffer.pos - 1].all())


def _write_model(model: MBPO, path: Path) -> None:
    with path.open("wb") as file:
        model.save(file)


def _row_arrays(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    """The arrays of SB3's buffers with one row for each slot, (buffer_size, n_envs, ...); those in a dict as ``name/key``."""
    arrays: dict[str, Any] = {}
    for name, value in vars(buffer).items():
        arrays |= {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    slots = (buffer.buffer_size, buffer.n_envs)
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray) and array.shape[:2] == slots}


def _collect_buffer(buffer: ReplayBuffer, store: BlobStore) -> dict[str, Any]:
    arrays = _row_arrays(buffer)
    if isinstance(buffer, HerReplayBuffer) and not buffer.copy_info_dict:
        del arrays["infos"]  # empty
    return {
        "buffer_size": buffer.buffer_size,
        "n_envs": buffer.n_envs,
        "pos": buffer.pos,
        "full": buffer.full,
        "arrays": {name: store.put_array(array[: buffer.size()]) for name, array in arrays.items()},
        "current_episode_starts": buffer._current_ep_start.tolist() if isinstance(buffer, HerReplayBuffer) else None,
    }


def _restore_buffer(buffer: ReplayBuffer, content: dict[str, Any], store: BlobStore) -> None:
    sizes = (content["buffer_size"], content["n_envs"])
    if (buffer.buffer_size, buffer.n_envs) != sizes:
        raise ValueError(
            f"The checkpoint's replay buffer has {sizes[0]} slots for {sizes[1]} environments, but the model's has "
            f"{buffer.buffer_size} for {buffer.n_envs}: pass as many environments as there were, and no `buffer_size`."
        )
    if "clipped_terminals" in content["arrays"]:
        buffer.clipped_terminals = np.zeros(sizes, dtype=bool)  # type: ignore[attr-defined]
    targets = _row_arrays(buffer)
    for name, entry in content["arrays"].items():
        store.read_array(entry, targets[name])
    buffer.pos, buffer.full = content["pos"], content["full"]
    if isinstance(buffer, HerReplayBuffer):
        buffer._current_ep_start = np.array(content["current_episode_starts"])


def _end_last_episodes(buffer: ReplayBuffer) -> None:
    """The environments begin anew: n-step returns, goals and next observations must not reach across the seam."""
    if isinstance(buffer, HerReplayBuffer):
        buffer.truncate_last_trajectory()
        return
    last = buffer.pos - 1
    if not buffer.optimize_memory_usage:  # this has lost the next observation, so SB3 lets it count as terminal
        buffer.timeouts[last] = np.maximum(buffer.timeouts[last], 1 - buffer.dones[last])
    buffer.dones[last] = 1


def _collect_imagined(model: MBPO, store: BlobStore) -> dict[str, Any]:
    assert model.imagined_buffer is not None
    rows, pos = model.imagined_buffer.ring()
    result = None if model.imagination_result is None else vars(model.imagination_result)
    return {"capacity": model.imagined_buffer.capacity, "pos": pos, "rows": store.put_array(rows), "result": result}


def _restore_imagined(model: MBPO, content: dict[str, Any], store: BlobStore) -> None:
    assert model.imagined_buffer is not None
    model.imagined_buffer.set_ring(content["capacity"], store.read_array(content["rows"]), content["pos"])
    model.imagination_result = None if content["result"] is None else ImaginationResult(**content["result"])


def _collect_vec_normalize(env: VecNormalize | None) -> dict[str, Any] | None:
    if env is None:
        return None
    observations = getattr(env, "obs_rms", {})
    parts = observations if isinstance(observations, dict) else {"": observations}
    return {
        "settings": {name: getattr(env, name) for name in SETTINGS},
        "obs_rms": {key: _collect_statistics(part) for key, part in parts.items()},
        "ret_rms": _collect_statistics(env.ret_rms),
    }


def _restore_vec_normalize(env: VecNormalize | None, content: dict[str, Any] | None) -> None:
    """All but ``training``, which stays off until the environments have been reset: that would count again."""
    if env is None and content is None:
        return
    if env is None or content is None:
        raise ValueError(
            f"The checkpoint was saved {'with' if env is None else 'without'} `VecNormalize`, but `env` is "
            f"{'not ' if env is None else ''}wrapped in it: pass the environment wrapped as it was."
        )
    for name, value in (content["settings"] | {"training": False}).items():
        setattr(env, name, value)
    parts = {key: _statistics(part) for key, part in content["obs_rms"].items()}
    if parts:
        env.obs_rms = parts.get("", parts)  # type: ignore[assignment]
    env.ret_rms = _statistics(content["ret_rms"])


def _collect_statistics(statistics: RunningMeanStd) -> dict[str, Any]:
    mean, var = np.asarray(statistics.mean), np.asarray(statistics.var)
    return {"mean": mean.tolist(), "var": var.tolist(), "count": float(statistics.count)}


def _statistics(content: dict[str, Any]) -> RunningMeanStd:
    statistics = RunningMeanStd()
    statistics.mean, statistics.var = np.array(content["mean"]), np.array(content["var"])
    statistics.count = content["count"]
    return statistics


def _collect_environments(model: MBPO, env: VecEnv) -> dict[str, Any]:
    begun = episodes_begin(model) and model._episode_streams is not None
    return {
        "episodes_begin": begun,
        "before": model._episode_streams.previous if begun and model._episode_streams else [None] * env.num_envs,
        "now": environment_streams(env),
    }


def _restore_environments(model: MBPO, env: VecEnv, content: dict[str, Any]) -> None:
    """Resets the environments, so that ``learn`` need not."""
    if model.replay_buffer.size() > 0 and not content["episodes_begin"]:
        _end_last_episodes(model.replay_buffer)
    model._last_obs = begin_episodes(env, content["before"], content["now"])
    model._episode_streams = EpisodeStreams(env)
    model._last_episode_starts = np.ones((env.num_envs,), dtype=bool)
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        model._last_original_obs = vec_normalize.get_original_obs()


def blob_names(content: dict[str, Any]) -> set[str]:
    """:return: the blobs that the content needs"""
    entries = list(content["replay_buffer"]["arrays"].values())
    entries += [] if content["imagined"] is None else [content["imagined"]["rows"]]
    return {content["model"], *(name for entry in entries for name in entry["blobs"])}
