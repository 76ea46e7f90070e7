"""The scores of a rollout batch: the frozen models' and the student's."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from lit_opd.step.skips import finite
from lit_opd.types import TokenScores, TokenSignal, TopK

_SIGNAL_FIELDS = (
    "student_logprobs", "teacher_logprobs", "reference_logprobs", "student_entropy", "teacher_entropy", "token_kl"
)  # fmt: skip


class _Parts:
    """Results collected from micro-batches by ``TokenSignal`` field (or "weights", "loss", "clipped"), [B, T] or
    [B, T, K], in the batch's row order; a top-k list is two of them."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = tuple(mask.shape)
        self.values: dict[str, Tensor] = {}

    def put(self, name: str, rows: Tensor, part: Tensor) -> None:
        """Store ``part`` [R, columns, ...] without its gradient."""
        part = part.detach()
        if name not in self.values:
            self.values[name] = part.new_zeros(self.shape + part.shape[2:])
        self.values[name][rows.to(part.device), : part.shape[1]] = part

    def put_scores(self, who: str, rows: Tensor, scores: TokenScores) -> None:
        """Store what ``who`` ("student", "teacher", "reference") says of ``rows``, int64 [R]."""
        found = {f"{who}_logprobs": scores.logprobs, f"{who}_entropy": scores.entropy, "token_kl": scores.token_kl}
        if scores.topk is not None:
            found |= {f"{who}_topk.ids": scores.topk.ids, f"{who}_topk.logprobs": scores.topk.logprobs}
        for name, value in found.items():
            if value is not None:
                self.put(name, rows, value)

    def signal_fields(self, rows: Tensor, columns: int) -> dict[str, Any]:
        """The optional and required fields of a ``TokenSignal`` of ``rows``, int64 [R], and the leading columns, finite."""
        cut = {name: value[rows.to(value.device), :columns] for name, value in self.values.items()}
        fields: dict[str, Any] = {name: finite(cut[name]) for name in _SIGNAL_FIELDS if name in cut}
        for name in ("student_topk", "teacher_topk"):
            if f"{name}.ids" in cut:
                logprobs = cut[f"{name}.logprobs"].nan_to_num(neginf=-math.inf)  # no mass is a fair answer
                fields[name] = TopK(ids=cut[f"{name}.ids"], logprobs=logprobs)
        return fields


def _cut(signal: TokenSignal, columns: int) -> TokenSignal:
    """The leading columns of a signal."""
    changes: dict[str, Any] = {}
    for field in fields(signal):
        value = getattr(signal, field.name)
        if isinstance(value, TopK):
            changes[field.name] = TopK(ids=value.ids[:, :columns], logprobs=value.logprobs[:, :columns])
        elif isinstance(value, Tensor) and value.ndim > 1:
            changes[field.name] = value[:, :columns]
    return replace(signal, **(changes | {"validate": False}))
