"""What makes MBPO and DHMBPO drop-ins for SB3's SAC, point by point. The model is active unless a test says otherwise."""

import copy
import inspect
import io
from functools import partial, partialmethod
from pkgutil import resolve_name

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import ACTIVE, LineEnv
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common import callbacks as cb
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from test_mbpo import identical

from sb3_mbpo import DHMBPO, MBPO, takes_tensors
from sb3_mbpo.dhmbpo import POLICY
from sb3_mbpo.fit import fit_ensemble
from sb3_mbpo.update import sac_updates

HER = dict(replay_buffer_class=HerReplayBuffer, buffer_size=500)
LEAN = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
DictEnv = partial(LineEnv, dict_observation=True)
GoalEnv = partial(BitFlippingEnv, n_bits=4, continuous=True)
ShortEnv = partial(gym.make, "Pendulum-v1", max_episode_steps=20)  # whatever the policy


def beyond(obs, action, next_obs):
    return np.abs(next_obs[:, -1]) > 3.0


def obeys_the_line(data) -> bool:
    """Whether these are raw, whole, one-step transitions of LineEnv. The position comes last, in a Dict too."""
    x, following = data.observations[:, -1], data.next_observations[:, -1]
    rewards = -following.abs() - 10.0 * data.terminated
    return th.allclose(following, x + 0.3 * data.actions[:, 0], atol=1e-4) and th.allclose(data.rewards, rewards, atol=1e-4)


#: The algorithm of the test that runs, and what its SAC is like.
ALGORITHM: type[MBPO] = MBPO
OF_SAC = {MBPO: {}, DHMBPO: dict(gamma=0.995, ent_coef="auto_0.1")}


@pytest.fixture(params=[MBPO, DHMBPO], ids=["MBPO", "DHMBPO"], autouse=True)
def algorithm(request, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ALGORITHM", request.param)
    return request.param


only_mbpo = pytest.mark.parametrize("algorithm", [MBPO], indirect=True)


def environment_and_policy(env, policy) -> tuple:
    env = env or LineEnv()
    return policy or ("MlpPolicy" if not isinstance(env.observation_space, spaces.Dict) else "MultiInputPolicy"), env


def small_policy(kwargs: dict) -> dict:
    return dict(policy_kwargs=dict(n_critics=2) | kwargs.get("policy_kwargs", {}))


def new(env=None, policy=None, **kwargs):
    settings = dict(seed=0, device="cpu", rollout_length=1) | ACTIVE | kwargs
    if ALGORITHM is DHMBPO:
        settings |= dict(gradient_horizon=2) | small_policy(kwargs)
    return ALGORITHM(*environment_and_policy(env, policy), **settings)


def new_sac(env=None, policy=None, **kwargs):
    """SAC with the policy and the settings that the algorithm has."""
    settings = dict(seed=0, device="cpu", learning_starts=ACTIVE["learning_starts"]) | OF_SAC[ALGORITHM] | kwargs
    if ALGORITHM is DHMBPO:
        settings["policy_kwargs"] = POLICY | small_policy(kwargs)["policy_kwargs"]
    name, env = environment_and_policy(env, policy)
    return SAC(ALGORITHM.policy_aliases[name], env, **settings)


def of_mbpo(**kwargs) -> dict:
    """Parameters that DHMBPO has not."""
    return kwargs if ALGORITHM is MBPO else {}


def active(env=None, steps: int = 46, **kwargs) -> MBPO:
    """Fitted, and updated with what it imagined; at 46 steps once, at 64 twice."""
    return check_active(new(env, **kwargs).learn(steps))


def check_active(model: MBPO) -> MBPO:
    assert model.fit_result is not None and len(model.imagined_buffer) > 0 and model._n_updates > 0
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    return model


def equal(first, second) -> bool:
    return all((a == b).all() for a, b in zip(first, second, strict=True))


@pytest.fixture
def used(monkeypatch):
    """The data of every fit, and every mixed batch. (Those of DHMBPO are only start states.)"""
    fits, batches = [], []

    def kept(given):
        for batch in given:
            batches.append(batch)
            yield batch

    monkeypatch.setattr("sb3_mbpo.fit.fit_ensemble", lambda *args: fits.append(args[2]) or fit_ensemble(*args))
    monkeypatch.setattr("sb3_mbpo.mbpo.sac_updates", lambda model, given, delay: sac_updates(model, kept(given), delay))
    return fits, batches


class Log(KVWriter):
    """Everything that is logged in 100 steps, and the outputs that each key is kept from."""

    def __init__(self, model) -> None:
        self.rows, self.excluded = [], {}
        model.set_logger(Logger(None, [self]))
        model.learn(100, log_interval=1)

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))
        self.excluded.update(key_excluded)


# 1. One may write MBPO wherever SAC stands: every keyword, in its place, with its default but for a few.
def test_parameters_are_those_of_sac_then_those_of_mbpo():
    other_defaults = {"learning_starts", *(["gradient_steps"] if ALGORITHM is MBPO else ["gamma", "ent_coef"])}
    for method, different in (("__init__", other_defaults), ("learn", {"tb_log_name"})):
        ours, theirs = (inspect.signature(getattr(cls, method)).parameters for cls in (ALGORITHM, SAC))
        assert {name for name in theirs if ours[name].default != theirs[name].default} == different
        assert all(ours[name].kind == theirs[name].kind for name in theirs)
        added = [name for name in ours if name not in theirs]
        assert all(ours[name].default is not inspect.Parameter.empty for name in added)
        place = len(theirs) - (method == "__init__")  # before `_init_setup_model`
        assert list(ours) == [*list(theirs)[:place], *added, *list(theirs)[place:]]
        assert len(added) == (0 if method == "learn" else 9 if ALGORITHM is MBPO else 8)


# 2. Every kind of environment (by id, Box and Dict: test_mbpo.test_kinds_of_environments_all_imagine); the statistics of
# VecNormalize belong to the real one.
@pytest.mark.parametrize("n_envs", [1, 2, 3, 5, 8, "processes"])
def test_any_number_of_environments_imagines(n_envs, used):
    kwargs = dict(vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="fork")) if n_envs == "processes" else {}
    model = active(make_vec_env(LineEnv, 2 if kwargs else n_envs, **kwargs), steps=64)
    model.env.close()
    assert len(used[0]) == 2 and all(data.n_rows > 40 and obeys_the_line(data) for data in used[0])
    assert model.replay_buffer.size() * model.n_envs == model.num_timesteps


@pytest.mark.parametrize("norm_reward", [True, False])
@pytest.mark.parametrize("norm_obs", [True, False])
@pytest.mark.parametrize("is_dict", [False, True])
def test_vec_normalize_keeps_its_statistics_and_scales_what_is_imagined(is_dict, norm_obs, norm_reward, used):
    keys = ["position"] if is_dict and norm_obs else None
    env = make_vec_env(DictEnv if is_dict else LineEnv, 2)
    env = VecNormalize(env, norm_obs=norm_obs, norm_reward=norm_reward, norm_obs_keys=keys, clip_reward=1e3)
    model = active(env, **of_mbpo(real_ratio=0.5), reward_fn=takes_tensors(lambda obs, *_: th.full_like(obs[:, 0], -4.0)))
    before = cloudpickle.dumps(env)
    model.imagine()
    model.train(1, 64)
    assert cloudpickle.dumps(env) == before
    if ALGORITHM is DHMBPO:
        return  # what it scales, and how: test_double_horizon
    expected = -4.0 / np.sqrt(env.ret_rms.var + env.epsilon) if norm_reward else -4.0
    assert used[1][-1].rewards[32:].flatten().tolist() == pytest.approx([expected] * 32)


# 3. It is a SAC, with SAC's policies: see point 5.
# 4. Idle it is SAC to the bit (plain and normalised: test_mbpo.test_an_idle_mbpo_is_sac_to_the_bit), and active it repeats
# itself (one environment: test_mbpo.test_the_same_seed_gives_the_same_bits_and_another_does_not).
NOISES = [noise(np.zeros(1), 0.3 * np.ones(1)) for noise in (NormalActionNoise, OrnsteinUhlenbeckActionNoise)]
EXPLORATION = [dict(use_sde=True, sde_sample_freq=4), *(dict(action_noise=noise) for noise in NOISES)]
EPISODES = dict(train_freq=(1, "episode"), gradient_steps=-1)
IDLE = [*EXPLORATION, dict(n_steps=3), dict(learning_rate=lambda progress: 1e-3 * progress), EPISODES, LEAN]


@only_mbpo
@pytest.mark.parametrize("kwargs", IDLE, ids=lambda kwargs: next(iter(kwargs)))
def test_idle_it_is_sac_with_every_setting(kwargs):
    streams, models = [], []
    for kind in (partial(new, real_ratio=1.0), new_sac):
        models.append(kind(**(dict(gradient_steps=1) | kwargs)).learn(80))
        streams.append((th.get_rng_state().numpy(), np.random.get_state()[1]))
    ours, sac = models
    assert identical(ours, sac) and equal(*streams) and (ours.replay_buffer.actions == sac.replay_buffer.actions).all()
    assert ours._n_updates == sac._n_updates > 0 and ours.fit_result is None


def test_the_same_seed_gives_the_same_bits_with_normalised_environments():
    first, second, third = (active(VecNormalize(make_vec_env(LineEnv, 3)), steps=84, seed=seed) for seed in (5, 5, 6))
    assert identical(first, second) and not identical(first, third)
    assert equal(first.imagined_buffer.newest(10**6), second.imagined_buffer.newest(10**6))


# 5. The replay buffer is the very one that SAC would have made. It is copied, saved, deleted and loaded like any other.
OwnBuffer = type("OwnBuffer", (ReplayBuffer,), {})
BUFFERS = [(ReplayBuffer, LineEnv, {}), (DictReplayBuffer, DictEnv, {}), (NStepReplayBuffer, LineEnv, dict(n_steps=3))]
BUFFERS += [(OwnBuffer, LineEnv, dict(replay_buffer_class=OwnBuffer)), (HerReplayBuffer, GoalEnv, HER)]


@pytest.mark.parametrize(("expected", "env", "kwargs"), BUFFERS)
def test_the_replay_buffer_and_the_policy_are_those_of_sac(expected, env, kwargs):
    model, sac = new(env(), **kwargs), new_sac(env(), **kwargs)
    assert isinstance(model, SAC) and set(ALGORITHM.policy_aliases) == set(SAC.policy_aliases)
    assert isinstance(model.policy, SAC.policy_aliases[environment_and_policy(env(), None)[0]])
    assert type(model.policy) is type(sac.policy) and str(model.policy) == str(sac.policy) and identical(model, sac)
    before = model.replay_buffer
    model.learn(46)
    assert model.replay_buffer is before and type(before) is expected is type(sac.replay_buffer)
    assert (model.fit_result is None) == (expected is HerReplayBuffer)


def test_a_replay_buffer_is_copied_saved_deleted_and_loaded(tmp_path):
    model = active(buffer_size=200)
    twin = copy.deepcopy(model).learn(20, reset_num_timesteps=False)
    assert model.replay_buffer.size() == 46 and len(model.imagined_buffer) == 64 and not identical(twin, model)
    model.save_replay_buffer(tmp_path / "buffer")
    del model.replay_buffer
    with pytest.raises(AttributeError):
        _ = model.replay_buffer
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(20, reset_num_timesteps=False)
    assert type(model.replay_buffer) is ReplayBuffer and model.replay_buffer.size() == 66


# 6. n-step returns reach the real rows of a batch, no others and no fit. Per row:
# test_buffers.test_n_step_returns_bring_their_discounts.
# 7. A buffer of half the size, half full and wrapped around, is learned from: it has no next observations of its own.
KNOWN = dict(termination_fn=beyond, **LEAN)


@pytest.mark.parametrize("kwargs", [dict(n_steps=3), KNOWN, dict(buffer_size=50, **KNOWN)], ids=["n-step", "lean", "full"])
def test_special_buffers_are_fitted_to_step_by_step(kwargs, used):
    model, (fits, batches) = active(steps=64, gamma=0.9, **of_mbpo(real_ratio=0.5), **kwargs), used
    assert len(fits) == 2 and all(data.n_rows >= 35 and obeys_the_line(data) for data in fits)
    if model.n_steps > 1 and batches:
        real, imagined = (th.cat([batch.discounts[rows] for batch in batches]) for rows in (slice(128), slice(128, 256)))
        assert (imagined == 0.9).all() and th.isclose(real, th.tensor(0.9**3)).float().mean() > 0.5


# 8. Raw rows, and only real ones where SB3 keeps real ones. While statistics drift:
# test_mbpo.test_everything_stays_raw_while_the_statistics_of_vec_normalize_drift.
def test_nothing_imagined_enters_what_is_real(tmp_path):
    model = active(Monitor(LineEnv(), str(tmp_path / "run")), steps=90)
    buffer, episodes = model.replay_buffer, list(model.ep_info_buffer)
    real = buffer.observations.copy(), buffer.rewards.copy()
    for _ in range(3):
        model.imagine()
        model.train(1, 64)
    assert model.num_timesteps == buffer.size() == buffer.pos == 90 and equal(real, (buffer.observations, buffer.rewards))
    lengths = load_results(str(tmp_path))["l"].tolist()
    assert lengths == [episode["l"] for episode in model.ep_info_buffer] and list(model.ep_info_buffer) == episodes
    assert len(lengths) == buffer.dones.sum() and 70 <= sum(lengths) <= 90


# 9. An end is `done` and no timeout: test_buffers.test_real_transitions_of_several_environments. A branch does not end in
# one: test_imagination.test_ended_rows_are_stored_once_and_stepped_no_more and test_a_branch_goes_on_from_where_it_came_to.
# 10. Last observations that VecNormalize has clipped are no data. The marks themselves:
# test_buffers.test_clipped_terminal_observations_are_left_out_and_the_marks_are_saved.
@pytest.mark.parametrize("env_class", [LineEnv, DictEnv], ids=["box", "dict"])
def test_clipped_last_observations_are_not_fitted_to(env_class, used):
    model = active(VecNormalize(make_vec_env(env_class, 2), clip_obs=0.5), steps=104)
    marks, fits = model.replay_buffer.lost_terminals, used[0]
    assert marks.any() and fits[-1].n_rows == 100 - marks[:50].sum() and all(obeys_the_line(data) for data in fits)


# 11. The policy imagines with what the wrapper of now would show it, also after set_env and load.
def test_the_policy_imagines_through_the_wrapper_of_now(tmp_path):
    def wrapped(shift: float = 0.0) -> VecNormalize:
        env = VecNormalize(make_vec_env(DictEnv, 1), norm_obs_keys=["memory"])
        env.obs_rms["memory"].mean += shift
        return env

    model = active(wrapped())
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = ALGORITHM.load(tmp_path / "model", env=wrapped(7.0))
    loaded.load_replay_buffer(tmp_path / "buffer")
    model.set_env(wrapped(5.0))
    for each in (model, loaded):
        seen, fit = [], each.fit_result
        hook = each.actor.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        rows = each.imagined_buffer.newest(each.imagine()).observations.numpy()
        hook.remove()
        expected = each.env.normalize_obs(dict(memory=rows[:, :1], position=rows[:, 1:]))
        assert all(np.allclose(seen[0][key], expected[key], rtol=1e-5) for key in expected) and expected["memory"].mean() < -3
        each.learn(20, reset_num_timesteps=False)
        assert check_active(each).fit_result is not fit and each.num_timesteps == each.replay_buffer.size() == 66


# 12. What was learned survives saving: test_mbpo.test_save_and_load_keep_the_model_that_imagines; the random stream, too:
# test_checkpoint.test_the_zip_file_goes_on_with_the_random_stream. Without an environment, and, for point 21, with a device
# by name (none of them is a GPU here):
@pytest.mark.parametrize(("env", "device"), [(LineEnv, "cpu"), (DictEnv, "auto")], ids=["box", "dict"])
def test_a_loaded_model_predicts_without_an_environment(env, device, tmp_path):
    model = active(env(), device=device)
    model.save(tmp_path / "model")
    for loaded in (ALGORITHM.load(tmp_path / "model", env=None, device=name) for name in ("cpu", "auto")):
        assert loaded.env is None and (loaded.num_timesteps, loaded._n_updates) == (46, model._n_updates)
        for observation in (model.observation_space.sample() for _ in range(5)):
            expected, got = (each.predict(observation, deterministic=True)[0] for each in (model, loaded))
            assert (expected == got).all() and model.action_space.contains(loaded.predict(observation)[0])
        tensors = [*loaded.dynamics.state_dict().values(), *loaded.policy.state_dict().values()]
        assert {tensor.device for tensor in tensors} == {loaded.device} == {th.device("cpu")}
        loaded.set_env(env())
        assert loaded.learn(3, reset_num_timesteps=False)._n_updates == model._n_updates + 3  # from an empty buffer on
        check_active(loaded.learn(42, reset_num_timesteps=False))


# 13. Parameters come and go as in SB3, and a saved model holds nothing big besides them. Of another algorithm:
# test_checkpoint.test_a_file_of_another_algorithm_is_explained.
def test_parameters_round_trip_with_and_without_exact_match():
    model, other = active(), new(seed=1)
    everything, weights = model.get_parameters(), lambda model: model.dynamics.state_dict().values()
    other.set_parameters({"policy": everything["policy"]}, exact_match=False)
    assert identical(other, model) and not equal(weights(other), weights(model))
    with pytest.raises(ValueError, match="do not match"):
        other.set_parameters({"policy": everything["policy"]})
    other.set_parameters(everything)
    assert equal(weights(other), weights(model))


def test_a_saved_model_is_small_and_takes_exclude_include_and_custom_objects():
    model, stream, parts = active(buffer_size=200), io.BytesIO(), io.BytesIO()
    model.note, model.scratch = "kept", "dropped"
    model.save(stream, exclude=["scratch"])
    for part in model.get_parameters().values():
        th.save(part, parts)
    assert parts.tell() < stream.tell() < parts.tell() + 30_000
    loaded = ALGORITHM.load(stream, custom_objects=dict(learning_rate=1e-5))
    assert loaded.note == "kept" and not hasattr(loaded, "scratch") and identical(loaded, model)
    loaded.set_env(LineEnv())
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.actor.optimizer.param_groups[0]["lr"] == 1e-5
    model.save(stream := io.BytesIO(), include=["replay_buffer"])
    with pytest.raises(ValueError, match="call `set_env` first"):
        ALGORITHM.load(stream, termination_fn=beyond).imagine()  # how the policy's input was normalised is not known either
    assert ALGORITHM.load(stream, env=LineEnv()).imagine() == 64  # from the observations that came with it


# 14. Nothing is too small. (A loaded model with an empty buffer learns in point 12.)
@pytest.mark.parametrize("kwargs", [dict(buffer_size=1), dict(batch_size=1), dict(buffer_size=20)], ids=str)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_tiny_buffers_and_batches_run(kwargs, n_envs):
    model = new(make_vec_env(LineEnv, n_envs), **kwargs).learn(70)
    assert model._n_updates > 0
    if kwargs == dict(buffer_size=1):
        assert f"holds {n_envs} transitions, but a fit needs 10" in model.idle_reason()
    else:
        check_active(model)


# 15. Learning twice: test_mbpo.test_learn_again_goes_on_fitting_with_and_without_reset; with set_env midway: point 11.
# 16. The user's callbacks are called as by SAC: the same hooks at the same steps, with the same local variables.
# CheckpointCallback: test_mbpo.test_checkpoints_and_tensorboard_work.
class Record(cb.BaseCallback):
    def __init__(self, events) -> None:
        super().__init__()
        self.events = events

    def note(self, hook: str = "step") -> bool:
        state = self.num_timesteps, self.n_calls, self.model.policy.training
        self.events.append((hook, *state, sorted(self.locals), sorted(self.globals)))
        return True

    _on_step = note
    _on_training_start, _on_training_end = partialmethod(note, "training start"), partialmethod(note, "training end")
    _on_rollout_start, _on_rollout_end = partialmethod(note, "rollout start"), partialmethod(note, "rollout end")


def evaluation(events):
    stop = cb.StopTrainingOnRewardThreshold(-1e9)  # at once
    settings = dict(callback_after_eval=Record(events), eval_freq=60, n_eval_episodes=1, verbose=0)
    return [Record(events), cb.EvalCallback(Monitor(ShortEnv()), callback_on_new_best=stop, **settings)]


USERS = {  # and the step that they let it learn to
    "single": (Record, 70),
    "callback list": (lambda events: cb.CallbackList([Record(events), Record(events)]), 70),
    "function": (lambda events: lambda *args: events.append(sorted(args[0])) or len(events) < 55, 55),
    "function of None": (lambda events: lambda *args: events.append(sorted(args[0])), 1),
    "evaluation": (evaluation, 60),
    "episodes": (lambda events: [cb.StopTrainingOnMaxEpisodes(3), Record(events)], 60),
}


@pytest.mark.filterwarnings("ignore:rich is experimental")
@pytest.mark.parametrize("user", USERS)
def test_the_users_callbacks_are_called_as_by_sac(user):
    runs, (callback, steps) = [], USERS[user]
    for kind in (new_sac, *([partial(new, real_ratio=1.0)] if ALGORITHM is MBPO else []), new):
        events = []
        model = kind(ShortEnv()).learn(70, callback=callback(events), progress_bar=user == "single")
        runs.append((events, model.num_timesteps, model.replay_buffer.size()))
    assert steps == 1 or check_active(model)
    assert runs[0] == runs[1] == runs[-1] and model.num_timesteps == steps and events


# 17. Default paths warn of nothing. What is not modelled neither (point 24), but it is said:
# test_mbpo.test_what_cannot_be_modelled_runs_as_sac_and_says_so_once and test_idleness_is_printed_at_verbose_1_only.
def test_default_paths_warn_of_nothing(recwarn, tmp_path):
    for env in (LineEnv(), DictEnv(), VecNormalize(make_vec_env(LineEnv, 2)), ShortEnv()):
        active(env).save(tmp_path / "model")
        ALGORITHM.load(tmp_path / "model", env=env).learn(2, reset_num_timesteps=False)
    assert [str(warning.message) for warning in recwarn] == []


# 18. The keys of SAC are all there, each in the same outputs. At verbose=1 they fit into the table:
# test_mbpo.test_the_table_on_stdout_has_room_for_every_key and test_what_is_logged_is_complete_short_and_true.
@pytest.mark.parametrize("kwargs", [{}, dict(ent_coef=0.1), *EXPLORATION, EPISODES], ids=str)
def test_the_keys_of_sac_are_logged_where_sac_logs_them(kwargs):
    model = new(ShortEnv(), **kwargs)
    theirs, ours = Log(new_sac(ShortEnv(), **kwargs)).excluded, Log(model).excluded
    check_active(model)
    assert "rollout/ep_rew_mean" in theirs and theirs == {key: ours.get(key) for key in theirs}


# 19. Steps that are counted are real, and updates that are counted are all.
# 20. The folder of the first run is MBPO_1: test_mbpo.test_checkpoints_and_tensorboard_work.
# 21. Devices: see point 12.
# 22. Exploration: see point 18, and test_mbpo.test_gsde_gives_every_imagined_row_its_own_noise. Schedules:
@pytest.mark.parametrize(
    ("algorithm", "kwargs"), [(MBPO, {}), (MBPO, dict(policy_delay=2)), (DHMBPO, {})], indirect=["algorithm"]
)
def test_logged_counts_and_learning_rates_are_true(kwargs):
    model = new(ShortEnv(), gradient_steps=3, learning_rate=lambda progress: 1e-3 * progress, **kwargs)
    rows = Log(model).rows
    assert [row["time/total_timesteps"] for row in rows] == [20, 40, 60, 80, 100]
    assert [row["train/n_updates"] for row in rows[2:]] == [3 * (steps - 41) for steps in (60, 80, 100)]
    rates = [row["train/learning_rate"] for row in rows[2:]]
    assert rates == pytest.approx([1e-3 * (100 - steps) / 100 for steps in (59, 79, 99)])  # as of the last update
    optimizers = model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer, model.dynamics_optimizer
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([0.0, 0.0, 0.0, 3e-3])
    assert check_active(model)._n_updates == 3 * 60


# 23. Layers that behave otherwise in training: imagination uses them as in evaluation and leaves them as they were.
class Noisy(FlattenExtractor):
    def __init__(self, observation_space) -> None:
        super().__init__(observation_space)
        self.flatten = th.nn.Sequential(th.nn.Flatten(), th.nn.BatchNorm1d(1), th.nn.Dropout(0.5))


def test_batch_norm_and_dropout_do_not_notice_imagination():
    model, modes = new(policy_kwargs=dict(features_extractor_class=Noisy)), []
    layers = model.actor.features_extractor.flatten[1:]
    before = layers[0].running_mean.clone()
    check_active(model.learn(46))
    assert not (layers[0].running_mean == before).all()  # training does change it
    state = copy.deepcopy(model.policy.state_dict())
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    model.policy.set_training_mode(True)
    model.imagine()
    assert modes == [False, False] and equal(model.policy.state_dict().values(), state.values())
    model.train(1, 64)
    assert modes[2:] and all(modes[2:]) and equal(model.batch_norm_stats, model.batch_norm_stats_target)


# 24. Vectors of numbers are modelled, in a Dict as in a Box. Other observations are not: SAC it is.
@pytest.mark.parametrize("normalised", [False, True])
def test_a_dict_learns_exactly_as_its_flattened_box(normalised, monkeypatch):
    monkeypatch.setattr("sb3_mbpo.update.covers", lambda model: False)  # the Dict needs autograd: so do both
    envs = DictEnv(), gym.wrappers.FlattenObservation(DictEnv())
    assert envs[1].observation_space.dtype == np.float64
    models = [active(VecNormalize(DummyVecEnv([lambda env=env: env])) if normalised else env, steps=84) for env in envs]
    assert identical(*models) and equal(*(model.dynamics.state_dict().values() for model in models))
    assert equal(*(model.imagined_buffer.newest(10**6) for model in models))


@pytest.mark.parametrize("normalised", [False, True])
def test_the_users_rules_get_raw_observations_and_actions_in_the_units_of_the_environment(normalised):
    calls, env = [], make_vec_env(LineEnv, 1)
    reward_fn = takes_tensors(lambda *args: args[2][:, 0])
    rules = dict(termination_fn=lambda *args: calls.append(args) or beyond(*args), reward_fn=reward_fn)
    model = active(VecNormalize(env) if normalised else env, **rules)
    obs, action, next_obs = calls[0]  # real: the comparison at the first fit
    assert len(obs) == 41 and action.min() < -1.5 and 0.8 < action.max() <= 1.0
    np.testing.assert_allclose(next_obs, obs + 0.3 * (action + 0.5) / 1.5, atol=1e-4)
    rows = model.imagined_buffer.newest(model.imagine())
    np.testing.assert_allclose(calls[-1][1], model.policy.unscale_action(rows.actions.numpy()), atol=1e-5)
    assert equal((calls[-1][0], calls[-1][2]), (rows.observations.numpy(), rows.next_observations.numpy()))


IMAGE, VECTOR = spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Box(-1.0, 1.0, (2,), np.float32)
NOT_MODELLED = [spaces.Discrete(4), spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3), spaces.Box(-3, 3, (2,), np.int32)]
NOT_MODELLED += [IMAGE, spaces.Dict(a=VECTOR, b=IMAGE), spaces.Dict(a=VECTOR, b=spaces.Discrete(3))]


# 25. Hindsight goals and images are SAC's too. Both points: without a warning, and when they are saved and loaded.
@pytest.mark.parametrize("space", [*NOT_MODELLED, "goals"], ids=str)
def test_what_is_not_modelled_is_sac_without_a_warning(space, recwarn, tmp_path):
    def env():
        if space == "goals":
            return GoalEnv()
        space.seed(0)
        return gym.wrappers.TransformObservation(ShortEnv(), lambda _: space.sample(), space)

    kwargs = HER if space == "goals" else dict(buffer_size=60, policy="CnnPolicy" if space is IMAGE else None)
    kwargs = kwargs | dict(gradient_steps=1, batch_size=16, policy_kwargs=dict(net_arch=[8]))
    ours, sac = (kind(env(), **kwargs).learn(50) for kind in (new, new_sac))
    assert ours.idle_reason() and ours.fit_result is None and ours.dynamics is None
    assert identical(ours, sac) and ours._n_updates == sac._n_updates > 0
    ours.save(tmp_path / "model")
    loaded = ALGORITHM.load(tmp_path / "model", env=env())
    assert identical(loaded, sac) and loaded.idle_reason() and loaded.get_parameters().keys() == sac.get_parameters().keys()
    assert [str(warning.message) for warning in recwarn] == []


# 26. Whatever stops training, and wherever: the model can be saved, loaded, asked and trained on.
BREAKS = [("UPDATES.polyak_update", 4, KeyboardInterrupt), ("UPDATES.polyak_update", 4, RuntimeError)]
BREAKS += [("fit.ensemble_loss", 10, KeyboardInterrupt), ("fit.ensemble_loss", 45, RuntimeError)]  # of the first, the second
BREAKS += [("mbpo.imagine_round", 0, KeyboardInterrupt)]


@pytest.mark.parametrize(("where", "calls", "error"), BREAKS)
def test_an_interrupted_model_goes_on(where, calls, error, monkeypatch, tmp_path):
    where = where.replace("UPDATES", "update" if ALGORITHM is MBPO else "double_horizon")
    function, left = resolve_name(f"sb3_mbpo.{where}"), iter(range(calls))

    def interrupted(*args):
        if next(left, None) is None:
            raise error("stop")
        return function(*args)

    monkeypatch.setattr(f"sb3_mbpo.{where}", interrupted)
    model = new()
    buffer = model.replay_buffer
    with pytest.raises(error, match="stop"):
        model.learn(80)
    monkeypatch.undo()
    assert model.replay_buffer is buffer and type(buffer) is ReplayBuffer and 41 <= buffer.size() == model.num_timesteps < 80
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = type(model).load(tmp_path / "model", env=LineEnv())
    loaded.load_replay_buffer(tmp_path / "buffer")
    for each, fit in ((model, model.fit_result), (loaded, loaded.fit_result)):
        assert each.action_space.contains(each.predict(np.zeros(1))[0])
        each.learn(25, reset_num_timesteps=False)
        assert check_active(each).fit_result is not fit and each.imagine() == 64


# 27. SB3's own tests of SAC, with MBPO in its place, are not part of this file. 28. The RL Zoo: test_zoo.
# 29. NaN is a ValueError. From the environment: test_mbpo.test_what_is_not_finite_never_enters_a_buffer. Imagined:
# test_imagination.test_rows_that_are_not_finite_are_dropped_and_stepped_no_more, test_when_no_row_is_finite_it_says_so.
# 30. Types, style and documents are checked elsewhere.
