"""Weights that know the turns of a conversation; where a response is one turn they see one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_opd.errors import is_integer, require
from lit_opd.masked import masked_values, turn_positions, turn_sums
from lit_opd.streams import turn_keys
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_nonnegative
from lit_opd.weighting.base import DependsOn, WeightingStrategy
from lit_opd.weighting.combinators import _Wrapper


def _turn(signal: TokenSignal) -> Tensor:
    """int64 [B, T], 0 on all tokens of a response that is one turn, and where masked."""
    nothing = torch.zeros_like(signal.mask, dtype=torch.int64)
    return nothing if signal.turn is None else torch.where(signal.mask, signal.turn, nothing)


class PerTurn(_Wrapper):
    """The inner strategy begins anew in each turn: it sees each turn of each row as a response of its own.

        w_t = v_t(the tokens of t's turn alone),   v the inner weights

    Positions, lengths, running sums and ``keep`` of the inner strategy are those of the turn; one with scope "batch" compares
    all turns of all rows, and random ones draw anew in each. Source: ours, to set IW-OPD over the whole interaction against
    IW-OPD per turn. Range of the inner strategy; keeps the mean weight where that does. Each call waits once for the device, to
    count the turns.

    Args:
        strategy: gives the weights of a turn.
    Raises:
        ValueError: ``strategy`` is no strategy.
    """

    @property
    def depends_on(self) -> DependsOn:
        """As the inner strategy: a token's turn is known before it."""
        return self.strategy.depends_on

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """The inner weights of each token's own turn, [B, T]."""
        return self._merged(signal, self.strategy(self._apart(signal), progress))

    def keep(self, signal: TokenSignal, progress: float) -> Tensor | None:
        """bool [B, T]: the tokens that the inner strategy keeps of their turn."""
        if not self.strategy.drops_tokens:
            return None
        return self._merged(signal, self.strategy.kept(self._apart(signal), progress).int()).bool()

    def _apart(self, signal: TokenSignal) -> TokenSignal:
        """[K B, T]: the rows with their first turn alone, then with their second, ..."""
        turn, rows = _turn(signal), torch.arange(len(signal), device=signal.mask.device)
        most = int(turn.max()) + 1 if signal.mask.numel() else 1
        assert signal.row_keys is not None  # the record fills it
        keys = torch.cat([turn_keys(signal.row_keys, number) for number in range(most)])
        numbers = torch.arange(most, device=turn.device).repeat_interleave(len(rows)).unsqueeze(-1)
        many = replace(signal, turn=turn, validate=False).rows(rows.repeat(most))
        mask = many.mask & (turn.repeat(most, 1) == numbers)
        return replace(many, mask=mask, row_keys=keys, turn=None, validate=False)

    def _merged(self, signal: TokenSignal, values: Tensor) -> Tensor:
        """[K B, T] with each token in one of its copies at most -> [B, T]."""
        copies = len(values) // max(1, len(signal))
        return values.view(copies, *signal.mask.shape).sum(0, dtype=values.dtype)


class TurnBalanced(_Wrapper):
    """Rescales the inner weights so that every turn of a row has the same total weight.

        w_t = v_t * (V / K) / V_j,   V_j the sum of v over t's turn j, V over the row, K the row's turns with V_j > 0

    A long turn counts no more than a short one; its tokens count less. Source: TurnOPD (reported in arXiv 2607.05804, abstract;
    the constant is ours, so that a row keeps its total). The mean weight of each row is that of the inner strategy; a turn whose
    inner weights are all 0 stays 0. Range [0, n] times the inner one. Reads all turns, hence "sequence".

    Fails where a short turn says little, such as a bare call: each of its tokens counts for many.

    Args:
        strategy: gives the inner weights.
    Raises:
        ValueError: ``strategy`` is no strategy.
    """

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """v over its turn's share of the row, [B, T]."""
        inner: Tensor = self.strategy(signal, progress)
        kept = self.strategy.kept(signal, progress)
        values = masked_values(inner.double(), kept)
        totals, of_turn = turn_sums(values, _turn(signal))
        turns = (totals > 0).sum(-1, keepdim=True).clamp(min=1)
        share = totals.sum(-1, keepdim=True) / turns
        return torch.where(of_turn > 0, values * share / of_turn, 0.0)


class AfterObservation(WeightingStrategy):
    """A weight for the first tokens after each observation, 1 for all others.

        w_t = weight   where t is one of the first ``count`` tokens of its turn and the turn is not the first,   else 1

    What the student makes of an answer, such as a tool's, is decided in these tokens; a weight below 1 asks what happens without
    them. Source: ours, after reports of drift at tool boundaries. Range {1, weight}; does not keep the mean weight. For the same
    within another strategy take ``Product``.

    Args:
        count: tokens after each observation, >= 1.
        weight: of these tokens, >= 0; 1 is ``Uniform``.
    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, count: int = 8, weight: float = 2.0) -> None:
        super().__init__()
        self.count, self.weight = count, weight
        require(is_integer(count) and count >= 1, "AfterObservation.count", "an integer >= 1", count)
        require(is_nonnegative(weight), "AfterObservation.weight", "a finite number >= 0", weight)

    @property
    def depends_on(self) -> DependsOn:
        """The place in the turn, which the tokens before it fix."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """More weight, and none."""
        return [cls(), cls(count=2, weight=0.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """``weight`` after an observation, 1 elsewhere, [B, T]."""
        turn = _turn(signal)
        near = (turn > 0) & (turn_positions(signal.mask, turn) <= self.count)
        ones = torch.ones_like(signal.student_logprobs)
        return torch.where(near, ones * self.weight, ones)
