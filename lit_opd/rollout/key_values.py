"""Keys and values of a layer while responses are written."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

FIRST_COLUMNS = 64  # columns by which a key-value buffer is longer than the prompt at first; then it doubles


class Slab(DynamicLayer):
    """Keys and values of one layer in a buffer [B, heads, columns, size] that doubles up to ``most`` columns."""

    def __init__(self, *, most: int) -> None:
        super().__init__()
        self.most, self.length = most, 0
        self.held: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns, [B, heads, n, size] each; returns all of them, [B, heads, written, size]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.held = [key_states[:, :, :0], value_states[:, :, :0]]
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.held[0].shape[-2]:
            room = max(self.length, min(self.most, max(2 * start, self.length + FIRST_COLUMNS))) - start
            self.held = [F.pad(held[:, :, :start], (0, 0, 0, room)) for held in self.held]
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, start : self.length] = new
        keys, values = self.held
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.length

    def select(self, rows: Tensor, start: int) -> None:
        """Keep ``rows`` (int64 [R], with repetition) and the columns from ``start`` on."""
        self.held = [held[rows, :, start : self.length] for held in self.held]
        self.length -= start
