"""Several turns in one key-value cache: what an environment answers is read by all rows at once, after what they said.

Within a turn no row leaves: one that has ended would have to come back. Columns that it fills meanwhile are dropped before the
next turn, so the buffer never holds more than what rows really read, padded on the left to the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_opd.rollout.base import SamplingSettings, Spoken
from lit_opd.rollout.decoding.fixed_rows import FixedRows
from lit_opd.rollout.decoding.key_values import CachedRows
from lit_opd.rollout.decoding.responses import Responses
from lit_opd.streams import row_uniforms, turn_keys
from lit_opd.types import PromptBatch


class Writer(Protocol):
    """What writes one turn; see ``lit_opd.rollout.decoding.sampler``."""

    @property
    def fixed(self) -> FixedRows | None:
        """What holds keys and values while it writes; None where ``CachedRows`` goes on holding them."""

    def first(self) -> None:
        """Draw the first token of every row."""

    def advance(self) -> None:
        """Run the model on the last token of every row, and draw the next."""


class DecodedConversation:
    """A ``Conversation`` in this process.

    Args:
        model: the student's ``ScoringModel``.
        prompts: B rows.
        settings: see ``Sampler.converse``.
        engine: recorded as provenance.
        prefilled: reads the prompts.
        writer: what writes a turn of cached rows into responses, and whether it runs in inference mode.
        every: steps between looks at which rows ended.
    """

    def __init__(
        self,
        model: Any,
        prompts: PromptBatch,
        settings: SamplingSettings,
        *,
        engine: str,
        prefilled: Callable[[Any, PromptBatch, SamplingSettings], CachedRows],
        writer: Callable[[Any, CachedRows, Responses], Writer],
        plain: Callable[[Any, torch.device], bool],
        every: int,
    ) -> None:
        self.model, self.settings, self.every = model, settings, every
        self.writer, self.plain = writer, plain
        self.provenance = settings.provenance(engine)
        self.keys, self.turn = prompts.row_keys, 0
        self.last = self.keys  # int64 [R], the token each row said last, which no model has read yet
        self.cached: CachedRows = model.run(prefilled, prompts, settings)

    # -- a turn ------------------------------------------------------------------------------------------------------

    def speak(self, room: Sequence[int]) -> Spoken:
        """See ``Conversation``."""
        said: Spoken = self.model.run(self._speak, room)
        return said

    def _speak(self, model: Any, room: Sequence[int]) -> Spoken:
        if not len(room):
            return Spoken(self.keys.new_zeros(0, 0).cpu(), torch.zeros(0, 0), [], [])
        cached, settings, device = self.cached, self.settings, self.keys.device
        before, count = cached.mask, max(room)
        cached.most = before.shape[1] + count
        keys = turn_keys(self.keys, self.turn)
        uniforms = row_uniforms(settings.seed, keys, settings.step, count, domain=settings.domain)
        # inference mode, where it is off, switches gradients on
        with torch.inference_mode(self.plain(model, device)), torch.no_grad():
            responses = Responses(uniforms, settings)
            writer = self.writer(model, cached, responses)
            columns = self._written(writer, responses, torch.tensor(list(room), device=device))
        ids, logprobs = responses.ids[:, :columns].clone(), responses.logprobs[:, :columns].clone()
        said = _spoken(ids.cpu(), logprobs.cpu(), room, settings.stop_ids)
        lengths = torch.tensor(said.lengths, device=device)
        self.last = ids.gather(1, lengths.unsqueeze(-1) - 1).squeeze(-1)
        self._take_back(writer, before, columns - 1, lengths - 1)
        return said

    def _written(self, writer: Writer, responses: Responses, room: Tensor) -> int:
        """Columns that were drawn until every row had ended."""
        writer.first()
        for columns in range(1, responses.slots):
            if columns % self.every == 0 and bool((responses.ended[: responses.count] | (room <= columns)).all()):
                return columns
            writer.advance()
        return responses.slots

    def _take_back(self, writer: Writer, before: Tensor, new: int, kept: Tensor) -> None:
        """Keys and values go back to ``CachedRows``, with the columns that rows really read.

        Args:
            writer: has written.
            before: bool [R, columns], what stood there before the turn.
            new: columns that the turn added.
            kept: int64 [R], how many of them are the row's own.
        """
        cached, fixed = self.cached, writer.fixed
        if fixed is not None:
            for layer, held in zip(cached.layers, fixed.caches, strict=True):
                layer.held, layer.length = [part[: len(before)] for part in held], fixed.filled
            before = before[:, before.shape[1] + new - fixed.filled :]
        added = torch.arange(new, device=before.device) < kept.unsqueeze(-1)
        cached.mask = torch.cat([before, added], -1)

    # -- the answer --------------------------------------------------------------------------------------------------

    def hear(self, rows: Sequence[int], heard: Sequence[Sequence[int]]) -> None:
        """See ``Conversation``."""
        self.model.run(self._hear, rows, heard)
        self.turn += 1

    def _hear(self, model: Any, rows: Sequence[int], heard: Sequence[Sequence[int]]) -> None:
        device, cached = self.keys.device, self.cached
        kept = torch.tensor(list(rows), dtype=torch.int64, device=device)
        self.keys = self.keys[kept]
        if not len(rows):
            return
        last = self.last[kept].tolist()
        cached.keep(kept)
        width = 1 + max(map(len, heard))
        ids = torch.full((len(rows), width), self.settings.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for place, new in enumerate(heard):
            ids[place, width - len(new) - 1 :] = torch.tensor([last[place], *new])
            mask[place, width - len(new) - 1 :] = True
        cached.read(ids.to(device), mask.to(device))

    def forget(self) -> None:
        """See ``Conversation``."""
        self.keys = self.keys[:0]


def _spoken(ids: Tensor, logprobs: Tensor, room: Sequence[int], stop_ids: Sequence[int]) -> Spoken:
    """Rows cut after their first stop id, or at the end of their room."""
    stops = torch.isin(ids, torch.tensor(stop_ids, dtype=ids.dtype))
    first = torch.where(stops.any(-1), stops.int().argmax(-1) + 1, ids.shape[1] + 1).tolist()
    lengths = [min(at, most) for at, most in zip(first, room, strict=True)]
    stopped = [at <= most for at, most in zip(first, room, strict=True)]
    return Spoken(ids, logprobs, lengths, stopped)
