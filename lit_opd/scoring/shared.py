"""The teacher's distribution where it has another vocabulary: the tokens that both have, and one bucket for all others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lit_opd.scoring.tiles import Head


@dataclass(frozen=True, eq=False)
class SharedHead:
    """An output head over the teacher's vocabulary, read in pairs of tokens that mean the same.

    Both distributions become S + 1 log-probs: those of the pairs and, last, of all other tokens together, which has at least the
    rounding of its dtype so that no divergence is infinite. Where every token of both vocabularies is in a pair there is no last
    one.

    Args:
        head: of the tokens that the teacher read.
        places: int64 [N], for each valid token of the student the row of ``head`` before the same text; any row where there is
            none.
        student_ids: int64 [S], one side of the pairs, distinct.
        teacher_ids: int64 [S], the other, distinct.
        student_tokens: entries of the student's vocabulary that name a token.
    """

    head: Head
    places: Tensor
    student_ids: Tensor
    teacher_ids: Tensor
    student_tokens: int

    @cached_property
    def has_rest(self) -> bool:
        """Whether a token of either side is in no pair."""
        return max(self.student_tokens, self.head.num_tokens) > len(self.student_ids)

    def teacher(self, rows: slice, temperature: float) -> Tensor:
        """The teacher's log-probs of the pairs at the student's tokens ``rows``, without gradient: [n, S], and [n, S + 1] where
        there is a rest."""
        with torch.no_grad():
            read = replace(self.head, hidden=self.head.hidden.index_select(0, self.places[rows]))
            return self._paired(read.logits(slice(None), temperature).log_softmax(-1), self.teacher_ids)

    def student(self, logprobs: Tensor) -> Tensor:
        """The student's ``logprobs``, [n, V] of [N, V], in the same form, with their gradient."""
        return self._paired(logprobs, self.student_ids)

    def _paired(self, logprobs: Tensor, ids: Tensor) -> Tensor:
        pairs = logprobs.index_select(-1, ids)
        if not self.has_rest:
            return pairs
        rest = logprobs.index_fill(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        least = torch.finfo(logprobs.dtype).eps
        return torch.cat([pairs, torch.logaddexp(rest, rest.new_tensor(least).log())], -1)
