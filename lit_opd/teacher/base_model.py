"""The student's own base model as teacher or reference: no second copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_opd.errors import InputError, put_back_first
from lit_opd.models.sharding import Placement
from lit_opd.models.student import StudentSettings
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.tiles import Head
from lit_opd.teacher.base import SCORE_WANTS, Teacher
from lit_opd.types import Rollout, TokenScores


class BaseModelTeacher(Teacher):
    """The model below a LoRA student's adapters, scored with the adapters switched off.

    As ``model.reference`` it is the initial student, and reads the student's prompt. As ``model.teacher`` it makes sense where
    it reads another prompt than the student (``data.teacher_system_prompt``, ``data.teacher_template_options``): with the same
    one both are equal and stay so.

    Raises:
        InputError: the student has no adapters, or its weights are sharded.
    """

    shares_student = True

    def __init__(self) -> None:
        super().__init__()
        self._student: tuple[ScoringModel, ...] = ()  # a tuple hides it: the student's weights are not the teacher's

    @property
    def provides(self) -> frozenset[str]:
        """Everything that needs the full distribution."""
        return frozenset({"teacher_entropy", "teacher_topk", "token_kl", "teacher_distribution"})

    @property
    def policy(self) -> ScoringModel | None:
        """The student, None before it is attached."""
        return self._student[0] if self._student else None

    def tokenizers(self) -> list[Any]:
        """None but the student's."""
        return []

    def check_student(self, settings: StudentSettings) -> None:
        """The student has adapters to switch off."""
        if settings.lora is None:
            raise InputError(
                f"`model.student.lora` must be set when `{self.field}` is BaseModelTeacher, got null; train adapters, or give "
                "LocalTeacher the path of the student"
            )

    def attach(self, student: ScoringModel) -> None:
        """Read the weights of ``student``."""
        self._student = (student,)

    def load(self, *, vocabulary: int) -> None:
        """Nothing to load."""

    def shard(self, place: Placement) -> None:
        """Refused: switching adapters off under FSDP has not been tried."""
        raise InputError(
            f"`{self.field}` must hold its own weights when they are sharded, got BaseModelTeacher; use LocalTeacher, or ddp"
        )

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs (entropy and top-k where required), [B, T] nats."""
        wants = frozenset(want for name, want in SCORE_WANTS.items() if name in requires)
        with self._base() as student:
            scores: TokenScores = student(rollout, temperature=temperature, wants=wants, own_template=True)
        return scores

    @torch.no_grad()
    def full_head(self, rollout: Rollout, *, states: Tensor | None = None) -> Head:
        """Hidden states [N, H] and head of the valid tokens; the head itself has no adapters."""
        with self._base() as student:
            return student.head(rollout, own_template=True)

    @contextmanager
    def _base(self) -> Iterator[ScoringModel]:
        if not self._student:
            raise RuntimeError("BaseModelTeacher.attach has not been called")
        (student,) = self._student
        model: Any = student.model
        # while they are off, the adapters are not among the weights that train
        with put_back_first(), model.disable_adapter():
            yield student
