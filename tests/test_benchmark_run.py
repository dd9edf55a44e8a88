"""Runs of a suite: what they write, that they go on where they were stopped, and that one cannot harm another."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch as th
import yaml
from filelock import FileLock
from rich.console import Console
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mbpo import checkpoint
from sb3_mbpo.benchmark import __main__ as command_line
from sb3_mbpo.benchmark import callbacks, suite, training
from sb3_mbpo.benchmark.callbacks import Evaluation, read_rows
from sb3_mbpo.benchmark.report import write_report
from sb3_mbpo.benchmark.runner import local_processes, ray_cluster, run_all
from sb3_mbpo.benchmark.suite import Run, load_suite
from sb3_mbpo.benchmark.training import is_finished, make_env, steps_so_far, train
from sb3_mbpo.checkpoint import checkpoints

ROOT = Path(__file__).parent.parent

TINY = {"learning_starts": 100, "gradient_steps": 1, "batch_size": 16, "buffer_size": 1000}
TINY_FIT = {"max_gradient_steps": 10, "net_arch": [8]}
MODEL = {"rollout_batch_size": 200, "dynamics_train_freq": 100, "dynamics_kwargs": TINY_FIT}
OTHERS = ["stable_baselines3.SAC", "sb3_contrib.TQC", "sb3_contrib.CrossQ"]


def make_run(class_name: str = "sb3_mbpo.MBPO", **changes) -> Run:
    kwargs = TINY | {"policy_kwargs": {"net_arch": [8]}} | (MODEL if class_name == "sb3_mbpo.MBPO" else {})
    run = Run("Pendulum-v1", class_name.split(".")[1], 0, 300, 100, 2, class_name, "MlpPolicy", kwargs, 1, {}, None, None)
    return dataclasses.replace(run, **changes)


def rows(run: Run, results) -> pd.DataFrame:
    return pd.read_csv(results / run.folder / "evaluations.csv")


@pytest.mark.parametrize("class_name", ["sb3_mbpo.MBPO", *OTHERS])
def test_a_run_leaves_its_evaluations_its_model_and_what_repeats_it(tmp_path, class_name):
    run = make_run(class_name)
    assert not is_finished(run, tmp_path) and steps_so_far(run, tmp_path) == 0
    th.set_num_threads(2)
    train(run, tmp_path)
    assert th.get_num_threads() == 1
    assert is_finished(run, tmp_path) and steps_so_far(run, tmp_path) == 300
    table = rows(run, tmp_path)
    assert table.steps.tolist() == [100, 200, 300] and table.length_mean.eq(200).all()
    assert table.updates.tolist() == [0, 99, 199]  # an evaluation comes before the updates of its step
    assert table.seconds.is_monotonic_increasing and table.seconds.gt(0).all()
    folder = tmp_path / run.folder
    assert {path.name for path in folder.iterdir()} == {
        "evaluations.csv", "model.zip", "run.json", "steps.txt", "log.txt", "lock",
    }  # fmt: skip
    written = json.loads((folder / "run.json").read_text())
    assert written["class_name"] == class_name and written["kwargs"]["learning_starts"] == 100 and written["seed"] == 0
    assert written["versions"]["torch"] == version("torch") and written["machine"]["cores"] == os.cpu_count()
    model = training.algorithm_class(class_name).load(folder / "model.zip")
    assert model.num_timesteps == 300


def test_an_environment_of_ones_own_comes_with_its_module(tmp_path, monkeypatch):
    pendulum = "'gymnasium.envs.classic_control:PendulumEnv'"
    (tmp_path / "lab.py").write_text(f"import gymnasium\ngymnasium.register('Mine-v0', {pendulum}, max_episode_steps=200)\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "suite.yml"
    algorithms = {"SAC": {"class": "stable_baselines3.SAC"}}
    path.write_text(yaml.safe_dump({"seeds": [0], "environments": {"lab:Mine-v0": {"steps": 200}}, "algorithms": algorithms}))
    (run,) = load_suite(path)
    del gym.registry["Mine-v0"], sys.modules["lab"]  # a run has a process of its own
    train(run, tmp_path)
    assert rows(run, tmp_path).steps.tolist() == [200] and (tmp_path / "lab_Mine-v0" / "SAC" / "seed_0").is_dir()
    assert "## lab:Mine-v0" in write_report(tmp_path).read_text()


def test_an_evaluation_is_the_mean_return_of_the_deterministic_policy(tmp_path):
    """Counted by hand, in an environment with the same seed."""
    run = make_run("stable_baselines3.SAC", steps=100, normalize={"norm_reward": True})
    env = make_env(run, training=True)
    model = SAC("MlpPolicy", env, seed=1, learning_starts=1000)
    model.learn(100, callback=Evaluation(make_env(run, training=False), 100, 3, 10_000, tmp_path / "evaluations.csv"))
    returns, lengths = [], []
    raw = gym.make("Pendulum-v1")
    for episode in range(3):
        observation, _ = raw.reset(seed=10_000 + 100) if episode == 0 else raw.reset()
        total, steps, done = 0.0, 0, False
        while not done:
            action, _ = model.predict(env.normalize_obs(observation), deterministic=True)
            observation, reward, terminated, truncated, _ = raw.step(action)
            total, steps, done = total + reward, steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    (row,) = read_rows(tmp_path / "evaluations.csv")
    assert row["return_mean"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert row["return_std"] == pytest.approx(np.std(returns), rel=1e-5)
    assert row["length_mean"] == np.mean(lengths) and row["steps"] == 100 and row["updates"] == 0


@pytest.mark.parametrize("class_name", ["sb3_mbpo.MBPO", "stable_baselines3.SAC"])
def test_evaluations_do_not_change_the_training(tmp_path, class_name):
    often, never = make_run(class_name, eval_freq=60, normalize={}), make_run(class_name, eval_freq=1000, normalize={})
    models = []
    for run, folder in ((often, tmp_path / "often"), (never, tmp_path / "never")):
        train(run, folder)
        models.append(training.algorithm_class(class_name).load(folder / run.folder / "model.zip"))
    first, second = (model.policy.state_dict() for model in models)
    assert all(th.equal(first[name], second[name]) for name in first)
    assert len(rows(often, tmp_path / "often")) == 5 and rows(never, tmp_path / "never").steps.tolist() == [300]


@pytest.mark.parametrize("steps, expected", [(250, [100, 200, 250]), (50, [50])])
def test_the_end_of_a_run_is_evaluated_wherever_it_is(tmp_path, steps, expected):
    """Else the report would call the run unfinished, or have nothing to tell of it."""
    run = make_run("stable_baselines3.SAC", steps=steps)
    with local_processes(1) as submit, open(tmp_path / "console", "w") as file:
        assert run_all([run], tmp_path, submit, Console(file=file, width=200)) == []
    assert rows(run, tmp_path).steps.tolist() == expected
    assert f"after {steps} steps" in (tmp_path / "console").read_text()
    assert "not finished" not in write_report(tmp_path).read_text()


def test_evaluations_count_the_steps_of_all_environments(tmp_path):
    run = make_run("stable_baselines3.SAC", n_envs=3, steps=300)
    train(run, tmp_path)
    assert rows(run, tmp_path).steps.tolist() == [102, 201, 300]


@pytest.mark.parametrize("class_name", ["sb3_mbpo.MBPO", "stable_baselines3.SAC"])
def test_evaluations_and_checkpoints_cost_no_training_time(tmp_path, monkeypatch, class_name):
    """By a clock that an evaluation puts forward by an hour, a checkpoint by a day, and a step of training by a second."""
    clock = [0.0]

    def evaluate(*args, **kwargs):
        clock[0] += 3600.0
        return [0.0], [1]

    class Ticks(training.StepsFile):
        def _on_step(self) -> bool:
            clock[0] += 1.0
            return True

    def takes_a_day(save):
        def slow(*args, **kwargs):
            clock[0] += 86_400.0
            return save(*args, **kwargs)

        return slow

    monkeypatch.setattr(callbacks, "evaluate_policy", evaluate)
    monkeypatch.setattr(training, "StepsFile", Ticks)
    monkeypatch.setattr(callbacks.PlainCheckpoints, "_save", takes_a_day(callbacks.PlainCheckpoints._save))
    monkeypatch.setattr(checkpoint, "save_checkpoint", takes_a_day(checkpoint.save_checkpoint))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    run = make_run(class_name, kwargs=TINY | {"learning_starts": 1000})
    train(run, tmp_path)
    assert clock[0] > 2 * 86_400.0
    assert rows(run, tmp_path).seconds.tolist() == [99.0, 199.0, 299.0]  # each comes before the tick of its step


class Stopped(Exception):
    pass


class StopsAt(BaseCallback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            raise Stopped
        return True


@pytest.mark.parametrize("class_name", ["sb3_mbpo.MBPO", *OTHERS])
@pytest.mark.parametrize("normalize", [None, {}])
def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, class_name, normalize):
    """It was stopped at step 250, the checkpoint is of 200 or, after an evaluation at 240, earlier than that row."""
    run = make_run(class_name, normalize=normalize)
    steps_file = training.StepsFile
    monkeypatch.setattr(training, "StepsFile", lambda path: StopsAt(250))
    with pytest.raises(Stopped):
        train(run, tmp_path)
    before = rows(run, tmp_path)
    assert before.steps.tolist() == [100, 200] and not is_finished(run, tmp_path)
    assert len(list((tmp_path / run.folder / "checkpoint").glob("steps_*"))) <= 1  # the newest alone

    begun = []
    algorithm = training.algorithm_class(class_name)
    learn = algorithm.learn

    def noting(self, total_timesteps, **kwargs):
        normalization = self.get_vec_normalize_env()
        begun.append((self.num_timesteps, self.replay_buffer.size(), self._n_updates))
        begun.append(None if normalization is None else normalization.obs_rms.count)
        return learn(self, total_timesteps, **kwargs)

    monkeypatch.setattr(algorithm, "learn", noting)
    monkeypatch.setattr(training, "StepsFile", steps_file)
    train(run, tmp_path)
    assert begun[0] == (200, 200, 100)
    assert normalize is None or begun[1] == pytest.approx(200, abs=5)  # observations that it has seen
    after = rows(run, tmp_path)
    assert after.steps.tolist() == [100, 200, 300] and after.updates.tolist() == [0, 99, 199]
    pd.testing.assert_frame_equal(before, after[:2])
    assert after.seconds.is_monotonic_increasing and is_finished(run, tmp_path)


def test_n_step_returns_end_where_a_run_was_stopped(tmp_path, monkeypatch):
    """At step 50, in the middle of an episode: the environment begins a new one."""
    run = make_run("stable_baselines3.SAC", eval_freq=50, steps=100)
    run = dataclasses.replace(run, kwargs=run.kwargs | {"n_steps": 3, "gamma": 0.9})
    with monkeypatch.context() as patch:
        patch.setattr(training, "StepsFile", lambda path: StopsAt(70))
        with pytest.raises(Stopped):
            train(run, tmp_path)
    model = training._load(run, make_env(run, training=True), tmp_path / run.folder / "checkpoint")
    model.learn(10, reset_num_timesteps=False)
    rows_before = model.replay_buffer._get_samples(np.array([47, 48, 49]))
    np.testing.assert_allclose(rows_before.discounts.ravel(), [0.9**3, 0.9**2, 0.9], rtol=1e-6)
    assert rows_before.dones.sum() == 0  # the task has not ended


def test_rewards_are_scaled_by_returns_of_the_discount_of_the_algorithm():
    """As the Zoo does with the same settings."""
    run = make_run(normalize={"gamma": 0.5})
    with_its_own = dataclasses.replace(run, kwargs=run.kwargs | {"gamma": 0.9})
    assert make_env(run, training=True).gamma == 0.5 and make_env(with_its_own, training=True).gamma == 0.9


def test_rows_that_the_model_has_not_made_yet_are_dropped(tmp_path, monkeypatch):
    """The checkpoint of step 200 failed, say: the evaluation of that step will come again."""
    run = make_run()
    monkeypatch.setattr(training, "StepsFile", lambda path: StopsAt(200))
    with pytest.raises(Stopped):
        train(run, tmp_path)
    assert rows(run, tmp_path).steps.tolist() == [100, 200]  # the evaluation came first
    monkeypatch.undo()
    train(run, tmp_path)
    assert rows(run, tmp_path).steps.tolist() == [100, 200, 300]


def test_a_finished_run_is_left_alone(tmp_path):
    run = make_run()
    train(run, tmp_path)
    model = tmp_path / run.folder / "model.zip"
    written = model.stat().st_mtime_ns
    train(run, tmp_path)
    assert model.stat().st_mtime_ns == written


def test_a_run_that_goes_on_says_from_where_and_with_what(tmp_path, monkeypatch):
    """It begins anew at commit "b", goes on from its checkpoint at "b", then at "c"."""
    run = make_run("stable_baselines3.SAC", steps=400)

    def train_until(step, commit):
        with monkeypatch.context() as patch:
            patch.setattr(training, "commit", lambda: commit)
            patch.setattr(training, "StepsFile", lambda path: StopsAt(step))
            with contextlib.suppress(Stopped):
                train(run, tmp_path)
        info = json.loads((tmp_path / run.folder / "run.json").read_text())
        return info, [(again["from_step"], again["commit"]) for again in info.get("continued", [])]

    for step, first, later, expected in (
        (50, "a", "a", []),
        (150, "b", "b", []),
        (250, "b", "b", [(100, "b")]),
        (350, "b", "c", [(100, "b"), (200, "c")]),
    ):
        info, continued = train_until(step, later)
        assert info["commit"] == first and continued == expected
    assert info["continued"][0].keys() == {"from_step", "versions", "commit", "machine", "date"}
    everything = [(100, "b"), (200, "c"), (300, "d")]
    assert train_until(1000, "d")[1] == everything and is_finished(run, tmp_path)
    assert train_until(1000, "e")[1] == everything  # it was finished


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(make_run(), tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with \{'steps': 300\}, but .* is to have \{'steps': 500\}"):
        train(make_run(steps=500), tmp_path)


def test_a_finished_run_with_other_settings_is_not_what_was_asked_for(tmp_path):
    """A suite that was changed is never told that all is finished already."""
    train(make_run(), tmp_path)
    changed = make_run(steps=500)
    assert is_finished(make_run(), tmp_path) and not is_finished(changed, tmp_path)
    with local_processes(1) as submit, open(tmp_path / "console", "w") as file:
        assert run_all([changed], tmp_path, submit, Console(file=file, width=1000)) == [changed]
    assert "holds a run with {'steps': 300}" in (tmp_path / "console").read_text()


def test_scores_may_be_changed_after_a_run(tmp_path):
    """They are the report's alone."""
    train(make_run(), tmp_path)
    scored, other = make_run(scores=[-1000, 0]), make_run(steps=500, scores=[1, 2])
    with local_processes(1) as submit, open(tmp_path / "console", "w") as file:
        assert run_all([scored], tmp_path, submit, Console(file=file)) == []
        assert run_all([other], tmp_path, submit, Console(file=file)) == [other]  # another run, whose folder this is not
    info = json.loads((tmp_path / scored.folder / "run.json").read_text())
    assert info["scores"] == [-1000, 0] and info["steps"] == 300 and "versions" in info
    assert "1 of 1 runs are finished already" in (tmp_path / "console").read_text()


@pytest.mark.parametrize("content", ["", "null"])
def test_a_damaged_run_stops_no_other(tmp_path, content):
    damaged, right = make_run(seed=1), make_run()
    (tmp_path / damaged.folder).mkdir(parents=True)
    (tmp_path / damaged.folder / "run.json").write_text(content)
    with local_processes(1) as submit, open(tmp_path / "console", "w") as file:
        assert run_all([damaged, right], tmp_path, submit, Console(file=file, width=1000)) == [damaged]
    assert is_finished(right, tmp_path)
    assert f"{damaged.folder}/run.json is damaged" in (tmp_path / "console").read_text()


def test_one_process_at_a_time_trains_a_run(tmp_path):
    """The second waits, then finds the run finished."""
    run = make_run()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train, args=(run, tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert rows(run, tmp_path).steps.tolist() == [100, 200, 300]


def test_a_run_that_fails_or_dies_harms_no_other(tmp_path):
    """One is killed in the middle, one has no such policy, and the third does not mind. Those two are tried again."""
    killed = make_run("stable_baselines3.SAC", steps=4000, eval_freq=200, eval_episodes=1)
    wrong, right = make_run(seed=1, policy="NoPolicy"), make_run()

    def kill():
        while not (tmp_path / killed.folder / "checkpoint" / "steps_200").exists():
            time.sleep(0.05)
        (process,) = multiprocessing.active_children()
        process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with local_processes(1) as submit, open(tmp_path / "console", "w") as file:
        failed = run_all([killed, wrong, right], tmp_path, submit, Console(file=file, width=200))
    killer.join()
    assert failed == [killed, wrong] and is_finished(right, tmp_path)
    printed = (tmp_path / "console").read_text()
    assert f"{killed} failed: BrokenProcessPool" in printed and f"{wrong} failed: ValueError" in printed
    assert f"{right}: " in printed and "after 300 steps" in printed
    assert "in _train" in (tmp_path / wrong.folder / "log.txt").read_text()  # where it failed

    first, *_ = rows(killed, tmp_path).seconds
    with local_processes(1) as submit, open(tmp_path / "console", "w") as file:
        assert run_all([killed, right], tmp_path, submit, Console(file=file, width=200)) == []
    assert "1 of 2 runs are finished already" in (tmp_path / "console").read_text()
    assert rows(killed, tmp_path).seconds[0] == first  # it went on, instead of beginning anew
    assert is_finished(killed, tmp_path)


def test_an_interrupt_ends_runs_that_are_about_to_start(tmp_path):
    long = [make_run("stable_baselines3.SAC", seed=seed, steps=10**6) for seed in range(3)]
    with pytest.raises(KeyboardInterrupt), local_processes(1) as submit:
        futures = [submit(run, tmp_path) for run in long]
        raise KeyboardInterrupt
    assert all(future.done() for future in futures) and not multiprocessing.active_children()


@pytest.mark.parametrize("message", ["[enforce fail] out of memory", "nothing in [/data/x]"])
def test_brackets_are_printed_as_they_are(tmp_path, message):
    """In the name of an algorithm, and in an error, which may come from anywhere."""
    run = make_run("stable_baselines3.SAC", algorithm="SAC [mine]")
    train(run, tmp_path)
    again = dataclasses.replace(run, seed=1)
    results = {run.seed: Future(), again.seed: Future()}
    results[run.seed].set_result(None)
    results[again.seed].set_exception(OSError(message))
    (tmp_path / run.folder / "model.zip").unlink()  # else there is nothing to do
    with open(tmp_path / "console", "w") as file:
        assert run_all([run, again], tmp_path, lambda run, _: results[run.seed], Console(file=file, width=200)) == [again]
    printed = (tmp_path / "console").read_text()
    assert f"{run}: " in printed and f"{again} failed: {OSError(message)!r}" in printed


@pytest.fixture
def one_core(request) -> Iterator[list[str]]:
    """Arguments of the command for one run at a time, on the backend of that name."""
    if request.param == "local":
        yield ["--jobs", "1"]
        return
    pytest.importorskip("ray", reason="needs the extra `ray`")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield ["--backend", "ray", "--address", cluster.address]
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("one_core", ["local", "ray"], indirect=True)
def test_a_killed_suite_goes_on_with_the_same_command(tmp_path, one_core):
    """The command and its processes get SIGKILL in the middle of the second run; a cluster of Ray lives on."""
    path = tmp_path / "suite.yml"
    algorithm = {"class": "sb3_mbpo.MBPO", "settings": "mbpo", "kwargs": make_run().kwargs}
    content = {"eval_freq": 100, "eval_episodes": 1, "seeds": [0, 1], "environments": {"Pendulum-v1": {"steps": 600}}}
    path.write_text(yaml.safe_dump(content | {"algorithms": {"MBPO": algorithm}}))
    command = [sys.executable, "-m", "sb3_mbpo.benchmark", "run", str(path), "--out", str(tmp_path / "out"), *one_core]
    first, second = load_suite(path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, start_new_session=True, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not checkpoints(tmp_path / "out" / second.folder / "checkpoint"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = rows(second, tmp_path / "out")
    assert is_finished(first, tmp_path / "out") and not is_finished(second, tmp_path / "out")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 runs are finished already" in done.stdout and f"{second}: " in done.stdout
    assert rows(second, tmp_path / "out").steps.tolist() == list(range(100, 601, 100))
    assert rows(second, tmp_path / "out").seconds[0] == before.seconds[0]  # it went on, instead of beginning anew


def test_progress_has_the_steps_speed_and_time_left_of_each_run_under_way(tmp_path):
    """Not of one that an earlier command has begun and that waits."""
    under_way, waiting = make_run(), make_run(seed=1)
    (tmp_path / waiting.folder).mkdir(parents=True)
    (tmp_path / waiting.folder / "steps.txt").write_text("40")
    futures: dict[int, Future[None]] = {under_way.seed: Future(), waiting.seed: Future()}

    def work():
        (tmp_path / under_way.folder).mkdir(parents=True)
        for steps in (60, 120):
            (tmp_path / under_way.folder / "steps.txt").write_text(str(steps))
            time.sleep(3)
        for future in futures.values():
            future.set_exception(RuntimeError("the end of the test"))

    shown = io.StringIO()
    worker = threading.Thread(target=work)
    worker.start()
    console = Console(file=shown, width=200, force_terminal=True, color_system=None)
    run_all([under_way, waiting], tmp_path, lambda run, results: futures[run.seed], console)
    worker.join()
    (everything,), (one,) = (
        set(re.findall(rf"^{name}\W+(\d+)/{total} \d+\.\d steps/s 0:00:\d\d", shown.getvalue(), flags=re.MULTILINE))
        for name, total in (("all runs", 600), (str(under_way), 300))
    )
    assert (everything, one) == ("160", "120")
    assert not re.search(rf"{waiting}\W+\d+/300", shown.getvalue())


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_the_runs_of_a_stopped_command_end_with_it(tmp_path, sent):
    """The signal goes to the command alone. The long run's process lets go of the lock, and has not come to its end."""
    path = tmp_path / "suite.yml"
    algorithm = {"class": "stable_baselines3.SAC", "kwargs": {"batch_size": 8}}
    content = {"eval_freq": 100, "eval_episodes": 1, "seeds": [0], "environments": {"Pendulum-v1": {"steps": 100_000}}}
    path.write_text(yaml.safe_dump(content | {"algorithms": {"SAC": algorithm}}))
    command = [sys.executable, "-m", "sb3_mbpo.benchmark", "run", str(path), "--out", str(tmp_path / "out")]
    (run,) = load_suite(path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # which a background job may ignore
    process = subprocess.Popen(command, start_new_session=True, env=environment, stdout=subprocess.DEVNULL, **options)
    try:
        while not list((tmp_path / "out" / run.folder).glob("checkpoint/steps_*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(sent)
        with FileLock(tmp_path / "out" / run.folder / "lock", timeout=10):
            assert not is_finished(run, tmp_path / "out")
        assert process.wait(timeout=10) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_command_tells_how_many_runs_failed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "suite.yml"
    algorithm = {"class": "stable_baselines3.SAC", "kwargs": {"tau": "a"}}
    content = {"seeds": [0], "environments": {"Pendulum-v1": {"steps": 300}}, "algorithms": {"SAC": algorithm}}
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setattr("sys.argv", ["benchmark", "run", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"1 of 1 runs failed\. The same command tries them again"):
        command_line.main()
    for arguments, message in (
        (["run", "slow"], "There is no suite 'slow'"),
        (["run", "quick", "--jobs", "0"], "argument --jobs: must be an int of at least 1, but got '0'"),
        (["run", "quick", "--address", "auto"], "`--address` is that of a Ray cluster: add `--backend ray`"),
        (["speed", "--rounds", "-3"], "argument --rounds: must be an int of at least 1, but got '-3'"),
    ):
        monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
        with pytest.raises(SystemExit) as stop:
            command_line.main()
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_there_are_as_many_jobs_as_cores_that_the_command_may_use(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    monkeypatch.setattr("sys.argv", ["benchmark", "run", "--help"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert re.search(r"runs at a time\s+\(default: 3\)", capsys.readouterr().out)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`")
@pytest.mark.parametrize("what", ["worker", "machine"])
def test_a_ray_cluster_of_two_machines_survives_the_death_of(what, tmp_path):
    """
    Two nodes with one core each, beside a head that has none. The worker of the long run, or its node, is killed when the
    other run has ended; Ray starts the run anew, and it goes on from its checkpoint.
    """
    import ray
    from ray.cluster_utils import Cluster

    killed, other = make_run("stable_baselines3.SAC", steps=8000, eval_freq=400, eval_episodes=1), make_run(seed=1)
    before: list[pd.DataFrame] = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    machines = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def workers_of(machine) -> list[str]:
        (raylet,) = machine.all_processes["raylet"]
        line = ["pgrep", "-P", str(raylet.process.pid), "-f", "^ray::train"]
        return subprocess.run(line, stdout=subprocess.PIPE, text=True).stdout.split()

    def kill():
        while not (is_finished(other, tmp_path) and list((tmp_path / killed.folder).glob("checkpoint/steps_*"))):
            time.sleep(0.05)
        while len(found := [(machine, pid) for machine in machines for pid in workers_of(machine)]) > 1:
            time.sleep(0.05)
        ((machine, pid),) = found
        if what == "worker":
            os.kill(int(pid), signal.SIGKILL)
        else:
            cluster.remove_node(machine, allow_graceful=False)
        before.append(rows(killed, tmp_path))

    killer = threading.Thread(target=kill)
    try:
        with ray_cluster(cluster.address) as submit, open(tmp_path / "console", "w") as file:
            killer.start()
            failed = run_all([killed, other], tmp_path, submit, Console(file=file, width=200))
        with ray_cluster(None):
            assert ray.get_runtime_context().gcs_address != cluster.address
    finally:
        cluster.shutdown()
    killer.join()
    assert failed == [] and is_finished(killed, tmp_path) and is_finished(other, tmp_path)
    after = rows(killed, tmp_path)
    assert json.loads((tmp_path / killed.folder / "run.json").read_text())["continued"]
    assert after.steps.tolist() == list(range(400, 8001, 400)) and 0 < len(before[0]) < len(after)
    assert after.seconds[0] == before[0].seconds[0]


def test_without_the_extra_only_the_speed_can_be_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sb3_mbpo.benchmark.runner", None)
    monkeypatch.setattr("sys.argv", ["benchmark", "run", "quick"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert 'pip install "sb3_mbpo[benchmark]"' in capsys.readouterr().err


def test_the_quick_suite_and_its_report_at_tiny_size(tmp_path, monkeypatch):
    """The commands of the README. Runs are as the suite has them, but for fewer steps, updates and imagined rows."""

    def tiny(name):
        runs = []
        for run in load_suite(name):
            small = {"learning_starts": 100, "gradient_steps": 1, "rollout_batch_size": 200, "dynamics_kwargs": TINY_FIT}
            kwargs = run.kwargs | {key: value for key, value in small.items() if key in run.kwargs or "MBPO" in run.class_name}
            runs.append(dataclasses.replace(run, steps=300, eval_freq=150, eval_episodes=1, kwargs=kwargs))
        return runs

    monkeypatch.setattr(suite, "load_suite", tiny)
    monkeypatch.chdir(tmp_path)
    for command in (["run", "quick"], ["report", "results/quick"]):
        monkeypatch.setattr("sys.argv", ["benchmark", *command])
        command_line.main()
    text = (tmp_path / "results" / "quick" / "report" / "report.md").read_text()
    for algorithm in {run.algorithm for run in load_suite("quick")}:
        assert f"| {algorithm} | " in text
    assert "not finished" not in text
    for picture in re.findall(r"\]\((.*\.png)\)", text):
        assert (tmp_path / "results" / "quick" / "report" / picture).stat().st_size > 10_000
