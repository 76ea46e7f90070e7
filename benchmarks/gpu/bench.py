"""What every section has at hand: the device, the sizes, a folder, a clock, and the file of rows."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sizes import Sizes, write_models

MIB, GIB = 2**20, 2**30


@dataclass
class Bench:
    """A section at work.

    Args:
        section: its name.
        sizes: of what is run.
        device: "cuda" or "cpu".
        folder: for models and run folders, shared by all sections.
        rows: file of results, a JSON object a line.
        deadline: of the section, on ``time.monotonic``.
    """

    section: str
    sizes: Sizes
    device: str
    folder: Path
    rows: Path
    deadline: float
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a CUDA device."""
        return self.device == "cuda"

    @property
    def seconds_left(self) -> float:
        """Until the section is stopped."""
        return self.deadline - time.monotonic()

    def note(self, what: str, **figures: Any) -> None:
        """Write a row at once."""
        write_row(self.rows, {"section": self.section, "what": what, **figures})
        self.notes.append({"what": what, **figures})

    def skip(self, what: str, why: str) -> None:
        """Write that something was not run."""
        self.note(what, skipped=why)

    def fail(self, what: str, error: BaseException) -> None:
        """Write that something failed; the section goes on."""
        self.note(what, error=f"{type(error).__name__}: {error}".splitlines()[0][:500])
        if self.on_gpu:
            torch.cuda.empty_cache()

    def attempt(self, what: str, run: Callable[[], dict[str, Any]]) -> None:
        """A row of what ``run`` returns, or of why it failed; an optional package that is not there is skipped."""
        try:
            self.note(what, **run())
        except ModuleNotFoundError as error:
            self.skip(what, f"{error.name} is not installed")
        except Exception as error:  # the row says what failed, the next one is measured
            self.fail(what, error)

    def models(self) -> Path:
        """The folder of the random models, written by the first section that needs it."""
        folder = self.folder / "models"
        folder.mkdir(parents=True, exist_ok=True)
        write_models(folder, self.sizes, device=self.device)
        return folder

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def clock(self) -> float:
        """Seconds, once the device has done all that was sent to it."""
        self.synchronise()
        return time.perf_counter()

    def median_seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Of one call; a first one is left out."""
        run()
        found = []
        for _ in range(repeats):
            start = self.clock()
            run()
            found.append(self.clock() - start)
        return statistics.median(found)

    def reset_peak(self) -> None:
        """Start a new peak of the device's memory."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes of the device at most since ``reset_peak``; None on a CPU, where the processes of a test share one."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else None


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line, in one write: sections and their parent share the file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def in_gib(size: int | None) -> float | None:
    """GiB, two decimals."""
    return None if size is None else round(size / GIB, 2)
