"""Several teachers as one distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from lit_opd.errors import InputError, require
from lit_opd.scoring import tiles
from lit_opd.scoring.mixed import MixedHead, Mixing, log_sums
from lit_opd.scoring.places import Places
from lit_opd.scoring.tiles import Head
from lit_opd.teacher.base import Teacher
from lit_opd.teacher.several import SeveralTeachers
from lit_opd.types import LIST_LENGTH, Rollout, TokenScores, TopK

SUM_ROUNDING = 1e-6  # that weights may miss 1 by
_OF_HEADS = frozenset({"teacher_entropy", "teacher_topk", "token_kl", "teacher_distribution"})


class MixedTeacher(SeveralTeachers):
    """All teachers score every row, as one distribution.

        mixture : log q(y) = log sum_i w_i q_i(y)             of any teachers; covers what one of them would write
        product : log q(y) = sum_i w_i log q_i(y) - log Z     a normalised geometric mean: what none of them rules out

    A mixture of teachers on servers gives log-probs of sampled tokens. Entropies, top-k lists, divergences, and a product at
    all, need every teacher's whole vocabulary, so models in this process; they cost one more forward pass of each teacher an
    update. A stop token of a mixture may have the mass of all (``stop_mass``), one of a product may not.

    Args:
        teachers: at least two.
        weights: w_i > 0, one a teacher, which sum to 1; None for equal ones.
        how: "mixture" or "product".
    Raises:
        InputError: a value outside its range, or a product of teachers that cannot give one.
    """

    def __init__(self, teachers: list[Teacher], weights: list[float] | None = None, how: Mixing = "mixture") -> None:
        super().__init__()
        require(len(teachers) > 1, "MixedTeacher.teachers", "at least two teachers", len(teachers))
        require(how in get_args(Mixing), "MixedTeacher.how", "mixture or product", how)
        given = [1.0 / len(teachers)] * len(teachers) if weights is None else list(weights)
        numbers = all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in given)
        counted = numbers and len(given) == len(teachers) and all(0.0 < weight <= 1.0 for weight in given)
        require(counted, "MixedTeacher.weights", f"{len(teachers)} numbers in (0, 1], one a teacher", weights)
        whole = abs(sum(given) - 1.0) <= SUM_ROUNDING
        require(whole, "MixedTeacher.weights", "numbers that sum to 1", weights, f"they sum to {sum(given):.6g}")
        self.how, self.weights = how, tuple(map(float, given))
        self.teachers = nn.ModuleList(teachers)
        if how == "product":
            self._require_heads()

    def _require_heads(self) -> None:
        for name, teacher in self.named().items():
            if "teacher_distribution" not in teacher.provides:
                raise InputError(
                    f"`MixedTeacher.how` must be mixture with `{type(teacher).__name__}` (teacher {name}), got product: its "
                    "normaliser is a sum over the whole vocabulary of every teacher; take models in this process"
                )
            if teacher.sums_stops:
                raise InputError(
                    f"`MixedTeacher.how` must be mixture where a teacher has `stop_mass` sum (teacher {name}), got product"
                )

    def named(self) -> dict[str, Teacher]:
        """Teacher by number; errors call each by its own setting."""
        found: dict[str, Teacher] = {}
        for number, teacher in enumerate(self.teachers):
            assert isinstance(teacher, Teacher)
            teacher.field = f"{self.field}.teachers.{number}"
            found[str(number)] = teacher
        return found

    @property
    def provides(self) -> frozenset[str]:
        """Everything where all teachers give their whole vocabulary, else nothing beyond log-probs."""
        heads = all("teacher_distribution" in teacher.provides for teacher in self.named().values())
        return _OF_HEADS if heads else frozenset()

    def check_data(self, rows_by_teacher: dict[str | None, str]) -> None:
        """Ask every teacher."""
        for teacher in self.named().values():
            teacher.check_data(rows_by_teacher)

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs, and entropies and top-k lists where required, [B, T] nats; see ``Teacher.score``."""
        reads = requires & {"teacher_entropy", "teacher_topk"}
        parts = [] if self.how == "product" else self._logprobs(rollout, temperature)
        if parts:
            logs = [part + math.log(w) for part, w in zip(parts, self.weights, strict=True)]
            logprobs = torch.where(rollout.mask, torch.stack(logs).logsumexp(0), 0.0)
            if not reads:
                return TokenScores(logprobs)
        with self.whole_head():
            head, places = self.full_head(rollout), Places.of(rollout, own_template=True)
            if not parts:
                logprobs = places.scatter(_token_logprobs(head, rollout, places, temperature))
            return _with_statistics(TokenScores(logprobs), head, places, temperature=temperature, reads=reads)

    def _logprobs(self, rollout: Rollout, temperature: float) -> list[Tensor]:
        """[B, T] nats of each teacher, in the widest of their dtypes."""
        found = [teacher.score(rollout, temperature=temperature).logprobs for teacher in self.named().values()]
        wide = max((part.dtype for part in found), key=lambda dtype: dtype.itemsize)
        return [part.to(wide) for part in found]

    @torch.no_grad()
    def full_head(self, rollout: Rollout, *, states: Tensor | None = None) -> MixedHead:
        """All of their heads as one, over the N valid tokens, [N, H] of each."""
        found = [teacher.full_head(rollout) for teacher in self.named().values()]
        parts = tuple(head for head in found if isinstance(head, Head))
        assert len(parts) == len(found)  # a teacher with another tokenizer is refused before the run
        return MixedHead.of(parts, self.weights, self.how)

    @contextmanager
    def whole_head(self) -> Iterator[None]:
        """Those of all of them."""
        with ExitStack() as stack:
            for teacher in self.named().values():
                stack.enter_context(teacher.whole_head())
            yield


def _token_logprobs(head: Head, rollout: Rollout, places: Places, temperature: float) -> Tensor:
    """Of the sampled tokens, [N] nats."""
    targets = rollout.response_ids.flatten().index_select(0, places.tokens)
    picked = torch.zeros(len(targets), dtype=head.dtype, device=targets.device)
    for rows, columns in tiles.tiles(head):
        index = targets[rows].unsqueeze(-1) - columns.start
        inside = (index >= 0) & (index < columns.stop - columns.start)
        logits = head.logits(rows, temperature, columns)
        picked[rows] += torch.where(inside, logits.gather(-1, index * inside), 0.0).squeeze(-1)
    return (picked - log_sums(head, temperature)).to(head.dtype)


def _with_statistics(
    scores: TokenScores, head: Head, places: Places, *, temperature: float, reads: frozenset[str]
) -> TokenScores:
    """``scores`` with the entropies and lists that are read."""
    entropy = topk = None
    if "teacher_entropy" in reads:
        entropy = places.scatter(tiles.token_entropy(head, temperature=temperature))
    if "teacher_topk" in reads:
        topk = TopK(*map(places.scatter, tiles.token_topk(head, k=LIST_LENGTH, temperature=temperature)))
    return TokenScores(scores.logprobs, entropy=entropy, topk=topk)
