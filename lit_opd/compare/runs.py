"""A finished run folder read back: its summary, its settings, its curves, its graded problems."""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lit_opd.errors import InputError
from lit_opd.evaluation.history import FILE_NAME, Comparison
from lit_opd.evaluation.rows import EvaluationFile, past_evaluations
from lit_opd.evaluation.validation import SUMMARISED
from lit_opd.report.profile import ProfileWindow
from lit_opd.report.run_files import PROFILE, read_windows
from lit_opd.report.settings import in_words, setting

_SUMMARY_KEYS = {"steps", "tokens", "seconds", "seed", "strategy"}


@dataclass(frozen=True)
class Curve:
    """One metric at every evaluation of a run.

    Args:
        steps: optimizer steps, rising.
        tokens: tokens sampled for training up to then.
        values: the metric.
        token_gap: why ``tokens`` are not all that were sampled; empty where they are.
    """

    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    values: tuple[float, ...]
    token_gap: str = ""

    def along(self, axis: str) -> tuple[int, ...]:
        """``steps`` or ``tokens``.

        Raises:
            InputError: tokens that were not all counted.
        """
        if axis == "tokens" and self.token_gap:
            raise InputError(self.token_gap)
        return self.tokens if axis == "tokens" else self.steps


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it is.
        variant: what it is a run of.
        summary: ``summary.json``.
        config: ``config.yaml``, empty where there is none.
        curves: by metric (greedy, avg_at_4, reverse_kl), those that were measured.
        evaluations: complete evaluations of ``EarlyAIMEEvaluation``.
        mixture: which settings trained which steps, where not all were trained with the same ones; else empty.
        profile: the first and the last window of its position profile; None without one.
    """

    folder: Path
    variant: str
    summary: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, Curve]
    evaluations: Comparison
    mixture: str = ""
    profile: tuple[ProfileWindow, ProfileWindow] | None = None

    @property
    def seed(self) -> Any:
        """What runs are paired by."""
        return self.summary["seed"]


def read_run(folder: str | Path, *, variant: str | None = None, group_by: Sequence[str] = ()) -> Run:
    """Read a run folder.

    Args:
        folder: holds ``summary.json`` and ``metrics.csv``.
        variant: its name in the comparison; default the values of ``group_by``, else the strategy's name.
        group_by: keys of its config, such as ``model.weighting.init_args.w_max``.
    Raises:
        InputError: no such folder, an unfinished run, a broken file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"`--runs` must name run folders, got {str(folder)!r}, which is none")
    summary = _summary(folder)
    config = _config(folder / "config.yaml")
    name, mixture = variant, _mixture(folder, summary, config)
    if name is None:
        name = ", ".join(_setting(config, key, folder) for key in group_by) or summary["strategy"]
        name += f" [{mixture}]" if mixture else ""  # never the variant of runs that had one setting from start to end
    past = past_evaluations(EvaluationFile(folder / FILE_NAME).rows())
    profile = _profile(folder / PROFILE)
    return Run(folder, name, summary, config, _curves(folder, summary), Comparison.of(past), mixture, profile)


def _profile(path: Path) -> tuple[ProfileWindow, ProfileWindow] | None:
    """Where in the response, at the start and at the end; the windows between are not looked at."""
    windows, _ = read_windows(path, most=2)
    return (windows[0], windows[-1]) if windows else None


def _mixture(folder: Path, summary: dict[str, Any], config: dict[str, Any]) -> str:
    """The spans of a run that went on with other settings; of an older run folder, where it was begun."""
    spans = summary.get("trained") or []
    if len(spans) > 1:
        return "; ".join(
            f"steps {first}-{last} {span['strategy']}"
            + (f", other {', '.join(span['changed'])}" if span["changed"] else "")
            for span in spans
            for first, last in [span["steps"]]
        )
    begun = config.get("ckpt_path")  # saved configs held it once
    if spans or begun is None or Path(begun).resolve().is_relative_to(folder.resolve()):
        return ""
    return f"went on from {begun}"


def read_runs(words: Sequence[str], *, group_by: Sequence[str] = ()) -> list[Run]:
    """The runs that the words name: folders or patterns, each with ``name=`` before it where it is to be called so.

    Raises:
        InputError: as ``read_run``; a pattern that fits nothing; two runs of one variant with one seed; weightings with differing
            arguments that would all be called by their class.
    """
    runs: list[Run] = []
    by_class: list[Run] = []
    for word in words:
        name, sign, pattern = word.partition("=")
        if not sign or "/" in name or Path(word).exists():
            name, pattern = "", word
        found = sorted(path for path in glob.glob(pattern) if Path(path).is_dir()) or [pattern]
        read = [read_run(path, variant=name or None, group_by=group_by) for path in found]
        runs += read
        by_class += [] if name or group_by else read
    seen: dict[tuple[str, Any], Path] = {}
    for run in runs:
        other = seen.setdefault((run.variant, run.seed), run.folder)
        if other is not run.folder:
            raise InputError(
                f"`--runs` must have one run a variant and seed, got {other} and {run.folder}, both {run.variant} with seed "
                f"{run.seed}; name them (name=folder) or set `--group_by model.weighting`"
            )
    _require_one_weighting(by_class)
    return runs


def _require_one_weighting(runs: Sequence[Run]) -> None:
    """Runs that are called by the weighting's class have the same arguments of it; one without a config passes."""
    first: dict[str, tuple[Any, Run]] = {}
    for run in runs:
        weighting = setting(run.config, "model.weighting")
        if weighting is None:
            continue
        known, other = first.setdefault(run.variant, (weighting, run))
        if weighting != known:
            raise InputError(
                f"`--runs` must have one weighting a variant, got {in_words(known)} of {other.folder} and {in_words(weighting)} "
                f"of {run.folder}, both {run.variant}; set `--group_by model.weighting`, or name them (name=folder)"
            )


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        raise InputError(
            f"`--runs` must be finished runs, got {folder} without summary.json; finish it with `--ckpt_path last`"
        )
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} must be JSON, got {error}") from error
    if not isinstance(summary, dict) or not _SUMMARY_KEYS <= summary.keys():
        raise InputError(f"{path} must be a run's summary with {', '.join(sorted(_SUMMARY_KEYS))}, got another file")
    return summary


def _config(path: Path) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must be a run's config, got {type(config).__name__}")
    return config


def _setting(config: dict[str, Any], key: str, folder: Path) -> str:
    """A setting as text; a class with its arguments as one writes it in Python."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"`--group_by` must be a key of the runs' config, got {key!r}, which {folder} lacks")
        value = value[part]
    return in_words(value)


# -- metrics.csv -------------------------------------------------------------------------------------------------------


def _curves(folder: Path, summary: dict[str, Any]) -> dict[str, Curve]:
    """Every measured metric; avg@k only where k is 4, as the summary says."""
    rows = _rows(folder)
    if rows and not _ends_at(summary["steps"], [int(row["step"]) for row in rows]):
        raise InputError(
            f"`--runs` must be finished runs, got {folder}, whose metrics.csv is at step {rows[-1]['step']:.0f} and whose "
            f"summary.json at {summary['steps']}; let it end, or finish it with `--ckpt_path last`"
        )
    found, gap = {}, _token_gap(folder, rows, summary)
    for name, column in SUMMARISED.items():
        points = [(row["step"], row["tokens"], row[column]) for row in rows if column in row]
        if points and (name != "avg_at_4" or summary.get("avg_at_4_end") is not None):
            steps, tokens, values = zip(*points, strict=True)
            found[name] = Curve(tuple(map(int, steps)), tuple(map(int, tokens)), values, gap)
    return found


def _ends_at(end: int, steps: Sequence[int]) -> bool:
    """Whether logged steps, rising, are those of a run of ``end`` steps: not all need be logged, as every tenth.

    >>> _ends_at(25, [0, 10, 20]), _ends_at(30, [0, 10, 20]), _ends_at(15, [0, 10, 20])
    (True, False, False)
    """
    gap = max(later - step for step, later in pairwise([0, *steps]))
    return steps[-1] <= end and (end - steps[-1] < gap or gap == 0)


def _token_gap(folder: Path, rows: Sequence[dict[str, float]], summary: dict[str, Any]) -> str:
    """What is wrong with the token axis: each line counts its own batch only, the summary counts every batch."""
    logged = int(rows[-1]["tokens"]) if rows else 0
    if logged == summary["tokens"]:
        return ""
    return (
        f"`train/tokens` of {folder}/metrics.csv must sum to the {summary['tokens']:,} tokens of summary.json, got {logged:,}; "
        "train with `--trainer.log_every_n_steps 1` to compare over tokens"
    )


def _rows(folder: Path) -> list[dict[str, float]]:
    """One dictionary a step, rising, with ``tokens`` sampled up to then and what of ``SUMMARISED`` was measured.

    Raises:
        InputError: no metrics.csv, or a value that is no finite number.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise InputError(f"`--runs` must be run folders, got {folder} without metrics.csv")
    by_step: dict[int, dict[str, float]] = {}
    wanted = {"step", "train/tokens", *SUMMARISED.values()}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            values = {name: _number(text, path) for name, text in line.items() if name in wanted and text}
            if "step" in values:
                by_step.setdefault(int(values["step"]), {}).update(values)
    tokens, rows = 0.0, [by_step[step] for step in sorted(by_step)]
    for row in rows:
        tokens += row.get("train/tokens", 0.0)
        row["tokens"] = tokens
    return rows


def _number(text: str, path: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path} must hold finite numbers, got {text!r}")
    return value
