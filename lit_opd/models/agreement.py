"""How far two computations of the same log-probs may lie apart: bounds by precision, used wherever two of them are compared."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

GAP, HALF_GAP = 1e-3, 0.05  # mean nats a token that rounding may take, in float32 and in half precision
FATAL = 10.0  # times such a bound, which no rounding takes

Verdict = Literal["agree", "differ", "contradict"]


def computes_in_half(model: nn.Module) -> bool:
    """True where products of ``model`` are rounded to fewer than float32's bits: its dtype, autocast, TF32, quantised weights."""
    like = next(model.parameters())
    if any(not value.is_floating_point() for value in model.parameters()):
        return True
    if like.dtype.itemsize <= 2 or torch.is_autocast_enabled(like.device.type):
        return True
    tf32 = like.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return tf32 and like.dtype == torch.float32


def gap_bound(*, half: bool) -> float:
    """Mean nats a token."""
    return HALF_GAP if half else GAP


def verdict(gap: float, bound: float) -> Verdict:
    """ "differ" above the bound, "contradict" above ten times as much, and for NaN."""
    if gap <= bound:
        return "agree"
    return "differ" if gap <= FATAL * bound else "contradict"
