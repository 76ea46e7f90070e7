"""A distribution of which only some entries are known: what a server lists at each position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_opd.types import TopK


@dataclass(frozen=True, eq=False)
class Listed:
    """Some entries of a frozen distribution over the vocabulary; all others together have the mass that is left.

    Args:
        ids: int64 [N, K], distinct among the entries of a token that count.
        logprobs: [N, K] nats, -inf where the entry does not count.
    """

    ids: Tensor
    logprobs: Tensor

    @staticmethod
    def of(lists: TopK, tokens: Tensor) -> Listed:
        """The lists [B, T, K] at the valid tokens, int64 [N] of places in the flattened [B, T]."""
        ids, logprobs = (value.flatten(0, 1).index_select(0, tokens) for value in (lists.ids, lists.logprobs))
        return Listed(ids, logprobs)

    def counts(self, rows: slice) -> Tensor:
        """bool [n, K], True where an entry counts."""
        return self.logprobs[rows] > -torch.inf

    def buckets(self, rows: slice) -> Tensor:
        """Log-probs float64 [n, K + 1] of the entries and, last, of the rest; 0 where an entry does not count.

        The rest is what the entries leave of 1, at least the rounding of their dtype.
        """
        known = self.logprobs[rows].double()
        smallest = torch.finfo(self.logprobs.dtype).eps
        rest = (1.0 - known.exp().sum(-1, keepdim=True)).clamp(min=smallest).log()
        return torch.cat([known.masked_fill(known == -torch.inf, 0.0), rest], -1)

    def buckets_of(self, logprobs: Tensor, rows: slice) -> Tensor:
        """The same entries and rest of another distribution, log-probs [n, V] -> [n, K + 1], with its gradient.

        The rest is summed up, not taken as 1 - the entries, which would lose small ones to rounding.
        """
        ids, counts = self.ids[rows], self.counts(rows)
        taken = torch.zeros(logprobs.shape, dtype=torch.uint8, device=logprobs.device)
        taken.scatter_add_(-1, ids, counts.to(torch.uint8))
        rest = logprobs.masked_fill(taken > 0, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logprobs.gather(-1, ids).masked_fill(~counts, 0.0), rest], -1)

    def entropy_bounds(self, entries: int) -> tuple[Tensor, Tensor]:
        """Bounds of the whole distribution's entropy, [N] nats each: with the rest on one entry, and evenly on all others.

        Args:
            entries: of the vocabulary, the listed ones included.
        """
        counts = self.counts(slice(None))
        logs = self.buckets(slice(None))
        masses = torch.cat([logs[..., :-1].exp() * counts, logs[..., -1:].exp()], -1)
        lower = -(masses * logs).sum(-1)
        others = (entries - counts.sum(-1)).clamp(min=1).double()
        return lower, lower + masses[..., -1] * others.log()
