"""Model-based policy optimization as a drop-in for Stable-Baselines3."""

from sb3_mbpo.dhmbpo import DHMBPO
from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.rules import takes_tensors

__version__ = "0.1.0"

__all__ = ["DHMBPO", "MBPO", "takes_tensors"]
