"""What evaluations ask of a student's module; ``OPDModule`` has all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_opd.rollout.base import Sampler, SamplingSettings
from lit_opd.types import PromptBatch, Rollout, TokenSignal


@dataclass(frozen=True)
class SampledBatch:
    """What a callback samples in one call, on a rank.

    Args:
        rows: responses.
        prompt: tokens of the longest prompt.
        response: tokens of the longest response.
    """

    rows: int
    prompt: int
    response: int


class Answering(Protocol):
    """Samples answers, and scores them."""

    sampler: Sampler

    @property
    def trainer(self) -> Trainer:
        """Of the run."""

    @property
    def device(self) -> torch.device:
        """Where prompts go."""

    @property
    def tokenizer(self) -> Any:
        """The student's."""

    @property
    def student_config(self) -> Any:
        """The student's transformers configuration."""

    def modules(self) -> Iterator[nn.Module]:
        """Every part."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that train, and others."""

    def sampling_settings(self, **changes: Any) -> SamplingSettings:
        """The sampler's settings, with fields changed by name."""

    def generate(self, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """Responses of B prompts, [B, T]."""

    def student_signal(self, rollout: Rollout) -> TokenSignal:
        """The signal [B, T] of responses under student and teacher; None where the teacher cannot give a field."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Told how far the evaluation is."""
