"""``sweep.json`` in the sweep's folder: what was asked for, last and of each run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_opd import __version__
from lit_opd.cli.redaction import redacted
from lit_opd.errors import InputError
from lit_opd.files import replace_or_refuse
from lit_opd.sweep.checks import NEW, Checked
from lit_opd.sweep.options import Asked

RECORD = "sweep.json"


def known_runs(out: Path) -> dict[str, Any]:
    """Run -> what earlier calls wrote of it.

    Raises:
        InputError: a file of that name that is none of a sweep's.
    """
    path = out / RECORD
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"`--out` must be a sweep's folder, got {out}, whose {RECORD} is another file") from error


def write_record(asked: Asked, checked: Checked, *, baseline: str, known: dict[str, Any]) -> None:
    """Write the file; runs of earlier calls stay in it, and code is that of when a run began."""
    own = {}
    for run in checked.runs:
        code = checked.code[run.variant.folder] if run.state == NEW else known.get(run.name, {}).get("code", {})
        own[run.name] = {"variant": run.variant.name, "seed": run.seed, "code": code}
    content = {
        "kind": "sweep",
        "version": __version__,
        "command": _safe(asked.words),
        "config": list(asked.configs),
        "variants": {
            run.variant.name: {"weighting": run.variant.weighting, "grid": run.variant.point} for run in checked.runs
        },
        "seeds": list(asked.seeds),
        "overrides": _safe(asked.overrides),
        "baseline": baseline,
        "runs": known | own,
    }
    replace_or_refuse(asked.out / RECORD, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _safe(words: Sequence[str]) -> list[str]:
    """Without secrets."""
    return [redacted(word) for word in words]
