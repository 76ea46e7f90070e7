"""What is happening now: bars on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, TextIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column

from lit_opd.errors import InputError
from lit_opd.run.tracking import crossed

BAR = 12  # characters; with a count of a thousand steps and the note a line fits 80
EVALUATING = "evaluating"
SHOWN = ("greedy_accuracy", "avg_at_k", "reverse_kl")


class Progress(ProgressBar):
    """Phase, tokens per second, KL, truncation and time left; a second bar for generation inside an evaluation.

    Args:
        every: optimizer steps between plain lines, where the output is not a terminal.
        stream: where to write, default standard error.
    Raises:
        InputError: ``every`` below 1.
    """

    def __init__(self, every: int = 5, stream: TextIO | None = None) -> None:
        super().__init__()
        if every < 1:
            raise InputError(f"`Progress.every` must be >= 1, got {every}")
        self.every = every
        self._stream = stream
        self._enabled = True
        self._numbers = ""
        self._start = (0.0, 0)
        self._total = math.inf  # optimizer steps of the run
        self._last = 0  # optimizer step at the end of the last batch
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}

    @property
    def stream(self) -> TextIO:
        """Looked up late, so that redirection works."""
        return self._stream or sys.stderr

    def disable(self) -> None:
        """Say nothing (Lightning calls this on ranks other than 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    # -- what Lightning and the module tell ------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bars on a terminal."""
        if not self._enabled or not self.stream.isatty():
            return
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(BAR),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=len(f"{trainer.max_steps}") * 2 + 1)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")),
        )
        console = Console(file=self.stream, force_terminal=True)
        self._bars = Bars(*columns, console=console, transient=True, expand=True)
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._tasks = {"training": self._bars.add_task("training", total=total, note="")}
        self._tasks[EVALUATING] = self._bars.add_task(EVALUATING, total=1, note="", visible=False)
        self._bars.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the clock started, and how far it is to go."""
        self._last, self._total = trainer.global_step, float(pl_module.total_steps)  # type: ignore[arg-type]  # an OPDModule
        self._start = (time.perf_counter(), self._last)
        if self._bars is not None and self._total < math.inf:
            self._bars.update(self._tasks["training"], total=self._total)

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Show the phase on a terminal; an evaluation has a bar of its own."""
        if self._bars is None:
            return
        if name.startswith(EVALUATING):
            self._bars.update(
                self._tasks[EVALUATING],
                description=name,
                completed=done,
                total=total,
                visible=done < total,
                refresh=True,
            )
            return
        part = f" {done}/{total}" if total > 1 else ""
        note = f"{name}{part}{self._numbers}"
        self._bars.update(self._tasks["training"], completed=self.trainer.global_step, note=note, refresh=True)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Numbers of the step that ended."""
        if not self._enabled:
            return
        logged, step, last = trainer.callback_metrics, trainer.global_step, self._last
        self._last = step
        seconds = sum(outputs["step"].seconds.values())
        kl = _number(logged, "train/reverse_kl_k1")  # of the student's own samples, of which there may be none
        self._numbers = (
            f"{self._remaining()}{'' if math.isnan(kl) else f' | KL {kl:.3f}'}"
            f" | truncated {_number(logged, 'train/truncated_fraction'):.0%}"
            f" | {_number(logged, 'train/tokens') / seconds:,.0f} tokens/s"
        )
        if self._bars is not None:
            self._bars.update(self._tasks["training"], completed=step, note=f"done{self._numbers}")
        elif crossed(step, last, self.every) or step == self._total:
            of = f"/{self._total:.0f}" if self._total < math.inf else ""
            self._line(f"step {step}{of}{self._numbers}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Numbers of the validation that ended; Lightning's sanity check is none."""
        if trainer.sanity_checking:
            return
        found = {name: trainer.callback_metrics.get(f"val/{name}") for name in SHOWN}
        text = ", ".join(f"{name} {float(value):.3f}" for name, value in found.items() if value is not None)
        if self._enabled and text:
            self._line(f"validation at step {trainer.global_step}: {text}")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """A line of its own above the bars."""
        if self._enabled:
            self._line(" ".join(str(arg) for arg in args))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bars away, after an error too."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bars away, so that the message can be read."""
        self.teardown(trainer, pl_module, "fit")

    # -- writing -----------------------------------------------------------------------------------------------------------

    def _remaining(self) -> str:
        started, first = self._start
        done = self.trainer.global_step - first
        left = (self._total - self.trainer.global_step) * (time.perf_counter() - started) / max(done, 1)
        return f" | {left:.0f} s left" if self._total < math.inf else ""

    def _line(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            self.stream.write(f"{text}\n")
            self.stream.flush()


def _number(metrics: dict[str, torch.Tensor], name: str) -> float:
    return float(metrics.get(name, torch.tensor(float("nan"))))
