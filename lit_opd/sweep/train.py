"""What a process of the crew does with a run: ``fit`` through the real command line, its output in a log."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_opd.cli.command import main
from lit_opd.sweep.crew import Report
from lit_opd.sweep.logs import logged

SUMMARY = "summary.json"


class Steps(Callback):
    """Tells how many optimizer steps this process has made."""

    def __init__(self, report: Report) -> None:
        self.report, self.start = report, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run begins later."""
        self.start = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell it."""
        if trainer.is_global_zero:
            self.report(trainer.global_step - self.start)


def train(
    words: Sequence[str], folder: Path, log: Path, callbacks: Callable[[], list[Callback]], report: Report
) -> dict[str, Any]:
    """Train one run, or what is left of it; its ``summary.json``.

    Args:
        words: the command line, which begins with ``fit``.
        folder: the run folder.
        log: file that gets everything it prints.
        callbacks: that every run gets.
        report: is told the steps that are made.
    Raises:
        TaskFailed: it ended with an error.
    """
    if multiprocessing.parent_process() is not None:
        _start_ranks_with(words)
    logged(log, lambda: main(lambda: [*callbacks(), Steps(report)], words))
    return dict(json.loads((folder / SUMMARY).read_text()))


def _start_ranks_with(words: Sequence[str]) -> None:
    """Lightning starts further ranks with the command line of this process, which is that of a sweep: make it the run's."""
    import __main__

    sys.argv = [sys.argv[0], *words]
    __main__.__spec__ = importlib.util.find_spec("lit_opd.__main__")
