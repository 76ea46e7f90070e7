"""A favoured prefix that grows with training: IW-OPD's curriculum baselines."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_opd.errors import is_integer, require
from lit_opd.masked import ceil_count, lengths, positions
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction, is_nonnegative
from lit_opd.weighting.base import WeightingStrategy

Schedule = Literal["cosine", "linear"]


class _AnnealedPrefix(WeightingStrategy):
    """The prefix of ceil(n * ratio(p)) tokens, ratio from ``start`` at p = 0 to ``end`` at p = 1."""

    def __init__(self, start: float, end: float, schedule: Schedule, min_tokens: int) -> None:
        super().__init__()
        self.start, self.end, self.schedule, self.min_tokens = start, end, schedule, min_tokens
        name = type(self).__name__
        require(is_fraction(start), f"{name}.start", "in (0, 1]", start)
        require(is_fraction(end), f"{name}.end", "in (0, 1]", end)
        require(schedule in get_args(Schedule), f"{name}.schedule", '"cosine" or "linear"', schedule)
        require(is_integer(min_tokens) and min_tokens >= 1, f"{name}.min_tokens", "an integer >= 1", min_tokens)

    def ratio(self, progress: float) -> float:
        """Fraction of the response inside the prefix, for ``progress`` in [0, 1]."""
        done = (1.0 - math.cos(math.pi * progress)) / 2.0 if self.schedule == "cosine" else progress
        return self.start + (self.end - self.start) * done

    def inside(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the tokens of the prefix."""
        counts = ceil_count(self.ratio(progress), lengths(signal.mask)).clamp(min=self.min_tokens)
        return signal.mask & (positions(signal.mask) <= counts.unsqueeze(-1))


class AnnealedPrefixWeight(_AnnealedPrefix):
    """Amplifies a prefix that grows from ``start`` to ``end`` of the response over training.

        ratio = start + (end - start) * (1 - cos(pi p)) / 2        (linear: * p)
        w_t   = weight if i_t <= max(ceil(ratio * n), min_tokens) else 1

    Source: published code of arXiv 2606.22600 (its curriculum baseline; start = end = 0.3 is the fixed prefix-30
    amplification). Values {weight, 1}; does not keep the mean weight. Reads n, hence "sequence".

    Fails where the tokens after the prefix are those not yet learned: they count less, most of all at the start.

    Args:
        weight: weight inside the prefix, >= 0; 1 is ``Uniform``.
        start: fraction at progress 0, in (0, 1].
        end: fraction at progress 1, in (0, 1].
        schedule: "cosine" or "linear" in the progress.
        min_tokens: the prefix never holds fewer tokens (the response permitting).
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(
        self,
        weight: float = 1.5,
        start: float = 0.3,
        end: float = 1.0,
        schedule: Schedule = "cosine",
        min_tokens: int = 1,
    ) -> None:
        super().__init__(start, end, schedule, min_tokens)
        self.weight = weight
        require(is_nonnegative(weight), f"{type(self).__name__}.weight", "a finite number >= 0", weight)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, each option, and the fixed prefix."""
        return [cls(), cls(schedule="linear", min_tokens=3), cls(weight=2.0, end=0.3), cls(weight=1.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """``weight`` inside the prefix, 1 after it, [B, T]."""
        ones = torch.ones_like(signal.student_logprobs)
        return torch.where(self.inside(signal, progress), ones * self.weight, ones)


class AnnealedPrefixMask(_AnnealedPrefix):
    """Supervises only a prefix that grows from ``start`` to ``end`` of the response over training.

        ratio = start + (end - start) * (1 - cos(pi p)) / 2        (linear: * p)
        w_t   = 1 if i_t <= max(ceil(ratio * n), min_tokens) else 0

    Source: published code of arXiv 2606.22600. Values {0, 1}. As published the tokens after the prefix stay in the
    denominator, so the mean weight is about ``ratio`` and the step grows over training; with ``shrink_denominator``
    they leave it and the mean weight over the kept tokens is 1. Reads n, hence "sequence".

    Fails where the tokens after the prefix are those not yet learned: for much of the training they do not count.

    Args:
        start: fraction at progress 0, in (0, 1].
        end: fraction at progress 1, in (0, 1].
        schedule: "cosine" or "linear" in the progress.
        min_tokens: the prefix never holds fewer tokens (the response permitting).
        shrink_denominator: drop the tokens after the prefix from the denominator too.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(
        self,
        start: float = 0.3,
        end: float = 1.0,
        schedule: Schedule = "cosine",
        min_tokens: int = 1,
        shrink_denominator: bool = False,
    ) -> None:
        super().__init__(start, end, schedule, min_tokens)
        self.shrink_denominator = shrink_denominator

    @property
    def drops_tokens(self) -> bool:
        """Only with ``shrink_denominator``."""
        return self.shrink_denominator

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting and each option."""
        return [cls(), cls(schedule="linear", min_tokens=3), cls(shrink_denominator=True), cls(start=1.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """1 inside the prefix, 0 after it, [B, T]."""
        return self.inside(signal, progress).to(signal.student_logprobs.dtype)

    def keep(self, signal: TokenSignal, progress: float) -> Tensor | None:
        """bool [B, T]: the prefix with ``shrink_denominator``, else everything."""
        return self.inside(signal, progress) if self.shrink_denominator else None
