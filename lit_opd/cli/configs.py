"""``configs``: the configs that come along, listed and copied."""

from __future__ import annotations

import itertools
import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lit_opd.errors import InputError
from lit_opd.files import replace_or_refuse
from lit_opd.shipped import config_file, config_names, program

WIDTH = 80


def run(words: Sequence[str]) -> None:
    """List all, or copy one.

    Raises:
        InputError: no config has the name, or the copy would replace a file.
    """
    own = ArgumentParser(
        prog=f"{program()} configs", description="List the configs that come along, or copy one to change it."
    )
    own.add_argument("name", nargs="?", help="copy this one, such as quickstart or weighting/uniform")
    own.add_argument("to", nargs="?", type=Path, help="file or folder of the copy; default here")
    given = own.parse_args(list(words))
    if given.name is None:
        _list()
        return
    source = config_file(given.name)
    if source is None:
        raise InputError(f"`configs` must be given one of {', '.join(config_names())}, got {given.name}")
    target = given.to or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise InputError(f"`configs {given.name}` must have a new file to write, got {target}; give another name")
    replace_or_refuse(target, source.read_bytes())
    print(f"wrote {target}; run it with {program()} fit --config {target}")


def _list() -> None:
    """Names in groups, what runs by itself with the first sentence of its comment."""
    names = config_names()
    whole = [name for name in names if _runs_alone(name)]
    print("experiments, for --config NAME:")
    for name in whole:
        print(f"  {name}")
        print(textwrap.fill(_about(name), WIDTH, initial_indent="      ", subsequent_indent="      "))
    laid_over = [name for name in names if name not in whole]
    for folder in sorted({name.split("/")[0] for name in laid_over}):
        group = [name.split("/")[1] for name in laid_over if name.startswith(f"{folder}/")]
        print(f"\n{folder}, laid over an experiment by a second --config {folder}/NAME:")
        print(textwrap.fill(", ".join(group), WIDTH, initial_indent="  ", subsequent_indent="  "))


def _runs_alone(name: str) -> bool:
    """Whether the command in the first line of a config names no other."""
    return _comments(name)[0].count("--config ") == 1


def _about(name: str) -> str:
    """The comment of a config after its command, up to the first full stop or colon."""
    return " ".join(_comments(name)[1:]).split(". ")[0].split(": ")[0].rstrip(".")


def _comments(name: str) -> list[str]:
    """The lines of comment at the top of a shipped config; the first is the command that runs it."""
    path = config_file(name)
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None else []
    top = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return [line.removeprefix("#").strip() for line in top] or [""]
