"""Files that travel with the package: configs by name, and paths that begin with ``lit_opd/``."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
_OWN = f"{PACKAGE.name}/"


def config_folder() -> Path:
    """``configs`` inside an installation, beside the package in a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def config_names() -> list[str]:
    """Of all shipped configs, such as "quickstart" and "weighting/uniform"."""
    folder = config_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def config_file(name: str) -> Path | None:
    """The file of a shipped config, with or without its suffix and "configs/" in front; None where there is none."""
    path = config_folder() / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    return path if path.is_file() else None


def with_config_files(words: list[str]) -> list[str]:
    """A command line whose ``--config NAME`` is the shipped file where no file of that name is here."""
    found = list(words)
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option != "--config" or not (equals or at + 1 < len(words)):
            continue
        name = value if equals else words[at + 1]
        path = None if Path(name).exists() else config_file(name)
        if path is not None:
            found[at + (not equals)] = f"--config={path}" if equals else str(path)
    return found


def shipped_path(text: str) -> str:
    """A path that begins with "lit_opd/" and is not here, as it is in the installed package; any other text as it is."""
    if not text.startswith(_OWN) or Path(text).exists():
        return text
    inside = PACKAGE / text.removeprefix(_OWN)
    return str(inside) if inside.exists() else text


def shown_path(text: str) -> str:
    """What a person is shown: a file of the installed package as "lit_opd/...", any other path as it is."""
    path = Path(text)
    return f"{_OWN}{path.relative_to(PACKAGE).as_posix()}" if path.is_relative_to(PACKAGE) else text


def with_shipped_paths(value: Any) -> Any:
    """``shipped_path`` of every text in settings: mappings, namespaces and lists, changed in place."""
    if isinstance(value, str):
        return shipped_path(value)
    if isinstance(value, list):
        value[:] = map(with_shipped_paths, value)
    elif isinstance(value, dict | Namespace):
        inner = value if isinstance(value, dict) else vars(value)
        for name, part in inner.items():
            inner[name] = with_shipped_paths(part)
    return value


def program() -> str:
    """What a user types before a command: "lit-opd" where that was typed, else "python train.py"."""
    typed = Path(sys.argv[0] or "")
    as_module = typed.name == "__main__.py" and typed.parent.name == PACKAGE.name
    return "lit-opd" if typed.stem == "lit-opd" or as_module else "python train.py"
