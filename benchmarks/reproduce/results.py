"""What a finished run says, as one JSON object: in its folder as ``reproduce.json``, and as a line of ``results.jsonl``."""

from __future__ import annotations

import csv
import datetime
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cells import machine
from benchmarks.reproduce.plan import Job
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
BANDS = [f"val/disagreement/band_{start:02d}" for start in range(0, 100, 10)]
Record = dict[str, Any]


def measured(folder: Path) -> Record:
    """Curves as [step, value] pairs, disagreement by relative position at each evaluation, means over the steps."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    bands = [[int(row["step"]), [float(row[band]) for band in BANDS]] for row in rows if row.get(BANDS[0])]
    return {
        "curves": {name: _column(rows, column) for name, column in CURVES.items()},
        "bands": bands,
        "means": {name: fmean(value for _, value in _column(rows, column)) for name, column in MEANS.items()},
    }


def _column(rows: Iterable[dict[str, str]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


def code_version() -> str:
    """Commit of this code, with "-dirty" where files differ from it; "unknown" outside a clone."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def write_record(
    job: Job, folder: Path, *, cpu_seconds: float, wall_seconds: float, models: dict[str, Any], code: str
) -> Record:
    """Write ``reproduce.json``, which makes the run a finished one; returns its content.

    Args:
        job, folder: the run.
        cpu_seconds, wall_seconds: of the process that finished it.
        models: role -> what ``asset.json`` says of a model that is not the shipped one.
        code: ``code_version`` of when it was made.
    """
    summary = json.loads((folder / "summary.json").read_text())
    record = {
        "run": job.name,
        "condition": job.condition,
        "variant": job.variant,
        "seed": job.seed,
        "label": job.label,
        "plan": job.plan,
        "settings": job.settings_sha,
        "learning_rate": job.settings["model"]["optimizer"]["init_args"]["lr"],
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "cpu_seconds": round(cpu_seconds, 1),
        "wall_seconds": round(wall_seconds, 1),
        "models": models,
        "code": code,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    } | measured(folder)
    replace_whole(folder / RECORD, (json.dumps(record, allow_nan=False) + "\n").encode())
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
