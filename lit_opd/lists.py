"""What two top-k lists of one position say together. Shapes: see ``types``; content where masked may be anything.

An entry without mass (-inf) fills a list that a server returned too short, or names no token: it is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_opd.types import LIST_LENGTH, TopK

NOTHING = -1  # no token's id


def is_list_length(value: object) -> bool:
    """A usable number of leading entries: an integer in [1, LIST_LENGTH]."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LIST_LENGTH


def leading(topk: TopK, k: int) -> TopK:
    """The k likeliest entries, all of them where the vocabulary has fewer."""
    return TopK(ids=topk.ids[..., :k], logprobs=topk.logprobs[..., :k])


def of_tokens(topk: TopK, mask: Tensor) -> TopK:
    """The lists of the valid tokens, [B, T, K] -> [N, K]."""
    return TopK(ids=topk.ids[mask], logprobs=topk.logprobs[mask])


def named(topk: TopK) -> Tensor:
    """int64 [..., K], the ids of the entries that have mass; ``NOTHING`` for the others."""
    return torch.where(topk.logprobs > -torch.inf, topk.ids, NOTHING)


def listed_in(ids: Tensor, topk: TopK) -> Tensor:
    """bool [..., C], which of ``ids`` [..., C] a list [..., K] names; ``NOTHING`` is in none."""
    others = named(topk)
    found = torch.zeros_like(ids, dtype=torch.bool)
    for place in range(others.shape[-1]):  # a loop over K': the table of all pairs is K' times as large
        found |= ids == others[..., place : place + 1]
    return found & (ids != NOTHING)


def overlap(student: TopK, teacher: TopK, k: int) -> Tensor:
    """Share of the k likeliest tokens that both have: [..., K] lists -> [...] in [0, 1], float64.

    Source: the diagnostic of arXiv 2604.13016, as verl computes it.
    """
    common = listed_in(named(leading(student, k)), leading(teacher, k))
    return common.sum(-1).double() / common.shape[-1]  # a mean on CUDA multiplies by 1 / K, which rounds otherwise


def teacher_mass(student: TopK, teacher: TopK, k: int) -> Tensor:
    """The teacher's probability on the student's k likeliest tokens, as far as its list of LIST_LENGTH says: [...] in [0, 1].

    A lower bound: what lies outside that list is left out, at most 1 minus the mass of the list.
    """
    common = listed_in(named(teacher), leading(student, k))
    return torch.where(common, teacher.logprobs.double().exp(), 0.0).sum(-1).clamp(0.0, 1.0)


def overlap_advantage(student: TopK, teacher: TopK, k: int) -> Tensor:
    """Mean of log pi_T - log pi_S under the student over the tokens that both have among their k likeliest: [...] nats.

    NaN where they have none in common.
    """
    mine, theirs = leading(student, k), leading(teacher, k)
    common = listed_in(named(mine), theirs)
    missing = torch.zeros(mine.ids.shape, dtype=torch.float64, device=mine.ids.device)
    ratio = looked_up(mine.ids, theirs, missing) - mine.logprobs.double()
    mass = torch.where(common, mine.logprobs.double().exp(), 0.0)
    return (mass * torch.where(common, ratio, 0.0)).sum(-1) / mass.sum(-1)


def looked_up(ids: Tensor, topk: TopK, missing: Tensor) -> Tensor:
    """Log-probs of ``ids`` [..., C] where a list has them, ``missing`` [..., C] where it has not: [..., C] nats, float64."""
    found, listed = missing, named(topk)
    for place in range(listed.shape[-1]):
        same = ids == listed[..., place : place + 1]
        found = torch.where(same, topk.logprobs[..., place : place + 1].double(), found)
    return found


@dataclass(frozen=True, eq=False)
class Candidates:
    """The tokens that either list names, each once.

    Args:
        ids: int64 [..., C]; an entry that repeats an earlier one is not ``counted``.
        counted: bool [..., C].
        student: [..., C] nats, float64; -inf where not counted.
        teacher: the same of the teacher.
    """

    ids: Tensor
    counted: Tensor
    student: Tensor
    teacher: Tensor

    def renormalised(self) -> tuple[Tensor, Tensor]:
        """Log-probs of student and teacher over the candidates alone, [..., C] nats each; -inf where not counted."""
        return self.student.log_softmax(-1), self.teacher.log_softmax(-1)


def candidates(
    student: TopK, teacher: TopK, k: int, *, missing: float, sampled: tuple[Tensor, Tensor, Tensor] | None = None
) -> Candidates:
    """The union of both lists' k likeliest tokens, and of the sampled one where it is given.

    Log-probs come from the whole lists; where a model's list does not name a token, it counts as ``missing`` nats.

    Args:
        student: the student's list, [..., K].
        teacher: the teacher's.
        k: leading entries of either that are candidates.
        missing: nats of a token that a list does not name.
        sampled: int64 [...], a token that is a candidate too, and its log-probs [...] under student and teacher.
    """
    ours, theirs = leading(student, k), leading(teacher, k)
    new = (named(theirs) != NOTHING) & ~listed_in(named(theirs), ours)
    ids, counted = [ours.ids, theirs.ids], [named(ours) != NOTHING, new]
    values = [
        [ours.logprobs.double(), _known(theirs.ids, student, missing, sampled, 1)],
        [_known(ours.ids, teacher, missing, sampled, 2), theirs.logprobs.double()],
    ]
    if sampled is not None:
        own = sampled[0].unsqueeze(-1)
        ids.append(own)
        counted.append(~(listed_in(own, ours) | listed_in(own, theirs)))
        for row, topk, place in zip(values, (student, teacher), (1, 2), strict=True):
            row.append(looked_up(own, topk, sampled[place].double().unsqueeze(-1)))
    found = torch.cat(counted, -1)
    p, q = (torch.cat(row, -1).masked_fill(~found, -torch.inf) for row in values)
    return Candidates(torch.cat(ids, -1), found, p, q)


def _known(
    ids: Tensor, topk: TopK, missing: float, sampled: tuple[Tensor, Tensor, Tensor] | None, place: int
) -> Tensor:
    """Log-probs of ``ids`` [..., C] from a list, else of the sampled token where it is that, else ``missing``: [..., C] nats."""
    behind = torch.full(ids.shape, missing, dtype=torch.float64, device=ids.device)
    if sampled is not None:
        behind = torch.where(ids == sampled[0].unsqueeze(-1), sampled[place].double().unsqueeze(-1), behind)
    return looked_up(ids, topk, behind)
