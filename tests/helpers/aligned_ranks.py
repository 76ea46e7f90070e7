"""Run under torchrun on two processes: fits with an AlignedTeacher. Writes to argv[1] on rank 0.

python -m tests.helpers.aligned_ranks OUT STUDENT TEACHER STRATEGY
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lit_opd.models.loading import load_tokenizer
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.teacher import AlignedTeacher, LocalTeacher
from tests.helpers import aligned, fixed, two_ranks

TIMEOUT = timedelta(seconds=100)
TEXTS = ["abcdef", "de abab f", "f", "abc", "cab de", "ab"]
PROMPTS = ["a", "fed", "ab cd", "e", "c c c", "abcde"]
CASES: dict[str, dict[str, Any]] = {
    "single": {"objective": PolicyLoss(), "min_aligned": 0.3},
    "sum": {"objective": PolicyLoss(), "chunks": "sum"},
    "token mean": {"objective": PolicyLoss(), "min_aligned": 0.3, "aggregation": "token-mean"},
    "divergence": {"objective": Divergence("reverse_kl"), "min_aligned": 0.3},
    "below the bound": {"objective": PolicyLoss(), "min_aligned": 0.5},  # 13 of 33 on both ranks together
}


def run(folders: tuple[str, str], name: str, **trainer: Any) -> dict[str, Any]:
    """Weights behind two steps, the share that was logged, and the error where there was one."""
    settings = dict(CASES[name])
    own = {key: settings.pop(key) for key in ("chunks", "min_aligned") if key in settings}
    student, teacher = (load_tokenizer(folder, "model.student.path") for folder in folders)
    rows = aligned.rollout(student, teacher, TEXTS, prompts=PROMPTS)
    prompts = rows.prompts if not trainer else two_ranks.this_rank(rows.prompts)
    trained = fixed.module(
        folders,
        rows,
        teacher=AlignedTeacher(LocalTeacher(folders[1], dtype="float64"), **own),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        token_budget=32,
        **settings,
    )
    fresh = {key: value() if callable(value) else value for key, value in trainer.items()}
    try:
        fixed.fit(trained, prompts, steps=2, **fresh)
    except Exception as error:  # the test says which is meant to be
        return {"error": f"{type(error).__name__}: {error}"}
    share = float(trained.trainer.callback_metrics["train/aligned_fraction"])
    return {"weights": fixed.weights(trained), "share": share}


def main() -> None:
    """Every case under one strategy."""
    out, folders, name = Path(sys.argv[1]), (sys.argv[2], sys.argv[3]), sys.argv[4]
    trainer = {
        "devices": 2,
        "strategy": lambda: two_ranks.strategy(name, timeout=TIMEOUT),
        "use_distributed_sampler": False,
    }
    found = {case: run(folders, case, **trainer) for case in CASES}
    if two_ranks.rank_from_environment() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main()
