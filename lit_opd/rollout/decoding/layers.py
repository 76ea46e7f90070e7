"""Pieces of a decoder layer for one token a row: products with weights, norms, rotary positions, attention.

Under autocast the arithmetic is autocast's: products and attention in 16 bits, the residual stream, norms and rotary positions
in float32. The 16-bit weights are copies, made once when a piece is built and gone with it; a weight that has 16 bits already,
as FSDP2 gathers them, is used as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_opd.masked import at_least_float32

FEW_ROWS = 16  # up to so many a packed product is faster,
LARGE_WEIGHT = 2**17  # from so many elements on

Product = Callable[[Tensor], Tensor]


def product(linears: Sequence[nn.Linear], *, rows: int, half: torch.dtype | None) -> Product:
    """The outputs of linear layers of one input, side by side; weights that have to be copied are copied into one.

    Args:
        linears: layers with as many inputs each.
        rows: of the input.
        half: the dtype of the product, None for the weights' own.
    """
    dtype = linears[0].weight.dtype if half is None else half
    if _packs(linears, rows, half):
        packed, bias = torch.ops.mkldnn._reorder_linear_weight(_weight(linears, dtype), rows), _bias(linears, dtype)
        return lambda states: torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    if len(linears) > 1 and not _casts(linears, half):
        parts = [product([linear], rows=rows, half=half) for linear in linears]
        return lambda states: torch.cat([part(states) for part in parts], -1)
    weight, bias = _weight(linears, dtype), _bias(linears, dtype)
    if half is None:
        return lambda states: F.linear(states, weight, bias)
    return lambda states: F.linear(states.to(dtype), weight, bias)


def two_products(
    first: Sequence[nn.Linear], second: Sequence[nn.Linear], *, rows: int, half: torch.dtype | None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Two of ``product`` as one function, [rows, in] -> [rows, out] and [rows, out']; one product where weights are copied."""
    linears = [*first, *second]
    if not (_packs(linears, rows, half) or _casts(linears, half)):
        one, other = (product(part, rows=rows, half=half) for part in (first, second))
        return lambda states: (one(states), other(states))
    joint, sizes = (
        product(linears, rows=rows, half=half),
        [sum(x.out_features for x in part) for part in (first, second)],
    )
    return lambda states: tuple(joint(states).split(sizes, -1))  # type: ignore[return-value]


def _packs(linears: Sequence[nn.Linear], rows: int, half: torch.dtype | None) -> bool:
    """Large float32 weights that meet few rows on a CPU are packed for oneDNN, which takes half the time of MKL's product."""
    weights = [linear.weight for linear in linears]
    slow = half is None and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    large = all(weight.numel() >= LARGE_WEIGHT for weight in weights)
    return slow and large and rows <= FEW_ROWS and torch.backends.mkldnn.is_available()


def _casts(linears: Sequence[nn.Linear], half: torch.dtype | None) -> bool:
    return half is not None and any(linear.weight.dtype != half for linear in linears)


def _weight(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor:
    weights = [linear.weight.detach().to(dtype) for linear in linears]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _bias(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    zeros = (linear.weight.new_zeros(linear.out_features) for linear in linears)
    return torch.cat(
        [zero if linear.bias is None else linear.bias.detach() for linear, zero in zip(linears, zeros, strict=True)]
    ).to(dtype)


def scale_of(norm: Any) -> tuple[Tensor, float]:
    """What a norm of transformers multiplies by, [H], and its epsilon; Gemma's keep the weight less one."""
    weight = norm.weight.detach()
    return (
        (weight, norm.variance_epsilon)
        if hasattr(norm, "variance_epsilon")
        else (1.0 + at_least_float32(weight), norm.eps)
    )


class Norm:
    """Root-mean-square normalisation over the last dimension; on a CPU in four operations, half the time of ``F.rms_norm``.

    Args:
        weight: [..., size], with a row for each head where heads have norms of their own.
        epsilon: added to the mean square.
        rounds_last: 16-bit states are rounded after a float32 weight met them, as Gemma's norms do, not before.
    """

    def __init__(self, weight: Tensor, epsilon: float, *, rounds_last: bool = False) -> None:
        self.weight, self.epsilon, self.rounds_last, size = weight.detach(), epsilon, rounds_last, weight.shape[-1]
        self.fused = self.weight.device.type != "cpu" or self.weight.dtype.itemsize < torch.float32.itemsize
        self.scaled, self.least = self.weight * size**0.5, self.weight.new_tensor(size * epsilon).sqrt()

    @classmethod
    def of(cls, norm: Any) -> Norm:
        """That of a module of transformers."""
        return cls(*scale_of(norm), rounds_last=not hasattr(norm, "variance_epsilon"))

    def __call__(self, states: Tensor) -> Tensor:
        """[..., size] -> as many, in the dtype of the weight; 16-bit states are rounded before a float32 weight meets them, or,
        where ``rounds_last``, after it."""
        if states.dtype.itemsize < self.weight.dtype.itemsize:
            wide = F.rms_norm(states.to(self.weight.dtype), self.weight.shape[-1:], eps=self.epsilon)
            return (wide * self.weight).to(states.dtype) if self.rounds_last else wide.to(states.dtype) * self.weight
        if not self.fused:
            length = torch.hypot(torch.linalg.vector_norm(states, dim=-1, keepdim=True), self.least)
            return (states / length).mul_(self.scaled)
        if self.weight.ndim > 1:
            return F.rms_norm(states, self.weight.shape[-1:], eps=self.epsilon) * self.weight
        return F.rms_norm(states, self.weight.shape, self.weight, self.epsilon)


def head_norm(attention: Any) -> Norm | None:
    """The norms of query and key heads as one for [B, query heads + heads, size]; None where a layer has none."""
    if not hasattr(attention, "q_norm"):
        return None
    norms, size = (attention.q_norm, attention.k_norm), attention.head_dim
    counts = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    weights = (scale_of(norm)[0].expand(n, size) for norm, n in zip(norms, counts, strict=True))
    like = Norm.of(norms[0])
    return Norm(torch.cat(list(weights)), like.epsilon, rounds_last=like.rounds_last)


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, size], where the two halves of a head are the coordinates of its planes.

    Args:
        heads: queries or keys.
        cos: [B, 1, size].
        sin: [B, 1, size], its first half negated.
    """
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def written(
    cache: tuple[Tensor, Tensor], column: Tensor | int, key: Tensor, value: Tensor, columns: int
) -> list[Tensor]:
    """Write a column of keys and values; the leading columns of both, [B, heads, columns, size].

    Args:
        cache: keys and values, [B, heads, columns or more, size] each.
        column: int64 [1] on the device, or its number where no graph is captured, which is faster on a CPU.
        key: [B, heads, size].
        value: [B, heads, size].
        columns: how many to return.
    """
    for held, new in zip(cache, (key, value), strict=True):
        if isinstance(column, int):
            held.select(2, column).copy_(new)
        else:
            held.index_copy_(2, column, new.unsqueeze(2))
    return [held.narrow(2, 0, columns) for held in cache]


def attended_by_products(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """Attention of one query a row as two batched products: on a CPU twice as fast as its fused kernel.

    Args:
        query: [B, query heads, size]; neighbours share a key.
        keys: [B, heads, columns, size].
        values: [B, heads, columns, size].
        bias: [B, columns], -inf where nothing stands; None where every column counts.
        scale: of the scores, scalar.
    Returns:
        [B, query heads * size].
    """
    rows, heads, columns, size = keys.shape
    grouped, keys = (query * scale).view(rows * heads, -1, size), keys.flatten(0, 1).transpose(1, 2)
    if bias is None:
        scores = torch.bmm(grouped, keys)
    else:
        scores = torch.baddbmm(bias.repeat_interleave(heads, 0).unsqueeze(1), grouped, keys)
    share = scores.softmax(-1, dtype=at_least_float32(scores[:0]).dtype).to(values.dtype)
    return torch.bmm(share, values.flatten(0, 1)).view(rows, -1)


def attended_by_kernel(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """``attended_by_products`` by torch's fused kernels, with the same shapes; ``scale`` is a number.

    The queries that share a key stand where a kernel expects successive queries: no head is repeated, and kernels that know a
    bias but no groups serve too. Returns [B, query heads * size].
    """
    rows, heads, _, size = keys.shape
    grouped, mask = query.reshape(rows, heads, -1, size), None if bias is None else bias[:, None, None]
    return F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale).reshape(rows, -1)
