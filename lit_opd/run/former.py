"""What a run folder has of steps that the run is to make, since it goes back: set aside before its first step, so that no reader
takes two pasts for one.

This is the list of all that a run writes by step, but for two that have rules of their own: the lines of ``evaluation.jsonl``
count again with the same weights, and numbered checkpoints stay until the run saves their step again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_opd.errors import InputError
from lit_opd.files import drop_lines_after, replace_or_refuse
from lit_opd.run.checkpoint_files import REQUEUE, counters, numbered
from lit_opd.run.csv_logger import drop_later_lines, later_lines

FOLDER = "former"  # in the run folder: former/1, former/2, ...
METRICS = "metrics.csv"
LINES = ("profile.jsonl", "samples.jsonl", "hints.jsonl")  # each line has its "step"
NUMBERED = ("rollouts/step-*", "faults/step-*", "student-step-*")  # the step is in the name
DRAWN = ("pictures", "report.html")  # made of lines, and soon again
STUDENT = "student"  # of a run's end
CONFIG, SUMMARY = "config.yaml", "summary.json"
ENDS = (SUMMARY, f"{SUMMARY}.previous")


def set_later_aside(folder: Path, step: int, *, checkpoints: Iterable[Path] = ()) -> Path | None:
    """Move what a run folder has of steps after ``step`` into a new folder ``former/N``, with the config it was made with.

    Copies come first: a kill in between leaves something in both places, and nothing in none.

    Args:
        folder: the run folder, before its config is written anew.
        step: optimizer step that the run goes on from.
        checkpoints: folders of numbered checkpoints.
    Returns:
        the new folder; None where there is nothing of later steps.
    Raises:
        InputError: a broken line, or the disk does not take it; nothing is lost.
    """
    copies, moves = _later_lines(folder, step), list(_later_files(folder, step))
    summary = folder / SUMMARY
    if _end(summary) > step:
        copies[SUMMARY] = summary.read_bytes()
    if copies:
        moves += [folder / name for name in DRAWN if (folder / name).exists()]
    ended_later = any(_end(folder / name) > step for name in ENDS) or any(
        saved > step for place in checkpoints for saved in numbered(place)
    )
    if ended_later and (folder / STUDENT).is_dir():
        moves.append(folder / STUDENT)
    if not copies and not moves:
        return None
    aside = _new(folder / FOLDER)
    if (folder / CONFIG).is_file():
        copies = {CONFIG: (folder / CONFIG).read_bytes(), **copies}
    _copy(copies, aside)
    _move(moves, folder, aside)
    drop_later_lines(folder / METRICS, step)
    for name in LINES:
        if name in copies:
            drop_lines_after(folder / name, step)
    names = sorted({path.relative_to(folder).parts[0] for path in moves} | copies.keys() - {CONFIG})
    rank_zero_info(
        f"the run goes on from step {step}: what it had of later steps is in {aside} now ({', '.join(names)})"
    )
    return aside


def _later_lines(folder: Path, step: int) -> dict[str, bytes]:
    """File -> its whole lines of later steps, of those that have some."""
    found = {METRICS: later_lines(folder / METRICS, step)}
    for name in LINES:
        found[name] = b"".join(line for line, value in _lines(folder / name) if value > step)
    return {name: content for name, content in found.items() if content}


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Whole lines and their steps; none where there is no file."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):  # else a kill cut it short
            try:
                yield line, int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}:{number} must be a JSON object with its step, got {line[:40]!r}; delete the line"
                ) from error


def _later_files(folder: Path, step: int) -> Iterator[Path]:
    """What is named by a later step, and what a SLURM job saved there, which ``last`` would take."""
    for pattern in NUMBERED:
        for path in sorted(folder.glob(pattern)):
            number = path.name.rpartition("step-")[2].partition(".")[0].partition("-")[0]
            if number.isdigit() and int(number) > step:
                yield path
    for path in sorted(folder.glob(f"{REQUEUE}*.ckpt")):
        with suppress(InputError):  # a damaged one is refused where it is looked at
            if int(counters(path)["global_step"]) > step:
                yield path


def _end(path: Path) -> int:
    """The step that a summary says the run ended at; -1 where there is none."""
    try:
        found: Any = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        return -1
    steps = found.get("steps") if isinstance(found, dict) else None
    return steps if isinstance(steps, int) else -1


def _new(folder: Path) -> Path:
    """The first free number."""
    taken = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / str(max(taken, default=0) + 1)


def _copy(copies: dict[str, bytes], aside: Path) -> None:
    try:
        for name, content in copies.items():
            replace_or_refuse(aside / name, content)
    except InputError:
        shutil.rmtree(aside, ignore_errors=True)  # it holds copies alone
        with suppress(OSError):
            aside.parent.rmdir()
        raise


def _move(paths: Iterable[Path], folder: Path, aside: Path) -> None:
    try:
        for path in paths:
            target = aside / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    except OSError as error:
        raise InputError(
            f"`--run_dir` must be a writable folder, but {path} could not be moved to {target}: {error.strerror}; move it by "
            "hand, and give the same command again"
        ) from error
