"""Command line of the testbed.

python -m lit_opd.testbed build [--out DIR] [--seed S]
python -m lit_opd.testbed tools [--out DIR] [--seed S]
python -m lit_opd.testbed data --out FILE --count N --seed S [--chain-length L] [--all-legal]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from lit_opd.errors import InputError
from lit_opd.testbed import ASSETS, TOOLS_ASSETS
from lit_opd.testbed.task import CHAIN_LENGTH, make_automaton, records, sample_problems, write_records


def make_parser() -> argparse.ArgumentParser:
    """The three commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m lit_opd.testbed", description="The embedded default task.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train teacher and student, write the assets (about 2 minutes)")
    build.add_argument("--out", type=Path, default=ASSETS, help="folder to write (default: the shipped assets)")
    build.add_argument("--seed", type=int, default=0, help="initial weights and warm-up problems")
    tools = commands.add_parser("tools", help="the same for the task with tools (about 2 minutes)")
    tools.add_argument("--out", type=Path, default=TOOLS_ASSETS, help="folder to write (default: the shipped assets)")
    tools.add_argument("--seed", type=int, default=0, help="initial weights and warm-up problems")
    data = commands.add_parser("data", help="write prompts with their answers")
    data.add_argument("--out", type=Path, required=True, help="JSON-lines file to write")
    data.add_argument("--count", type=int, required=True, help="number of different problems")
    data.add_argument("--seed", type=int, required=True, help="fixes the problems")
    data.add_argument("--chain-length", type=int, default=CHAIN_LENGTH, help="operations a problem")
    data.add_argument("--all-legal", action="store_true", help="the control: every operation legal everywhere")
    return parser


def write_data(args: argparse.Namespace) -> None:
    """The `data` command."""
    automaton = make_automaton(all_legal=args.all_legal)
    problems = sample_problems(automaton, count=args.count, seed=args.seed, chain_length=args.chain_length)
    name = f"chain{args.chain_length}{'-all' * args.all_legal}-seed{args.seed}"
    write_records(args.out, records(problems, name=name))
    print(f"wrote {args.out}, {len(problems)} problems")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends with exit code 2 and one line."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        if args.command == "data":
            write_data(args)
            return
        torch.set_num_threads(1)  # models this small are slower on more, and one makes a build repeatable
        if args.command == "tools":
            from lit_opd.testbed.tool_build import build_tools

            build_tools(args.out, seed=args.seed)
        else:
            from lit_opd.testbed.build import build

            build(args.out, seed=args.seed)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
