"""Weights read from safetensors straight into shards: no rank holds a full copy of a model.

``models.empty_causal_lm`` builds the architecture without weights, ``sharding.shard`` (FSDP2) divides it, ``fill`` reads
what this rank keeps: slices of the leading dimension. Where transformers stores a layout other than the model's (the
experts of a mixture, one by one), its own conversion makes one parameter at a time: of experts that are only stacked and
joined, this rank's experts are read; everything else is read whole, converted and cut.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lit_opd.errors import InputError, first_line

# Why plain layouts too are read here, not by torch.distributed.checkpoint's HuggingFaceStorageReader: both ways to use it were
# tried with torch 2.13 on two gloo ranks. Every bit was the same, but
# - `load` keeps a file mapped until all of it is read: a rank that keeps 46 MB of one file of 92 MB grew by 96 to 134 MB, here
#   by 46 to 49;
# - it takes every safetensors file of the folder, not those of the index: a stale one's weights replace the right ones, unsaid;
# - it casts integers to weights, takes either of two tied weights that differ, and its errors are no `Exception`;
# - it is a collective where there is a process group, and warns where there is none;
# - an earlier version of the class read whole files, and setup.cfg allows torch from 2.6;
# - the reader without `load`, weight by weight over the index's files, is free of these but the last, and made this file longer
#   (349 lines for 343) and a mixture 1.4 to 1.8 times slower to read: conversions, errors and hub ids need the rest all the same.

NAMED_WEIGHTS = 10  # weights listed in an error
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Loaded:
    """What one rank read and held while a model was filled.

    Args:
        read: bytes of the slices asked of the files, in the files' dtype.
        kept: bytes of this rank's shards, in the model's dtype.
        most_held: the largest sum of bytes filled so far and bytes of the one parameter being read and converted.
    """

    read: int
    kept: int
    most_held: int


class Checkpoint:
    """The safetensors files of a Hugging Face folder or hub id; counts what is read.

    On a hub id the files are downloaded to the local cache first; its locks let one process of a machine fetch a file.

    Args:
        path: the folder or id.
        setting: names it in errors.
    Raises:
        InputError: no safetensors files, or an index that names a file that is not there.
    """

    def __init__(self, path: str, setting: str) -> None:
        self.path, self.setting = path, setting
        self.files = self._locate()
        self.bytes_read = 0
        self._open: dict[str, Any] = {}

    def _locate(self) -> dict[str, str]:
        """File of every stored tensor, by its name."""
        from transformers.utils.hub import cached_file

        path = os.path.expanduser(self.path)
        try:
            index = cached_file(path, INDEX, _raise_exceptions_for_missing_entries=False)
            if index is not None:
                with open(index, encoding="utf-8") as file:
                    parts: dict[str, str] = json.load(file)["weight_map"]
                found = {part: str(cached_file(path, part)) for part in sorted(set(parts.values()))}
                return {name: found[part] for name, part in parts.items()}
            single = str(cached_file(path, SINGLE))
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise self.error(f"could not be read from safetensors files: {first_line(error)}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Element type of a stored tensor as the file names it, such as "BF16"."""
        return str(self._slice(name).get_dtype())

    def middle(self, name: str) -> bytes:
        """The bytes of a stored tensor's middle row; of one with more dimensions, of the middle one of each but the last."""
        shape = self.shape(name)
        if not shape:
            value: Tensor = self._file(name).get_tensor(name)
        else:
            value = self._slice(name)[tuple(slice(size // 2, size // 2 + 1) for size in shape[:-1]) or (slice(None),)]
        self.bytes_read += value.nbytes
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def read(self, name: str, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """A stored tensor in its own shape [N, ...], or ``rows`` of its leading dimension, as ``dtype``.

        Raises:
            InputError: it holds integers where floating weights are wanted.
        """
        stored = self._slice(name)
        value: Tensor = self._file(name).get_tensor(name) if rows is None else stored[rows]
        self.bytes_read += value.nbytes
        if dtype.is_floating_point and not value.is_floating_point():
            raise self.error(f"holds {name} as {value.dtype}, which is no weight; a quantised checkpoint", remedy=True)
        return value.to(dtype)

    def _slice(self, name: str) -> Any:
        try:
            return self._file(name).get_slice(name)
        except SafetensorError as error:
            raise self.error(f"has no {name} in {os.path.basename(self.files[name])}: {error}") from error

    def _file(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file]

    def close(self) -> None:
        """Unmap the files, so that pages already copied leave this process."""
        self._open.clear()

    def error(self, what: str, *, remedy: bool = False) -> InputError:
        """An error about this checkpoint; ``remedy``: only a full load or a server can help."""
        owner = self.setting.rpartition(".")[0]
        other = f"; set `{owner}.lazy` to false (every rank loads it whole first) or use `RemoteTeacher`"
        return InputError(f"`{self.setting}` {self.path!r} {what}{other if remedy else ''}")


@dataclass
class _Source:
    """Where one parameter (or several, of one conversion) comes from; ``converter`` None: stored as it is."""

    converter: Any = None
    names: dict[str, list[str]] = field(default_factory=dict)  # by the converter's pattern


def fill(policy: nn.Module, model: Any, *, path: str, setting: str, device: torch.device | None = None) -> Loaded:
    """Allocate this rank's shards of an empty model and read them; no collective is called.

    Args:
        policy: the root of the FSDP2 units, parameters on the meta device, buffers real.
        model: the transformers model inside it.
        path: a Hugging Face folder or hub id with safetensors files.
        setting: names the path in errors.
        device: where the shards live, default the device of their mesh; buffers stay where they are.
    Returns:
        bytes read and held by this rank.
    Raises:
        InputError: weights missing, left over or of another shape (the names are listed), or a layout that transformers
            cannot convert one parameter at a time.
    """
    _allocate(policy, device)
    if not any(isinstance(value, DTensor) for value in policy.parameters()):
        model.tie_weights()  # to_empty keeps one shard for tied weights, but makes two whole ones
    filling = _Filling(model, Checkpoint(path, setting))
    filling.run()
    return Loaded(filling.checkpoint.bytes_read, filling.kept, filling.most_held)


def _allocate(policy: nn.Module, device: torch.device | None) -> None:
    """Uninitialised shards; buffers keep values and device."""
    if device is None:
        first = next(policy.parameters())
        device = torch.device(first.device_mesh.device_type if isinstance(first, DTensor) else "cpu")
    buffers = [(owner, *named) for owner in policy.modules() for named in owner.named_buffers(recurse=False)]
    policy.to_empty(device=device)
    for owner, name, value in buffers:
        setattr(owner, name, value)


class _Filling:
    """Copies every stored tensor into the model's own, one parameter at a time."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.filled: dict[int, str] = {}  # stored under which name, by identity: tied weights are one parameter
        self.kept = self.most_held = self.held = 0
        self.mapping = _conversions(model)

    def run(self) -> None:
        """Fill all, then say what is missing."""
        sources, extra = self._plan()
        self._complain(extra, "holds weights that the model has not", _ignored(self.model, "unexpected"))
        with torch.no_grad():
            for target, source in sources.items():
                self._fill(target, source)
                self.held = 0
                self.checkpoint.close()
        missing = [name for name, value in self.targets.items() if id(value) not in self.filled]
        self._complain(missing, "lacks weights of the model", _ignored(self.model, "missing"))
        if self.mapping:  # transformers reverses these when it saves the model
            self.model._weight_conversions = [step for step in self.mapping if step.was_used()]

    def _plan(self) -> tuple[dict[str, _Source], list[str]]:
        """Source of every (first) target, and stored names without one; transformers' own order and renaming."""
        rename, order = _renamer(self.model, self.mapping, self.targets)
        converters = {p: step for step in self.mapping if hasattr(step, "operations") for p in step.source_patterns}
        sources: dict[str, _Source] = {}
        extra = []
        for name in sorted(self.checkpoint.files, key=order):
            target, pattern = rename(name)
            if target not in self.targets:
                extra.append(name)
                continue
            source = sources.setdefault(target, _Source(converters.get(pattern) if pattern else None))
            source.names.setdefault(pattern or name, []).append(name)
        return sources, extra

    def _complain(self, names: Iterable[str], what: str, ignored: re.Pattern[str] | None) -> None:
        wrong = sorted(name for name in names if ignored is None or not ignored.search(name))
        if wrong:
            shown = ", ".join(wrong[:NAMED_WEIGHTS]) + (" ..." if len(wrong) > NAMED_WEIGHTS else "")
            raise self.checkpoint.error(f"{what}, {len(wrong)} of them: {shown}", remedy=True)

    def _fill(self, target: str, source: _Source) -> None:
        if source.converter is not None:
            self._convert(target, source)
            return
        name = next(iter(source.names))
        value = self.targets[target]
        self._require_shape(target, value, self.checkpoint.shape(name))
        if id(value) in self.filled:
            self._require_tied(target, name)
            return
        rows = _rows(value) if value.ndim else None
        self._store(target, self._read(name, value.dtype, rows), cut=True)
        self.filled[id(value)] = name

    def _require_tied(self, target: str, name: str) -> None:
        """Both names of a tied weight are stored: they must hold the same values."""
        other, dtype = self.filled[id(self.targets[target])], self.targets[target].dtype
        if not torch.equal(self._read(name, dtype), self._read(other, dtype)):
            raise self.checkpoint.error(
                f"stores {name} and {other} with different values, but its config ties them; set `tie_word_embeddings` to "
                "false in its config.json"
            )

    def _convert(self, target: str, source: _Source) -> None:
        """Run transformers' conversion on the sources of one parameter, or of those it makes together."""
        converter, value = deepcopy(source.converter), self.targets[target]
        rows = _rows(value) if value.ndim else slice(0)
        mine = _stacks_only(converter) and all(len(names) == len(value) for names in source.names.values())
        if mine and rows.stop == rows.start:
            self.filled[id(value)] = target
            return
        for pattern, names in source.names.items():
            for name in names[rows] if mine else names:
                converter.add_tensor(target, name, pattern, self._reader(name, value.dtype))
        try:
            made = converter.convert(target, model=self.model, config=self.model.config)
        except InputError:
            raise
        except Exception as error:
            raise self.checkpoint.error(f"cannot be converted for {target}: {error}", remedy=True) from error
        for name, result in made.items():
            result = result[0] if isinstance(result, list) else result
            if name not in self.targets:
                self._complain([name], "converts to weights that the model has not", _ignored(self.model, "unexpected"))
                continue
            self._note(result.nbytes)
            if not mine:
                self._require_shape(name, self.targets[name], tuple(result.shape))
            self._store(name, result, cut=mine)
            self.filled[id(self.targets[name])] = name

    def _reader(self, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: self._read(name, dtype)

    def _read(self, name: str, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        value = self.checkpoint.read(name, dtype, rows)
        self._note(value.nbytes)
        return value

    def _note(self, held: int) -> None:
        """More bytes of the parameter at hand are held."""
        self.held += held
        self.most_held = max(self.most_held, self.kept + self.held)

    def _require_shape(self, target: str, value: Tensor, found: tuple[int, ...]) -> None:
        if tuple(value.shape) != found:
            raise self.checkpoint.error(
                f"must hold {target} as {tuple(value.shape)}, got {found}; its config.json belongs to other weights"
            )

    def _store(self, target: str, value: Tensor, *, cut: bool) -> None:
        """Copy into this rank's shard; ``cut``: the value is only this rank's rows already."""
        own = self.targets[target]
        local = own.to_local() if isinstance(own, DTensor) else own
        value = value if cut or not own.ndim else value[_rows(own)]
        if value.shape != local.shape:
            raise self.checkpoint.error(f"gives {target} as {tuple(value.shape)} for {tuple(local.shape)}", remedy=True)
        local.copy_(value)
        self.kept += local.nbytes
        self.most_held = max(self.most_held, self.kept + self.held)


def _rows(value: Tensor) -> slice:
    """Rows of the leading dimension that this rank keeps; ``torch.chunk``'s division, as FSDP2's."""
    if not isinstance(value, DTensor):
        return slice(0, len(value))
    if value.placements != (Shard(0),):
        raise RuntimeError(f"only leading dimensions cut over one mesh dimension are read, got {value.placements}")
    length, mesh = len(value), value.device_mesh
    size = -(-length // mesh.size())
    start = min(mesh.get_local_rank() * size, length)
    return slice(start, min(start + size, length))


def _conversions(model: Any) -> list[Any]:
    """transformers' changes of stored layouts for this model; releases before 5 had none."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return list(get_model_conversion_mapping(model))


def _renamer(
    model: Any, mapping: list[Any], targets: dict[str, Tensor]
) -> tuple[Callable[[str], tuple[str, str | None]], Callable[[str], Any]]:
    """From a stored name to (target, pattern of the converter or None), and the order in which names are taken."""
    try:
        from transformers.core_model_loading import dot_natural_key, rename_source_key
    except ImportError:
        return (lambda name: (name, None)), (lambda name: name)
    converters = [step for step in mapping if hasattr(step, "operations")]
    renamings = [step for step in mapping if not hasattr(step, "operations")]

    def rename(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, targets)
        if target not in targets and name in targets:
            return name, None
        return target, pattern

    return rename, dot_natural_key


def _stacks_only(converter: Any) -> bool:
    """True where a row of the result comes from the tensors at its position alone: stacked, then joined within rows."""
    first, *rest = converter.operations
    joined = all(type(step).__name__ == "Concatenate" and step.dim > 0 for step in rest)
    return type(first).__name__ == "MergeModulelist" and first.dim == 0 and joined


def _ignored(model: Any, what: str) -> re.Pattern[str] | None:
    """Names that the architecture says may be "missing" or "unexpected"; old files hold rotary tables."""
    patterns = set(getattr(model, f"_keys_to_ignore_on_load_{what}", None) or ())
    if what == "unexpected":
        patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
