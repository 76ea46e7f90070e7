"""Writes the board's files: the generated part of leaderboard.md, leaderboard.html and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import part
from benchmarks.studies.leaderboard.board import board_of, fitting
from benchmarks.studies.leaderboard.page import caption, document_of, markdown_of, picture_rows, sections_of
from benchmarks.studies.reproduce.plan import Plan
from benchmarks.studies.reproduce.report import choose
from lit_opd.errors import InputError
from lit_opd.files import read_lines, replace_whole

PART = part("leaderboard")
PAGE, HTML = "leaderboard.md", "leaderboard.html"
PICTURE = Path("pictures") / "leaderboard.png"
NEEDED = {"run", "condition", "variant", "seed", "settings", "finished", "right", "curves"}  # of a record
ADDED = Path("benchmarks") / "leaderboard" / "added.jsonl"  # below the pages


def write_board(plan: Plan, records: Path, out: Path, *, add: Sequence[str] = (), runs: Path) -> list[Path]:
    """Write page, HTML page and, where a run is finished, picture; returns them.

    Args:
        plan: of the records.
        records: JSON lines, one a run; a file that is not there is a study that has not begun.
        out: folder of the pages.
        add: sweeps whose runs join those of ``ADDED`` first, as ``[NAME=]FOLDER``; rows that do not fit the plan any more are
            named and left out.
        runs: where the conditions' models are.
    Raises:
        InputError: the page has no markers, the records are no records, or a sweep cannot be added.
    """
    page = out / PAGE
    PART.require(page)
    chosen = choose(plan, records_of(records))
    if add:
        from benchmarks.studies.leaderboard.added import add_sweeps  # reads configs, so it loads torch

        add_sweeps(plan, chosen.counted, add, out / ADDED, runs)
    added = read_lines(out / ADDED)
    for line in fitting(plan, added)[1]:
        print(line)
    board = board_of(plan, chosen.counted, added)
    written = [page, out / HTML]
    if board.conditions:
        from benchmarks.studies.leaderboard.picture import draw_board

        draw_board(board, picture_rows(board, plan), out / PICTURE)
        written.append(out / PICTURE)
    sections = sections_of(plan, chosen, board)
    below = caption(board, chosen) if chosen.counted else ""
    PART.write(page, markdown_of(sections, PICTURE.as_posix() if board.conditions else None, below))
    replace_whole(out / HTML, document_of(plan, chosen, board).html().encode())
    return written


def records_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of records; none where there is no file.

    Raises:
        InputError: a folder, or lines that are no records of runs.
    """
    if path.is_dir():
        raise InputError(f"`--records` must be a file of JSON lines, got the folder {path}")
    try:
        found = read_lines(path)
    except ValueError as error:
        raise InputError(f"`--records` must hold a JSON object a line: {error}") from error
    for number, line in enumerate(found, start=1):
        if not isinstance(line, dict) or not NEEDED <= line.keys():
            raise InputError(
                f"`--records` must have a run's record on each line ({', '.join(sorted(NEEDED))}), got {path}:{number}"
            )
    return found
