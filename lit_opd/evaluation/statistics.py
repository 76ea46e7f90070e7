"""torchmetrics: sums and counts, reduced over ranks, never means of means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_opd.masked import positions


class ExactMetric(Metric):
    """A metric whose sums keep their dtype where the module around it is cast: in bfloat16 a count ends at 256."""

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        def moved(value: Tensor) -> Tensor:
            there: Tensor = fn(value)
            return there if there.dtype == value.dtype else value.to(there.device)

        return super()._apply(moved, *args, **kwargs)


class WeightedMean(ExactMetric):
    """Mean of values with weights; NaN where nothing was counted."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add ``values`` [B] or [B, T] with ``weights`` of the same shape, >= 0; a value of weight 0 may be anything."""
        used = weights.bool()
        self.total += torch.where(used, values.double() * weights.double(), 0.0).sum()
        self.count += weights.double().sum()

    def compute(self) -> Tensor:
        """float64 scalar, sum of weight times value over the sum of the weights; NaN where that is 0."""
        return self.total / self.count


class PositionBands(ExactMetric):
    """Means of a per-token quantity in equal bands of the relative position (i - 0.5) / n.

    Args:
        bands: number of bands; a response shorter than this leaves some without its tokens.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, bands: int = 10) -> None:
        super().__init__()
        self.bands = bands
        self.add_state("total", torch.zeros(bands, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(bands, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, mask: Tensor) -> None:
        """Add ``values`` [B, T] where ``mask`` bool [B, T] is True."""
        place = positions(mask).double() - 0.5
        relative = place / mask.sum(-1, keepdim=True).clamp(min=1)
        band = (relative * self.bands).long().clamp(0, self.bands - 1)[mask]
        self.total.index_add_(0, band, values[mask].double())
        self.count.index_add_(0, band, torch.ones_like(band, dtype=torch.float64))

    def compute(self) -> Tensor:
        """float64 [bands], NaN where a band is empty."""
        return self.total / self.count


# -- answers of an evaluation ------------------------------------------------------------------------------------------

BOOTSTRAP_DRAWS = 2000
CONFIDENCE = 0.95
NO_VOTE, RIGHT_VOTE = 0, 1  # values of `vote`; every other value names one wrong answer
ANSWER_COLUMNS = ("problem", "sample", "group", "correct", "truncated", "timeout", "no_answer", "length", "vote")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of n samples drawn without replacement hold a correct one: 1 - C(n-c, k) / C(n, k).

    Source: the unbiased estimator of Chen et al. (2021, arXiv 2107.03374), as a product, so that no binomial overflows.

    Raises:
        ValueError: k outside [1, n].

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"`pass_at_k.k` must be in [1, {num_samples}], got {k}")
    miss = 1.0
    for drawn in range(k):
        miss *= max(num_samples - num_correct - drawn, 0) / (num_samples - drawn)
    return 1.0 - miss


def pass_ks(num_samples: int) -> list[int]:
    """The k for which pass@k is reported: 1, 4, 8, 16, ... and n.

    >>> pass_ks(32), pass_ks(6), pass_ks(1)
    ([1, 4, 8, 16, 32], [1, 4, 6], [1])
    """
    powers = [1] + [2**power for power in range(2, 31)]
    return [k for k in powers if k < num_samples] + [num_samples]


def majority_credit(votes: list[int]) -> float:
    """Chance that the most frequent answer is right when ties are broken at random; 0 where nobody voted.

    Args:
        votes: one a sample: ``RIGHT_VOTE``, the number of a wrong answer, or ``NO_VOTE``.

    >>> majority_credit([1, 1, 7]), majority_credit([1, 7, 0]), majority_credit([7, 7, 1])
    (1.0, 0.5, 0.0)
    """
    counts: dict[int, int] = {}
    for vote in votes:
        if vote != NO_VOTE:
            counts[vote] = counts.get(vote, 0) + 1
    most = max(counts.values(), default=0)
    leaders = [vote for vote, count in counts.items() if count == most]
    return 1.0 / len(leaders) if RIGHT_VOTE in leaders else 0.0


def bootstrap_interval(values: Tensor, *, seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> tuple[float, float]:
    """95 % percentile interval of the mean when problems are drawn again with replacement.

    Args:
        values: [N], one a problem.
        seed: of the draws.
        draws: bootstrap samples.
    Returns:
        lower and upper end, in the unit of the values.
    """
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), values.shape, generator=generator)].mean() for _ in range(draws)]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def paired_difference(
    ours: dict[str, float], theirs: dict[str, float], *, seed: int = 0
) -> tuple[float, float, float] | None:
    """Mean of ours - theirs over the problems both have, and its 95 % bootstrap interval; None without a common one."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    differences = torch.tensor([ours[name] - theirs[name] for name in common], dtype=torch.float64)
    return float(differences.mean()), *bootstrap_interval(differences, seed=seed)


class AnswerStatistics(Metric):
    """avg@k, unbiased pass@k, majority@k and more, from graded samples over all ranks.

    Every (problem, sample) counts once, however often it was added. The interval is over groups, which are the different
    problems: the samples of one problem, and of its repeats in the set, are no independent evidence about the next.

    Args:
        seed: of the bootstrap.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, **columns: Tensor) -> None:
        """Add N samples; call it on every rank, with N = 0 where there are none.

        Args:
            columns: int64 or bool [N] each: problem (row of the set), sample, group (number that rows with the same problem
                share), correct, truncated, timeout, no_answer, length (tokens) and vote (see ``majority_credit``).
        """
        self.rows.append(torch.stack([columns[name].to(torch.int64) for name in ANSWER_COLUMNS], -1))

    def compute(self) -> dict[str, float]:
        """Values by name: avg_at_k with its 95 % interval (avg_at_k_low, avg_at_k_high), pass_at_K, majority_at_k and the
        fractions in [0, 1]; response_length in tokens, a mean over samples; problems, a count of different ones.
        """
        table = self._unique(torch.cat(self.rows) if isinstance(self.rows, list) else self.rows).cpu()
        column = dict(zip(ANSWER_COLUMNS, table.unbind(-1), strict=True))
        groups = [table[column["group"] == group] for group in column["group"].unique().tolist()]
        right = ANSWER_COLUMNS.index("correct")
        counts = [(len(group), int(group[:, right].sum())) for group in groups]
        solved = torch.tensor([correct / samples for samples, correct in counts], dtype=torch.float64)
        low, high = bootstrap_interval(solved, seed=self.seed)
        values = {"avg_at_k": float(solved.mean()), "avg_at_k_low": low, "avg_at_k_high": high}
        for k in pass_ks(min(samples for samples, _ in counts)):
            values[f"pass_at_{k}"] = sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)
        vote = ANSWER_COLUMNS.index("vote")
        values["majority_at_k"] = sum(majority_credit(group[:, vote].tolist()) for group in groups) / len(groups)
        for name in ("truncated", "timeout", "no_answer"):
            values[f"{name}_fraction"] = float(column[name].double().mean())
        values["response_length"] = float(column["length"].double().mean())
        return values | {"problems": float(len(groups))}

    @staticmethod
    def _unique(table: Tensor) -> Tensor:
        """The first row of each (problem, sample)."""
        seen: set[tuple[int, ...]] = set()
        keys = [tuple(row) for row in table[:, :2].tolist()]
        first = [index for index, key in enumerate(keys) if not (key in seen or seen.add(key))]  # type: ignore[func-returns-value]
        return table[first]
