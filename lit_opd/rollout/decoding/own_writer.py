"""Decoding by a model's own forward: what every kind of model can do whose layers keep keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_opd.rollout.base import SamplingSettings
from lit_opd.rollout.decoding.key_values import CachedRows, Refusal
from lit_opd.rollout.decoding.responses import Responses
from lit_opd.types import PromptBatch


def prefilled(model: Any, prompts: PromptBatch, settings: SamplingSettings, *, refusal: Refusal) -> CachedRows:
    """``prompts`` read, with room for the responses."""
    most = prompts.ids.shape[1] + settings.max_new_tokens - 1
    return CachedRows(model, prompts.ids, prompts.mask, most=most, refusal=refusal)


class OwnWriter:
    """The rows that are still being written; see ``lit_opd.rollout.decoding.sampler``."""

    fixed = None

    def __init__(self, model: Any, cached: CachedRows, responses: Responses) -> None:
        self.model, self.cached, self.responses = model, cached, responses

    def rows(self, count: int) -> int:
        """How many rows the model runs to write ``count``."""
        return count

    def first(self) -> None:
        """Draw the first token of every row, after what was read."""
        logits = self.model.next_logits(self.cached.states)
        self.responses.draw(logits[:, : self.responses.settings.vocabulary])

    def advance(self) -> None:
        """Run the model on the last token of every row, and draw the next."""
        cached = self.cached
        mask, positions = cached.grow(1)
        cached.states = self.model.next_states(self.responses.token.unsqueeze(-1), mask, positions, cached.cache)
        self.first()

    def select(self, kept: Tensor) -> None:
        """Go on with some of the rows still written, int64 [R]."""
        self.cached.take(kept)
        self.responses.select(kept, bucket=len(kept))
