"""``lit-opd``, ``python -m lit_opd`` and, in a checkout, ``python train.py``: one command line.

Help, version, ``configs`` and ``new`` are answered without loading torch, and so are the help of ``sweep`` and the first
screen of ``fit --help``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lit_opd import __version__
from lit_opd.shipped import program, with_config_files

LIGHT = {
    "configs": "lit_opd.cli.configs",
    "new": "lit_opd.cli.new",
    "report": "lit_opd.report.command",
}  # commands, and the modules whose ``run`` they are
SWEEP = "sweep"
HELP = """Distil a student on its own samples, and see where in the response the
teacher helps.

usage: {program} COMMAND [options]

train
  fit         train a student
  sweep       every weighting with every seed, compared at the end
  preflight   check a config, and its memory, without training
  validate    measure a checkpoint
  test        the same once more, in a file of its own
  predict     every token's log-probs and weight, as files
look
  report      one run on a page: report.html in its folder
  compare     runs, or strategies on saved rollouts, side by side
  export      a checkpoint as a Hugging Face folder
  chat        talk to a student: a run, an exported folder or an adapter
  push        upload a student with a model card made from its run
start
  configs     list the configs that come along, or copy one
  new         a folder with a weighting of your own, its config and its test

first:        {program} fit --config quickstart
settings:     {program} fit --help, and fit --help all
Any setting is an option: --model.weighting Uniform --trainer.max_steps 20
Relative paths are seen from the folder you run from; those that begin with
lit_opd/ are the package's own files.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        args: its words, default ``sys.argv``.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(program=program()), end="")
        return
    if words[0] == "--version":
        print(f"lit-opd {__version__}")
        return
    if words[0] in LIGHT:
        from importlib import import_module

        _said(lambda: import_module(LIGHT[words[0]]).run(words[1:]))
        return
    if words[0] == SWEEP:
        from lit_opd.__main__ import run_callbacks  # by a name that other processes can import
        from lit_opd.sweep.command import run as sweep

        raise SystemExit(_said(lambda: sweep(words[1:], run_callbacks)))
    from lit_opd.cli.fit_help import first_screen, without_all

    short = first_screen(words)
    if short is not None:
        print(short, end="")
        return
    from lit_opd.callbacks import default_callbacks
    from lit_opd.cli.command import main as run

    run(default_callbacks, with_config_files(without_all(words)))


def run_callbacks() -> list[Any]:
    """Those of every run, loaded where it trains."""
    from lit_opd.callbacks import default_callbacks

    return list(default_callbacks())


def _said(command: Callable[[], Any]) -> Any:
    """What a command returns; wrong input ends with one line and exit status 2."""
    try:
        return command()
    except ValueError as error:  # what an InputError is
        from lit_opd.errors import InputError

        if not isinstance(error, InputError):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
