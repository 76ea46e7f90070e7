"""What the crew's processes do, seen from the runner, which does not import the stack: that would take it seconds."""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies.reproduce.plan import Asset, Job
from benchmarks.studies.reproduce.results import Record
from lit_opd.sweep.crew import Report


def train(job: Job, root: Path, report: Report) -> Record:
    """``worker.run_job``."""
    from benchmarks.studies.reproduce.worker import run_job

    return run_job(job, root, report)


def build(asset: Asset, root: Path, report: Report) -> Record:
    """``worker.build``."""
    from benchmarks.studies.reproduce.worker import build

    return build(asset, root)
