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
from dataclasses import asdict

from benchmarks.pages import part
from benchmarks.speed.peers.settings import Setting, written
from benchmarks.speed.sides import facts, in_words, run
from lit_opd.compare.document import markdown_table

PAGE, PART = "benchmarks.md", part("curves")
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
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = statistics.mean(lx), statistics.mean(ly)
    return sum((x - mx) * (y - my) for x, y in zip(lx, ly, strict=True)) / sum((x - mx) ** 2 for x in lx)


def table(axis: str, points: list[tuple[int, dict[str, float]]]) -> list[str]:
    """Markdown of one axis, the slopes last."""
    fixed = ", ".join(f"{name} {value}" for name, value in BASE.items() if name != axis)
    rows = [[str(x), f"{p['seconds']:.2f}", f"{p['sampling']:.2f}", f"{p['peak']:.0f}"] for x, p in points]
    upper = points[len(points) // 2 :] if len(points) > 3 else points
    xs = [x for x, _ in upper]
    fitted = [slope(xs, [max(p[name], 1e-9) for _, p in upper]) for name in ("seconds", "sampling", "peak")]
    rows.append([f"slope from {xs[0]} on", *(f"{value:.2f}" for value in fitted)])
    heads = [axis, "s/step", "of it sampling", "peak MB"]
    return [f"Against {axis} ({fixed}):", "", markdown_table(heads, rows), ""]


def main() -> None:
    """Measure and print; with --out write JSON and the page's part between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=PART.in_folder(PAGE), default=None, help=f"folder with {PAGE}")
    parser.add_argument("--axes", nargs="*", choices=sorted(AXES), default=list(AXES))
    given = parser.parse_args()
    about = facts()
    lines = [f"{in_words(about)}; two measured steps a point, model seeds fixed.", ""]
    raw = {}
    for axis in given.axes:
        points = []
        for value in AXES[axis]:
            changed = BASE | {axis: value}
            setting = Setting(
                f"{axis}-{value}", changed["batch"], changed["tokens"], vocabulary=changed["vocabulary"], steps=2
            )
            points.append((value, measured(setting)))
            print(axis, value, points[-1][1], flush=True)
        lines += table(axis, points)
        raw[axis] = points
    text = "\n".join(lines)
    print(text)
    if given.out is not None:
        (given.out / "benchmarks").mkdir(exist_ok=True)
        about |= {"base": BASE, "points": raw}
        (given.out / "benchmarks" / "curves.json").write_text(json.dumps(about, indent=1) + "\n")
        PART.write(given.out / PAGE, text)


if __name__ == "__main__":
    main()
