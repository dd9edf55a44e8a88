"""
Files that are whole or not there, and that are named by what they hold.

A *blob* is a file whose name is the SHA-256 of its bytes, perhaps with a suffix. What is there already is not written again,
so to store a large array a second time costs only what has changed; and what has been damaged no longer fits its name.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

#: Large arrays are cut into blobs of this size along their first dimension.
BLOB_BYTES = 2**20
#: What a blob is called, whole or half written. Other files in its folder are not ours.
BLOB_NAME = re.compile(r"[0-9a-f]{64}(\.zip)?(\.partial)?")


class DamagedFileError(ValueError):
    """A file that is not what was written."""


class UnreadableFileError(DamagedFileError):
    """A file that is not there, or that cannot be read now."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """
    Writes beside ``path``, syncs, renames.

    :param content: what JSON can hold
    """
    body = json.dumps(content, sort_keys=True)
    write_whole(path, json.dumps({"sha256": _digest(body.encode()), "content": content}, sort_keys=True).encode())


def read_json(path: Path) -> dict[str, Any]:
    """:raises DamagedFileError: when it is not what :func:`write_json` wrote"""
    try:
        document = json.loads(_read(path))
        content: dict[str, Any] = document["content"]
        whole = document["sha256"] == _digest(json.dumps(content, sort_keys=True).encode())
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    if not whole:
        raise DamagedFileError(f"{path} is damaged: it does not hold what was written")
    return content


class BlobStore:
    """
    A folder of blobs. One process writes to it at a time.

    :param folder: made when the first blob arrives
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._new: list[Path] = []

    def put_bytes(self, data: memoryview | bytes, suffix: str = "") -> str:
        """
        :param data: of one blob
        :param suffix: of its name, for people who look into the folder
        :return: its name
        """
        path = self.folder / (_digest(data) + suffix)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._new.append(path)
            _replace(path, data)
        elif path.read_bytes() != data:  # damaged
            _replace(path, data)
        return path.name

    def put_array(self, array: np.ndarray) -> dict[str, Any]:
        """
        :param array: of numbers, (rows, ...)
        :return: what :meth:`read_array` needs, for JSON
        :raises ValueError: for an array of Python objects, which only pickle could store
        """
        if array.dtype.hasobject:
            raise ValueError(f"Expected an array of numbers, but got one of Python objects, {array.dtype} {array.shape}.")
        rows = max(1, BLOB_BYTES // max(1, array[:1].nbytes))
        parts = [np.ascontiguousarray(array[start : start + rows]) for start in range(0, len(array), rows)]
        blobs = [self.put_bytes(part.data.cast("B") if part.size else b"") for part in parts]
        return {"dtype": array.dtype.str, "shape": list(array.shape), "rows_per_blob": rows, "blobs": blobs}

    def read_array(self, entry: dict[str, Any], target: np.ndarray | None = None) -> np.ndarray:
        """
        :param entry: made by :meth:`put_array`
        :param target: if given, its first rows are filled
        :return: the array (the filled rows of ``target``)
        :raises DamagedFileError: when a blob is not what was written
        """
        shape, dtype = entry["shape"], np.dtype(entry["dtype"])
        array = np.empty(shape, dtype) if target is None else target[: shape[0]]
        if list(array.shape) != shape or array.dtype != dtype:
            raise ValueError(
                f"Expected an array of shape {shape}, {dtype}, but there is room for {array.shape}, {array.dtype}."
            )
        for number, name in enumerate(entry["blobs"]):
            part = np.frombuffer(self.read(name), dtype).reshape(-1, *shape[1:])
            array[number * entry["rows_per_blob"] :][: len(part)] = part
        return array

    def read(self, name: str) -> bytes:
        """:raises DamagedFileError: when the blob is not what was written"""
        data = _read(self.folder / name)
        if _digest(data) != Path(name).stem:
            raise DamagedFileError(f"{self.folder / name} is damaged: its {len(data)} bytes are not those that were written")
        return data

    def sync(self) -> None:
        """After this, all that was put survives a power cut."""
        sync_folder(self.folder)

    def take_back(self) -> None:
        """Deletes the blobs that were not there before."""
        for path in self._new:
            path.unlink(missing_ok=True)
            _partial(path).unlink(missing_ok=True)

    def keep_only(self, names: Iterable[str]) -> None:
        """Deletes all other blobs, and what a killed process may have left half written."""
        kept = set(names)
        for path in self.folder.glob("*"):
            if BLOB_NAME.fullmatch(path.name) and path.name not in kept:
                path.unlink()


def _digest(data: memoryview | bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}") from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _replace(path: Path, data: memoryview | bytes) -> None:
    """
    Writes beside ``path``, syncs, renames.

    :param data: what the file is to hold
    """
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_whole(path: Path, data: bytes) -> None:
    """
    Nobody ever reads half of it, not after a power cut either.

    :param data: what the file is to hold
    """
    _replace(path, data)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """After this, what is in the file survives a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """After this, the names in the folder survive a power cut."""
    if os.name == "nt":
        return  # Windows has no such call
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
