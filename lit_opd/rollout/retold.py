"""Turns by an engine that samples single responses: each turn it is sent all that was said before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lit_opd.distributed import largest
from lit_opd.rollout.base import Sampler, SamplingSettings, Spoken
from lit_opd.streams import turn_keys
from lit_opd.types import FinishReason, PromptBatch, Rollout


class Retold:
    """A ``Conversation`` by ``Sampler.sample``. An engine with a prefix cache reads only what is new.

    One call a turn, in which an engine that ``heeds_room`` gives each row its own; others give all rows the longest, what is too
    much is cut off, and rows that the model's context window then does not hold together are sampled apart.

    Args:
        sampler: the engine.
        model: the student's ``ScoringModel``.
        prompts: B rows.
        settings: see ``Sampler.converse``.
    """

    def __init__(self, sampler: Sampler, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> None:
        self.sampler, self.model, self.settings = sampler, model, settings
        ids, mask = prompts.ids.cpu(), prompts.mask.cpu()
        self.texts = [row[valid].tolist() for row, valid in zip(ids, mask, strict=True)]
        self.keys, self.names = prompts.row_keys, prompts.row_ids
        self.spare = self.texts[0]  # what a rank without rows asks for
        self.most, self.turn = ids.shape[1] + settings.max_new_tokens, 0  # columns of a call
        if not sampler.heeds_room:
            self.most = max(self.most, getattr(model.causal_lm.config, "max_position_embeddings", None) or 0)
        self.provenance = settings.provenance("")

    def speak(self, room: Sequence[int]) -> Spoken:
        """See ``Conversation``."""
        groups = self._groups(room)
        columns = max(room, default=1)
        ids = torch.zeros(len(room), columns, dtype=torch.int64)
        logprobs = torch.zeros(len(room), columns, dtype=torch.float32)
        lengths, stopped = [0] * len(room), [False] * len(room)
        for number in range(largest(len(groups), self.keys.device)):
            rows = groups[number] if number < len(groups) else []
            rollout = self._sampled(rows, tuple(room[row] for row in rows) or (1,))
            logprobs = logprobs.to(torch.promote_types(logprobs.dtype, rollout.sampler_logprobs.dtype))
            self.provenance = rollout.provenance
            for place, row in enumerate(rows):
                length = int(rollout.lengths[place])
                stopped[row] = length <= room[row] and int(rollout.finish_reason[place]) == int(FinishReason.STOP)
                lengths[row] = length = min(length, room[row])
                ids[row, :length] = rollout.response_ids[place, :length].cpu()
                logprobs[row, :length] = rollout.sampler_logprobs[place, :length].cpu()
        for text, said, length in zip(self.texts, ids.tolist(), lengths, strict=True):
            text.extend(said[:length])
        return Spoken(ids, logprobs, lengths, stopped)

    def _groups(self, room: Sequence[int]) -> list[list[int]]:
        """Rows of a call: all of them, or those that fit together into ``most`` columns, longest text first."""
        if self.sampler.heeds_room:
            return [list(range(len(room)))] if len(room) else []
        groups: list[list[int]] = []
        for row in sorted(range(len(room)), key=lambda row: -len(self.texts[row])):
            first = groups[-1][0] if groups else row
            if not groups or len(self.texts[first]) + room[row] > self.most:
                groups.append([])
            groups[-1].append(row)
        return groups

    def _sampled(self, rows: Sequence[int], room: tuple[int, ...]) -> Rollout:
        """One response of each row, of so many tokens; of the spare text where there is none."""
        texts = [self.texts[row] for row in rows] or [self.spare]
        width, device = max(map(len, texts)), self.keys.device
        ids = torch.full((len(texts), width), self.settings.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(texts), width, dtype=torch.bool)
        for place, text in enumerate(texts):
            ids[place, width - len(text) :] = torch.tensor(text)
            mask[place, width - len(text) :] = True
        index = torch.tensor(list(rows), dtype=torch.int64, device=device)
        keys = turn_keys(self.keys[index], self.turn) if rows else torch.zeros(1, dtype=torch.int64, device=device)
        names = tuple(self.names[row] for row in rows) or ("",)
        prompts = PromptBatch(ids.to(device), mask.to(device), keys, names)
        settings = replace(self.settings, max_new_tokens=max(room), room=room if self.sampler.heeds_room else ())
        return self.sampler.sample(self.model, prompts, settings)

    def hear(self, rows: Sequence[int], heard: Sequence[Sequence[int]]) -> None:
        """See ``Conversation``."""
        self.texts = [[*self.texts[row], *new] for row, new in zip(rows, heard, strict=True)]
        self.keys = self.keys[torch.tensor(list(rows), dtype=torch.int64, device=self.keys.device)]
        self.names, self.turn = tuple(self.names[row] for row in rows), self.turn + 1

    def forget(self) -> None:
        """See ``Conversation``."""
        self.texts, self.keys, self.names = [], self.keys[:0], ()
