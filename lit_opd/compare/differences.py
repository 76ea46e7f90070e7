"""Finished runs side by side: every variant's mean, and its difference from the baseline paired by seed and by problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from lit_opd.compare.runs import Curve, Run
from lit_opd.compare.statistics import Estimate, cut, mean_height, mean_interval, paired, paired_two_way, reached
from lit_opd.errors import InputError
from lit_opd.evaluation.rows import PastEvaluation
from lit_opd.evaluation.statistics import paired_difference
from lit_opd.evaluation.validation import SUMMARISED

AXES = ("steps", "tokens")
QUANTITIES = ("end", "area_steps", "area_tokens", "steps_to_target", "tokens_to_target")
RISING = {"greedy": True, "avg_at_4": True, "reverse_kl": False}
DEFAULT_TARGET = 0.8  # of the way that the baseline goes on average
LIKE_COUNTS = {"steps": 1.0, "tokens": 1.5}  # most over least; beyond that the report says so
# settings that may differ between like runs
_OF_THE_RUN = (
    "run_dir", "seed_everything", "config", "overwrite", "ckpt_path", "allow_change", "wandb", "tensorboard",
    "trainer.default_root_dir", "num_threads",
)  # fmt: skip

_Answers = Mapping[Any, Mapping[str, float]]  # avg@k by seed and problem


@dataclass(frozen=True)
class Cell:
    """One quantity of one variant.

    Args:
        mean: over its runs.
        difference: from the baseline over common seeds; None for the baseline itself, without a common measurement, and where
            none of them reached a target.
    """

    mean: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class ProblemCell:
    """avg@k of one variant on one evaluation set.

    Args:
        mean: over the pairs of seed and problem that both have, a problem's seeds first.
        difference: from the baseline over the same pairs, with the ends of its interval over problems.
        problems: that both have with the same seed.
        seeds: paired ones with such a problem.
        both: the difference with its interval over seeds and problems, None where no problem is everyone's.
    """

    mean: float
    difference: tuple[float, float, float]
    problems: int
    seeds: int
    both: Estimate | None


@dataclass(frozen=True)
class RunsComparison:
    """What ``compare_runs`` found.

    Args:
        baseline: the variant that differences are taken from.
        variants: runs by variant, the baseline first.
        targets: by metric, where there is one.
        starts: by (metric, axis), from where on every run was measured.
        horizons: the same, up to where.
        cells: by (metric, variant, quantity).
        problems: by (evaluation set, variant).
        notes: what the reader must know.
    """

    baseline: str
    variants: dict[str, list[Run]]
    targets: dict[str, float]
    starts: dict[tuple[str, str], float]
    horizons: dict[tuple[str, str], float]
    cells: dict[tuple[str, str, str], Cell]
    problems: dict[tuple[str, str], ProblemCell]
    notes: list[str]

    def axes_of(self, metric: str) -> list[str]:
        """What the metric's curves are compared over; empty where the baseline has none."""
        return [axis for axis in AXES if (metric, axis) in self.horizons]


def compare_runs(runs: Sequence[Run], *, baseline: str, targets: Mapping[str, float] | None = None) -> RunsComparison:
    """Compare the variants among the runs.

    Args:
        runs: one a variant and seed.
        baseline: a variant's name.
        targets: by metric; default 80 % of the way that the baseline goes on average, none where it does not get better.
    Raises:
        InputError: no such baseline or metric, or a variant without a seed of the baseline's.
    """
    variants = _grouped(runs, baseline)
    wrong = sorted(set(targets or {}) - SUMMARISED.keys())
    if wrong:
        raise InputError(f"`--target` must name one of {', '.join(SUMMARISED)}, got {wrong[0]!r}")
    found = RunsComparison(baseline, variants, {}, {}, {}, {}, {}, list(_notes(variants, baseline)))
    for metric in SUMMARISED:
        _compare_metric(found, metric, (targets or {}).get(metric))
    found.notes.extend(_span_notes(found))
    _compare_problems(found)
    return found


def _grouped(runs: Sequence[Run], baseline: str) -> dict[str, list[Run]]:
    names = list(dict.fromkeys(run.variant for run in runs))
    if baseline not in names:
        raise InputError(f"`--baseline` must be one of the variants {', '.join(names)}, got {baseline!r}")
    names.sort(key=lambda name: name != baseline)
    variants = {name: [run for run in runs if run.variant == name] for name in names}
    seeds = {name: {run.seed for run in own} for name, own in variants.items()}
    for name in names:
        if not seeds[name] & seeds[baseline]:
            raise InputError(
                f"`--runs` must have a common seed with the baseline {baseline} ({_listed(seeds[baseline])}), got {name} with "
                f"{_listed(seeds[name])}; train both with the same `seed_everything`"
            )
    return variants


# -- over seeds --------------------------------------------------------------------------------------------------------


def _compare_metric(found: RunsComparison, metric: str, target: float | None) -> None:
    """Fill in targets, starts, horizons and cells of one metric."""
    everyone = [run for runs in found.variants.values() for run in runs]
    curved = [run.curves[metric] for run in everyone if metric in run.curves]
    starts = [run.curves[metric] for run in found.variants[found.baseline] if metric in run.curves]
    if starts:
        _set_target(found, metric, target, starts)
        whole = not any(curve.token_gap for curve in curved)
        for axis in AXES if whole else ("steps",):
            found.starts[metric, axis] = max(float(curve.along(axis)[0]) for curve in curved)
            found.horizons[metric, axis] = min(float(curve.along(axis)[-1]) for curve in curved)
    measured = {
        variant: {run.seed: dict(_measured(found, run, metric)) for run in runs}
        for variant, runs in found.variants.items()
    }
    for variant, by_seed in measured.items():
        for quantity in QUANTITIES:
            ours = {seed: values[quantity] for seed, values in by_seed.items() if quantity in values}
            theirs = {s: values[quantity] for s, values in measured[found.baseline].items() if quantity in values}
            if ours:
                difference = None if variant == found.baseline else _difference(ours, theirs)
                found.cells[metric, variant, quantity] = Cell(_mean(ours.values()), difference)


def _set_target(found: RunsComparison, metric: str, target: float | None, starts: Sequence[Curve]) -> None:
    """The given target or the default one; a note where the baseline's curves give none."""
    start, end = (fmean(curve.values[place] for curve in starts) for place in (0, -1))
    if target is not None:
        found.targets[metric] = target
    elif (end > start) if RISING[metric] else (end < start):
        found.targets[metric] = start + DEFAULT_TARGET * (end - start)
    else:
        found.notes.append(
            f"{metric}: no target, as {found.baseline} does not get better on average ({start:.4g} to {end:.4g}); set "
            f"`--target {metric}=VALUE`."
        )


def _measured(found: RunsComparison, run: Run, metric: str) -> Iterable[tuple[str, tuple[float, bool]]]:
    """(quantity, (value, censored)) of one run, over the part that all have; a target it never reached counts as the horizon."""
    curve, end = run.curves.get(metric), run.summary.get(f"{metric}_end")
    if end is None and curve is not None:
        end = curve.values[-1]
    if end is not None:
        yield "end", (float(end), False)
    if curve is None:
        return
    for axis in found.axes_of(metric):
        start, horizon = found.starts[metric, axis], found.horizons[metric, axis]
        if start > horizon:
            continue
        places, values = cut(curve.along(axis), curve.values, start=start)
        yield f"area_{axis}", (mean_height(places, values, horizon=horizon), False)
        if metric not in found.targets:
            continue
        place = reached(places, values, found.targets[metric], rising=RISING[metric])
        censored = place is None or place > horizon
        yield f"{axis}_to_target", (horizon if place is None else min(place, horizon), censored)


def _mean(values: Iterable[tuple[float, bool]]) -> Estimate:
    listed = list(values)
    return mean_interval([value for value, _ in listed], censored=sum(censored for _, censored in listed))


def _difference(ours: dict[Any, tuple[float, bool]], theirs: dict[Any, tuple[float, bool]]) -> Estimate | None:
    """Over common seeds; censored where either is, None where all are on both sides."""
    common = ours.keys() & theirs.keys()
    if all(ours[seed][1] and theirs[seed][1] for seed in common):
        return None
    plain = paired(*({seed: side[seed][0] for seed in sorted(common, key=str)} for side in (ours, theirs)))
    return replace(plain, censored=sum(ours[seed][1] or theirs[seed][1] for seed in common))


# -- over problems -----------------------------------------------------------------------------------------------------


def _compare_problems(found: RunsComparison) -> None:
    """Fill in avg@k by problem at each run's last evaluation, over the seeds and problems that both variants have."""
    names = sorted(
        {name for runs in found.variants.values() for run in runs for name, _ in run.evaluations.evaluations}
    )
    for name in names:
        last = {
            variant: {run.seed: history[-1] for run in runs if (history := run.evaluations.history(name))}
            for variant, runs in found.variants.items()
        }
        for variant in [other for other in last if other != found.baseline]:
            found.notes.extend(_coverage(name, variant, found.baseline, last))
            cell = _problem_cell(*_common(last[variant], last[found.baseline]))
            if cell is not None:
                found.problems[name, variant] = cell
        fingerprints = {past.settings for by_seed in last.values() for past in by_seed.values()}
        if len(fingerprints) > 1:
            found.notes.append(f"{name}: the runs were evaluated with differing settings or at differing prompts")


def _common(ours: Mapping[Any, PastEvaluation], theirs: Mapping[Any, PastEvaluation]) -> tuple[_Answers, _Answers]:
    """Both sides' avg@k by seed and problem, of the pairs of seed and problem that both have."""
    pairs = {
        seed: sorted(ours[seed].accuracy.keys() & theirs[seed].accuracy.keys())
        for seed in sorted(ours.keys() & theirs.keys(), key=str)
    }
    kept, others = (
        {seed: {problem: side[seed].accuracy[problem] for problem in own} for seed, own in pairs.items() if own}
        for side in (ours, theirs)
    )
    return kept, others


def _problem_cell(ours: _Answers, theirs: _Answers) -> ProblemCell | None:
    """Of the same seeds and problems on both sides, None without any: a problem's seeds cancel in its difference."""
    by_problem = _by_problem(ours)
    difference = paired_difference(by_problem, _by_problem(theirs))
    if difference is None:
        return None
    everyones = set.intersection(*map(set, ours.values()))
    both = paired_two_way(ours, theirs) if everyones else None
    return ProblemCell(fmean(by_problem.values()), difference, len(by_problem), len(ours), both)


def _by_problem(answers: _Answers) -> dict[str, float]:
    """avg@k by problem, over the seeds that hold it."""
    problems = sorted({problem for own in answers.values() for problem in own})
    return {problem: fmean(own[problem] for own in answers.values() if problem in own) for problem in problems}


def _coverage(
    name: str, variant: str, baseline: str, last: Mapping[str, Mapping[Any, PastEvaluation]]
) -> Iterable[str]:
    """A note where the paired evaluations of a set do not all hold the same problems."""
    seeds = last[variant].keys() & last[baseline].keys()
    asked = {frozenset(last[side][seed].accuracy) for side in (variant, baseline) for seed in seeds}
    if len(asked) > 1:
        counts = " to ".join(map(str, sorted({min(map(len, asked)), max(map(len, asked))})))
        yield (
            f"{name}: {variant} and {baseline} were not asked the same problems with every seed ({counts}); differences are "
            "over the problems that both were asked with the same seed."
        )


# -- notes -------------------------------------------------------------------------------------------------------------


def _notes(variants: dict[str, list[Run]], baseline: str) -> Iterable[str]:
    base = {run.seed: run for run in variants[baseline]}
    for run in (run for runs in variants.values() for run in runs if run.mixture):
        yield f"{run.variant}, seed {run.seed}: not trained with one setting from start to end ({run.mixture})."
    for variant in [name for name in variants if name != baseline]:
        own = {run.seed: run for run in variants[variant]}
        common = [seed for seed in own if seed in base]
        if len(common) == 1:
            yield f"{variant}: one paired seed ({common[0]}), so no interval; what is shown may be chance."
        for missing, who in ((own.keys() - base.keys(), variant), (base.keys() - own.keys(), baseline)):
            if missing:
                yield f"{variant}: unpaired seeds, {_listed(missing)} of {who}: in its mean, not in the difference."
    yield from _setting_notes(variants, baseline)
    gaps = dict.fromkeys(
        c.token_gap for own in variants.values() for r in own for c in r.curves.values() if c.token_gap
    )
    if gaps:
        yield f"Compared over steps only, {len(gaps)} of the runs do not count their tokens: {next(iter(gaps))}."
    for key, unit in (("steps", "optimizer steps"), ("tokens", "sampled tokens")):
        counts = [run.summary[key] for runs in variants.values() for run in runs]
        if max(counts) > LIKE_COUNTS[key] * min(counts):
            yield f"The runs have {min(counts):,} to {max(counts):,} {unit}; areas and targets use the common part."


def _span_notes(found: RunsComparison) -> Iterable[str]:
    """Where the curves of a metric do not all begin at one step, or have no part in common."""
    notes: dict[str, list[str]] = {}
    everyone = [run for runs in found.variants.values() for run in runs]
    for (metric, axis), start in found.starts.items():
        first = min(run.curves[metric].along(axis)[0] for run in everyone if metric in run.curves)
        end = found.horizons[metric, axis]
        if start > end:
            note = (
                f"no {axis} in common, a curve begins at {start:,.0f} and another ends at {end:,.0f}; no areas and targets over "
                f"{axis}."
            )
        elif axis == "steps" and first < start:
            note = f"curves begin at {first:,} to {start:,.0f} optimizer steps; areas and targets use the common part."
        else:
            continue
        notes.setdefault(note, []).append(metric)
    for note, metrics in notes.items():
        yield f"{', '.join(metrics)}: {note}"


def _setting_notes(variants: dict[str, list[Run]], baseline: str) -> Iterable[str]:
    """In what the variants differ from the baseline with the same seed, and runs of one variant from each other."""
    base = {run.seed: run for run in variants[baseline]}
    beside: dict[tuple[str, ...], list[str]] = {}
    within: dict[tuple[str, ...], list[str]] = {}
    for variant, runs in variants.items():
        beside.setdefault(tuple(_beside(runs, base)), []).append(variant)
        configs = [run.config for run in runs if run.config]
        keys = dict.fromkeys(key for config in configs for key in _differing(configs[0], config))
        within.setdefault(tuple(keys), []).append(variant)
    for differing, names in beside.items():
        if differing:
            verb = "differs" if len(names) == 1 else "differ"
            yield f"{', '.join(names)} {verb} from {baseline} in {', '.join(differing)}."
    for differing, names in within.items():
        if differing:
            yield (
                f"{', '.join(names)}: runs of the same variant differ in {', '.join(differing)}; means and intervals are "
                "over all of these settings."
            )


def _beside(runs: Sequence[Run], base: dict[Any, Run]) -> Iterable[str]:
    """Keys in which any run differs from the baseline's with its seed; the seeds too, where it is not with all."""
    seeds: dict[str, list[Any]] = {}
    common = [run for run in runs if run.seed in base]
    for run in common:
        for key in _differing(run.config, base[run.seed].config):
            seeds.setdefault(key, []).append(run.seed)
    for key, having in seeds.items():
        some = f" (seed{'s' if len(having) > 1 else ''} {_listed(having)})" if len(having) < len(common) else ""
        yield f"{key}{some}"


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys of the config that differ, the longest common way down; what every run has of its own is left out."""
    if not ours or not theirs:
        return []
    return [key for key in _paths(ours, theirs, "") if not {key, key.split(".")[0]} & set(_OF_THE_RUN)]


def _paths(ours: Any, theirs: Any, path: str) -> Iterable[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("class_path") == theirs.get("class_path"):
        for key in dict.fromkeys([*ours, *theirs]):
            yield from _paths(ours.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
    elif ours != theirs:
        yield path


def _listed(seeds: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(seeds, key=str)))
