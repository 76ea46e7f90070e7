"""Sums, means and running sums over the True entries of a mask. Shapes: see ``types``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

COUNT_SLACK = 1e-9  # far above the rounding of fraction * length, far below one token


def masked_values(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` [B, T] in at least float32, exactly 0 where ``mask`` is False, whatever stood there (NaN too)."""
    values = at_least_float32(values)
    return torch.where(mask, values, values.new_zeros(()))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the valid tokens of each row: [B, T] -> [B]; 0 for an empty row."""
    return masked_values(values, mask).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid tokens of each row: [B, T] -> [B]; 0 for an empty row."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


def running_sum(values: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of all entries up to each one, [..., N] -> [..., N] along the last dimension; differentiable.

    With ``torch.use_deterministic_algorithms`` (``trainer.deterministic``) torch refuses ``cumsum`` of floating point on
    CUDA, whose order of addition is not fixed; there the sums are made in a fixed order.

    Args:
        values: [..., N].
        dtype: of the sums, default that of ``values``.
    """
    if _cumsum_is_refused(values):
        return doubled_sums(values.to(dtype or values.dtype))
    return values.cumsum(-1, dtype=dtype)


def _cumsum_is_refused(values: Tensor) -> bool:
    return values.is_cuda and values.is_floating_point() and torch.are_deterministic_algorithms_enabled()


def doubled_sums(values: Tensor) -> Tensor:
    """``running_sum`` in about log2(N) additions of shifted tensors: [..., N] -> [..., N]."""
    reach = 1
    while reach < values.shape[-1]:
        values = torch.cat([values[..., :reach], values[..., reach:] + values[..., :-reach]], -1)
        reach *= 2
    return values


def exclusive_cumsum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the valid tokens strictly before each column: [B, T] -> [B, T], 0 at the first.

    A shifted sum, not a sum minus its own term: rounding must not let token t into what stands before it.
    """
    return shifted_right(running_sum(masked_values(values, mask)))


def return_to_go(values: Tensor, mask: Tensor, *, discount: float = 1.0) -> Tensor:
    """sum over k >= t of discount^(position_k - position_t) * values_k: [B, T] -> [B, T], 0 where masked.

    Positions count inside the mask, so a hole does not discount.
    """
    values = masked_values(values, mask)
    if discount == 1.0:
        return masked_values(running_sum(values.flip(-1)).flip(-1), mask)
    running = values.new_zeros(values.shape[0])
    columns = []
    for column in range(values.shape[1] - 1, -1, -1):
        valid = mask[:, column]
        running = torch.where(valid, values[:, column] + discount * running, running)
        columns.append(torch.where(valid, running, running.new_zeros(())))
    return torch.stack(columns[::-1], -1) if columns else values


def positions(mask: Tensor) -> Tensor:
    """1-based position inside the mask: bool [B, T] -> int64 [B, T], 0 where masked."""
    return torch.where(mask, mask.cumsum(-1), 0)


def turn_sums(values: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the turns of each row.

    Args:
        values: [B, T], 0 where masked.
        turn: int64 [B, T], the turn of each column, from 0, never above the column's own number.
    Returns:
        [B, T], the sum of turn k in column k, 0 where there is no such turn; and for each column the sum of its turn.
    """
    totals = torch.zeros_like(values).scatter_add_(1, turn, values)
    return totals, totals.gather(1, turn)


def turn_positions(mask: Tensor, turn: Tensor) -> Tensor:
    """1-based position among the valid tokens of the token's own turn: int64 [B, T], 0 where masked.

    Args:
        mask: bool [B, T].
        turn: int64 [B, T], as for ``turn_sums``; it never falls from one valid token to the next.
    """
    counts, _ = turn_sums(mask.long(), turn)
    before = shifted_right(counts.cumsum(-1))  # valid tokens of all earlier turns, by turn
    return torch.where(mask, positions(mask) - before.gather(1, turn), 0)


def lengths(mask: Tensor) -> Tensor:
    """Valid tokens a row: bool [B, T] -> int64 [B]."""
    return mask.sum(-1)


def ceil_count(fraction: float, counts: Tensor) -> Tensor:
    """ceil(fraction * counts), int64 [...] as ``counts``; whole but for its last bits is whole (0.3 * 50 is 15)."""
    return torch.ceil(counts.double() * fraction - COUNT_SLACK).long()


def floor_count(fraction: float, counts: Tensor) -> Tensor:
    """floor(fraction * counts), int64 [...] as ``counts``; whole but for its last bits is whole ((1 - 0.9) * 20 is 2)."""
    return torch.floor(counts.double() * fraction + COUNT_SLACK).long()


def valid_columns(mask: Tensor) -> Tensor:
    """Columns of each row with the valid ones first, in order: bool [B, T] -> int64 [B, T]; the masked ones follow."""
    return mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)


def shifted_right(values: Tensor) -> Tensor:
    """Each column gets the value of the one before it, the first gets 0: [B, T] -> [B, T]."""
    return pad(values, (1, 0))[..., :-1]


def affine_scan(gain: Tensor, gift: Tensor) -> Tensor:
    """x_t = gain_t * x_{t-1} + gift_t along the row from x_0 = 0: two [B, T] -> [B, T].

    Doubling (Hillis and Steele): log2 T rounds on whole tensors in place of T steps. For gains in [0, 1] and gifts >= 0
    nothing cancels, so the rounding is that of the plain loop.
    """
    reach = 1
    while reach < gain.shape[-1]:
        earlier_gain, earlier_gift = gain[..., :-reach], gift[..., :-reach]
        later = gain[..., reach:]
        gift = torch.cat([gift[..., :reach], later * earlier_gift + gift[..., reach:]], -1)
        gain = torch.cat([gain[..., :reach], later * earlier_gain], -1)
        reach *= 2
    return gift


_LOG2_E = math.log2(math.e)


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` (any shape) in float32, or unchanged when already float32 or float64."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def exp_(values: Tensor) -> Tensor:
    """e to the power of ``values`` [...], in place, as a power of two: on a CPU a third of the time of ``torch.exp``."""
    return values.mul_(_LOG2_E).exp2_()


def segment_sums(values: Tensor, lengths: Tensor, *, longest: int) -> Tensor:
    """Sums over runs of neighbouring entries: [B, T] -> [B, T], 0 where no run ends; differentiable.

    The additions are made in a fixed order, and a run of one is its entry, bit for bit.

    Args:
        values: [B, T].
        lengths: int64 [B, T], entries of the run that ends here, 0 where none ends.
        longest: at least the largest length.
    """
    total = torch.where(lengths > 0, values, 0.0)
    for back in range(1, min(longest, values.shape[-1])):
        total = total + torch.where(lengths > back, pad(values, (back, 0))[..., :-back], 0.0)
    return total
