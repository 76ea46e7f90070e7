"""Reading the index of a sharded checkpoint, and its entries that are no tensors, without running code from them.

torch stores both as pickles and loads both without a restriction.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from lit_opd.errors import InputError, first_line

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


class _Plain(pickle._Unpickler):
    """Knows the classes of an index only; any other name could be a function that the pickle calls.

    The one written in Python: an index that changes those classes could hide entries, and the one in C cannot refuse that.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """Set attributes, of instances only."""
        if isinstance(self.stack[-2], type):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError(f"it changes the class {self.stack[-2].__name__}")  # type: ignore[attr-defined]
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def find_class(self, module: str, name: str) -> Any:
        """A class that is allowed; a name with dots would reach what such a module has imported."""
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if plain or name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def refused(error: BaseException) -> str:
    """In a few words why a file was not unpickled; torch's own message is a page with advice to do it all the same."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {named[1]}" if named else first_line(error)


def read_index(folder: Path) -> Any:
    """The ``Metadata`` of a folder of shards, after a look at every entry that torch would unpickle.

    Raises:
        InputError: there is none, it is damaged, or it or an entry holds anything but data.
    """
    try:
        index = _Plain(io.BytesIO((folder / INDEX).read_bytes())).load()
        if others := sorted(path.name for path in folder.glob(f"*{INDEX}") if path.name != INDEX):
            raise pickle.UnpicklingError(f"torch falls back to {others[0]}, which Lightning does not write")
        for name, kind in index.state_dict_metadata.items():
            if isinstance(kind, BytesStorageMetadata):  # torch reads the others, tensors, with weights_only=True
                _require_plain(folder, index.storage_data[MetadataIndex(name)])
        return index
    except Exception as error:  # pickle raises many types about bytes that are no pickle
        raise InputError(
            f"`--ckpt_path` must be a folder of shards, got {folder}, which is incomplete, damaged or could run code "
            f"({INDEX}: {type(error).__name__}: {refused(error)}); give another one"
        ) from error


def _require_plain(folder: Path, place: Any) -> None:
    """Read an entry as torch will, but with weights_only=True.

    Args:
        folder: of the shards.
        place: file, first byte and number of bytes; Lightning compresses nothing.
    """
    if place.transform_descriptors or place.length < 0:
        raise pickle.UnpicklingError(f"an entry of {place.relative_path} is not stored as it is")
    with (folder / place.relative_path).open("rb") as shard:
        shard.seek(place.offset)
        entry = io.BytesIO(shard.read(place.length))
    torch.load(entry, map_location="cpu", weights_only=True)
