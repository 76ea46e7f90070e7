"""TA-OPD: what the student can be taught is contested and within its reach."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.batchwise import robustly_normalised
from lit_opd.errors import require
from lit_opd.lists import candidates, leading, of_tokens
from lit_opd.types import TokenSignal
from lit_opd.weighting._lists import _ReadsLists
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import _BatchSelection

EPSILON = 1e-12  # of the source, smallest probability of a candidate
LOW, HIGH = 0.05, 0.95  # quantiles that become 0 and 1


class TAOPD(_ReadsLists, _BatchSelection):
    """Keeps the tokens at which the models disagree on candidates that both of them consider.

        D_t   = forward KL over the union of both lists of k; each model has the mass of its own list, renormalised, and 1e-12
                where a candidate is not in it
        C_t   = the teacher's mass on candidates that both lists name
        score = robust(D) * robust(C),   robust(x) = clip((x - q05) / (q95 - q05), 0, 1), quantiles over the batch
        keep  = the ceil(keep_fraction * N) highest of the batch's N valid tokens (ties: position, then row key)

    Source: arXiv 2605.26844 ("teachability"), read in public copies of its code (the selectors of BruceSheng1202/IER-OPD are
    built on it). Weight 1 where kept; keeps the mean weight over the kept tokens. Scope "batch".

    Fails where most tokens score 0, as they do when 95 % of the batch agrees: what is kept then is the order of ties.

    Args:
        keep_fraction: in (0, 1]; 1 is ``Uniform``.
        k: leading entries of both lists.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, keep_fraction: float = 0.05, k: int = 16) -> None:
        super().__init__()
        self.keep_fraction = keep_fraction
        name = type(self).__name__
        require(is_fraction(keep_fraction), f"{name}.keep_fraction", "in (0, 1]", keep_fraction)
        self._set_k(k)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting, a large part by short lists, and everything."""
        return [cls(), cls(0.4, k=4), cls(1.0)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the chosen tokens of this rank's rows."""
        return self.best(teachability(signal, self.k), signal, self.keep_fraction)


def teachability(signal: TokenSignal, k: int) -> Tensor:
    """The score of ``TAOPD``, [N] of this rank's valid tokens; a collective."""
    assert signal.student_topk is not None and signal.teacher_topk is not None  # callers require them
    student, teacher = (of_tokens(leading(topk, k), signal.mask) for topk in (signal.student_topk, signal.teacher_topk))
    either = candidates(student, teacher, k, missing=-torch.inf)
    p, q = either.student.exp(), either.teacher.exp()
    both = q * (p > 0)
    p, q = ((x / x.sum(-1, keepdim=True).clamp(min=EPSILON)).clamp(min=EPSILON) for x in (p, q))
    contested = (q * (q.log() - p.log()) * either.counted).sum(-1)
    return robustly_normalised(contested, LOW, HIGH) * robustly_normalised(both.sum(-1).clamp(0.0, 1.0), LOW, HIGH)
