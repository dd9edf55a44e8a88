"""Whatever breaks, it ends in a clear error, and the last checkpoint is whole."""

import errno
import os
import shutil
import subprocess

import fault_campaign
import numpy as np
import pytest
from conftest import LineEnv
from test_checkpoint import WithinBounds, all_equal, line
from test_mbpo import make

from sb3_mbpo import DHMBPO, MBPO, takes_tensors
from sb3_mbpo.checkpoint import CheckpointCallback, checkpoints, load_checkpoint, save_checkpoint
from sb3_mbpo.run_state import blob_names
from sb3_mbpo.storage import read_json


@pytest.mark.parametrize("algorithm", fault_campaign.ALGORITHMS)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_been_left_alone(algorithm, tmp_path):
    seen = fault_campaign.campaign(tmp_path, algorithm, kills=2, steps=200, seed=1)
    assert 1 <= seen["kills"] <= 2  # a fast machine may be done before the second
    assert seen["end"]["steps"] == seen["end"]["transitions"] == 200


both = pytest.mark.parametrize("algorithm", [MBPO, DHMBPO])


class Stop(BaseException):
    """A kill that a test survives: nothing in the package catches it."""


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [Stop(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
@both
def test_at_every_write_of_a_checkpoint_a_whole_one_is_there(algorithm, call, error, tmp_path, monkeypatch):
    model = make(line(), algorithm=algorithm, buffer_size=200).learn(60)
    save_checkpoint(model, tmp_path / "before", keep=1)
    model.learn(20, reset_num_timesteps=False)
    original, steps, broken = getattr(os, call), [], True
    while broken:
        folder, calls = tmp_path / str(len(steps)), []
        shutil.copytree(tmp_path / "before", folder)

        def break_down(*args, calls=calls):
            calls.append(args)
            if len(calls) == len(steps) + 1:
                raise error
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, break_down)
            broken = False
            try:
                save_checkpoint(model, folder, keep=1)
            except (Stop, OSError) as raised:
                broken = True
                assert isinstance(raised, Stop) or "No space left on device: the checkpoint" in str(raised)
        steps.append(load_checkpoint(folder, line(), algorithm).num_timesteps)
    # some ten writes until the new one takes its place; whatever comes after does not matter any more
    assert steps.count(60) >= 8 and steps == sorted(steps) and steps[-1] == 80


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root can make a small disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_ends_the_run_with_an_error_and_the_last_checkpoint_is_whole(small_disk):
    model = make(line(), policy_kwargs=dict(net_arch=[64, 64]), rollout_batch_size=1500)
    with pytest.raises(
        OSError, match="No space left on device: the checkpoint was not written, the earlier ones are as they were"
    ) as info:
        model.learn(2000, CheckpointCallback(20, small_disk, keep=50))
    assert info.value.errno == errno.ENOSPC
    newest = int(checkpoints(small_disk)[0].name.split("_")[1])
    assert newest >= 20 and model.num_timesteps - newest == 20
    assert load_checkpoint(small_disk, line()).num_timesteps == newest
    needed = set().union(*(blob_names(read_json(path)) for path in checkpoints(small_disk)))
    assert {path.name for path in (small_disk / "blobs").iterdir()} == needed  # what the failed one had written is gone
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)  # somebody tidies up
    save_checkpoint(model, small_disk, keep=1)
    assert load_checkpoint(small_disk, line()).num_timesteps == model.num_timesteps


class Breaks(WithinBounds):
    """Misbehaves in its 75th step."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.count = how, 0

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.count += 1
        if self.count == 75 and self.how == "raises":
            raise ConnectionError("the robot does not answer")
        if self.count == 75:
            observation, reward = (np.full(1, np.nan), reward) if self.how == "observation" else (observation, np.nan)
        return observation, reward, terminated, truncated, info


@both
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raises", ConnectionError, "the robot does not answer"),
        ("observation", ValueError, "Expected finite numbers from the environment, but its observation is"),
        ("reward", ValueError, "Expected finite numbers from the environment, but its reward is"),
    ],
)
def test_an_environment_that_breaks_leaves_the_checkpoint_whole(how, error, message, algorithm, tmp_path):
    with pytest.raises(error, match=message):
        make(Breaks(how), algorithm=algorithm).learn(200, CheckpointCallback(20, tmp_path, at_episode_end=True))
    never_broke = make(WithinBounds(), algorithm=algorithm).learn(100)
    resumed = load_checkpoint(tmp_path, WithinBounds(), algorithm)
    assert resumed.num_timesteps == 60
    assert all_equal(resumed.learn(40, reset_num_timesteps=False), never_broke)


@both
@pytest.mark.parametrize("which", ["termination_fn", "reward_fn"])
def test_a_user_function_that_raises_leaves_the_checkpoint_whole(which, algorithm, tmp_path):
    calls = []

    def never(obs, action, next_obs):
        return np.zeros(len(obs), dtype=bool)

    @takes_tensors
    def distance(obs, action, next_obs):
        return -next_obs[:, 0].abs()

    # calls of three fits: as nothing ends, each holds a termination rule against the log, and the first one calls a reward
    mended, calls_of_fits = (never, 3) if which == "termination_fn" else (distance, 1)

    def user_function(*transitions):
        calls.append(transitions)
        if len(calls) == calls_of_fits + 3:
            raise ZeroDivisionError("in the user's own code")
        return mended(*transitions)

    if which == "reward_fn":
        user_function = takes_tensors(user_function)
    with pytest.raises(ZeroDivisionError, match="in the user's own code"):
        # then one in each round, or, where updates call it too, soon in one of them
        settings = dict(algorithm=algorithm, rollout_length=1)
        make(WithinBounds(), **settings, **{which: user_function}).learn(300, CheckpointCallback(20, tmp_path))
    resumed = load_checkpoint(tmp_path, WithinBounds(), algorithm, **{which: mended})
    assert resumed.num_timesteps >= (60 if algorithm is MBPO else 40)
    resumed.learn(60, reset_num_timesteps=False)


@both
def test_a_dynamics_that_runs_away_does_not_reach_the_policy(algorithm):
    model = make(LineEnv(), rollout_length=3, algorithm=algorithm).learn(60)
    for parameter in model.dynamics.ensemble.biases[-1:]:
        parameter.data += 1e4
    before = model.imagined_buffer.newest(10**6).next_observations
    assert model.imagine() == 0 and model.imagination_result.far_from_data == 64
    assert (model.imagined_buffer.newest(10**6).next_observations == before).all()
    if algorithm is DHMBPO:  # from the states that are left, no path is valid, and none gives a gradient
        model.train(1, 64)
        assert model.logger.name_to_value["train/valid_paths"] == 0.0
        assert all((parameter.grad == 0).all() for parameter in (*model.actor.parameters(), *model.critic.parameters()))
    for parameter in model.dynamics.ensemble.parameters():
        parameter.data.fill_(np.nan)
    with pytest.raises(ValueError, match="No imagined row is finite"):
        model.imagine()
