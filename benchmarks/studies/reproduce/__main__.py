"""Command line of the reproduction.

python -m benchmarks.studies.reproduce tune   [--plan FILE] [--runs DIR] [--jobs N]
python -m benchmarks.studies.reproduce run    [--plan FILE] [--runs DIR] [--jobs N] [--parts base full] [--rerun-changed]
python -m benchmarks.studies.reproduce report [--plan FILE] [--runs DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies.reproduce.hypotheses import hypotheses_of
from benchmarks.studies.reproduce.plan import PLAN, Plan, read_plan
from lit_opd.errors import InputError

RUNS = Path("runs/reproduce")
PARTS = ("base", "full")


def make_parser() -> argparse.ArgumentParser:
    """The three commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.reproduce", description="The evidence bench.")
    commands = parser.add_subparsers(dest="command", required=True)
    tune = commands.add_parser("tune", help="choose a learning rate for every variant, write them into the plan")
    run = commands.add_parser("run", help="train what the plan lists and is not finished")
    report = commands.add_parser("report", help="tables and pictures of what is finished")
    for command in (tune, run, report):
        command.add_argument("--plan", type=Path, default=PLAN, help="plan file (default: the committed one)")
        command.add_argument("--runs", type=Path, default=RUNS, help=f"folder of the runs (default: {RUNS})")
    for command in (tune, run):
        command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
        command.add_argument("--rerun-changed", action="store_true", help="lose runs finished under other settings")
    run.add_argument("--parts", nargs="+", choices=PARTS, default=["base"], help="parts of the plan (default: base)")
    report.add_argument("--out", type=Path, default=Path("docs"), help="folder of findings.md (default: docs)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; wrong input ends with exit code 2 and one line, failed runs with 1."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if getattr(args, "jobs", 1) < 1:
        parser.error(f"--jobs must be >= 1, got {args.jobs}")
    try:
        plan = read_plan(args.plan)
        hypotheses_of(plan)  # before anything is trained
        status = {"tune": tune, "run": run, "report": report}[args.command](plan, args)
    except InputError as error:
        parser.error(str(error))
    raise SystemExit(status)


def run(plan: Plan, args: argparse.Namespace) -> int:
    """The `run` command."""
    from benchmarks.studies.reproduce.runner import run_jobs

    jobs = plan.jobs(tuple(args.parts))
    print(f"plan {plan.sha[:12]}: {len(jobs)} runs{'' if plan.tuned else ', learning rates not tuned'}", flush=True)
    outcome = run_jobs(jobs, args.runs, workers=args.jobs, rerun_changed=args.rerun_changed)
    return outcome.status


def tune(plan: Plan, args: argparse.Namespace) -> int:
    """The `tune` command."""
    from benchmarks.studies.reproduce.results import read_results
    from benchmarks.studies.reproduce.runner import run_jobs
    from benchmarks.studies.reproduce.tune import PART, by_variant, tuning_folder, write_rates

    PART.require(plan.path)  # before anything is trained
    root = tuning_folder(args.runs)
    outcome = run_jobs(list(plan.tuning_jobs()), root, workers=args.jobs, rerun_changed=args.rerun_changed)
    if outcome.failed or outcome.stopped:
        return outcome.status
    changed = write_rates(plan, by_variant(plan, read_results(root).values()))
    print(f"wrote {plan.path}: plan {changed.sha[:12]}")
    return 0


def report(plan: Plan, args: argparse.Namespace) -> int:
    """The `report` command; a plan with the key hypotheses has a page of its own kind."""
    if "hypotheses" in plan.content:
        from benchmarks.studies.reproduce.referee import write_referee

        print(write_referee(plan, args.runs, args.out))
        return 0
    from benchmarks.studies.reproduce.report import write_report
    from benchmarks.studies.reproduce.results import all_results

    print(write_report(plan, all_results(args.runs), args.out))
    return 0


if __name__ == "__main__":
    main()
