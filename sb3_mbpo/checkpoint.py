"""
Checkpoints: saved, found again and loaded.

A folder holds the checkpoints of one run. Each is a small JSON file that names its blobs; the blobs lie in ``blobs`` and
are shared, so a new checkpoint writes only what is new. JSON and plain numbers: reading them runs no code. The one exception
is the blob with the model, a zip file as SB3's ``save`` writes it, which follows SB3's own rules.
"""

import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv

from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.run_state import blob_names, collect, episodes_begin, restore
from sb3_mbpo.storage import BlobStore, DamagedFileError, read_json, write_json

SomeMBPO = TypeVar("SomeMBPO", bound=MBPO)


def save_checkpoint(model: MBPO, folder: str | Path, keep: int = 2) -> Path:
    """
    Adds a checkpoint to the folder. It is written beside the others and renamed when it is whole, so at any moment the
    folder holds the newest whole one.

    :param model: between two calls of ``learn``, or in a callback's ``on_rollout_start``; elsewhere some of the last step's
        work would be done twice or not at all
    :param folder: of this run alone; one process writes to it at a time
    :param keep: checkpoints that stay, this one included; older ones are deleted
    :return: the checkpoint's JSON file
    :raises ValueError: when the replay buffer holds Python objects (``copy_info_dict`` of ``HerReplayBuffer``)
    :raises OSError: when it cannot be written, for example because the disk is full; the others are still whole
    """
    if keep < 1:
        raise ValueError(f"`keep` must be at least 1, this checkpoint, but got {keep}.")
    folder, existing = Path(folder), checkpoints(folder)
    number = 1 + (_number(existing[0]) if existing else 0)
    path = folder / f"{number:06d}_{model.num_timesteps}_steps.json"
    folder.mkdir(parents=True, exist_ok=True)
    store = _blobs(folder)
    try:
        content = collect(model, store)
        store.sync()
        write_json(path, content)
    except OSError as error:
        _delete_old(folder, keep)
        raise OSError(
            error.errno, f"{error.strerror}: the checkpoint was not written, the earlier ones are whole", str(path)
        ) from error
    _delete_old(folder, keep)
    return path


def load_checkpoint(
    folder: str | Path,
    env: GymEnv,
    algorithm: type[SomeMBPO] = MBPO,  # type: ignore[assignment]
    **kwargs: Any,
) -> SomeMBPO:
    """
    The newest whole checkpoint: a model that goes on with ``learn(steps, reset_num_timesteps=False)``.

    If it was saved when all environments had just begun an episode, what follows has the same bits as if it had never
    stopped, provided that the environments draw from nothing but Gymnasium's ``np_random``, and only when they are reset.
    Elsewhere the environments begin a new episode. The streams of Python, NumPy and PyTorch are set, too: draw nothing
    from them before you call ``learn``.

    :param folder: written by :func:`save_checkpoint`
    :param env: the environment, made as it was; its ``VecNormalize``, if it has one, gets the saved settings and statistics
    :param algorithm: the class of the model that was saved, if it is one of your own
    :param kwargs: attributes to change, as for ``MBPO.load``
    :raises ValueError: when there is no whole checkpoint, or only one of model and ``env`` has a ``VecNormalize``
    :warns UserWarning: names each checkpoint that was skipped because it is damaged, and the one that was loaded
    """
    skipped: list[str] = []
    for path in checkpoints(folder):
        try:
            model = restore(read_json(path), _blobs(Path(folder)), env, algorithm, kwargs)
        except DamagedFileError as error:
            skipped.append(f"skipped {path.name} ({error})")
            continue
        message = f"Resuming from {path} at {model.num_timesteps} steps."
        if skipped:
            warnings.warn(f"{message} {'; '.join(skipped)}.")
        elif model.verbose >= 1:
            print(message)
        return model
    found = f"all are damaged: {'; '.join(skipped)}" if skipped else "there is none"
    raise ValueError(f"Expected a folder with a checkpoint, but in {folder} {found}. `save_checkpoint` writes them.")


def checkpoints(folder: str | Path) -> list[Path]:
    """:return: the JSON files of the checkpoints in the folder, newest first, whole or damaged"""
    return sorted(Path(folder).glob("[0-9]*_steps.json"), key=_number, reverse=True)


class CheckpointCallback(BaseCallback):
    """
    Saves a checkpoint when the environment steps pass a multiple of ``save_freq``, before the next step is made, and at
    the end of ``learn``.

    :param save_freq: environment steps, of all environments together
    :param folder: see :func:`save_checkpoint`
    :param keep: checkpoints that stay
    :param at_episode_end: wait until all environments begin a new episode (and ``train_freq`` steps are complete), so that
        resuming gives the same bits. With episodes that never end together this never comes
    :param verbose: 1 tells of each checkpoint
    """

    model: MBPO

    def __init__(
        self, save_freq: int, folder: str | Path, keep: int = 2, at_episode_end: bool = False, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        if save_freq < 1:
            raise ValueError(f"`save_freq` must be at least 1 environment step, but got {save_freq}.")
        self.save_freq = save_freq
        self.folder = folder
        self.keep = keep
        self.at_episode_end = at_episode_end

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        last, now = self.model.last_checkpoint_timestep, self.model.num_timesteps
        if now // self.save_freq > last // self.save_freq and (not self.at_episode_end or episodes_begin(self.model)):
            self._save()
            if self.model.use_sde:  # SB3 has just drawn the noise of this rollout, and will draw again when it resumes
                self.model.actor.reset_noise(self.model.n_envs)

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self.model.last_checkpoint_timestep:
            self._save()

    def _save(self) -> None:
        self.model.last_checkpoint_timestep = self.model.num_timesteps
        path = save_checkpoint(self.model, self.folder, self.keep)
        if self.verbose >= 1:
            print(f"Saved the checkpoint {path}")


def _number(path: Path) -> int:
    return int(path.name.split("_")[0])


def _blobs(folder: Path) -> BlobStore:
    return BlobStore(folder / "blobs")


def _delete_old(folder: Path, keep: int) -> None:
    """The older checkpoints, and every blob that no other one needs."""
    kept, needed = checkpoints(folder)[:keep], set()
    for path in checkpoints(folder):
        if path not in kept:
            os.remove(path)
    for path in kept:
        try:
            needed |= blob_names(read_json(path))
        except DamagedFileError:
            continue
    for path in folder.glob("*.partial"):
        path.unlink()
    _blobs(folder).keep_only(needed)
