"""Does a long run stay as it began? python -m benchmarks.speed.soak --steps 2000 (make soak)

Runs the quickstart config and reads, every few steps, what leaks: resident memory, open files, threads, seconds a step.
Writes ``soak.csv`` to the run folder, prints the slopes after the warm-up, and ends with status 1 where a bound is passed.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from callbacks import PositionProfile, default_callbacks
from lit_opd.cli.command import main as run_cli

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
MEMORY_SLOPE = 1.0  # MiB per 100 steps
TIME_RATIO = 1.25  # median of the last quarter over that of the first
EVERY = 10  # steps between readings
FIGURES = ("step", "memory", "files", "threads", "seconds")
PICTURES_EVERY = 50  # steps between drawings, the first of them (and what it loads) within the warm-up


@dataclass(frozen=True)
class Reading:
    """The process at one step.

    Args:
        step: optimizer step.
        memory: resident MiB.
        files: open file descriptors.
        threads: of the interpreter and of libraries.
        seconds: median processor seconds of a training step since the last reading, validations aside; on a machine that is
            shared wall time says more of the neighbours.
        names: what is open and what runs, for the report.
    """

    step: int
    memory: float
    files: int
    threads: int
    seconds: float
    names: tuple[str, ...] = field(default=(), compare=False)


class Watch(Callback):
    """Takes a reading every ``EVERY`` optimizer steps; garbage and what the allocator holds in reserve are no leak."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self._times: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._began = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it, and read on schedule."""
        self._times.append(time.process_time() - self._began)
        if trainer.global_step % EVERY == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            self.readings.append(read(trainer.global_step, statistics.median(self._times)))
            self._times = []


def read(step: int, seconds: float) -> Reading:
    """This process now, from Linux's /proc."""
    own = Path("/proc/self")
    pages = int((own / "statm").read_text().split()[1])
    files = [os.path.realpath(path) for path in (own / "fd").iterdir()]
    threads = [(path / "comm").read_text().strip() for path in (own / "task").iterdir()]
    return Reading(
        step=step,
        memory=pages * os.sysconf("SC_PAGE_SIZE") / MIB,
        files=len(files),
        threads=len(threads),
        seconds=seconds,
        names=(*files, *threads),
    )


def slope(readings: Sequence[Reading], name: str) -> float:
    """Least-squares change of a figure per 100 steps."""
    fit = statistics.linear_regression([r.step for r in readings], [getattr(r, name) for r in readings])
    return 100.0 * fit.slope


def findings(readings: Sequence[Reading], warm_up: int) -> list[tuple[str, str, bool]]:
    """(figure, what was found, within its bound) after ``warm_up`` steps.

    Of files and threads the fewest of the last quarter count against the fewest of the first: what comes and goes is no leak.
    """
    kept = [reading for reading in readings if reading.step > warm_up]
    quarter = max(1, len(kept) // 4)
    first, last = (statistics.median(r.seconds for r in part) for part in (kept[:quarter], kept[-quarter:]))
    memory = slope(kept, "memory")
    found = [
        ("memory", f"{memory:+.2f} MiB per 100 steps, {kept[0].memory:.0f} -> {kept[-1].memory:.0f} MiB", memory < MEMORY_SLOPE),
        ("step time", f"{first:.3f} -> {last:.3f} s (medians of the first and last quarter)", last < TIME_RATIO * first),
    ]  # fmt: skip
    new = ", ".join((Counter(kept[-1].names) - Counter(kept[0].names)).elements())
    for name in ("files", "threads"):
        low = [min(getattr(reading, name) for reading in part) for part in (kept[:quarter], kept[-quarter:])]
        found.append((name, f"{low[0]} -> {low[1]}" + (f", new: {new}" if low[1] > low[0] else ""), low[1] <= low[0]))
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Run, report; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm_up", type=int, default=200, help="steps that do not count")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/soak"))
    given, overrides = parser.parse_known_args(args)
    watch = Watch()
    os.chdir(ROOT)
    command = ["fit", "--config", "configs/quickstart.yaml", "--run_dir", str(given.run_dir.resolve())]
    command += ["--overwrite", "true", "--trainer.max_steps", str(given.steps), *overrides]
    extra = [PositionProfile(pictures_every=PICTURES_EVERY, pictures_share=None), watch]
    kinds = tuple(type(callback) for callback in extra)
    run_cli(lambda: [*(c for c in default_callbacks() if not isinstance(c, kinds)), *extra], command)
    with (given.run_dir / "soak.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIGURES)
        writer.writerows([getattr(reading, name) for name in FIGURES] for reading in watch.readings)
    found = findings(watch.readings, given.warm_up)
    for name, text, good in found:
        print(f"{'ok' if good else 'LEAK':5} {name:10} {text}")
    return 0 if all(good for _, _, good in found) else 1


if __name__ == "__main__":
    sys.exit(main())
