"""Fitting: the ensemble by maximum likelihood, each member on its own bootstrap."""

import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch as th
import torch.nn.functional as F

from sb3_mbpo.dynamics import Dynamics, GaussianPrediction
from sb3_mbpo.ensemble import GaussianEnsemble
from sb3_mbpo.rules import evaluate_reward
from sb3_mbpo.type_aliases import FitResult, Transitions

#: A holdout of one row in five needs a few rows to say anything.
MIN_TRANSITIONS = 10
#: The paper's rule looks at the holdout after each epoch, or after several that make this many gradient steps: on a few
#: hundred rows an epoch is one step, and no step improves anything by 1 %.
MIN_STEPS_PER_LOOK = 10
#: A fit of a given number of gradient steps looks at the holdout at most this often, and ...
N_LOOKS = 5
#: ... in this last share of them the learning rate falls to zero.
DECAY_SHARE = 0.2
#: Smallest standard deviation of constant noise, in the units of the targets: a dimension without errors has no logarithm.
MIN_NOISE = 1e-4
#: Gradient steps of one fit of the termination head, and rows of each kind in its batches.
TERMINATION_STEPS, TERMINATION_ROWS = 500, 128


def make_optimizer(dynamics: Dynamics) -> th.optim.Adam:
    """
    Adam with each layer's own decay. Its ``weight_decay`` adds ``lambda * W`` to the gradient: the paper's penalty
    ``0.5 * lambda * |W|**2``, exactly.

    :param dynamics: on its device
    """
    ensemble, config = dynamics.ensemble, dynamics.config
    groups = [{"params": [w], "weight_decay": decay} for w, decay in zip(ensemble.weights, config.layer_decays, strict=True)]
    others = [*ensemble.biases, *ensemble.noise_parameters(), *ensemble.activation.parameters()]
    groups.append({"params": others, "weight_decay": 0.0})
    return th.optim.Adam(groups, lr=config.learning_rate, fused=True)


def split_holdout(
    data: Transitions, holdout_ratio: float, max_holdout: int, generator: th.Generator
) -> tuple[Transitions, Transitions]:
    """
    A new random split, at least one row on either side.

    :param data: at least two rows
    :param holdout_ratio: share of the holdout
    :param max_holdout: its upper bound, in rows
    :param generator: draws the rows
    :return: training rows, holdout rows
    """
    n_holdout = max(1, min(int(data.n_rows * holdout_ratio), max_holdout))
    order = th.randperm(data.n_rows, generator=generator, device=generator.device)
    return data.rows(order[n_holdout:]), data.rows(order[:n_holdout])


def ensemble_loss(
    ensemble: GaussianEnsemble, inputs: th.Tensor, targets: th.Tensor, beta: float
) -> tuple[th.Tensor, th.Tensor]:
    """
    Negative log-likelihood, up to a constant, weighted by the predicted variances to the power of ``beta`` (Seitzer et al.
    2022, arXiv 2203.09168), and the pull on the variance bounds (Chua et al. 2018, appendix A.1).

    .. math:: \\sum_i \\mathrm{mean}[w_i ((\\mu_i - y)^2 e^{-v_i} + v_i)] + 0.01 (\\sum v_{max} - \\sum v_{min})

    The weight :math:`w_i = e^{\\beta v_i}` counts as a constant. Constant noise does without weights and bounds.

    :param ensemble: members i
    :param inputs: (ensemble, batch, input_dim), scaled
    :param targets: (ensemble, batch, output_dim), scaled
    :param beta: 0: the likelihood as it is, in which a squared error counts less the larger its predicted variance; 1: for the
        means, all squared errors count alike
    :return: the loss, and the likelihood without weights as a mean over members, detached
    """
    mean, log_var = ensemble(inputs)
    likelihood = (mean - targets).square() * (-log_var).exp() + log_var
    if ensemble.constant_log_var is not None:
        loss = likelihood.mean(dim=(1, 2)).sum()
    else:
        weights = (beta * log_var.detach()).exp()
        bounds = 0.01 * (ensemble.max_log_var.sum() - ensemble.min_log_var.sum())
        loss = (weights * likelihood).mean(dim=(1, 2)).sum() + bounds
    return loss, likelihood.detach().mean(dim=(1, 2)).mean()


class KeptWeights:
    """
    What a fit ends with: each member's weights as they were when its own holdout error was lowest, or those of the last
    update. What the members share (bounds, parameters of the activation) is that of the last update.

    :param ensemble: whose members these are
    :param improvement: relative fall of the error that counts; ``None``: every update does
    """

    def __init__(self, ensemble: GaussianEnsemble, improvement: float | None) -> None:
        self._parameters = [*ensemble.weights, *ensemble.biases]  # the ensemble dimension first
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        self._shared = [*ensemble.noise_parameters(), *ensemble.activation.parameters()]
        self._last_shared = [parameter.detach().clone() for parameter in self._shared]
        self._improvement = improvement
        self.errors = th.full((ensemble.ensemble_size,), th.inf, device=self._kept[0].device)

    def update(self, errors: th.Tensor) -> bool:
        """
        :param errors: (ensemble,), of the weights as they are
        :return: whether any member's are kept
        """
        if self._improvement is None:
            counts = th.ones_like(errors, dtype=th.bool)
        else:
            counts = errors < self.errors * (1.0 - self._improvement)
        for kept, parameter in zip(self._kept, self._parameters, strict=True):
            kept[counts] = parameter.detach()[counts]
        self._last_shared = [parameter.detach().clone() for parameter in self._shared]
        self.errors = th.where(counts, errors, self.errors)
        return bool(counts.any())

    def restore(self) -> None:
        """Every member returns to its own."""
        with th.no_grad():
            values = [*self._kept, *self._last_shared]
            for value, parameter in zip(values, [*self._parameters, *self._shared], strict=True):
                parameter.copy_(value)


def check_termination(dynamics: Dynamics, data: Transitions) -> bool:
    """
    Compares the known termination rule with what the environment logged. Where the rule changes within the rounding of
    float32, it agrees: ``VecNormalize`` has rounded the last observation of an episode.

    :param dynamics: with a ``termination_fn``
    :param data: all real transitions, raw
    :return: whether the task ended anywhere, by one or the other: if not, the rule may still be wrong
    :raises ValueError: when they disagree about more than 1 % of the terminations
    """
    following = data.next_observations
    predicted = dynamics.terminated(data.observations, data.actions, following)
    if not (n_either := int((predicted | data.terminated).sum())):
        return False
    rounding = 1e-6 * (following.std(dim=0) + following.abs())
    nearby = [dynamics.terminated(data.observations, data.actions, following + side * rounding) for side in (1, -1)]
    wrong = th.stack([answer != data.terminated for answer in (predicted, *nearby)]).all(dim=0)
    if (n_wrong := int(wrong.sum())) > 0.01 * n_either:
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"The termination rule disagrees with the environment in {n_wrong} of {data.n_rows} transitions, "
            f"rows {wrong.nonzero().flatten()[:10].tolist()}: for row {row} it says {bool(predicted[row])}, the environment "
            f"said {bool(data.terminated[row])}, next observation {following[row].tolist()}. "
            "Pass a `termination_fn` that fits this environment. (With `handle_timeout_termination=False` a time limit counts "
            "as a termination: leave it at True.)"
        )
    return True


def fit_dynamics(
    dynamics: Dynamics,
    optimizer: th.optim.Optimizer,
    termination_optimizer: th.optim.Optimizer,
    data: Transitions,
    generator: th.Generator,
    last: FitResult | None,
) -> FitResult:
    """
    Fits the ensemble and, unless the termination rule is known, the termination head. A known rule is held against the data
    until the task has ended in them, see :func:`check_termination`.

    :param dynamics: fitted in place
    :param optimizer: of the ensemble, see :func:`make_optimizer`
    :param termination_optimizer: of the termination head
    :param data: all real transitions, raw
    :param generator: draws holdouts, bootstraps and batches
    :param last: the fit before; ``None``: there was none
    :raises ValueError: when there are fewer than ``MIN_TRANSITIONS``, or a rule contradicts them or has another shape or type
    """
    if data.n_rows < MIN_TRANSITIONS:
        raise ValueError(f"Got {data.n_rows} usable real transitions, but a fit needs {MIN_TRANSITIONS}: collect more first.")
    is_first = last is None or last.diverged
    if is_first and dynamics.reward_fn is not None:  # now, instead of after a fit of a minute
        evaluate_reward(dynamics.reward_fn, data.observations, dynamics.unscale_actions(data.actions), data.next_observations)
    rule_checked = last is not None and last.rule_checked and not is_first
    if dynamics.termination_fn is not None and not rule_checked:
        rule_checked = check_termination(dynamics, data)
    start = time.perf_counter()
    result = replace(fit_ensemble(dynamics, optimizer, data, generator, is_first), rule_checked=rule_checked)
    if dynamics.termination_fn is not None:
        return result
    precision, recall = fit_termination(dynamics, termination_optimizer, data, generator)
    return replace(result, seconds=time.perf_counter() - start, termination_precision=precision, termination_recall=recall)


def fit_ensemble(
    dynamics: Dynamics, optimizer: th.optim.Optimizer, data: Transitions, generator: th.Generator, is_first: bool
) -> FitResult:
    """
    Fits scalers and ensemble to the real transitions. Weights and Adam's state carry on from the last fit.

    Holdout, bootstrap, restored weights and elites are those of Janner et al. 2019 (their code, ``bnn.py``); so is the end
    of the fit, if ``max_gradient_steps`` is ``None``. Else its steps are counted, and as the learning rate falls to zero in
    the last of them, it can be higher in the first: they do with a fraction of the paper's steps, and do not grow with the
    data. The last weights are kept then, even if an earlier look at the holdout found a smaller error. Where a few rows that
    nobody foresees, such as collisions, make most of it, that says little, and the slow last steps make the other rows exact.

    A loss or a holdout error that is not finite ends the fit: the members return to what was kept and Adam starts anew.

    :param dynamics: fitted in place
    :param optimizer: of the ensemble, see :func:`make_optimizer`
    :param data: all real transitions, raw, at least ``MIN_TRANSITIONS``
    :param generator: draws holdout, bootstraps and batches
    :param is_first: whether the ensemble was never fitted, or its last fit diverged: which of ``max_gradient_steps`` counts
    :raises ValueError: when not even the weights that it ends with have a finite holdout error
    """
    start = time.perf_counter()
    config, ensemble = dynamics.config, dynamics.ensemble
    train, holdout = split_holdout(data, config.holdout_ratio, config.max_holdout, generator)
    dynamics.fit_scalers(train)
    inputs, targets = dynamics.scaled_inputs(train.observations, train.actions), dynamics.scaled_targets(train)
    shape = (config.ensemble_size, train.n_rows)  # of a bootstrap drawn once: members differ because their data do
    bootstrap = th.randint(train.n_rows, shape, generator=generator, device=inputs.device)

    steps_per_epoch = max(1, train.n_rows // config.batch_size)
    max_steps = config.max_gradient_steps_of(is_first)
    if max_steps is None:
        max_steps, steps_per_look = sys.maxsize, math.ceil(MIN_STEPS_PER_LOOK / steps_per_epoch) * steps_per_epoch
        kept = KeptWeights(ensemble, config.improvement)
    else:
        steps_per_look = math.ceil(max_steps / N_LOOKS)
        kept = KeptWeights(ensemble, improvement=None)  # no look is stale: the steps alone end it

    for group, decay in zip(optimizer.param_groups, (*config.layer_decays, 0.0), strict=True):
        group["weight_decay"] = decay  # a loaded optimizer has those of its file
    batches = _batches(train.n_rows, config.batch_size, generator)
    steps = stale_looks = 0
    diverged, train_nll = False, math.nan
    while stale_looks <= config.patience and steps < max_steps and not diverged:
        likelihoods = []
        for columns in itertools.islice(batches, min(steps_per_look, max_steps - steps)):
            _set_learning_rate(optimizer, config.learning_rate * min(1.0, (1 - steps / max_steps) / DECAY_SHARE))
            rows = bootstrap[:, columns]
            loss, likelihood = ensemble_loss(ensemble, inputs[rows], targets[rows], config.likelihood_beta)
            optimizer.zero_grad()
            loss.backward()
            if config.max_grad_norm is not None:
                th.nn.utils.clip_grad_norm_(ensemble.parameters(), config.max_grad_norm)
            optimizer.step()
            likelihoods.append(likelihood)
            steps += 1
        errors = _evaluate(dynamics, holdout)[0].mean(dim=1)
        diverged = not th.stack([*likelihoods, *errors]).isfinite().all()
        if not diverged:
            train_nll = th.stack(likelihoods).mean().item()
            stale_looks = 0 if kept.update(errors) else stale_looks + 1
    kept.restore()
    _set_learning_rate(optimizer, config.learning_rate)
    if diverged:
        optimizer.state.clear()

    squared_errors, prediction = _evaluate(dynamics, holdout)
    member_errors = squared_errors.mean(dim=1)
    if not member_errors.isfinite().all():
        raise ValueError(
            f"The dynamics cannot be fitted: its holdout errors are {member_errors.tolist()}. The largest real observation is "
            f"{data.observations.abs().max():.3g}, the largest reward {data.rewards.abs().max():.3g}: check their scale."
        )
    if ensemble.constant_log_var is not None:
        with th.no_grad():
            ensemble.constant_log_var.copy_(squared_errors.clamp(min=MIN_NOISE**2).log().unsqueeze(1))
        prediction = _evaluate(dynamics, holdout)[1]
    elites = th.argsort(member_errors)[: config.n_elites]
    elite_prediction = GaussianPrediction(prediction.mean[elites], prediction.std[elites])
    return FitResult(
        elites=tuple(elites.tolist()),
        holdout_mse=tuple(member_errors.tolist()),
        holdout_mse_state=squared_errors[elites, :-1].mean().item(),
        holdout_mse_reward=squared_errors[elites, -1].mean().item(),
        train_nll=train_nll,
        predicted_std=elite_prediction.std.mean().item(),
        disagreement=elite_prediction.disagreement().mean().item(),
        epochs=math.ceil(steps / steps_per_epoch),
        gradient_steps=steps,
        diverged=diverged,
        seconds=time.perf_counter() - start,
    )


def _batches(n_rows: int, batch_size: int, generator: th.Generator) -> Iterator[th.Tensor]:
    """Row numbers without end: a new random order for each epoch, cut into full batches, the rest left out."""
    while True:
        order = th.randperm(n_rows, generator=generator, device=generator.device)
        yield from order[: max(1, n_rows // batch_size) * batch_size].split(batch_size)


def _set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@th.no_grad()
def _evaluate(dynamics: Dynamics, holdout: Transitions) -> tuple[th.Tensor, GaussianPrediction]:
    """Squared errors per member and dimension, (ensemble, output_dim), and the predictions, all in scaled units."""
    mean, log_var = dynamics.ensemble(dynamics.scaled_inputs(holdout.observations, holdout.actions))
    errors = (mean - dynamics.scaled_targets(holdout)).square().mean(dim=1)
    return errors, GaussianPrediction(mean, (0.5 * log_var).exp())


def fit_termination(
    dynamics: Dynamics, optimizer: th.optim.Optimizer, data: Transitions, generator: th.Generator
) -> tuple[float, float]:
    """
    Fits the termination head on batches that are half terminations. The head's scaling is the ensemble's, so fit that
    first. Data without a termination leave it as it is; where every step ended, it says "always".

    :param dynamics: fitted in place
    :param optimizer: of ``dynamics.termination_head``
    :param data: all real transitions, raw
    :param generator: draws holdout and batches
    :return: precision and recall on the holdout; NaN where nothing was predicted, or nothing was there
    """
    head, config = dynamics.termination_head, dynamics.config
    train, holdout = split_holdout(data, config.holdout_ratio, config.max_holdout, generator)
    inputs = dynamics.termination_inputs(train.observations, train.actions, train.next_observations)
    ended, others = inputs[train.terminated], inputs[~train.terminated]
    if len(ended) and len(others):
        labels = th.cat((th.ones(TERMINATION_ROWS), th.zeros(TERMINATION_ROWS))).to(inputs.device)
        for _ in range(TERMINATION_STEPS):
            half_batches = [
                rows[th.randint(len(rows), (TERMINATION_ROWS,), generator=generator, device=rows.device)]
                for rows in (ended, others)
            ]
            loss = F.binary_cross_entropy_with_logits(head(th.cat(half_batches)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        head.log_prior_odds.fill_(th.tensor(len(ended) / len(others)).log().item())
    elif len(ended):
        head.log_prior_odds.fill_(math.inf)
    with th.no_grad():
        inputs = dynamics.termination_inputs(holdout.observations, holdout.actions, holdout.next_observations)
        predicted = head.terminated(inputs)
    correct = (predicted & holdout.terminated).sum().item()
    return (
        correct / predicted.sum().item() if predicted.any() else float("nan"),
        correct / holdout.terminated.sum().item() if holdout.terminated.any() else float("nan"),
    )
