"""What writes ``problems.jsonl`` while a run trains; ``outcomes.py`` says what is in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.studies.reproduce.outcomes import FILE, PER_NAT, packed
from lit_opd.evaluation.statistics import PositionBands, WeightedMean
from lit_opd.files import append_lines
from lit_opd.masked import lengths, positions

EDGE = 0.3  # of the response, at either end
DIGITS = 4


class KeptAnswers(WeightedMean):
    """A mean that keeps its rows, in the order of the validation file."""

    def __init__(self) -> None:
        super().__init__()
        self.right: list[bool] = []

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add verdicts [B], where ``weights`` bool [B]."""
        super().update(values, weights)
        self.right += (values[weights.bool()] > 0).tolist()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.right = []


class KeptDivergence(WeightedMean):
    """A mean over tokens that keeps the means of each row and of its ends, and the means by position."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []
        self.bands = PositionBands()

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add nats a token [B, T], where ``weights`` bool [B, T]."""
        super().update(values, weights)
        mask = weights.bool()
        self.bands.update(values, mask)
        relative = (positions(mask).double() - 0.5) / lengths(mask).clamp(min=1).unsqueeze(-1)
        parts = (mask, mask & (relative < EDGE), mask & (relative >= 1 - EDGE))
        means = [torch.where(part, values.double(), 0.0).sum(-1) / part.sum(-1).clamp(min=1) for part in parts]
        self.rows += (torch.stack(means, -1) * PER_NAT).round().long()[mask.any(-1)].tolist()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rows, self.bands = [], PositionBands()


class KeepProblems(Callback):
    """Writes ``problems.jsonl``; of one process, like all runs of a study."""

    def __init__(self) -> None:
        self.weights = PositionBands()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put means that keep their rows where the module's are."""
        pl_module.evaluator.means["greedy_accuracy"] = KeptAnswers()  # type: ignore[union-attr,index]
        pl_module.evaluator.means["reverse_kl"] = KeptDivergence()  # type: ignore[union-attr,index]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the weights of a step."""
        record = outputs["step"]
        self.weights.update(record.weights, record.signal.mask)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a line."""
        means: Any = pl_module.evaluator.means  # type: ignore[union-attr]
        right, kl = means["greedy_accuracy"].right, means["reverse_kl"]
        line = {
            "step": trainer.global_step,
            "problems": len(right),
            "right": packed(right),
            "kl": kl.rows,
            "kl_bands": rounded(kl.bands),
            "weight_bands": rounded(self.weights),
        }
        append_lines(Path(trainer.default_root_dir) / FILE, [line])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on summing."""
        return {"total": self.weights.total, "count": self.weights.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self.weights.total, self.weights.count = state_dict["total"], state_dict["count"]


def rounded(bands: PositionBands) -> list[float | None]:
    """Means for JSON; None where a band has no tokens."""
    means = (bands.total / bands.count).tolist()
    return [None if math.isnan(value) else round(value, DIGITS) for value in means]
