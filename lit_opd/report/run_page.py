"""``report.html``: one run on one self-contained page, from the files of its folder alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lit_opd.files import replace_whole
from lit_opd.report import html
from lit_opd.report.charts import Drawing
from lit_opd.report.run_files import CONFIG, Measured, RunFiles, mean, read_run_files
from lit_opd.report.run_panels import by_position, evaluated, heat_maps, over_training, throughput
from lit_opd.report.run_words import facts, figures, headline, state, what_next, where

NAME = "report.html"
ENDS = ("", "_low", "_high")


def write_report(folder: str | Path) -> Path:
    """Read the run folder and write its page there, whole or not at all.

    Raises:
        InputError: no run folder, or a broken file in it.
        OSError: the disk does not take it.
    """
    path = Path(folder) / NAME
    replace_whole(path, render(read_run_files(folder)).encode())
    return path


def render(run: RunFiles) -> str:
    """The page."""
    groups: dict[str, list[Drawing]] = {
        "training": over_training(run),
        "position": by_position(run),
        "heat": heat_maps(run),
        "throughput": throughput(run),
    }
    drawings = [drawing for group in groups.values() for drawing in group]
    places = iter(range(len(drawings)))
    numbered = {name: [(next(places), drawing) for drawing in group] for name, group in groups.items()}
    data = {"drawings": [drawing.to_json() for drawing in drawings], "samples": [_sample(s) for s in run.samples]}
    return html.render(
        "run.html.j2",
        name=run.folder.resolve().name,
        headline=headline(run),
        state=state(run),
        written=time.strftime("%Y-%m-%d %H:%M"),
        figures=figures(run),
        hints=run.hints,
        drawings=numbered,
        where=where(run),
        evaluations=_evaluations(run),
        num_samples=run.num_samples,
        shown_samples=len(run.samples),
        facts=facts(run),
        next_steps=what_next(run),
        config=_config_text(run),
        data=html.embedded(data),
    )


def _config_text(run: RunFiles) -> str:
    path = run.folder / CONFIG
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _evaluations(run: RunFiles) -> list[dict[str, str]]:
    """A row a set: the newest avg@k and its difference from the start, with intervals over problems."""
    rows = []
    for name in evaluated(run):
        step = run.metric(f"eval/{name}/avg_at_k").steps[-1]
        mean_, low, high = (_at(run.metric(f"eval/{name}/avg_at_k{end}"), step) for end in ENDS)
        delta = [_at(run.metric(f"eval/{name}/delta_start{end}"), step) for end in ENDS]
        problems = _at(run.metric(f"eval/{name}/problems"), step)
        rows.append(
            {
                "set": name,
                "step": f"{step:,}",
                "problems": "–" if problems is None else f"{problems:,.0f}",
                "average": _interval("{:.3f}", mean_, low, high),
                "difference": _interval("{:+.3f}", *delta),
            }
        )
    return rows


def _at(found: Measured, step: int) -> float | None:
    """The value at a step, None where there is none: a difference may be missing that an earlier evaluation had."""
    return dict(zip(found.steps, found.values, strict=True)).get(step)


def _interval(form: str, value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    ends = "" if low is None or high is None else f" [{form.format(low)}, {form.format(high)}]"
    return form.format(value) + ends


SHOWN = ("step", "row_id", "prompt", "response", "answer", "teacher", "length", "finish_reason", "verdict", "tokens")
MEANS = ("disagreement", "weight_mean", "reverse_kl_k1")
TENTHS = ("disagreement_by_tenth", "weight_by_tenth")


def _sample(line: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a line of ``samples.jsonl``; lines of older runs lack some of it."""
    found = {name: line.get(name) for name in SHOWN}
    found |= {name: line.get(name) for name in (*MEANS, *TENTHS)}
    if found["disagreement"] is None:
        found["disagreement"] = mean(line.get("disagreement_by_tenth") or [])
    return found
