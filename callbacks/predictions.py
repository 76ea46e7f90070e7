"""The files that ``train.py predict`` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_opd.distributed import gather_objects
from lit_opd.errors import InputError
from lit_opd.files import replace_whole
from lit_opd.report.tokens_page import PredictedResponse, predicted_responses, render
from lit_opd.types import Prediction

FILE_NAME, PAGE_NAME = "predictions.jsonl", "predictions.html"


class PredictionFiles(BasePredictionWriter):
    """``predictions.jsonl``: completions with log-probs and weight of every token; ``predictions.html``: the same to look at.

    Both are in the run folder and replace those of an earlier ``predict``.

    Args:
        page_rows: responses on the page, the first ones; 0 for none.
    Raises:
        InputError: ``page_rows`` below 0.
    """

    def __init__(self, page_rows: int = 64) -> None:
        super().__init__(write_interval="batch")
        if page_rows < 0:
            raise InputError(f"`{type(self).__name__}.page_rows` must be >= 0, got {page_rows}")
        self.page_rows = page_rows
        self._shown: list[PredictedResponse] = []
        self._count = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new file."""
        self._shown, self._count = [], 0
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE_NAME).write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Prediction,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the batch's rows of all ranks."""
        rows = gather_objects(predicted_responses(prediction, pl_module.tokenizer))
        if not trainer.is_global_zero:
            return
        text = "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
        with (Path(trainer.default_root_dir) / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(text)
        self._count += len(rows)
        self._shown += rows[: self.page_rows - len(self._shown)]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        if not trainer.is_global_zero:
            return
        page = Path(trainer.default_root_dir) / PAGE_NAME
        strategy = type(getattr(pl_module, "weighting", None)).__name__
        replace_whole(page, render(self._shown, strategy=strategy, total=self._count).encode())
        rank_zero_info(f"{self._count} predictions: {page.with_name(FILE_NAME)}, {page}")
