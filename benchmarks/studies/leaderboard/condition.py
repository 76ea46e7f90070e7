"""What a sweep is trained with to be added: the condition's config, its problems, its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from benchmarks.studies.plans import merged
from benchmarks.studies.reproduce.assets import build_asset, drawn, paths_of, split_of
from benchmarks.studies.reproduce.plan import REFERENCE, Job, Plan, folder_of
from lit_opd.errors import InputError
from lit_opd.files import replace_or_refuse
from lit_opd.testbed.task import write_records

CONFIG, VAL = "config.yaml", "val.jsonl"
KEEPER = "benchmarks.studies.reproduce.problems.KeepProblems"
Rows = list[dict[str, str]]


def reference_jobs(plan: Plan, name: str) -> dict[int, Job]:
    """Seed -> the run of uniform, whose settings all others share but for what makes a variant.

    Raises:
        InputError: no such condition, or one that is only tuned in.
    """
    parts = ("base", "full")
    known = [key for key, spec in plan.content["conditions"].items() if spec["part"] in parts]
    if name not in known:
        raise InputError(f"`condition` must be one of {', '.join(known)}, got {name!r}")
    jobs = [job for job in plan.jobs(parts) if job.condition == name and job.variant == REFERENCE]
    if not jobs or "data" not in jobs[0].assets:
        raise InputError(
            f"`conditions.{name}` of {plan.path} must run {REFERENCE} on problems of its own to be added to"
        )
    return {job.seed: job for job in jobs}


def train_file(seed: int | str) -> str:
    """Name of a seed's training problems."""
    return f"train-{seed}.jsonl"


def config_of(job: Job, folder: Path, runs: Path) -> dict[str, Any]:
    """The settings of a run, with the problems in ``folder``; of every seed, so that one config serves a sweep."""
    settings = {
        key: value for key, value in merged(job.settings, paths_of(job, runs)).items() if key != "seed_everything"
    }
    data = {"train": str(folder / train_file("${seed_everything}")), "val": str(folder / VAL)}
    trainer = {"callbacks": [{"class_path": KEEPER}]}
    return merged(settings, {"data": data, "trainer": trainer, "vars": {"condition": job.condition}})


def write_condition(plan: Plan, name: str, out: Path, runs: Path) -> str:
    """Write config and problems; returns the words that say what to do next.

    Args:
        plan, name: which condition.
        out: folder to write.
        runs: folder of the study's runs, whose models are taken; those that are missing are built there.
    Raises:
        InputError: no such condition.
    """
    jobs = reference_jobs(plan, name)
    first = next(iter(jobs.values()))
    for role, asset in first.assets.items():
        if role != "data" and not (folder_of(asset, runs) / "asset.json").is_file():
            print(f"building {folder_of(asset, runs)} ...")
            build_asset(asset, runs)
    pool, val = drawn(first.assets["data"][1])
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / VAL, val)
    for seed, job in jobs.items():
        write_records(out / train_file(seed), split_of(job.assets["data"][1], pool))
    text = yaml.safe_dump(config_of(first, out, runs), sort_keys=False)
    head = (
        f"# lit-opd sweep --config {out / CONFIG} --weightings ... --seeds {' '.join(map(str, jobs))} --out runs/mine\n"
    )
    replace_or_refuse(out / CONFIG, (head + text).encode())
    seeds = " ".join(map(str, jobs))
    return (
        f"wrote {out / CONFIG}, then: lit-opd sweep --config {out / CONFIG} --weightings YOURS --seeds {seeds} --out runs/mine, "
        "and python -m benchmarks.studies.leaderboard --add runs/mine"
    )
