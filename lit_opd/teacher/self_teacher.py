"""The student as its own teacher: its weights as they are, as they were at the start, or averaged over its steps.

There is no second model. What differs from the student are the values of the weights that are trained: they are kept beside it
and put in the student's place while the teacher scores. So a student with adapters costs a copy of the adapters, and a rank that
holds shards keeps a copy of its shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_opd.errors import InputError, put_back_first
from lit_opd.models.flat_shards import cut, in_slices, put_together, whole_shapes
from lit_opd.models.sharding import Placement, forget_gathered, gathered, is_sharded
from lit_opd.models.weights import FSDP1_WRAPPER
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.tiles import Head
from lit_opd.teacher.base import SCORE_WANTS, Teacher
from lit_opd.types import Rollout, TokenScores

SelfUpdate = Literal["frozen", "ema", "live"]
_LEAST = torch.float32  # of an average: in bfloat16 a hundredth of a small change is lost


class SelfTeacher(Teacher):
    """The student's own weights as teacher, for self-distillation: it reads more than the student (``data.teacher_prompt``).

    Works on one device, under DDP, FSDP2 and FSDP1.

    Args:
        update: "frozen": the weights the run began with, below adapters the base; "live": those of the student at each step,
            kept nowhere else; "ema": average <- decay * average + (1 - decay) * student, in at least float32, from the weights
            the run began with. A checkpoint holds the average, of a student with adapters that of the adapters.
        decay: of "ema", in [0, 1]: 0 is the student as it was after the last update, 1 is "frozen".
        every: optimizer steps between two updates of "ema". A step that was skipped counts.
    Raises:
        InputError: a value outside its range.
    """

    shares_student = True

    def __init__(self, update: SelfUpdate = "ema", decay: float = 0.99, every: int = 1) -> None:
        super().__init__()
        if update not in ("frozen", "ema", "live"):
            raise InputError(f"`SelfTeacher.update` must be frozen, ema or live, got {update!r}")
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
            raise InputError(f"`SelfTeacher.decay` must be in [0, 1], got {decay!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"`SelfTeacher.every` must be at least 1, got {every!r}")
        self.update, self.decay, self.every = update, float(decay), every
        self._student: tuple[Any, ...] = ()  # a tuple hides it: the student's weights are not the teacher's
        self.values: dict[
            str, Tensor
        ] = {}  # of this rank, by the student's names; no buffers, which Lightning would cast
        self._begins = False  # the values are to be taken from the student as it is when training starts

    @property
    def provides(self) -> frozenset[str]:
        """Everything that needs the full distribution."""
        return frozenset({"teacher_entropy", "teacher_topk", "token_kl", "teacher_distribution"})

    @property
    def policy(self) -> Any:
        """The student, None before it is loaded."""
        return self._student[0] if self._student else None

    def tokenizers(self) -> list[Any]:
        """None but the student's."""
        return []

    def attach(self, student: ScoringModel) -> None:
        """Score with ``student``; keep the values it has now, unless they are to follow it."""
        self._student = (student,)
        self._take()

    def _take(self) -> None:
        if self.update != "live":
            self.values = {name: _copied(value) for name, value in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights that differ between student and teacher, as this rank holds them."""
        student = self._loaded()
        forget_gathered(student)  # named would be the whole ones
        named = ((name.replace(FSDP1_WRAPPER, ""), value) for name, value in student.named_parameters())
        return ((name, value) for name, value in named if value.requires_grad)

    def load(self, *, vocabulary: int) -> None:
        """Nothing to load."""

    def shard(self, place: Placement) -> None:
        """The student is sharded already, and so are the values kept of it."""

    # -- over a run --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def student_stepped(self, step: int) -> None:
        """Move the average after optimizer step ``step`` (1-based)."""
        if self.update == "ema" and step % self.every == 0:
            self._move()
            for name, value in self._trained():
                own = self.values[name]
                own.lerp_(_local(value).to(own.dtype), 1 - self.decay)

    def begin(self) -> None:
        """Training starts: where a checkpoint had no average, it starts from the student it holds."""
        if self._begins:
            self._take()
        self._begins = False

    def state(self) -> dict[str, Tensor] | None:
        """The average for a checkpoint, by name on the CPU, each [...] of its weight's whole shape; None where there is none. A
        collective."""
        if self.update != "ema":
            return None
        trained, student = dict(self._trained()), self._loaded()
        if in_slices(student):
            return put_together(student, {name: self.values[name] for name in trained})
        return {name: _whole(self.values[name], value).cpu().clone() for name, value in trained.items()}

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Go on from what ``state`` gave, by name and [...] of whole shapes; from the checkpoint's student where it gave nothing.

        Raises:
            InputError: it is of other weights.
        """
        if self.update != "ema":
            return
        self._begins = state is None
        if state is None:
            return
        trained, student = dict(self._trained()), self._loaded()
        shapes = whole_shapes(student) if in_slices(student) else {name: value.shape for name, value in trained.items()}
        wrong = sorted(state.keys() ^ trained.keys())
        wrong += [name for name in trained if name in state and state[name].shape != shapes[name]]
        if wrong:
            raise InputError(
                f"`--ckpt_path` must be a checkpoint of this student, but {len(wrong)} weights of `{self.field}`'s average are "
                f"missing, extra or of another shape: {', '.join(wrong[:5])}; give the config the run was started with"
            )
        if in_slices(student):
            self.values = cut(student, state, {name: value.detach() for name, value in trained.items()})
        else:
            self.values = {name: _part(state[name], value) for name, value in trained.items()}

    # -- scoring -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs (entropy and top-k where required), [B, T] nats."""
        wants = frozenset(want for name, want in SCORE_WANTS.items() if name in requires)
        with self._as_teacher() as student:
            scores: TokenScores = student(rollout, temperature=temperature, wants=wants, own_template=True)
        return scores

    @torch.no_grad()
    def full_head(self, rollout: Rollout, *, states: Tensor | None = None) -> Head:
        """Hidden states [N, H] and head of the valid tokens; a copy of the head where the student's will be another."""
        sharded = is_sharded(self._loaded())
        with self._as_teacher() as student, gathered(student, blocks=False) if sharded else nullcontext():
            head = student.head(rollout, own_template=True)
            fixed = [_fixed(value, copied=sharded or bool(self.values)) for value in (head.weight, head.bias)]
            return replace(head, weight=fixed[0], bias=fixed[1])

    @contextmanager
    def _as_teacher(self) -> Iterator[Any]:
        """The student with the teacher's values and in evaluation mode; afterwards it is as it was."""
        student = self._loaded()
        training = [part for part in student.modules() if part.training]
        for part in training:
            part.training = False
        try:
            with self._exchanged() if self.values else nullcontext():
                yield student
        finally:
            for part in training:
                part.training = True

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        """The kept values in the student's weights, and its own kept meanwhile: in place, so that shards and the optimizer's
        view of them stay what they are. A signal that stops the run waits until its own are back, else a checkpoint would hold
        the teacher's."""
        self._move()
        pairs = [(_local(value), self.values[name]) for name, value in self._trained()]
        own: list[Tensor] = []
        with put_back_first():
            try:
                for weight, value in pairs:
                    own.append(weight.clone())
                    weight.copy_(value)
                forget_gathered(self._loaded())
                yield
            finally:
                for (weight, _), value in zip(pairs, own, strict=False):
                    weight.copy_(value)
                forget_gathered(self._loaded())

    def _move(self) -> None:
        """The values on the device of the weights, which moved after they were loaded."""
        for name, value in self._trained():
            self.values[name] = self.values[name].to(_local(value).device)

    def _loaded(self) -> Any:
        if not self._student:
            raise RuntimeError("SelfTeacher.attach has not been called")
        return self._student[0]


def self_teachers(scorers: Mapping[str, Teacher]) -> dict[str, SelfTeacher]:
    """Every ``SelfTeacher`` among scorers and the teachers inside them, by role and place."""
    return {
        f"{role}.{name}".rstrip("."): part
        for role, scorer in scorers.items()
        for name, part in scorer.named_modules()
        if isinstance(part, SelfTeacher)
    }


def _local(value: Tensor) -> Tensor:
    """What this rank holds of a weight, sharing its memory."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def _copied(value: Tensor) -> Tensor:
    found = _local(value)
    return found.to(torch.promote_types(found.dtype, _LEAST), copy=True)


def _whole(own: Tensor, like: Tensor) -> Tensor:
    """All of a kept value, whose part of this rank is ``own``."""
    if not isinstance(like, DTensor):
        return own
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(own, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole value."""
    if not isinstance(like, DTensor):
        return whole.clone()
    spread = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return spread.to_local().clone()


def _fixed(value: Tensor | None, *, copied: bool) -> Tensor | None:
    """Without gradient, and a copy where the memory will hold something else."""
    if value is None:
        return None
    return value.detach().clone() if copied else value.detach()
