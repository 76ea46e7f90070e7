"""Seconds and memory of one optimizer step against response length, vocabulary and batch, with the fitted slope.

    python -m benchmarks.speed.curves --out docs

Each point is a process of its own (one thread): random Qwen3 models as in ``benchmarks.speed.peers``, one step to warm up, then
the measured ones. The slope is of log(value) over log(length, vocabulary or batch), fitted over the upper half of the points,
where constant costs matter least: 1 is proportional, 2 quadratic, 0 independent.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.speed.peers.settings import Setting, written
from benchmarks.speed.sides import add_out, facts, in_words, publish, run
from lit_opd.compare.document import markdown_table

NAME = "curves"
BASE = {"batch": 4, "tokens": 256, "vocabulary": 4096}
AXES = {
    "tokens": [128, 256, 512, 1024, 2048, 4096],
    "vocabulary": [1000, 4000, 16_000, 64_000, 151_936],
    "batch": [2, 4, 8, 16, 32],
}


def measured(setting: Setting) -> dict[str, float]:
    """CPU seconds a step, those of sampling, and peak MB over the loaded models."""
    with written(setting) as paths:
        found = run("peers", "ours", [json.dumps(asdict(setting)), *paths, "iw-opd"], None)
    sampling = statistics.median(found["generate"])
    return {"seconds": statistics.median(found["seconds"]), "sampling": sampling, "peak": found["peak"] / 1e6}


def slope(xs: list[int], ys: list[float]) -> float:
    """Of log y over log x by least squares."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def table(axis: str, points: Sequence[tuple[int, dict[str, float]]]) -> list[str]:
    """Markdown of one axis, the slopes last."""
    fixed = ", ".join(f"{name} {value}" for name, value in BASE.items() if name != axis)
    rows = [[str(x), f"{p['seconds']:.2f}", f"{p['sampling']:.2f}", f"{p['peak']:.0f}"] for x, p in points]
    upper = points[len(points) // 2 :] if len(points) > 3 else points
    xs = [x for x, _ in upper]
    fitted = [slope(xs, [max(p[name], 1e-9) for _, p in upper]) for name in ("seconds", "sampling", "peak")]
    rows.append([f"slope from {xs[0]} on", *(f"{value:.2f}" for value in fitted)])
    heads = [axis, "s/step", "of it sampling", "peak MB"]
    return [f"Against {axis} ({fixed}):", "", markdown_table(heads, rows), ""]


def body_of(report: dict[str, Any]) -> str:
    """What the page shows."""
    lines = [f"{in_words(report)}; two measured steps a point, model seeds fixed.", ""]
    return "\n".join([*lines, *(line for axis, points in report["points"].items() for line in table(axis, points))])


def main() -> None:
    """Measure and print; with --out write JSON and the page's part between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_out(parser, NAME)
    parser.add_argument("--axes", nargs="*", choices=sorted(AXES), default=list(AXES))
    given = parser.parse_args()
    report = facts() | {"base": BASE, "points": {axis: [] for axis in given.axes}}
    for axis, points in report["points"].items():
        for value in AXES[axis]:
            setting = Setting(f"{axis}-{value}", **(BASE | {axis: value}), steps=2)
            points.append((value, measured(setting)))
            print(axis, value, points[-1][1], flush=True)
    print(body_of(report))
    if given.out is not None:
        publish(given.out, NAME, report, body_of(report))


if __name__ == "__main__":
    main()
