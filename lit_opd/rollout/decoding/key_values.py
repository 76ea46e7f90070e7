"""Rows that grow by tokens: the keys and values of a model's layers while responses are written, or read along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lit_opd.rollout.base import casts_kept
from lit_opd.rollout.decoding.buckets import Buckets

Refusal = Callable[[Any, str], Exception]  # from a model's configuration and a reason

_GROWTH = Buckets(fixed=False)


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
            room = _GROWTH.columns(self.length, most=self.most) - start
            self.held = [F.pad(held[:, :, :start], (0, 0, 0, room)) for held in self.held]
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, start : self.length] = new
        keys, values = self.held
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.length

    def pick(self, rows: Tensor, columns: Tensor) -> None:
        """Keep ``rows`` (int64 [R]), and of each the ``columns`` (int64 [R, n])."""
        index = columns[:, None, :, None]
        self.held = [held[rows].gather(2, index.expand(-1, held.shape[1], -1, held.shape[3])) for held in self.held]
        self.length = columns.shape[1]

    def select(self, rows: Tensor, start: int) -> None:
        """Keep ``rows`` (int64 [R], with repetition) and the columns from ``start`` on."""
        self.held = [held[rows, :, start : self.length] for held in self.held]
        self.length -= start


def require_full_attention(config: Any, *, refusal: Refusal, columns: int | None = None) -> None:
    """An error unless every layer of a text model attends to all earlier tokens, as far as its configuration says.

    Args:
        config: of a text model.
        refusal: makes the error.
        columns: of the longest row, padding with it: a window that holds them all cuts nothing. None where they are not known.
    """
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    unnamed = "sliding_attention" if window else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or {unnamed}) - {"full_attention"}
    if columns is not None and window and columns <= config.sliding_window:
        kinds -= {"sliding_attention"}
    if kinds:
        raise refusal(config, f"layers of kind {', '.join(sorted(kinds))}")


class CachedRows:
    """Prompts, and what is appended to them: keys and values in one model, the last hidden states, masks and positions.

    Args:
        model: a ``ScoringModel``.
        ids: int64 [B, P], left-padded; neighbours that are equal share the prefill.
        mask: bool [B, P].
        most: columns there may be.
        refusal: the error for a model that keeps something else than keys and values.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, *, most: int, refusal: Refusal) -> None:
        self.model, self.most = model, most
        config, columns = model.causal_lm.config.get_text_config(), ids.shape[1]
        self.layers = [Slab(most=most) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        together = torch.cat([ids, mask.long()], -1)
        _, group = torch.unique_consecutive(together, dim=0, return_inverse=True)
        first = torch.cat([group.new_ones(1), group.diff()]).nonzero().squeeze(-1)
        mask = mask[first]
        self.padded = not bool(mask.all())
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        with casts_kept(ids.device, False):  # each weight is read once here
            self.states = model.next_states(ids[first], mask if self.padded else None, positions, self.cache)
        self.mask, self.position = mask, positions[:, -1]
        if any(layer.length != columns for layer in self.layers):
            raise refusal(config, "layers that do not write the key-value cache")
        if len(first) < len(group):
            self.take(group)

    def grow(self, columns: int) -> tuple[Tensor | None, Tensor]:
        """Make place for further tokens; the mask with them, None without padding, and their positions, int64 [B, columns]."""
        steps = torch.arange(1, columns + 1, device=self.position.device)
        positions = self.position.unsqueeze(-1) + steps
        self.position = positions[:, -1]
        if self.padded:
            self.mask = F.pad(self.mask, (0, columns), value=True)
        return self.mask if self.padded else None, positions

    def take(self, rows: Tensor) -> None:
        """Keep ``rows``, int64 [R] with repetition, without the columns that are padding in all of them."""
        self.mask, self.position, self.states = self.mask[rows], self.position[rows], self.states[rows]
        start = int(self.mask.any(0).int().argmax()) if self.padded else 0
        self.mask = self.mask[:, start:]
        self.padded = not bool(self.mask.all())
        for layer in self.layers:
            layer.select(rows, start)

    def keep(self, rows: Tensor) -> None:
        """Keep ``rows``, int64 [R], and of each the columns that are its own, in order after padding on the left."""
        self.mask = self.mask[rows]
        longest = int(self.mask.sum(-1).max()) if len(rows) else 0
        columns = self.mask.int().argsort(dim=-1, stable=True)[:, self.mask.shape[1] - longest :]
        self.mask = self.mask.gather(1, columns)
        for layer in self.layers:
            layer.pick(rows, columns)

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """Run the model on further columns of every row.

        Args:
            ids: int64 [R, n], n > 1, left-padded.
            mask: bool [R, n], the last column True.
        """
        before, self.mask = self.mask.shape[1], torch.cat([self.mask, mask], -1)
        positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
        self.padded, self.position = not bool(self.mask.all()), positions[:, -1]
        with casts_kept(ids.device, False):
            self.states = self.model.next_states(ids, self.mask, positions, self.cache)
