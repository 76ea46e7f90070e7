"""Differentiable divergences between the whole distributions of student and teacher."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.masked import exp_
from lit_opd.objective.base import Objective, TokenLoss, Whose
from lit_opd.scoring import heads
from lit_opd.scoring.listed import Listed
from lit_opd.scoring.shared import SharedHead
from lit_opd.scoring.tiles import Head, PairedSums, TokenTerm, WholeTerm, paired_sums, per_token, tiles
from lit_opd.types import TokenSignal

DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd"]


class Divergence(Objective):
    """Minimises a divergence of student and teacher at every sampled prefix, exactly rather than from one token.

        p, q       = student, teacher over the vocabulary at t, at the sampling temperature
        reverse_kl : D_t = KL(p || q)                                       mode-seeking
        forward_kl : D_t = KL(q || p)                                       mass-covering
        jsd        : D_t = beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p
        loss_t     = w_t * D_t

    Nats, exact per token; the gradient goes through p only and treats the prefix as given, as that of uniform on-policy
    distillation does on average. The generalised JSD is that of GKD (reported in arXiv 2306.13649), P the teacher and Q
    the student: it lies in [0, log 2], is symmetric at beta = 1/2, and vanishes at both ends, with
    jsd / beta -> KL(q || p) as beta -> 0 and jsd / (1 - beta) -> KL(p || q) as beta -> 1.

    With ``top_k`` the vocabulary is cut to k tokens and one bucket that holds the rest of the mass: the k likeliest of
    the distribution that the average runs over (p for reverse_kl, q for forward_kl, m for jsd), or of the one that
    ``top_k_of`` names, chosen anew at every token. This is a lower bound that rises with k; k >= V - 1 is the full
    divergence.

    A teacher on a server lists its K likeliest tokens only (``RemoteTeacher.top_k``). Then k must be given, at most K, and
    the k tokens are the teacher's; or the student's, where the servers can be asked about chosen tokens: for reverse_kl, or
    where ``top_k_of`` says so. The student's are chosen once a rollout batch, when the teacher is asked.

    Left out: advantage, its transforms, clips and the sampler's importance weight; the prefixes are those that were
    sampled, also in later updates of the same batch. A teacher with another tokenizer (``AlignedTeacher``) is compared on the
    tokens that both vocabularies have and one bucket for all others. Source: method.md section 4.7.

    Args:
        kind: "reverse_kl", "forward_kl" or "jsd".
        top_k: >= 1, None for the full vocabulary.
        beta: the teacher's share of the mixture, in (0, 1); read by "jsd" only.
        top_k_of: "student" or "teacher": whose k likeliest tokens are kept; None as said above.
    Raises:
        ValueError: a value outside its range, or a ``beta`` or ``top_k_of`` that would have no effect.
    """

    def __init__(
        self, kind: DivergenceKind, top_k: int | None = None, beta: float = 0.5, top_k_of: Whose | None = None
    ) -> None:
        self.kind, self.top_k, self.beta, self.top_k_of = kind, top_k, beta, top_k_of
        name = type(self).__name__
        require(kind in get_args(DivergenceKind), f"{name}.kind", f"one of {', '.join(get_args(DivergenceKind))}", kind)
        is_count = isinstance(top_k, int) and not isinstance(top_k, bool) and top_k >= 1
        require(top_k is None or is_count, f"{name}.top_k", "an integer >= 1 or null", top_k)
        require(0.0 < beta < 1.0, f"{name}.beta", "in (0, 1)", beta)
        require(kind == "jsd" or beta == 0.5, f"{name}.beta", "left out unless kind is jsd", beta)
        require(top_k_of in (None, *get_args(Whose)), f"{name}.top_k_of", "student, teacher or null", top_k_of)
        require(top_k is not None or top_k_of is None, f"{name}.top_k_of", "null unless top_k is set", top_k_of)

    @property
    def requires(self) -> frozenset[str]:
        """The teacher's distribution over the whole vocabulary."""
        return frozenset({"teacher_distribution"})

    @property
    def reads_advantage(self) -> bool:
        """The divergence takes its place."""
        return False

    @property
    def list_size(self) -> int | None:
        """``top_k``."""
        return self.top_k

    def whose_list(self, *, asked: bool) -> Whose:
        """``top_k_of``; where it is None the student's for reverse_kl, if the teacher can be asked."""
        if self.top_k_of is not None:
            return self.top_k_of
        return "student" if self.kind == "reverse_kl" and asked else "teacher"

    def token_divergence(self, student: Head, teacher: Head | SharedHead | Listed, *, temperature: float) -> Tensor:
        """D_t, [N] nats, differentiable in the student's head and hidden states."""
        if isinstance(teacher, SharedHead):
            return per_token(student, _SharedTerm(self, teacher, temperature), temperature=temperature)
        if isinstance(teacher, Listed):
            return per_token(student, _ListTerm(self, teacher), temperature=temperature)
        cut = self.top_k is not None and self.top_k < student.num_tokens
        fused = None if cut else heads.kernels(student, teacher)
        if fused is not None:
            return fused.token_divergence(  # type: ignore[no-any-return]
                student, teacher, kind=self.kind, beta=self.beta, temperature=temperature
            )
        term = _TopKTerm(self, teacher, temperature) if cut else _FULL[self.kind](self, teacher, temperature)
        return per_token(student, term, temperature=temperature)

    def token_loss(
        self, student_logprobs: Tensor, signal: TokenSignal, weights: Tensor, *, divergence: Tensor | None = None
    ) -> TokenLoss:
        """w_t * D_t, [B, T] nats; nothing is ever clipped."""
        assert divergence is not None  # what requires "teacher_distribution" is given it
        return TokenLoss(values=weights * divergence, clipped=torch.zeros_like(signal.mask))


class _FullTerm(TokenTerm):
    """A divergence over the whole vocabulary: its slope in the student's logits x is g - p * sum(g), g = p dD/dp.

    Between the passes it keeps three numbers a token: both log-sum-exps and ``centre``, what the slope is centred with.
    """

    def __init__(self, spec: Divergence, teacher: Head, temperature: float) -> None:
        self.spec, self.teacher, self.temperature = spec, teacher, temperature

    def values(self, head: Head, temperature: float) -> Tensor:
        """[N] nats."""
        sums = paired_sums(head, self.teacher, temperature)
        self.student_log, self.teacher_log = (_column(part, head) for part in (sums.student, sums.teacher))
        values, centre = self.divergence(sums, head)
        self.centre = _column(centre, head)
        return values.to(head.dtype)

    @abstractmethod
    def divergence(self, sums: PairedSums, head: Head) -> tuple[Tensor, Tensor]:
        """D [N] nats, and ``centre`` [N]."""

    def teacher_logits(self, rows: slice, columns: slice) -> Tensor:
        """The teacher's temperature-scaled logits of a tile, [n, v] of [N, V]."""
        return self.teacher.logits(rows, self.temperature, columns)


class _ReverseTerm(_FullTerm):
    """KL(p || q): slope p (log p - log q - D)."""

    def divergence(self, sums: PairedSums, head: Head) -> tuple[Tensor, Tensor]:
        """Both [N]: D is the centre too."""
        return sums.reverse_kl, sums.reverse_kl

    def slope(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """dD/dlogits of a tile, [n, v] of [N, V]."""
        student = logits.sub_(self.student_log[rows])
        centred = self.teacher_logits(rows, columns).sub_(self.teacher_log[rows] - self.centre[rows])
        gap = torch.sub(student, centred, out=centred)
        return exp_(student).mul_(gap)


class _ForwardTerm(_FullTerm):
    """KL(q || p): slope p - q."""

    def divergence(self, sums: PairedSums, head: Head) -> tuple[Tensor, Tensor]:
        """Both [N]; nothing to centre: the slopes sum to 0."""
        return sums.forward_kl, torch.zeros_like(sums.student)

    def slope(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """dD/dlogits of a tile, [n, v] of [N, V]."""
        teacher = exp_(self.teacher_logits(rows, columns).sub_(self.teacher_log[rows]))
        return exp_(logits.sub_(self.student_log[rows])).sub_(teacher)


class _JsdTerm(_FullTerm):
    """beta KL(q || m) + (1 - beta) KL(p || m): slope (1 - beta) p (log p - log m - KL(p || m))."""

    def divergence(self, sums: PairedSums, head: Head) -> tuple[Tensor, Tensor]:
        """Both [N]; a second pass, because the mixture needs both log-sum-exps; the centre is KL(p || m)."""
        of_student, of_teacher = torch.zeros_like(sums.student), torch.zeros_like(sums.student)
        for rows, columns in tiles(head):
            student = head.logits(rows, self.temperature, columns).sub_(self.student_log[rows])
            teacher = self.teacher_logits(rows, columns).sub_(self.teacher_log[rows])
            mixture = _mixture(student, teacher, self.spec.beta)
            of_student[rows] += _kl(student, mixture)
            of_teacher[rows] += _kl(teacher, mixture)
        return self.spec.beta * of_teacher + (1.0 - self.spec.beta) * of_student, of_student

    def slope(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        """dD/dlogits of a tile, [n, v] of [N, V]."""
        student = logits.sub_(self.student_log[rows])
        teacher = self.teacher_logits(rows, columns).sub_(self.teacher_log[rows])
        gap = student - _mixture(student, teacher, self.spec.beta).add_(self.centre[rows])
        return exp_(student).mul_(gap).mul_(1.0 - self.spec.beta)


_FULL: dict[DivergenceKind, type[_FullTerm]] = {
    "reverse_kl": _ReverseTerm,
    "forward_kl": _ForwardTerm,
    "jsd": _JsdTerm,
}


class _TopKTerm(WholeTerm):
    """``Divergence`` with ``top_k`` of a block of tokens."""

    def __init__(self, spec: Divergence, teacher: Head, temperature: float) -> None:
        self.spec, self.teacher, self.temperature = spec, teacher, temperature

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        """D of the tokens ``rows``, [n] nats, from their ``logits``, [n, V] of [N, V]."""
        assert self.spec.top_k is not None
        with torch.no_grad():
            teacher = self.teacher.logits(rows, self.temperature).log_softmax(-1)
        student = logits.log_softmax(-1)
        chosen = _averaged_over(self.spec, student.detach(), teacher).topk(self.spec.top_k).indices
        return _between(self.spec, _bucketed(student, chosen), _bucketed(teacher, chosen))


class _SharedTerm(WholeTerm):
    """``Divergence`` from a teacher with another vocabulary, of a block of tokens."""

    def __init__(self, spec: Divergence, teacher: SharedHead, temperature: float) -> None:
        self.spec, self.teacher, self.temperature = spec, teacher, temperature

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        """D of the tokens ``rows``, [n] nats, from their ``logits``, [n, V] of [N, V]."""
        student = self.teacher.student(logits.log_softmax(-1))
        teacher = self.teacher.teacher(rows, self.temperature).to(student.dtype)
        pairs, k = len(self.teacher.student_ids), self.spec.top_k
        if k is not None and k < pairs:
            likely = _averaged_over(self.spec, student.detach()[:, :pairs], teacher[:, :pairs])
            chosen = likely.topk(k).indices
            student, teacher = _bucketed(student, chosen), _bucketed(teacher, chosen)
        return _between(self.spec, student, teacher)


def _averaged_over(spec: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Log-probs [n, V] of the distribution whose likeliest tokens are kept."""
    if spec.top_k_of is not None:
        return student if spec.top_k_of == "student" else teacher
    if spec.kind == "jsd":
        return _mixture(student, teacher, spec.beta)
    return student if spec.kind == "reverse_kl" else teacher


class _ListTerm(WholeTerm):
    """``Divergence`` from a teacher of which only lists are known, of a block of tokens."""

    def __init__(self, spec: Divergence, teacher: Listed) -> None:
        self.spec, self.teacher = spec, teacher

    def value(self, logits: Tensor, rows: slice) -> Tensor:
        """D of the tokens ``rows``, [n] nats, from their ``logits``, [n, V] of [N, V]."""
        student = self.teacher.buckets_of(logits.log_softmax(-1), rows)
        return _between(self.spec, student, self.teacher.buckets(rows).to(student.dtype))


def _between(spec: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """D [n] nats of two distributions over the same few entries, log-probs [n, K + 1]; an entry that is 0 in both adds 0."""
    if spec.kind == "reverse_kl":
        return _kl(student, teacher)
    if spec.kind == "forward_kl":
        return _kl(teacher, student)
    mixture = _mixture(student, teacher, spec.beta)
    return spec.beta * _kl(teacher, mixture) + (1.0 - spec.beta) * _kl(student, mixture)


def _column(values: Tensor, head: Head) -> Tensor:
    """[N] -> [N, 1] in the dtype of the logits."""
    return values.to(head.dtype).unsqueeze(-1)


def _mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p), [n, v]."""
    return torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))


def _bucketed(logprobs: Tensor, chosen: Tensor) -> Tensor:
    """Log-probs of the chosen tokens and, last, of all others together: [n, V], int64 [n, K] -> [n, K + 1].

    The rest is summed up, not taken as 1 - the chosen, which would lose small tails to rounding.
    """
    rest = logprobs.scatter(-1, chosen, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, chosen), rest], -1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) from log-probs: [n, V] -> [n] nats.

    Each summand f log(f/s) - f + s is >= 0, and 0 with zero gradient where both agree; the last two cancel in the sum.
    """
    f, s = first.exp(), second.exp()
    return (f * (first - second) - f + s).sum(-1)
