"""The random streams of a run, as plain numbers that JSON can hold."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

State = dict[str, Any]


def global_streams() -> State:
    """The states of the streams that SB3 draws from: Python's, NumPy's and PyTorch's."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _to_hex(th.get_rng_state()),
        "cuda": [_to_hex(state) for state in th.cuda.get_rng_state_all()] if th.cuda.is_available() else [],
    }


def set_global_streams(state: State) -> None:
    """:param state: made by :func:`global_streams`"""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    th.set_rng_state(_from_hex(state["torch"]))
    if len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([_from_hex(cuda) for cuda in state["cuda"]])


def generator_state(generator: th.Generator) -> State:
    """The state of a generator of PyTorch, and the type of its device."""
    return {"device": generator.device.type, "state": _to_hex(generator.get_state())}


def set_generator_state(generator: th.Generator, state: State) -> None:
    """
    On another type of device, where the state has no meaning, nothing changes.

    :param state: of a generator
    """
    if generator.device.type == state["device"]:
        generator.set_state(_from_hex(state["state"]))


def environment_streams(env: VecEnv, indices: Sequence[int] | None = None) -> list[State | None]:
    """
    :param env: any
    :param indices: of the environments; ``None``: all
    :return: the state of ``np_random``, Gymnasium's stream, in each; ``None`` where there is none
    """
    chosen = range(env.num_envs) if indices is None else indices
    try:
        generators = env.get_attr("np_random", list(chosen)) if env.has_attr("np_random") else []
    except (AttributeError, NotImplementedError, TypeError):  # a VecEnv that is not made of Gymnasium's environments
        generators = []
    if len(generators) != len(chosen):  # there is none, or one whose `get_attr` does not choose
        generators = [None for _ in chosen]
    return [_numpy_state(generator) for generator in generators]


def set_environment_streams(env: VecEnv, states: Sequence[State | None]) -> None:
    """:param states: made by :func:`environment_streams`, one for each environment; ``None`` leaves it as it is"""
    for index, state in enumerate(states):
        if state is not None:
            bit_generator: Any = np.random.PCG64()
            bit_generator.state = state
            env.set_attr("np_random", np.random.Generator(bit_generator), index)


class EpisodeStreams:
    """
    The environments' streams before and after the first observations of their episodes were drawn.

    Where a step draws nothing, as in all of Gymnasium's MuJoCo tasks, a stream does not change until the next episode
    begins: then what came after one beginning comes before the next.

    :param before: of each environment; ``None``: not known
    :param after: the same
    """

    def __init__(self, before: Sequence[State | None], after: Sequence[State | None]) -> None:
        self.before = list(before)
        self.after = list(after)

    def record_beginnings(self, env: VecEnv, indices: Sequence[int]) -> None:
        """
        Call this when new episodes have begun.

        :param indices: of their environments
        """
        for index, state in zip(indices, environment_streams(env, indices), strict=True):
            self.before[index], self.after[index] = self.after[index], state


def reset_with_streams(env: VecEnv, streams: EpisodeStreams) -> Any:
    """
    Resets all environments, each to the episode that it had begun with these streams.

    :param env: any
    :param streams: where the streams after the beginning are not known, they go on from what the reset draws
    :return: the first observations
    """
    if any(state is not None for state in (*streams.before, *streams.after)):
        env.unwrapped._reset_seeds()  # a seed for the next reset would replace the streams
    set_environment_streams(env, streams.before)
    observations = env.reset()
    set_environment_streams(env, streams.after)
    return observations


def _numpy_state(generator: Any) -> State | None:
    if isinstance(generator, np.random.Generator) and isinstance(generator.bit_generator, np.random.PCG64):
        return dict(generator.bit_generator.state)
    return None  # Gymnasium makes no other


def _to_hex(state: th.Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _from_hex(text: str) -> th.Tensor:
    return th.frombuffer(bytearray.fromhex(text), dtype=th.uint8)
