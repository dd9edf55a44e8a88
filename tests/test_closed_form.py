import copy
import math

import pytest
import torch as th
from conftest import ACTIVE, LineEnv, NoiseEnv
from stable_baselines3 import SAC
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn

from sb3_mbpo import MBPO
from sb3_mbpo.closed_form import ClosedForm, covers

ALPHA = th.tensor([0.3])


class OwnActor(Actor):
    pass


class OwnCritic(ContinuousCritic):
    pass


class PolicyOfOwnActor(SACPolicy):
    def make_actor(self, features_extractor=None):
        return OwnActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)


class PolicyOfOwnCritic(SACPolicy):
    def make_critic(self, features_extractor=None):
        return OwnCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class OwnExtractor(FlattenExtractor):
    pass


def make_model(env=None, policy="MlpPolicy", **kwargs) -> SAC:
    return SAC(policy, env or NoiseEnv(), seed=0, buffer_size=100, device="cpu", **kwargs)


NOT_COVERED = {
    "gSDE": dict(use_sde=True),
    "gSDE with free means": dict(use_sde=True, policy_kwargs=dict(clip_mean=0.0)),
    "tanh": dict(policy_kwargs=dict(activation_fn=nn.Tanh)),
    "leaky ReLU": dict(policy_kwargs=dict(activation_fn=nn.LeakyReLU)),
    "extractor": dict(policy_kwargs=dict(features_extractor_class=OwnExtractor)),
    "actor": dict(policy=PolicyOfOwnActor),
    "critic": dict(policy=PolicyOfOwnCritic),
    "dict": dict(policy="MultiInputPolicy", env=LineEnv(dict_observation=True)),
}


@pytest.mark.parametrize(
    "kwargs",
    [{}, dict(policy_kwargs=dict(net_arch=[])), dict(policy_kwargs=dict(n_critics=3)), dict(env=NoiseEnv((2, 3), 4))],
    ids=["default", "linear", "3 critics", "observations of two dimensions"],
)
def test_covers_sb3s_usual_networks(kwargs):
    assert covers(make_model(**kwargs))


@pytest.mark.parametrize("kwargs", NOT_COVERED.values(), ids=NOT_COVERED.keys())
def test_does_not_cover_other_networks(kwargs):
    assert not covers(make_model(**kwargs))


@pytest.mark.parametrize("name", ["latent_pi.0.weight", "latent_pi.2.bias", "mu.bias", "log_std.weight"])
def test_does_not_cover_a_frozen_actor(name):
    model = make_model()
    model.actor.get_parameter(name).requires_grad_(False)
    assert not covers(model)


@pytest.mark.parametrize("name", ["qf0.0.weight", "qf1.4.bias"])
def test_does_not_cover_a_frozen_critic(name):
    model = make_model()
    model.critic.get_parameter(name).requires_grad_(False)
    assert not covers(model)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
HOOKED = ["actor", "actor.latent_pi.2", "actor.mu", "actor.features_extractor", "critic.qf1.1", "critic_target.qf0.4"]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", HOOKED)
def test_does_not_cover_hooked_modules(name, kind):
    model = make_model()
    getattr(model.policy.get_submodule(name), f"register_{kind}")(lambda *args: None)
    assert not covers(model)


def test_does_not_cover_hooked_parameters():
    hooks = [th.Tensor.register_hook, th.Tensor.register_post_accumulate_grad_hook]
    for register in hooks:
        model = make_model()
        register(model.actor.mu.weight, lambda gradient: None)
        assert not covers(model)


def test_does_not_cover_a_value_that_is_never_negative():
    model = make_model()
    model.critic.q_networks[0].append(nn.ReLU())
    assert not covers(model)


def test_does_not_cover_layers_without_bias():
    model = make_model()
    model.actor.mu.register_parameter("bias", None)
    assert not covers(model)


@pytest.mark.parametrize("part", ["actor", "critic", "critic_target"])
def test_does_not_cover_float64(part):
    model = make_model()
    getattr(model, part).double()
    assert not covers(model)


@pytest.mark.parametrize("part", ["actor.latent_pi", "critic.qf0", "critic_target.qf1"])
def test_does_not_cover_added_layers(part):
    model = make_model()
    model.policy.get_submodule(part)[1] = nn.Sequential(nn.ReLU(), nn.Dropout())
    assert not covers(model)


@pytest.mark.parametrize("kwargs", [{}, *NOT_COVERED.values()], ids=["default", *NOT_COVERED.keys()])
def test_mbpo_trains_any_network(kwargs):
    model = MBPO(**dict(policy="MlpPolicy", env=LineEnv()) | kwargs, **ACTIVE, batch_size=16, seed=0, device="cpu")
    assert covers(model) == (not kwargs)
    model.learn(41)
    start = copy.deepcopy(model.policy.state_dict())
    model.learn(10, reset_num_timesteps=False)
    assert model.logger.name_to_value["train/real_ratio"] < 1
    assert not any(th.equal(parameter, start[name]) for name, parameter in model.policy.named_parameters())


def fixed_noise(monkeypatch, noise: th.Tensor) -> None:
    def randn_like(values):
        assert values.shape == noise.shape
        return noise.clone()

    monkeypatch.setattr(th, "randn_like", randn_like)


class Formulas:
    """SAC's losses written down in float64, from the model's weights and given noise."""

    def __init__(self, model: SAC, observations: th.Tensor, noise: th.Tensor) -> None:
        self.policy = copy.deepcopy(model.policy).double()
        self.observations, self.noise = observations.flatten(1).double(), noise.double()

    def draw(self) -> tuple[th.Tensor, th.Tensor]:
        """Actions, and their log-probability by the change of variables."""
        actor = self.policy.actor
        hidden = self.observations
        for layer in actor.latent_pi:
            hidden = layer(hidden)
        std = actor.log_std(hidden).clamp(-20, 2).exp()
        actions = th.tanh(actor.mu(hidden) + std * self.noise)
        density = th.exp(-(self.noise**2) / 2) / (std * math.sqrt(2 * math.pi)) / (1 - actions**2 + 1e-6)
        return actions, density.log().sum(dim=1)

    def values(self, critic: nn.Module, actions: th.Tensor) -> th.Tensor:
        inputs = th.cat((self.observations, actions), dim=1)
        return th.stack([network(inputs).squeeze(1) for network in critic.q_networks])

    def critic_loss(self, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        values = self.values(self.policy.critic, actions.double())
        return 0.5 * ((values - targets.double().squeeze(1)) ** 2).mean(dim=1).sum()

    def actor_loss(self) -> th.Tensor:
        actions, log_prob = self.draw()
        return (ALPHA.double() * log_prob - self.values(self.policy.critic, actions).amin(dim=0)).mean()


CASES = {
    "default": dict(rows=64),
    "Hopper": dict(env=NoiseEnv((11,), 3), rows=256),
    "wide and narrow": dict(env=NoiseEnv((5,), 2), policy_kwargs=dict(net_arch=dict(pi=[24], qf=[48, 16])), rows=40),
    "one hidden layer": dict(policy_kwargs=dict(net_arch=[32]), rows=17),
    "linear": dict(env=NoiseEnv((4,), 2), policy_kwargs=dict(net_arch=[]), rows=40),
    "3 critics": dict(env=NoiseEnv((2, 3), 2), policy_kwargs=dict(net_arch=[20, 20], n_critics=3), rows=50),
    "1 critic": dict(policy_kwargs=dict(net_arch=[20], n_critics=1), rows=20),
    "one row": dict(env=NoiseEnv((4,), 2), policy_kwargs=dict(net_arch=[8, 8]), rows=1),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, generator, monkeypatch):
    """A model with biases, its formulas, and a batch."""
    kwargs = dict(request.param)
    rows = kwargs.pop("rows")
    return make_case(kwargs, rows, generator, monkeypatch)


def make_case(kwargs, rows, generator, monkeypatch):
    model = make_model(**kwargs)
    for name, parameter in model.policy.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    observations = th.randn(rows, *model.observation_space.shape, generator=generator)
    shape = (rows, *model.action_space.shape)
    noise, actions = 0.8 * th.randn(shape, generator=generator), th.rand(shape, generator=generator) * 2 - 1
    targets = th.randn(rows, 1, generator=generator)
    fixed_noise(monkeypatch, noise)
    formulas = Formulas(model, observations, noise)
    with th.no_grad():  # each critic has the lowest value in some rows
        values = formulas.values(formulas.policy.critic, formulas.draw()[0])
        for network, mean in zip(model.critic.q_networks, values.mean(dim=1), strict=True):
            network[-1].bias -= mean
    return model, Formulas(model, observations, noise), observations, actions, targets


def assert_gradients_equal(got: nn.Module, expected: nn.Module) -> None:
    for (name, parameter), reference in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert parameter.grad.shape == parameter.shape and parameter.grad.is_contiguous(), name
        scale = reference.grad.abs().max().item()
        th.testing.assert_close(
            parameter.grad.double(),
            reference.grad,
            rtol=1e-4,
            atol=1e-5 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_draw_equals_the_formulas(case):
    model, formulas, observations, _, _ = case
    draw = ClosedForm(model).act(observations)
    actions, log_prob = formulas.draw()
    th.testing.assert_close(draw.actions.double(), actions, rtol=1e-5, atol=1e-5)
    th.testing.assert_close(draw.log_prob.double(), log_prob.unsqueeze(1), rtol=1e-4, atol=1e-4)


def test_target_value_is_the_lowest_of_the_target_networks(case, generator):
    model, formulas, observations, actions, _ = case
    for target in (model.critic_target, formulas.policy.critic_target):
        th.nn.utils.vector_to_parameters(
            th.linspace(-0.5, 0.4, sum(p.numel() for p in target.parameters())), target.parameters()
        )
    expected = formulas.values(formulas.policy.critic_target.double(), actions.double()).amin(dim=0)
    got = ClosedForm(model).target_values(observations, actions)
    th.testing.assert_close(got.double(), expected.unsqueeze(1), rtol=1e-4, atol=1e-3)


def test_critic_gradients_equal_autograds(case):
    model, formulas, observations, actions, targets = case
    for _ in range(2):  # gradients do not add up
        loss = ClosedForm(model).set_critic_gradients(observations, actions, targets)
    expected = formulas.critic_loss(actions, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_equal(model.critic, formulas.policy.critic)
    assert all(parameter.grad is None for parameter in [*model.actor.parameters(), *model.critic_target.parameters()])


def test_actor_gradients_equal_autograds(case):
    model, formulas, observations, _, _ = case
    lowest = formulas.values(formulas.policy.critic, formulas.draw()[0]).argmin(dim=0)
    assert len(lowest) == 1 or len(lowest.unique()) == len(model.critic.q_networks)
    networks = ClosedForm(model)
    for _ in range(2):
        loss = networks.set_actor_gradients(observations, networks.act(observations), ALPHA)
    expected = formulas.actor_loss()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    assert_gradients_equal(model.actor, formulas.policy.actor)
    assert all(parameter.grad is None for parameter in model.critic.parameters())


@pytest.mark.parametrize("bound, sign", [(2.0, 1), (-20.0, -1)], ids=["upper", "lower"])
def test_clipped_log_std_has_no_gradient(bound, sign, generator, monkeypatch):
    kwargs = dict(env=NoiseEnv((4,), 2), policy_kwargs=dict(net_arch=[32, 32]))
    model, _, observations, _, _ = make_case(kwargs, 64, generator, monkeypatch)
    noise = 0.05 * th.randn(64, 2, generator=generator)
    fixed_noise(monkeypatch, noise)
    with th.no_grad():
        model.actor.log_std.weight.mul_(10)
        model.actor.log_std.bias += bound - model.actor.log_std(model.actor.latent_pi(observations)).mean(dim=0)
    formulas = Formulas(model, observations, noise)
    networks = ClosedForm(model)
    draw = networks.act(observations)
    raw = formulas.policy.actor.log_std(formulas.policy.actor.latent_pi(observations.double()))
    assert th.equal(draw.std_is_free, sign * raw <= sign * bound)
    assert 0.2 < draw.std_is_free.float().mean() < 0.8

    loss = networks.set_actor_gradients(observations, draw, ALPHA)
    expected = formulas.actor_loss()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_equal(model.actor, formulas.policy.actor)


def test_gradients_equal_finite_differences(generator, monkeypatch):
    kwargs = dict(env=NoiseEnv((3,), 2), policy_kwargs=dict(net_arch=[4, 3]))
    model, formulas, observations, actions, targets = make_case(kwargs, 10, generator, monkeypatch)
    networks = ClosedForm(model)
    networks.set_critic_gradients(observations, actions, targets)
    networks.set_actor_gradients(observations, networks.act(observations), ALPHA)
    with th.no_grad():
        for trained, twin, loss in [
            (model.critic, formulas.policy.critic, lambda: formulas.critic_loss(actions, targets)),
            (model.actor, formulas.policy.actor, formulas.actor_loss),
        ]:
            for parameter, moved in zip(trained.parameters(), twin.parameters(), strict=True):
                slopes = th.empty_like(moved)
                for index in range(moved.numel()):
                    center = moved.view(-1)[index].item()
                    losses = []
                    for offset in (1e-6, -1e-6):
                        moved.view(-1)[index] = center + offset
                        losses.append(loss())
                    moved.view(-1)[index] = center
                    slopes.view(-1)[index] = (losses[0] - losses[1]) / 2e-6
                th.testing.assert_close(parameter.grad.double(), slopes, rtol=1e-3, atol=1e-5)


def test_drawing_ahead_splits_what_one_draw_gives(generator, monkeypatch):
    model = make_model(env=NoiseEnv((4,), 2))
    batches = [th.randn(rows, 4, generator=generator) for rows in (5, 20, 7)]
    noise = th.randn(32, 2, generator=generator)
    fixed_noise(monkeypatch, noise)
    drawn = list(ClosedForm(model).act_ahead(batches))
    assert len(drawn) == 3
    for batch, part, (actions, log_prob) in zip(batches, noise.split([5, 20, 7]), drawn, strict=True):
        expected_actions, expected_log_prob = Formulas(model, batch, part).draw()
        th.testing.assert_close(actions.double(), expected_actions, rtol=1e-5, atol=1e-5)
        th.testing.assert_close(log_prob.double(), expected_log_prob.unsqueeze(1), rtol=1e-4, atol=1e-4)
