from dataclasses import fields, replace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import ACTIVE, LineEnv, NoiseEnv
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.checkpoint import load_checkpoint, save_checkpoint
from sb3_mbpo.fit import fit_ensemble
from sb3_mbpo.imagination import sample_actions
from sb3_mbpo.rules import takes_tensors
from sb3_mbpo.type_aliases import FitResult, ImaginationResult


def make(env=None, policy: str = "MlpPolicy", algorithm: type[MBPO] = MBPO, **kwargs) -> MBPO:
    return algorithm(policy, env or LineEnv(), **(dict(seed=0, device="cpu") | ACTIVE | kwargs))


def parameters(model: SAC) -> list[th.Tensor]:
    return [parameter.detach().clone() for parameter in model.policy.parameters()]


def identical(first: SAC, second: SAC) -> bool:
    return all((a == b).all() for a, b in zip(parameters(first), parameters(second), strict=True))


class Watch(BaseCallback):
    """When the dynamics was fitted and how many transitions there were."""

    def _on_training_start(self) -> None:
        self.fits: list[int] = []
        self.last = self.model.fit_result

    def _on_rollout_end(self) -> None:
        if self.model.fit_result is not self.last:
            self.fits.append(self.num_timesteps)
            self.last = self.model.fit_result

    def _on_step(self) -> bool:
        return True


# ---------------------------------------------------------------- one iteration


def test_fits_come_after_the_warm_up_and_at_every_multiple():
    watch = Watch()
    make().learn(105, callback=watch)
    assert watch.fits == [41, 60, 80, 100]
    make(learning_starts=12).learn(45, callback=watch)
    assert watch.fits == [13, 20, 40]


def test_after_a_fit_that_diverged_the_next_one_is_a_first_one(monkeypatch):
    """It makes as many steps."""
    model = make().learn(45)
    are_first = []
    monkeypatch.setattr("sb3_mbpo.fit.fit_ensemble", lambda *args: are_first.append(args[-1]) or result)
    for diverged in (False, True, False):
        result = replace(model.fit_result, diverged=diverged)
        model.fit_dynamics()
    assert are_first == [False, False, True]


def test_a_multiple_that_several_environments_jump_over_counts():
    watch = Watch()
    make(make_vec_env(LineEnv, 3), train_freq=1).learn(110, callback=watch)
    assert watch.fits == [42, 60, 81, 102]


def test_learn_again_goes_on_fitting_with_and_without_reset():
    model, watch = make(), Watch()
    model.learn(65, callback=watch)
    model.learn(40, callback=watch, reset_num_timesteps=False)
    assert watch.fits == [80, 100]
    model.learn(65, callback=watch)
    assert watch.fits == [41, 60]


def test_a_round_of_imagination_is_stored_beside_the_real_transitions():
    model = make(rollout_length=3, rollout_batch_size=50, rollout_retain_steps=40)
    model.learn(61)
    assert model.imagined_buffer.capacity == 50 * 3 * 40 // 20
    assert 100 < len(model.imagined_buffer) <= 300
    assert model.replay_buffer.size() == 61 and model.num_timesteps == 61
    stored = model.imagine()
    rows = model.imagined_buffer.newest(stored)
    real = {round(float(value), 4) for value in model.replay_buffer.observations[:61].flatten()}
    assert {round(value, 4) for value in rows.observations[:50, 0].tolist()} <= real  # they branch off real states
    assert rows.actions.abs().max() <= 1.0


def test_the_elites_of_the_last_fit_imagine_and_no_other_member():
    model = make().learn(45)
    members, step = [], model.dynamics.step
    model.dynamics.step = lambda *args: members.extend(args[2].tolist()) or step(*args)
    model.imagine()
    assert set(members) == set(np.argsort(model.fit_result.holdout_mse)[:2].tolist())


@pytest.mark.parametrize("use_sde", [False, True])
def test_imagined_actions_have_the_distribution_of_the_policy(use_sde):
    kwargs = dict(use_sde=True, policy_kwargs=dict(log_std_init=-1.0)) if use_sde else {}
    actor, n_rows = make(NoiseEnv(action_dim=2), **kwargs).actor, 20_000
    row = th.tensor([[0.5, -1.0, 0.2]])
    th.manual_seed(0)
    with th.no_grad():
        mean, log_std, rest = actor.get_action_dist_params(row)
        std = (rest["latent_sde"] ** 2 @ actor.action_dist.get_std(log_std) ** 2).sqrt() if use_sde else log_std.exp()
    noise = (sample_actions(actor, row.expand(n_rows, -1)).double().atanh() - mean) / std
    assert noise.mean(dim=0).abs().max() < 5 / n_rows**0.5 and (noise.var(dim=0) - 1).abs().max() < 5 * (2 / n_rows) ** 0.5


def test_the_imagined_buffer_grows_with_the_rollouts_and_keeps_its_rows():
    model = make(rollout_length=(60, 100, 1, 5), rollout_batch_size=32, rollout_retain_steps=40)
    model.learn(61)
    assert (model.imagined_buffer.capacity, len(model.imagined_buffer)) == (64, 64)
    before = model.imagined_buffer.newest(64).rewards
    model.num_timesteps = 80
    rows = model.imagine()
    assert model.current_rollout_length() == 3
    assert model.imagined_buffer.capacity == 2 * 3 * 32
    assert (model.imagined_buffer.newest(rows + 64).rewards[:64] == before).all()


@pytest.mark.parametrize(
    ("rollout_length", "reserved"), [((60, 100, 1, 5), 320), ((60, 100, 5, 1), 320), (3, 192), ((10**6, 10**6 + 1, 1, 2), 128)]
)
def test_the_imagined_buffer_has_memory_for_the_longest_rollouts(rollout_length, reserved, tmp_path):
    """64 rollouts per round, and as many rounds as there are in ``rollout_retain_steps``: one."""
    model = make(rollout_length=rollout_length, rollout_retain_steps=20)
    assert model.imagined_buffer._rows.nbytes == 0
    model.learn(45).save(tmp_path / "model")
    assert len(model.imagined_buffer._rows) == reserved
    assert model.imagined_buffer.capacity == (
        64 * rollout_length if isinstance(rollout_length, int) else 64 * rollout_length[2]
    )
    loaded = MBPO.load(tmp_path / "model", LineEnv()).learn(45)
    assert len(loaded.imagined_buffer._rows) == reserved
    place = model.imagined_buffer._rows.data_ptr()
    for num_timesteps in (75, 99, 200):
        model.num_timesteps = num_timesteps
        model.imagine()
        assert len(model.imagined_buffer._rows) == reserved
        grows = isinstance(rollout_length, int) or rollout_length[2] < rollout_length[3]
        assert model.imagined_buffer._rows.data_ptr() == place or not grows


def test_a_round_of_several_blocks_is_the_newest_of_the_imagined_buffer(monkeypatch):
    model = make(rollout_batch_size=50, rollout_length=2).learn(45)
    monkeypatch.setattr("sb3_mbpo.imagination.BLOCK_SIZE", 15)
    imagined, step = [], model.dynamics.step
    model.dynamics.step = lambda *arguments: imagined.append(step(*arguments)) or imagined[-1]
    n_rows = model.imagine()
    assert [len(each.rewards) for each in imagined[::2]] == [15, 15, 15, 5] and n_rows == model.imagination_result.rows
    rewards = th.cat([each.rewards for each in imagined])
    assert n_rows == len(rewards) and model.imagined_buffer.newest(n_rows).rewards.tolist() == rewards.tolist()


def test_the_first_fit_makes_its_steps_and_the_later_ones_theirs(tmp_path):
    dynamics_kwargs, steps = ACTIVE["dynamics_kwargs"] | dict(max_gradient_steps=(12, 5)), []

    class Steps(BaseCallback):
        def _on_step(self):
            result = self.model.fit_result
            if result is not None and result is not self.__dict__.get("last"):
                self.last = result
                steps.append(result.gradient_steps)
            return True

    model = make(dynamics_kwargs=dynamics_kwargs).learn(62, Steps())
    assert steps == [12, 5]
    model.learn(30, Steps())  # the counting begins anew, the dynamics does not
    assert steps[-1] == model.fit_result.gradient_steps == 5
    model.save(tmp_path / "model")
    assert MBPO.load(tmp_path / "model", LineEnv()).learn(41).fit_result.gradient_steps == 5
    assert make(dynamics_kwargs=dynamics_kwargs).learn(41).fit_result.gradient_steps == 12


def test_every_batch_of_train_has_its_real_share(monkeypatch):
    model = make(real_ratio=0.1, batch_size=30)
    model.learn(60)
    seen = []
    monkeypatch.setattr("sb3_mbpo.mbpo.sac_updates", lambda model, batches, delay: seen.extend(batches) or {})
    real = model.replay_buffer.observations[:60].astype(np.float32).flatten()
    model.train(gradient_steps=7, batch_size=30)
    assert len(seen) == 7
    for batch in seen:
        assert batch.observations.shape == (30, 1)
        assert np.isin(batch.observations[:3, 0].numpy(), real).all()
        assert not np.isin(batch.rewards[3:, 0].numpy(), model.replay_buffer.rewards[:60]).any()


def test_gradient_steps_minus_one_follows_the_environments():
    model = make(make_vec_env(LineEnv, 4), gradient_steps=-1, train_freq=2)
    model.learn(80)
    assert model._n_updates == 80 - 40  # as many as transitions, once `learning_starts` is over
    model = make(make_vec_env(LineEnv, 4), gradient_steps=3)
    model.learn(80)
    assert model._n_updates == 10 * 3  # per call of `train`, not per transition


def test_real_ratio_may_be_a_schedule(monkeypatch):
    watch = Watch()
    model = make(real_ratio=lambda progress: 1.0 if progress > 0.5 else 0.0)
    model.learn(160, callback=watch)
    assert watch.fits[0] >= 80 and len(watch.fits) >= 3
    model = make(real_ratio=lambda progress: progress).learn(60)
    model._current_progress_remaining = 0.3
    monkeypatch.setattr("sb3_mbpo.mbpo.sac_updates", lambda model, batches, delay: seen.extend(batches) or {})
    real, seen = model.replay_buffer.rewards[:60], []
    model.train(gradient_steps=2, batch_size=30)
    assert [int(np.isin(batch.rewards[:, 0].numpy(), real).sum()) for batch in seen] == [9, 9]


# ---------------------------------------------------------------- idle, or active


@pytest.mark.parametrize("idle", [dict(real_ratio=1.0), dict(learning_starts=10**6)], ids=["real_ratio", "warm-up"])
@pytest.mark.parametrize("env", [LineEnv, lambda: VecNormalize(make_vec_env(LineEnv, 2, seed=0))], ids=["plain", "normalized"])
def test_an_idle_mbpo_is_sac_to_the_bit(env, idle):
    ours = make(env(), **idle).learn(150)
    learning_starts = idle.get("learning_starts", ACTIVE["learning_starts"])
    sac = SAC("MlpPolicy", env(), seed=0, device="cpu", learning_starts=learning_starts).learn(150)
    assert identical(ours, sac)
    assert (ours.replay_buffer.observations == sac.replay_buffer.observations).all()
    assert ours.fit_result is None
    assert th.rand(3).tolist() == (make(env(), **idle).learn(150), th.rand(3).tolist())[1]


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, second, third = (make(seed=seed).learn(100) for seed in (5, 5, 6))
    assert identical(first, second) and not identical(first, third)
    assert first.fit_result.holdout_mse == second.fit_result.holdout_mse


def test_an_active_mbpo_is_not_sac():
    sac = SAC("MlpPolicy", LineEnv(), seed=0, device="cpu", learning_starts=40).learn(80)
    assert not identical(make().learn(80), sac)


# ---------------------------------------------------------------- units


def test_everything_stays_raw_while_the_statistics_of_vec_normalize_drift(monkeypatch):
    env = VecNormalize(DummyVecEnv([lambda: LineEnv()]), clip_obs=5.0)
    model = make(env)
    fitted = []
    monkeypatch.setattr(
        "sb3_mbpo.fit.fit_ensemble", lambda dynamics, *rest: fitted.append(rest[1]) or fit_ensemble(dynamics, *rest)
    )
    actor_inputs = []
    model.actor.register_forward_pre_hook(lambda module, inputs: actor_inputs.append(inputs[0]))
    model.learn(100)
    # what the fit saw obeys the raw dynamics: s' = s + 0.3 a, r = -|s'|
    for data in fitted:
        th.testing.assert_close(data.next_observations, data.observations + 0.3 * data.actions, rtol=1e-4, atol=1e-4)
        th.testing.assert_close(data.rewards, -data.next_observations.abs()[:, 0], rtol=1e-4, atol=1e-4)
    statistics = env.obs_rms.mean.copy(), env.obs_rms.var.copy(), env.obs_rms.count, env.ret_rms.var.copy()
    actor_inputs.clear()
    rows = model.imagined_buffer.newest(model.imagine())
    assert (
        env.obs_rms.mean,
        env.obs_rms.var,
        env.obs_rms.count,
        env.ret_rms.var,
    ) == statistics  # imagination leaves them alone
    # the actor saw the same rows normalised with the statistics of now
    th.testing.assert_close(actor_inputs[0], th.as_tensor(env.normalize_obs(rows.observations.numpy())))
    # raw again: the imagined rows start at raw observations, although the statistics have moved since those were stored
    env.obs_rms.mean += 7.0
    raw = {round(float(value), 4) for value in model.replay_buffer.observations[:100].flatten()}
    rows = model.imagined_buffer.newest(model.imagine())
    assert {round(value, 4) for value in rows.observations[:, 0].tolist()} <= raw


def test_user_functions_replace_the_learned_parts():
    def reward(obs, action, next_obs):
        assert action.min() >= -2.0 and action.max() <= 1.0 and action.min() < -1.0  # the environment's units
        return 100.0 + next_obs[:, 0]

    def terminated(obs, action, next_obs):
        return np.abs(next_obs[:, 0]) > 3.0

    model = make(termination_fn=terminated, reward_fn=reward)
    model.learn(80)
    rows = model.imagined_buffer.newest(64)
    th.testing.assert_close(rows.rewards, 100.0 + rows.next_observations[:, 0])
    assert (rows.terminated == (rows.next_observations[:, 0].abs() > 3.0)).all()
    assert model.fit_result.termination_recall is None
    assert make().learn(80).fit_result.termination_recall is not None


# ---------------------------------------------------------------- as SB3's users know it


def test_kinds_of_environments_all_imagine():
    for model in (
        make(LineEnv(dict_observation=True), policy="MultiInputPolicy"),
        make(make_vec_env(LineEnv, 3)),
        make("Pendulum-v1"),
        make(use_sde=True),
        make(n_steps=3),
        make(
            VecNormalize(make_vec_env(lambda: LineEnv(dict_observation=True), 2), norm_obs_keys=["memory"]), "MultiInputPolicy"
        ),
        make("Pendulum-v1", optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        make(policy_delay=4, gradient_steps=2),
        make(buffer_size=50),
    ):
        model.learn(90)
        assert len(model.imagined_buffer) > 0 and model.fit_result is not None
        assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_environments_that_are_none_of_sb3s_are_trained_on(tmp_path):
    """As EnvPool's adapter does it: a wrapper around something that only steps."""

    class Pool:
        def __init__(self) -> None:
            self.env = LineEnv()
            self.num_envs, self.observation_space, self.action_space = 1, self.env.observation_space, self.env.action_space

    class Adapter(VecEnvWrapper):
        def reset(self):
            return self.venv.env.reset()[0][None]

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            observation, reward, terminated, truncated, _ = self.venv.env.step(self.actions[0])
            done, info = terminated or truncated, {"TimeLimit.truncated": truncated and not terminated}
            if done:
                info["terminal_observation"], observation = observation, self.venv.env.reset()[0]
            return observation[None], np.array([reward]), np.array([done]), [info]

        def seed(self, seed=None):
            return [seed]

    model = make(Adapter(Pool())).learn(80)
    assert len(model.imagined_buffer) > 0
    save_checkpoint(model, tmp_path)
    resumed = load_checkpoint(tmp_path, Adapter(Pool()))
    assert resumed.learn(20, reset_num_timesteps=False).num_timesteps == 100


def test_set_env_reads_the_task_anew():
    model = make("Hopper-v5")
    rule = model.dynamics.termination_fn
    model.set_env(gym.make("Hopper-v5", healthy_z_range=(1.3, 2.0)))
    state = th.tensor([[1.25] + [0.0] * 10])
    assert not rule(state, state, state).item() and model.dynamics.termination_fn(state, state, state).item()


def test_save_and_load_keep_the_model_that_imagines(tmp_path):
    model = make().learn(80)
    model.save(tmp_path / "model")
    observations, actions = th.randn(5, 1), th.rand(5, 1)
    for loaded in (MBPO.load(tmp_path / "model"), MBPO.load(tmp_path / "model", env=LineEnv())):
        assert identical(loaded, model) and loaded.fit_result.elites == model.fit_result.elites
        for got, expected in zip(
            loaded.dynamics.predict(observations, actions), model.dynamics.predict(observations, actions), strict=True
        ):
            assert (got == expected).all()
    with pytest.raises(ValueError, match="call `set_env` first"):
        MBPO.load(tmp_path / "model").imagine()
    watch = Watch()
    loaded.learn(60, callback=watch, reset_num_timesteps=False)  # without its replay buffer it first collects anew
    assert watch.fits == [121, 140] and len(loaded.imagined_buffer) > 0
    state = loaded.dynamics_optimizer.state_dict()["state"][0]["step"]
    assert state > model.dynamics_optimizer.state_dict()["state"][0]["step"]  # Adam goes on


@pytest.mark.parametrize(("buffer_size", "fits"), [(1000, [100, 120, 140]), (15, [95, 100, 120, 140])])
def test_a_few_rows_do_not_replace_what_a_loaded_dynamics_has_learned(tmp_path, buffer_size, fits):
    """Fits are 20 steps apart; a replay buffer that is full has no more to give."""
    make(buffer_size=buffer_size).learn(80).save(tmp_path / "model")
    loaded, watch = MBPO.load(tmp_path / "model", env=LineEnv(), learning_starts=0), Watch()
    loaded.learn(60, callback=watch, reset_num_timesteps=False)
    assert watch.fits == fits


def test_save_and_load_keep_the_learned_termination(tmp_path):
    model = make(NoiseEnv()).learn(45)
    model.save(tmp_path / "model")
    loaded = MBPO.load(tmp_path / "model", env=NoiseEnv())
    saved, found = (m.termination_optimizer.state_dict()["state"] for m in (model, loaded))
    assert saved[0]["step"] == 500 and saved.keys() == found.keys()
    assert all(th.equal(saved[index]["exp_avg_sq"], found[index]["exp_avg_sq"]) for index in saved)
    heads = [m.dynamics.termination_head.state_dict() for m in (model, loaded)]
    assert heads[0]["log_prior_odds"].isfinite() and all(th.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_dynamics_kwargs_changed_on_loading_count_from_the_next_fit_on(tmp_path):
    numbers = dict(learning_rate=np.float64(1e-3), weight_decay=list(np.full(3, 1e-5)))  # NumPy's, too
    make(dynamics_kwargs=ACTIVE["dynamics_kwargs"] | numbers).learn(80).save(tmp_path / "model")
    changes = dict(weight_decay=(0.1, 0.2, 0.3), normalize_targets=False)
    loaded = MBPO.load(tmp_path / "model", env=LineEnv(), dynamics_kwargs=ACTIVE["dynamics_kwargs"] | changes)
    assert (loaded.dynamics.target_scaler.std != 1.0).all()  # the weights of the file belong to it
    loaded.learn(60)
    assert (loaded.dynamics.target_scaler.mean == 0.0).all() and (loaded.dynamics.target_scaler.std == 1.0).all()
    assert [group["weight_decay"] for group in loaded.dynamics_optimizer.param_groups] == [0.1, 0.2, 0.3, 0.0]


def test_a_saved_replay_buffer_can_be_fitted_to(tmp_path):
    model = make().learn(80)
    model.save_replay_buffer(tmp_path / "buffer")
    fresh = make()
    fresh.load_replay_buffer(tmp_path / "buffer")
    result = fresh.fit_dynamics()
    assert len(result.elites) == 2 and fresh.imagine() > 0
    model.save(tmp_path / "model")
    resumed, watch = MBPO.load(tmp_path / "model", env=LineEnv()), Watch()
    resumed.load_replay_buffer(tmp_path / "buffer")
    resumed.learn(1, callback=watch, reset_num_timesteps=False)
    assert watch.fits == [81]  # there were no imagined rows
    resumed = MBPO.load(tmp_path / "model", env=LineEnv())
    resumed.load_replay_buffer(tmp_path / "buffer")
    assert resumed.imagine() > 0  # by the elites of the saved fit
    resumed.learn(45, callback=watch, reset_num_timesteps=False)
    assert watch.fits == [100, 120]


def test_checkpoints_and_tensorboard_work(tmp_path):
    model = make(tensorboard_log=str(tmp_path))
    model.learn(80, callback=[CheckpointCallback(30, str(tmp_path), name_prefix="point")])
    assert (tmp_path / "MBPO_1").is_dir() and (tmp_path / "point_60_steps.zip").exists()


LOGGED = {
    "dynamics/holdout_mse",
    "dynamics/holdout_mse_state",
    "dynamics/holdout_mse_reward",
    "dynamics/train_nll",
    "dynamics/epochs",
    "dynamics/gradient_steps",
    "dynamics/diverged",
    "dynamics/fit_seconds",
    "dynamics/predicted_std",
    "dynamics/disagreement",
    "dynamics/termination_precision",
    "dynamics/termination_recall",
    "imagined/rollout_length",
    "imagined/rows",
    "imagined/ended",
    "imagined/not_finite",
    "imagined/far_from_data",
    "imagined/buffer_fill",
    "imagined/seconds",
    "train/real_ratio",
    "train/seconds",
}
LOGGED_BY_DHMBPO = LOGGED - {"train/real_ratio"} | {"train/valid_paths"}


class Keys(BaseCallback):
    def _on_training_start(self) -> None:
        self.values: dict[str, float] = {}

    def _on_rollout_start(self) -> None:
        self.values.update(self.logger.name_to_value)

    def _on_step(self) -> bool:
        return True


def test_what_is_logged_is_complete_short_and_true():
    keys = Keys()
    model = make(real_ratio=0.1, batch_size=50)
    model.learn(99, callback=keys)
    assert {key for key in keys.values if key.split("/")[0] in ("dynamics", "imagined")} <= LOGGED
    assert LOGGED <= set(keys.values)
    assert all(len(key) <= 36 for key in keys.values)
    result = model.fit_result
    assert keys.values["dynamics/holdout_mse"] == pytest.approx(
        np.mean([result.holdout_mse[elite] for elite in result.elites])
    )
    assert keys.values["imagined/rollout_length"] == 1 and keys.values["imagined/rows"] == 64
    assert keys.values["imagined/buffer_fill"] == len(model.imagined_buffer) / model.imagined_buffer.capacity
    assert keys.values["train/real_ratio"] == pytest.approx(0.1)


def test_each_number_of_a_fit_and_of_a_round_is_logged_under_its_name(monkeypatch):
    keys, model = Keys(), make()
    model.learn(45, callback=keys)
    numbers = {field.name: 10.0 + place for place, field in enumerate(fields(FitResult))}
    fitted = FitResult(**numbers | dict(elites=(2, 0), holdout_mse=(1.0, 9.0, 4.0), diverged=True))
    imagined = ImaginationResult(rows=40, terminated=10, not_finite=3, far_from_data=5)
    monkeypatch.setattr(model, "fit_dynamics", lambda: fitted)
    monkeypatch.setattr(model, "imagine", lambda: setattr(model, "imagination_result", imagined))
    model.learn(20, callback=keys, reset_num_timesteps=False)
    renamed = {"seconds": "fit_seconds"}
    expected = {f"dynamics/{renamed.get(name, name)}": value for name, value in numbers.items()}
    del expected["dynamics/elites"], expected["dynamics/rule_checked"]
    expected |= {"dynamics/holdout_mse": 2.5, "dynamics/diverged": 1.0}
    expected |= {"imagined/rows": 40, "imagined/ended": 0.25, "imagined/not_finite": 3, "imagined/far_from_data": 5}
    assert expected.items() <= keys.values.items()


def test_dhmbpo_logs_its_own_keys_too():
    model, keys = make(algorithm=DHMBPO, termination_fn=None), Keys()
    model.learn(100, callback=keys, log_interval=1)
    assert LOGGED_BY_DHMBPO <= set(keys.values) and keys.values["train/valid_paths"] == 1.0
    assert {key for key in keys.values if key.split("/")[0] in ("dynamics", "imagined")} <= LOGGED


def test_the_table_on_stdout_has_room_for_every_key(capsys):
    make(verbose=1).learn(100, log_interval=1)
    printed = capsys.readouterr().out
    for key in LOGGED:
        assert key.split("/")[1] in printed


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(real_ratio=1.5), "`real_ratio` must be a number between 0 .* but got 1.5"),
        (dict(real_ratio=-0.1), "`real_ratio`"),
        (dict(rollout_length=(100, 50, 1, 5)), "`rollout_length`=.*ends.*before it starts"),
        (dict(rollout_length=0), "`rollout_length` must be at least 1"),
        (dict(rollout_batch_size=0), "`rollout_batch_size` must be an int of at least 1, but got 0"),
        (dict(dynamics_train_freq=0.5), "`dynamics_train_freq`"),
        (dict(rollout_retain_steps=-1), "`rollout_retain_steps`"),
        (dict(policy_delay=0), "`policy_delay`"),
        (dict(termination_fn=3), r"`termination_fn` must be a function \(obs, action, next_obs\), or None, but got 3"),
        (dict(reward_fn="dense"), "`reward_fn` must be a function .* but got 'dense'"),
        (dict(dynamics_kwargs=dict(n_elites=8)), "must be from 1 to `ensemble_size`=7, but got 8"),
        (dict(dynamics_kwargs=dict(max_gradient_steps=(1, 0))), r"'max_gradient_steps'\] must be .*, but got \(1, 0\)"),
        (dict(dynamics_kwargs=dict(hidden=3)), r"got \['hidden'\], which it does not know"),
    ],
)
def test_bad_parameters_are_refused_at_once(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MBPO("MlpPolicy", LineEnv(), **kwargs)


def test_bad_parameters_are_refused_on_loading_too(tmp_path):
    make().save(tmp_path / "model")
    for name in ("dynamics_train_freq", "rollout_batch_size", "rollout_retain_steps", "policy_delay", "rollout_length"):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            MBPO.load(tmp_path / "model", **{name: 0})
    for steps in (0, (1,), (1, 0), (1.5, 2), "ab"):
        with pytest.raises(ValueError, match=r"'max_gradient_steps'\] must be None, an int .* or two of them, but got "):
            MBPO.load(tmp_path / "model", dynamics_kwargs=ACTIVE["dynamics_kwargs"] | dict(max_gradient_steps=steps))


def test_other_action_spaces_are_refused():
    with pytest.raises(ValueError, match=r"Box action space.*Discrete\(2\).*DQN"):
        MBPO("MlpPolicy", "CartPole-v1")
    unbounded = LineEnv()
    unbounded.action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    with pytest.raises(ValueError, match="with finite bounds, but"):
        MBPO("MlpPolicy", unbounded)


class Broken(gym.Wrapper):
    """Says something that is not finite at its 50th step."""

    def __init__(self, where: str) -> None:
        super().__init__(LineEnv())
        self.where, self.count = where, 0

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.count += 1
        if self.count == 50:
            observation = np.full(1, np.nan) if self.where == "observation" else observation
            reward = np.inf if self.where == "reward" else reward
        return observation, reward, terminated, truncated, info


def test_a_first_observation_that_is_not_finite_is_refused_though_vec_normalize_clips_it():
    class Lost(gym.Wrapper):
        def reset(self, **kwargs):
            _, info = self.env.reset(**kwargs)
            return np.full(1, np.inf), info

    model = make(VecNormalize(DummyVecEnv([lambda: Lost(LineEnv())]), training=False))
    with pytest.raises(ValueError, match="its observation is"):
        model.learn(10)
    assert model.replay_buffer.size() == 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("where", ["observation", "reward"])
def test_what_is_not_finite_never_enters_a_buffer(where, normalize):
    env = DummyVecEnv([lambda: Broken(where)])
    model = make(VecNormalize(env) if normalize else env)
    with pytest.raises(ValueError, match=f"its {where} is"):
        model.learn(100)
    assert model.replay_buffer.size() == 49
    assert np.isfinite(model.replay_buffer.observations).all() and np.isfinite(model.replay_buffer.rewards).all()


def test_a_user_function_of_the_wrong_shape_stops_the_first_fit():
    with pytest.raises(ValueError, match="`termination_fn` must return one bool per row"):
        make(termination_fn=lambda obs, action, next_obs: np.zeros((len(obs), 1), dtype=bool)).learn(80)


@pytest.mark.parametrize("algorithm", [MBPO, DHMBPO])
def test_a_reward_of_the_wrong_shape_is_found_before_the_long_first_fit(algorithm, monkeypatch):
    monkeypatch.setattr("sb3_mbpo.fit.fit_ensemble", None)
    with pytest.raises(ValueError, match=r"`reward_fn` must return one float per row, shape \(41,\)"):
        make(algorithm=algorithm, reward_fn=takes_tensors(lambda obs, action, next_obs: -next_obs.abs())).learn(80)


def test_a_termination_rule_that_contradicts_the_environment_stops_the_first_fit():
    with pytest.raises(ValueError, match="disagrees with the environment"):
        make(termination_fn=lambda obs, action, next_obs: np.abs(next_obs[:, 0]) > 1.0).learn(80)


def test_a_rule_agrees_where_vec_normalize_has_rounded_the_last_observation():
    """An empty tank is stored as 5e-8 of fuel. A rule that is off by more than the rounding still is an error."""

    class Rocket(gym.Env):
        observation_space, action_space = spaces.Box(0.0, 10.0, (2,)), spaces.Box(-1.0, 1.0, (1,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.state = np.array([1.0, self.np_random.normal(5.0)], dtype=np.float32)
            return self.state.copy(), {}

        def step(self, action):
            self.state[0] = max(self.state[0] - 0.3 * abs(action[0]), 0.0)
            return self.state.copy(), 1.0, bool(self.state[0] <= 0.0), False, {}

    def learn(empty: float) -> MBPO:
        env = VecNormalize(make_vec_env(Rocket))
        rule = lambda obs, action, next_obs: next_obs[:, 0] <= empty  # noqa: E731
        return make(env, termination_fn=rule, learning_starts=300).learn(302)

    buffer = learn(0.0).replay_buffer
    last = buffer.next_observations[:300][buffer.dones[:300] > 0, 0]
    assert len(last) > 10 and (last > 0.0).any() and np.abs(last).max() < 1e-6
    with pytest.raises(ValueError, match="The termination rule disagrees"):
        learn(0.1)


def test_asking_too_early_is_explained():
    with pytest.raises(ValueError, match="Got 0 usable real transitions, but a fit needs 10"):
        make().fit_dynamics()
    with pytest.raises(ValueError, match="needs a fitted dynamics"):
        make().imagine()


class ImageEnv(gym.Env):
    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.low, {}

    def step(self, action):
        return self.observation_space.low, 0.0, False, False, {}


def idle_models():
    images = dict(buffer_size=100, policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8)))
    yield make(ImageEnv(), "CnnPolicy", **images), "images"
    her = dict(replay_buffer_class=HerReplayBuffer, learning_starts=60)
    yield make(BitFlippingEnv(n_bits=4, continuous=True), "MultiInputPolicy", **her), "HerReplayBuffer"
    lean = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    yield make(**lean), "pass `termination_fn`"


def test_what_cannot_be_modelled_runs_as_sac_and_says_so_once(tmp_path):
    for index, (model, reason) in enumerate(idle_models()):
        folder = tmp_path / str(index)
        model.set_logger(configure(str(folder), ["log"]))
        model.learn(70)
        model.learn(10, reset_num_timesteps=False)
        text = (folder / "log.txt").read_text()
        assert text.count("MBPO runs as plain SAC") == 1 and reason in text
        assert model.fit_result is None and reason in model.idle_reason()


def test_asking_an_image_model_to_imagine_is_a_value_error():
    model, _ = next(idle_models())
    for ask in (model.fit_dynamics, model.imagine):
        with pytest.raises(ValueError, match=r"runs as plain SAC here .* not made for images"):
            ask()


def test_idleness_is_printed_at_verbose_1_only(capsys):
    for verbose, count in [(0, 0), (1, 1)]:
        model = make(ImageEnv(), "CnnPolicy", buffer_size=10, verbose=verbose)
        model.learn(3)
        assert capsys.readouterr().out.count("MBPO runs as plain SAC") == count


def test_a_frozen_part_of_the_actor_stays_as_it_is():
    model = make()
    model.actor.latent_pi[0].requires_grad_(False)
    before = model.actor.latent_pi[0].weight.clone()
    model.learn(80)
    assert (model.actor.latent_pi[0].weight == before).all() and len(model.imagined_buffer) > 0


@pytest.mark.parametrize("algorithm", [MBPO, DHMBPO])
def test_the_critics_of_a_frozen_actor_are_trained(algorithm):
    model = make(algorithm=algorithm)
    model.actor.requires_grad_(False)
    actor, critic = ([p.clone() for p in network.parameters()] for network in (model.actor, model.critic))
    model.learn(80)
    assert len(model.imagined_buffer) > 0
    assert all((a == b).all() for a, b in zip(actor, model.actor.parameters(), strict=True))
    assert all((a != b).any() for a, b in zip(critic, model.critic.parameters(), strict=True))


def test_gsde_gives_every_imagined_row_its_own_noise():
    model = make(use_sde=True, policy_kwargs=dict(log_std_init=-1.0)).learn(80)
    actions = model._sample_imagined_actions(th.zeros(1000, 1))
    assert actions.unique().numel() > 900 and actions.abs().max() < 1.0
