"""``python train.py compare runs|replay``: reads the files of finished runs, needs no config of a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lit_opd.compare.differences import compare_runs
from lit_opd.compare.document import NAME, Document
from lit_opd.compare.gradients import Dtype, ReplayModels
from lit_opd.compare.replay import find_files, replay_files
from lit_opd.compare.replay_report import replay_document
from lit_opd.compare.runs import read_runs
from lit_opd.compare.runs_report import runs_document
from lit_opd.compare.strategies import read_strategies
from lit_opd.errors import InputError
from lit_opd.objective import Aggregation
from lit_opd.shipped import program


def parser() -> ArgumentParser:
    """The options of both subcommands."""
    description = (
        "Finished runs, or saved rollouts, against each other; reads the files of finished runs, no model's config."
    )
    found = ArgumentParser(prog=f"{program()} compare", description=description)
    commands = found.add_subcommands(dest="what")
    commands.add_subcommand(
        "runs", _runs_parser(), help="finished run folders side by side, paired by seed and by problem"
    )
    commands.add_subcommand("replay", _replay_parser(), help="saved rollouts through a list of weighting strategies")
    return found


def _runs_parser() -> ArgumentParser:
    own = ArgumentParser(description="Finished runs, grouped by variant and paired by seed with the baseline's.")
    own.add_argument("--runs", nargs="+", type=str, required=True, help="run folders or patterns, or name=folder")
    own.add_argument("--baseline", type=str, required=True, help="variant that differences are taken from")
    own.add_argument("--out", type=str, required=True, help="folder for compare.md, .json, .html and the pictures")
    own.add_argument("--group_by", nargs="+", type=str, default=[], help="config keys whose values name a variant")
    own.add_argument(
        "--target", nargs="+", type=str, default=[], help="metric=value; default four fifths of the baseline's way"
    )
    return own


def _replay_parser() -> ArgumentParser:
    own = ArgumentParser(
        description="Weights, and with the models gradients, of saved rollouts under other strategies."
    )
    own.add_argument("--rollouts", nargs="+", type=str, required=True, help="rollouts/step-N.safetensors or patterns")
    own.add_argument(
        "--strategies", nargs="+", type=str, required=True, help="names, class paths or {class_path, init_args}"
    )
    own.add_argument("--out", type=str, required=True, help="folder for compare.md, .json, .html and the pictures")
    own.add_argument("--student", type=str | None, default=None, help="folder of the student that sampled them")
    own.add_argument("--teacher", type=str | None, default=None, help="folder of the teacher")
    own.add_argument("--dtype", type=Dtype, default="float32", help="of both models")
    own.add_argument("--aggregation", type=Aggregation, default="sequence-mean", help="of token losses")
    return own


def run(words: Sequence[str]) -> None:
    """Compare, write the report, print its result.

    Raises:
        InputError: wrong input.
    """
    sys.path.insert(0, os.getcwd())  # a strategy in the user's own file
    config = parser().parse_args(list(words))
    given = config[config.what]
    folder = Path(given.out)
    document = _runs(given, folder) if config.what == "runs" else _replay(given, folder)
    document.write(folder)
    print(document.lines())
    print(f"written: {folder / NAME}.html (and .md, .json, pictures)")


def _runs(given: Any, folder: Path) -> Document:
    targets = dict(map(_target, given.target))
    found = compare_runs(read_runs(given.runs, group_by=given.group_by), baseline=given.baseline, targets=targets)
    return runs_document(found, folder)


def _target(word: str) -> tuple[str, float]:
    metric, _, value = word.partition("=")
    try:
        return metric, float(value)
    except ValueError as error:
        raise InputError(f"`--target` must be metric=number such as greedy=0.8, got {word!r}") from error


def _replay(given: Any, folder: Path) -> Document:
    strategies = read_strategies(given.strategies)
    if (given.student is None) != (given.teacher is None):
        raise InputError("`--student` and `--teacher` must be given together; gradients need both")
    models = None
    if given.student is not None:
        models = ReplayModels(given.student, given.teacher, dtype=given.dtype, aggregation=given.aggregation)
    return replay_document(replay_files(find_files(given.rollouts), strategies, models=models), folder)
