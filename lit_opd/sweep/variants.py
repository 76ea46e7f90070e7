"""What is compared: every weighting at every point of the grid, by a name to read and a folder's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from lit_opd.compare.strategies import read_setting
from lit_opd.errors import InputError
from lit_opd.report.settings import in_words
from lit_opd.sweep.options import WEIGHTING, Asked

TAKEN = ("compare", "logs")  # folders beside those of the variants
LONGEST = 80  # characters of a folder's name


@dataclass(frozen=True)
class Variant:
    """One setting of the sweep.

    Args:
        name: in tables and pictures; empty where a single one is named after its weighting once that is known.
        folder: below the sweep's.
        words: for ``fit``.
        weighting: class path and all arguments; None where it is the config's own.
        point: of the grid.
    """

    name: str
    folder: str
    words: tuple[str, ...]
    weighting: dict[str, Any] | None
    point: dict[str, str]


def variants(asked: Asked) -> list[Variant]:
    """All of them, weighting by weighting.

    Raises:
        InputError: an unknown strategy or argument, or two that are the same.
    """
    found, folders = [], set(TAKEN)
    for name, setting in named_weightings(asked.weightings).items() or [("", None)]:
        for point in asked.points():
            whole = ", ".join(filter(None, [name, *_in_words(point)]))
            words = [] if setting is None else [f"--{WEIGHTING}", as_word(setting)]
            words += [part for key, value in point.items() for part in (f"--{key}", value)]
            folder = folder_name(whole or "config", folders)
            folders.add(folder.lower())  # some disks do not tell a from A
            found.append(Variant(plain(whole), folder, tuple(words), setting, point))
    return found


def named_weightings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings by name: the class with the arguments that were written, its whole path where two classes are called alike.

    Raises:
        InputError: as ``variants``.
    """
    given = [(word, *read_setting(word, option="--weightings")) for word in words]
    shorts = [short for _, short, _ in given]
    found: dict[str, dict[str, Any]] = {}
    for at, (word, short, setting) in enumerate(given):
        same = next((earlier for earlier, _, other in given[:at] if other == setting), None)
        if same is not None:
            raise InputError(f"`--weightings` must be different settings, got {word}, which is the same as {same}")
        found[short if shorts.count(short) == 1 else _with_path(short, setting)] = setting
    return found


def _with_path(short: str, setting: Mapping[str, Any]) -> str:
    return str(setting["class_path"]) + short[len(str(setting["class_path"]).rpartition(".")[2]) :]


def as_word(setting: Any) -> str:
    """Settings as one word of a command line."""
    return yaml.safe_dump(setting, default_flow_style=True, width=float("inf"), sort_keys=False).strip()


def _in_words(point: Mapping[str, str]) -> list[str]:
    """``lr=1e-4``: the setting's last part where it tells it from the others, else all of it."""
    shorts = [name.rpartition(".")[2] for name in point]
    return [
        f"{short if shorts.count(short) == 1 else name}={_value(value)}"
        for (name, value), short in zip(point.items(), shorts, strict=True)
    ]


def _value(written: str) -> str:
    """A class as one writes it in Python; anything else as it is."""
    try:
        read = yaml.safe_load(written)
    except yaml.YAMLError:
        return written
    return in_words(read) if isinstance(read, dict) else written


def plain(name: str) -> str:
    """Without what pictures read as a formula or leave out of a legend."""
    return name.replace("$", "").lstrip("_")


def folder_name(name: str, taken: set[str]) -> str:
    """Letters, digits and ``._=+-`` of a name, unlike those of ``taken``, which are in small letters.

    >>> folder_name("ImportanceWeighting(w_max=4.0), lr=1e-4", set()), folder_name("Uniform", {"uniform"})
    ('ImportanceWeighting-w_max=4.0-lr=1e-4', 'Uniform-2')
    """
    base = re.sub(r"[^\w.=+-]+", "-", name, flags=re.ASCII).strip("-._")[:LONGEST].strip("-._") or "variant"
    numbered = (f"{base}-{number}" if number > 1 else base for number in range(1, len(taken) + 2))
    return next(found for found in numbered if found.lower() not in taken)
