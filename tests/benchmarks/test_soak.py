"""The soak's verdicts, and slow: a few hundred real steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.speed import soak

STEADY = [soak.Reading(step=step, memory=500.0, files=11, threads=6, seconds=0.2) for step in range(10, 410, 10)]


def verdicts(change: Any) -> dict[str, bool]:
    """Of steady readings with ``change(step)``'s fields, after a warm-up of 100 steps."""
    readings = [replace(reading, **change(reading.step)) for reading in STEADY]
    return {name: good for name, _, good in soak.findings(readings, 100)}


CASES = {
    "nothing": (lambda step: {}, set()),
    "a jump in the warm-up": (
        lambda step: {"memory": 400.0 if step < 100 else 500.0, "files": 9 if step < 100 else 11},
        set(),
    ),
    "1.2 MiB per 100 steps": (lambda step: {"memory": 500 + 0.012 * step}, {"memory"}),
    "0.8 MiB per 100 steps": (lambda step: {"memory": 500 + 0.008 * step}, set()),
    "a file every 100 steps": (lambda step: {"files": 11 + step // 100}, {"files"}),
    "a file now and then": (lambda step: {"files": 11 + step % 3}, set()),
    "a thread that stays": (lambda step: {"threads": 6 + (step > 300)}, {"threads"}),
    "steps that get slower": (lambda step: {"seconds": 0.2 + 0.0003 * step}, {"step time"}),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_leak_is_told_from_noise(name):
    change, leaks = CASES[name]
    assert {figure for figure, good in verdicts(change).items() if not good} == leaks


def test_the_slope_is_per_100_steps():
    readings = [replace(reading, memory=2.5 * reading.step) for reading in STEADY]
    assert soak.slope(readings, "memory") == pytest.approx(250.0)


@pytest.mark.slow
def test_some_hundred_quickstart_steps_leave_the_process_as_it_was(tmp_path):
    small = [
        "--data.prompt_batch",
        "16",
        "--data.val_batch",
        "16",
        "--data.val_limit",
        "16",
        "--trainer.val_check_interval",
        "50",
    ]
    assert soak.main(["--steps", "400", "--warm_up", "150", "--run_dir", str(tmp_path / "run"), *small]) == 0
