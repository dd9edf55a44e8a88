import copy

import pytest
import torch as th
from conftest import NoiseEnv
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import polyak_update
from torch import nn

from sb3_mbpo.closed_form import covers
from sb3_mbpo.update import fuse, sac_updates


class Replayed(ReplayBuffer):
    """Hands out the same batches again."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def sample(self, batch_size, env=None):
        return next(self.batches)


def parameters(model: SAC) -> list[th.Tensor]:
    tensors = [*model.policy.parameters()]
    return tensors + ([model.log_ent_coef] if model.log_ent_coef is not None else [])


def twins(n_models: int = 2, device: str = "cpu", env=None, prepare=None, batch_size: int = 64, **kwargs) -> tuple[list, list]:
    """Models of the same weights, and 50 batches."""
    models = []
    for _ in range(n_models):
        env_twin = "Pendulum-v1" if env is None else copy.deepcopy(env)
        model = SAC("MlpPolicy", env_twin, seed=0, learning_starts=10, batch_size=64, device=device, **kwargs)
        model.learn(60)
        model.set_logger(configure(None, []))
        model._current_progress_remaining = 0.5
        model.policy.set_training_mode(False)
        if prepare is not None:
            prepare(model)
        models.append(model)
    return models, [models[0].replay_buffer.sample(batch_size) for _ in range(50)]


def widen_noise(model: SAC) -> None:
    """The actor's raw log_std lies above SB3's upper bound of 2 in some rows, and below it in others."""
    observations = model.replay_buffer.sample(500).observations
    with th.no_grad():
        model.actor.log_std.weight *= 5
        raw = model.actor.log_std(model.actor.latent_pi(observations))
        model.actor.log_std.bias += 2 - raw.mean()
        raw = model.actor.log_std(model.actor.latent_pi(observations))
    assert 0.2 < (raw > 2).float().mean() < 0.8


COVERED = {
    "default": {},
    "fixed ent_coef": dict(ent_coef=0.2),
    "target update": dict(target_update_interval=3, tau=0.1),
    "3 critics": dict(policy_kwargs=dict(n_critics=3, share_features_extractor=True)),
    "n-step": dict(n_steps=3),
    "lr schedule": dict(learning_rate=lambda progress: 1e-2 * progress),
    "Hopper": dict(env=NoiseEnv((11,), 3), batch_size=256),
    "observations of two dimensions": dict(env=NoiseEnv((2, 3), 2)),
    "one hidden layer": dict(policy_kwargs=dict(net_arch=[32])),
    "own layers": dict(policy_kwargs=dict(net_arch=dict(pi=[24], qf=[48, 16]))),
    "linear": dict(policy_kwargs=dict(net_arch=[])),
    "clipped log_std": dict(env=NoiseEnv((4,), 2), prepare=widen_noise),
}
NOT_COVERED = {
    "gSDE": dict(use_sde=True),
    "tanh": dict(policy_kwargs=dict(activation_fn=nn.Tanh)),
    "RMSprop and tanh": dict(policy_kwargs=dict(activation_fn=nn.Tanh, optimizer_class=th.optim.RMSprop)),
}


def assert_updates_equal_sb3s_own(forced, is_covered, kwargs, monkeypatch):
    (reference, ours), batches = twins(**kwargs)
    assert covers(ours) == is_covered
    if forced:
        monkeypatch.setattr("sb3_mbpo.update.covers", lambda model: False)
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
    names = {"actor_loss", "critic_loss", "ent_coef"} | ({"ent_coef_loss"} if ours.log_ent_coef is not None else set())
    assert set(losses) == names
    for name, value in losses.items():
        assert value == pytest.approx(reference.logger.name_to_value[f"train/{name}"], rel=1e-4)
    for optimizer in ("actor", "critic"):
        expected = getattr(reference, optimizer).optimizer.state_dict()["state"]
        got = getattr(ours, optimizer).optimizer.state_dict()["state"]
        assert expected.keys() == got.keys()
        for index in expected:
            name = "exp_avg_sq" if "exp_avg_sq" in expected[index] else "square_avg"
            th.testing.assert_close(got[index][name], expected[index][name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("forced", [False, True], ids=["closed form", "autograd"])
@pytest.mark.parametrize("kwargs", COVERED.values(), ids=COVERED.keys())
def test_fifty_updates_equal_sb3s_own(kwargs, forced, monkeypatch):
    """The same batches and the same noise give the same parameters, optimizer states and logged losses."""
    assert_updates_equal_sb3s_own(forced, True, kwargs, monkeypatch)


@pytest.mark.parametrize("kwargs", NOT_COVERED.values(), ids=NOT_COVERED.keys())
def test_fifty_updates_of_other_networks_equal_sb3s_own(kwargs, monkeypatch):
    assert_updates_equal_sb3s_own(False, False, kwargs, monkeypatch)


def test_policy_delay_updates_the_actor_at_every_nth_critic_update():
    (ours,), batches = twins(1)
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


def slow_updates(model: SAC, batches: list, policy_delay: int) -> None:
    """SB3's ``SAC.train``, but the actor and the entropy coefficient at every ``policy_delay``-th update only."""
    for batch in batches:
        actions, log_prob = model.actor.action_log_prob(batch.observations)
        log_prob = log_prob.reshape(-1, 1)
        alpha = model.log_ent_coef.detach().exp()
        with th.no_grad():
            next_actions, next_log_prob = model.actor.action_log_prob(batch.next_observations)
            values = th.cat(model.critic_target(batch.next_observations, next_actions), dim=1).amin(dim=1, keepdim=True)
            values -= alpha * next_log_prob.reshape(-1, 1)
            targets = batch.rewards + (1 - batch.dones) * model.gamma * values
        critic_loss = sum(nn.MSELoss()(value, targets) for value in model.critic(batch.observations, batch.actions)) / 2
        model.critic.optimizer.zero_grad()
        critic_loss.backward()
        model.critic.optimizer.step()
        if model._n_updates % policy_delay == 0:
            lowest = th.cat(model.critic(batch.observations, actions), dim=1).amin(dim=1, keepdim=True)
            ent_coef_loss = -(model.log_ent_coef * (log_prob.detach() + model.target_entropy)).mean()
            for optimizer, loss in [
                (model.ent_coef_optimizer, ent_coef_loss),
                (model.actor.optimizer, (alpha * log_prob - lowest).mean()),
            ]:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        polyak_update(model.critic.parameters(), model.critic_target.parameters(), model.tau)
        model._n_updates += 1


@pytest.mark.parametrize("n_updates", [0, 1, 2])
@pytest.mark.parametrize("calls", [[7], [2, 4, 1], [1] * 7, [3, 3, 1]], ids=str)
@pytest.mark.parametrize("forced", [False, True], ids=["closed form", "autograd"])
def test_delayed_policy_is_the_one_in_force_at_each_update(forced, calls, n_updates, monkeypatch):
    (reference, ours), batches = twins(
        env=NoiseEnv((4,), 2), policy_kwargs=dict(net_arch=[32, 32]), learning_rate=1e-2, tau=0.1
    )
    if forced:
        monkeypatch.setattr("sb3_mbpo.update.covers", lambda model: False)
    # the same noise in each draw, whoever draws how many rows
    monkeypatch.setattr(th, "randn_like", lambda values: th.full_like(values, 0.7))
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda shape, **kwargs: th.full(shape, 0.7))
    start = [parameter.clone() for parameter in ours.actor.parameters()]
    ours._n_updates = reference._n_updates = n_updates
    slow_updates(reference, batches[:7], policy_delay=3)
    remaining = iter(batches)
    for n_batches in calls:
        sac_updates(ours, [next(remaining) for _ in range(n_batches)], policy_delay=3)

    assert ours._n_updates == n_updates + 7
    assert all((got - initial).abs().max() > 1e-2 for got, initial in zip(ours.actor.parameters(), start, strict=True))
    for expected, got in zip(parameters(reference), parameters(ours), strict=True):
        th.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy_delay", [1, 2, 5])
def test_each_delayed_draw_has_noise_of_its_own(policy_delay, monkeypatch):
    """10 updates from the start draw for 10 next batches, and for the actor's own; no draw is used twice."""
    (ours,), batches = twins(1, env=NoiseEnv((4,), 2))
    ours._n_updates, rows, randn_like = 0, [], th.randn_like

    def counted(values):
        rows.append(randn_like(values))
        return rows[-1]

    monkeypatch.setattr(th, "randn_like", counted)
    sac_updates(ours, batches[:10], policy_delay)
    noise = th.cat(rows)
    assert len(noise) == 64 * (10 + -(-10 // policy_delay))
    assert len(noise.unique(dim=0)) == len(noise)  # single numbers may meet by chance


@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.AdamW])
def test_updates_fuse_all_optimizers(optimizer_class):
    (ours,), batches = twins(1, policy_kwargs=dict(optimizer_class=optimizer_class))
    sac_updates(ours, batches[:1], policy_delay=1)
    for optimizer in (ours.actor.optimizer, ours.critic.optimizer, ours.ent_coef_optimizer):
        assert [group["fused"] for group in optimizer.param_groups] == [True]


def test_fusing_leaves_an_optimizer_as_its_user_chose_it():
    weights = [nn.Parameter(th.ones(3))]
    for optimizer in (
        th.optim.Adam(weights, foreach=True),
        th.optim.Adam(weights, fused=False),
        th.optim.Adam(weights, differentiable=True),
        th.optim.RMSprop(weights),
        th.optim.Adam([nn.Parameter(th.ones(3, device="meta"))]),
    ):
        before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        fuse(optimizer)
        assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == before


def test_fusing_decides_for_each_group():
    groups = [dict(params=[nn.Parameter(th.ones(3))]), dict(params=[nn.Parameter(th.ones(2))], foreach=True)]
    optimizer = th.optim.Adam(groups)
    fuse(optimizer)
    assert [group["fused"] for group in optimizer.param_groups] == [True, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: th.optim.Adam(weights, lr=1e-2),
        lambda weights: th.optim.AdamW(weights, lr=1e-2, amsgrad=True),
        lambda weights: th.optim.SGD(weights, lr=1e-2, momentum=0.9),
    ],
    ids=["Adam", "AdamW", "SGD"],
)
def test_fused_optimizer_goes_on_where_it_was(make, generator):
    weights = [[nn.Parameter(th.linspace(-1, 1, 40).view(5, 8)), nn.Parameter(th.zeros(7))] for _ in range(2)]
    optimizers = [make(twin) for twin in weights]
    for step in range(20):
        if step == 10:
            fuse(optimizers[1])
            assert optimizers[1].param_groups[0]["fused"] and not optimizers[0].param_groups[0]["fused"]
            loaded = make(weights[1])
            loaded.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
            optimizers[1] = loaded
        gradients = [th.randn(weight.shape, generator=generator) for weight in weights[0]]
        for twin, optimizer in zip(weights, optimizers, strict=True):
            for weight, gradient in zip(twin, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for expected, got in zip(*weights, strict=True):
        th.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    for index, state in optimizers[0].state_dict()["state"].items():
        th.testing.assert_close(optimizers[1].state_dict()["state"][index], state, rtol=1e-5, atol=1e-6)


class Unsynchronised(list):
    """Batches between whose first and last the CPU may not wait for the GPU."""

    def __iter__(self):
        th.cuda.set_sync_debug_mode("error")
        try:
            yield from super().__iter__()
        finally:
            th.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU, named by CUDA_VISIBLE_DEVICES")
@pytest.mark.parametrize("policy_delay", [1, 3])
@pytest.mark.parametrize("kwargs", [{}, dict(ent_coef=0.2), dict(n_steps=3)], ids=["default", "fixed ent_coef", "n-step"])
def test_updates_on_a_gpu_do_not_wait_for_it(kwargs, policy_delay):
    (ours,), batches = twins(1, device="cuda", **kwargs)
    sac_updates(ours, Unsynchronised(batches), policy_delay)
    assert th.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize("by_autograd", [False, True])
def test_losses_that_are_no_numbers_are_an_error(by_autograd, monkeypatch):
    (ours,), batches = twins(1)
    if by_autograd:
        monkeypatch.setattr("sb3_mbpo.update.covers", lambda model: False)
    with th.no_grad():
        ours.actor.mu.weight.fill_(th.nan)
    with pytest.raises(ValueError, match=r"losses are no numbers any more.*nan.*Go back to a saved model"):
        sac_updates(ours, batches[:2], policy_delay=1)
    assert th.distributions.Distribution._validate_args  # as it was before
