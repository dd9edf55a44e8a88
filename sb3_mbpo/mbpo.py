"""``MBPO``: SB3's SAC, fed mostly with transitions that it imagines. Start reading here."""

import sys
import time
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.sac.policies import SACPolicy

from sb3_mbpo.buffers import (
    ModelAugmentedReplayBuffer,
    check_finite,
    count_usable,
    draw_observations,
    mark_lost_terminals,
    real_transitions,
)
from sb3_mbpo.callback import DynamicsCallback
from sb3_mbpo.dynamics import Dynamics, DynamicsConfig
from sb3_mbpo.fit import MIN_TRANSITIONS, fit_dynamics, make_optimizer
from sb3_mbpo.imagination import imagine_round, sample_actions
from sb3_mbpo.imagined_buffer import ImaginedBuffer
from sb3_mbpo.observations import ObservationLayout, UnsupportedActionSpaceError, why_not_modelled
from sb3_mbpo.resumable import ResumableSAC
from sb3_mbpo.rules import check_rules
from sb3_mbpo.schedules import check_positive, check_rollout_length, imagined_capacity, real_ratio_at, rollout_length_at
from sb3_mbpo.tasks import known_termination_fn
from sb3_mbpo.type_aliases import FitResult, ImaginationResult, RewardFn, RolloutLength, TerminationFn
from sb3_mbpo.update import sac_updates

SelfMBPO = TypeVar("SelfMBPO", bound="MBPO")


class MBPO(ResumableSAC):
    """
    Model-Based Policy Optimization (MBPO): SAC that trains on short rollouts inside a learned model of the environment.

    Paper: https://arxiv.org/abs/1906.08253 (Janner et al. 2019), code: https://github.com/jannerm/mbpo

    Every ``dynamics_train_freq`` environment steps an ensemble of probabilistic networks is fitted to the real
    transitions; the current policy then acts in it for ``rollout_length`` steps from ``rollout_batch_size`` real
    observations; SAC's batches are drawn from what came out, but for a share ``real_ratio``. Until the first fit, MBPO
    is SAC. Images, integer observations and ``HerReplayBuffer`` keep it that way (``idle_reason`` says why).

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: of Adam, for all networks of SAC; it can be a function of the progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer of real transitions
    :param learning_starts: environment steps with random actions before learning. SAC's 100 are too few to fit a model to
    :param batch_size: rows of each gradient update of SAC
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor
    :param train_freq: update every ``train_freq`` steps, or a tuple of frequency and unit like ``(2, "episode")``
    :param gradient_steps: updates per call of ``train``; -1: as many as environment steps since the last call. As in
        SB3 it counts per call: with n environments there are n transitions for as many updates
    :param action_noise: the action noise type, for the real environment only
    :param replay_buffer_class: of the real transitions
    :param replay_buffer_kwargs: keyword arguments of the replay buffer
    :param optimize_memory_usage: a replay buffer of half the size; it cannot teach terminations, they must be known
    :param n_steps: n-step returns for the real rows; imagined rows are one step each
    :param ent_coef: entropy coefficient; "auto" learns it ("auto_0.1": from 0.1)
    :param target_update_interval: gradient steps between two updates of the target network
    :param target_entropy: target entropy when learning ``ent_coef``
    :param use_sde: whether to use generalized State Dependent Exploration (gSDE)
    :param sde_sample_freq: steps between two noise matrices of gSDE; -1: one per rollout
    :param use_sde_at_warmup: whether to use gSDE instead of uniform sampling during the warm up phase
    :param stats_window_size: episodes to average the logged returns over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed for the pseudo random generators
    :param device: device (cpu, cuda, ...) on which the code should be run
    :param dynamics_train_freq: environment steps between two fits of the dynamics, from ``learning_starts`` on
    :param rollout_length: steps k of an imagined rollout: an int, or ``(start_step, end_step, k_first, k_last)``,
        linear in environment steps and rounded down
    :param rollout_batch_size: imagined rollouts per round; there is one round after each fit
    :param rollout_retain_steps: environment steps whose rollouts fill the imagined buffer, of
        ``rollout_batch_size * k * rollout_retain_steps / dynamics_train_freq`` rows; the oldest give way
    :param real_ratio: share of real rows in every batch, as a float or a schedule (function of the progress remaining,
        from 1 to 0). With 1, and a ``policy_delay`` of 1, the updates are SAC's
    :param policy_delay: critic updates per update of the actor and the entropy coefficient; 1 while it runs as plain SAC
    :param termination_fn: ``(obs, action, next_obs) -> bool array of shape (batch,)``: whether the task has ended.
        It gets flat, raw observations (batch, obs_dim) and actions in the environment's units (batch, action_dim): float32
        NumPy arrays, or torch tensors if it is decorated with ``sb3_mbpo.takes_tensors``. A Dict's parts follow each other in
        the order of its space. ``None``: the environment's own rule where ``sb3_mbpo.tasks`` knows it, else learned
    :param reward_fn: ``(obs, action, next_obs) -> float array of shape (batch,)``, called the same way. ``None``: learned
    :param dynamics_kwargs: sizes and settings of the ensemble and its fit, see :class:`sb3_mbpo.dynamics.DynamicsConfig`
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: for a value out of range, an unknown name in ``dynamics_kwargs`` or an action space other than Box
    """

    dynamics: Dynamics | None  # None: these observations are not modelled
    imagined_buffer: ImaginedBuffer | None

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 20,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        dynamics_train_freq: int = 250,
        rollout_length: RolloutLength = 1,
        rollout_batch_size: int = 100_000,
        rollout_retain_steps: int = 1000,
        real_ratio: float | Schedule = 0.05,
        policy_delay: int = 1,
        termination_fn: TerminationFn | None = None,
        reward_fn: RewardFn | None = None,
        dynamics_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
    ) -> None:
        self.dynamics_train_freq = dynamics_train_freq
        self.rollout_length = rollout_length
        self.rollout_batch_size = rollout_batch_size
        self.rollout_retain_steps = rollout_retain_steps
        self.real_ratio = real_ratio
        self.policy_delay = policy_delay
        self.termination_fn = termination_fn
        self.reward_fn = reward_fn
        self.dynamics_kwargs = dynamics_kwargs
        self.fit_result: FitResult | None = None
        self.imagination_result: ImaginationResult | None = None
        self._last_fit_timestep: int | None = None
        try:
            # fmt: off
            super().__init__(
                policy, env, learning_rate, buffer_size, learning_starts, batch_size, tau, gamma, train_freq, gradient_steps,
                action_noise, replay_buffer_class, replay_buffer_kwargs, optimize_memory_usage, n_steps, ent_coef,
                target_update_interval, target_entropy, use_sde, sde_sample_freq, use_sde_at_warmup, stats_window_size,
                tensorboard_log, policy_kwargs, verbose, seed, device, _init_setup_model,
            )
            # fmt: on
        except AssertionError as error:
            space = getattr(self, "action_space", None)
            if space is None or (isinstance(space, spaces.Box) and space.is_bounded()):
                raise
            raise UnsupportedActionSpaceError(
                f"{type(self).__name__} needs a Box action space with finite bounds, but the environment has {space}. Bound "
                "it, for example with `gymnasium.wrappers.RescaleAction`; for discrete actions use an algorithm such as DQN."
            ) from error

    def _check_parameters(self) -> None:
        for name in ("dynamics_train_freq", "rollout_batch_size", "rollout_retain_steps", "policy_delay"):
            setattr(self, name, check_positive(name, getattr(self, name)))
        self.rollout_length = check_rollout_length(self.rollout_length)
        real_ratio_at(1.0, self.real_ratio)
        check_rules(termination_fn=self.termination_fn, reward_fn=self.reward_fn)
        DynamicsConfig.from_kwargs(self.dynamics_kwargs)

    def _setup_model(self) -> None:
        self._check_parameters()  # here, because loading may change them
        super()._setup_model()
        self._has_said_idle = False
        self._why_not_modelled = why_not_modelled(self.observation_space, type(self.replay_buffer))
        self.dynamics, self.imagined_buffer = None, None
        if self._why_not_modelled is None:
            self._setup_dynamics()
        self._continue_stream()

    def _setup_dynamics(self) -> None:
        assert isinstance(self.action_space, spaces.Box)
        self._layout = ObservationLayout(self.observation_space)
        config = DynamicsConfig.from_kwargs(self.dynamics_kwargs)
        self.dynamics = Dynamics(self._layout.obs_dim, self.action_space, config, self._generator).to(self.device)
        self.dynamics_optimizer = make_optimizer(self.dynamics)
        self.termination_optimizer = th.optim.Adam(self.dynamics.termination_head.parameters(), lr=3e-3)
        action_dim = int(np.prod(self.action_space.shape))
        reserved = max(self._imagined_capacity(step) for step in (0, sys.maxsize))  # lengths only grow, or only shrink
        capacity = self._imagined_capacity(self.num_timesteps)
        self.imagined_buffer = ImaginedBuffer(capacity, self._layout.obs_dim, action_dim, self.device, reserved)
        self._read_task()

    def _read_task(self) -> None:
        """The rules of the task come from the user, else from the environment that is set now."""
        if self.dynamics is not None:
            self.dynamics.reward_fn = self.reward_fn
            self.dynamics.termination_fn = self.termination_fn or known_termination_fn(self.env)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        super().set_env(env, force_reset)
        self._read_task()

    def dynamics_due(self) -> bool:
        """Whether a fit is due: once the warm-up is stored (anew after loading), then every ``dynamics_train_freq`` steps."""
        if self.idle_reason() is not None or self._current_real_ratio() == 1.0 or self.num_timesteps <= self.learning_starts:
            return False
        freq, last = self.dynamics_train_freq, self._last_fit_timestep
        needed = max(self.learning_starts + 1, freq if last is not None else 0)  # fewer would spoil a loaded dynamics
        if self.replay_buffer.size() * self.replay_buffer.n_envs < needed and not self.replay_buffer.full:
            return False
        passed = last is None or self.imagination_result is None or self.num_timesteps // freq > last // freq
        return passed and count_usable(self.replay_buffer) >= MIN_TRANSITIONS

    def fit_dynamics(self) -> FitResult:
        """
        Fits the dynamics to all real transitions, from where the last fit ended.

        :return: what the fit found; kept as ``fit_result``
        :raises ValueError: when these observations are not modelled, the transitions are too few, or the known
            termination rule contradicts them (checked until the task has ended in them, and after a fit that diverged)
        """
        dynamics = self._modelled_dynamics()
        data = real_transitions(self.replay_buffer, self._layout, self.device)
        optimizers = (self.dynamics_optimizer, self.termination_optimizer)
        self.fit_result = fit_dynamics(dynamics, *optimizers, data, self._generator, self.fit_result)
        self._last_fit_timestep = self.num_timesteps
        return self.fit_result

    def imagine(self) -> int:
        """
        One round: ``rollout_batch_size`` rollouts from real observations, stored in ``imagined_buffer``.

        :return: rows stored
        :raises ValueError: before the first fit, without a real transition to start from, or when no row is finite
        """
        dynamics = self._modelled_dynamics()
        if self.fit_result is None or self.imagined_buffer is None or not self.replay_buffer.size():
            raise ValueError("Imagining needs a fitted dynamics and real transitions to start from: call `learn` first.")
        starts = draw_observations(self.replay_buffer, self._layout, self.rollout_batch_size, self._generator)
        self.policy.set_training_mode(False)
        self.imagined_buffer.resize(self._imagined_capacity(self.num_timesteps))
        branches = (starts, self.current_rollout_length(), self.fit_result.elites, self._generator)
        self.imagination_result = imagine_round(dynamics, self._sample_imagined_actions, *branches, self.imagined_buffer.add)
        return self.imagination_result.rows

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        SAC's updates on mixed batches; without imagined rows and with a ``policy_delay`` of 1, SAC's own.

        :param gradient_steps: batches
        :param batch_size: rows of each
        """
        start = time.perf_counter()
        n_real = batch_size
        if self.imagined_buffer is not None:
            sources = (self.replay_buffer, self.imagined_buffer, self._layout)
            buffer = ModelAugmentedReplayBuffer(*sources, self._current_real_ratio(), self.gamma, self._generator)
            n_real = buffer.n_real(batch_size)
        if self.idle_reason() is not None or (n_real == batch_size and self.policy_delay == 1):
            super().train(gradient_steps, batch_size)
        else:
            batches = buffer.sample_batches(gradient_steps, batch_size, self._vec_normalize_env)
            for key, value in sac_updates(self, batches, self.policy_delay).items():
                self.logger.record(f"train/{key}", value)
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/real_ratio", n_real / batch_size)
        self.logger.record_mean("train/seconds", time.perf_counter() - start)

    def current_rollout_length(self) -> int:
        """The length k of imagined rollouts at this number of environment steps."""
        return rollout_length_at(self.num_timesteps, self.rollout_length)

    def idle_reason(self) -> str | None:
        """Why this model can only run as plain SAC; ``None`` when it can do more."""
        capacity = self.replay_buffer.buffer_size * self.replay_buffer.n_envs
        if capacity < MIN_TRANSITIONS:
            return f"the replay buffer holds {capacity} transitions, but a fit needs {MIN_TRANSITIONS}"
        if self.dynamics is not None and self.dynamics.termination_fn is None and self.optimize_memory_usage:
            return "`optimize_memory_usage` drops the observations that terminations are learned from; pass `termination_fn`"
        return self._why_not_modelled

    def learn(
        self: SelfMBPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "MBPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMBPO:
        if reset_num_timesteps:
            self._last_fit_timestep = None  # it counts the same steps as `num_timesteps`, which returns to 0
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if self.idle_reason() is not None and not self._has_said_idle:
            self.logger.log(f"{type(self).__name__} runs as plain SAC: {self.idle_reason()}.")
            self._has_said_idle = True
        if not isinstance(callback, list):
            callback = [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]
        return super()._init_callback([DynamicsCallback(), *callback], progress_bar)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        started = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        check_finite(started, new_obs, reward, infos, self._vec_normalize_env)
        mark_lost_terminals(replay_buffer, dones, infos, self._vec_normalize_env)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "imagined_buffer", "imagination_result", "_layout"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        if self.dynamics is not None:
            state_dicts = [*state_dicts, "dynamics", "dynamics_optimizer", "termination_optimizer"]
        return state_dicts, variables

    def _modelled_dynamics(self) -> Dynamics:
        if self.dynamics is None:
            raise ValueError(f"{type(self).__name__} runs as plain SAC here and has no dynamics: {self._why_not_modelled}.")
        if self.env is None:
            raise ValueError("There is no environment to tell how it ends and is normalised: call `set_env` first.")
        return self.dynamics

    def _sample_imagined_actions(self, observations: th.Tensor) -> th.Tensor:
        return sample_actions(self.actor, self._layout.policy_input(observations, self._vec_normalize_env))

    def _current_real_ratio(self) -> float:
        return real_ratio_at(self._current_progress_remaining, self.real_ratio)

    def _imagined_capacity(self, step: int) -> int:
        length = rollout_length_at(step, self.rollout_length)
        return imagined_capacity(self.rollout_batch_size, length, self.rollout_retain_steps, self.dynamics_train_freq)
