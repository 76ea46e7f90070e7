"""What a finished run says, as one JSON object: in its folder as ``reproduce.json``, and as a line of ``results.jsonl``."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.studies.cells import machine
from benchmarks.studies.reproduce.outcomes import by_problem
from benchmarks.studies.reproduce.plan import Job
from benchmarks.studies.run_folder import BANDS, column, finite, metrics, skipped, summary, write_record
from lit_opd.compare.statistics import mean_height
from lit_opd.files import append_lines, as_lines, read_lines, replace_whole

RECORD, LINES = "reproduce.json", "results.jsonl"
CURVES = {"greedy": "val/greedy_accuracy", "avg_at_4": "val/avg_at_k", "reverse_kl": "val/reverse_kl"}
MEANS = {
    "weight_mean": "train/weight_mean",
    "weight_ess": "train/weight_ess",
    "grad_norm": "train/grad_norm",
    "clip_fraction": "train/clip_fraction",
}
Record = dict[str, Any]


def measured(folder: Path) -> Record:
    """Curves as [step, value] pairs, disagreement by relative position at each evaluation, means over the steps that were not
    skipped; by problem."""
    rows = metrics(folder)
    logged = {name: column(rows, key) for name, key in MEANS.items()}
    bands = [[int(row["step"]), [float(row[band]) for band in BANDS]] for row in rows if row.get(BANDS[0])]
    return {
        "curves": {name: column(rows, key) for name, key in CURVES.items()},
        "bands": bands,
        "means": {name: fmean(value for _, value in finite(points)) for name, points in logged.items()},
        **skipped(*logged.values()),
    } | by_problem(folder)


def code_version() -> str:
    """Commit of this code, with "-dirty" where files differ from it; "unknown" outside a clone."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def finish(
    job: Job, folder: Path, *, cpu_seconds: float, wall_seconds: float, models: dict[str, Any], code: str
) -> Record:
    """Write ``reproduce.json``, which makes the run a finished one; returns its content.

    Args:
        job, folder: the run.
        cpu_seconds, wall_seconds: of the process that finished it.
        models: role -> what ``asset.json`` says of a model that is not the shipped one.
        code: ``code_version`` of when it was made.
    """
    ends = summary(folder)
    record = {
        "run": job.name,
        "condition": job.condition,
        "variant": job.variant,
        "seed": job.seed,
        "label": job.label,
        "plan": job.plan,
        "settings": job.settings_sha,
        "learning_rate": job.settings["model"]["optimizer"]["init_args"]["lr"],
        "steps": ends["steps"],
        "tokens": ends["tokens"],
        "cpu_seconds": round(cpu_seconds, 1),
        "wall_seconds": round(wall_seconds, 1),
        "models": models,
        "code": code,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    } | measured(folder)
    write_record(folder / RECORD, record)
    return record


def read_record(folder: Path) -> Record | None:
    """The record of a finished run, None where it is not finished."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def area(record: Record) -> float:
    """Mean height of greedy accuracy from the start to the end."""
    places, values = zip(*record["curves"]["greedy"], strict=True)
    return mean_height(places, values, horizon=places[-1])


def is_finished(job: Job, record: Record | None) -> bool:
    """Whether a record is there and of the job's own settings."""
    return record is not None and record["settings"] == job.settings_sha


def add_line(root: Path, record: Record) -> None:
    """Append a finished run to ``results.jsonl``."""
    append_lines(root / LINES, [record])


def all_results(root: Path) -> list[Record]:
    """Every line, oldest first: of all plans that share the folder, and of runs that were made again since."""
    return read_lines(root / LINES)


def read_results(root: Path) -> dict[str, Record]:
    """The newest line of every run, by its name; a line that a kill cut short is left out."""
    return {record["run"]: record for record in all_results(root)}


def mended(root: Path) -> dict[str, Record]:
    """``read_results``, and the file without a cut last line, which the next one would be appended to."""
    path = root / LINES
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        replace_whole(path, as_lines(read_lines(path)))
    return read_results(root)
