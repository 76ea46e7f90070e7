"""Several teachers, one of them for each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from lit_opd.errors import InputError
from lit_opd.models.sharding import holds_shards
from lit_opd.teacher.base import Teacher
from lit_opd.teacher.several import SeveralTeachers
from lit_opd.types import Rollout, TokenScores, TopK

_NEEDS_ONE_HEAD = frozenset({"token_kl", "teacher_distribution"})


class RoutedTeacher(SeveralTeachers):
    """Each row is scored by the teacher its prompt names (``PromptBatch.teachers``, a column of the data).

    It provides what all of its teachers do, less the divergences over the full vocabulary: those need one output head.

    Args:
        teachers: teacher by name.
    Raises:
        InputError: no teacher.
    """

    def __init__(self, teachers: dict[str, Teacher]) -> None:
        super().__init__()
        if not teachers:
            raise InputError("`RoutedTeacher.teachers` must name at least one teacher, got none")
        self.names = list(teachers)
        self.teachers = nn.ModuleList(teachers.values())  # a ModuleDict refuses names with dots

    def named(self) -> dict[str, Teacher]:
        """Teacher by name; errors call each by its own setting."""
        found: dict[str, Teacher] = {}
        for name, teacher in zip(self.names, self.teachers, strict=True):
            assert isinstance(teacher, Teacher)
            teacher.field = f"{self.field}.teachers.{name}"
            found[name] = teacher
        return found

    @property
    def provides(self) -> frozenset[str]:
        """What all of them can give, less what needs one head."""
        return frozenset.intersection(*(teacher.provides for teacher in self.named().values())) - _NEEDS_ONE_HEAD

    @property
    def list_size(self) -> int:
        """Of the shortest list: longer ones are cut to it."""
        return min(teacher.list_size for teacher in self.named().values())

    def ask_candidates(self, k: int) -> str | None:
        """Ask every teacher."""
        refused = [why for teacher in self.named().values() if (why := teacher.ask_candidates(k)) is not None]
        self.takes_candidates = not refused
        return refused[0] if refused else None

    def check_data(self, rows_by_teacher: dict[str | None, str]) -> None:
        """Every row of the data names one of the teachers."""
        for name, where in rows_by_teacher.items():
            if name not in self.names:
                raise self._unknown(name, where)

    def _unknown(self, name: str | None, where: str) -> InputError:
        return InputError(
            f"`{self.field}.teachers` must have the teacher that each row names, {self.names}, got {name!r} in {where}; "
            "correct the data's teacher column (`data.teacher_column`) or add the teacher"
        )

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Scores of every row by its own teacher, in the rollout's order; see ``Teacher.score``.

        Raises:
            InputError: a row names no teacher, or one that is not here.
        """

        def scored(teacher: Teacher, part: Rollout, rows: list[int]) -> TokenScores:
            return teacher.score(part, temperature=temperature, requires=requires)

        return self._by_teacher(rollout, scored)

    @torch.no_grad()
    def score_candidates(
        self,
        rollout: Rollout,
        candidates: Tensor,
        *,
        temperature: float = 1.0,
        requires: frozenset[str] = frozenset(),
    ) -> TokenScores:
        """As ``score``, with log-probs of ``candidates``, int64 [B, T, K]."""

        def scored(teacher: Teacher, part: Rollout, rows: list[int]) -> TokenScores:
            return teacher.score_candidates(part, candidates[rows], temperature=temperature, requires=requires)

        return self._by_teacher(rollout, scored)

    def _by_teacher(self, rollout: Rollout, score: Callable[[Teacher, Rollout, list[int]], TokenScores]) -> TokenScores:
        """Every row as its own teacher scores it."""
        rows = self._rows_by_name(rollout)
        parts: list[tuple[Tensor, TokenScores]] = []
        for name, teacher in self.named().items():
            wanted = rows[name] or ([0] if holds_shards(teacher) else [])  # collectives must match those of other ranks
            if wanted:
                scores = score(teacher, rollout.rows(torch.tensor(wanted)), wanted)
                if rows[name]:
                    parts.append((torch.tensor(wanted), scores))
        return _merged(parts, len(rollout), list_size=self.list_size)

    def _rows_by_name(self, rollout: Rollout) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {name: [] for name in self.names}
        for row, name in enumerate(rollout.prompts.teachers or ()):
            if name is None or name not in rows:
                raise self._unknown(name, f"row {row} of the batch (data row {rollout.prompts.row_ids[row]!r})")
            rows[name].append(row)
        return rows


def _merged(parts: list[tuple[Tensor, TokenScores]], count: int, *, list_size: int) -> TokenScores:
    """One record of ``count`` rows from the records of some of them each; lists of ``list_size`` entries at most, whichever
    teachers these rows have, since those of other rows join them."""

    def spread(values: list[Tensor]) -> Tensor:
        """[B, ...] from the same field of every part: each part's rows in their places, 0 where no part has the row."""
        dtype = torch.promote_types(values[0].dtype, values[-1].dtype)
        out = values[0].new_zeros((count, *values[0].shape[1:]), dtype=dtype)
        for (rows, _), value in zip(parts, values, strict=True):
            out[rows.to(out.device)] = value.to(out)
        return out

    if any(scores.chunks is not None for _, scores in parts):
        raise InputError(
            "`RoutedTeacher.teachers` must not hold an AlignedTeacher, which scores chunks; wrap the RoutedTeacher in it, with "
            "teachers of one tokenizer"
        )
    found: dict[str, Any] = {}
    for field in fields(TokenScores):
        values = [getattr(scores, field.name) for _, scores in parts]
        if any(value is None for value in values):
            continue
        if isinstance(values[0], TopK):
            cut = [lists.first(list_size) if field.name == "topk" else lists for lists in values]
            found[field.name] = TopK(spread([v.ids for v in cut]), spread([v.logprobs for v in cut]))
        else:
            found[field.name] = spread(values)
    return TokenScores(**found)
