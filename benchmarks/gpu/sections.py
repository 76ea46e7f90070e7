"""The sections in the order in which they run: cheap and telling ones first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import decoding, engine, environment, heads, runs, steps
from benchmarks.gpu.bench import Bench


@dataclass(frozen=True)
class Section:
    """Of the report.

    Args:
        run: writes its rows.
        seconds: it may take at most.
    """

    run: Callable[[Bench], None]
    seconds: float


SECTIONS = {
    "environment": Section(environment.run, 120),
    "parity": Section(decoding.parity, 60),
    "decode": Section(decoding.decode, 90),
    "heads": Section(heads.run, 60),
    "steps": Section(steps.run, 120),
    "profile": Section(decoding.profile, 45),
    "runs": Section(runs.run, 120),
    "resume": Section(runs.resume, 90),
    "ranks": Section(runs.ranks, 120),
    "engine": Section(engine.run, 150),
}
