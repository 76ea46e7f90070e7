"""Run under torchrun on two processes: a fit with the position profile, each rank holding half of the rows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from callbacks import PositionProfile
from tests.helpers import cases, profiled


def main() -> None:
    """Fit in argv[1] with the student argv[2] and the teacher argv[3]; a checkpoint in the middle of a window."""
    torch.set_num_threads(1)
    folder, student, teacher = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    prompts = cases.rollout().prompts
    profiled.fit(
        (student, teacher),
        folder,
        [PositionProfile(every=2, bins=4), profiled.SaveAt(3, folder / "middle.ckpt")],
        steps=4,
        prompts=prompts.rows(torch.arange(int(os.environ["RANK"]), len(prompts), 2)),
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
    )


if __name__ == "__main__":
    main()
