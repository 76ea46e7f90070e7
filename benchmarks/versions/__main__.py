"""Which versions run? python -m benchmarks.versions lowest measured newest --out docs (make test-versions)

For each set of ``sets.py`` builds ``.venv-versions/NAME`` (about 5 GB, a CUDA build of torch also runs on a CPU), runs every
check of ``checks.py`` in it, prints a table, and writes it with date and versions to ``verified.md`` and
``benchmarks/versions.json``. A set that is not named keeps what was written before, and with ``--checks`` a set keeps its
other rows as long as its versions are the same. Exit status 1: something failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from benchmarks.pages import part
from benchmarks.versions.checks import CHECKS, Check, run
from benchmarks.versions.sets import Set, above_bounds, sets
from lit_opd.files import replace_whole

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "setup.cfg"
ENVIRONMENTS = ROOT / ".venv-versions"
PAGE, PART = "verified.md", part("versions")
SHOWN = ("torch", "transformers", "lightning", "jsonargparse", "wandb", "torchmetrics", "omegaconf", "numpy", "peft")
OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"


def interpreter(version: str) -> str | None:
    """A Python of ``version`` ("3.12") on the PATH or among pyenv's, None where there is none."""
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for path in (shutil.which(f"python{version}"), sys.executable, *map(str, installed)):
        if path is not None and _version(path) == version:
            return path
    return None


def _version(path: str) -> str:
    """What a Python says it is; empty where it does not run, as a shim without its interpreter."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip()


def build(wanted: Set, base: str) -> tuple[Path, str]:
    """The environment's Python, and why it could not be built (empty where it was)."""
    folder = ENVIRONMENTS / wanted.name
    python = folder / "bin" / "python"
    if not python.exists() or _version(str(python)) != wanted.python:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
    listed = folder / "requirements.txt"
    listed.write_text("\n".join(wanted.lines) + "\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", "-r", str(listed)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return python, "" if done.returncode == 0 else done.stderr.strip()[-2000:]


def installed(python: Path) -> dict[str, str]:
    """Versions by canonical name, as the environment itself says."""
    done = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True)
    return {canonicalize_name(item["name"]): item["version"] for item in json.loads(done.stdout)}


Entry = dict[str, Any]  # of a set: date, python, versions, above, checks by name, a reason where it could not be built


def prepared(wanted: Set) -> Entry:
    """What the report says of a set that was built, or that could not be, before any check."""
    entry: Entry = {"date": datetime.date.today().isoformat(), "python": wanted.python, "versions": {}, "checks": {}}
    base = interpreter(wanted.python)
    if base is None:
        return entry | {"reason": f"no Python {wanted.python} was found"}
    python, problem = build(wanted, base)
    if problem:
        print(problem, file=sys.stderr)
        return entry | {"reason": "pip could not install the set", "checks": {"installation": [False, "pip failed"]}}
    versions = installed(python)
    return entry | {"versions": versions, "above": above_bounds(SETUP, versions)}


def prove(wanted: Set, before: Entry, checks: Sequence[Check], note: Callable[[Entry], None]) -> None:
    """Build a set and run checks in it.

    Args:
        wanted: the set.
        before: what the report says of it; checks that are not run again stay where the versions are the same.
        checks: to run.
        note: told what the report now says, after every check.
    """
    entry = prepared(wanted)
    note(entry)
    if "reason" in entry:
        return
    if before.get("versions") == entry["versions"]:
        entry["checks"] = dict(before["checks"])
    folder = ENVIRONMENTS / wanted.name / "runs"
    folder.mkdir(exist_ok=True)
    for check in checks:
        result = run(check, ENVIRONMENTS / wanted.name / "bin" / "python", folder, ROOT)
        entry["checks"][check.name] = [result.passed, result.said]
        note(entry)
        print(f"{wanted.name}: {check.name}: {OK if result.passed else FAILED} ({result.said})", flush=True)


def failed(report: dict[str, Any]) -> list[str]:
    """What did not run as it should, as "set: check"."""
    return [
        f"{name}: {check}"
        for name, entry in report.items()
        for check, (passed, _) in entry["checks"].items()
        if not passed
    ]


def body_of(report: dict[str, Any]) -> str:
    """The part of the page: versions, then checks, a column a set."""
    names = list(report)
    head = ["| | " + " | ".join(f"{name}" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    rows = [("date", [report[name]["date"] for name in names]), ("Python", [_python(report[name]) for name in names])]
    rows += [(package, [report[name]["versions"].get(package, "") for name in names]) for package in SHOWN]
    found = {check for name in names for check in report[name]["checks"]}
    checks = [check for check in ("installation", *(check.name for check in CHECKS)) if check in found]
    rows += [(check, [_cell(report[name], check) for name in names]) for check in checks]
    lines = head + [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows]
    above = [f"{name}: {', '.join(report[name]['above'])}" for name in names if report[name].get("above")]
    if above:
        lines += ["", f"Beyond the bounds of `setup.cfg`: {'; '.join(above)}."]
    return "\n".join(lines) + "\n"


def _python(entry: dict[str, Any]) -> str:
    return f"{entry['python']} ({entry['reason']})" if "reason" in entry else str(entry["python"])


def _cell(entry: dict[str, Any], check: str) -> str:
    passed, said = entry["checks"].get(check, (None, ""))
    if passed is None:
        return NOT_RUN
    return f"{OK} ({said})" if passed else FAILED


def main() -> int:
    """The exit status."""
    known, named = sets(SETUP), {check.name: check for check in CHECKS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=list(known), help="which ones")
    parser.add_argument("--checks", nargs="+", choices=list(named), default=list(named), help="rows; default all")
    parser.add_argument("--out", type=PART.in_folder(PAGE), default=ROOT / "docs", help="folder of verified.md")
    options = parser.parse_args()
    path = options.out / "benchmarks" / "versions.json"
    report: dict[str, Entry] = json.loads(path.read_text()) if path.is_file() else {}
    ENVIRONMENTS.mkdir(exist_ok=True)
    for name in options.sets:

        def note(entry: Entry, name: str = name) -> None:
            report[name] = entry
            ordered = {key: report[key] for key in known if key in report}
            replace_whole(path, (json.dumps(ordered, indent=1) + "\n").encode())
            PART.write(options.out / PAGE, body_of(ordered))

        prove(known[name], report.get(name, {}), [named[check] for check in options.checks], note)
    print(body_of({key: report[key] for key in known if key in report}), end="")
    return 1 if failed({name: report[name] for name in options.sets}) else 0


if __name__ == "__main__":
    sys.exit(main())
