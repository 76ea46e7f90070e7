"""This project and TRL as two sides of a benchmark: one run of a side, what its figures depend on, where they are published."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.pages import part

ROOT = Path(__file__).resolve().parents[2]
PAGE = "benchmarks.md"
SIDES = ("ours", "trl")
RESULT = "RESULT "  # what the line begins with that a side's script prints its figures on


def run(benchmark: str, side: str, arguments: list[str], trl_python: str | None) -> dict[str, Any]:
    """One run's figures, in a process of its own.

    Args:
        benchmark: folder beside this file with ``ours.py`` and ``trl_side.py``.
        side: one of ``SIDES``.
        arguments: of the side's script.
        trl_python: Python of an environment with TRL.
    Raises:
        RuntimeError: it printed no result; with the end of what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command, folder = [sys.executable, "-m", f"benchmarks.speed.{benchmark}.ours"], ROOT
    if side == "trl":
        environment.pop("PYTHONPATH", None)  # its packages are those of its own environment
        command, folder = [str(Path(str(trl_python)).absolute()), "trl_side.py"], Path(__file__).parent / benchmark
    done = subprocess.run(command + arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not found:
        raise RuntimeError(f"{side} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(found[-1].removeprefix(RESULT))
    return result


def facts(trl_python: str | None = None) -> dict[str, Any]:
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


def in_words(about: dict[str, Any]) -> str:
    """``facts`` as the pages begin with them."""
    packages = {**about["ours"], **about.get("trl", {})}
    return f"{about['machine']}, {about['date']}; {', '.join(f'{name} {number}' for name, number in packages.items())}"


def publish(out: Path, name: str, report: dict[str, Any], body: str) -> None:
    """The numbers as JSON, null where something was never reached, and the part of that name on the page.

    Args:
        out: folder of the page.
        name: of the part, and of the file below ``benchmarks``.
        report: for JSON.
        body: for the page, whole lines.
    """
    path = out / "benchmarks" / f"{name.replace('-', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1).replace("Infinity", "null") + "\n")
    part(name).write(out / PAGE, body)


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """Where to publish."""
    parser.add_argument("--out", type=part(name).in_folder(PAGE), default=None, help=f"folder with {PAGE}")


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """How often the sides take turns, and where TRL is."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--trl-python", help="Python of an environment with TRL; without it only this project runs")


def require_sides(parser: argparse.ArgumentParser, asked: argparse.Namespace, *, trl: bool, target: str) -> None:
    """Refuse what cannot run before anything does.

    Args:
        parser, asked: the command line.
        trl: whether TRL is to run.
        target: of the Makefile, which installs it.
    """
    if asked.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {asked.rounds}")
    if trl and not Path(asked.trl_python or "").is_file():
        parser.error(f"--trl-python must be a Python with TRL, got {asked.trl_python}; `make {target}` installs one")
