"""``report.html``: the run on one page, while it trains and when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_opd.errors import InputError
from lit_opd.report.run_page import write_report
from lit_opd.run.tracking import Allowance, crossed

FIRST_GUESS = 0.15  # seconds a page takes


class RunReport(Callback):
    """Writes ``report.html`` from the files of the run folder: after each validation and at the end. Rank 0 writes.

    A page that cannot be written costs the run nothing and is told once.

    Args:
        every: optimizer steps between pages of a run without validations.
        share: on the way a page is put off while it would take more than this share of the training time; None for no limit.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(self, every: int = 50, share: float | None = 0.01) -> None:
        if every < 1:
            raise InputError(f"`RunReport.every` must be >= 1, got {every}")
        if share is not None and not share >= 0:
            raise InputError(f"`RunReport.share` must be >= 0 or null, got {share}")
        self.every, self.share = every, share
        self._allowance = Allowance(share, first_guess=FIRST_GUESS)
        self._begun = self._told = False
        self._last = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on there is something to show."""
        self._allowance = Allowance(self.share, first_guess=FIRST_GUESS)
        self._begun, self._last = True, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """On schedule where no validation is made."""
        last, self._last = self._last, trainer.global_step
        if not sum(trainer.num_val_batches or [0]) and crossed(self._last, last, self.every):
            self._write_soon(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The page with the new numbers, which the loggers have by now."""
        if self._begun and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._write_soon(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The last page, after ``Summary`` has written its file."""
        if self._begun and stage == "fit":
            self._begun = False
            self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that was stopped has its page too."""
        if self._begun:
            self._begun = False
            self._write(trainer)

    def _write_soon(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._allowance.allowed():
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        try:
            with self._allowance:
                write_report(Path(trainer.default_root_dir))
        except Exception as error:  # whatever is wrong with a file of the folder or its disk
            if not self._told:
                self._told = True
                rank_zero_warn(f"report.html could not be written: {type(error).__name__}: {error}; training goes on")
