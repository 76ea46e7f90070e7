"""Run under torchrun on two processes: responses in pieces without a stop, and with one. argv: folder, config."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from callbacks import ExportStudent, RunCheckpoint, Summary
from lit_opd.cli.command import main
from lit_opd.distributed import rank


class Seen(Callback):
    """Which rows a rank trained on, step by step: (step begun, row key, tokens), and what each step logged."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[int, int, int]]] = []
        self.told: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep them."""
        rollout = outputs["step"].rollout
        begun, keys = rollout.version[:, 0].tolist(), rollout.prompts.row_keys.tolist()
        self.rows.append(list(zip(begun, keys, rollout.lengths.tolist(), strict=True)))
        self.told.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(config: str, run: Path, *words: str) -> Seen:
    """A run through the command line."""
    seen = Seen()
    main(
        lambda: [seen, ExportStudent(), Summary(), RunCheckpoint()],
        ["fit", "--config", config, "--run_dir", str(run), *words],
    )
    return seen


if __name__ == "__main__":
    folder, given = Path(sys.argv[1]), sys.argv[2]
    whole = fit(given, folder / "whole")
    again = fit(given, folder / "again", "--ckpt_path", str(folder / "whole/checkpoints/step-3.ckpt"))
    found = {name: {"rows": seen.rows, "told": seen.told} for name, seen in (("whole", whole), ("again", again))}
    torch.save(found, folder / f"rank-{rank()}.pt")
