"""The settings that come with the package: they fit their environments, and the paper's are the paper's."""

from typing import NamedTuple

import gymnasium as gym
import pytest
import yaml

from sb3_mbpo import DHMBPO, MBPO
from sb3_mbpo.dynamics import DynamicsConfig
from sb3_mbpo.hyperparams import FOLDER, as_arguments, load_settings, settings_file
from sb3_mbpo.tasks import known_termination_fn

#: Dimensions of the observations; Reacher-v5 stands for what has no settings of its own.
OBS_DIMS = {
    "Pendulum-v1": 3,
    "MountainCarContinuous-v0": 2,
    "InvertedPendulum-v5": 4,
    "InvertedDoublePendulum-v5": 9,
    "Swimmer-v5": 8,
    "Hopper-v5": 11,
    "HalfCheetah-v5": 17,
    "Walker2d-v5": 17,
    "Ant-v5": 27,
    "Humanoid-v5": 45,
    "Reacher-v5": 10,
}
FILES = {"mbpo": MBPO, "mbpo_paper": MBPO, "dhmbpo": DHMBPO}


class Paper(NamedTuple):
    """As in the paper's table and the authors' configuration files, in their units."""

    epoch_length: int
    curve: int
    warm_up: int
    updates_per_step: int
    train_freq: int
    schedule: tuple[int, int, int, int]  # first and last epoch, k there
    retain_epochs: int
    target_entropy: float
    width: int


PAPER = {
    "InvertedPendulum-v5": Paper(250, 20_000, 500, 10, 250, (1, 15, 1, 1), 1, -0.05, 200),
    "InvertedDoublePendulum-v5": Paper(250, 20_000, 500, 20, 250, (1, 15, 1, 1), 1, -0.5, 200),
    "Hopper-v5": Paper(1000, 125_000, 5000, 20, 250, (20, 150, 1, 15), 1, -1, 200),
    "Walker2d-v5": Paper(1000, 300_000, 5000, 20, 250, (20, 150, 1, 1), 1, -3, 200),
    "HalfCheetah-v5": Paper(1000, 400_000, 5000, 40, 250, (20, 150, 1, 1), 1, -3, 200),
    "Ant-v5": Paper(1000, 300_000, 5000, 20, 250, (20, 100, 1, 25), 1, -4, 200),
    "Humanoid-v5": Paper(1000, 300_000, 5000, 20, 1000, (20, 300, 1, 25), 5, -2, 400),
}


def make_model(env_id: str, name: str) -> MBPO:
    settings = load_settings(env_id, name)
    return FILES[name](settings.policy, gym.make(env_id, **settings.env_kwargs), device="cpu", **as_arguments(settings.kwargs))


def test_all_files_list_the_same_tasks():
    listed = set(OBS_DIMS) - {"Reacher-v5"} | {"default"}
    assert sorted(file.stem for file in FOLDER.glob("*.yml")) == sorted(FILES)
    assert all(set(yaml.safe_load(settings_file(name).read_text())) == listed for name in FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("env_id", OBS_DIMS)
def test_settings_make_a_model_that_models_the_task(env_id, name):
    """The observation has the stated size, the task's own rule of termination is found, and there is time left to learn."""
    model = make_model(env_id, name)
    assert model.observation_space.shape == (OBS_DIMS[env_id],)
    assert model.idle_reason() is None and model.dynamics.termination_fn is not None
    assert known_termination_fn(model.env) is not None
    assert load_settings(env_id, name).n_timesteps > 2 * model.learning_starts


@pytest.mark.parametrize("env_id", PAPER)
def test_settings_of_the_paper_are_those_of_the_paper(env_id):
    """What the model ends up with, defaults included."""
    paper, model = PAPER[env_id], make_model(env_id, "mbpo_paper")
    first, last, k_first, k_last = paper.schedule
    steps = tuple(paper.warm_up + epoch * paper.epoch_length for epoch in (first, last))  # epochs begin after the warm-up
    assert load_settings(env_id, "mbpo_paper").n_timesteps == paper.curve
    assert model.learning_starts == paper.warm_up
    assert (model.gradient_steps, model.train_freq.frequency, model.policy_delay) == (paper.updates_per_step, 1, 1)
    assert model.dynamics_train_freq == paper.train_freq
    assert model.rollout_length == (k_first if k_first == k_last else (*steps, k_first, k_last))
    assert model.rollout_retain_steps == paper.retain_epochs * paper.epoch_length
    assert (model.rollout_batch_size, model.real_ratio) == (100_000, 0.05)
    assert model.target_entropy == paper.target_entropy
    assert (model.batch_size, model.gamma, model.tau, model.learning_rate) == (256, 0.99, 0.005, 3e-4)


@pytest.mark.parametrize("env_id", OBS_DIMS)
def test_the_dynamics_of_the_paper_are_those_of_the_paper(env_id):
    """Seven members, five elites, raw targets, and as many epochs as the holdout allows at one learning rate."""
    config = DynamicsConfig.from_kwargs(load_settings(env_id, "mbpo_paper").kwargs["dynamics_kwargs"])
    width = PAPER[env_id].width if env_id in PAPER else 200
    assert (config.ensemble_size, config.n_elites, tuple(config.net_arch)) == (7, 5, (width,) * 4)
    assert config.weight_decay == (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    assert (config.learning_rate, config.likelihood_beta, config.max_grad_norm) == (1e-3, 0.0, None)
    assert (config.batch_size, config.normalize_targets) == (256, False)
    assert (config.max_gradient_steps, config.patience, config.improvement) == (None, 5, 0.01)
    assert (config.holdout_ratio, config.max_holdout) == (0.2, 5000)


@pytest.mark.parametrize("env_id", sorted(set(OBS_DIMS) - set(PAPER)))
def test_tasks_that_the_paper_has_not_get_what_its_tasks_share(env_id):
    """Of each parameter the value that most of the paper's tasks have; the target entropy of each is its own."""
    kwargs = load_settings(env_id, "mbpo_paper").kwargs
    shared = dict(learning_starts=5000, gradient_steps=20, dynamics_train_freq=250, rollout_length=1, real_ratio=0.05)
    assert kwargs.items() >= {**shared, "rollout_batch_size": 100_000, "rollout_retain_steps": 1000}.items()
    assert "target_entropy" not in kwargs


@pytest.mark.parametrize("env_id", PAPER)
def test_our_settings_keep_the_target_entropy_of_the_paper(env_id):
    assert load_settings(env_id).kwargs["target_entropy"] == PAPER[env_id].target_entropy


def test_what_a_file_does_not_list_gets_its_default():
    assert load_settings("Reacher-v5") == load_settings("default")


def test_a_file_of_ones_own_is_read_by_its_path(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text("Line-v0: {n_timesteps: 1.0e+3, policy: MlpPolicy, n_envs: 2, normalize: {norm_reward: false}, tau: 0.1}")
    settings = load_settings("Line-v0", path)
    assert settings == (1000, "MlpPolicy", 2, {}, {"norm_reward": False}, {"tau": 0.1})
    assert isinstance(settings.n_timesteps, int)


def test_a_merged_key_may_be_written_again(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text("default: &all {n_timesteps: 1.0e+6, policy: M, tau: 0.1}\nLine-v0:\n  <<: *all\n  tau: 0.2")
    assert load_settings("Line-v0", path).kwargs == {"tau": 0.2} and load_settings("Any-v0", path).kwargs == {"tau": 0.1}
    assert load_settings("Line-v0", path).n_timesteps == 1_000_000


def test_what_yaml_cannot_say_is_translated():
    written = {
        "learning_rate": "lin_3e-4",
        "rollout_length": [1, 2, 1, 3],
        "ent_coef": "auto",
        "dynamics_kwargs": {"n_elites": 2},
    }
    arguments = as_arguments(written)
    assert [arguments["learning_rate"](remaining) for remaining in (1.0, 0.5, 0.0)] == [3e-4, 1.5e-4, 0.0]
    assert arguments["rollout_length"] == (1, 2, 1, 3) and arguments["ent_coef"] == "auto"
    assert arguments["dynamics_kwargs"] == {"n_elites": 2} and arguments["dynamics_kwargs"] is not written["dynamics_kwargs"]
    for wrong in ("lin_fast", "lin_0", "lin_-1", "fast"):
        with pytest.raises(ValueError, match=rf"a positive number, or 'lin_' and one, as `learning_rate`, but got '{wrong}'"):
            as_arguments({"learning_rate": wrong})


@pytest.mark.parametrize("written, read", [("true", {}), ("false", None), ("{norm_obs: false}", {"norm_obs": False})])
def test_normalize_is_read_as_keyword_arguments(written, read, tmp_path):
    path = tmp_path / "own.yml"
    path.write_text(f"default: {{n_timesteps: 10, policy: MlpPolicy, normalize: {written}}}")
    assert load_settings("Any-v0", path).normalize == read


@pytest.mark.parametrize(
    "content, message",
    [
        ("Other-v0: {n_timesteps: 10, policy: MlpPolicy}", r"neither 'Line-v0' nor 'default', only \['Other-v0'\]"),
        ("", r"neither 'Line-v0' nor 'default', only \[\]"),
        ("Line-v0: {policy: MlpPolicy}", r"no \['n_timesteps'\] for 'Line-v0'"),
        (
            "Line-v0: {n_timesteps: 10, policy: MlpPolicy, normalize: 'dict()'}",
            r"a YAML mapping as `normalize`, but got 'dict\(\)'",
        ),
        (
            "Line-v0: {n_timesteps: 10, policy: MlpPolicy, normalize: 5}",
            "a YAML mapping as `normalize`, but got 5",
        ),
        (
            "Line-v0: {n_timesteps: 10, policy: MlpPolicy, policy_kwargs: 'dict(net_arch=[64])'}",
            r"a YAML mapping as `policy_kwargs` of 'Line-v0' in .*own.yml, but got 'dict\(net_arch=\[64\]\)'",
        ),
        ("Line-v0: [", "own.yml is no YAML file: while parsing"),
        ("Line-v0: {n_timesteps: 10, policy: MlpPolicy, tau: 0.1, tau: 0.2}", "own.yml is no YAML file: 'tau' is there twice"),
        (
            "Line-v0: {n_timesteps: x, policy: MlpPolicy}",
            "a number of at least 1 as `n_timesteps` of 'Line-v0' in .*own.yml, but got 'x'",
        ),
        ("Line-v0: {n_timesteps: , policy: MlpPolicy}", "as `n_timesteps` of 'Line-v0' in .*own.yml, but got None"),
        ("Line-v0: {n_timesteps: .inf, policy: MlpPolicy}", "as `n_timesteps` of 'Line-v0' in .*own.yml, but got inf"),
        ("Line-v0: {n_timesteps: 10, policy: }", "text as `policy` of 'Line-v0' in .*own.yml, but got None"),
        (
            "Line-v0: {n_timesteps: 10, policy: MlpPolicy, n_envs: 1.5}",
            "an int of at least 1 as `n_envs` of 'Line-v0' .* got 1.5",
        ),
        ("Line-v0: {n_timesteps: 10, policy: MlpPolicy, env_kwargs: [1]}", r"a YAML mapping as `env_kwargs` .* got \[1\]"),
        (
            "Line-v0: {n_timesteps: 10, policy: MlpPolicy, normalize: {norm_rewards: false, 1: 2}}",
            r"`normalize` has \[1, 'norm_rewards'\], which VecNormalize does not know. It may have \['clip_obs'",
        ),
        ("[Line-v0]", r"Expected a YAML mapping in .*own.yml, but got \['Line-v0'\]"),
        ("Line-v0: 5", "own.yml needs a mapping for 'Line-v0', but it has 5"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(content, message, tmp_path):
    path = tmp_path / "own.yml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_settings("Line-v0", path)


@pytest.mark.parametrize("name", ["mbpo_papr", "missing.yml", "mbpo.txt"])
def test_unknown_settings_are_refused_and_ours_are_named(name):
    with pytest.raises(
        ValueError, match=rf"no file of settings '{name}': pass one of \['dhmbpo', 'mbpo', 'mbpo_paper'\] or the path"
    ):
        settings_file(name)
