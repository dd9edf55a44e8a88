"""
Checkpoints: saved, found again and loaded.

A folder holds the checkpoints of one run. Each is a small JSON file that names its blobs; the blobs lie in ``blobs`` and
are shared, so a new checkpoint writes only what is new. JSON and plain numbers: reading them runs no code. The one exception
is the blob with the model, a zip file as SB3's ``save`` writes it, which follows SB3's own rules.
"""

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv

from sb3_mbpo.mbpo import MBPO
from sb3_mbpo.run_state import SomeMBPO, between_episodes, blob_names, collect, restore
from sb3_mbpo.schedules import check_positive
from sb3_mbpo.storage import BlobStore, DamagedFileError, UnreadableFileError, read_json, write_json

#: A number that counts the checkpoints of the folder, and the environment steps. Other files in it are not ours.
NAME = re.compile(r"\d{6,}_\d+_steps\.json")


def save_checkpoint(model: MBPO, folder: str | Path, keep: int = 2) -> Path:
    """
    Adds a checkpoint to the folder. It is written beside the others and renamed when it is whole, so at any moment the
    folder holds the newest whole one.

    :param model: between two calls of ``learn``; within one, use :class:`CheckpointCallback`
    :param folder: of this run alone; one process writes to it at a time
    :param keep: checkpoints that stay, this one included; older ones are deleted
    :return: the checkpoint's JSON file
    :raises ValueError: when the replay buffer keeps more than rows of numbers, as one of your own may
    :raises OSError: when it cannot be written, for example because the disk is full; the others stay as they were
    """
    check_positive("keep", keep)
    folder, existing = Path(folder), checkpoints(folder)
    number = 1 + (_number(existing[0]) if existing else 0)
    path = folder / f"{number:06d}_{model.num_timesteps}_steps.json"
    folder.mkdir(parents=True, exist_ok=True)
    store = _blobs(folder)
    try:
        content = collect(model, store)
        store.sync()
        write_json(path, content)
    except Exception as error:
        path.unlink(missing_ok=True)  # only the last sync can fail when it is there already
        store.take_back()
        if isinstance(error, OSError):
            reason = f"{error.strerror}: the checkpoint was not written, the earlier ones are as they were"
            raise OSError(error.errno, reason, str(path)) from error
        raise
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
    :param algorithm: the class of the model that was saved, if it is not ``MBPO`` itself
    :param kwargs: attributes to change, as for ``MBPO.load``; but for the seed, because the streams go on
    :raises ValueError: when there is no whole checkpoint, or ``env`` is not wrapped as it was
    :warns UserWarning: names each checkpoint that was skipped because it is damaged, and the one that was loaded
    """
    if env is None or isinstance(env, str):
        raise ValueError(f"`env` must be an environment, such as `gymnasium.make(...)` returns, but got {env!r}.")
    if "seed" in kwargs:
        raise ValueError("A checkpoint goes on with its own random streams: leave out `seed`, or use `MBPO.load`.")
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
    found = [path for path in Path(folder).glob("*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_number, reverse=True)


class CheckpointCallback(BaseCallback):
    """
    Saves a checkpoint when the environment steps pass a multiple of ``save_freq``, before the next step is made, and at
    the end of ``learn``. Whatever would keep it from saving is an error at the beginning already, where the folder has no
    checkpoint yet.

    :param save_freq: environment steps, of all environments together
    :param folder: see :func:`save_checkpoint`
    :param keep: checkpoints that stay
    :param at_episode_end: wait until all environments begin a new episode (and ``train_freq`` steps are complete), so that
        resuming gives the same bits. With episodes that never end together this never comes
    :param verbose: 1 tells of each checkpoint
    :raises ValueError: for a value out of range, or inside a callback that counts steps itself
    """

    model: MBPO

    def __init__(
        self, save_freq: int, folder: str | Path, keep: int = 2, at_episode_end: bool = False, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.save_freq = check_positive("save_freq", save_freq)
        self.folder = Path(folder)
        self.keep = check_positive("keep", keep)
        self.at_episode_end = at_episode_end

    def _init_callback(self) -> None:
        if self.parent is not None:
            raise ValueError(
                f"{type(self.parent).__name__} tells the callback inside it of steps only, and a checkpoint is saved between "
                "them. CheckpointCallback counts the steps itself: pass it to `learn`."
            )

    def _on_training_start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not checkpoints(self.folder):
            with tempfile.TemporaryDirectory(dir=self.folder) as trial:
                save_checkpoint(self.model, trial)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        now = self.model.num_timesteps
        saved = [_steps(path) for path in checkpoints(self.folder)[:1]]
        last = saved[0] if saved and saved[0] <= now else 0  # a later one was skipped, or is another run's
        if now // self.save_freq > last // self.save_freq and (not self.at_episode_end or between_episodes(self.model)):
            self._save()
            if self.model.use_sde:  # SB3 has just drawn the noise of this rollout, and will draw again when it resumes
                self.model.actor.reset_noise(self.model.n_envs)

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        path = save_checkpoint(self.model, self.folder, self.keep)
        if self.verbose >= 1:
            print(f"Saved the checkpoint {path}")


def _number(path: Path) -> int:
    return int(path.name.split("_")[0])


def _steps(path: Path) -> int:
    return int(path.name.split("_")[1])


def _blobs(folder: Path) -> BlobStore:
    return BlobStore(folder / "blobs")


def _delete_old(folder: Path, keep: int) -> None:
    """The older checkpoints, those that are damaged, and every blob that no other one needs. A whole one is there."""
    kept: list[set[str]] = []
    for path in checkpoints(folder):
        try:
            needed = blob_names(read_json(path))
        except UnreadableFileError:
            return  # nobody knows what it needs
        except DamagedFileError:
            needed = set()
        if needed and len(kept) < keep:
            kept.append(needed)
        else:
            path.unlink()
    for path in folder.glob("*_steps.json.partial"):
        path.unlink()
    _blobs(folder).keep_only(set().union(*kept))
