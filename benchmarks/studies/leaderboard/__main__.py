"""Command line of the leaderboard.

python -m benchmarks.studies.leaderboard [board] [--plan FILE] [--records FILE] [--add [NAME=]SWEEP ...] [--out DIR] [--runs DIR]
python -m benchmarks.studies.leaderboard condition NAME --out FOLDER [--plan FILE] [--runs DIR]

``board`` makes leaderboard.md and .html from committed records. ``condition`` writes the config and the problems that a sweep is
trained with to be added.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies.leaderboard.write import write_board
from benchmarks.studies.plans import with_command
from benchmarks.studies.reproduce.plan import PLAN, read_plan
from lit_opd.errors import InputError

REFEREE = PLAN.parent / "referee.yaml"
RECORDS = Path("docs/benchmarks/referee/runs.jsonl")
RUNS = Path("runs/referee")
COMMANDS = ("board", "condition")


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.leaderboard",
        description="Variants by conditions with intervals and ranks. Without a command: board.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    board = commands.add_parser("board", help="leaderboard.md and .html from records")
    condition = commands.add_parser("condition", help="config and problems to train a sweep with")
    for command in (board, condition):
        command.add_argument("--plan", type=Path, default=REFEREE, help="plan file (default: that of docs/referee.md)")
        command.add_argument(
            "--runs", type=Path, default=RUNS, help=f"where conditions' models are, or are built ({RUNS})"
        )
    board.add_argument("--records", type=Path, help=f"records of the plan's runs ({RECORDS})")
    board.add_argument("--add", nargs="+", default=[], metavar="[NAME=]SWEEP", help="folders of lit-opd sweep")
    board.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pages (default: docs)")
    condition.add_argument("name", help="condition of the plan")
    condition.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Do what the words ask for."""
    parser = make_parser()
    args = parser.parse_args(with_command(sys.argv[1:] if words is None else words, COMMANDS, "board"))
    try:
        plan = read_plan(args.plan)
        if args.command == "board":
            if args.records is not None and not args.records.is_file():
                raise InputError(f"`--records` must be a file, got {args.records}; without the option it is {RECORDS}")
            for path in write_board(plan, args.records or RECORDS, args.out, add=args.add, runs=args.runs):
                print(path)
            return
        from benchmarks.studies.leaderboard.condition import write_condition  # builds models, so it loads torch

        print(write_condition(plan, args.name, args.out, args.runs))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
