"""The commands of the RL Zoo, at tiny size, in a folder of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# only looked for: importing the Zoo changes Gymnasium's wrappers
pytestmark = pytest.mark.skipif(importlib.util.find_spec("rl_zoo3") is None, reason="needs the extra `zoo`")

ROOT = Path(__file__).parent.parent
TINY = "learning_starts:100 gradient_steps:1 rollout_batch_size:200 dynamics_kwargs:dict(net_arch=[16],max_gradient_steps=20)"
NORMALIZED = "normalize:{'norm_obs':True,'norm_reward':False}"


def zoo(folder: Path, command: str) -> str:
    line = [sys.executable, "-m", "sb3_mbpo.zoo", *command.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_train_enjoy_continue_and_plot_with_normalized_observations(tmp_path):
    options = (
        f"--algo mbpo --env Pendulum-v1 -n 300 --eval-freq 150 --eval-episodes 2 --save-freq 150 -params {TINY} {NORMALIZED}"
    )
    said = zoo(tmp_path, f"train --save-replay-buffer {options}")
    run = tmp_path / "logs" / "mbpo" / "Pendulum-v1_1"
    assert "mbpo.yml" in said and "dynamics/" in said
    assert (run / "Pendulum-v1.zip").exists() and (run / "rl_model_150_steps.zip").exists()
    assert (run / "Pendulum-v1" / "vecnormalize.pkl").exists()
    zoo(tmp_path, "enjoy --algo mbpo --env Pendulum-v1 -f logs -n 50 --no-render --load-best")
    zoo(tmp_path, f"train -i {run / 'Pendulum-v1.zip'} {options}")
    assert (tmp_path / "logs" / "mbpo" / "Pendulum-v1_2" / "Pendulum-v1.zip").exists()
    zoo(tmp_path, "plot_train -a mbpo -e Pendulum-v1 -f logs")
    zoo(tmp_path, "all_plots -a mbpo -e Pendulum-v1 -f logs -o curves --no-million")
    zoo(tmp_path, "plot_from_file -i curves.pkl")


def test_optimize_tries_the_parameters_of_mbpo(tmp_path):
    said = zoo(
        tmp_path,
        "train --algo mbpo --env Pendulum-v1 -n 150 --optimize --n-trials 2 --n-startup-trials 1 --n-evaluations 1 "
        f"--eval-episodes 1 --no-optim-plots -params {TINY}",
    )
    assert "Best trial" in said and "rollout_length" in said and "real_ratio" in said
