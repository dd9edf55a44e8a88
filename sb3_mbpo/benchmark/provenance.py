"""What a measurement was made with."""

import platform
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sb3_mbpo import __version__

PACKAGES = ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "mujoco", "numpy")


def processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python's and those of the packages that are installed."""
    found = {"Python": platform.python_version(), "sb3_mbpo": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an optional one
            continue
    return found


def commit() -> str | None:
    """The commit of this package's checkout, with ``+`` if files have changed since; ``None`` when it is no checkout."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", Path(__file__).name])  # or we lie in somebody else's checkout
        return git(["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
