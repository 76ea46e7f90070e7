"""How fast a run goes, and where its time and memory go."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_opd.errors import InputError
from lit_opd.run.tracking import crossed, log_numbers

PHASES = ("sampling", "scoring", "updating")
MIB = 2**20


class Throughput(Callback):
    """Tokens a second, the share of each phase and the peak memory, over windows of optimizer steps.

    A window's wall time runs from the end of its predecessor's last batch to the end of its own, less validations and the
    evaluations of ``EarlyAIMEEvaluation`` in between; "other" is what is left beside the phases: data, callbacks, logging. Counts
    are sums over the ranks, times and memory the largest of any rank. Tokens are a second, memory is in MiB, shares are fractions
    of the wall time.

    Args:
        every: optimizer steps a window.
    Raises:
        InputError: ``every`` below 1.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise InputError(f"`Throughput.every` must be >= 1, got {every}")
        self.every = every
        self._last = 0
        self._paused: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._clock = time.perf_counter()
        self._aside = 0.0  # seconds of evaluations in this window
        self._tokens = self._trained = 0
        self._phases = dict.fromkeys(PHASES, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the first window."""
        self._last = pl_module.global_step
        self._reset()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it go on."""
        self.go_on()

    def pause(self) -> None:
        """Stop the clock: what comes is no part of the window."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Let the clock go on after ``pause``."""
        if self._paused is not None:
            self._aside += time.perf_counter() - self._paused
            self._paused = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log when the window is full."""
        record = outputs["step"]
        self._tokens += int(record.sampled_tokens)
        self._trained += int(record.kept.sum())
        for name in PHASES:
            self._phases[name] += record.seconds[name]
        if crossed(record.step, self._last, self.every):
            log_numbers(trainer, self._measured(trainer, pl_module.device), record.step)
            self._reset()
        self._last = record.step

    def _measured(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._clock - self._aside, 1e-9)
        times = [seconds, *(self._phases[name] for name in PHASES), _peak_bytes(device) / MIB]
        counts = torch.tensor([self._tokens, self._trained], dtype=torch.float64, device=device)
        sampled, trained = trainer.strategy.reduce(counts, reduce_op="sum").tolist()  # type: ignore[union-attr]
        most = trainer.strategy.reduce(
            torch.tensor(times, dtype=torch.float64, device=device), reduce_op="max"
        ).tolist()
        window, phases, peak = most[0], dict(zip(PHASES, most[1:-1], strict=True)), most[-1]
        values = {
            "throughput/sampled_tokens_per_second": sampled / window,
            "throughput/trained_tokens_per_second": trained / window,
            "throughput/peak_memory_mib": peak,
        }
        values |= {f"throughput/share_{name}": value / window for name, value in phases.items()}
        return values | {"throughput/share_other": max(0.0, 1.0 - sum(phases.values()) / window)}


@contextmanager
def left_out(trainer: Trainer) -> Iterator[None]:
    """While the block runs, no ``Throughput`` of the trainer counts the time."""
    clocks = [callback for callback in trainer.callbacks if isinstance(callback, Throughput)]  # type: ignore[attr-defined]
    for clock in clocks:
        clock.pause()
    try:
        yield
    finally:
        for clock in clocks:
            clock.go_on()


def _peak_bytes(device: torch.device) -> float:
    """The highest allocated memory of a CUDA device, or the process's highest resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
