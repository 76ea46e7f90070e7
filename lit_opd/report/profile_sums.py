"""Sums and counts of a step's tokens by position: torchmetrics, reduced over ranks, never means of means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_opd.masked import ceil_count, exclusive_cumsum, lengths, positions, turn_positions

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
    "list_overlap",
    "list_teacher_mass",
    "list_advantage",
)
# NaN on a valid token leaves it uncounted
UNDEFINED_SOMEWHERE = frozenset({"kl_k1", "kl_k3", "clip_fraction", "list_advantage"})
PROFILE_BANDS = {"first_10": 0.1, "first_30": 0.3, "last_30": 0.3}
_BAND_CELLS = 2 ** len(PROFILE_BANDS)  # a token may be in several bands, so cells are the subsets of bands


def token_quantities(
    *,
    mask: Tensor,
    sampled_now: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    weights: Tensor,
    kept: Tensor,
    clipped: Tensor,
) -> dict[str, Tensor]:
    """What the profile shows of each token, [B, T] each; content where masked means nothing.

    Args:
        mask: bool [B, T].
        sampled_now: bool [B], rows that are the student's own samples: the others say nothing of KL(student || teacher), which is
            NaN there.
        log_ratio: [B, T] nats, teacher - student.
        advantage: [B, T] nats, what the loss reads.
        weights: [B, T], 0 where a token does not count.
        kept: bool [B, T], tokens in the denominator.
        clipped: bool [B, T], tokens whose gradient the policy clip cut; asked of those with a weight above 0, others have none.
    """
    size = log_ratio.abs()
    wide = torch.where(sampled_now.unsqueeze(-1), log_ratio.double(), torch.nan)  # k3 is a difference of near numbers
    return {
        "advantage": advantage,
        "disagreement": size,
        "drift": exclusive_cumsum(size, mask),
        "kl_k1": -wide,
        "kl_k3": torch.expm1(wide) - wide,
        "weight": weights,
        "kept_fraction": kept,
        "gradient_size": (weights * advantage).abs(),
        "clip_fraction": torch.where(weights > 0, clipped.double(), torch.nan),
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
    """Sums and counts of the profile's quantities by absolute position, by relative position and by band; of conversations by
    position in the turn and by turn too.

    Positions count inside the mask. Bands are what ``FirstFraction`` and ``LastFraction`` keep: ceil(fraction * n) tokens.

    Args:
        length: last position of the absolute bins; tokens after it are in the relative bins and bands only.
        bins: absolute bins, fewer where the length has fewer positions.
        scale: "linear" or "log" spacing of the absolute bins.
        relative_bins: equal bins of (position - 1/2) / n.
        turns: most turns of a conversation, 0 where responses are one turn.
        turn_length: last position of the bins inside a turn; default ``length``.
    """

    full_state_update = False
    sums: Tensor
    extra: Tensor
    _edges: Tensor
    _turn_edges: Tensor

    def __init__(
        self,
        length: int,
        *,
        bins: int = 64,
        scale: str = "linear",
        relative_bins: int = 10,
        turns: int = 0,
        turn_length: int | None = None,
    ) -> None:
        super().__init__()
        self.relative_bins = relative_bins
        self.edges = position_edges(length, bins=bins, scale=scale)
        self.register_buffer("_edges", self.edges, persistent=False)  # follows the metric's device
        self.num_absolute = len(self.edges) - 1
        self.num_turns = turns
        self.turn_edges = position_edges(turn_length or length, bins=bins, scale=scale)
        self.register_buffer("_turn_edges", self.turn_edges, persistent=False)
        self.num_in_turn = len(self.turn_edges) - 1 if turns else 0
        self.num_cells = self.num_absolute + relative_bins + _BAND_CELLS + self.num_in_turn + turns
        # totals and counts; the last cell takes what belongs nowhere
        shape = (2, len(PROFILE_QUANTITIES), self.num_cells + 1)
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        # rows with a token, sum of (w A)^2 and of A^2 over the kept tokens
        self.add_state("extra", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, quantities: dict[str, Tensor], *, mask: Tensor, kept: Tensor, turn: Tensor | None = None) -> None:
        """Add one batch; no host synchronisation.

        Args:
            quantities: name -> [B, T], of ``PROFILE_QUANTITIES``; an absent one stays uncounted, and so does a token where one of
                ``UNDEFINED_SOMEWHERE`` is NaN.
            mask: bool [B, T].
            kept: bool [B, T], tokens in the denominator.
            turn: int64 [B, T], of conversations.
        """
        cells = self._cells(mask)
        if self.num_turns and turn is not None:
            cells = torch.cat([cells, self._turn_cells(mask, torch.where(mask, turn, 0))])
        counts = self._by_cell(mask, cells)
        for name, values in quantities.items():
            place, known = PROFILE_QUANTITIES.index(name), counts
            if name in UNDEFINED_SOMEWHERE:
                defined = ~values.isnan()
                values, known = torch.where(defined, values, 0.0), self._by_cell(mask & defined, cells)
            self.sums[0, place] += self._by_cell(values, cells)
            self.sums[1, place] += known
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

    def _turn_cells(self, mask: Tensor, turn: Tensor) -> Tensor:
        """The same by position in the turn and by turn: int64 [2, B * T]."""
        first = self.num_cells - self.num_in_turn - self.num_turns
        inside = torch.bucketize(turn_positions(mask, turn), self._turn_edges, right=True) - 1
        inside = torch.where(inside < self.num_in_turn, first + inside, self.num_cells)
        number = torch.where(turn < self.num_turns, first + self.num_in_turn + turn, self.num_cells)
        return torch.where(mask.flatten(), torch.stack([inside, number]).flatten(1), self.num_cells)

    def compute(self) -> Tensor:
        """Everything in one tensor, float64 [n], so that it is fetched in one transfer; see ``tables``. A collective."""
        return torch.cat([self.sums.flatten(), self.extra])

    def tables(self, computed: Tensor) -> ProfileTables:
        """What ``compute`` returned, float64 [n] on the CPU, taken apart."""
        sums = computed[:-3].view(self.sums.shape)
        sizes = [self.num_absolute, self.relative_bins, _BAND_CELLS, self.num_in_turn, self.num_turns, 1]
        absolute, relative, subsets, in_turn, by_turn, _ = sums.split(sizes, dim=-1)
        member = torch.arange(_BAND_CELLS).unsqueeze(-1).bitwise_right_shift(torch.arange(len(PROFILE_BANDS))) & 1
        rows, weighted, plain = computed[-3:]
        return ProfileTables(
            absolute=absolute,
            relative=relative,
            bands=subsets @ member.double(),
            rows=int(rows),
            gradient_scale=float((weighted / plain).sqrt()),
            in_turn=in_turn if self.num_turns else None,
            by_turn=by_turn if self.num_turns else None,
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
        in_turn: float64 [2, Q, N], by position in the turn; None where responses are one turn.
        by_turn: float64 [2, Q, turns].
    """

    absolute: Tensor
    relative: Tensor
    bands: Tensor
    rows: int
    gradient_scale: float
    in_turn: Tensor | None = None
    by_turn: Tensor | None = None
