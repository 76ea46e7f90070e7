"""Statistics of the tokens of a whole batch, over all ranks. Every function here is a collective: call it on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.distributed import all_max, all_min, all_sum, gather_rows
from lit_opd.masked import COUNT_SLACK, floor_count, positions


def token_order(mask: Tensor, row_keys: Tensor) -> Tensor:
    """int64 [N, 2], position and row key of the N valid tokens: who comes first among equals, whatever the batch's cut."""
    keys = row_keys.unsqueeze(-1).expand(mask.shape)
    return torch.stack([positions(mask)[mask], keys[mask]], -1)


def total_count(values: Tensor) -> int:
    """Entries of ``values`` [N] on all ranks."""
    return int(all_sum(torch.tensor(len(values), device=values.device)))


def highest(score: Tensor, order: Tensor, count: int) -> Tensor:
    """bool [N], the ``count`` best of all ranks' tokens: those above the last place's score, then by the order of ties.

    Args:
        score: [N].
        order: int64 [N, 2] of ``token_order``; tokens that tie in it too share their fate.
        count: at most the tokens of all ranks; 0 chooses none.
    """
    if not count:
        return torch.zeros_like(score, dtype=torch.bool)
    last = gather_rows(score).topk(count).values[-1]
    above, tied = score > last, score == last
    seats = count - all_sum(above.sum())
    above[tied] = _earlier(order[tied], gather_rows(order[tied])) < seats
    return above


def group_moments(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sample standard deviation (of one value: 0) of each row's group over all ranks, [B] each, float64.

    Args:
        values: [B]; NaN belongs to no group.
        group: int64 [B].
    """
    everyone, groups = gather_rows(values.double()), gather_rows(group)
    known = ~everyone.isnan()
    same = (group.unsqueeze(-1) == groups) & known
    count = same.sum(-1).double()
    mean = torch.where(same, everyone, 0.0).sum(-1) / count.clamp(min=1)
    squares = torch.where(same, everyone - mean.unsqueeze(-1), 0.0).square().sum(-1)
    return count, mean, (squares / (count - 1).clamp(min=1)).sqrt()


def least_likely(logprobs: Tensor, mask: Tensor, row_keys: Tensor, fraction: float) -> Tensor:
    """bool [B, T], the max(1, floor(fraction * N)) lowest log-probs of the N valid tokens of all ranks.

    Args:
        logprobs: [B, T] nats.
        mask: bool [B, T].
        row_keys: int64 [B].
        fraction: in (0, 1].
    """
    score = -logprobs[mask]
    total = total_count(score)
    count = min(total, max(1, int(floor_count(fraction, torch.tensor(total)))))
    return torch.zeros_like(mask).masked_scatter(mask, highest(score, token_order(mask, row_keys), count))


def rank_shares(score: Tensor) -> Tensor:
    """Place of each token among all ranks' from 0 for the lowest to 1 for the highest, ties at their mean: [N], float64."""
    everyone = gather_rows(score).sort().values
    below = torch.searchsorted(everyone, score)
    upto = torch.searchsorted(everyone, score, right=True)
    return (below + upto - 1).double() / 2 / max(len(everyone) - 1, 1)


def batch_quantiles(values: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Quantiles of all ranks' ``values`` [N] with linear interpolation, float64 [len(shares)]; 0 where there is no value.

    ``torch.quantile`` takes no more than 2^24 values; this is its formula, and a place that is whole but for its last bits is
    whole (0.28 * 25 is 7).
    """
    everyone = gather_rows(values.double()).sort().values
    if not len(everyone):
        return everyone.new_zeros(len(shares))
    place = torch.tensor(shares, dtype=torch.float64, device=values.device) * (len(everyone) - 1)
    place = torch.where((place - place.round()).abs() < COUNT_SLACK, place.round(), place)
    low = place.floor().long()
    above = everyone[(low + 1).clamp(max=len(everyone) - 1)]
    return torch.where(place > low, everyone[low] + (place - low) * (above - everyone[low]), everyone[low])


def robustly_normalised(values: Tensor, low: float, high: float) -> Tensor:
    """clamp((x - q_low) / (q_high - q_low), 0, 1) with quantiles over all ranks; 0 where both are equal: [N], float64."""
    bottom, top = batch_quantiles(values, (low, high)).unbind()
    width = top - bottom
    return ((values.double() - bottom) / torch.where(width > 0, width, torch.inf)).clamp(0.0, 1.0)


def min_max_normalised(values: Tensor) -> Tensor:
    """(x - min) / (max - min) over all ranks, 0 where constant: [N] -> [N]."""
    low, high = extremes(values)
    return (values - low) / torch.where(high > low, high - low, torch.ones_like(high))


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of all ranks, scalars; inf and -inf where there is none."""
    beyond = values.new_full((1,), torch.inf)
    return all_min(torch.cat([values, beyond]).min()), all_max(torch.cat([values, -beyond]).max())


def _earlier(order: Tensor, everyone: Tensor) -> Tensor:
    """How many of ``everyone`` [M, 2] come before each of ``order`` [N, 2], by first then second column: int64 [N]."""
    distinct, group = torch.unique(torch.cat([everyone, order]), dim=0, return_inverse=True)
    sizes = torch.bincount(group[: len(everyone)], minlength=len(distinct))
    return (sizes.cumsum(0) - sizes)[group[len(everyone) :]]
