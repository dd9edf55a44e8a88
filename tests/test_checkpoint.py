import random

import numpy as np
import pytest
import torch as th
from conftest import LineEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_mbpo import identical, make

from sb3_mbpo.checkpoint import load_checkpoint, save_checkpoint


class SameStart(LineEnv):
    """Starts where it always does, and stays within bounds: episodes of 20 steps."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = np.full(1, 0.5)
        return self._observation(), {}

    def step(self, action):
        self.x = np.clip(self.x, -2.0, 2.0)
        return super().step(action)


def plain():
    return DummyVecEnv([SameStart])


def normalized():
    return VecNormalize(plain())


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path):
    never_stopped = make(plain(), rollout_retain_steps=40).learn(140)
    stopped = make(plain(), rollout_retain_steps=40).learn(80)  # four whole episodes; the ring has wrapped
    assert stopped.imagined_buffer._pos not in (0, len(stopped.imagined_buffer))
    save_checkpoint(stopped, tmp_path / "point")
    th.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    resumed = load_checkpoint(tmp_path / "point", plain())
    assert identical(resumed, stopped) and not identical(resumed, never_stopped)
    resumed.learn(60, reset_num_timesteps=False)
    assert identical(resumed, never_stopped)
    assert resumed.num_timesteps == 140 and resumed._n_updates == never_stopped._n_updates
    for name in ("ensemble", "input_scaler", "target_scaler", "termination_head"):
        ours, theirs = getattr(resumed.dynamics, name).state_dict(), getattr(never_stopped.dynamics, name).state_dict()
        assert all((ours[key] == theirs[key]).all() for key in ours)
    assert resumed.fit_result.holdout_mse == never_stopped.fit_result.holdout_mse
    assert (resumed.imagined_buffer.newest(10**6)[0] == never_stopped.imagined_buffer.newest(10**6)[0]).all()


def test_the_statistics_of_vec_normalize_come_back_and_resuming_repeats_itself(tmp_path):
    stopped = make(normalized()).learn(80)
    save_checkpoint(stopped, tmp_path / "point")
    model = load_checkpoint(tmp_path / "point", normalized())
    ours, saved = model.get_vec_normalize_env(), stopped.get_vec_normalize_env()
    assert ours is model.env and (ours.obs_rms.mean == saved.obs_rms.mean).all()
    assert (ours.obs_rms.count, ours.ret_rms.var) == (saved.obs_rms.count, saved.ret_rms.var)
    first, second = (load_checkpoint(tmp_path / "point", normalized()).learn(40, reset_num_timesteps=False) for _ in range(2))
    assert identical(first, second) and not identical(first, stopped)


def test_a_newer_checkpoint_replaces_an_older_one(tmp_path):
    model = make(plain()).learn(60)
    save_checkpoint(model, tmp_path / "point")
    model.learn(20, reset_num_timesteps=False)
    save_checkpoint(model, tmp_path / "point")
    assert load_checkpoint(tmp_path / "point", plain()).num_timesteps == 80
    assert [path.name for path in tmp_path.iterdir()] == ["point"]


def test_what_does_not_fit_is_explained(tmp_path):
    with pytest.raises(ValueError, match="Expected a folder with model"):
        load_checkpoint(tmp_path, plain())
    save_checkpoint(make(plain()).learn(45), tmp_path / "plain")
    with pytest.raises(ValueError, match="was saved without `VecNormalize`, but `env` is wrapped in it"):
        load_checkpoint(tmp_path / "plain", normalized())
    save_checkpoint(make(normalized()).learn(45), tmp_path / "normalized")
    with pytest.raises(ValueError, match="was saved with `VecNormalize`, but `env` is not wrapped in it"):
        load_checkpoint(tmp_path / "normalized", plain())
