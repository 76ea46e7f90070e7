"""What samplers have in common that stand around another one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lit_opd.rollout.base import Sampler, Seconds
from lit_opd.rollout.weights import StudentWeights


class SamplerAround(Sampler):
    """A sampler whose tokens another one draws: its settings, its memory and its checks are those of the one inside.

    Args:
        inside: the engine.
    """

    def __init__(self, inside: Sampler) -> None:
        super().__init__(inside.max_new_tokens, inside.temperature, inside.top_p, inside.top_k, inside.stop_token_ids)
        self._inside = inside

    @property
    def engine(self) -> Sampler:
        """The sampler inside."""
        return self._inside

    @property
    def in_process(self) -> bool:  # type: ignore[override]
        """As the sampler inside."""
        return self._inside.in_process

    @property
    def memory_fraction(self) -> float:  # type: ignore[override]
        """As the sampler inside."""
        return self._inside.memory_fraction

    @property
    def sleep(self) -> bool:  # type: ignore[override]
        """As the sampler inside."""
        return self._inside.sleep

    @property
    def max_logprob_gap(self) -> float | None:  # type: ignore[override]
        """As the sampler inside; rows that it does not sample now are not compared."""
        return self._inside.max_logprob_gap

    @property
    def seconds(self) -> Seconds | None:  # type: ignore[override]
        """As the sampler inside."""
        return self._inside.seconds

    def check(self, *, tokens: int | None, vocabulary: int) -> None:
        """As the sampler inside."""
        self._inside.check(tokens=tokens, vocabulary=vocabulary)

    def make_room(self, tokens: int, *, field: str) -> None:
        """As the sampler inside."""
        self._inside.make_room(tokens, field=field)

    def check_student(self, adapter_rank: int | None) -> None:
        """As the sampler inside."""
        self._inside.check_student(adapter_rank)

    def prepare(self, student: StudentWeights, weights_version: int) -> None:
        """As the sampler inside."""
        self._inside.prepare(student, weights_version)

    def forget_weights(self) -> None:
        """As the sampler inside."""
        self._inside.forget_weights()

    def check_loaded(self) -> None:
        """As the sampler inside."""
        self._inside.check_loaded()

    def kept_awake(self) -> AbstractContextManager[None]:
        """As the sampler inside."""
        return self._inside.kept_awake()

    def attach(self, tokenizer: Any, encoder: Any | None) -> None:
        """As the sampler inside."""
        self._inside.attach(tokenizer, encoder)
