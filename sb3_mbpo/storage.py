"""
Files that are whole or not there, and that are named by what they hold.

A *blob* is a file whose name is the SHA-256 of its bytes. What is there already is not written again, so to store a large
array a second time costs only what has changed; and what has been damaged no longer fits its name.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

#: Large arrays are cut into blobs of this size along their first dimension.
BLOB_BYTES = 2**20


class DamagedFileError(ValueError):
    """A file that is not there, is not what was written, or cannot be read."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes beside ``path``, syncs, renames. :param content: what JSON can hold"""
    body = json.dumps(content, sort_keys=True)
    _replace(path, json.dumps({"sha256": _digest(body.encode()), "content": content}, sort_keys=True).encode())
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """:raises DamagedFileError: when it is not what :func:`write_json` wrote"""
    try:
        document = json.loads(path.read_bytes())
        content: dict[str, Any] = document["content"]
        whole = document["sha256"] == _digest(json.dumps(content, sort_keys=True).encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error
    if not whole:
        raise DamagedFileError(f"{path} is damaged: it does not hold what was written.")
    return content


class BlobStore:
    """
    A folder of blobs. One process writes to it at a time.

    :param folder: made when the first blob arrives
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        blobs = [self._put_bytes(part.data.cast("B") if part.size else b"") for part in parts]
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

    def put_file(self, write: Callable[[Path], None]) -> str:
        """
        :param write: writes a file to the path that it gets
        :return: name of the blob
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "file.partial"
        write(partial)
        name = _digest(partial.read_bytes())
        _sync(partial)
        os.replace(partial, self.folder / name)
        return name

    def read(self, name: str) -> bytes:
        """:raises DamagedFileError: when the blob is not what was written"""
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read: {error}") from error
        if _digest(data) != name:
            raise DamagedFileError(f"{path} is damaged: its {len(data)} bytes are not those that were written.")
        return data

    def sync(self) -> None:
        """After this, all that was put survives a power cut."""
        _sync(self.folder)

    def keep_only(self, names: Iterable[str]) -> None:
        """Deletes all other blobs, and what a killed process may have left half written."""
        kept = set(names)
        for path in self.folder.glob("*"):
            if path.name not in kept:
                path.unlink()

    def _put_bytes(self, data: memoryview | bytes) -> str:
        name = _digest(data)
        path = self.folder / name
        if not path.exists() or path.stat().st_size != len(data):
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(path, data)
        return name


def _digest(data: memoryview | bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replace(path: Path, data: memoryview | bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync(path: Path) -> None:
    """A file's bytes, or a folder's names."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
