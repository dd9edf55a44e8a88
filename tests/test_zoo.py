"""The commands of the RL Zoo, at tiny size, in a folder of their own: the README's first, then what they must not do."""

import csv
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbpo.checkpoint import load_checkpoint

# only looked for: importing the Zoo changes Gymnasium's wrappers
pytestmark = pytest.mark.skipif(importlib.util.find_spec("rl_zoo3") is None, reason="needs the extra `zoo`")

ROOT = Path(__file__).parent.parent
#: What a shell makes of the README: it joins lines and takes quotes away.
TEXT = re.sub(r"\\\n|\"", "", (ROOT / "README.md").read_text())
README = re.findall(r"^python -m sb3_mbpo\.zoo (.*)$", TEXT, flags=re.MULTILINE)
SMALL = "rollout_batch_size:200 rollout_length:1 dynamics_kwargs:dict(net_arch=[16],max_gradient_steps=20)"
TINY = f"learning_starts:100 gradient_steps:1 {SMALL} normalize:{{'norm_obs':True,'norm_reward':False}}"
#: Runs all commands in one process, because starting takes longer than they do; one that fails does not stop the others.
RUNNER = """
import sys
from sb3_mbpo.zoo import main
for command in sys.argv[1:]:
    print("COMMAND", command)
    sys.argv = ["zoo", *command.split()]
    try:
        main()
    except ValueError as error:
        print("ValueError:", error)
"""
#: Reads all settings both ways, and prints those of which the Zoo makes something else than the benchmark.
READERS = """
from argparse import Namespace
from stable_baselines3.common.utils import FloatSchedule
from sb3_mbpo.hyperparams import FOLDER, as_arguments, load_settings, read_yaml
from sb3_mbpo.zoo import Experiment

def comparable(arguments):
    rate = FloatSchedule(arguments.get("learning_rate", 0.0))
    arguments["learning_rate"] = [round(rate(remaining), 12) for remaining in (1.0, 0.7, 0.0)]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}

for name in ("mbpo", "mbpo_paper", "dhmbpo"):
    for entry in read_yaml(FOLDER / f"{name}.yml"):
        env_id = "Reacher-v5" if entry == "default" else entry  # it is not listed
        args = Namespace(conf_file=name, env_kwargs=None, eval_env_kwargs=None)
        zoo = Experiment(args, name.split("_")[0], env_id, log_folder="logs", verbose=0)
        kwargs, *_ = zoo._preprocess_hyperparams(zoo.read_hyperparameters()[0])
        zoo.normalize_kwargs.pop("gamma", None)  # of returns, which no file normalises
        normalize = zoo.normalize_kwargs if zoo.normalize else None
        of_zoo = zoo.n_timesteps, zoo.n_envs, zoo.env_kwargs, normalize, comparable(kwargs)
        ours = load_settings(env_id, name)
        arguments = {"policy": ours.policy, **as_arguments(ours.kwargs)}
        of_ours = ours.n_timesteps, ours.n_envs, ours.env_kwargs, ours.normalize, comparable(arguments)
        print("SAME" if of_zoo == of_ours else ("DIFFERENT", env_id, of_zoo, of_ours))
"""
#: Tasks of 10 steps that render as grey. From the 61st step of the process on, "Breaks-v0" shows NaN.
TASKS = """
import gymnasium as gym
import numpy as np

class Task(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    steps_of_all = 0

    def __init__(self, breaks=False, render_mode=None):
        self.breaks, self.render_mode = breaks, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        Task.steps_of_all += self.breaks
        observation = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        if Task.steps_of_all > 60:
            observation *= np.nan
        return observation, float(action[0]), False, self.steps == 10, {}

    def render(self):
        return np.full((64, 64, 3), 128, np.uint8)

gym.register("Short-v0", Task)
gym.register("Breaks-v0", Task, kwargs=dict(breaks=True))
"""


def zoo(folder: Path, *commands: str) -> list[str]:
    """:return: what each command said"""
    (folder / "custom_envs.py").write_text(TASKS)  # the Zoo imports it by that name
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-u", "-c", RUNNER, *commands]
    done = subprocess.run(line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.split("COMMAND ")[1:]


def read(path: Path) -> dict:
    return dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader))


def tiny(command: str) -> str:
    """The README's command at another size: the Zoo takes the last value of an option that comes twice."""
    if not command.startswith("train"):
        return command
    command, _, own = command.partition("-params ")
    if "--optimize" in command:
        size, parameters = "-n 130 --n-trials 2 --n-startup-trials 1 --no-optim-plots", TINY.replace("gradient_steps:1", "")
    else:
        size, parameters = "-n 300 --eval-freq 150", TINY if "mbpo" in command else "learning_starts:100"
    return f"{command.replace('--trial-id 7', '--trial-id 1')} {size} --eval-episodes 2 -params {parameters} {own}"


def test_the_commands_of_the_readme_run(tmp_path):
    """All with normalised observations."""
    commands = [tiny(command) for command in README]
    *said, _ = zoo(tmp_path, *commands, commands[-1].replace("--trial-id 1", "--trial-id 0"))
    assert len(said) == len(README) == 13 and "ValueError" not in "".join(said)
    train, enjoy, _, _, _, go_on, _, _, table, curves, paper, optimize, trial = said
    logs = tmp_path / "logs" / "mbpo"
    assert "hyperparams/mbpo.yml" in train and "dynamics/" in train and "300/300" in train
    assert "termination_precision" not in train  # nothing was learned that is known, in the Zoo's TimeLimit, too
    for file in ("Pendulum-v1.zip", "best_model.zip", "replay_buffer.pkl", "Pendulum-v1/vecnormalize.pkl"):
        assert (logs / "Pendulum-v1_1" / file).exists(), file
    assert "Loading running average" in enjoy and "Mean reward" in enjoy
    assert "Loading replay buffer" in go_on and "Loading saved VecNormalize stats" in go_on
    for run in (logs / "Pendulum-v1_1", logs / "Pendulum-v1_2", tmp_path / "more/mbpo/Pendulum-v1_1", logs / "Ant-v5_1"):
        assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [150, 300]
    saved = load_checkpoint(tmp_path / "run", VecNormalize(make_vec_env("Pendulum-v1"), norm_reward=False))
    assert saved.num_timesteps == 300 and saved.replay_buffer.size() == 300
    assert re.search(r"\|Pendulum-v1 *(\|-\d+ \+/- \d+ *){2}\|", table) and "Computing bootstrap CI" in curves
    assert "hyperparams/mbpo_paper.yml" in paper and "('real_ratio', 0.05)" in paper
    sampled = "learning_rate gradient_steps target_entropy dynamics_train_freq rollout_length rollout_retain_steps real_ratio"
    assert re.findall(r"^    (\w+): ", optimize, flags=re.MULTILINE) == sampled.split()
    assert "Loading from Optuna study" in trial
    with next(logs.glob("report_*.csv")).open() as report:
        tried = {row["number"]: row for row in csv.DictReader(report)}
    for number, run in (("1", "Pendulum-v1_5"), ("0", "Pendulum-v1_6")):  # the Zoo itself takes trial 0 for none
        used = read(logs / run / "Pendulum-v1/config.yml")
        for name in ("learning_rate", "target_entropy", "rollout_retain_steps"):
            assert used[name] == pytest.approx(float(tried[number][f"params_{name}"]))


def test_the_env_kwargs_of_the_settings_reach_all_environments(tmp_path):
    """Ant keeps its 27 dimensions in evaluation, ``enjoy`` and ``benchmark``; what the command line says goes first."""
    train = f"train --algo mbpo --env Ant-v5 -n 20 --eval-freq 10 --eval-episodes 1 -params {TINY}"
    enjoy = "enjoy --algo mbpo --env Ant-v5 -f logs --no-render -n 5"
    benchmark = "benchmark --no-hub --log-dir logs --benchmark-dir tables -n 1100 --num-threads 1"
    flag = "include_cfrc_ext_in_observation:True"
    full = f"{train} --env-kwargs {flag} --eval-env-kwargs {flag} healthy_reward:2.0"
    said = zoo(tmp_path, train, enjoy, benchmark, full, enjoy)
    assert "ValueError" not in "".join(said)
    assert "eval_env_kwargs={'include_cfrc_ext_in_observation': True, 'healthy_reward': 2.0}" in said[3]
    for number, extra in ((1, False), (2, True)):
        args = read(tmp_path / f"logs/mbpo/Ant-v5_{number}/Ant-v5/args.yml")
        assert args["env_kwargs"] == {"include_cfrc_ext_in_observation": extra}
        statistics = pickle.loads((tmp_path / f"logs/mbpo/Ant-v5_{number}/Ant-v5/vecnormalize.pkl").read_bytes())
        assert statistics.obs_rms.mean.shape == (105 if extra else 27,)
    assert re.search(r"\|mbpo\|Ant-v5\| +\d", (tmp_path / "tables/benchmark.md").read_text())


def test_a_trial_that_diverges_is_pruned(tmp_path):
    """The first trial ends before the environment breaks, the second does not."""
    options = "-n 40 --optimize --no-optim-plots --n-trials 2 --eval-episodes 1"
    (said,) = zoo(tmp_path, f"train --algo mbpo --env Breaks-v0 {options} -params {TINY}")
    assert "Trial 0 finished" in said and "Best trial" in said
    assert "Expected finite numbers" in said and "Trial 1 pruned" in said


def test_what_cannot_work_is_refused_before_a_run_begins(tmp_path):
    train = "train --algo mbpo --env Short-v0 -n 20"
    callback = "'rl_zoo3.callbacks.ParallelTrainCallback'"
    unknown, parallel, listed = zoo(
        tmp_path,
        f"{train} --conf-file mbpo_papr",
        f"{train} -params callback:{callback}",
        f"{train} -params callback:[{{{callback}:dict(gradient_steps=1)}}]",
    )
    assert "ValueError: There is no file of settings 'mbpo_papr': pass one of ['dhmbpo', 'mbpo', 'mbpo_paper']" in unknown
    for said in (parallel, listed):
        assert "ValueError: `ParallelTrainCallback` trains a copy of the model" in said
    assert not (tmp_path / "logs").exists()


def test_going_on_with_other_normalisation_is_refused(tmp_path):
    """The settings are read anew, so the policy would see other observations than before."""
    train, raw = f"train --algo mbpo --env Short-v0 -n 20 -params {TINY}", "normalize:False"
    first, second = ("-f more -i logs/mbpo/Short-v0_1/Short-v0.zip", "-f more -i logs/mbpo/Short-v0_2/Short-v0.zip")
    said = zoo(
        tmp_path, train, f"{train} {raw}", f"{train} {raw} {first}", f"{train} {second}", f"{train} normalize:{{}} {first}"
    )
    assert "ValueError: logs/mbpo/Short-v0_1/Short-v0.zip saw observations normalised with" in said[2]
    assert "mbpo.yml normalise, but logs/mbpo/Short-v0_2/Short-v0/vecnormalize.pkl is not there" in said[3]
    assert "ValueError" not in said[0] + said[1] + said[4] and "Loading saved VecNormalize stats" in said[4]
    assert len(list((tmp_path / "more/mbpo").iterdir())) == 1


def test_without_the_extra_the_command_names_it(tmp_path):
    code = "import sys; sys.modules['optuna'] = None; import sb3_mbpo.zoo"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and 'pip install "sb3_mbpo[zoo]"' in done.stderr


def test_other_algorithms_and_own_settings_are_left_alone(tmp_path):
    (tmp_path / "own.yml").write_text("default: {n_timesteps: 20, policy: MlpPolicy, tau: 0.125}")
    (tmp_path / "own.py").write_text("hyperparams = dict(default=dict(n_timesteps=20, policy='MlpPolicy', tau=0.375))")
    (tmp_path / "module.py").write_text(
        "def never(obs, action, next_obs):\n    return obs[:, 0] > 2\n"
        "hyperparams = dict(default=dict(n_timesteps=20, policy='MlpPolicy', tau=0.625, termination_fn=never))"
    )
    by_path, by_file, by_module, enjoy, sac = zoo(
        tmp_path,
        "train --algo mbpo --env Short-v0 --conf-file own.yml",
        "train --algo mbpo --env Short-v0 --conf-file own.py",
        "train --algo mbpo --env Short-v0 --conf-file module",
        "enjoy --algo mbpo --env Short-v0 -f logs --no-render -n 5",
        "train --algo sac --env Short-v0 -n 20",
    )
    assert "('tau', 0.125)" in by_path and "('tau', 0.375)" in by_file and "('tau', 0.625)" in by_module
    assert "Loading logs/mbpo/Short-v0_3/Short-v0.zip" in enjoy and "ValueError" not in enjoy
    assert "sac.yml" in sac and (tmp_path / "logs/sac/Short-v0_1/Short-v0.zip").exists()


def test_the_zoo_makes_of_all_settings_what_the_benchmark_does(tmp_path):
    line = [sys.executable, "-c", READERS]
    done = subprocess.run(line, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DIFFERENT" not in done.stdout and done.stdout.count("SAME") == 3 * 11, done.stdout


def test_dhmbpo_is_known_with_its_own_settings_and_search(tmp_path):
    size = "-n 130 --eval-freq 60 --eval-episodes 1"
    parameters = "-params learning_starts:50 dynamics_train_freq:50 dynamics_kwargs:dict(net_arch=[16],max_gradient_steps=20)"
    train, enjoy, optimize, parallel = zoo(
        tmp_path,
        f"train --algo dhmbpo --env Pendulum-v1 {size} {parameters}",
        "enjoy --algo dhmbpo --env Pendulum-v1 -f logs --no-render -n 5",
        f"train --algo dhmbpo --env Pendulum-v1 {size} --optimize --n-trials 1 --no-optim-plots {parameters}",
        "train --algo dhmbpo --env Short-v0 -n 20 -params callback:'rl_zoo3.callbacks.ParallelTrainCallback'",
    )
    assert "hyperparams/dhmbpo.yml" in train and "valid_paths" in train and "Eval num_timesteps=120" in train
    assert "Loading running average" in enjoy
    sampled = "learning_rate tau gradient_steps target_entropy dynamics_train_freq rollout_length gradient_horizon"
    assert re.findall(r"^    (\w+): ", optimize, flags=re.MULTILINE) == sampled.split()
    assert "Leave it out for `dhmbpo`" in parallel


@pytest.mark.skipif(importlib.util.find_spec("moviepy") is None, reason="needs moviepy")
def test_record_video_films_a_trained_model(tmp_path):
    train = f"train --algo mbpo --env Short-v0 -n 20 -params {TINY}"
    zoo(tmp_path, train, "record_video --algo mbpo --env Short-v0 -f logs -n 5")
    assert next((tmp_path / "logs/mbpo/Short-v0_1/videos").glob("*.mp4")).stat().st_size > 0
