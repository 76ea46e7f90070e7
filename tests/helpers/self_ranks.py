"""Run under torchrun on two processes: fits with a SelfTeacher, interrupted and not. Writes to argv[1] on rank 0.

python -m tests.helpers.self_ranks OUT STUDENT TEACHER STRATEGY
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lit_opd.models.student import LoraSettings, StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.teacher import SelfTeacher
from lit_opd.types import Rollout
from tests.helpers import cases, fixed, two_ranks

TIMEOUT = timedelta(seconds=100)
STEPS = 4
CASES = {
    f"{update}/{objective}/{'adapters' if lora else 'whole'}": (update, objective, lora)
    for update in ("live", "ema", "frozen")
    for objective in ("policy", "divergence")
    for lora in (False, True)
}


def rollout() -> Rollout:
    """As ``cases.rollout``, with prompts of the teacher's own."""
    whole = cases.rollout()
    other = fixed.rollout(lengths=[1] * 7, prompt_lengths=[3, 5, 2, 4, 6, 1, 7], truncated=set(), seed=5).prompts
    return replace(whole, prompts=replace(whole.prompts, teacher_ids=other.ids, teacher_mask=other.mask))


def module(folders: tuple[str, str], name: str) -> OPDModule:
    """Its student has the same adapters at every call."""
    update, objective, lora = CASES[name]
    torch.manual_seed(5)
    settings = StudentSettings(folders[0], dtype="float64", lora=LoraSettings(rank=2) if lora else None)
    return fixed.module(
        folders,
        rollout(),
        student=settings,
        teacher=SelfTeacher(update, 0.7),
        objective=PolicyLoss() if objective == "policy" else Divergence("reverse_kl"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
        token_budget=cases.BUDGET,
    )


def run(folders: tuple[str, str], name: str, folder: Path, **trainer: Any) -> dict[str, Any]:
    """Weights and average of a fit, and of one that was interrupted; the teacher's log-probs of this rank's first row."""
    prompts = rollout().prompts if not trainer else two_ranks.this_rank(rollout().prompts)
    out: dict[str, Any] = {}
    half = folder / f"{name.replace('/', '-')}.ckpt"
    for key, settings in (("half", {"steps": STEPS // 2, "save": half}), ("again", {"load": half}), ("whole", {})):
        trained = module(folders, name)
        fresh = {k: v() if callable(v) else v for k, v in trainer.items()}
        records = fixed.fit(trained, prompts, **({"steps": STEPS} | settings | fresh)).records
        average = trained.teacher.state() or {}
        out[key] = {**fixed.weights(trained), **{f"average {k}": v for k, v in average.items()}}
        out[f"{key} logprobs"] = [record.signal.teacher_logprobs[0] for record in records]
    return out


def main() -> None:
    """Every case under one strategy; what is refused is kept as its message."""
    out, folders, strategy = Path(sys.argv[1]), (sys.argv[2], sys.argv[3]), sys.argv[4]
    trainer = {
        "devices": 2,
        "strategy": lambda: two_ranks.strategy(strategy, timeout=TIMEOUT),
        "use_distributed_sampler": False,
    }
    found: dict[str, Any] = {}
    for name in CASES:
        try:
            found[name] = run(folders, name, out.parent, **trainer)
        except Exception as error:  # the test says which are meant to be
            found[name] = f"{type(error).__name__}: {error}"
    if two_ranks.rank_from_environment() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main()
