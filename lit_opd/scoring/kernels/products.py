"""Tiles of logits on a device: who is where, the buffers they stand in, and the products that cuBLAS makes of them.

A tile has up to ``TILE_ELEMENTS`` logits in the dtype of the head. The backward pass has smaller ones, overwrites them with
their slopes, and two products take those to the hidden states and the weight. The vocabulary is the outer loop, so the
weight's gradient is summed a slice at a time, and nothing of its size is held beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_opd.scoring.kernels.rows import Tile
from lit_opd.scoring.tiles import KERNEL_SLOPE_ELEMENTS, KERNEL_TILE_ELEMENTS, KERNEL_TILE_TOKENS, Head

# 4096 x 8192, so that the device takes longer than the host for a tile. Backward 4096 x 4096: whole waves of an H100's 132
# multiprocessors in all three products, and both gradients' float32 sums are read and written as rarely as its size allows.
TILE_ELEMENTS = KERNEL_TILE_ELEMENTS
SLOPE_ELEMENTS = KERNEL_SLOPE_ELEMENTS
TILE_TOKENS = KERNEL_TILE_TOKENS
BLOCK = 4096  # entries a program of a kernel reads
ALIGNED = 64  # entries: rows of a buffer begin where a product's fast loads may
ALIGNED_TOKENS = 128


@dataclass(frozen=True)
class Cut:
    """How N tokens and V entries are cut into tiles.

    Args:
        rows: the tokens of a tile.
        columns: its entries, whole blocks but for the last.
        block: entries of a block, a power of two.
    """

    rows: tuple[slice, ...]
    columns: tuple[slice, ...]
    block: int

    @classmethod
    def of(cls, head: Head, *, backward: bool = False) -> Cut:
        """Few tokens get more entries, so that a small batch is not many small products."""
        elements = SLOPE_ELEMENTS if backward else TILE_ELEMENTS
        count, vocabulary = len(head.hidden), head.vocabulary
        block = min(BLOCK, 1 << max(0, vocabulary - 1).bit_length())
        parts = -(-count // TILE_TOKENS)
        tokens = _up(-(-count // parts), ALIGNED_TOKENS) if parts > 1 else max(1, count)
        entries = max(block, elements // tokens // block * block)
        return cls(_slices(count, tokens), _slices(vocabulary, entries), block)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        return ((rows, columns) for columns in self.columns for rows in self.rows)

    def blocks(self, columns: slice) -> slice:
        """Which blocks of the vocabulary the entries ``columns`` are."""
        return slice(columns.start // self.block, -(-columns.stop // self.block))

    @property
    def num_blocks(self) -> int:
        """Of the whole vocabulary."""
        return self.blocks(self.columns[-1]).stop if self.columns else 0

    @property
    def elements(self) -> int:
        """Of the largest tile, its rows aligned."""
        return _longest(self.rows) * _up(_longest(self.columns), ALIGNED)


class Tiles:
    """The tiles of one head, in one buffer: a tile is overwritten when the next is asked for.

    Args:
        head: N hidden states and the head.
        cut: its tiles.
        temperature: > 0, divides the logits.
    """

    def __init__(self, head: Head, cut: Cut, temperature: float) -> None:
        self.head, self.temperature = head, temperature
        self.buffer = None if head.weight is None else head.hidden.new_empty(cut.elements)
        self.dead: Tensor | None = None
        if head.unused is not None:
            dead = torch.zeros(head.vocabulary, dtype=torch.uint8, device=head.hidden.device)
            self.dead = dead.index_fill_(0, head.unused, 1)

    def at(self, rows: slice, columns: slice) -> Tile:
        """Of the tokens ``rows`` and the entries ``columns``; its logits may be overwritten unless the head has no weight."""
        head = self.head
        bias, dead = (None if table is None else table[columns] for table in (head.bias, self.dead))
        return Tile(self._logits(rows, columns), bias, dead, self.temperature, head.soft_cap)

    def _logits(self, rows: slice, columns: slice) -> Tensor:
        head = self.head
        if head.weight is None or self.buffer is None:
            tile = head.hidden[rows, columns]
            return tile if tile.stride(-1) == 1 else tile.contiguous()
        tokens, entries = rows.stop - rows.start, columns.stop - columns.start
        stride = _up(entries, ALIGNED)
        out = self.buffer[: tokens * stride].view(tokens, stride)[:, :entries]
        return torch.mm(head.hidden[rows], head.weight[columns].T, out=out)


class Partials:
    """Sums of each token and block, joined in float64 when all are there.

    Args:
        cut: the tiles.
        like: a tensor on the device.
        count: tables.
    """

    def __init__(self, cut: Cut, like: Tensor, count: int) -> None:
        self.cut, tokens = cut, cut.rows[-1].stop if cut.rows else 0
        self.tables = [like.new_empty(cut.num_blocks, tokens, dtype=torch.float32) for _ in range(count)]

    def at(self, rows: slice, columns: slice) -> tuple[Tensor, ...]:
        """Views [blocks, n] of the tables, for a tile."""
        return tuple(table[self.cut.blocks(columns), rows] for table in self.tables)

    def total(self, number: int) -> Tensor:
        """Sum of a table over the blocks, float64 [N]."""
        return self.tables[number].double().sum(0)

    def normaliser(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Log-sum-exp, float64 [N] nats, of the tops and masses in the tables ``first`` and ``first + 1``; and the masses
        [blocks, N] over the highest top of a token."""
        tops, masses = (self.tables[number].double() for number in (first, first + 1))
        top = tops.amax(0)
        shares = (tops - top).exp_()
        return top + (masses * shares).sum(0).log(), shares

    def summed(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Log-sum-exp, and the average under the softmax of what the table ``first + 2`` weighs: float64 [N] each."""
        log_normaliser, shares = self.normaliser(first)
        mass = (self.tables[first + 1].double() * shares).sum(0)
        return log_normaliser, (self.tables[first + 2].double() * shares).sum(0) / mass


class Gradients:
    """Gradients of hidden states, weight and bias from tiles of slopes that hold the upstream gradient already.

    Sums are float32: a 16-bit weight's is summed a slice of the vocabulary at a time where several tiles share one.

    Args:
        head: N hidden states and the head.
        cut: its tiles.
        wanted: which of the three have one.
    """

    def __init__(self, head: Head, cut: Cut, wanted: Sequence[bool]) -> None:
        self.head, hidden, weight = head, head.hidden, head.weight
        self.hidden = self.weight = self.bias = self.slice = None
        if wanted[0]:
            dtype = hidden.dtype if weight is None else torch.float32
            self.hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        if wanted[1] and weight is not None:
            self.weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self.weight[head.vocabulary if cut.rows else 0 :] = 0
            if len(cut.rows) > 1:
                self.slice = weight.new_empty(_longest(cut.columns), weight.shape[1], dtype=torch.float32)
        if wanted[2] and head.bias is not None:
            self.bias = torch.zeros_like(head.bias, dtype=torch.float32)

    def out(self, tile: Tile, rows: slice, columns: slice) -> Tensor:
        """Where the slopes of a tile are to be written, [n, v] of [N, V]."""
        if self.head.weight is None and self.hidden is not None:
            return self.hidden[rows, columns]
        return tile.logits if self.head.weight is not None else torch.empty_like(tile.logits)

    def add(self, slopes: Tensor, rows: slice, columns: slice) -> None:
        """Add the slopes of a tile, [n, v] of [N, V]; the tiles of ``columns`` come one after the other."""
        head = self.head
        if self.bias is not None:
            self.bias[columns] += slopes.sum(0, dtype=torch.float32)
        if head.weight is None:
            return
        if self.hidden is not None:
            add_product(self.hidden[rows], slopes, head.weight[columns])
        if self.weight is None:
            return
        if self.slice is None:
            torch.mm(slopes.T, head.hidden[rows], out=self.weight[columns])
            return
        part = self.slice[: columns.stop - columns.start]
        add_product(part.zero_() if rows.start == 0 else part, slopes.T, head.hidden[rows])
        if rows.stop == len(head.hidden):
            self.weight[columns] = part

    def result(self) -> tuple[Tensor | None, ...]:
        """Of hidden states [N, H], weight [V, H] and bias [V] in the dtypes of the inputs, None where there is none."""
        pairs = ((self.hidden, self.head.hidden), (self.weight, self.head.weight), (self.bias, self.head.bias))
        return tuple(None if sums is None or like is None else sums.to(like.dtype) for sums, like in pairs)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left @ right in place: ``sums`` float32 [n, m], ``left`` [n, k], ``right`` [k, m]."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    elif left.device.type == "cpu":  # Triton's interpreter, for tests: as CUDA adds
        sums.addmm_(left.to(sums.dtype), right.to(sums.dtype))
    elif adds_wider(left.device, left.dtype):
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
    else:  # each product is rounded once before it is added
        sums += left @ right


@functools.cache
def adds_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a 16-bit product to a float32 sum without rounding it."""
    one = torch.ones(16, 16, dtype=dtype, device=device)
    sums = one.float()
    try:
        torch.addmm(sums, one, one, out_dtype=sums.dtype, out=sums)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def _slices(count: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(start, min(start + size, count)) for start in range(0, count, size))


def _longest(parts: Sequence[slice]) -> int:
    return max((part.stop - part.start for part in parts), default=0)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
