"""
MBPO, SAC as SB3 ships it, and SAC with MBPO's warm-up, target entropy and ratio of updates to steps, side by side.

    python examples/compare_with_sac.py Pendulum-v1 3000 --seeds 0 1 2

Writes the returns as CSV and one picture of the learning curves.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tqdm.rich import tqdm

from sb3_mbpo import MBPO

# InvertedPendulum and Hopper: as in the paper (Janner et al. 2019, appendix C, and the authors' code), but for standardised
# targets and, on InvertedPendulum, a longer memory of imagined rows. Pendulum: ours. Other tasks: MBPO's defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "InvertedPendulum-v5": dict(learning_starts=500, gradient_steps=10, target_entropy=-0.05),
    "Hopper-v5": dict(learning_starts=5000, rollout_length=(20_000, 150_000, 1, 15), target_entropy=-1.0),
    "Pendulum-v1": dict(learning_starts=500, gradient_steps=10),
}
MBPO_ONLY = {"rollout_length"}
ALGORITHMS = ("MBPO", "SAC", "SAC, updates of MBPO")


def make_env(env_id: str, n_envs: int, normalize: bool, seed: int, training: bool) -> VecEnv:
    env = make_vec_env(env_id, n_envs=n_envs, seed=seed)
    return VecNormalize(env, training=training, norm_reward=training) if normalize else env


def make_model(algorithm: str, env: VecEnv, env_id: str, seed: int) -> SAC:
    if algorithm == "SAC":  # as SB3 ships it
        return SAC("MlpPolicy", env, seed=seed, device="cpu")
    settings = {"gradient_steps": 20, "learning_starts": 1000, **SETTINGS.get(env_id, {})}
    settings["gradient_steps"] *= env.num_envs  # they count per call of `train`: this keeps the updates per transition
    if algorithm == "MBPO":
        return MBPO("MlpPolicy", env, seed=seed, device="cpu", **settings)
    settings = {key: value for key, value in settings.items() if key not in MBPO_ONLY}
    return SAC("MlpPolicy", env, seed=seed, device="cpu", **settings)


def run(algorithm: str, seed: int, args: argparse.Namespace) -> pd.DataFrame:
    th.set_num_threads(1)
    train_env = make_env(args.env, args.n_envs, args.normalize, seed, training=True)
    eval_env = make_env(args.env, 1, args.normalize, seed + 10_000, training=False)
    evaluation = EvalCallback(
        eval_env,
        eval_freq=max(args.eval_every // args.n_envs, 1),
        n_eval_episodes=args.eval_episodes,
        log_path=str(args.out / f"{args.name}_{algorithm}_{seed}"),
        verbose=0,
    )
    model = make_model(algorithm, train_env, args.env, seed)
    start = time.perf_counter()
    model.learn(args.steps, callback=evaluation)
    seconds = time.perf_counter() - start
    rows = [
        dict(
            env=args.env,
            algorithm=algorithm,
            seed=seed,
            steps=steps,
            return_mean=returns.mean(),
            return_std=returns.std(),
            updates=model._n_updates,
            run_seconds=seconds,
        )
        for steps, returns in zip(evaluation.evaluations_timesteps, np.array(evaluation.evaluations_results), strict=True)
    ]
    return pd.DataFrame(rows)


def plot(results: pd.DataFrame, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (algorithm, runs), color in zip(results.groupby("algorithm"), ("#0072B2", "#D55E00", "#009E73"), strict=False):
        curve = runs.groupby("steps")["return_mean"].agg(["mean", "min", "max"])
        axes.plot(curve.index, curve["mean"], color=color, label=f"{algorithm} ({runs['seed'].nunique()} seeds)")
        axes.fill_between(curve.index, curve["min"], curve["max"], color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="return of the deterministic policy", title=results["env"].iloc[0])
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", choices=sorted(gym.registry), metavar="ENV", help="id of a Gymnasium environment")
    parser.add_argument("steps", type=int, metavar="STEPS", help="environment steps per run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--eval-every", type=int, default=500, help="environment steps between two evaluations")
    parser.add_argument("--eval-episodes", type=int, default=5)
    parser.add_argument("--n-envs", type=int, default=1, help="training environments")
    parser.add_argument("--normalize", action="store_true", help="wrap the environments in VecNormalize")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder for the CSV and the picture")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    args.name = args.env + ("_normalized" if args.normalize else "") + (f"_{args.n_envs}_envs" if args.n_envs > 1 else "")
    table, picture = args.out / f"{args.name}.csv", args.out / f"{args.name}.png"
    tables: list[pd.DataFrame] = []
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, algorithm, seed, args) for algorithm in args.algorithms for seed in args.seeds]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            tables.append(future.result())
            results = pd.concat(tables).sort_values(["algorithm", "seed", "steps"])
            results.to_csv(table, index=False)
    plot(results, picture)
    print(results.pivot_table(index="steps", columns="algorithm", values="return_mean", aggfunc="mean").round(1).to_string())
    print(f"Wrote {table} and {picture}.")


if __name__ == "__main__":
    main()
