"""A run folder as a run would leave it, from a few numbers: for the tests of its page and of comparisons."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_opd.report.profile import BinnedProfile, ProfileWindow

TENTHS, POSITIONS = 10, 6


def window(
    step: int, *, weighted: bool = True, level: float = 1.0, alive: Sequence[float] = (1.0,) * 6
) -> ProfileWindow:
    """Disagreement rises along the response and scales with ``level``; weights fall from 1.5 where ``weighted``."""
    relative = {
        "disagreement": tuple(level * (1 + tenth / 10) for tenth in range(TENTHS)),
        "weight": tuple(1.5 - 0.05 * tenth if weighted else 1.0 for tenth in range(TENTHS)),
        "gradient_share": (1 / TENTHS,) * TENTHS,
    }
    absolute = {
        "disagreement": tuple(level * (1 + place) for place in range(POSITIONS)),
        "drift": tuple(level * place for place in range(POSITIONS)),
        "survivor_fraction": tuple(alive),
    }
    tenths = tuple(tenth / TENTHS for tenth in range(TENTHS + 1))
    places = tuple(float(place) for place in range(1, POSITIONS + 1))
    return ProfileWindow(
        step=step,
        previous_step=step - 1,
        rows=8,
        tokens=48,
        scale="linear",
        absolute=BinnedProfile(places, places, (8,) * POSITIONS, absolute),
        relative=BinnedProfile(tenths[:-1], tenths[1:], (5,) * TENTHS, relative),
        scalars={},
    )


def sample(step: int, **changes: Any) -> dict[str, Any]:
    """A line of ``samples.jsonl``."""
    tokens = {
        "text": ["4", "2"],
        "student_logprob": [-1.0, -2.0],
        "teacher_logprob": [-0.5, -1.5],
        "weight": [1.5, 1.0],
    }
    return {
        "step": step,
        "row_id": f"row-{step}",
        "prompt": "6 * 7 =",
        "response": "\\boxed{42}",
        "answer": "42",
        "verdict": "correct",
        "teacher": None,
        "length": 2,
        "finish_reason": "stop",
        "reverse_kl_k1": -0.5,
        "disagreement": 0.5,
        "weight_mean": 1.25,
        "disagreement_by_tenth": [0.5] * TENTHS,
        "weight_by_tenth": [1.25] * TENTHS,
        "tokens": tokens,
    } | changes


def write(
    folder: Path,
    *,
    metrics: Sequence[dict[str, Any]] = (),
    windows: Sequence[ProfileWindow] = (),
    samples: Sequence[dict[str, Any]] = (),
    hints: Sequence[dict[str, Any]] = (),
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
) -> Path:
    """The files of what is given."""
    folder.mkdir(parents=True, exist_ok=True)
    if metrics:
        names = list(dict.fromkeys(name for row in metrics for name in row))
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.DictWriter(file, names).writerows([dict(zip(names, names, strict=True)), *metrics])
    lines = {"profile": [own.to_json() for own in windows], "samples": samples, "hints": hints}
    for name, records in lines.items():
        if records:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def drawings(page: str) -> dict[str, dict[str, Any]]:
    """What a page draws, by title."""
    return {drawing["title"]: drawing for drawing in embedded(page)["drawings"]}


def embedded(page: str) -> dict[str, Any]:
    """The data of a page."""
    text = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    found: dict[str, Any] = json.loads(text)
    return found
