"""What an adapter stands on: a checkpoint without the frozen base says which base it is of, in a few hundred bytes.

The mark reads one row of every stored weight, which takes a second for a large model: sizes and headers alone are the same for
a model and its fine-tuned copy, a hash of everything would read the model twice. It is of the files, so the dtype, the device
and a quantisation that the run loads with leave it as it is, and so does another division into files. One row of a weight
changed by hand may go unseen; training, merging or pruning does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from lit_opd.errors import InputError
from lit_opd.models.lazy import Checkpoint
from lit_opd.models.loading import raw_config

# what saving a model again changes in its config.json, and the policy does not read
_NOT_THE_POLICY = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)


def base_mark(path: str, setting: str) -> dict[str, str]:
    """Path and content of a Hugging Face folder or hub id: {"path", "config", "weights"}; the last two are SHA-256.

    Args:
        path: the folder (kept as an absolute path) or the id.
        setting: names it in errors.
    Raises:
        InputError: no safetensors files.
    """
    folder = os.path.expanduser(path)
    config = {name: value for name, value in raw_config(path).items() if name not in _NOT_THE_POLICY}
    return {
        "path": os.path.abspath(folder) if os.path.isdir(folder) else path,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": _weights_mark(Checkpoint(path, setting)),
    }


def weights_revision(path: str, setting: str) -> str | None:
    """One SHA-256 of what ``base_mark`` tells of a model, whatever its path; None where it has no safetensors files."""
    try:
        mark = base_mark(path, setting)
    except InputError:
        return None
    return hashlib.sha256(f"{mark['config']} {mark['weights']}".encode()).hexdigest()


def _weights_mark(files: Checkpoint) -> str:
    digest = hashlib.sha256()
    for name in sorted(files.files):
        digest.update(f"{name} {files.kind(name)} {files.shape(name)} ".encode())
        digest.update(files.middle(name))
    files.close()
    return digest.hexdigest()


def require_base(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """The base that a checkpoint's adapters were trained on is the one they are put on.

    Args:
        saved: the mark in the checkpoint.
        own: that of the configured base.
    Raises:
        InputError: it is another one.
    """
    other = [what for what, name in (("config.json", "config"), ("weights", "weights")) if saved[name] != own[name]]
    if other:
        raise InputError(
            f"`model.student.path` must be the base model that the checkpoint's adapters were trained on, {saved['path']!r} as "
            f"it was then, got {own['path']!r} with another {' and other '.join(other)}; give that one, or start a new run"
        )
