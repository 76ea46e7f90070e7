"""This project and TRL in turn on the same models and prompts: a table of CPU seconds a step and of peak memory.

    python -m benchmarks.speed.peers [--settings ...] [--trainers ...] [--rounds 3] [--trl-python PATH] [--out ...]

Every run is a process of its own with one thread. A figure is the median over the measured steps of all rounds; the first
step of a run is left out. Peak memory is the highest resident set over that of the loaded models. Without ``--trl-python``
only this project runs. ``make bench-peers`` does all of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.speed.peers.settings import SETTINGS, Setting, written
from benchmarks.speed.sides import SIDES, add_options, add_out, facts, in_words, publish, require_sides, run
from lit_opd.compare.document import markdown_table

TRAINERS = ("iw-opd", "distillation")
NAME = "peers"
MEGABYTE = 1e6


def measure(
    setting: Setting, trainer: str, *, sides: Sequence[str], rounds: int, trl_python: str | None
) -> dict[str, Any]:
    """All rounds of a setting, the sides taking turns: side -> its summary."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with written(setting) as paths:
        for index in range(rounds):
            for side in sides:
                result = run("peers", side, [setting.name, *paths, trainer], trl_python)
                runs[side].append(result)
                seconds = median(result["seconds"])
                peak = result["peak"] / MEGABYTE
                print(f"{setting.name} {trainer} round {index + 1} {side}: {seconds:.2f} s, {peak:.0f} MB", flush=True)
    return {side: summary(found, setting) for side, found in runs.items()}


def summary(runs: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """Medians over the steps of all runs; the rest of a step is the student's passes and the update."""
    steps = {
        name: [value for result in runs for value in result[name]]
        for name in ("seconds", "generate", "teacher")
        if all(name in result for result in runs)
    }
    found = {name: median(values) for name, values in steps.items()}
    return {
        **found,
        "rest": found["seconds"] - found.get("generate", 0.0) - found.get("teacher", 0.0),
        "lowest": min(steps["seconds"]),
        "highest": max(steps["seconds"]),
        "tokens_per_second": setting.batch * setting.tokens / found["seconds"],
        "peak": max(result["peak"] for result in runs),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row a setting and trainer."""
    heads = ["setting", "trainer", "side", "CPU s/step (lowest to highest)", "generate", "teacher", "rest", "tokens/s"]
    heads += ["peak MB", "time, TRL / ours", "memory, TRL / ours"]
    rows = []
    for name, sides in results.items():
        for side, row in sides.items():
            both = len(sides) == len(SIDES) and side == "ours"
            ratios = [sides["trl"][key] / row[key] for key in ("seconds", "peak")] if both else []
            cells = [
                *name.split(" "),
                side,
                f"{row['seconds']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})",
                *(f"{row[part]:.2f}" if part in row else "in rest" for part in ("generate", "teacher", "rest")),
                f"{row['tokens_per_second']:.0f}",
                f"{row['peak'] / MEGABYTE:.0f}",
                *([f"{ratio:.2f}" for ratio in ratios] or ["", ""]),
            ]
            rows.append(cells)
    return markdown_table(heads, rows) + "\n"


def body_of(report: dict[str, Any]) -> str:
    """What the page shows."""
    how = f"{report['rounds']} round(s), random weights of fixed seeds (SmolLM2 as it is)"
    return f"{in_words(report['about'])}; {how}.\n\n{table(report['results'])}"


def main(arguments: list[str] | None = None) -> None:
    """Run and print; with --out write JSON and the page's part after every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["iw-opd"])
    add_out(parser, NAME)
    add_options(parser, rounds=3)
    asked = parser.parse_args(arguments)
    require_sides(parser, asked, trl=asked.trl_python is not None, target="bench-peers")
    how = {"sides": SIDES if asked.trl_python is not None else ["ours"], "rounds": asked.rounds}
    report: dict[str, Any] = {"about": facts(asked.trl_python), "rounds": asked.rounds, "results": {}}
    for name in asked.settings:
        for trainer in asked.trainers:
            found = measure(SETTINGS[name], trainer, **how, trl_python=asked.trl_python)
            report["results"][f"{name} {trainer}"] = found
            if asked.out is not None:
                publish(asked.out, NAME, report, body_of(report))
    print(table(report["results"]))


if __name__ == "__main__":
    main()
