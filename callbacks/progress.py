"""One line that says what is happening."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

BAR_WIDTH = 24


class Progress(ProgressBar):
    """A bar with phase, tokens per second, KL and truncation; plain lines where the output is not a terminal.

    Args:
        every: optimizer steps between plain lines.
        stream: where to write, default standard error.
    """

    def __init__(self, every: int = 5, stream: TextIO | None = None) -> None:
        super().__init__()
        self.every = every
        self._stream = stream
        self._enabled = True
        self._numbers = ""
        self._start = (0.0, 0)
        self._width = 0

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the clock started."""
        self._start = (time.perf_counter(), trainer.global_step)

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Show the phase on a terminal."""
        if self._enabled and self.stream.isatty():
            part = f" {done}/{total}" if total > 1 else ""
            self._overwrite(f"{self._bar()} {name}{part}{self._numbers}")

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Numbers of the step that ended."""
        if not self._enabled:
            return
        logged = trainer.callback_metrics
        seconds = sum(outputs["step"].seconds.values())
        self._numbers = (
            f" | {_number(logged, 'train/tokens') / seconds:,.0f} tokens/s"
            f" | KL {_number(logged, 'train/reverse_kl_k1'):.3f}"
            f" | truncated {_number(logged, 'train/truncated_fraction'):.0%}"
        )
        if self.stream.isatty():
            self._overwrite(f"{self._bar()} done{self._numbers}{self._remaining()}")
        elif trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._line(f"step {trainer.global_step}/{trainer.max_steps}{self._numbers}{self._remaining()}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Numbers of the validation that ended."""
        shown = ("greedy_accuracy", "avg_at_k", "reverse_kl")
        found = {name: trainer.callback_metrics.get(f"val/{name}") for name in shown}
        text = ", ".join(f"{name} {float(value):.3f}" for name, value in found.items() if value is not None)
        if self._enabled and text:
            self._line(f"validation at step {trainer.global_step}: {text}")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """A line of its own above the bar."""
        if self._enabled:
            self._line(" ".join(str(arg) for arg in args))

    def _bar(self) -> str:
        step, total = self.trainer.global_step, max(self.trainer.max_steps, 1)
        filled = round(BAR_WIDTH * min(1.0, step / total))
        return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {step}/{total}"

    def _remaining(self) -> str:
        started, first = self._start
        done = self.trainer.global_step - first
        left = (self.trainer.max_steps - self.trainer.global_step) * (time.perf_counter() - started) / max(done, 1)
        return f" | {left:.0f} s left" if self.trainer.max_steps > 0 else ""

    def _overwrite(self, text: str) -> None:
        self.stream.write("\r" + text.ljust(self._width))
        self.stream.flush()
        self._width = len(text)

    def _line(self, text: str) -> None:
        start = "\r" if self.stream.isatty() else ""
        self.stream.write(f"{start}{text.ljust(self._width)}\n")
        self.stream.flush()
        self._width = 0


def _number(metrics: dict[str, torch.Tensor], name: str) -> float:
    return float(metrics.get(name, torch.tensor(float("nan"))))
