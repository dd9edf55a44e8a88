import copy

import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure

from sb3_mbpo.update import sac_updates


class Replayed(ReplayBuffer):
    """Hands out the same batches again."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def sample(self, batch_size, env=None):
        return next(self.batches)


def parameters(model: SAC) -> list[th.Tensor]:
    tensors = [*model.policy.parameters()]
    return tensors + ([model.log_ent_coef] if model.log_ent_coef is not None else [])


def twins(**kwargs) -> tuple[SAC, SAC, list]:
    """Two models of the same weights, and 50 batches."""
    models = []
    for _ in range(2):
        model = SAC("MlpPolicy", "Pendulum-v1", seed=0, learning_starts=10, batch_size=64, device="cpu", **kwargs)
        model.learn(60)
        model.set_logger(configure(None, []))
        model._current_progress_remaining = 0.5
        model.policy.set_training_mode(False)
        models.append(model)
    batches = [models[0].replay_buffer.sample(64) for _ in range(50)]
    return models[0], models[1], batches


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(ent_coef=0.2),
        dict(target_update_interval=3, tau=0.1),
        dict(use_sde=True),
        dict(policy_kwargs=dict(n_critics=3, share_features_extractor=True)),
        dict(n_steps=3),
        dict(learning_rate=lambda progress: 1e-2 * progress),
    ],
    ids=["default", "fixed ent_coef", "target update", "gSDE", "3 critics", "n-step", "lr schedule"],
)
def test_fifty_updates_equal_sb3s_own(kwargs):
    """The same batches and the same noise give the same parameters, optimizer states and logged losses."""
    reference, ours, batches = twins(**kwargs)
    start = copy.deepcopy(parameters(ours))
    reference.replay_buffer = Replayed(batches)
    th.manual_seed(1)
    reference.train(gradient_steps=50, batch_size=64)
    th.manual_seed(1)
    losses = sac_updates(ours, batches, policy_delay=1)

    for expected, got in zip(parameters(reference), parameters(ours), strict=True):
        th.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert any((got - initial).abs().max() > 1e-3 for got, initial in zip(parameters(ours), start, strict=True))
    assert ours._n_updates == reference._n_updates
    assert ours.actor.training and ours.critic.training
    for name, value in losses.items():
        assert value == pytest.approx(reference.logger.name_to_value[f"train/{name}"], rel=1e-4)
    for optimizer in ("actor", "critic"):
        expected = getattr(reference, optimizer).optimizer.state_dict()["state"]
        got = getattr(ours, optimizer).optimizer.state_dict()["state"]
        for index in expected:
            th.testing.assert_close(got[index]["exp_avg_sq"], expected[index]["exp_avg_sq"], rtol=1e-3, atol=1e-7)


def test_policy_delay_updates_the_actor_at_every_nth_critic_update():
    _, ours, batches = twins()
    ours._n_updates = 0
    counts = {"actor": 0, "critic": 0, "entropy": 0}
    for name, optimizer in [
        ("actor", ours.actor.optimizer),
        ("critic", ours.critic.optimizer),
        ("entropy", ours.ent_coef_optimizer),
    ]:
        step = optimizer.step
        optimizer.step = lambda *args, name=name, step=step: (counts.update({name: counts[name] + 1}), step(*args))[1]
    sac_updates(ours, batches[:25], policy_delay=10)
    assert counts == {"actor": 3, "critic": 25, "entropy": 3}  # updates 0, 10 and 20
    sac_updates(ours, batches[25:30], policy_delay=10)
    assert counts == {"actor": 3, "critic": 30, "entropy": 3}  # the count goes on from call to call
    sac_updates(ours, batches[30:31], policy_delay=10)
    assert counts == {"actor": 4, "critic": 31, "entropy": 4}
