"""What a decode step reads and writes beside the responses, in buffers whose shapes and addresses stay within a bucket."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_opd.rollout.decoding.buckets import Buckets
from lit_opd.rollout.decoding.key_values import CachedRows


class FixedRows:
    """Keys and values, positions and a bias over columns of R rows.

    Args:
        cached: the rows after their prefill; their keys and values are taken over.
        buckets: the shapes there may be.
        dtype: of keys and values.
    """

    def __init__(self, cached: CachedRows, *, buckets: Buckets, dtype: torch.dtype) -> None:
        self.buckets, self.most, mask = buckets, cached.most, cached.mask
        self.version = 0  # of the buffers: counts how often they were made anew
        self.filled = mask.shape[1]  # columns written
        self.position = cached.position.clone()  # of the last token, int64 [R]
        self._column = torch.full((1,), self.filled - 1, device=mask.device)  # where it stands, int64
        self.bias: Tensor | None = None  # [R, columns of the buffers], -inf where nothing stands; None where all counts
        if buckets.fixed or cached.padded:
            self.bias = torch.where(mask, 0.0, -torch.inf).to(dtype)
        self.caches: list[tuple[Tensor, Tensor]] = []  # keys and values of a layer, [R, heads, columns, size] each
        for layer in cached.layers:
            keys, values = layer.held
            layer.held = []
            self.caches.append((keys.to(dtype), values.to(dtype)))
        self._resize(None, 0)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the buffers."""
        return len(self.position), self.caches[0][0].shape[2]

    @property
    def columns(self) -> int:
        """Columns that a step attends to."""
        return self.shape[1] if self.buckets.fixed else self.filled

    @property
    def column(self) -> Tensor | int:
        """Where the last token stands: int64 [1] on the device; its number where a step's shapes are not fixed."""
        return self._column if self.buckets.fixed else self.filled - 1

    def reserve(self) -> None:
        """Make place for the column of the coming step, which counts as filled from now on."""
        if self.filled == self.shape[1]:
            self._resize(None, 0)
        self.filled += 1

    def step(self) -> Tensor | None:
        """Go on to that column, on the device; returns the bias for attention, [R, columns] with 0 where a column counts and -inf
        elsewhere, or None where every column counts."""
        self.position.add_(1)
        if self.buckets.fixed:
            self._column.add_(1)
        if self.bias is None:
            return None
        if self.buckets.fixed:
            return self.bias.index_fill_(1, self._column, 0.0)
        self.bias[:, self.filled - 1] = 0.0
        return self.bias[:, : self.filled]

    def select(self, kept: Tensor) -> None:
        """Keep rows, int64 [R] with repetition; buffers of as many rows stay where they are."""
        if not self.buckets.fixed or len(kept) != len(self.position):
            self._resize(kept, self._shared_padding(kept))
            return
        for held in (self.position, self.bias, *(held for cache in self.caches for held in cache)):
            if held is not None:
                held.copy_(held[kept])

    def _shared_padding(self, kept: Tensor) -> int:
        """Leading columns that are padding in all of ``kept``; waits for the device."""
        if self.bias is None:
            return 0
        return int((self.bias[kept, : self.filled] == 0.0).any(0).int().argmax())

    def _resize(self, kept: Tensor | None, start: int) -> None:
        """New buffers for rows (None for all), without the columns before ``start``."""
        written = slice(start, self.filled)
        self.version += 1
        self.most, self.filled = self.most - start, self.filled - start
        columns = self.buckets.columns(self.filled + 1, most=self.most)
        for index, (keys, values) in enumerate(self.caches):
            keys, values = (_moved(held, kept, written, columns) for held in (keys, values))
            self.caches[index] = keys, values
        if self.bias is not None:
            bias = self.bias[:, written] if kept is None else self.bias[kept, written]
            self.bias = F.pad(bias, (0, columns - bias.shape[1]), value=-torch.inf)
            if not self.buckets.fixed and bool((bias == 0.0).all()):
                self.bias = None
        if kept is not None:
            self.position = self.position[kept]
            self._column.sub_(start)


def _moved(held: Tensor, kept: Tensor | None, written: slice, columns: int) -> Tensor:
    """Rows and columns of ``held`` [R, heads, any, size] in a buffer of ``columns`` columns, zeros after them: what attention
    masks must be finite."""
    old = held[:, :, written] if kept is None else held[kept, :, written]
    return F.pad(old, (0, 0, 0, columns - old.shape[2]))
