"""Every example runs, at a size that takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str, cwd: Path) -> str:
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(EXAMPLES.parent), CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / script), *arguments]
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def test_pendulum(tmp_path):
    printed = run("pendulum.py", "--steps", "300", "--learning-starts", "250", cwd=tmp_path)
    assert "before" in printed and "after 300 steps" in printed
    assert (tmp_path / "pendulum/learning_curve.png").stat().st_size > 10_000


def test_hopper(tmp_path):
    printed = run("hopper.py", "--steps", "260", "--learning-starts", "100", "--gradient-steps", "2", cwd=tmp_path)
    assert "after 260 steps" in printed and "holdout_mse" in printed
    assert (tmp_path / "runs/hopper.zip").exists() and (tmp_path / "runs/MBPO_1").is_dir()


def test_custom_env(tmp_path):
    printed = run("custom_env.py", "--steps", "130", "--learning-starts", "100", cwd=tmp_path)
    assert "after 130 steps" in printed and "Holdout error" in printed


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_explains_itself(script, tmp_path):
    assert "usage:" in run(script, "--help", cwd=tmp_path)
