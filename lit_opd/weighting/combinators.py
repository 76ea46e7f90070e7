"""Strategies made of strategies: products, normalisers and rearrangements."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_opd.distributed import all_sum
from lit_opd.errors import InputError, is_integer, require
from lit_opd.masked import lengths, masked_sum, valid_columns
from lit_opd.streams import stream_seed, token_uniforms
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import DependsOn, Scope, WeightingStrategy
from lit_opd.weighting.fractions import FirstFraction
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform

_READING_ORDER: tuple[DependsOn, ...] = ("prefix", "token", "sequence")
_DOMAIN = stream_seed(*b"Shuffled")


class _Combinator(WeightingStrategy):
    """Reads what its children read, drops what they drop, and needs the whole batch if one of them does."""

    @property
    @abstractmethod
    def children_in_order(self) -> list[WeightingStrategy]:
        """The strategies it is made of."""

    @property
    def requires(self) -> frozenset[str]:
        """The fields of all children."""
        return frozenset().union(*(child.requires for child in self.children_in_order))

    @property
    def scope(self) -> Scope:
        """Batch as soon as one child's is."""
        return "batch" if any(child.scope == "batch" for child in self.children_in_order) else "sequence"

    @property
    def drops_tokens(self) -> bool:
        """True if a child drops tokens."""
        return any(child.drops_tokens for child in self.children_in_order)

    @property
    def list_length(self) -> int:
        """The longest that a child reads."""
        return max(child.list_length for child in self.children_in_order)

    def _require_strategy(self, field: str, value: Any) -> None:
        if not isinstance(value, WeightingStrategy):
            raise InputError(f"`{type(self).__name__}.{field}` must be a WeightingStrategy, got {value!r}")


class Product(_Combinator):
    """Multiplies the weights of several strategies.

        w_t = product over j of w^(j)_t,   keep_t = all of keep^(j)_t

    Source: method.md section 4.2. Range: the product of the ranges; does not keep the mean weight, even if all factors
    do: wrap it in a normaliser. Depends on what its widest-reading factor reads.

    Args:
        strategies: at least one.
    Raises:
        ValueError: an empty list, or an entry that is no strategy.
    """

    def __init__(self, strategies: list[WeightingStrategy]) -> None:
        super().__init__()
        if not isinstance(strategies, (list, tuple)) or not strategies:
            raise InputError(f"`Product.strategies` must be a list of at least one strategy, got {strategies!r}")
        for place, strategy in enumerate(strategies):
            self._require_strategy(f"strategies[{place}]", strategy)
        self.strategies = nn.ModuleList(strategies)

    @property
    def children_in_order(self) -> list[WeightingStrategy]:
        """The factors."""
        return cast(list[WeightingStrategy], list(self.strategies))

    @property
    def depends_on(self) -> DependsOn:
        """The widest of the factors."""
        return max((child.depends_on for child in self.children_in_order), key=_READING_ORDER.index)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """Two curves, a selection with a curve, and nothing at all."""
        return [
            cls([ImportanceWeighting(), FirstFraction(0.5)]),
            cls([FirstFraction(0.7), FirstFraction(0.4), ImportanceWeighting(w_max=3.0)]),
            cls([Uniform(), Uniform()]),
        ]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """The product of the factors' weights, [B, T]."""
        product = torch.ones_like(signal.student_logprobs)
        for child in self.children_in_order:
            product = product * child(signal, progress)
        return product

    def keep(self, signal: TokenSignal, progress: float) -> Tensor | None:
        """bool [B, T]: the tokens that every factor keeps."""
        kept = signal.mask
        for child in self.children_in_order:
            kept = kept & child.kept(signal, progress) if child.drops_tokens else kept
        return kept if self.drops_tokens else None


class _Wrapper(_Combinator):
    """A combinator around one strategy."""

    def __init__(self, strategy: WeightingStrategy) -> None:
        super().__init__()
        self._require_strategy("strategy", strategy)
        self.strategy = strategy

    @property
    def children_in_order(self) -> list[WeightingStrategy]:
        """The inner strategy."""
        return [self.strategy]

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """Around IW-OPD, around a strategy that drops tokens, and around one of many weights 1."""
        product = Product([ImportanceWeighting(w_max=3.0), FirstFraction(0.5)])
        return [cls(ImportanceWeighting()), cls(product), cls(Uniform())]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor | None:
        """bool [B, T]: the tokens that the inner strategy keeps."""
        return self.strategy.kept(signal, progress) if self.strategy.drops_tokens else None


class SequenceMeanOne(_Wrapper):
    """Rescales the inner weights so that each row's kept tokens have mean weight 1.

        w_t = v_t / mean of v over the row's kept tokens,   v the inner weights

    Source: method.md section 4.3. Keeps the mean weight of each row; a row whose inner weights are all 0 stays 0. Tells
    where a strategy puts weight from how much. Reads the whole row, hence "sequence".

    Args:
        strategy: gives the inner weights.
    Raises:
        ValueError: ``strategy`` is no strategy.
    """

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """v / mean of v, [B, T]."""
        inner: Tensor = self.strategy(signal, progress)
        kept = self.strategy.kept(signal, progress)
        return inner / _mean_or_one(masked_sum(inner.double(), kept), lengths(kept)).unsqueeze(-1)


class BatchMeanOne(_Wrapper):
    """Rescales the inner weights so that the kept tokens of the whole batch have mean weight 1.

        w_t = v_t / mean of v over the kept tokens of all rows and ranks,   v the inner weights

    Source: method.md section 4.3. Keeps the batch's mean weight, one scalar for all rows; a batch whose inner weights
    are all 0 stays 0. Removes the larger step and leaves differences between rows. Scope "batch".

    Args:
        strategy: gives the inner weights.
    Raises:
        ValueError: ``strategy`` is no strategy.
    """

    @property
    def scope(self) -> Scope:
        """Averages over all rows."""
        return "batch"

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """v / batch mean of v, [B, T]."""
        inner: Tensor = self.strategy(signal, progress)
        kept = self.strategy.kept(signal, progress)
        total = masked_sum(inner.double(), kept).sum()
        total, count = all_sum(torch.stack([total, kept.sum().double()])).unbind()
        return inner / _mean_or_one(total, count)


class _Rearranged(_Wrapper):
    """Moves the inner weights, and with each its ``keep``, to other valid tokens of the row."""

    @abstractmethod
    def order(self, signal: TokenSignal) -> Tensor:
        """int64 [B, T]: entry i is the column whose weight goes to the row's i-th valid token (masked ones last)."""

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """The inner weights in another order, [B, T]."""
        return self._moved(self.strategy(signal, progress), signal)

    def keep(self, signal: TokenSignal, progress: float) -> Tensor | None:
        """bool [B, T]: the inner ``keep`` in the same other order."""
        kept = super().keep(signal, progress)
        return None if kept is None else self._moved(kept, signal)

    def _moved(self, values: Tensor, signal: TokenSignal) -> Tensor:
        return torch.empty_like(values).scatter_(1, valid_columns(signal.mask), values.gather(1, self.order(signal)))


class Reversed(_Rearranged):
    """Gives the inner weights of each row in reverse order.

        w at position i = v at position n + 1 - i,   v the inner weights

    Source: method.md section 6, the control that keeps every weight and turns the slope. A token the inner strategy
    drops turns with its weight: where FirstFraction keeps the first 30 %, its reverse keeps the last. Range of the
    inner strategy; keeps its mean weight. Reads n and later tokens, hence "sequence".

    Args:
        strategy: gives the inner weights.
    Raises:
        ValueError: ``strategy`` is no strategy.
    """

    def order(self, signal: TokenSignal) -> Tensor:
        """int64 [B, T]: the valid columns from the last to the first."""
        columns = valid_columns(signal.mask)
        place = torch.arange(columns.shape[1], device=columns.device).expand(columns.shape)
        from_end = lengths(signal.mask).unsqueeze(-1) - 1 - place
        return columns.gather(1, torch.where(from_end >= 0, from_end, place))


class Shuffled(_Rearranged):
    """Deals the inner weights of each row to its tokens at random.

        w at position i = v at position perm(i),   perm a random permutation of 1..n

    Source: method.md section 6, the control that keeps every weight and takes its place away. A token the inner
    strategy drops moves with its weight, so as many stay. The permutation comes from (seed, row key, step): two
    shuffles of one seed move alike. Range of the inner strategy; keeps its mean weight. Reads n and later tokens, hence
    "sequence".

    Args:
        strategy: gives the inner weights.
        seed: names the permutations.
    Raises:
        ValueError: ``strategy`` is no strategy, or the seed no integer.
    """

    def __init__(self, strategy: WeightingStrategy, seed: int = 0) -> None:
        super().__init__(strategy)
        self.seed = seed
        require(is_integer(seed), f"{type(self).__name__}.seed", "an integer", seed)

    def order(self, signal: TokenSignal) -> Tensor:
        """int64 [B, T]: the valid columns by the size of their draw."""
        assert signal.row_keys is not None  # the record fills it
        draws = token_uniforms(self.seed, signal.row_keys, signal.step, signal.mask, domain=_DOMAIN)
        return draws.argsort(dim=-1, stable=True)


def _mean_or_one(total: Tensor, count: Tensor) -> Tensor:
    """total / count, or 1 where that is 0 or there is nothing to average."""
    mean = total / count.clamp(min=1)
    return torch.where(mean > 0, mean, 1.0)
