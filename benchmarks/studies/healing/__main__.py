"""Command line of the healing of two real models.

python -m benchmarks.studies.healing [run] [--device cpu | cuda] [--minutes N] [--jobs N] [--models NAME ...]
                                     [--variants NAME ...] [--seeds N ...] [--weights DIR] [--runs DIR] [--records DIR]
python -m benchmarks.studies.healing report [--records DIR] [--out DIR]
python -m benchmarks.studies.healing pieces --models NAME ... --out DIR [--megabytes N]
python -m benchmarks.studies.healing assemble --models NAME ... --from DIR [--weights DIR]

``run`` trains what the plan lists and has no record yet. Where it is stopped, by Ctrl-C or because the minutes are over, what
runs is saved, and the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies.healing.plan import PLAN, Plan, read_plan
from benchmarks.studies.healing.records import SHORT, Place
from benchmarks.studies.plans import require_known, with_command
from lit_opd.errors import InputError

RECORDS = Path("docs/healing/runs")
COMMANDS = ("run", "report", "pieces", "assemble")


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.healing",
        description="Two real language models, damaged and healed. Without a command: run.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what the plan lists and is not finished")
    report = commands.add_parser("report", help="table and picture of what is finished")
    pieces = commands.add_parser("pieces", help="cut the models' files for a machine without a network")
    assemble = commands.add_parser("assemble", help="join the pieces there and convert them")
    for command in (run, report, pieces, assemble):
        command.add_argument("--plan", type=Path, default=PLAN, help="plan file (default: the committed one)")
    for command in (run, pieces, assemble):
        command.add_argument("--models", nargs="+", help="only these of the plan's")
    for command in (run, assemble):
        command.add_argument("--weights", type=Path, default=Path("runs"), help="folder of the models (default: runs)")
    for command in (run, report):
        command.add_argument("--records", type=Path, default=RECORDS, help=f"folder of the records ({RECORDS})")
    run.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    run.add_argument("--minutes", type=float, help="stop after so many; what runs is saved (default: no limit)")
    run.add_argument("--jobs", type=int, help="processes (default: one a core on a CPU, one on a GPU)")
    run.add_argument("--variants", nargs="+", help="only these of the plan's")
    run.add_argument("--seeds", nargs="+", type=int, help="only these of the plan's")
    run.add_argument("--runs", type=Path, default=Path("runs/healing-models"), help="folder of what is large")
    report.add_argument("--out", type=Path, default=Path("docs/healing"), help="folder of models.md (docs/healing)")
    pieces.add_argument("--out", type=Path, required=True, help="folder of the pieces")
    pieces.add_argument("--megabytes", type=int, default=45, help="of a piece, 60 at most (default: 45)")
    assemble.add_argument("--from", type=Path, required=True, dest="source", help="folder of the pieces")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; wrong input ends with exit code 2 and one line, failed runs with 1."""
    parser = make_parser()
    args = parser.parse_args(with_command(sys.argv[1:] if arguments is None else arguments, COMMANDS, "run"))
    try:
        plan = read_plan(args.plan)
        if getattr(args, "models", None):
            require_known("--models", args.models, plan.content["models"])
        status = {"run": run, "report": report, "pieces": pieces, "assemble": assemble}[args.command](plan, args)
    except InputError as error:
        parser.error(str(error))
    raise SystemExit(status)


def run(plan: Plan, args: argparse.Namespace) -> int:
    """The `run` command."""
    from benchmarks.studies.healing.runner import OVER, run_jobs

    jobs = plan.jobs(args.device, models=args.models, variants=args.variants, seeds=args.seeds)
    workers = args.jobs if args.jobs is not None else 1 if args.device == "cuda" else os.cpu_count() or 1
    for field, value in (("--jobs", workers), ("--minutes", args.minutes)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"`{field}` must be above 0 and finite, got {value}")
    require_device(args.device)
    print(f"plan {plan.sha[:SHORT]}: {len(jobs)} runs of {jobs[0].steps} steps on {args.device}", flush=True)
    place = Place(plan, args.runs.resolve(), args.weights.resolve(), args.records.resolve())
    outcome = run_jobs(jobs, place, workers=workers, minutes=args.minutes)
    return int(bool(outcome.failed)) if outcome.stopped == OVER else outcome.status


def require_device(device: str) -> None:
    """
    Raises:
        InputError: this machine has no such device.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("`--device` must be one of this machine, got cuda where torch finds no GPU; use cpu")


def report(plan: Plan, args: argparse.Namespace) -> int:
    """The `report` command."""
    from benchmarks.studies.healing.report import write_report

    print(write_report(plan, args.records, args.out))
    return 0


def pieces(plan: Plan, args: argparse.Namespace) -> int:
    """The `pieces` command."""
    from benchmarks.studies.healing.pieces import SOURCES, cut

    for model in args.models or plan.content["models"]:
        with SOURCES[model].file() as file:
            written = cut(model, file, args.out, plan, megabytes=args.megabytes)
        print("\n".join(str(path) for path in written))
    return 0


def assemble(plan: Plan, args: argparse.Namespace) -> int:
    """The `assemble` command."""
    from benchmarks.studies.healing.pieces import assemble

    for model in args.models or plan.content["models"]:
        print(assemble(model, args.source, args.weights, plan))
    return 0


if __name__ == "__main__":
    main()
