"""Supervise one or two tokens of a response and no other."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_opd.errors import is_integer, require
from lit_opd.masked import lengths
from lit_opd.streams import stream_seed, token_uniforms
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import best_of_rows

Which = Literal["random", "largest", "smallest", "tails"]
_DOMAIN = stream_seed(*b"SparseTokens")


class SparseTokens(WeightingStrategy):
    """Weight 1 on very few tokens of each row, 0 on all others, which stay in the denominator.

        count = 1, or max(1, round(fraction * n))
        w_t   = 1 on the ``count`` tokens with the largest A ("largest"), the smallest ("smallest"), on both ("tails") or on as
                many drawn at random ("random"); ties: earlier position

    Source: reported in arXiv 2609.04565 (its rand1tok, mintok, maxtok, minmaxtok and pctltail 0.05 %; Table 2 calls the largest
    reward "mintok"), whose loss divides by the whole length as here. Range {0, 1}; mean weight count / n, twice that for tails:
    the step is thousands of times smaller than ``Uniform``'s. An optimizer such as Adam undoes most of that, a clipped gradient
    not. Draws come from (seed, row key, step). Reads the whole row, hence "sequence".

    Fails as evidence without its control: what few tokens teach is to be compared with as many random ones ("tails" are twice
    ``count``: ``Shuffled`` around it draws as many).

    Args:
        which: "random", "largest", "smallest" or "tails".
        fraction: of the row, in (0, 1]; None for one token (one of each tail).
        seed: names the draws of "random".
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, which: Which = "tails", fraction: float | None = None, seed: int = 0) -> None:
        super().__init__()
        self.which, self.fraction, self.seed = which, fraction, seed
        name = type(self).__name__
        require(which in get_args(Which), f"{name}.which", '"random", "largest", "smallest" or "tails"', which)
        require(fraction is None or is_fraction(fraction), f"{name}.fraction", "in (0, 1] or null", fraction)
        require(is_integer(seed), f"{name}.seed", "an integer", seed)

    @property
    def sample(self) -> bool:
        """Whether it draws."""
        return self.which == "random"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """One of each tail, each kind, and the published tails."""
        return [cls(), cls("random"), cls("largest", 0.2), cls("smallest"), cls("tails", 0.0005)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """1 on the chosen tokens, else 0, [B, T]."""
        counts = torch.ones_like(lengths(signal.mask))
        if self.fraction is not None:
            counts = (self.fraction * lengths(signal.mask).double()).round().long().clamp(min=1)
        chosen = torch.zeros_like(signal.mask)
        for score in self._scores(signal):
            chosen = chosen | best_of_rows(score, signal.mask, counts)
        return chosen.to(signal.student_logprobs.dtype)

    def _scores(self, signal: TokenSignal) -> list[Tensor]:
        """[B, T] each; the highest of every one are chosen."""
        if self.which == "random":
            assert signal.row_keys is not None  # the record fills it
            return [-token_uniforms(self.seed, signal.row_keys, signal.step, signal.mask, domain=_DOMAIN)]
        ends = {"largest": [1.0], "smallest": [-1.0], "tails": [1.0, -1.0]}[self.which]
        return [sign * signal.log_ratio for sign in ends]
