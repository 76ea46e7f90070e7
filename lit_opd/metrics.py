"""torchmetrics: sums and counts, reduced over ranks, never means of means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_opd.masked import ceil_count, exclusive_cumsum, lengths, positions


class WeightedMean(Metric):
    """Mean of values with weights; NaN where nothing was counted."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add ``values`` [B, T] with ``weights`` of the same shape; a value of weight 0 may be anything."""
        used = weights.bool()
        self.total += torch.where(used, values.double() * weights.double(), 0.0).sum()
        self.count += weights.double().sum()

    def compute(self) -> Tensor:
        """float64 scalar."""
        return self.total / self.count


class PositionBands(Metric):
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


PROFILE_QUANTITIES = (
    "advantage",
    "disagreement",
    "drift",
    "kl_k1",
    "kl_k3",
    "weight",
    "kept_fraction",
    "gradient_size",
    "clip_fraction",
    "truncated_fraction",
    "student_entropy",
    "teacher_entropy",
)
PROFILE_BANDS = {"first_10": 0.1, "first_30": 0.3, "last_30": 0.3}
_BAND_CELLS = 2 ** len(PROFILE_BANDS)  # a token may be in several bands, so cells are the subsets of bands


def token_quantities(
    *, mask: Tensor, log_ratio: Tensor, advantage: Tensor, weights: Tensor, kept: Tensor, clipped: Tensor
) -> dict[str, Tensor]:
    """What the profile shows of each token, [B, T] each; content where masked means nothing.

    Args:
        mask: bool [B, T].
        log_ratio: [B, T] nats, teacher - student.
        advantage: [B, T] nats, what the loss reads.
        weights: [B, T], 0 where a token does not count.
        kept: bool [B, T], tokens in the denominator.
        clipped: bool [B, T], tokens whose gradient the policy clip cut.
    """
    size, wide = log_ratio.abs(), log_ratio.double()  # k3 is a difference of near numbers
    return {
        "advantage": advantage,
        "disagreement": size,
        "drift": exclusive_cumsum(size, mask),
        "kl_k1": -log_ratio,
        "kl_k3": torch.expm1(wide) - wide,
        "weight": weights,
        "kept_fraction": kept,
        "gradient_size": (weights * advantage).abs(),
        "clip_fraction": clipped,
    }


def position_edges(length: int, *, bins: int, scale: str) -> Tensor:
    """First position of each bin and, at the end, ``length + 1``; int64 [N + 1], strictly rising, N <= ``bins``.

    Args:
        length: last position covered, >= 1.
        bins: bins asked for; short lengths give one position a bin.
        scale: "linear" or "log" spacing.
    """
    inner = torch.arange(bins + 1, dtype=torch.float64) / bins
    places = 1 + length * inner if scale == "linear" else (length + 1) ** inner
    return places.round().long().unique()


class PositionProfileSums(Metric):
    """Sums and counts of the profile's quantities by absolute position, by relative position and by band.

    Positions count inside the mask. Bands are what ``FirstFraction`` and ``LastFraction`` keep: ceil(fraction * n) tokens.

    Args:
        length: last position of the absolute bins; tokens behind it are in the relative bins and bands only.
        bins: absolute bins, fewer where the length has fewer positions.
        scale: "linear" or "log" spacing of the absolute bins.
        relative_bins: equal bins of (position - 1/2) / n.
    """

    full_state_update = False
    sums: Tensor
    extra: Tensor
    _edges: Tensor

    def __init__(self, length: int, *, bins: int = 64, scale: str = "linear", relative_bins: int = 10) -> None:
        super().__init__()
        self.relative_bins = relative_bins
        self.edges = position_edges(length, bins=bins, scale=scale)
        self.register_buffer("_edges", self.edges, persistent=False)  # follows the metric's device
        self.num_absolute = len(self.edges) - 1
        self.num_cells = self.num_absolute + relative_bins + _BAND_CELLS
        # totals and counts; the last cell takes what belongs nowhere
        shape = (2, len(PROFILE_QUANTITIES), self.num_cells + 1)
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        # rows with a token, sum of (w A)^2 and of A^2 over the kept tokens
        self.add_state("extra", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, quantities: dict[str, Tensor], *, mask: Tensor, kept: Tensor) -> None:
        """Add one batch; no host synchronisation.

        Args:
            quantities: name -> [B, T], of ``PROFILE_QUANTITIES``; an absent one stays uncounted.
            mask: bool [B, T].
            kept: bool [B, T], tokens in the denominator.
        """
        cells = self._cells(mask)
        counts = self._by_cell(mask, cells)
        for name, values in quantities.items():
            place = PROFILE_QUANTITIES.index(name)
            self.sums[0, place] += self._by_cell(values, cells)
            self.sums[1, place] += counts
        weighted, plain = quantities["gradient_size"].double(), quantities["advantage"].double()
        squares = [torch.where(kept, values.square(), 0.0).sum() for values in (weighted, plain)]
        self.extra += torch.stack([mask.any(-1).sum().double(), *squares])

    def _by_cell(self, values: Tensor, cells: Tensor) -> Tensor:
        """Sum of [B, T] in each cell, float64 [cells + 1]; what is masked lands in the last."""
        flat = values.double().flatten()
        out = torch.zeros(self.num_cells + 1, dtype=torch.float64, device=flat.device)
        return out.index_add_(0, cells.flatten(), flat.repeat(len(cells)))

    def _cells(self, mask: Tensor) -> Tensor:
        """The cells each token belongs to: int64 [3, B * T], absolute, relative and bands; the last cell where masked."""
        place, length = positions(mask), lengths(mask).unsqueeze(-1)
        absolute = torch.bucketize(place, self._edges, right=True) - 1
        absolute = torch.where(absolute < self.num_absolute, absolute, self.num_cells)
        # whole numbers: ((i - 1/2) / n) * bins must not round across an edge
        relative = (2 * place - 1) * self.relative_bins // (2 * length).clamp(min=1) + self.num_absolute
        band = torch.full_like(place, self.num_absolute + self.relative_bins)
        for bit, (name, fraction) in enumerate(PROFILE_BANDS.items()):
            count = ceil_count(fraction, length)
            inside = place <= count if name.startswith("first") else place > length - count
            band = band + inside.long() * 2**bit
        found = torch.stack([absolute, relative, band]).flatten(1)
        return torch.where(mask.flatten(), found, self.num_cells)

    def compute(self) -> Tensor:
        """Everything in one float64 tensor, so that it is fetched in one transfer; see ``tables``."""
        return torch.cat([self.sums.flatten(), self.extra])

    def tables(self, computed: Tensor) -> ProfileTables:
        """What ``compute`` returned, on the CPU, taken apart."""
        sums = computed[:-3].view(self.sums.shape)
        absolute, relative, subsets, _ = sums.split([self.num_absolute, self.relative_bins, _BAND_CELLS, 1], dim=-1)
        member = torch.arange(_BAND_CELLS).unsqueeze(-1).bitwise_right_shift(torch.arange(len(PROFILE_BANDS))) & 1
        rows, weighted, plain = computed[-3:]
        return ProfileTables(
            absolute=absolute,
            relative=relative,
            bands=subsets @ member.double(),
            rows=int(rows),
            gradient_scale=float((weighted / plain).sqrt()),
        )


@dataclass(frozen=True)
class ProfileTables:
    """Sums of a window on the CPU.

    Args:
        absolute: float64 [2, Q, N], totals and counts by absolute position.
        relative: float64 [2, Q, N], the same by relative position.
        bands: float64 [2, Q, bands], the same by band.
        rows: responses with at least one token.
        gradient_scale: sqrt(sum (w A)^2 / sum A^2) over kept tokens, NaN without any.
    """

    absolute: Tensor
    relative: Tensor
    bands: Tensor
    rows: int
    gradient_scale: float


# -- answers of an evaluation ------------------------------------------------------------------------------------------

BOOTSTRAP_DRAWS = 2000
CONFIDENCE = 0.95
NO_VOTE, RIGHT_VOTE = 0, 1  # values of `vote`; every other value names one wrong answer
ANSWER_COLUMNS = ("problem", "sample", "correct", "truncated", "timeout", "no_answer", "length", "vote")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of n samples drawn without replacement hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. (2021), as a product, so that no binomial overflows.

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

    Every (problem, sample) counts once, however often it was added. The interval is over problems: the samples of one
    problem are no independent evidence about the next.

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
            columns: int64 or bool [N] each: problem, sample, correct, truncated, timeout, no_answer, length (tokens) and
                vote (see ``majority_credit``).
        """
        self.rows.append(torch.stack([columns[name].to(torch.int64) for name in ANSWER_COLUMNS], -1))

    def compute(self) -> dict[str, float]:
        """Values by name; fractions in [0, 1], the length in tokens."""
        table = self._unique(torch.cat(self.rows) if isinstance(self.rows, list) else self.rows).cpu()
        column = dict(zip(ANSWER_COLUMNS, table.unbind(-1), strict=True))
        groups = [table[column["problem"] == problem] for problem in column["problem"].unique().tolist()]
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
