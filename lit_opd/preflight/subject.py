"""What the checks ask of a module: ``OPDModule`` has all of it. The module calls the checks, so they cannot import it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lightning.pytorch import Trainer

from lit_opd.evaluation.reward import Reward
from lit_opd.evaluation.validation import ValidationSettings
from lit_opd.models.student import StudentSettings
from lit_opd.rollout import LengthBudget, RatioStop, Sampler, SamplingSettings
from lit_opd.run.optimizer_state import OptimizerFactory, SchedulerFactory
from lit_opd.step.recipe import Recipe, Truncated, WarmUp
from lit_opd.teacher import Teacher


class Subject(Protocol):
    """A module before its run: settings, tokenizers and configurations; no weights."""

    student_settings: StudentSettings
    teacher: Teacher
    reference: Teacher | None
    sampler: Sampler
    validation: ValidationSettings
    length_budget: LengthBudget | None
    rollout_stop: RatioStop | None
    warmup: WarmUp | None
    reward: Reward | None
    truncated: Truncated
    token_budget: int | None
    gradient_clip_norm: float | None
    optimizer_factory: OptimizerFactory
    scheduler_factory: SchedulerFactory | None
    trainer: Trainer
    longest_row: int | None  # tokens of a prompt and response, noted by the checks
    student: Any  # the ``ScoringModel`` once it is loaded

    @property
    def recipe(self) -> Recipe:
        """What is learned."""

    @property
    def recipes(self) -> list[Recipe]:
        """What is learned, phase by phase."""

    @property
    def scorers(self) -> Mapping[str, Teacher]:
        """The frozen models by role."""

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""

    @property
    def scorer_tokenizers(self) -> Mapping[str, list[Any]]:
        """(tokenizer, embedding rows) of the models behind each scorer, by role."""

    @property
    def student_config(self) -> Any:
        """The student's transformers configuration."""

    @property
    def vocabulary(self) -> int:
        """Leading vocabulary entries, up to the tokenizer's last id."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a response."""

    def sampling_settings(self, **changes: Any) -> SamplingSettings:
        """The sampler's settings, with fields changed by name."""

    def configure_model(self) -> None:
        """Load the models."""
