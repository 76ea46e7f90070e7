"""Fields of a configuration that change what ``forward`` returns, off while a model is sampled and scored.

Router logits, attentions and hidden states of every layer cost memory, and an auxiliary loss of the routers fails on a cached
step. A student is exported with the fields as they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EXTRA = re.compile(r"output_\w*(logits|attentions|states|scores)")
_NEEDED = {"return_dict": True, "torchscript": False}  # names instead of positions in what ``forward`` returns


@dataclass(frozen=True)
class Field:
    """A field that was changed.

    Args:
        place: names of the configurations around it, from the outside.
        name: of the field.
        value: what it was.
    """

    place: tuple[str, ...]
    name: str
    value: Any


def switch_off(config: Any) -> list[Field]:
    """Switch such fields off, in ``config`` and the configurations inside it; returns those that were on."""
    found = []
    for place, part in _configurations(config, ()):
        for name, value in _changed(part):
            found.append(Field(place, name, value))
            setattr(part, name, _NEEDED.get(name, False))
    return found


def _configurations(config: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield place, config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            yield from _configurations(part, (*place, name))


def _changed(config: Any) -> list[tuple[str, Any]]:
    names = {name.removeprefix("_") for name in vars(config)}  # transformers keeps some of them behind a property
    found = []
    for name in sorted(names):
        value = getattr(config, name, None)
        if name in _NEEDED:
            if value is not None and bool(value) is not _NEEDED[name]:
                found.append((name, value))
        elif _EXTRA.fullmatch(name) and value and not isinstance(value, str):
            found.append((name, value))
    return found


def restore(file: Path, fields: list[Field]) -> None:
    """Write ``fields`` back into a saved config.json."""
    if not fields:
        return
    saved = json.loads(file.read_text())
    for field in fields:
        part = saved
        for name in field.place:
            part = part[name]
        part[field.name] = field.value
    file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
