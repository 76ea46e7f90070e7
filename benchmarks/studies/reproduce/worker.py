"""What a process of the pool does: many runs through the real command line, since importing the stack takes seconds."""

from __future__ import annotations

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

from benchmarks.studies.plans import merged
from benchmarks.studies.reproduce.assets import build_asset, paths_of
from benchmarks.studies.reproduce.plan import Asset, Job, folder_of
from benchmarks.studies.reproduce.problems import KeepProblems
from benchmarks.studies.reproduce.results import Record, code_version, finish
from callbacks import ExportStudent, Progress, RngState, RunCheckpoint, Summary
from lit_opd.sweep.crew import Report
from lit_opd.sweep.logs import logged
from lit_opd.sweep.train import train


def run_callbacks() -> list[Callback]:
    """What a run of the plan needs: no pictures and no profile, which would cost seconds a run."""
    return [Progress(every=10), RngState(), ExportStudent(), Summary(), RunCheckpoint(keep=1), KeepProblems()]


def run_job(job: Job, root: Path, report: Report = lambda steps: None) -> Record:
    """Train one run, or what is left of it; its record.

    Args:
        job: the run.
        root: folder of the runs.
        report: is told the steps that are made.
    Raises:
        TaskFailed: it ended with an error.
    """
    folder, log = root / job.name, root / "logs" / f"{job.name}.log"
    cpu, wall = time.process_time(), time.monotonic()
    if not (folder / "summary.json").is_file() or started_as(folder) != job.settings_sha:
        config = write_config(job, root)
        words = ["fit", "--config", str(config), "--run_dir", str(folder)]
        going_on = ["--ckpt_path", "last"] if resumable(job, folder) else ["--overwrite", "true"]
        train([*words, *going_on], folder, log, run_callbacks, report)
    seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.monotonic() - wall}
    record = finish(job, folder, models=models_of(job, root), code=imported_code(), **seconds)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the student is exported; 100 runs would keep 200 MB
    return record


@functools.cache
def imported_code() -> str:
    """``code_version``, asked once: a process keeps the code it began with."""
    return code_version()


def models_of(job: Job, root: Path) -> dict[str, Any]:
    """Role -> name, greedy accuracy and warm-up steps of the models that are not the shipped ones."""
    found = {}
    for role, asset in job.assets.items():
        about = json.loads((folder_of(asset, root) / "asset.json").read_text())
        if "greedy" in about:
            found[role] = {"name": asset[0], "greedy": about["greedy"], "steps": about["steps"]}
    return found


def build(asset: Asset, root: Path) -> Record:
    """Make one asset; the content of its ``asset.json``.

    Raises:
        TaskFailed: it ended with an error.
    """
    log = root / "logs" / f"{folder_of(asset, root).name}.log"
    return logged(log, lambda: build_asset(asset, root))


def write_config(job: Job, root: Path) -> Path:
    """The whole configuration of a run; both hashes go along to its ``config.yaml``."""
    path = root / "configs" / f"{job.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    hashes = {"vars": {"plan": job.plan, "settings": job.settings_sha}}
    path.write_text(yaml.safe_dump(merged(merged(job.settings, paths_of(job, root)), hashes), sort_keys=False))
    return path


def started_as(folder: Path) -> str | None:
    """Hash of the settings that the run in ``folder`` was started with, None where there is none."""
    path = folder / "config.yaml"
    found: Any = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return (found.get("vars") or {}).get("settings")


def resumable(job: Job, folder: Path) -> bool:
    """Whether a checkpoint of these very settings is there; one of the last step lacks the last evaluation."""
    checkpoints = folder / "checkpoints"
    ended = (checkpoints / f"step-{job.steps}.ckpt").exists()
    return (checkpoints / "last.ckpt").exists() and not ended and started_as(folder) == job.settings_sha
