"""IER-OPD: keep the tokens whose sampled gradient is more signal than noise."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_opd.batchwise import rank_shares
from lit_opd.errors import require
from lit_opd.lists import candidates, of_tokens
from lit_opd.masked import lengths
from lit_opd.types import TokenSignal
from lit_opd.weighting._lists import _ReadsLists
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import _BatchSelection, best_of_rows
from lit_opd.weighting.ta_opd import teachability

UNLISTED = -12.0  # nats of a candidate that a list does not name
LARGEST_RATIO = 30.0  # nats
EPSILON = 1e-8  # of the noise and of a probability

Fusion = Literal["none", "or", "and"]


class IEROPD(_ReadsLists, _BatchSelection):
    """Keeps the tokens whose sampled reverse-KL gradient has the best ratio of signal to noise, or fuses that with teachability.

        C     = the union of both lists of k and the sampled token; both models renormalised over C
        rho   = clip(log p - log q, -30, 30),   L = 1/p - 1,   b = E_p[rho L] / E_p[L]
        IER_t = Var_p[rho] / max(E_p[(rho - b)^2 L] - Var_p[rho], 1e-8)
        r     = rank of IER_t in the batch from 0 to 1,   u = the score of ``TAOPD``
        score = IER_t  |  u + r - u r ("or")  |  u r ("and")
        keep  = the ceil(keep_fraction * N) highest of the batch's N valid tokens, and the best one of a row that has none

    Source: arXiv 2609.24432, read in its published code (repository BruceSheng1202/IER-OPD, ``ier_metrics.py`` at commit d5e129f,
    ``tip_compat.py`` at 1d410e0), which also fuses with four other scores. A candidate outside a model's list of LIST_LENGTH
    counts as -12 nats, the sampled one with its own log-prob. Departures: equal values of IER share their mean rank, and ties of
    the score go by position, then row key, so that no cut of the batch matters. Weight 1 where kept; keeps the mean weight over
    the kept tokens. Scope "batch".

    Fails with sure students: where one candidate has all the mass, L of the others is huge and so is the noise.

    Args:
        keep_fraction: in (0, 1]; 1 is ``Uniform``.
        k: leading entries of both lists.
        fuse: with ``TAOPD``'s score: "none", "or" or "and".
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, keep_fraction: float = 0.01, k: int = 16, fuse: Fusion = "none") -> None:
        super().__init__()
        self.keep_fraction, self.fuse = keep_fraction, fuse
        name = type(self).__name__
        require(is_fraction(keep_fraction), f"{name}.keep_fraction", "in (0, 1]", keep_fraction)
        self._set_k(k)
        require(fuse in get_args(Fusion), f"{name}.fuse", '"none", "or" or "and"', fuse)

    @property
    def requires(self) -> frozenset[str]:
        """Both lists and the sampled tokens."""
        return frozenset({"student_topk", "teacher_topk", "token_ids"})

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published 1 %, both fusions, and everything."""
        return [cls(), cls(0.3, k=4, fuse="or"), cls(0.2, fuse="and"), cls(1.0)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the chosen tokens of this rank's rows."""
        mask, reliability = signal.mask, self._reliability(signal)
        score = reliability
        if self.fuse != "none":
            useful, rank = teachability(signal, self.k), rank_shares(reliability)
            score = useful * rank if self.fuse == "and" else useful + rank - useful * rank
        chosen = self.best(score, signal, self.keep_fraction)
        everywhere = torch.zeros(mask.shape, dtype=score.dtype, device=mask.device).masked_scatter(mask, score)
        return chosen | (best_of_rows(everywhere, mask, lengths(mask).clamp(max=1)) & ~chosen.any(-1, keepdim=True))

    def _reliability(self, signal: TokenSignal) -> Tensor:
        """IER of this rank's valid tokens, [N], float64."""
        assert signal.student_topk is not None and signal.teacher_topk is not None and signal.token_ids is not None
        mask = signal.mask
        ours, theirs = (of_tokens(topk, mask) for topk in (signal.student_topk, signal.teacher_topk))
        own = (signal.token_ids[mask], signal.student_logprobs[mask], signal.teacher_logprobs[mask])
        either = candidates(ours, theirs, self.k, missing=UNLISTED, sampled=own)
        p, q = either.renormalised()
        ratio = (p - q).masked_fill(~either.counted, 0.0).clamp(-LARGEST_RATIO, LARGEST_RATIO)
        return signal_to_noise(p.exp(), ratio)


def signal_to_noise(p: Tensor, ratio: Tensor) -> Tensor:
    """Var_p[ratio] over the variance of its single-sample gradient estimate around the best baseline: [..., C] -> [...].

    Args:
        p: probabilities that sum to 1.
        ratio: log p - log q; anything where p is 0.
    """
    mean = (p * ratio).sum(-1, keepdim=True)
    signal = (p * (ratio - mean).square()).sum(-1)
    spread = p * (1.0 / p.clamp(min=EPSILON) - 1.0)  # p L
    total = spread.sum(-1, keepdim=True)
    baseline = torch.where(total > EPSILON, (spread * ratio).sum(-1, keepdim=True) / total.clamp(min=EPSILON), mean)
    second = (spread * (ratio - baseline).square()).sum(-1)
    return signal / (second - signal).clamp(min=EPSILON)
