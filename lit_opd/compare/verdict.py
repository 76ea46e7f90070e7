"""What a comparison says, in words: each variant's difference from the baseline at the end, read by its interval."""

from __future__ import annotations

from typing import Any

from lit_opd.compare.curves import LABELS
from lit_opd.compare.differences import RISING, RunsComparison
from lit_opd.compare.document import Interval, Table, show
from lit_opd.compare.statistics import Estimate

MEANS = {"greedy": "greedy accuracy", "avg_at_4": "avg@4", "reverse_kl": "KL, nats/token"}  # heads of columns
MANY = 5  # variants, from which chance is worth a word
BETTER, WORSE, OPEN = "better than {}", "worse than {}", "not different from {}"


def reading(difference: Estimate | None, *, rising: bool, baseline: str) -> str:
    """What an interval says; one pair says nothing.

    Args:
        difference: from the baseline; None where there is no pair.
        rising: more is better.
        baseline: its name.
    """
    if difference is None:
        return f"not measured beside {baseline}"
    if difference.low is None:
        return "one pair, so no interval: it may be chance"
    if not difference.excludes_zero:
        return OPEN.format(baseline)
    return (BETTER if (difference.mean > 0) == rising else WORSE).format(baseline)


def measured(found: RunsComparison) -> list[str]:
    """Metrics that were measured at the end of some run, the first of which is the result."""
    return [metric for metric in LABELS if any(key[0] == metric and key[2] == "end" for key in found.cells)]


def others(found: RunsComparison) -> list[str]:
    """The variants beside the baseline."""
    return [name for name in found.variants if name != found.baseline]


def sentence(found: RunsComparison, variant: str) -> str:
    """One a variant: the difference in the first metric, its interval, its pairs, and what that says."""
    metrics = measured(found)
    if not metrics:
        return f"{variant}: nothing was measured at the end"
    difference = _difference(found, metrics[0], variant)
    said = reading(difference, rising=RISING[metrics[0]], baseline=found.baseline)
    if difference is None:
        return f"{variant}: {said}"
    pairs = f"{difference.count} pair{'' if difference.count == 1 else 's'}"
    return f"{variant}: {show(difference, signed=True)} {LABELS[metrics[0]]}, {pairs}: {said}"


def headline(found: RunsComparison) -> str:
    """The result: the one variant's sentence, or which of several are better, worse or neither."""
    names, metrics = others(found), measured(found)
    if len(names) == 1:
        return sentence(found, names[0])
    if not names or not metrics:
        return f"{found.baseline} alone: nothing to compare"
    order = (BETTER.format(found.baseline), WORSE.format(found.baseline))
    groups: dict[str, list[str]] = {said: [] for said in order}
    for name in names:
        said = reading(_difference(found, metrics[0], name), rising=RISING[metrics[0]], baseline=found.baseline)
        groups.setdefault(said, []).append(name)
    label = LABELS[metrics[0]].split(",")[0]
    return f"{label[0].upper()}{label[1:]}: " + "; ".join(
        f"{_listed(own)} {said}" for said, own in groups.items() if own
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def caution(found: RunsComparison) -> list[str]:
    """What holds for many variants at once."""
    count = len(others(found))
    if count < MANY:
        return []
    return [
        f"{count} variants are compared, each at 95 %: if none differed, one in twenty intervals would leave 0 out by chance."
    ]


def table(found: RunsComparison, metric: str) -> Table:
    """A row a variant: the mean at the end, the difference with its interval, the pairs, what that says."""
    having = [variant for variant in found.variants if (metric, variant, "end") in found.cells]
    header = ["variant", "runs", MEANS[metric], f"difference from {found.baseline}", "pairs", "reading"]
    rows = [_row(found, metric, variant) for variant in having]
    intervals = [_interval(found, metric, variant) for variant in having]
    return Table(header, rows, text_columns=(len(header) - 1,), intervals=intervals if any(intervals) else ())


def _row(found: RunsComparison, metric: str, variant: str) -> list[str]:
    mean, difference = found.cells[metric, variant, "end"].mean, _difference(found, metric, variant)
    own = variant == found.baseline
    return [
        variant,
        str(mean.count),
        show(mean),
        "" if own else show(difference, signed=True),
        "" if own or difference is None else str(difference.count),
        "baseline" if own else reading(difference, rising=RISING[metric], baseline=found.baseline),
    ]


def _difference(found: RunsComparison, metric: str, variant: str) -> Estimate | None:
    cell = found.cells.get((metric, variant, "end"))
    return None if cell is None else cell.difference


def _interval(found: RunsComparison, metric: str, variant: str) -> Interval | None:
    own = _difference(found, metric, variant)
    return None if own is None else Interval(own.mean, own.low, own.high, own.excludes_zero)


def data(found: RunsComparison) -> dict[str, Any]:
    """For ``compare.json``: the sentence of each variant, and the reading of each metric."""
    return {
        variant: {
            "sentence": sentence(found, variant),
            "reading": {
                metric: reading(_difference(found, metric, variant), rising=RISING[metric], baseline=found.baseline)
                for metric in measured(found)
            },
        }
        for variant in others(found)
    }
