"""The gradient that a training step would make of saved responses, under any strategy or objective."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.models.loading import load_config, load_tokenizer
from lit_opd.models.student import StudentSettings, build_student
from lit_opd.models.vocabulary import agree_vocabularies, unused_ids
from lit_opd.objective import Aggregation, Divergence, PolicyLoss
from lit_opd.preflight.module_checks import require_scored
from lit_opd.scoring.model import ScoringModel
from lit_opd.step.micro_batches import MicroBatches
from lit_opd.step.recipe import Recipe
from lit_opd.step.scores import Scores
from lit_opd.step.skips import Skips
from lit_opd.step.token_budget import TokenBudget
from lit_opd.step.update import Update
from lit_opd.teacher import LocalTeacher
from lit_opd.types import StepRecord
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.uniform import Uniform

Dtype = Literal["float32", "float64", "bfloat16"]
Gradient = list[Tensor]


class KeptGradient:
    """An ``Optimisation`` that keeps the gradient and changes no weight.

    Args:
        student: whose trained parameters.
        step: optimizer steps before the replayed one.
    """

    def __init__(self, student: ScoringModel, step: int) -> None:
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.step = step
        self.gradient: Gradient = []

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """One process: nothing to reduce."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward of a scalar."""
        loss.backward()

    def clip(self) -> Tensor:
        """The norm of the gradient, a scalar; the gradient is left as it is."""
        self.gradient = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]
        return torch.tensor(dot(self.gradient, self.gradient)).sqrt()

    def apply(self) -> None:
        """No step: the gradient has been kept."""
        self.clear()

    def clear(self) -> None:
        """No parameter has a gradient."""
        for parameter in self.parameters:
            parameter.grad = None


class ReplayModels:
    """Student and teacher at a saved batch: the training step's own update up to the gradient, which is kept.

    Args:
        student: folder of the student that sampled the responses.
        teacher: folder of the teacher.
        dtype: of both models' weights.
        aggregation: of token losses; "constant" divides by the longest saved response, since a file does not hold the run's
            ``max_new_tokens``.
    """

    def __init__(
        self, student: str, teacher: str, *, dtype: Dtype = "float32", aggregation: Aggregation = "sequence-mean"
    ) -> None:
        self.teacher, self.aggregation = LocalTeacher(teacher, dtype=dtype), aggregation
        tokenizers, rows = [], []
        for field, path in (("--student", student), ("--teacher", teacher)):
            tokenizers.append(load_tokenizer(path, field, pads=False))
            rows.append(load_config(path, field).get_text_config().vocab_size)
        self.vocabulary = agree_vocabularies(*tokenizers, student_rows=rows[0], teacher_rows=rows[1], field="--teacher")
        model, unused = build_student(StudentSettings(student, dtype=dtype)), unused_ids(tokenizers[0])
        self.student = ScoringModel(model, vocabulary=self.vocabulary, unused=unused)
        self.student.choose_path("student")
        self.teacher.attach(self.student)
        self.teacher.load(vocabulary=self.vocabulary)

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
        self._read_vocabulary(record)
        rollout = record.rollout
        recipe = Recipe(
            weighting=weighting or Uniform(),
            objective=PolicyLoss() if weighting is not None else Divergence("reverse_kl"),
            max_new_tokens=rollout.mask.shape[1],
            aggregation=self.aggregation,
        )
        require_scored(recipe, self.teacher, None)
        temperature, step = rollout.provenance.temperature or 1.0, record.signal.step
        kept = KeptGradient(self.student, step)
        update = Update(
            recipe,
            Scores(self.student, {"teacher": self.teacher}, recipe, rollout, temperature=temperature, step=step),
            MicroBatches(rollout, TokenBudget(), None),
            kept,
            lambda name, done, total: None,
            skips=Skips(most=0),
            progress=record.progress,
        )
        return update.run(), kept.gradient

    def _read_vocabulary(self, record: StepRecord) -> None:
        rollout = record.rollout
        largest = int(torch.cat([rollout.response_ids[rollout.read], rollout.prompts.ids[rollout.prompts.mask]]).max())
        if largest >= self.vocabulary:
            raise InputError(
                f"`--student` must be the model that sampled the rollouts, got one of {self.vocabulary} tokens for id {largest}"
            )


def dot(left: Gradient, right: Gradient) -> float:
    """Inner product over all parameters, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def cosine(left: Gradient, right: Gradient) -> float | None:
    """In [-1, 1]; None where one of them is 0."""
    norms = (dot(left, left) * dot(right, right)) ** 0.5
    return dot(left, right) / norms if norms > 0 else None
