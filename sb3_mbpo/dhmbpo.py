"""``DHMBPO``: MBPO whose policy also learns through the gradient of the dynamics."""

import time
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.sac.policies import CnnPolicy, SACPolicy
from torch import nn

from sb3_mbpo.activations import LayerNormSiLU
from sb3_mbpo.double_horizon import ValueBounds, double_horizon_updates
from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.policies import MlpPolicy, MultiInputPolicy
from sb3_mbpo.schedules import check_positive, rollout_length_at
from sb3_mbpo.type_aliases import FitResult, RewardFn, RolloutLength, TerminationFn

SelfDHMBPO = TypeVar("SelfDHMBPO", bound="DHMBPO")

#: What ``policy_kwargs`` hold unless the user says otherwise.
POLICY = {"activation_fn": nn.SiLU, "n_critics": 5}
#: The same for ``dynamics_kwargs``: smooth enough to differentiate.
DYNAMICS = {
    "ensemble_size": 8,
    "net_arch": (200, 200, 200),
    "activation_fn": LayerNormSiLU,
    "max_grad_norm": None,
    "constant_noise": True,
}
#: Rounds of imagination, of whole rollouts, whose states are kept to start from.
ROUNDS_KEPT = 10
#: Updates of the critics alone after a fit, as a share of the environment steps until the next.
CRITIC_SHARE = 0.25


class DHMBPO(MBPO):
    """
    Double-Horizon MBPO (DHMBPO): MBPO with a long and a short horizon inside the learned model.

    Paper: https://arxiv.org/abs/2512.15439 (Kubo et al. 2025), code: https://github.com/4kubo/erl_lib

    Long imagined rollouts only supply states to start from. From these the policy acts for a few differentiable steps, which
    give the critics their targets and the policy its gradient, through the dynamics (:mod:`sb3_mbpo.double_horizon`). So one
    update per environment step is enough. Fits, terminations and checkpoints are MBPO's, and like MBPO it is SAC where the
    observations are not modelled. Parameters not listed here mean what they mean for :class:`MBPO`.

    :param gamma: the discount factor; the default is for tasks of 1000 steps
    :param gradient_steps: updates per call of ``train``. After each fit come ``dynamics_train_freq / 4`` of the critics alone
    :param batch_size: start states of each update
    :param n_steps: n-step returns of the replay buffer, which DHMBPO does not learn from unless it runs as SAC
    :param policy: as for SAC. "MlpPolicy" and "MultiInputPolicy" are those of :mod:`sb3_mbpo.policies`
    :param policy_kwargs: additional arguments to be passed to the policy on creation. Unless they say otherwise, it has SiLU
        between its layers, and five critics
    :param rollout_length: steps of the long rollouts
    :param rollout_batch_size: rollouts per round. As many states are kept as ten whole rounds have, until the next fit
    :param rollout_freq: updates between two rounds, those of the critics alone not counted
    :param gradient_horizon: H, differentiable steps from each start state
    :param reward_fn: as for MBPO, but written for torch and marked with ``sb3_mbpo.takes_tensors``, as the policy learns
        through it
    :param dynamics_kwargs: as for MBPO. Unless they say otherwise, the dynamics has eight members of three layers with
        LayerNormSiLU, all of them elites, gradients of any norm, and constant noise
    :raises ValueError: as for MBPO, and for a ``reward_fn`` or a policy that no gradient can pass
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,  # images are not modelled
        "MultiInputPolicy": MultiInputPolicy,
    }

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.995,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto_0.1",
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
        rollout_length: RolloutLength = 20,
        rollout_batch_size: int = 256,
        rollout_freq: int = 20,
        gradient_horizon: int = 5,
        termination_fn: TerminationFn | None = None,
        reward_fn: RewardFn | None = None,
        dynamics_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
    ) -> None:
        self.rollout_freq = rollout_freq
        self.gradient_horizon = gradient_horizon
        self._critic_updates_due = 0
        self._last_round_update = 0
        # fmt: off
        super().__init__(
            policy, env, learning_rate, buffer_size, learning_starts, batch_size, tau, gamma, train_freq, gradient_steps,
            action_noise, replay_buffer_class, replay_buffer_kwargs, optimize_memory_usage, n_steps, ent_coef,
            target_update_interval, target_entropy, use_sde, sde_sample_freq, use_sde_at_warmup, stats_window_size,
            tensorboard_log, {**POLICY, **(policy_kwargs or {})}, verbose, seed, device, dynamics_train_freq, rollout_length,
            rollout_batch_size, termination_fn=termination_fn, reward_fn=reward_fn,
            dynamics_kwargs=dynamics_kwargs, _init_setup_model=_init_setup_model,
        )
        # fmt: on

    def _check_parameters(self) -> None:
        dynamics_kwargs = {**DYNAMICS, **(self.dynamics_kwargs or {})}
        self.dynamics_kwargs = {"n_elites": dynamics_kwargs["ensemble_size"], **dynamics_kwargs}
        super()._check_parameters()
        for name in ("rollout_freq", "gradient_horizon"):
            setattr(self, name, check_positive(name, getattr(self, name)))
        if self.reward_fn is not None and not getattr(self.reward_fn, "takes_tensors", False):
            raise ValueError(
                "DHMBPO learns through the gradient of the reward, but `reward_fn` is not marked as one for torch. Write it "
                "with torch's functions and decorate it with `sb3_mbpo.takes_tensors`, or leave it out and have it learned."
            )

    def _setup_model(self) -> None:
        self.value_bounds = ValueBounds()
        super()._setup_model()
        self.value_bounds.to(self.device)
        if self.dynamics is not None and self.policy.share_features_extractor:
            raise ValueError(
                "With `share_features_extractor` no gradient passes from the critics to the observations, which DHMBPO learns "
                "through: leave it at False."
            )

    def fit_dynamics(self) -> FitResult:
        """MBPO's. The states that the old dynamics imagined are dropped."""
        result = super().fit_dynamics()
        assert self.imagined_buffer is not None
        self.imagined_buffer.clear()
        self._critic_updates_due = round(CRITIC_SHARE * self.dynamics_train_freq)
        return result

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Double-horizon updates from imagined states; none before the first fit. Where the observations are not modelled, the
        updates are SAC's.

        :param gradient_steps: updates of all networks; after a fit, some of the critics alone come before them
        :param batch_size: start states of each
        """
        if self.idle_reason() is not None:
            super().train(gradient_steps, batch_size)
            return
        if self.fit_result is None:  # SAC would teach the critics in other units
            return
        start = time.perf_counter()
        for key, value in double_horizon_updates(self, self._critic_updates_due, gradient_steps, batch_size).items():
            self.logger.record(f"train/{key}", value)
        self._critic_updates_due = 0
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record_mean("train/seconds", time.perf_counter() - start)

    def states_due(self) -> bool:
        """Whether a round is due: without any states, as after a load, and ``rollout_freq`` updates after the last round."""
        assert self.imagined_buffer is not None
        return not len(self.imagined_buffer) or self._n_updates - self._last_round_update >= self.rollout_freq

    def imagine(self) -> int:
        rows = super().imagine()
        self._last_round_update = self._n_updates
        return rows

    def draw_actions(self, observations: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: (batch, obs_dim), raw
        :return: the policy's actions, (batch, action_dim), and their log-probabilities, (batch,); differentiable
        """
        actions, log_prob = self.actor.action_log_prob(self._layout.policy_input(observations, self._vec_normalize_env))
        return actions, log_prob.reshape(-1)

    def q_values(self, critic: ContinuousCritic, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param critic: the model's own, or the target
        :param observations: (batch, obs_dim), raw
        :param actions: (batch, action_dim), in [-1, 1]
        :return: (n_critics, batch); what the networks themselves put out is in units of ``value_bounds``
        """
        outputs = critic(self._layout.policy_input(observations, self._vec_normalize_env), actions)
        return self.value_bounds.scale(th.stack(outputs).squeeze(-1))

    def learn(
        self: SelfDHMBPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DHMBPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDHMBPO:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "value_bounds"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return ([*state_dicts, "value_bounds"] if self.dynamics is not None else state_dicts), variables

    def _imagined_capacity(self, step: int) -> int:
        return self.rollout_batch_size * rollout_length_at(step, self.rollout_length) * ROUNDS_KEPT
