"""Triton kernels over tiles of logits: one program reads ``block`` entries of one token, once.

Only loads, stores, exponentials and sums over a block: nothing of a new Triton, nothing that adds in another order the next
time. A tile is [n, v] in the dtype of the head, as the product with the weight left it; bias, soft cap, temperature and the
entries that name no token are applied where it is read, in float32.

Sums are left as one number a token and block, in the tables [blocks, N] of ``lit_opd.scoring.kernels.products.Partials``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_opd.scoring.tiles import NEVER

LOWEST = torch.finfo(torch.float32).min
WIDE_BLOCK = 2048  # from so many entries on a program takes eight warps
REVERSE, FORWARD, JSD = 0, 1, 2
KINDS = {"reverse_kl": REVERSE, "forward_kl": FORWARD, "jsd": JSD}

_NEVER = tl.constexpr(NEVER)
_LOWEST = tl.constexpr(LOWEST)
_REVERSE = tl.constexpr(REVERSE)
_FORWARD = tl.constexpr(FORWARD)


@triton.jit
def _logits(
    tile, columns, inside, bias, dead, temperature, cap, BIAS: tl.constexpr, DEAD: tl.constexpr, CAP: tl.constexpr
):
    """Temperature-scaled float32 logits of one token; ``NEVER`` after the tile's end and where an entry names no token."""
    logits = tl.load(tile + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        logits += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if CAP:  # cap * tanh(logits / cap)
        shrunk = tl.exp(-2.0 * tl.abs(logits) / cap)
        bent = cap * (1.0 - shrunk) / (1.0 + shrunk)
        logits = tl.where(logits < 0.0, -bent, bent)
    logits = logits / temperature
    if DEAD:
        names_none = tl.load(dead + columns, mask=inside, other=0) != 0
        logits = tl.where(names_none, _NEVER, logits)
    return tl.where(inside, logits, _NEVER)


@triton.jit
def _through_cap(slope, logits, temperature, cap):
    """The slope in the logits before the soft cap: d tanh = 1 - tanh^2."""
    share = logits * temperature / cap
    share = tl.where(logits > 0.5 * _NEVER, share, 0.0)
    return slope * (1.0 - share * share)


@triton.jit
def _mixture(student, teacher, log_beta, log_rest):
    """log(beta q + (1 - beta) p)."""
    one, other = teacher + log_beta, student + log_rest
    top = tl.maximum(one, other)
    return top + tl.log(1.0 + tl.exp(tl.minimum(one, other) - top))


@triton.jit
def _divergence(first, second):
    """f log(f/s) - f + s, from log-probs: >= 0, and summed up KL(f || s)."""
    f = tl.exp(first)
    return f * (first - second) - f + tl.exp(second)


@triton.jit
def _sum_one(
    tile, stride, width, bias, dead, temperature, cap,
    targets, picked, tops, masses, averages, table, first,
    BIAS: tl.constexpr, DEAD: tl.constexpr, CAP: tl.constexpr,
    PICK: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block: its top, the mass over that, and where wanted the logits under that mass, and the target's logit."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    logits = _logits(tile + row * stride, columns, inside, bias, dead, temperature, cap, BIAS, DEAD, CAP)
    top = tl.maximum(tl.max(logits, axis=0), _LOWEST)
    mass = tl.where(inside, tl.exp(logits - top), 0.0)
    place = block * table + row
    tl.store(tops + place, top)
    tl.store(masses + place, tl.sum(mass, axis=0))
    if AVERAGE:
        tl.store(averages + place, tl.sum(tl.where(inside, mass * logits, 0.0), axis=0))
    if PICK:
        wanted = tl.load(targets + row) - first
        mine = (wanted >= block * BLOCK) & (wanted < block * BLOCK + BLOCK) & (wanted < width)
        tl.store(picked + row, tl.sum(tl.where(columns == wanted, logits, 0.0), axis=0), mask=mine)


@triton.jit
def _sum_two(
    tile, stride, width, bias, dead, temperature, cap,
    tile2, stride2, bias2, dead2, cap2,
    tops, masses, averages, tops2, masses2, averages2, table,
    BIAS: tl.constexpr, DEAD: tl.constexpr, CAP: tl.constexpr,
    BIAS2: tl.constexpr, DEAD2: tl.constexpr, CAP2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block and both heads: top, mass, and student's minus teacher's logits under that mass."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    student = _logits(tile + row * stride, columns, inside, bias, dead, temperature, cap, BIAS, DEAD, CAP)
    teacher = _logits(tile2 + row * stride2, columns, inside, bias2, dead2, temperature, cap2, BIAS2, DEAD2, CAP2)
    gap = student - teacher
    place = block * table + row
    top = tl.maximum(tl.max(student, axis=0), _LOWEST)
    mass = tl.where(inside, tl.exp(student - top), 0.0)
    tl.store(tops + place, top)
    tl.store(masses + place, tl.sum(mass, axis=0))
    tl.store(averages + place, tl.sum(mass * gap, axis=0))
    top2 = tl.maximum(tl.max(teacher, axis=0), _LOWEST)
    mass2 = tl.where(inside, tl.exp(teacher - top2), 0.0)
    tl.store(tops2 + place, top2)
    tl.store(masses2 + place, tl.sum(mass2, axis=0))
    tl.store(averages2 + place, tl.sum(mass2 * gap, axis=0))


@triton.jit
def _sum_mixed(
    tile, stride, width, bias, dead, temperature, cap,
    tile2, stride2, bias2, dead2, cap2,
    student_log, teacher_log, log_beta, log_rest, student_parts, teacher_parts, table,
    BIAS: tl.constexpr, DEAD: tl.constexpr, CAP: tl.constexpr,
    BIAS2: tl.constexpr, DEAD2: tl.constexpr, CAP2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block: its share of KL(p || m) and of KL(q || m), m the mixture of both."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    student = _logits(tile + row * stride, columns, inside, bias, dead, temperature, cap, BIAS, DEAD, CAP)
    teacher = _logits(tile2 + row * stride2, columns, inside, bias2, dead2, temperature, cap2, BIAS2, DEAD2, CAP2)
    student -= tl.load(student_log + row)
    teacher -= tl.load(teacher_log + row)
    mixture = _mixture(student, teacher, log_beta, log_rest)
    place = block * table + row
    tl.store(student_parts + place, tl.sum(tl.where(inside, _divergence(student, mixture), 0.0), axis=0))
    tl.store(teacher_parts + place, tl.sum(tl.where(inside, _divergence(teacher, mixture), 0.0), axis=0))


@triton.jit
def _slope_one(
    tile, stride, width, bias, dead, temperature, cap, out, out_stride,
    targets, log_normaliser, factor, first,
    BIAS: tl.constexpr, DEAD: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(softmax - onehot(target)) * factor, in the dtype of ``out``."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    logits = _logits(tile + row * stride, columns, inside, bias, dead, temperature, cap, BIAS, DEAD, CAP)
    slope = tl.exp(logits - tl.load(log_normaliser + row))
    slope = tl.where(columns == tl.load(targets + row) - first, slope - 1.0, slope) * tl.load(factor + row)
    if CAP:
        slope = _through_cap(slope, logits, temperature, cap)
    tl.store(out + row * out_stride + columns, slope.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slope_two(
    tile, stride, width, bias, dead, temperature, cap, out, out_stride,
    tile2, stride2, bias2, dead2, cap2,
    student_log, teacher_log, centre, factor, log_beta, log_rest,
    BIAS: tl.constexpr, DEAD: tl.constexpr, CAP: tl.constexpr,
    BIAS2: tl.constexpr, DEAD2: tl.constexpr, CAP2: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The slope of a divergence in the student's logits, times factor: as ``lit_opd.objective.divergence`` derives it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    logits = _logits(tile + row * stride, columns, inside, bias, dead, temperature, cap, BIAS, DEAD, CAP)
    teacher = _logits(tile2 + row * stride2, columns, inside, bias2, dead2, temperature, cap2, BIAS2, DEAD2, CAP2)
    student = logits - tl.load(student_log + row)
    teacher -= tl.load(teacher_log + row)
    if KIND == _REVERSE:
        slope = tl.exp(student) * (student - teacher - tl.load(centre + row))
    elif KIND == _FORWARD:
        slope = tl.exp(student) - tl.exp(teacher)
    else:
        gap = student - _mixture(student, teacher, log_beta, log_rest) - tl.load(centre + row)
        slope = tl.exp(student) * gap
    slope = slope * tl.load(factor + row)
    if CAP:
        slope = _through_cap(slope, logits, temperature, cap)
    tl.store(out + row * out_stride + columns, slope.to(out.dtype.element_ty), mask=inside)


# -- launches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tile:
    """Logits of some tokens and entries as the product left them, and what makes the distribution's of them.

    Args:
        logits: [n, v], neighbours in memory along v.
        bias: [v] or None.
        dead: uint8 [v], 1 where an entry names no token; None for none.
        temperature: > 0.
        soft_cap: > 0 or None.
    """

    logits: Tensor
    bias: Tensor | None
    dead: Tensor | None
    temperature: float
    soft_cap: float | None

    def shared(self) -> list[Any]:
        """A kernel's arguments of the first head."""
        tile, cap = self.logits, 1.0 if self.soft_cap is None else self.soft_cap
        return [tile, tile.stride(0), tile.shape[1], *self._tables(), float(self.temperature), float(cap)]

    def other(self) -> list[Any]:
        """A kernel's arguments of the second head."""
        cap = 1.0 if self.soft_cap is None else self.soft_cap
        return [self.logits, self.logits.stride(0), *self._tables(), float(cap)]

    def flags(self, suffix: str = "") -> dict[str, bool]:
        """Which of them a kernel reads."""
        found = {"BIAS": self.bias is not None, "DEAD": self.dead is not None, "CAP": self.soft_cap is not None}
        return {name + suffix: value for name, value in found.items()}

    def _tables(self) -> list[Tensor]:
        return [self.logits if table is None else table for table in (self.bias, self.dead)]  # a pointer not followed

    def launch(self, block: int) -> dict[str, Any]:
        """Compile-time arguments."""
        return {"BLOCK": block, "num_warps": 8 if block >= WIDE_BLOCK else 4}

    def grid(self, block: int) -> tuple[int, int]:
        """One program a token and block."""
        return len(self.logits), triton.cdiv(self.logits.shape[1], block)


def sum_one(
    tile: Tile,
    block: int,
    tables: tuple[Tensor, Tensor, Tensor | None],
    *,
    targets: Tensor | None = None,
    picked: Tensor | None = None,
    first: int = 0,
) -> None:
    """Write top, mass and, where there is a table for it, weighted logits of each token and block.

    Args:
        tile: [n, v].
        block: entries of a program, a power of two.
        tables: [blocks, n] float32 views with the row stride of the whole table.
        targets: int64 [n], to write their logits into ``picked`` float32 [n] where they lie in this tile.
        picked: see there.
        first: entry of the vocabulary that the tile's first column is.
    """
    tops, masses, averages = tables
    _sum_one[tile.grid(block)](
        *tile.shared(),
        tops if targets is None else targets, tops if picked is None else picked, tops, masses,
        tops if averages is None else averages, tops.stride(0), first,
        **tile.flags(), PICK=targets is not None, AVERAGE=averages is not None, **tile.launch(block),
    )  # fmt: skip


def sum_two(student: Tile, teacher: Tile, block: int, tables: tuple[Tensor, ...]) -> None:
    """Write top, mass and weighted gap of the student, then of the teacher: six tables [blocks, n] as ``sum_one`` takes them."""
    _sum_two[student.grid(block)](
        *student.shared(), *teacher.other(), *tables, tables[0].stride(0),
        **student.flags(), **teacher.flags("2"), **student.launch(block),
    )  # fmt: skip


def sum_mixed(
    student: Tile,
    teacher: Tile,
    block: int,
    logs: tuple[Tensor, Tensor],
    mix: tuple[float, float],
    tables: tuple[Tensor, ...],
) -> None:
    """Write each block's share of KL(p || m) and KL(q || m).

    Args:
        student: [n, v].
        teacher: [n, v].
        block: entries of a program.
        logs: log-sum-exp of student and teacher, float32 [n].
        mix: log beta and log(1 - beta).
        tables: two [blocks, n] as ``sum_one`` takes them.
    """
    _sum_mixed[student.grid(block)](
        *student.shared(), *teacher.other(), *logs, *mix, *tables, tables[0].stride(0),
        **student.flags(), **teacher.flags("2"), **student.launch(block),
    )  # fmt: skip


def slope_one(
    tile: Tile, block: int, out: Tensor, targets: Tensor, log_normaliser: Tensor, factor: Tensor, first: int
) -> None:
    """Write (softmax - onehot(target)) * factor into ``out`` [n, v], which may be the tile's own logits."""
    _slope_one[tile.grid(block)](
        *tile.shared(), out, out.stride(0), targets, log_normaliser, factor, first, **tile.flags(), **tile.launch(block)
    )


def slope_two(
    student: Tile, teacher: Tile, block: int, out: Tensor, rows: tuple[Tensor, ...], mix: tuple[float, float], kind: int
) -> None:
    """Write a divergence's slope times factor into ``out`` [n, v], which may be the student's own logits.

    Args:
        student: [n, v].
        teacher: [n, v].
        block: entries of a program.
        out: [n, v].
        rows: both log-sum-exps, the centre and the factor, float32 [n] each; of a JSD the factor holds 1 - beta too.
        mix: log beta and log(1 - beta), read by the JSD.
        kind: one of ``KINDS``.
    """
    _slope_two[student.grid(block)](
        *student.shared(), out, out.stride(0), *teacher.other(), *rows, *mix,
        **student.flags(), **teacher.flags("2"), KIND=kind, **student.launch(block),
    )  # fmt: skip
