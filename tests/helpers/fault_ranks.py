"""Run on two processes: bad rows of one rank, and memory that runs out on one. Writes to argv[1]."""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from callbacks import RunCheckpoint
from lit_opd.distributed import rank
from lit_opd.errors import InputError
from tests.helpers import cases, fixed, poisoned, two_ranks

FAST = ("ddp gradient", "fsdp2 student", "fsdp2 stopped")
SLOW = tuple(f"{name} {what}" for name in ("ddp", "fsdp2", "fsdp1") for what in ("teacher", "student", "stopped"))
TIMEOUT = timedelta(seconds=30)
LONGEST = max(map(sum, zip(cases.PROMPTS, cases.LENGTHS, strict=True)))  # tokens of a row that one rank has


def fit(models: tuple[str, str], name: str, **settings: Any) -> tuple[Any, fixed.Collect]:
    """One fit under a strategy, each rank holding every second row."""
    trainer = {"devices": 2, "strategy": two_ranks.strategy(name, timeout=TIMEOUT), "use_distributed_sampler": False}
    settings["trainer"] = trainer | settings.get("trainer", {})
    return poisoned.fit(models, prompts=two_ranks.this_rank(cases.rollout().prompts), **settings)


def skipped(models: tuple[str, str], name: str, out: Path, *, bad: Any = (1,), **settings: Any) -> dict[str, Any]:
    """Good, bad, good against good, good."""
    shared = {"trainer": {"default_root_dir": out}}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trained, collect = fit(models, name, bad=set(bad), steps=3, **shared, **settings)
    plain, _ = fit(models, name, bad=set(), steps=2)
    return {
        "skipped": [record.skipped for record in collect.records],
        "same weights": poisoned.bits(fixed.weights(trained)) == poisoned.bits(fixed.weights(plain)),
        "same state": poisoned.optimizer_state(trained) == poisoned.optimizer_state(plain),
        "warnings": [str(w.message) for w in said if "was skipped" in str(w.message)],
    }


def stopped(models: tuple[str, str], name: str, out: Path) -> dict[str, Any]:
    """Every batch is bad."""
    checkpoint = RunCheckpoint(every=100, dirpath=str(out / "checkpoints"))
    settings = {"trainer": {"default_root_dir": out, "enable_checkpointing": True}, "max_skipped_steps": 2}
    try:
        fit(models, name, bad=set(range(8)), steps=8, watch=checkpoint, **settings)
    except InputError as error:
        return {"error": str(error), "notes": error.__notes__}
    return {}


def ended(models: tuple[str, str], out: Path, **settings: Any) -> str:
    """What this rank says when the run ends early."""
    try:
        fit(models, "ddp", bad=set(), steps=2, trainer={"default_root_dir": out}, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def case(models: dict[str, tuple[str, str]], named: str, out: Path) -> dict[str, Any]:
    """What one case, "<strategy> <what>", found."""
    name, what = named.split()
    if what == "stopped":
        return stopped(models["teacher"], name, out / named)
    if what == "gradient":
        return skipped(models["teacher"], name, out / named, bad=set(), watch=poisoned.BadGradient(1))
    return skipped(models[what], name, out / named)


def main() -> None:
    """The cases of argv[2] in one process group, then one that breaks it."""
    torch.set_num_threads(1)
    out, (a, b, c, d) = Path(sys.argv[1]), sys.argv[3:7]
    models = {"teacher": (a, b), "student": (c, d)}
    torch.save({named: case(models, named, out) for named in sys.argv[2].split(",")}, out / f"rank-{rank()}.pt")
    (out / f"long-{rank()}").write_text(ended(models["student"], out, token_budget=LONGEST - 1))
    watch = poisoned.Starved("student", {1}, rank=1)
    (out / f"starved-{rank()}").write_text(ended(models["student"], out, watch=watch))


if __name__ == "__main__":
    main()
