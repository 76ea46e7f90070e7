"""Two DDP ranks with unequal numbers of micro-batches and a teacher whose head is read: ``-m tests.helpers.compared_ranks OUT
STUDENT TEACHER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lit_opd.teacher import LocalTeacher
from tests.helpers import cases, fixed
from tests.helpers.two_ranks import rank_from_environment, strategy, this_rank

CASES = ("divergence/reverse_kl", "token kl")


class Counting(LocalTeacher):
    """Counts its forward passes."""

    passes = 0

    def load(self, *, vocabulary: int) -> None:
        """As ever, and counted from then on."""
        super().load(vocabulary=vocabulary)
        self.passes = 0
        self._loaded().causal_lm.get_decoder().register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1


def main(out: Path, folders: tuple[str, str]) -> None:
    """Loss, gradient and the teacher's forward passes of each case, saved by every rank."""
    torch.set_num_threads(1)
    found = {}
    for name in CASES:
        settings, whole = cases.gradient_cases()[name], cases.rollout()
        teacher = Counting(folders[1], dtype="float64", offload=True)
        trained = fixed.module(folders, whole, teacher=teacher, **settings)
        how = {"devices": 2, "strategy": strategy("ddp"), "use_distributed_sampler": False}
        loss, gradient = fixed.gradient(trained, this_rank(whole.prompts), **how)
        found[name] = loss, gradient, teacher.passes
    torch.save(found, out / f"rank-{rank_from_environment()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), (sys.argv[2], sys.argv[3]))
