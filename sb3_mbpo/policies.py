"""DHMBPO's policies: SB3's, with critics that stay steady where targets come from imagined steps."""

from typing import Any, cast

from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.sac import policies as sac_policies
from torch import nn


class LayerNormCritic(ContinuousCritic):
    """
    SB3's, with a layer normalisation without parameters after each activation, and with last layers that begin at zero, as in
    the code of Kubo et al. 2025 (arXiv 2512.15439).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for network in self.q_networks:
            assert isinstance(network, nn.Sequential)
            for place in range(len(network) - 2, 0, -2):
                width = cast(nn.Linear, network[place - 1]).out_features
                network.insert(place + 1, nn.LayerNorm(width, elementwise_affine=False))
            for parameter in network[-1].parameters():
                nn.init.zeros_(parameter)


class MlpPolicy(sac_policies.SACPolicy):
    """SB3's, with :class:`LayerNormCritic`. The actor has no normalisation."""

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> LayerNormCritic:
        return LayerNormCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class MultiInputPolicy(MlpPolicy, sac_policies.MultiInputPolicy):
    """The same for observations of several parts."""
