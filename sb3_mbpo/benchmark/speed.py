"""
How fast everything is, on Hopper's sizes and made-up transitions.

Computers drift: what is compared is measured in turn, and a ratio is the median of the ratios of the rounds.
"""

import importlib.util
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from rich.table import Table
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure

from sb3_mbpo import MBPO, takes_tensors
from sb3_mbpo.benchmark.provenance import processor, versions
from sb3_mbpo.type_aliases import FitResult

HOPPER = "Hopper-v5"
BATCH_SIZE = 256
#: As many as MBPO makes per environment step.
UPDATES_PER_CALL = 20
#: Real transitions, and many of them.
FEW, MANY = 20_000, 100_000
#: Of one fit, as MBPO makes them by default.
FIT_STEPS = 250
#: Transitions of one round of imagination, if no rollout ends.
IMAGINED = 100_000

Result = dict[str, Any]


def measure_speed(threads: int, rounds: int, width: int, run_steps: int, memory: bool, device: str) -> Result:
    """
    :param threads: of PyTorch
    :param rounds: repetitions of each measurement
    :param width: of SAC's two hidden layers
    :param run_steps: environment steps of a run after its 1,000 random ones; 0: no run
    :param memory: whether to fill the imagined buffers of long rollouts, in processes of their own
    :param device: of the networks
    :return: numbers by section and name
    """
    th.set_num_threads(threads)
    unit = th.cuda.get_device_name(device) if th.device(device).type == "cuda" else device
    peaks = _measure_memory() if memory else {}  # first: on Linux a process inherits the peak of the one that starts it
    result: Result = {
        "machine": {"processor": processor(), "threads": threads, "device": unit} | versions(),
        "updates": _measure_updates(rounds, width, device),
        "fit": _measure_fit(max(rounds // 5, 1), device),
        "imagination": _measure_imagination(max(rounds // 5, 1), width, device),
    }
    if run_steps:
        result["run"] = _measure_run(width, run_steps, device)
    if memory:
        result["memory"] = peaks
    return result


def speed_tables(result: Result) -> list[Table]:
    """:param result: of :func:`measure_speed`"""
    tables = [updates := Table("updates", "per second", "ratio to SB3")]
    for name, row in result["updates"].items():
        updates.add_row(name, f"{row['per_second']:.0f}", f"{row['ratio']:.2f}")
    for section in ("machine", "fit", "imagination", "run", "memory"):
        if section in result:
            tables.append(table := Table(section, ""))
            for name, value in result[section].items():
                table.add_row(name, f"{value:,.3g}" if isinstance(value, float) and value < 1000 else str(value))
    return tables


def _in_turn(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """:return: seconds of each task and round, after a round to warm up"""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


@takes_tensors
def _never(observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
    return th.zeros(len(observations), dtype=th.bool)


def _model(algorithm: Any, env: str | gym.Env[Any, Any], n_real: int, width: int = 256, **kwargs: Any) -> Any:
    """A model with a full replay buffer of small steps in all directions."""
    kwargs |= {"policy_kwargs": {"net_arch": [width, width]}, "learning_starts": 1, "buffer_size": n_real, "seed": 0}
    model = algorithm("MlpPolicy", env, **kwargs)
    model.set_logger(configure(None, []))
    model._current_progress_remaining = 1.0
    rng, buffer = np.random.default_rng(0), model.replay_buffer
    buffer.observations[:] = rng.normal(size=buffer.observations.shape)
    buffer.next_observations[:] = buffer.observations + 0.1 * rng.normal(size=buffer.observations.shape)
    buffer.actions[:] = rng.uniform(-1, 1, size=buffer.actions.shape)
    buffer.rewards[:] = buffer.observations[..., 0]
    buffer.full = True
    model.num_timesteps = n_real
    return model


def _mbpo(env: str | gym.Env[Any, Any] = HOPPER, n_real: int = FEW, gradient_steps: int = 50, **kwargs: Any) -> MBPO:
    """The same for MBPO, fitted for a few gradient steps."""
    kwargs |= {"termination_fn": _never, "dynamics_kwargs": {"max_gradient_steps": gradient_steps}}
    model: MBPO = _model(MBPO, env, n_real, **kwargs)
    model.fit_dynamics()
    return model


def _products(
    widths: list[int], for_weights: bool, for_inputs: bool, device: str = "cpu", members: int = 1
) -> list[tuple[th.Tensor, th.Tensor]]:
    """What a perceptron multiplies, forwards and, for the gradients of its weights or of its input, backwards."""
    products = []
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        inputs, weight, gradient = (
            th.randn(members, *shape, device=device)
            for shape in ((BATCH_SIZE, fan_in), (fan_in, fan_out), (BATCH_SIZE, fan_out))
        )
        products.append((inputs, weight))
        if for_weights:
            products.append((inputs.transpose(1, 2), gradient))
        if for_inputs or (for_weights and layer > 0):
            products.append((gradient, weight.transpose(1, 2)))
    return products


def _multiply(products: list[tuple[th.Tensor, th.Tensor]], times: int) -> None:
    for _ in range(times):
        for left, right in products:
            product = th.bmm(left, right)
    product[0, 0, 0].item()  # a GPU is waited for


def _measure_updates(rounds: int, width: int, device: str) -> Result:
    models = {"SB3's SAC": _model(SAC, HOPPER, FEW, width, device=device)}
    for delay in (1, 20):
        make = partial(_mbpo, width=width, policy_delay=delay, rollout_batch_size=IMAGINED, device=device)
        usual, by_autograd = make(), make()
        models |= {f"MBPO, policy_delay={delay}": usual, f"MBPO by autograd, policy_delay={delay}": by_autograd}
        by_autograd.actor.mu.register_forward_hook(lambda *_: None)  # the closed form leaves layers with hooks alone
        for model in (usual, by_autograd):
            model.imagine()
        if importlib.util.find_spec("sbx"):
            from sbx import SAC as JaxSAC

            settings = {"policy_delay": delay, "gradient_steps": UPDATES_PER_CALL, "device": device}
            models[f"SBX's SAC, policy_delay={delay}"] = _model(JaxSAC, HOPPER, FEW, width, **settings)
    tasks = {name: partial(model.train, UPDATES_PER_CALL, BATCH_SIZE) for name, model in models.items()}

    actor, critic = [11, width, width, 6], [14, width, width, 1]
    products = _products(actor, False, False, device) + _products(actor, True, False, device)  # next actions; the actor's loss
    for for_weights, for_inputs in ((False, False), (True, False), (False, True)):
        products += 2 * _products(critic, for_weights, for_inputs, device)
    tasks["only the matrix products, by PyTorch"] = partial(_multiply, products, UPDATES_PER_CALL)
    seconds = _in_turn(tasks, rounds)
    return {
        name: {
            "per_second": float(UPDATES_PER_CALL / np.median(values)),
            "ratio": float(np.median(seconds["SB3's SAC"] / values)),
        }
        for name, values in seconds.items()
    }


def _measure_fit(rounds: int, device: str) -> Result:
    few, many = (_mbpo(n_real=n_real, gradient_steps=FIT_STEPS, device=device) for n_real in (FEW, MANY))
    products = _products([14, 200, 200, 200, 200, 24], for_weights=True, for_inputs=False, device=device, members=7)
    tasks: dict[str, Callable[[], object]] = {
        "few": few.fit_dynamics,
        "many": many.fit_dynamics,
        "products": partial(_multiply, products, FIT_STEPS),
    }
    seconds = _in_turn(tasks, rounds)
    return {
        "milliseconds per gradient step": float(np.median(seconds["few"]) / FIT_STEPS * 1000),
        "only its matrix products, by PyTorch": float(np.median(seconds["products"]) / FIT_STEPS * 1000),
        "ratio": float(np.median(seconds["few"] / seconds["products"])),
        "seconds of one fit": float(np.median(seconds["few"])),
        f"ratio of a fit at {MANY} to one at {FEW} transitions": float(np.median(seconds["many"] / seconds["few"])),
    }


def _measure_imagination(rounds: int, width: int, device: str) -> Result:
    models = {k: _mbpo(width=width, rollout_length=k, rollout_batch_size=IMAGINED // k, device=device) for k in (1, 10)}
    seconds = _in_turn({str(k): model.imagine for k, model in models.items()}, rounds)
    result: Result = {}
    for k, model in models.items():
        assert model.imagination_result is not None
        rows = model.imagination_result.rows
        result[f"transitions per second, k={k}"] = round(rows / float(np.median(seconds[str(k)])))
    return result


class _TimedMBPO(MBPO):
    """Notes where the time goes."""

    spent: dict[str, float]

    def fit_dynamics(self) -> FitResult:
        with self._noting("fit"):
            return super().fit_dynamics()

    def imagine(self) -> int:
        with self._noting("imagination"):
            return super().imagine()

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        with self._noting("updates"):
            super().train(gradient_steps, batch_size)

    @contextmanager
    def _noting(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[phase] += time.perf_counter() - start


def _measure_run(width: int, steps: int, device: str) -> Result:
    model = _TimedMBPO("MlpPolicy", HOPPER, seed=0, device=device, policy_kwargs={"net_arch": [width, width]})
    model.spent = dict.fromkeys(("fit", "imagination", "updates"), 0.0)
    model.learn(model.learning_starts + 1)
    first_fit = model.spent["fit"]
    model.spent = dict.fromkeys(model.spent, 0.0)
    start = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    total = time.perf_counter() - start
    return {
        "seconds of the first fit": first_fit,
        "environment steps per second from then on": steps / total,
        **{f"share of {phase}": seconds / total for phase, seconds in model.spent.items()},
    }


def _measure_memory() -> Result:
    result: Result = {}
    hopper, ant = {"id": HOPPER}, {"id": "Ant-v5", "include_cfrc_ext_in_observation": False}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for env, k, batch in ((hopper, 15, 100_000), (ant, 25, 100_000), (hopper, 15, 20_000), (ant, 25, 20_000)):
            peak = pool.apply(_peak_memory, (env, k, batch))
            result[f"peak GB, {env['id']}, k={k}, rollout_batch_size={batch}"] = peak
    return result


def _peak_memory(env_kwargs: dict[str, Any], k: int, rollout_batch_size: int) -> float:
    """GB that a process needs until its imagined buffer is full. Not on Windows."""
    import resource

    model = _mbpo(gym.make(**env_kwargs), rollout_length=k, rollout_batch_size=rollout_batch_size, device="cpu")
    assert model.imagined_buffer is not None
    while len(model.imagined_buffer) < 0.99 * model.imagined_buffer.capacity:
        model.imagine()
    model.train(UPDATES_PER_CALL, BATCH_SIZE)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
