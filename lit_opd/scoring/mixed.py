"""Several distributions over one vocabulary as one, met in tiles like any output head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lit_opd.scoring.tiles import ALL, Head, VocabularySums, tiles

Mixing = Literal["mixture", "product"]


@dataclass(frozen=True, eq=False, kw_only=True)
class MixedHead(Head):
    """Frozen heads over the same N tokens and V entries; only ``logits`` are its own, so it is read by tiles alone.

        mixture : log q_v = log sum_i w_i q_iv,   q_i at the temperature that is asked for
        product : log q_v = sum_i w_i log q_iv - log Z, a normalised geometric mean

    ``hidden`` and what describes the vocabulary are those of the first.

    Args:
        parts: the heads.
        weights: w_i > 0, one a head; they sum to 1.
        how: "mixture" or "product".
    """

    parts: tuple[Head, ...]
    weights: tuple[float, ...]
    how: Mixing
    _normalisers: dict[float, list[Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(parts: tuple[Head, ...], weights: tuple[float, ...], how: Mixing) -> MixedHead:
        """One of several."""
        first = parts[0]
        return MixedHead(
            first.hidden, first.weight, limit=first.limit, unused=first.unused, parts=parts, weights=weights, how=how
        )

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the parts'."""
        found = self.parts[0].dtype
        for part in self.parts[1:]:
            found = torch.promote_types(found, part.dtype)
        return found

    def logits(self, rows: slice, temperature: float, columns: slice = ALL) -> Tensor:
        """Logits of the tokens ``rows`` and the entries ``columns``: a new [n, v] of [N, V]; of a mixture its log-probs."""
        total: Tensor | None = None
        for number, weight in enumerate(self.weights):
            part = self._part(number, weight, rows, temperature, columns)
            if total is None:
                total = part
            elif self.how == "product":
                total.add_(part)
            else:
                total = torch.logaddexp(total, part)
        assert total is not None  # there are at least two
        return total

    def _part(self, number: int, weight: float, rows: slice, temperature: float, columns: slice) -> Tensor:
        """[n, v]: the weighted logits of one head; for a mixture the log of its weighted probabilities."""
        logits = self.parts[number].logits(rows, temperature, columns).to(self.dtype)
        if self.how == "product":
            return logits.mul_(weight)
        total = self._log_sums(temperature)[number][rows].to(self.dtype)
        return logits.sub_(total - math.log(weight))

    def _log_sums(self, temperature: float) -> list[Tensor]:
        """Of each part: the log-sum-exp of its logits, float64 [N, 1]."""
        if temperature not in self._normalisers:
            self._normalisers[temperature] = [log_sums(part, temperature).unsqueeze(-1) for part in self.parts]
        return self._normalisers[temperature]


def log_sums(head: Head, temperature: float) -> Tensor:
    """The log-sum-exp of each token's logits, float64 [N] nats, without gradient."""
    with torch.no_grad():
        sums = VocabularySums(head)
        for rows, columns in tiles(head):
            sums.add(rows, head.logits(rows, temperature, columns))
        return sums.log_normaliser
