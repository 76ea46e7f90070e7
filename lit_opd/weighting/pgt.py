"""PGT: keep the tokens whose policy gradient has something to say."""

from __future__ import annotations

from torch import Tensor

from lit_opd.errors import require
from lit_opd.lists import candidates, of_tokens
from lit_opd.types import TokenSignal
from lit_opd.weighting._lists import _ReadsLists
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.selection import _BatchSelection

UNLISTED = -12.0  # nats of a candidate that a list does not name, as in the code of IER-OPD


class PGT(_ReadsLists, _BatchSelection):
    """Keeps the tokens at which the log ratio of the models varies most under the student.

        score_t = Var_p[log pi_T - log pi_S] over the union C of both lists of k, both models renormalised over C
        keep    = the ceil(keep_fraction * N) highest of the batch's N valid tokens (ties: position, then row key)

    Source: an unpublished note, we know of no paper; ours are the fraction over the batch, hence no default, and the
    log-prob of a candidate outside a model's list of LIST_LENGTH, -12 as in the code of IER-OPD. The variance is the squared
    norm of the expected gradient in the logits' Fisher metric: 0 where the ratio is the same for all candidates. Weight 1 where
    kept; keeps the mean weight over the kept tokens. Scope "batch".

    Fails where the variance comes from candidates nobody samples, whose log-probs are the -12.

    Args:
        keep_fraction: in (0, 1]; 1 is ``Uniform``.
        k: leading entries of both lists.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, keep_fraction: float, k: int = 16) -> None:
        super().__init__()
        self.keep_fraction = keep_fraction
        name = type(self).__name__
        require(is_fraction(keep_fraction), f"{name}.keep_fraction", "in (0, 1]", keep_fraction)
        self._set_k(k)

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """A tenth, one half by short lists, and everything."""
        return [cls(0.1), cls(0.5, k=3), cls(1.0)]

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T], the chosen tokens of this rank's rows."""
        assert signal.student_topk is not None and signal.teacher_topk is not None  # required above
        ours, theirs = (of_tokens(topk, signal.mask) for topk in (signal.student_topk, signal.teacher_topk))
        either = candidates(ours, theirs, self.k, missing=UNLISTED)
        p, q = either.renormalised()
        ratio = (q - p).masked_fill(~either.counted, 0.0)
        mean = (p.exp() * ratio).sum(-1, keepdim=True)
        return self.best((p.exp() * (ratio - mean).square()).sum(-1), signal, self.keep_fraction)
