import json
import subprocess
from functools import partial
from importlib.metadata import version

import pytest
import torch as th

from sb3_mbpo.benchmark import __main__ as command_line
from sb3_mbpo.benchmark import provenance, speed


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {
        "FEW": 300,
        "MANY": 600,
        "FIT_STEPS": 5,
        "BATCH_SIZE": 16,
        "UPDATES_PER_CALL": 2,
        "IMAGINED": 100,
    }.items():
        monkeypatch.setattr(speed, name, value)
    small = dict(learning_starts=100, gradient_steps=1, rollout_batch_size=100, dynamics_kwargs=dict(max_gradient_steps=5))
    monkeypatch.setattr(speed, "_TimedMBPO", partial(speed._TimedMBPO, **small))
    monkeypatch.setattr(th, "set_num_threads", lambda threads: None)  # of all tests in this process


def test_the_command_prints_all_and_writes_it_as_json(tiny, monkeypatch, tmp_path, capsys):
    path = tmp_path / "speed.json"
    options = ["--rounds", "2", "--width", "16", "--run-steps", "260", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["benchmark", "speed", *options])
    command_line.main()
    result = json.loads(path.read_text())

    assert result["machine"]["torch"] == version("torch") and result["machine"]["threads"] == 1
    assert result["machine"]["device"] == "cpu"
    assert result["updates"]["SB3's SAC"]["ratio"] == 1.0
    assert {f"MBPO, policy_delay={delay}" for delay in (1, 20)} <= set(result["updates"])
    assert all(row["per_second"] > 0 and row["ratio"] > 0 for row in result["updates"].values())
    assert result["fit"]["ratio"] > 0 and result["imagination"]["transitions per second, k=10"] > 0
    shares = [value for name, value in result["run"].items() if name.startswith("share")]
    assert len(shares) == 3 and min(shares) > 0 and sum(shares) < 1  # the rest is the environment
    printed = capsys.readouterr().out
    assert all(name in printed for section in ("updates", "fit", "run") for name in result[section])


def test_the_commit_is_that_of_the_package_and_says_whether_files_have_changed(tmp_path, monkeypatch):
    """Not of a checkout that the package only lies in."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    (tmp_path / "provenance.py").write_text("first")
    (tmp_path / "other.py").write_text("theirs")

    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("add", "other.py")
    git("commit", "--quiet", "--message", "of others")
    assert provenance.commit() is None
    git("add", "provenance.py")
    git("commit", "--quiet", "--message", "ours")
    assert provenance.commit() == git("rev-parse", "HEAD")[:12]
    (tmp_path / "provenance.py").write_text("second")
    assert provenance.commit() == git("rev-parse", "HEAD")[:12] + "+"


def test_an_unknown_command_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark", "sped"])
    with pytest.raises(SystemExit):
        command_line.main()


def test_tasks_are_measured_in_turn_after_one_round_to_warm_up():
    calls = []
    seconds = speed._in_turn({name: partial(calls.append, name) for name in "ab"}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]


@pytest.mark.parametrize(
    "for_weights, for_inputs, expected",
    [(False, False, 5 * 7 + 7 * 2), (True, False, 2 * (5 * 7 + 7 * 2) + 7 * 2), (False, True, 2 * (5 * 7 + 7 * 2))],
)
def test_the_products_of_a_perceptron_are_counted(for_weights, for_inputs, expected):
    """Forwards one multiplication per weight and row; as much again for the weights, and for each layer's input."""
    products = speed._products([5, 7, 2], for_weights, for_inputs, members=3)
    multiplications = sum(left.shape[1] * left.shape[2] * right.shape[2] for left, right in products)
    assert multiplications == speed.BATCH_SIZE * expected
    assert all(len(left) == len(right) == 3 for left, right in products)
