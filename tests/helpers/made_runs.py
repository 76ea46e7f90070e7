"""The referee's plan in small, and made runs of a plan: what the studies' tests share."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np

from benchmarks.studies.reproduce.outcomes import packed
from benchmarks.studies.reproduce.plan import PLAN, Plan, read_plan

REFEREE = PLAN.parent / "referee.yaml"
PARTS = ("base", "full")
FEW = 256  # problems of a made run
STEPS = (0, 10, 20, 30, 40)


@cache
def plan_of() -> Plan:
    return read_plan(REFEREE)


def small(spec: dict[str, Any]) -> dict[str, Any]:
    return spec | {"pool": 64, "num_train": 16, "num_val": 8}


def tiny_plan() -> Plan:
    """The plan with little data, and runs of a moment in base and second-pair."""
    content = copy.deepcopy(plan_of().content)
    content["data"] = {name: small(spec) for name, spec in content["data"].items()}
    tiny = {"hidden_size": 16, "num_steps": 1, "cosine": False, "chain_length": 2}
    content["models"] |= {"teacher": tiny | {"seed": 0}, "student": tiny | {"seed": 1}}
    content["data"] = {name: spec | {"chain_length": 2} for name, spec in content["data"].items()}
    models = {"teacher": "teacher", "student": "student"}
    for name in ("base", "second-pair"):
        content["conditions"][name]["models"] |= models
    settings = content["settings"]
    settings["checkpoint_every"], settings["trainer"] = (
        1,
        settings["trainer"] | {"max_steps": 2, "val_check_interval": 1},
    )
    settings["model"]["sampler"] = settings["model"]["sampler"] | {"init_args": {"max_new_tokens": 12}}
    settings["data"] |= {"prompt_batch": 4, "val_batch": 4}
    return Plan(content, REFEREE)


def outcome_of(job: Any, *, lift: float, generator: np.random.Generator, easy: np.ndarray) -> dict[str, Any]:
    """A finished run: each problem right with its own chance, ``lift`` higher; half a nat more divergence late than early."""
    shift = 0.01 * np.random.default_rng(job.seed).standard_normal()  # of the seed, the same for all variants
    verdicts = generator.random((len(STEPS), FEW)) < easy + shift + lift
    kl = (1000 * np.abs(1 + 0.3 * generator.standard_normal((32, 3)) + np.array([0.25, 0.0, 0.5]))).astype(int)
    bands = [0.1 * band for band in range(10)]
    return {
        "run": job.name,
        "condition": job.condition,
        "variant": job.variant,
        "seed": job.seed,
        "label": "",
        "plan": job.plan,
        "settings": job.settings_sha,
        "learning_rate": 2e-4,
        "tokens": 214_300,
        "cpu_seconds": 40.0,
        "finished": "2026-11-27T08:00:00+00:00",
        "machine": "a machine",
        "code": "0123456789ab",
        "models": {},
        "means": {"weight_mean": 1.0, "weight_ess": 1.0, "grad_norm": 7.0 / 3.0, "clip_fraction": 0.0},
        "curves": {"greedy": [[step, float(each.mean())] for step, each in zip(STEPS, verdicts, strict=True)]}
        | {"avg_at_4": [], "reverse_kl": [[step, 1.0] for step in STEPS]},
        "bands": [[step, bands] for step in STEPS],
        "problems": FEW,
        "right": [[step, packed(list(each))] for step, each in zip(STEPS, verdicts, strict=True)],
        "kl": kl.tolist(),
        "kl_bands": [[0, bands], [40, bands]],
        "weight_bands": [1.0] * 9 + [None],
    }


def synthetic(jobs: list[Any], lifts: dict[str, float]) -> list[dict[str, Any]]:
    """A run for every job; a variant's lift is the same everywhere, but that of the two ratios turns in all-legal."""
    generator = np.random.default_rng(7)
    easy = np.clip(generator.normal(0.6, 0.2, FEW), 0.05, 0.85)
    turning = ("prefix-ratio", "windowed-ratio")
    signs = [-1 if job.variant in turning and job.condition == "all-legal" else 1 for job in jobs]
    return [
        outcome_of(job, lift=sign * lifts.get(job.variant, 0.0), generator=generator, easy=easy)
        for job, sign in zip(jobs, signs, strict=True)
    ]
