"""What SB3's SAC lacks to go on from a file as if nothing had happened. It has nothing to do with models."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import recursive_getattr, save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv

from sb3_mbpo.streams import EpisodeStreams, State, environment_streams, generator_state, set_generator_state

SelfResumableSAC = TypeVar("SelfResumableSAC", bound="ResumableSAC")


class WrongAlgorithm:
    """
    Stands in a saved file under the name of a module that SAC lacks. An algorithm without that module finds this
    instead when it loads the file, and the user an explanation.

    :param algorithm: that saved the file
    """

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"This file was saved by {self.algorithm}: load it with `{self.algorithm}.load`, or, if it belongs to a "
            f"checkpoint, pass {self.algorithm} to `load_checkpoint`."
        )


class ResumableSAC(SAC):
    """
    SAC with a random stream of its own, which it saves; it remembers where the episodes of its environments began, and
    explains a file of another algorithm.
    """

    replay_buffer: ReplayBuffer
    _generator_state: State | None = None  # of the loaded file

    def _setup_model(self) -> None:
        self._generator = th.Generator(self.device)
        self._generator.seed()
        self._episode_streams: EpisodeStreams | None = None
        super()._setup_model()

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(seed)
        if seed is not None:
            self._generator.manual_seed(seed)

    def _continue_stream(self) -> None:
        """Call this when the networks are made: from here the stream goes on as in the loaded file, if there is one."""
        if self._generator_state is not None:
            set_generator_state(self._generator, self._generator_state)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        first_observations = self._last_obs
        result = super()._setup_learn(*args, **kwargs)
        if self._last_obs is not first_observations:
            assert self.env is not None
            self._episode_streams = EpisodeStreams([None] * self.env.num_envs, environment_streams(self.env))
        return result

    def _store_transition(self, *args: Any, **kwargs: Any) -> None:
        super()._store_transition(*args, **kwargs)
        ended = np.flatnonzero(self.replay_buffer.dones[self.replay_buffer.pos - 1])
        if len(ended) and self.env is not None and self._episode_streams is not None:
            self._episode_streams.record_beginnings(self.env, ended.tolist())

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        self._generator_state = generator_state(self._generator)
        modules, variables = self._get_torch_save_params()
        excluded = {*self._excluded_save_params(), *(exclude or [])} - {*(include or [])}
        excluded |= {name.split(".")[0] for name in [*modules, *variables]}
        data = {name: value for name, value in vars(self).items() if name not in excluded}
        for name in set(modules) - set(SAC._get_torch_save_params(self)[0]):
            data[name] = WrongAlgorithm(type(self).__name__)
        save_to_zip_file(path, data, self.get_parameters(), {name: recursive_getattr(self, name) for name in variables})

    @classmethod
    def load(
        cls: type[SelfResumableSAC],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfResumableSAC:
        try:
            model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        except (KeyError, RuntimeError) as error:
            if error.args == ("policy.optimizer",):  # what SB3 asks for when the parameters have other names
                misfit = error.__context__
            elif "state_dict" in str(error):  # what PyTorch says when they have other shapes
                misfit = error
            else:
                raise
            raise ValueError(
                f"The file does not hold what {cls.__name__} needs. {misfit} Arguments that change which networks and "
                "parameters are there, such as `net_arch` in `dynamics_kwargs`, cannot be changed on loading. If another "
                "algorithm saved the file, load it with that, such as `SAC.load`; to go on from SAC's policy, make a new "
                f"{cls.__name__} with the same networks and call "
                "`model.set_parameters(sac.get_parameters(), exact_match=False)`."
            ) from error
        if kwargs.get("seed") is not None:
            model._generator.manual_seed(kwargs["seed"])
        return model

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_generator", "_episode_streams"]
