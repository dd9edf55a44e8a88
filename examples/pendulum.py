"""
The main job in a few minutes on a laptop: swing up a pendulum with 3,000 environment steps.

    python examples/pendulum.py

Prints the return before and after and saves a picture of the learning curve.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

from sb3_mbpo import MBPO
from sb3_mbpo.hyperparams import as_arguments, load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = load_settings("Pendulum-v1")
    warm_up = settings.kwargs["learning_starts"]
    parser.add_argument("--steps", type=int, default=settings.n_timesteps, help="environment steps")
    parser.add_argument("--learning-starts", type=int, default=warm_up, help="steps with random actions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pendulum"), help="folder for the picture and the evaluations")
    args = parser.parse_args()

    kwargs = as_arguments(settings.kwargs) | {"learning_starts": args.learning_starts}
    env, eval_env = (VecNormalize(make_vec_env("Pendulum-v1"), **settings.normalize) for _ in range(2))
    eval_env.training = False  # it uses the statistics of the other one
    eval_env.seed(args.seed + 10_000)
    model = MBPO(settings.policy, env, seed=args.seed, **kwargs)
    before, _ = evaluate_policy(model, eval_env, n_eval_episodes=20)

    evaluation = EvalCallback(eval_env, eval_freq=min(250, args.steps), n_eval_episodes=10, log_path=str(args.out), verbose=0)
    model.learn(args.steps, callback=evaluation, progress_bar=True)

    sync_envs_normalization(env, eval_env)
    after, spread = evaluate_policy(model, eval_env, n_eval_episodes=20)
    print(f"Mean return of 20 episodes: {before:.0f} before, {after:.0f} ± {spread:.0f} after {args.steps} steps.")

    returns = np.array(evaluation.evaluations_results)  # (evaluations, episodes)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(evaluation.evaluations_timesteps, returns.mean(axis=1), color="#0072B2", label="mean of 10 episodes")
    low, high = returns.min(axis=1), returns.max(axis=1)
    axes.fill_between(evaluation.evaluations_timesteps, low, high, color="#0072B2", alpha=0.2, linewidth=0, label="range")
    axes.axvline(args.learning_starts, color="gray", linestyle="--", label="end of the random warm-up")
    axes.set(xlabel="environment steps", ylabel="return", title="MBPO on Pendulum-v1")
    axes.legend()
    picture = args.out / "learning_curve.png"
    figure.savefig(picture, dpi=150)
    print(f"Wrote {picture}.")


if __name__ == "__main__":
    main()
