"""Reading the index of a sharded checkpoint, which torch stores as a pickle, without running code from it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from lit_opd.types import InputError

INDEX = ".metadata"
_METADATA = frozenset({
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta",
    "TensorProperties", "_MEM_FORMAT_ENCODING",
})  # fmt: skip
_NAMES = {
    "torch.distributed.checkpoint.metadata": _METADATA,
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "pathlib": frozenset({"PosixPath", "WindowsPath"}),
    "pathlib._local": frozenset({"PosixPath", "WindowsPath"}),
    "collections": frozenset({"OrderedDict"}),
}


class _Plain(pickle.Unpickler):
    """Knows the classes of an index only; any other name could be a function that the pickle calls."""

    def find_class(self, module: str, name: str) -> Any:
        """A class that is allowed; a name with dots would reach what such a module has imported."""
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if plain or name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_index(folder: Path) -> Any:
    """The ``Metadata`` of a folder of shards.

    Raises:
        InputError: there is none, it is damaged, or it holds anything but an index.
    """
    try:
        return _Plain(io.BytesIO((folder / INDEX).read_bytes())).load()
    except Exception as error:  # pickle raises many types about bytes that are no pickle
        raise InputError(
            f"`--ckpt_path` must be a folder of shards, got {folder}, whose index {INDEX} is missing, damaged or could run code "
            f"({type(error).__name__}: {error}); give another one"
        ) from error
