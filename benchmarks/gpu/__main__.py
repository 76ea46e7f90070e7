"""Check a GPU machine: python -m benchmarks.gpu (at most 8 minutes on one H100, no network)

Every section runs in a process of its own with a time limit, writes its rows as JSON lines at once, and fails alone. ``--tiny``
runs the same code with tiny shapes, on a CPU too. ``--publish`` writes the tables of docs/verified.md and docs/benchmarks.md from
the rows; ``--rows FILE --publish`` alone does so from rows of another machine. Exit status 1: a row failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import read_rows, write_row
from benchmarks.gpu.page import publish
from benchmarks.gpu.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 10.0  # a section is not started with less
TAIL_LINES = 12  # of a failed section's output


def run_section(name: str, options: argparse.Namespace, rows: Path, left: float) -> None:
    """One section in a process group of its own, which is killed at its limit."""
    limit = min(SECTIONS[name].seconds, left)
    if limit < LEAST_SECONDS:
        write_row(
            rows, {"section": name, "what": "section", "skipped": f"no time left of --minutes {options.minutes:g}"}
        )
        return
    command = [sys.executable, "-m", "benchmarks.gpu.child", name, "--folder", str(options.folder), "--rows", str(rows)]
    command += ["--seconds", f"{limit:.0f}", "--device", options.device, *(["--tiny"] if options.tiny else [])]
    log = options.folder / f"{name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(child)
    seconds = round(time.monotonic() - start, 1)
    row: dict[str, Any] = {"section": name, "what": "section", "seconds": seconds}
    if status != 0:
        said = f"ended with status {status}" if status is not None else f"stopped at its limit of {limit:.0f} s"
        row["error"] = f"{said}; {' / '.join(log.read_text(errors='replace').splitlines()[-TAIL_LINES:])[-1500:]}"
    write_row(rows, row)
    print(f"{name}: {row.get('error', 'done')[:200]} ({seconds} s)", flush=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Its runs, engines and ranks as well."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def measured(options: argparse.Namespace) -> Path:
    """Run the sections; the file of rows."""
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: Path = options.folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for name in options.sections:
        run_section(name, options, rows, end - time.monotonic())
    return rows


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="which; default all"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; what comes too late is skipped")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: only shows that it runs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/gpu"), help="for models, run folders, logs and rows.jsonl"
    )
    parser.add_argument("--rows", type=Path, help="publish these and run nothing")
    parser.add_argument("--publish", type=Path, metavar="DOCS", help="folder with verified.md and benchmarks.md")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny and options.rows is None:
        parser.error("--device cpu must come with --tiny: the full shapes are for a GPU")
    if options.rows is not None and not options.rows.is_file():
        parser.error(f"--rows must be a file, got {options.rows}")
    options.folder = options.folder.absolute()
    rows = options.rows or measured(options)
    found = read_rows(rows)
    if options.publish is not None:
        publish(options.publish, found)
    failed = [row for row in found if "error" in row]
    for row in failed:
        print(f"FAILED {row['section']}, {row['what']}: {row['error']}", file=sys.stderr)
    print(f"{len(found)} rows in {rows}, {len(failed)} failed, {sum('skipped' in row for row in found)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
