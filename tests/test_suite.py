"""What a suite's file says, and what becomes of it."""

import inspect

import pytest
import yaml
from sb3_contrib import TQC
from stable_baselines3 import SAC

from sb3_mbpo import MBPO
from sb3_mbpo.benchmark.suite import FOLDER, algorithm_class, load_suite
from sb3_mbpo.hyperparams import load_settings

SUITE = {
    "eval_freq": 100,
    "eval_episodes": 2,
    "seeds": [3, 7],
    "environments": {"Pendulum-v1": {"steps": 400, "scores": [-1000, 0]}, "Hopper-v5": {"steps": 500, "eval_freq": 50}},
    "algorithms": {
        "MBPO": {"class": "sb3_mbpo.MBPO", "settings": "mbpo"},
        "SAC": {"class": "stable_baselines3.SAC"},
        "SAC, updates of MBPO": {"class": "stable_baselines3.SAC", "settings": "mbpo", "kwargs": {"tau": 0.1}},
    },
}


def write(folder, **changes):
    path = folder / "suite.yml"
    path.write_text(yaml.safe_dump(SUITE | changes, sort_keys=False))
    return path


@pytest.fixture
def runs(tmp_path):
    return load_suite(write(tmp_path))


def test_a_suite_is_algorithms_by_environments_by_seeds_the_first_seed_first(runs):
    expected = [
        (seed, environment, algorithm)
        for seed in (3, 7)
        for environment in ("Pendulum-v1", "Hopper-v5")
        for algorithm in SUITE["algorithms"]
    ]
    assert [(run.seed, run.environment, run.algorithm) for run in runs] == expected
    assert len({run.folder for run in runs}) == 12
    assert str(runs[2].folder) == "Pendulum-v1/SAC_updates_of_MBPO/seed_3"


def test_an_environment_may_have_its_own_frequency_of_evaluations(runs):
    assert {(run.environment, run.steps, run.eval_freq, run.eval_episodes) for run in runs} == {
        ("Pendulum-v1", 400, 100, 2),
        ("Hopper-v5", 500, 50, 2),
    }
    assert runs[0].scores == [-1000, 0] and runs[3].scores is None


def test_mbpo_gets_all_of_its_settings(runs):
    settings = load_settings("Pendulum-v1", "mbpo")
    assert runs[0].kwargs == {"buffer_size": 400, **settings.kwargs} and runs[0].policy == settings.policy


def test_sac_without_settings_is_as_sb3_ships_it(runs):
    assert runs[1].kwargs == {"buffer_size": 400} and runs[1].normalize is None and runs[1].n_envs == 1


def test_sac_with_the_settings_of_mbpo_gets_what_it_knows_and_the_updates(tmp_path):
    """What the settings leave out, MBPO has by default, and SAC must have it too."""
    settings = tmp_path / "mine.yml"
    of_mbpo = {"n_timesteps": 9, "policy": "MlpPolicy", "rollout_length": 3, "target_entropy": -0.5, "learning_starts": 77}
    settings.write_text(yaml.safe_dump({"default": {**of_mbpo, "gradient_horizon": 2}}))  # DHMBPO's
    algorithm = {"class": "stable_baselines3.SAC", "settings": str(settings), "kwargs": {"tau": 0.1}}
    run = load_suite(write(tmp_path, algorithms={"SAC": algorithm}))[0]
    ratio = inspect.signature(MBPO).parameters["gradient_steps"].default
    expected = {"learning_starts": 77, "gradient_steps": ratio, "target_entropy": -0.5, "tau": 0.1, "buffer_size": 400}
    assert run.kwargs == expected and run.normalize is None
    shipped = load_suite(write(tmp_path, algorithms={"SAC": {"class": "stable_baselines3.SAC", "settings": "mbpo"}}))[0]
    assert shipped.normalize == load_settings("Pendulum-v1", "mbpo").normalize == {"norm_reward": False}


def test_arguments_of_the_suite_replace_those_of_the_settings(tmp_path):
    algorithm = {"class": "sb3_mbpo.MBPO", "settings": "mbpo", "kwargs": {"learning_starts": 33, "buffer_size": 44}}
    run = load_suite(write(tmp_path, algorithms={"MBPO": algorithm}))[0]
    assert run.kwargs["learning_starts"] == 33 and run.kwargs["buffer_size"] == 44


def test_all_algorithms_see_the_environment_of_the_settings(tmp_path):
    """A four-legged robot without contact forces is another task than one with them."""
    runs = load_suite(write(tmp_path, environments={"Ant-v5": {"steps": 10}}))
    assert all(run.env_kwargs == load_settings("Ant-v5").env_kwargs for run in runs)
    own = {"steps": 10, "env_kwargs": {"healthy_reward": 2.0}}
    assert load_suite(write(tmp_path, environments={"Ant-v5": own}))[1].env_kwargs == {"healthy_reward": 2.0}


def test_settings_of_another_environment_are_refused(tmp_path):
    """Unless the suite says which environment it is."""
    settings = tmp_path / "mine.yml"
    settings.write_text("{default: {n_timesteps: 9, policy: M, env_kwargs: {g: 5.0}}, Ant-v5: {n_timesteps: 9, policy: M}}")
    algorithms = {"SAC": {"class": "stable_baselines3.SAC", "settings": str(settings)}}
    with pytest.raises(ValueError, match=r"have env_kwargs \{'g': 5.0\} for Pendulum-v1, but \{\} are usual. Write those"):
        load_suite(write(tmp_path, algorithms=algorithms))
    environments = {"Pendulum-v1": {"steps": 10, "env_kwargs": {"g": 9.0}}}
    assert load_suite(write(tmp_path, algorithms=algorithms, environments=environments))[0].env_kwargs == {"g": 9.0}
    silent = load_suite(write(tmp_path, algorithms=algorithms, environments={"Ant-v5": {"steps": 10}}))[0]
    assert silent.env_kwargs == load_settings("Ant-v5").env_kwargs


def test_settings_that_no_algorithm_has_are_refused(tmp_path):
    """The Zoo has some, such as ``env_wrapper``, that would make another task."""
    settings = tmp_path / "mine.yml"
    settings.write_text("default: {n_timesteps: 9, policy: MlpPolicy, env_wrapper: [my.Wrapper]}")
    for class_name in ("stable_baselines3.SAC", "sb3_mbpo.MBPO"):
        algorithms = {"A": {"class": class_name, "settings": str(settings)}}
        with pytest.raises(ValueError, match=r"has no parameters \['env_wrapper'\]"):
            load_suite(write(tmp_path, algorithms=algorithms))


@pytest.mark.parametrize("normalize, expected", [(True, {}), (False, None), ({"norm_reward": False}, {"norm_reward": False})])
def test_an_algorithm_may_be_normalised(tmp_path, normalize, expected):
    algorithm = {"class": "sb3_mbpo.MBPO", "normalize": normalize, "n_envs": 4}
    run = load_suite(write(tmp_path, algorithms={"MBPO": algorithm}))[0]
    assert run.normalize == expected and run.n_envs == 4


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yml")))
def test_every_suite_here_makes_algorithms_that_know_their_arguments(name):
    runs = load_suite(name)
    for run in runs:
        assert set(run.kwargs) <= set(inspect.signature(algorithm_class(run.class_name)).parameters)
        assert run.scores is not None and run.scores[0] < run.scores[1]
    assert {"MBPO", "SAC", "SAC, updates of MBPO"} <= {run.algorithm for run in runs}
    assert len({run.seed for run in runs}) >= 3


def test_algorithms_are_found_by_module_and_class():
    assert algorithm_class("stable_baselines3.SAC") is SAC and algorithm_class("sb3_contrib.TQC") is TQC


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, r"may have .*'eval_freq'.* has .*'seed'"),
        ({"environments": {"Pendulum-v1": {}}}, r"Pendulum-v1 needs \['steps'\]"),
        ({"environments": {"Pendulum-v1": 400}}, "it has 400"),
        ({"environments": {"Pendulum-v99": {"steps": 1}}}, "knows no environment 'Pendulum-v99'"),
        ({"environments": {"no_such_module:My-v0": {"steps": 1}}}, "'no_such_module:My-v0' cannot be imported: No module"),
        ({"environments": {".relative:My-v0": {"steps": 1}}}, "'.relative:My-v0' cannot be imported: "),
        ({"environments": {5: {"steps": 1}}}, "knows no environment 5. Write one of yours"),
        ({"environments": {"json:My-v0": {"steps": 1}}}, "knows no environment 'json:My-v0'. Write one of yours"),
        ({"environments": {"Pendulum-v1": {"steps": 0}}}, "`steps` must be an int of at least 1, but got 0"),
        ({"algorithms": {"SAC": {}}}, r"SAC needs \['class'\]"),
        ({"algorithms": {"SAC": {"class": "SAC"}}}, "no algorithm 'SAC': write its module"),
        ({"algorithms": {"SAC": {"class": "stable_baselines3.SACK"}}}, "no algorithm 'stable_baselines3.SACK'"),
        ({"algorithms": {"PPO": {"class": "stable_baselines3.PPO"}}}, "'stable_baselines3.PPO' is no off-policy algorithm"),
        ({"algorithms": {"SAC": {"class": "stable_baselines3.SAC", "kwargs": {"k": 1}}}}, r"has no parameters \['k'\]"),
        ({"algorithms": {"MBPO": {"class": "sb3_mbpo.MBPO", "settings": "ours"}}}, "no file of settings 'ours'"),
        ({"algorithms": {"SAC": {"class": "stable_baselines3.SAC", "kwargs": {"seed": 1}}}}, r"no parameters \['seed'\]"),
        ({"algorithms": {"SAC": {"class": "stable_baselines3.SAC", "kwargs": 5}}}, "a mapping as `kwargs`, but got 5"),
        ({"algorithms": {"SAC": {"class": "stable_baselines3.SAC", "normalize": 5}}}, "as `normalize`, but got 5"),
        ({"algorithms": {"SAC": {"class": "antigravity_.SAC"}}}, r"\(No module named 'antigravity_'\)"),
        ({"algorithms": {"SAC": {"class": 5}}}, "no algorithm 5: write its module"),
        ({"algorithms": ["SAC"]}, r"a mapping of at least one entry as `algorithms` in .*suite.yml, but got \['SAC'\]"),
        ({"environments": {}}, "a mapping of at least one entry as `environments` in .*suite.yml, but got {}"),
        ({"environments": {"Pendulum-v1": {"steps": 400, "env_kwargs": None}}}, "a mapping as `env_kwargs`, but got None"),
        ({"environments": {"Pendulum-v1": {"steps": 400, "scores": [5, 1]}}}, r"`scores` of Pendulum-v1 .* got \[5, 1\]"),
        ({"environments": {"Pendulum-v1": {"steps": 400, 1: 2}}}, r"but it has \['1', 'steps'\]"),
        ({"seeds": 3}, "a list of at least one entry as `seeds` in .*suite.yml, but got 3"),
        ({"seeds": [1, 1]}, "repeat no seed"),
        ({"seeds": [True, 1]}, "seeds that are ints from 0 on, but got True"),
        ({"algorithms": {1: {"class": "stable_baselines3.SAC"}}}, "text as the name of an algorithm, but got 1: write it in"),
        ({"algorithms": {"A": {"class": "sb3_mbpo.MBPO", "settings": None}}}, "text as `settings`, but got None"),
        ({"algorithms": {"SAC": {"class": ".foo.SAC"}}}, "no algorithm '.foo.SAC': write its module"),
        (
            {"algorithms": {"SAC": {"class": "stable_baselines3.SAC", "kwargs": {"learning_rate": "3e-4"}}}},
            r"`learning_rate`, but got '3e-4'. \(To YAML, 3.0e-4 is a number",
        ),
        ({"seeds": ["a"]}, "seeds that are ints from 0 on, but got 'a'"),
    ],
)
def test_what_nobody_understands_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_suite(write(tmp_path, **changes))


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    """YAML alone would drop the first one."""
    path = write(tmp_path)
    path.write_text(path.read_text() + "  SAC: {class: sb3_contrib.TQC}\n")
    with pytest.raises(ValueError, match="'SAC' is there twice"):
        load_suite(path)


def test_an_unknown_suite_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"no suite 'slow': pass one of \['laptop', 'mujoco', 'quick'\]"):
        load_suite("slow")
