"""A whole ``StepRecord`` in one safetensors file, for replay: other weightings on the same rollouts, other pictures.

Tensors are named by their path in the record ("rollout.prompts.ids", "signal.student_logprobs", "weights"), so a field that
is added to a record is stored without an edit here. Everything that is no tensor is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.files import whole_file
from lit_opd.types import Rollout, StepRecord, TokenSignal

FORMAT = "lit_opd.step/1"


def save_record(record: StepRecord, path: str | Path, **notes: str) -> Path:
    """Write the record; the file appears whole or not at all.

    Args:
        record: on any device; padding is stored as it is, and the prompts' data rows are left out: columns may hold anything.
        path: file to write, its folder is made.
        notes: further metadata.
    """
    path = Path(path)
    prompts = replace(record.rollout.prompts, data=None)
    leaves = dict(_leaves(replace(record, rollout=replace(record.rollout, prompts=prompts))))
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in leaves.items() if _is_tensor(value)}
    plain = {name: value for name, value in leaves.items() if not _is_tensor(value)}
    origin = record.rollout.provenance
    metadata = {"format": FORMAT, "step": str(record.step), "provenance": json.dumps(vars(origin)), **notes}
    with whole_file(path) as draft:
        save_file(tensors, draft, metadata={**metadata, "fields": json.dumps(plain)})
    return path


def load_record(path: str | Path, device: str = "cpu") -> StepRecord:
    """The record that ``save_record`` wrote.

    Raises:
        InputError: no such file, or a file of another kind.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            values: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"a rollout file must be a safetensors file that exists, got {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} must have the format {FORMAT!r}, got {metadata.get('format')!r}")
    values |= json.loads(metadata["fields"])
    return _built(StepRecord, values, prefix="")


def load_rollout(path: str | Path, device: str = "cpu") -> tuple[Rollout, TokenSignal]:
    """The responses and their signal: what a weighting strategy, a teacher or a picture needs."""
    record = load_record(path, device)
    return record.rollout, record.signal


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _leaves(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every field that is set; records inside records are opened."""
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        elif value is not None and field.init:
            yield f"{prefix}{field.name}", value


def _built(kind: Any, values: dict[str, Any], *, prefix: str) -> Any:
    """A record of class ``kind`` from the values whose path starts with ``prefix``; absent fields take their default."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in fields(kind):
        path = f"{prefix}{field.name}"
        inner = [option for option in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(option)]
        if inner and any(name.startswith(f"{path}.") for name in values):
            found[field.name] = _built(inner[0], values, prefix=f"{path}.")
        elif path in values:
            value = values[path]
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**found)
