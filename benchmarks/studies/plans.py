"""What the plans and the command lines of several studies share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_opd.errors import InputError

HELP = ("-h", "--help")
PARTS = 4  # of benchmarks/studies/STUDY/plan.yaml


def digest(content: Any) -> str:
    """sha256 of plain data, independent of the order of its keys, 64 hexadecimal digits.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, mapping by mapping; another ``class_path`` takes its own ``init_args`` only.

    >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    if above.get("class_path", below.get("class_path")) != below.get("class_path"):
        return dict(above)
    both = {
        key: merged(below[key], value) if isinstance(below.get(key), Mapping) and isinstance(value, Mapping) else value
        for key, value in above.items()
    }
    return {**below, **both}


def read_content(path: Path, keys: Iterable[str], committed: Path) -> dict[str, Any]:
    """The mapping in a plan's file; whoever reads it checks the keys.

    Args:
        path: of ``--plan``.
        keys: that a plan has, for the message.
        committed: the study's own plan, for the message.
    Raises:
        InputError: no file, no YAML, or no mapping.
    """
    if not path.is_file():
        at = Path(*committed.parts[-PARTS:]).as_posix()
        raise InputError(f"`--plan` must be a file, got {path}; the plan is {at}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"`--plan` must be YAML, got {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"`--plan` must hold the keys {', '.join(sorted(keys))}, got {path} with {content!r}")
    return content


def require_known(field: str, names: Iterable[Any], known: Collection[Any]) -> None:
    """
    Raises:
        InputError: one of ``names`` is not known; the first one is named.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"`{field}` must name one of {', '.join(map(str, known))}, got {unknown[0]!r}")


def with_command(words: Sequence[str], commands: Collection[str], usual: str) -> list[str]:
    """A command line whose first word is a command: the ``usual`` one where none is given.

    >>> with_command(["--out", "docs"], ("board", "condition"), "board")
    ['board', '--out', 'docs']
    """
    return list(words) if words and (words[0] in commands or words[0] in HELP) else [usual, *words]
