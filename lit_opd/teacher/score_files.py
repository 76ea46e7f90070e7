"""Scores of rows as files: one safetensors file a row, named by its key, whole or not there."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_opd.errors import InputError

SUFFIX = ".safetensors"


class Unreadable(Exception):
    """An entry is there and is not what was written."""


class ScoreFiles:
    """Entries under a folder: ``ab/ab12....safetensors`` with the tensors of a row and, in its header, their SHA-256.

    A file appears by being renamed, so processes may share the folder; it is not synced to disk, since an entry that a power
    cut leaves broken is found by its hash and computed anew.

    Args:
        folder: made at the first entry.
        room: bytes that may be added.
    """

    def __init__(self, folder: Path, *, room: int) -> None:
        self.folder, self.room = folder, room

    def size(self) -> int:
        """Bytes of all entries."""
        found = 0
        for path in self.folder.glob(f"*/*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another process replaces it
                found += path.stat().st_size
        return found

    def require_writable(self, field: str) -> None:
        """An InputError unless an entry can be added."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise InputError(
                f"`{field}` must be a folder that can be written, got {str(self.folder)!r}: {error.strerror}; give another"
            ) from error

    def read(self, key: str, names: set[str], length: int) -> dict[str, Tensor] | None:
        """The entry of ``key``, tensors [length, ...] by name; None where there is none.

        Args:
            key: hexadecimal.
            names: of its tensors.
            length: of their leading dimension.
        Raises:
            Unreadable: it is not what was written.
        """
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                told = (file.metadata() or {}).get("sha256")
                found = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            raise Unreadable(f"{path} cannot be read ({type(error).__name__}: {error})") from error
        if told != _hash(key, found) or found.keys() != names or any(len(value) != length for value in found.values()):
            raise Unreadable(f"{path} is not what was written")
        return found

    def write(self, key: str, entry: dict[str, Tensor]) -> bool:
        """Add an entry, tensors [n, ...] by name, or replace it; False where there is no room.

        Raises:
            OSError: as the disk gave it.
        """
        entry = {name: value.contiguous() for name, value in entry.items()}
        content = save(entry, metadata={"sha256": _hash(key, entry)})
        if len(content) > self.room:
            return False
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.stem}-{secrets.token_hex(4)}")
        try:
            draft.write_bytes(content)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        self.room -= len(content)
        return True

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"


def _hash(key: str, entry: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name in sorted(entry):
        value = entry[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
