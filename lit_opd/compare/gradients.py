"""The gradient that a training step would make of saved responses, under any strategy or objective."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Aggregation, Divergence, PolicyLoss
from lit_opd.rollout import TransformersSampler
from lit_opd.step.update import Update
from lit_opd.teacher import LocalTeacher
from lit_opd.types import StepRecord
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.uniform import Uniform

Dtype = Literal["float32", "float64", "bfloat16"]
Gradient = list[Tensor]


class ReplayModule(OPDModule):
    """The module at a saved batch: the training step's own code up to the gradient, which is kept and not applied.

    Args:
        student: folder of the student that sampled the responses.
        teacher: folder of the teacher.
        dtype: of both models' weights.
        aggregation: of token losses.
    """

    def __init__(
        self, student: str, teacher: str, *, dtype: Dtype = "float32", aggregation: Aggregation = "sequence-mean"
    ) -> None:
        scorer = LocalTeacher(teacher, dtype=dtype)
        super().__init__(
            StudentSettings(student, dtype=dtype), scorer, aggregation=aggregation, gradient_clip_norm=None
        )
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        # the update asks a trainer's strategy whether the model is wrapped
        self.trainer = Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet)
        self._at: StepRecord | None = None
        self._gradient: Gradient = []
        self.configure_model()

    def replay(self, record: StepRecord, weighting: WeightingStrategy | None = None) -> tuple[StepRecord, Gradient]:
        """One step on the record's responses.

        Args:
            record: whose responses, progress and step.
            weighting: of the sampled-token policy loss; None for the exact full-vocabulary KL(student || teacher) at the same
                prefixes, every token alike.
        Returns:
            the step's record, every log-prob anew; the gradient by trained parameter.
        Raises:
            InputError: the strategy reads what these models cannot give.
        """
        self._at = record
        self._read_vocabulary(record)
        self.weighting = weighting or Uniform()
        self.objective = PolicyLoss() if weighting is not None else Divergence("reverse_kl")
        origin = record.rollout.provenance
        self.sampler = TransformersSampler(record.rollout.mask.shape[1], temperature=origin.temperature or 1.0)
        self.check_scorers()
        update = Update(self, record.rollout, record.rollout)
        update.score_teacher()
        update.score_student()
        update.run()
        return update.record({}), self._gradient

    def _read_vocabulary(self, record: StepRecord) -> None:
        rollout = record.rollout
        largest = int(torch.cat([rollout.response_ids[rollout.mask], rollout.prompts.ids[rollout.prompts.mask]]).max())
        if largest >= self.vocabulary:
            raise InputError(
                f"`--student` must be the model that sampled the rollouts, got one of {self.vocabulary} tokens for id {largest}"
            )

    @property
    def progress(self) -> float:
        """The record's."""
        assert self._at is not None
        return self._at.progress

    @property
    def global_step(self) -> int:
        """Optimizer steps before the record's: what random strategies draw from."""
        assert self._at is not None
        return self._at.signal.step

    def phase(self, name: str, done: int, total: int) -> None:
        """Nobody listens."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward of a scalar: without a fit there is no precision plugin to go through."""
        loss.backward()

    def clip(self) -> Tensor:
        """The norm of the gradient, a scalar; the gradient is left as it is."""
        self._gradient = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self._trained()]
        return torch.tensor(dot(self._gradient, self._gradient)).sqrt()

    def apply_gradients(self) -> None:
        """No step: the gradient has been kept."""
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Without an optimizer."""
        for parameter in self._trained():
            parameter.grad = None

    def _trained(self) -> list[torch.nn.Parameter]:
        assert self.student is not None
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]


def dot(left: Gradient, right: Gradient) -> float:
    """Inner product over all parameters, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def cosine(left: Gradient, right: Gradient) -> float | None:
    """In [-1, 1]; None where one of them is 0."""
    norms = (dot(left, left) * dot(right, right)) ** 0.5
    return dot(left, right) / norms if norms > 0 else None
