"""This project and TRL in turn on the same models and prompts: a table of CPU seconds a step and of peak memory.

    python -m benchmarks.speed.peers [--settings ...] [--trainers iw-opd distillation] [--rounds 3] [--trl-python PATH]

Every run is a process of its own with one thread. A figure is the median over the measured steps of all rounds; the first
step of a run is left out. Peak memory is the highest resident set over that of the loaded models. Without ``--trl-python``
only this project runs. ``make bench-peers`` does all of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.peers.settings import SETTINGS, Setting, write_pair, write_prompts

TRAINERS = ("iw-opd", "distillation")
SIDES = ("ours", "trl")
HERE = Path(__file__).parent
MEGABYTE = 1e6


def command(side: str, trl_python: str | None, folder: Path) -> list[str]:
    """How a side starts, without the run's arguments."""
    if side == "ours":
        return [sys.executable, "-m", f"benchmarks.speed.{folder.name}.ours"]
    return [str(Path(str(trl_python)).absolute()), "trl_side.py"]


def run(side: str, arguments: list[str], trl_python: str | None, folder: Path = HERE) -> dict[str, Any]:
    """One run's figures, in a process of its own.

    Args:
        side: "ours" or "trl".
        arguments: of the side's script.
        trl_python: Python of an environment with TRL.
        folder: of the benchmark, which holds ``ours.py`` and ``trl_side.py``.
    Raises:
        RuntimeError: it printed no result; with the end of what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if side == "trl":
        environment.pop("PYTHONPATH", None)  # its packages are those of its own environment
    done = subprocess.run(
        command(side, trl_python, folder) + arguments,
        cwd=folder.parents[2] if side == "ours" else folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(f"{side} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(found[-1].removeprefix("RESULT "))
    return result


def measure(setting: Setting, trainer: str, *, sides: list[str], rounds: int, trl_python: str | None) -> dict[str, Any]:
    """All rounds of a setting, the sides taking turns: side -> its summary."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = (str(Path(path).absolute()) for path in write_pair(setting, Path(folder)))
        prompts = Path(folder) / "prompts.jsonl"
        write_prompts(student, prompts)
        for index in range(rounds):
            for side in sides:
                result = run(side, [setting.name, student, teacher, str(prompts), trainer], trl_python)
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
    lines = [
        "| setting | trainer | side | CPU s/step (lowest to highest) | generate | teacher | rest | tokens/s | peak MB "
        "| time, TRL / ours | memory, TRL / ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
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
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def facts(trl_python: str | None) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu.split(': ', 1)[1]}, {os.cpu_count()} cores, one thread a run",
        "python": platform.python_version(),
        "ours": {name: version(name) for name in ("torch", "transformers", "lightning")},
    }
    if trl_python is not None:
        code = (
            "import json; from importlib.metadata import version; "
            "print(json.dumps({n: version(n) for n in ('torch', 'transformers', 'trl')}))"
        )
        found["trl"] = json.loads(subprocess.run([trl_python, "-c", code], capture_output=True, check=True).stdout)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run, print and write ``peers.md`` and ``peers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["iw-opd"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--trl-python", help="Python of an environment with TRL; without it only this project runs")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {asked.rounds}")
    if asked.trl_python is not None and not Path(asked.trl_python).exists():
        parser.error(f"--trl-python must be a Python with TRL, got {asked.trl_python}; `make bench-peers` installs one")
    sides = list(SIDES) if asked.trl_python is not None else ["ours"]
    asked.out.mkdir(parents=True, exist_ok=True)
    about = facts(asked.trl_python)
    results: dict[str, dict[str, Any]] = {}
    for name in asked.settings:
        for trainer in asked.trainers:
            results[f"{name} {trainer}"] = measure(
                SETTINGS[name], trainer, sides=sides, rounds=asked.rounds, trl_python=asked.trl_python
            )
            body = json.dumps({"about": about, "rounds": asked.rounds, "results": results}, indent=2)
            (asked.out / "peers.json").write_text(body + "\n")
            (asked.out / "peers.md").write_text(table(results) + "\n" + json.dumps(about) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
