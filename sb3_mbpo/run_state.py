"""Everything that resuming needs, in one list (:func:`collect`), as numbers that JSON and blobs can hold."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.storage import BlobStore
from sb3_mbpo.streams import EpisodeStreams, environment_streams, global_streams, reset_with_streams, set_global_streams
from sb3_mbpo.type_aliases import ImaginationResult

#: The layout of the list. A reader refuses what it does not know.
FORMAT = 1
#: VecNormalize's settings; its statistics are stored beside them.
SETTINGS = ("training", "norm_obs", "norm_reward", "norm_obs_keys", "clip_obs", "clip_reward", "gamma", "epsilon")
#: What SB3's replay buffers hold beside their rows. The constructor makes it again, or it is stored by name.
KNOWN_TO_BUFFERS = {
    "buffer_size", "n_envs", "pos", "full", "observation_space", "action_space", "obs_shape", "action_dim", "device",
    "optimize_memory_usage", "handle_timeout_termination", "n_steps", "gamma", "env", "copy_info_dict", "infos",
    "goal_selection_strategy", "n_sampled_goal", "her_ratio", "_current_ep_start",
}  # fmt: skip

SomeMBPO = TypeVar("SomeMBPO", bound=MBPO)


def collect(model: MBPO, store: BlobStore) -> dict[str, Any]:
    """
    :param model: any; large arrays go to ``store``
    :return: all the rest. The blob ``model`` is what ``model.save`` writes: policy, dynamics, their optimizers, scalers,
        elites, counters, schedules and the spaces with their random streams
    """
    env = model.get_env()
    file = io.BytesIO()
    model.save(file)
    return {
        "format": FORMAT,
        "model": store.put_bytes(file.getvalue(), ".zip"),
        "seed": model.seed,
        "replay_buffer": _collect_buffer(model.replay_buffer, store),
        "imagined": None if model.imagined_buffer is None else _collect_imagined(model, store),
        "vec_normalize": [_collect_vec_normalize(wrapper) for wrapper in _vec_normalizes(env)],
        "streams": global_streams(),
        "environments": None if env is None or model._last_obs is None else _collect_environments(model, env),
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
    # without the seed, which would start all streams anew
    model = algorithm.load(io.BytesIO(store.read(content["model"])), env=env, **{**kwargs, "seed": None})
    model.seed = content["seed"]
    _restore_buffer(model.replay_buffer, content["replay_buffer"], store)
    if content["imagined"] is not None:
        _restore_imagined(model, content["imagined"], store)
    end_last_episodes(model.replay_buffer)
    vec_env = model.get_env()
    assert vec_env is not None
    wrappers = _vec_normalizes(vec_env)
    _restore_vec_normalizes(wrappers, content["vec_normalize"])
    if content["environments"] is not None:
        with _not_counting(wrappers):  # the saved statistics have this reset in them
            _reset_environments(model, vec_env, content["environments"])
    elif model.seed is not None:
        vec_env.seed(model.seed)  # `learn` resets the environments for the first time
    set_global_streams(content["streams"])
    return model


def between_episodes(model: MBPO) -> bool:
    """Whether no episode is under way: there is no step yet, or the last one was the last of its episode everywhere."""
    buffer = model.replay_buffer
    return buffer.size() == 0 or bool(buffer.dones[buffer.pos - 1].all())


def _row_arrays(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    """The arrays of SB3's buffers with one row for each slot, (buffer_size, n_envs, ...); those in a dict as ``name/key``."""
    arrays: dict[str, Any] = {}
    for name, value in vars(buffer).items():
        arrays |= {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    slots = (buffer.buffer_size, buffer.n_envs)
    rows = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray) and array.shape[:2] == slots}
    return {name: array for name, array in rows.items() if not array.dtype.hasobject}


def _collect_buffer(buffer: ReplayBuffer, store: BlobStore) -> dict[str, Any]:
    arrays = _row_arrays(buffer)
    lost = set(vars(buffer)) - KNOWN_TO_BUFFERS - {name.split("/")[0] for name in arrays}
    if isinstance(buffer, HerReplayBuffer) and buffer.copy_info_dict:
        lost.add("infos")
    if lost:
        raise ValueError(
            f"A checkpoint holds the rows of a replay buffer, but this {type(buffer).__name__} also keeps {sorted(lost)}, "
            "which would be lost. Use one of SB3's buffers (without `copy_info_dict`), or `save_replay_buffer`."
        )
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
    if "lost_terminals" in content["arrays"]:
        buffer.lost_terminals = np.zeros(sizes, dtype=bool)  # type: ignore[attr-defined]
    targets = _row_arrays(buffer)
    for name, entry in content["arrays"].items():
        store.read_array(entry, targets[name])
    buffer.pos, buffer.full = content["pos"], content["full"]
    if isinstance(buffer, HerReplayBuffer):
        buffer._current_ep_start = np.array(content["current_episode_starts"])


def end_last_episodes(buffer: ReplayBuffer) -> None:
    """If any are still open: n-step returns, goals and next observations must not reach into the episodes to come."""
    if buffer.size() == 0:
        return
    if isinstance(buffer, HerReplayBuffer):
        buffer.truncate_last_trajectory()
        return
    last = buffer.pos - 1
    if buffer.handle_timeout_termination:  # else every time limit counts as a termination
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


def _vec_normalizes(env: VecEnv | None) -> list[VecNormalize]:
    """All of them, from the outside in."""
    found = []
    while isinstance(env, VecEnvWrapper):
        found += [env] if isinstance(env, VecNormalize) else []
        env = env.venv
    return found


def _collect_vec_normalize(env: VecNormalize) -> dict[str, Any]:
    observations = vars(env).get("obs_rms", {})
    parts = observations if isinstance(observations, dict) else {"": observations}
    settings = {name: getattr(env, name) for name in SETTINGS}
    return {
        "settings": {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()},
        "obs_rms": {key: _collect_statistics(part) for key, part in parts.items()},
        "ret_rms": _collect_statistics(env.ret_rms),
    }


def _restore_vec_normalizes(wrappers: list[VecNormalize], contents: list[dict[str, Any]]) -> None:
    if len(wrappers) != len(contents):
        raise ValueError(
            f"The checkpoint was saved with {len(contents)} `VecNormalize` around the environment, but `env` has "
            f"{len(wrappers)}: pass the environment wrapped as it was."
        )
    for env, content in zip(wrappers, contents, strict=True):
        for name, value in content["settings"].items():
            setattr(env, name, value)
        parts = {key: _statistics(part) for key, part in content["obs_rms"].items()}
        if parts:
            env.obs_rms = parts.get("", parts)  # type: ignore[assignment]
        env.ret_rms = _statistics(content["ret_rms"])


@contextlib.contextmanager
def _not_counting(wrappers: list[VecNormalize]) -> Iterator[None]:
    training = [env.training for env in wrappers]
    try:
        for env in wrappers:
            env.training = False
        yield
    finally:
        for env, value in zip(wrappers, training, strict=True):
            env.training = value


def _collect_statistics(statistics: RunningMeanStd) -> dict[str, Any]:
    mean, var = np.asarray(statistics.mean), np.asarray(statistics.var)
    return {"mean": mean.tolist(), "var": var.tolist(), "count": float(statistics.count)}


def _statistics(content: dict[str, Any]) -> RunningMeanStd:
    statistics = RunningMeanStd()
    statistics.mean, statistics.var = np.array(content["mean"]), np.array(content["var"])
    statistics.count = content["count"]
    return statistics


def _collect_environments(model: MBPO, env: VecEnv) -> dict[str, Any]:
    streams = model._episode_streams
    if between_episodes(model) and streams is not None and None not in streams.before:
        return {"before": streams.before, "after": streams.after}
    return {"before": environment_streams(env), "after": [None] * env.num_envs}


def _reset_environments(model: MBPO, env: VecEnv, content: dict[str, Any]) -> None:
    """Resets the environments, so that ``learn`` need not."""
    streams = EpisodeStreams(content["before"], content["after"])
    model._last_obs = reset_with_streams(env, streams)
    streams.after = environment_streams(env)
    model._episode_streams = streams
    model._last_episode_starts = np.ones((env.num_envs,), dtype=bool)
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        model._last_original_obs = vec_normalize.get_original_obs()


def blob_names(content: dict[str, Any]) -> set[str]:
    """:return: the blobs that the content needs"""
    entries = list(content["replay_buffer"]["arrays"].values())
    entries += [] if content["imagined"] is None else [content["imagined"]["rows"]]
    return {content["model"], *(name for entry in entries for name in entry["blobs"])}
