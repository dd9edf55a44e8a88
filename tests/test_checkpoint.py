import json
import pathlib
import random
import shutil
import threading

import numpy as np
import pytest
import torch as th
from conftest import LineEnv
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import EveryNTimesteps
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from test_mbpo import identical, make
from torch.utils._pytree import tree_leaves

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.checkpoint import CheckpointCallback, checkpoints, load_checkpoint, save_checkpoint
from sb3_mbpo.run_state import blob_names
from sb3_mbpo.storage import BLOB_BYTES, BlobStore, DamagedFileError, read_json, write_json
from sb3_mbpo.streams import environment_streams

GOAL_KEYS = ("observation", "achieved_goal", "desired_goal")


class WithinBounds(LineEnv):
    """Random starts; it never ends before 20 steps, so several environments end together."""

    def step(self, action):
        self.x = np.clip(self.x, -2.0, 2.0)
        return super().step(action)


class EndsEarly(LineEnv):
    """Its task ends soon, by a rule that has to be learned."""

    def step(self, action):
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, bool(abs(self.x[0]) > 1.5), truncated, info


class DrawsInSteps(WithinBounds):
    def step(self, action):
        self.np_random.random()
        return super().step(action)


class GoalLine(WithinBounds):
    """The goal is anywhere on the line."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict(dict.fromkeys(GOAL_KEYS, self.observation_space))

    def _observation(self):
        return dict(zip(GOAL_KEYS, (self.x.copy(), self.x.copy(), np.ones(1)), strict=True))

    def compute_reward(self, achieved, desired, info):
        return -np.abs(achieved - desired)[..., 0]


def line(n_envs: int = 1, env=WithinBounds, **kwargs):
    return DummyVecEnv([lambda: env(**kwargs)] * n_envs)


def seeded():
    env = line()
    env.seed(7)
    return env


def never_ends(obs, action, next_obs):
    return np.zeros(len(obs), dtype=bool)


def all_equal(first: MBPO, second: MBPO) -> bool:
    """Every number that learning goes by, the streams included."""
    numbers = []
    for model in (first, second):
        buffer, imagined = model.replay_buffer, model.imagined_buffer
        leaves = tree_leaves(model.get_parameters())
        arrays = tree_leaves([buffer.observations, buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts])
        arrays = [array[: buffer.size()] for array in arrays]
        vec_normalize = model.get_vec_normalize_env()
        if vec_normalize is not None:
            arrays += [vec_normalize.obs_rms.mean, vec_normalize.obs_rms.var, np.array(vec_normalize.ret_rms.var)]
        leaves += [th.as_tensor(array) for array in arrays]
        leaves += [] if imagined is None else imagined.newest(imagined.capacity)
        numbers.append([*leaves, model._n_updates, model._episode_num, model._generator.get_state()])
    return all(
        bool((a == b).all()) if isinstance(a, th.Tensor) else a == b for a, b in zip(numbers[0], numbers[1], strict=True)
    )


def forget_the_streams():
    th.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


# ---------------------------------------------------------------- the same bits


RUNS = {
    "plain": (line, {}),
    "one environment by itself": (LineEnv, {}),
    "learned termination": (EndsEarly, {}),
    "seeded": (seeded, {}),
    "normalized": (lambda: VecNormalize(line()), {}),
    "reward not normalized": (lambda: VecNormalize(line(), norm_reward=False, clip_obs=2.0), {}),
    "two environments": (lambda: VecNormalize(line(2)), dict(train_freq=2)),
    "subprocesses": (lambda: SubprocVecEnv([WithinBounds] * 2, start_method="fork"), {}),
    "dict": (lambda: line(dict_observation=True), dict(policy="MultiInputPolicy")),
    "gSDE": (line, dict(use_sde=True, sde_sample_freq=4)),
    "n-step": (line, dict(n_steps=3)),
    "noise": (line, dict(action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1)))),
    "schedules": (line, dict(learning_rate=lambda progress: 1e-3 * progress, rollout_length=(60, 120, 1, 4))),
    "full buffer": (line, dict(buffer_size=50)),
    "lean buffer": (
        line,
        dict(
            optimize_memory_usage=True,
            replay_buffer_kwargs=dict(handle_timeout_termination=False),
            termination_fn=never_ends,
            buffer_size=90,
        ),
    ),
    "episodes": (line, dict(train_freq=(1, "episode"), gradient_steps=-1)),
    "idle": (line, dict(real_ratio=1.0)),
}
#: DHMBPO imagines between two fits, too.
DOUBLE_HORIZON = dict(algorithm=DHMBPO, rollout_length=3, rollout_freq=7, policy_kwargs=dict(net_arch=[16], n_critics=3))
RUNS |= {f"{name}, DHMBPO": (env, DOUBLE_HORIZON | kwargs) for name, (env, kwargs) in RUNS.items() if name != "idle"}


def copy_of(folder, path):
    """The folder as it was when this checkpoint was the newest."""
    copy = folder.with_name(f"{folder.name}_{path.stem}")
    shutil.copytree(folder, copy)
    for later in checkpoints(copy):
        if later.name > path.name:
            later.unlink()
    return copy


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(name, tmp_path):
    def saving(folder):
        return CheckpointCallback(20, folder, keep=99, at_episode_end=True)

    def make_env():
        envs.append(RUNS[name][0]())
        return envs[-1]

    envs, kwargs, folder = [], RUNS[name][1], tmp_path / "run"
    never_stopped = make(make_env(), **kwargs).learn(130, saving(folder))
    saved = sorted(checkpoints(folder))
    assert name != "learned termination" or never_stopped.fit_result.termination_recall > 0
    assert len(saved) >= 4 and (name == "idle" or len(never_stopped.imagined_buffer) > 0)
    if not kwargs.get("use_sde"):  # there, each checkpoint draws new noise
        assert all_equal(make(make_env(), **kwargs).learn(130), never_stopped)  # saving changes nothing
    for path in (saved[0], saved[-3]):  # in the warm-up, and between two fits
        forget_the_streams()
        copy = copy_of(folder, path)
        resumed = load_checkpoint(copy, make_env(), kwargs.get("algorithm", MBPO))
        assert f"_{resumed.num_timesteps}_steps" in path.name and not all_equal(resumed, never_stopped)
        resumed.learn(130 - resumed.num_timesteps, saving(copy), reset_num_timesteps=False)
        assert all_equal(resumed, never_stopped)
    for env in envs:
        env.close()  # the subprocesses


def test_a_run_whose_imagined_buffer_has_just_grown_goes_on_with_the_same_bits(tmp_path):
    """Then free slots lie between the newest and the oldest row: here after the fits at 180 and 210 steps."""
    kwargs = dict(dynamics_train_freq=30, rollout_length=(160, 161, 1, 4), rollout_retain_steps=120)
    never_stopped = make(line(), **kwargs).learn(245, CheckpointCallback(20, tmp_path / "run", keep=99, at_episode_end=True))
    grown = []
    for path in sorted(checkpoints(tmp_path / "run")):
        copy = copy_of(tmp_path / "run", path)
        resumed = load_checkpoint(copy, line())
        rows, pos = resumed.imagined_buffer.ring()
        if pos < len(rows) < resumed.imagined_buffer.capacity:
            grown.append(resumed.num_timesteps)
            assert len(rows) == len(resumed.imagined_buffer) and np.isfinite(rows).all()
            resumed.learn(245 - resumed.num_timesteps, reset_num_timesteps=False)
            assert all_equal(resumed, never_stopped)
    assert grown == [180, 200, 220]


def test_a_model_that_has_not_learned_yet_and_one_just_loaded_can_be_saved(tmp_path):
    def make_env():
        return VecNormalize(line())

    fresh = make(make_env())
    save_checkpoint(fresh, tmp_path / "fresh")
    fresh.learn(60)
    resumed = load_checkpoint(tmp_path / "fresh", make_env()).learn(60, reset_num_timesteps=False)
    assert all_equal(resumed, fresh)
    save_checkpoint(resumed, tmp_path / "first")
    save_checkpoint(load_checkpoint(tmp_path / "first", make_env()), tmp_path / "second")
    resumed.learn(60, reset_num_timesteps=False)
    forget_the_streams()
    assert all_equal(load_checkpoint(tmp_path / "second", make_env()).learn(60, reset_num_timesteps=False), resumed)
    save_checkpoint(make(make_env()).learn(0), tmp_path / "reset")
    first, second = (load_checkpoint(tmp_path / "reset", make_env()) for _ in range(2))
    assert (first._last_original_obs == second._last_original_obs).all()


def test_vec_normalize_inside_vec_normalize_comes_back(tmp_path):
    def make_env():
        return VecNormalize(VecNormalize(line(), norm_reward=False), norm_obs=False, gamma=np.float32(0.9))

    model = make(make_env()).learn(60)
    save_checkpoint(model, tmp_path)
    resumed = load_checkpoint(tmp_path, make_env())
    for ours, saved in ((resumed.env, model.env), (resumed.env.venv, model.env.venv)):
        assert (ours.ret_rms.var, ours.training) == (saved.ret_rms.var, True) and ("obs_rms" in vars(ours)) == ours.norm_obs
    assert (resumed.env.venv.obs_rms.count, resumed.env.gamma) == (model.env.venv.obs_rms.count, np.float32(0.9))


def test_a_run_may_be_resumed_any_number_of_times(tmp_path):
    never_stopped = make(line()).learn(130)
    for steps in (20, 45, 60, 75, 90, 115, 130):
        model = load_checkpoint(tmp_path, line()) if checkpoints(tmp_path) else make(line())
        model.learn(
            steps - model.num_timesteps, CheckpointCallback(20, tmp_path, at_episode_end=True), reset_num_timesteps=False
        )
        for path in checkpoints(tmp_path):
            if int(path.name.split("_")[1]) % 20 > 0:
                path.unlink()  # saved at the end of `learn`, where no episode began
        forget_the_streams()
    assert all_equal(model, never_stopped)


def test_between_two_calls_of_learn_the_bits_go_on_too(tmp_path):
    never_stopped = make(line(), use_sde=True).learn(80)
    save_checkpoint(never_stopped, tmp_path)
    never_stopped.learn(60, reset_num_timesteps=False)
    forget_the_streams()
    resumed = load_checkpoint(tmp_path, line()).learn(60, reset_num_timesteps=False)
    assert all_equal(resumed, never_stopped)


def test_with_her_the_bits_go_on_too(tmp_path):
    kwargs = dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    never_stopped = make(GoalLine(), **kwargs).learn(130, CheckpointCallback(20, tmp_path, keep=99, at_episode_end=True))
    for path in checkpoints(tmp_path)[:3]:
        path.unlink()
    resumed = load_checkpoint(tmp_path, GoalLine())
    assert 40 < resumed.num_timesteps < 100
    assert all_equal(resumed.learn(130 - resumed.num_timesteps, reset_num_timesteps=False), never_stopped)
    make(GoalLine(), **kwargs).learn(50, CheckpointCallback(33, tmp_path / "anywhere"))
    load_checkpoint(tmp_path / "anywhere", GoalLine()).learn(50, reset_num_timesteps=False)


# ---------------------------------------------------------------- elsewhere


def test_in_the_middle_of_an_episode_nothing_is_lost_and_a_new_one_begins(tmp_path):
    stopped = make(VecNormalize(line())).learn(75)
    save_checkpoint(stopped, tmp_path)
    resumed = load_checkpoint(tmp_path, VecNormalize(line()))
    assert identical(resumed, stopped) and resumed.num_timesteps == resumed.replay_buffer.size() == 75
    assert (resumed.replay_buffer.observations == stopped.replay_buffer.observations).all()
    ours, saved = resumed.get_vec_normalize_env(), stopped.get_vec_normalize_env()
    assert (ours.obs_rms.mean, ours.obs_rms.var, ours.obs_rms.count) == (
        saved.obs_rms.mean,
        saved.obs_rms.var,
        saved.obs_rms.count,
    )
    assert (ours.ret_rms.var, ours.training) == (saved.ret_rms.var, True)
    th.testing.assert_close(th.as_tensor(resumed._last_obs), th.as_tensor(ours.normalize_obs(resumed._last_original_obs)))
    assert resumed.env.get_attr("steps") == [0] and stopped.env.get_attr("steps") == [15]
    # the episode that was cut counts as one that ran out of time
    assert resumed.replay_buffer.dones[74] == resumed.replay_buffer.timeouts[74] == 1
    first, second = (load_checkpoint(tmp_path, VecNormalize(line())).learn(40, reset_num_timesteps=False) for _ in range(2))
    assert all_equal(first, second)


def test_a_vec_env_that_always_answers_for_all_of_its_environments_trains():
    """Its streams are not known, so a checkpoint begins new episodes."""

    class AnswersForAll(DummyVecEnv):
        def get_attr(self, attr_name, indices=None):
            return super().get_attr(attr_name)

    env = AnswersForAll([LineEnv, LineEnv])
    assert environment_streams(env, [1]) == [None]
    assert make(env).learn(100).num_timesteps == 100


def test_an_environment_that_draws_in_its_steps_begins_a_new_episode(tmp_path):
    stopped = make(line(env=DrawsInSteps)).learn(80)
    save_checkpoint(stopped, tmp_path)
    resumed = load_checkpoint(tmp_path, line(env=DrawsInSteps))
    assert not (resumed._last_obs == stopped._last_obs).all()
    assert environment_streams(resumed.env) == environment_streams(stopped.env)  # no number is drawn twice
    resumed = [load_checkpoint(tmp_path, line(env=DrawsInSteps)).learn(40, reset_num_timesteps=False) for _ in range(2)]
    assert all_equal(*resumed)


def test_n_step_returns_do_not_reach_across_the_seam(tmp_path):
    stopped = make(line(), n_steps=3, real_ratio=1.0).learn(50)
    save_checkpoint(stopped, tmp_path)
    resumed = load_checkpoint(tmp_path, line()).learn(30, reset_num_timesteps=False)
    buffer = resumed.replay_buffer
    sample = buffer._get_samples(np.array([48, 49]))
    rewards = buffer.rewards[48:50, 0]
    assert sample.rewards[:, 0].tolist() == pytest.approx([rewards[0] + 0.99 * rewards[1], rewards[1]])
    assert sample.next_observations[:, 0].tolist() == pytest.approx([buffer.next_observations[49, 0, 0]] * 2)


# ---------------------------------------------------------------- files


def test_the_newest_checkpoints_stay_and_blobs_that_nobody_needs_go(tmp_path):
    model = make(line())
    model.learn(130, CheckpointCallback(20, tmp_path, keep=3))
    assert [path.name for path in checkpoints(tmp_path)] == [
        "000007_130_steps.json",
        "000006_120_steps.json",
        "000005_100_steps.json",
    ]
    needed = set().union(*(blob_names(read_json(path)) for path in checkpoints(tmp_path)))
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == needed
    (tmp_path / "000008_140_steps.json.partial").write_text("{")  # a process was killed here
    (tmp_path / "blobs" / f"{'0' * 64}.zip.partial").write_text("PK")
    for name in ("2024-01-01_steps.json", "data.partial", "blobs/notes.txt"):  # not ours
        (tmp_path / name).write_text("")
    (tmp_path / "blobs" / "folder").mkdir()
    save_checkpoint(model, tmp_path, keep=1)
    assert {path.name for path in tmp_path.glob("*.*")} == {"000008_130_steps.json", "2024-01-01_steps.json", "data.partial"}
    needed = blob_names(read_json(checkpoints(tmp_path)[0]))
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == needed | {"notes.txt", "folder"}


def test_a_checkpoint_writes_only_what_is_new(tmp_path):
    model = make(line(), buffer_size=500_000)
    model.learn(60)
    buffer = model.replay_buffer
    buffer.pos = 400_000  # as if it had collected them
    buffer.observations[:400_000] = np.random.default_rng(0).normal(size=(400_000, 1, 1))
    save_checkpoint(model, tmp_path, keep=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "blobs").iterdir()}
    assert sum(path.stat().st_size for path in before) > 400_000 * 8
    buffer.observations[400_000:400_100] = 1.0
    buffer.pos += 100
    save_checkpoint(model, tmp_path, keep=2)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "blobs").iterdir()}
    models = {read_json(path)["model"] for path in checkpoints(tmp_path)}
    assert all(after[path] == time for path, time in before.items() if path.name not in models)
    new = [path.stat().st_size for path in after if path not in before]
    assert len(new) <= 2 + len(("observations", "next_observations", "actions", "rewards", "dones", "timeouts"))
    assert max(new) <= max(BLOB_BYTES, (tmp_path / "blobs" / read_json(checkpoints(tmp_path)[0])["model"]).stat().st_size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, lambda path: path.unlink()], ids=["bit", "truncated", "gone"])
@pytest.mark.parametrize("part", ["list", "model", "array"])
def test_a_damaged_checkpoint_is_skipped_and_named(part, harm, tmp_path):
    model = make(line())
    model.learn(60)
    older = save_checkpoint(model, tmp_path)
    model.learn(20, reset_num_timesteps=False)
    newer = save_checkpoint(model, tmp_path)
    content, store = read_json(newer), tmp_path / "blobs"
    array = content["replay_buffer"]["arrays"]["observations"]["blobs"][0]
    victim = {"list": newer, "model": store / content["model"], "array": store / array}[part]
    harm(victim)
    if part == "list" and not newer.exists():
        assert load_checkpoint(tmp_path, line()).num_timesteps == 60  # nobody can know that there was one
    else:
        with pytest.warns(
            UserWarning, match=rf"Resuming from .*{older.name} at 60 steps. skipped {newer.name} .*{victim.name}"
        ):
            assert load_checkpoint(tmp_path, line()).num_timesteps == 60
    # the next checkpoint is whole again, whatever lies there
    model.learn(20, reset_num_timesteps=False)
    save_checkpoint(model, tmp_path)
    assert load_checkpoint(tmp_path, line()).num_timesteps == 100


def test_a_resumed_run_writes_a_damaged_blob_anew(tmp_path):
    def saving():
        return CheckpointCallback(20, tmp_path, at_episode_end=True)

    never_stopped = make(line()).learn(60, saving())
    newest, older = checkpoints(tmp_path)
    flip_a_bit(tmp_path / "blobs" / read_json(newest)["replay_buffer"]["arrays"]["observations"]["blobs"][0])
    with pytest.warns(UserWarning, match=f"Resuming from .*{older.name}"):
        resumed = load_checkpoint(tmp_path, line())
    resumed.learn(20, saving(), reset_num_timesteps=False)  # the same bits again, so the same names
    assert all_equal(resumed, never_stopped)
    assert load_checkpoint(tmp_path, line()).num_timesteps == 60


def test_nothing_is_deleted_where_something_cannot_be_read_or_written(tmp_path, monkeypatch):
    model = make(line()).learn(40)
    save_checkpoint(model, tmp_path, keep=3)
    model.learn(20, reset_num_timesteps=False)
    save_checkpoint(model, tmp_path, keep=3)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    read_bytes = pathlib.Path.read_bytes

    def unreadable(path):
        if path.suffix == ".json":
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    def unwritable(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pathlib.Path, "read_bytes", unreadable)
    save_checkpoint(model, tmp_path, keep=1)  # goes well, but it cannot know what the others need
    assert before.items() <= {path: path.stat().st_size for path in tmp_path.rglob("*")}.items()
    monkeypatch.undo()
    save_checkpoint(model, tmp_path, keep=3)
    flip_a_bit(checkpoints(tmp_path)[0])
    monkeypatch.setattr("os.replace", unwritable)
    with pytest.raises(OSError, match="the checkpoint was not written, the earlier ones are as they were"):
        save_checkpoint(model, tmp_path, keep=1)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="skipped"):
        assert load_checkpoint(tmp_path, line()).num_timesteps == 60


def test_when_all_are_damaged_it_says_so_and_starts_nothing(tmp_path):
    path = save_checkpoint(make(line()).learn(60), tmp_path)
    flip_a_bit(path)
    with pytest.raises(ValueError, match=f"all are damaged: skipped {path.name}"):
        load_checkpoint(tmp_path, line())


def test_it_says_which_one_it_resumes_from(tmp_path, capsys):
    save_checkpoint(make(line(), verbose=1).learn(60), tmp_path)
    load_checkpoint(tmp_path, line())
    assert "000001_60_steps.json at 60 steps." in capsys.readouterr().out


def test_reading_the_lists_and_arrays_runs_no_code(tmp_path):
    store = BlobStore(tmp_path)
    with pytest.raises(ValueError, match="one of Python objects"):
        store.put_array(np.array([{}, print]))
    entry = store.put_array(np.arange(10.0))
    with pytest.raises(ValueError, match="OBJECT"):
        store.read_array(entry | {"dtype": "|O"})


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8, np.int64, bool])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (7, 2, 3), (BLOB_BYTES // 4 + 1, 5)])
def test_arrays_come_back_as_they_were(dtype, shape, tmp_path):
    store = BlobStore(tmp_path)
    array = np.random.default_rng(0).integers(0, 2, (shape[0], 2, *shape[1:])).astype(dtype)[:, 1]  # not contiguous
    entry = json.loads(json.dumps(store.put_array(array)))
    assert (store.read_array(entry) == array).all() and store.read_array(entry).dtype == dtype
    target = np.zeros((shape[0] + 3, *shape[1:]), dtype)
    store.read_array(entry, target)
    assert (target[: shape[0]] == array).all() and not target[shape[0] :].any()


def test_a_json_file_that_was_changed_is_damaged(tmp_path):
    write_json(tmp_path / "a.json", {"steps": 100, "nested": [1.5, None]})
    assert read_json(tmp_path / "a.json") == {"steps": 100, "nested": [1.5, None]}
    text = (tmp_path / "a.json").read_text()
    for changed in [text.replace("100", "900"), text[:-1], "[]", "{}", ""]:
        (tmp_path / "a.json").write_text(changed)
        with pytest.raises(DamagedFileError):
            read_json(tmp_path / "a.json")


# ---------------------------------------------------------------- what it is called with


def test_a_checkpoint_is_due_when_a_multiple_is_passed_and_at_the_end(tmp_path):
    model = make(line(3), train_freq=2)
    model.learn(50, CheckpointCallback(20, tmp_path, keep=9))
    assert [path.name for path in sorted(checkpoints(tmp_path))] == [
        "000001_24_steps.json",
        "000002_42_steps.json",
        "000003_54_steps.json",
    ]
    model = load_checkpoint(tmp_path, line(3))
    model.learn(30, CheckpointCallback(20, tmp_path, keep=9), reset_num_timesteps=False)
    assert [path.name for path in sorted(checkpoints(tmp_path))][3:] == ["000004_60_steps.json", "000005_84_steps.json"]
    model.learn(30, CheckpointCallback(20, tmp_path, keep=1))  # from 0 again: the newest is not the one of most steps
    assert [path.name for path in checkpoints(tmp_path)] == ["000007_30_steps.json"]


def test_each_callback_goes_by_its_own_folder(tmp_path):
    often, rare = tmp_path / "often", tmp_path / "rare"
    make(line()).learn(110, [CheckpointCallback(20, often, keep=9), CheckpointCallback(50, rare, keep=9)])
    assert [path.name.split("_")[1] for path in sorted(checkpoints(often))] == ["20", "40", "60", "80", "100", "110"]
    assert [path.name.split("_")[1] for path in sorted(checkpoints(rare))] == ["50", "100", "110"]


class OwnBuffer(ReplayBuffer):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.priorities = np.zeros(self.buffer_size)


def test_what_keeps_it_from_saving_is_told_at_the_beginning(tmp_path):
    def saving():
        return CheckpointCallback(1000, tmp_path / "run")

    model = make(line(), replay_buffer_class=OwnBuffer)
    with pytest.raises(ValueError, match=r"this OwnBuffer also keeps \['priorities'\], which would be lost"):
        model.learn(50, saving())
    goals = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(copy_info_dict=True))
    with pytest.raises(ValueError, match=r"also keeps \['infos'\].*without `copy_info_dict`"):
        make(GoalLine(), policy="MultiInputPolicy", **goals).learn(50, saving())
    lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot pickle"):
        make(line(), termination_fn=lambda obs, *_: never_ends(obs, lock, None)).learn(50, saving())
    with pytest.raises(ValueError, match="EveryNTimesteps tells the callback inside it of steps only"):
        model.learn(50, EveryNTimesteps(20, saving()))
    assert model.num_timesteps == 0 and not list((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="exists"):
        make(line()).learn(50, CheckpointCallback(20, tmp_path / "file"))


def test_the_callback_tells_of_each_checkpoint_if_asked(tmp_path, capsys):
    make(line()).learn(25, CheckpointCallback(20, tmp_path, verbose=1))
    assert capsys.readouterr().out.count("Saved the checkpoint") == 2


def test_what_does_not_fit_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a folder with a checkpoint, but in .* there is none"):
        load_checkpoint(tmp_path, line())
    save_checkpoint(make(line()).learn(45), tmp_path / "plain")
    with pytest.raises(ValueError, match="was saved with 0 `VecNormalize` around the environment, but `env` has 1"):
        load_checkpoint(tmp_path / "plain", VecNormalize(line()))
    with pytest.raises(ValueError, match="has 1000000 slots for 1 environments, but the model's has 500000 for 2"):
        load_checkpoint(tmp_path / "plain", line(2))
    save_checkpoint(make(VecNormalize(line())).learn(45), tmp_path / "normalized")
    with pytest.raises(ValueError, match="was saved with 1 `VecNormalize` around the environment, but `env` has 0"):
        load_checkpoint(tmp_path / "normalized", line())
    with pytest.raises(ValueError, match="`keep` must be an int of at least 1"):
        save_checkpoint(make(line()), tmp_path, keep=0)
    for arguments, name in [((0, tmp_path), "save_freq"), ((1.5, tmp_path), "save_freq"), ((1, tmp_path, 0), "keep")]:
        with pytest.raises(ValueError, match=f"`{name}` must be an int of at least 1"):
            CheckpointCallback(*arguments)
    for env in (None, "Pendulum-v1"):
        with pytest.raises(ValueError, match="`env` must be an environment"):
            load_checkpoint(tmp_path / "plain", env)
    with pytest.raises(ValueError, match="leave out `seed`"):
        load_checkpoint(tmp_path / "plain", line(), seed=3)
    path = save_checkpoint(make(line()).learn(45), tmp_path / "plain")
    write_json(path, read_json(path) | {"format": 99})
    with pytest.raises(ValueError, match="has format 99, but this version of sb3_mbpo reads 1"):
        load_checkpoint(tmp_path / "plain", line())


def test_an_own_subclass_comes_back_as_what_it_was(tmp_path):
    class Own(MBPO):
        pass

    save_checkpoint(Own("MlpPolicy", line(), learning_starts=10).learn(12), tmp_path)
    assert type(load_checkpoint(tmp_path, line(), Own)) is Own


# ---------------------------------------------------------------- SB3's own zip file


def test_the_zip_file_goes_on_with_the_random_stream(tmp_path):
    model = make().learn(80)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    rounds = []
    for _ in range(2):
        loaded = MBPO.load(tmp_path / "model", env=LineEnv())
        loaded.load_replay_buffer(tmp_path / "buffer")
        assert (loaded._generator.get_state() == model._generator.get_state()).all()
        th.manual_seed(0)
        rounds.append(loaded.imagined_buffer.newest(loaded.imagine()))
    assert all((first == second).all() for first, second in zip(*rounds, strict=True))
    states = [MBPO.load(tmp_path / "model", seed=seed)._generator.get_state() for seed in (1, 1, 2)]
    assert (states[0] == states[1]).all() and not (states[0] == states[2]).all()


def test_a_file_of_another_algorithm_is_explained(tmp_path):
    make().learn(60).save(tmp_path / "mbpo")
    sac = SAC("MlpPolicy", LineEnv(), seed=1, device="cpu")
    sac.save(tmp_path / "sac")
    with pytest.raises(TypeError, match=r"This file was saved by MBPO: load it with `MBPO.load`"):
        SAC.load(tmp_path / "mbpo")
    make(algorithm=DHMBPO).save(tmp_path / "dhmbpo")
    with pytest.raises(TypeError, match=r"This file was saved by DHMBPO: load it with `DHMBPO.load`"):
        MBPO.load(tmp_path / "dhmbpo")
    with pytest.raises(
        ValueError, match=r"(?s)does not hold what DHMBPO needs.*size mismatch.*If another algorithm saved the file"
    ):
        DHMBPO.load(tmp_path / "mbpo")
    with pytest.raises(
        ValueError, match=r"does not hold what MBPO needs.*algorithm saved the file, load it with that, such as `SAC.load`"
    ):
        MBPO.load(tmp_path / "sac")
    model = make(seed=2)
    model.set_parameters(sac.get_parameters(), exact_match=False)  # what the message advises
    assert identical(model, sac)
    model.learn(60)
