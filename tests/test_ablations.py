"""Each variant of DHMBPO that the ablations compare is what it is called, and all of them train."""

from pathlib import Path

import ablations
import pytest
import torch as th
from conftest import ACTIVE, LineEnv
from torch import nn

from sb3_mbpo import DHMBPO
from sb3_mbpo.benchmark.suite import load_suite

SUITE = Path(__file__).with_name("ablations.yml")


def learn(variant: type[DHMBPO], steps: int = 60) -> DHMBPO:
    settings = ACTIVE | dict(seed=0, device="cpu", policy_kwargs=dict(net_arch=[16, 16]), rollout_length=4)
    return variant("MlpPolicy", LineEnv(), **settings).learn(steps)


def has_layer_norm(model: DHMBPO) -> bool:
    return any(isinstance(part, nn.LayerNorm) for part in model.critic.modules())


def test_the_suite_has_three_seeds_of_every_variant():
    runs = load_suite(SUITE)
    variants = {f"ablations.{name}" for name in vars(ablations) if issubclass_of_dhmbpo(name)}
    assert variants and variants <= {run.class_name for run in runs}
    assert len(runs) == 3 * len({run.algorithm for run in runs})


def issubclass_of_dhmbpo(name: str) -> bool:
    found = getattr(ablations, name)
    return isinstance(found, type) and issubclass(found, DHMBPO) and found is not DHMBPO


def test_plain_critics_have_no_layer_normalisation():
    assert has_layer_norm(learn(DHMBPO)) and not has_layer_norm(learn(ablations.PlainCritics))


@pytest.mark.parametrize("variant, forgets", [(DHMBPO, False), (ablations.RenewedOptimizers, True)])
def test_new_optimizers_have_no_memory_after_a_fit(variant, forgets):
    model = learn(variant)
    optimizers = (model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer)
    assert all(optimizer.state for optimizer in optimizers)
    model.fit_dynamics()
    assert all((not optimizer.state) == forgets for optimizer in optimizers)


@pytest.mark.parametrize("variant, passes", [(DHMBPO, True), (ablations.WithoutModelGradient, False)])
def test_no_gradient_passes_where_none_should(variant, passes):
    model = learn(variant)
    observations = th.zeros(8, 1)
    actions = th.zeros(8, 1, requires_grad=True)
    members = th.zeros(8, dtype=th.long)
    step = model.dynamics.step(observations, actions, members, model._generator)
    assert step.next_observations.requires_grad == step.rewards.requires_grad == passes


def test_without_model_gradient_the_actor_learns_at_the_last_states_only():
    """As if the policy had drawn all actions but the last without recording them."""
    model, twin, usual = (learn(ablations.WithoutModelGradient) for _ in range(3))
    draw, n_draws = twin.draw_actions, 0

    def draw_last_recorded(observations: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        nonlocal n_draws
        n_draws += 1
        with th.set_grad_enabled(n_draws > twin.gradient_horizon):
            return draw(observations)

    twin.draw_actions = draw_last_recorded
    for learner, train in ((model, model.train), (twin, DHMBPO.train.__get__(twin)), (usual, DHMBPO.train.__get__(usual))):
        learner._critic_updates_due = 0
        th.manual_seed(0)
        train(1, 16)
    assert n_draws == twin.gradient_horizon + 1
    gradients, of_twin, of_usual = (th.cat([p.grad.flatten() for p in m.actor.parameters()]) for m in (model, twin, usual))
    assert gradients.any()
    th.testing.assert_close(gradients, of_twin, rtol=1e-4, atol=1e-7)
    assert not th.allclose(gradients, of_usual, rtol=0.1)


@pytest.mark.parametrize("limit, some", [(1e-6, False), (1e6, True)])
def test_long_rollouts_end_at_disagreement_and_short_ones_do_not(limit, some, monkeypatch):
    model = learn(ablations.EndsAtDisagreement)
    monkeypatch.setattr(ablations.EndsAtDisagreement, "LIMIT", limit)
    rows = model.imagine()
    assert rows == (0 if not some else model.rollout_batch_size * model.rollout_length)
    observations = th.zeros(8, 1)
    step = model.dynamics.step(observations, observations, th.zeros(8, dtype=th.long), model._generator)
    assert model.dynamics.near_data(step.next_observations).all()
