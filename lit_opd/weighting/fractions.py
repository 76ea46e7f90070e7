"""Supervise a part of each response: its first, last or random fraction, or its first N tokens."""

from __future__ import annotations

from torch import Tensor

from lit_opd.errors import is_integer, require
from lit_opd.masked import ceil_count, lengths, positions
from lit_opd.streams import stream_seed, token_uniforms
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import DependsOn, WeightingStrategy
from lit_opd.weighting.selection import _Selection

_DOMAIN = stream_seed(*b"RandomFraction")


class _Fraction(_Selection):
    """Selects ceil(fraction * n) tokens of each row."""

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self.fraction = fraction
        require(is_fraction(fraction), f"{type(self).__name__}.fraction", "in (0, 1]", fraction)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The paper's 30 %, one half, and everything."""
        return [cls(0.3), cls(0.5), cls(1.0)]

    def _counts(self, signal: TokenSignal) -> Tensor:
        """int64 [B, 1], tokens to select."""
        return ceil_count(self.fraction, lengths(signal.mask)).unsqueeze(-1)


class FirstFraction(_Fraction):
    """Supervises the first part of each response and drops the rest from the denominator.

        keep_t = i_t <= ceil(fraction * n)

    Source: arXiv 2606.22600 section 3 (the first 30 % do about as well as everything). Weight 1 where kept; keeps the
    mean weight over the kept tokens. Reads n, hence "sequence".

    Fails where what is left to learn stands late in the response.

    Args:
        fraction: in (0, 1]; 1 is ``Uniform``.
    Raises:
        ValueError: fraction outside (0, 1].
    """

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the first ceil(fraction * n)."""
        place = positions(signal.mask)
        return signal.mask & (place <= self._counts(signal))


class LastFraction(_Fraction):
    """Supervises the last part of each response and drops the rest from the denominator.

        keep_t = i_t > n - ceil(fraction * n)

    Source: arXiv 2606.22600 section 3 (the last 30 % barely learn). Weight 1 where kept; keeps the mean weight over the
    kept tokens. Reads n, hence "sequence".

    Fails where late prefixes are wrong: the teacher judges what it would never have written.

    Args:
        fraction: in (0, 1]; 1 is ``Uniform``.
    Raises:
        ValueError: fraction outside (0, 1].
    """

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the last ceil(fraction * n)."""
        place = positions(signal.mask)
        return signal.mask & (place > lengths(signal.mask).unsqueeze(-1) - self._counts(signal))


class RandomFraction(_Fraction):
    """Supervises a random part of each response, of exactly the size ``FirstFraction`` would take.

        keep_t = rank of u_t among u_1..u_n <= ceil(fraction * n),   u_i the i-th draw of the row

    Source: ours, the control missing from arXiv 2606.22600 section 3: fewer tokens without a place. Weight 1 where
    kept; keeps the mean weight over the kept tokens. The draws come from (seed, row key, step), so they depend neither
    on the batch cut nor on padding, and differ from step to step. Reads n, hence "sequence".

    Args:
        fraction: in (0, 1]; 1 is ``Uniform``.
        seed: names the draws.
    Raises:
        ValueError: fraction outside (0, 1], or a seed that is no integer.
    """

    def __init__(self, fraction: float, seed: int = 0) -> None:
        super().__init__(fraction)
        self.seed = seed
        require(is_integer(seed), f"{type(self).__name__}.seed", "an integer", seed)

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], ceil(fraction * n) tokens with the smallest draws."""
        assert signal.row_keys is not None  # the record fills it
        draws = token_uniforms(self.seed, signal.row_keys, signal.step, signal.mask, domain=_DOMAIN)
        rank = draws.argsort(dim=-1, stable=True).argsort(dim=-1)
        return signal.mask & (rank < self._counts(signal))


class FirstTokens(_Selection):
    """Supervises the first ``count`` tokens of each response and drops the rest from the denominator.

        keep_t = i_t <= count

    Source: ESR, reported in arXiv 2605.27028. Weight 1 where kept; keeps the mean weight over the kept tokens.
    Departure: the source also stops generation there (a rollout budget); here the tokens were sampled and go unused.

    Fails as ``FirstFraction`` does; a fixed count is all of a short response and little of a long one.

    Args:
        count: tokens a row, >= 1; at least the longest response is ``Uniform``.
    Raises:
        ValueError: count is no integer >= 1.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        require(is_integer(count) and count >= 1, f"{type(self).__name__}.count", "an integer >= 1", count)

    @property
    def depends_on(self) -> DependsOn:
        """Reads the position only."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """One token, a few, and more than there are."""
        return [cls(1), cls(4), cls(1_000_000)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], positions up to ``count``."""
        return signal.mask & (positions(signal.mask) <= self.count)
