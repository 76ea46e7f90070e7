"""What a process does with a run of the plan: trains it through the real command line, measures it, writes its record."""

from __future__ import annotations

import datetime
import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

from benchmarks.studies.cells import machine
from benchmarks.studies.healing.measures import Asked, as_lists, asked, measure, measure_teacher
from benchmarks.studies.healing.plan import Job
from benchmarks.studies.healing.problems import Problem
from benchmarks.studies.healing.records import Place, Record, read, write
from benchmarks.studies.plans import merged
from benchmarks.studies.policies import held_out
from benchmarks.studies.run_folder import curve, finite, skipped, summary
from callbacks import ExportStudent, Progress, RngState, RunCheckpoint, StopOnSignal, Summary
from lit_opd.files import replace_whole
from lit_opd.models.loading import load_tokenizer
from lit_opd.sweep.crew import Report
from lit_opd.sweep.train import train

CURVE_POINTS = 50  # that a record keeps of the training curve
CURVE = "train/reverse_kl_k1"


def run_callbacks() -> list[Callback]:
    """What a run of the plan needs: no pictures and no profile."""
    return [Progress(every=10), RngState(), ExportStudent(), Summary(), StopOnSignal(), RunCheckpoint(keep=1)]


# -- before training -----------------------------------------------------------------------------------------------------


def prompt_file(place: Place, model: str, name: str, found: Sequence[Problem]) -> Path:
    """A JSONL file of problems as a model is asked, written where it is not there as it must be."""
    path = place.runs / "prompts" / f"{model}-{name}.jsonl"
    content = "".join(json.dumps(row) + "\n" for row in place.plan.rows(model, found)).encode()
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, content)
    return path


def held_problems(place: Place, model: str, device: str) -> Asked:
    """The held-out problems, and what the teacher writes there: the same in every call."""
    found, folder = place.plan.held_out, place.pair(model)
    settings = {
        **place.plan.content["settings"]["data"],
        **place.plan.content["models"][model]["data"],
        "train": str(prompt_file(place, model, "held-out", found)),
        "val": str(prompt_file(place, model, "held-out", found)),
        "val_batch": len(found),
        "too_long": "error",
    }
    prompts = held_out(settings, load_tokenizer(str(folder / "teacher"), "path"))
    cache = place.runs / device / f"{model}-written.json"  # what the teacher wrote, so that it writes once
    known, of = read(cache) or {}, {"settings": place.start_sha(model), "weights": place.weights_sha(model)}
    held = asked(
        str(folder / "teacher"),
        prompts,
        [problem.answer for problem in found],
        new_tokens=place.plan.content["new_tokens"],
        device=device,
        written=known["written"] if known and known.items() >= of.items() else None,
    )
    write(cache, {**of, "written": as_lists(held.written)})
    return held


def measure_start(model: str, device: str, place: Place, report: Report = lambda steps: None) -> Record:
    """The record of a model before training: of the damaged student, and of its teacher."""
    held, shown = held_problems(place, model, device), place.plan.content["shown"]
    record = {
        "model": model,
        "device": device,
        "settings": place.start_sha(model),
        "weights": place.weights_sha(model),
        "machine": described(device),
        "finished": today(),
        "problems": [problem.question for problem in place.plan.held_out[:shown]],
        "teacher": measure_teacher(held, shown=shown),
        "student": measure(str(place.pair(model) / "student"), held, shown=shown),
    }
    write(place.start(device, model), record)
    return record


# -- a run ---------------------------------------------------------------------------------------------------------------


def settings_of(job: Job, place: Place) -> dict[str, Any]:
    """The whole configuration of a run; the hashes go along to its ``config.yaml``."""
    folder = place.pair(job.model)
    teacher = {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": str(folder / "teacher")}}
    training = prompt_file(place, job.model, f"train-{job.seed}", place.plan.training(job.seed))
    paths = {
        "model": {"student": {"path": str(folder / "student")}, "teacher": teacher},
        "data": {"train": str(training)},
        "vars": {"plan": job.plan, **began(job, place)},
    }
    return merged(job.settings, paths)


def began(job: Job, place: Place) -> dict[str, str]:
    """Hashes of what a run that goes on must have been begun with."""
    return {"settings": job.settings_sha, "weights": place.weights_sha(job.model)}


def is_of(folder: Path, job: Job, place: Place) -> bool:
    """Whether the run in ``folder`` was begun with this job's settings and weights."""
    path = folder / "config.yaml"
    found: Any = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return bool((found.get("vars") or {}).items() >= began(job, place).items())


def trained(job: Job, place: Place, report: Report) -> Path:
    """The run's folder, its training finished now or before.

    Raises:
        TaskFailed: it ended with an error.
    """
    folder = place.runs / job.device / job.name
    mine = is_of(folder, job, place)
    if mine and all(
        (folder / name).is_file() for name in ("summary.json", "student/config.json")
    ):  # the former is written last
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.with_name(f"{folder.name}.yaml")  # not with_suffix, which cuts "iw-1.5"
    config.write_text(yaml.safe_dump(settings_of(job, place), sort_keys=False))
    saved = mine and (folder / "checkpoints" / "last.ckpt").exists()
    going_on = ["--ckpt_path", "last"] if saved else ["--overwrite", "true"]
    words = ["fit", "--config", str(config), "--run_dir", str(folder), "--wandb.mode", "disabled", *going_on]
    train(words, folder, log_of(job, place), run_callbacks, report)
    return folder


def log_of(job: Job, place: Place) -> Path:
    """What a run prints."""
    return place.runs / "logs" / job.device / f"{job.name}.log"


def run_job(job: Job, place: Place, report: Report = lambda steps: None) -> Record:
    """Train one run, or what is left of it, and measure it; its record, which is written too.

    Raises:
        TaskFailed: it ended with an error.
    """
    folder = trained(job, place, report)
    gc.collect()  # the trainer holds itself: weights, gradients and moments stay beside what is loaded now
    end = measure(
        str(folder / "student"), held_problems(place, job.model, job.device), shown=place.plan.content["shown"]
    )
    ends = summary(folder)
    record = {
        **{name: getattr(job, name) for name in ("model", "variant", "seed", "device", "plan", "steps", "batch")},
        "settings": job.settings_sha,
        "weights": place.weights_sha(job.model),
        "tokens": ends["tokens"],
        "seconds": round(ends["seconds"], 1),
        "machine": described(job.device),
        "finished": today(),
        **training_curve(folder),
        "end": end,
    }
    write(place.record(job), record)
    for weights in ("checkpoints", "student"):  # a measured run needs them no more
        shutil.rmtree(folder / weights, ignore_errors=True)
    return record


def training_curve(folder: Path) -> Record:
    """What a record keeps of it, without skipped steps."""
    points = curve(folder, CURVE)
    return {"training_kl": thinned(finite(points)), **skipped(points)}


def thinned(points: Sequence[tuple[int, float]]) -> list[list[float]]:
    """Means of as many stretches of equal length as a record keeps, each at its last step.

    >>> thinned([(1, 2.0), (2, 4.0)])
    [[1, 2.0], [2, 4.0]]
    """
    length = max(1, -(-len(points) // CURVE_POINTS))
    stretches = [points[start : start + length] for start in range(0, len(points), length)]
    return [[part[-1][0], round(sum(value for _, value in part) / len(part), 4)] for part in stretches]


def described(device: str) -> str:
    """This machine, and the name of the GPU where one was used."""
    return machine() if device != "cuda" else f"{machine()}, {torch.cuda.get_device_name()}"


def today() -> str:
    """In UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
