"""From token losses to one scalar: named reductions whose denominators are passed in.

| name | sum of kept token losses, divided by | counts |
|---|---|---|
| sequence-mean | the row's kept tokens, then by rows | rows with a kept token |
| token-mean | kept tokens | of the whole step |
| sequence-sum | rows | rows with a kept token |
| constant | rows x response slots | rows with a kept token |

A row of which no token is kept, such as one that a gate drops, is in no denominator. Denominators are sums over the whole
optimizer step: all micro-batches, all ranks. ``sequence-mean`` favours short rows by design once responses can end. Source:
method.md section 4.6.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Aggregation = Literal["sequence-mean", "token-mean", "sequence-sum", "constant"]


def denominator(aggregation: Aggregation, *, kept: Tensor, max_new_tokens: int) -> Tensor:
    """This process's share of the denominator, to be summed over micro-batches and ranks.

    Args:
        aggregation: the reduction's name.
        kept: bool [B, T], tokens that count.
        max_new_tokens: response slots, for "constant".
    Returns:
        float64 scalar, exact for counts below 2^53.
    """
    if aggregation == "token-mean":
        return kept.sum().double()
    rows = kept.any(-1).sum().double()
    return rows * max_new_tokens if aggregation == "constant" else rows


def aggregate(token_loss: Tensor, *, kept: Tensor, aggregation: Aggregation, denominator: Tensor) -> Tensor:
    """This process's share of the reduced loss.

    Args:
        token_loss: [B, T] nats, 0 where a token does not count.
        kept: bool [B, T], tokens that count.
        aggregation: the reduction's name.
        denominator: scalar over the whole step; a step without any counted token gives 0.
    Returns:
        scalar, nats (a sum over tokens for "sequence-sum").
    """
    rows = token_loss.sum(-1)
    if aggregation == "sequence-mean":
        rows = rows / kept.sum(-1).clamp(min=1)
    return rows.sum() / denominator.clamp(min=1).to(rows.dtype)
