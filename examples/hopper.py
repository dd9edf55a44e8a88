"""
Hopper with the paper's settings (Janner et al. 2019, appendix C, and the authors' code).

    python examples/hopper.py

125,000 environment steps take many hours on one CPU core; TensorBoard shows how it goes: tensorboard --logdir runs
"""

import argparse
from pathlib import Path

import gymnasium as gym
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mbpo import MBPO
from sb3_mbpo.hyperparams import as_arguments, load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=125_000, help="environment steps")
    parser.add_argument("--learning-starts", type=int, help="steps with random actions (default: the paper's)")
    parser.add_argument("--gradient-steps", type=int, help="updates per environment step (default: the paper's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for logs, evaluations and the model")
    args = parser.parse_args()

    th.set_num_threads(args.threads)
    settings = load_settings("Hopper-v5", "mbpo_paper")
    changes = {"learning_starts": args.learning_starts, "gradient_steps": args.gradient_steps}
    kwargs = as_arguments(settings.kwargs) | {name: value for name, value in changes.items() if value is not None}
    model = MBPO(settings.policy, "Hopper-v5", tensorboard_log=str(args.out), verbose=1, seed=args.seed, **kwargs)
    eval_env = Monitor(gym.make("Hopper-v5"))
    model.learn(args.steps, callback=EvalCallback(eval_env, eval_freq=1000, log_path=str(args.out)), progress_bar=True)
    mean, spread = evaluate_policy(model, eval_env, n_eval_episodes=10)
    print(f"Mean return of 10 episodes after {args.steps} steps: {mean:.0f} ± {spread:.0f}.")
    model.save(args.out / "hopper")


if __name__ == "__main__":
    main()
