"""Where the tokens of a rollout stand in what a model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_opd.types import Rollout

FLASH = "flash"  # in the names of attention that is told where rows end


@dataclass(frozen=True)
class Packing:
    """Rows one after the other in one sequence, as attention over sequences of any length reads them.

    Args:
        positions: int64 [1, L], from 0 in each row; also what transformers finds the rows by.
        ends: int32 [rows + 1], where each row begins, and L.
        longest: tokens of the longest row.
    """

    positions: Tensor
    ends: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: NDArray[Any], device: torch.device) -> Packing:
        """Of rows of ``lengths`` >= 1 tokens."""
        ends = numpy.concatenate([[0], numpy.cumsum(lengths)])
        positions = numpy.arange(ends[-1]) - numpy.repeat(ends[:-1], lengths)
        return cls(_moved(positions[None], device), _moved(ends, device).int(), int(lengths.max()))

    def arguments(self, attention: str) -> dict[str, Any]:
        """Of a transformers decoder with that implementation of attention; FlashAttention is told the rows, so that it does not
        read them off the device."""
        told: dict[str, Any] = {"position_ids": self.positions}
        if FLASH in attention:
            told |= {"cu_seq_lens_q": self.ends, "cu_seq_lens_k": self.ends}
            told |= {"max_length_q": self.longest, "max_length_k": self.longest}
        return told


def _moved(values: NDArray[Any], device: torch.device) -> Tensor:
    """On the device as int64, without waiting for it."""
    return torch.from_numpy(numpy.ascontiguousarray(values, dtype=numpy.int64)).to(device, non_blocking=True)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a rollout stand, worked out on the host: using it waits for no device.

    Every row's tokens, sampled or observed, move to its left end, so that causal attention needs no mask and positions count
    from 0. A row's last token scores nothing and is left out. Where the model's attention takes sequences of any length, the
    rows stand one after the other, without padding.

    Args:
        order: int64 [R, L], slots of [prompt, response] (of B x C) in the order in which the model reads them. Padded: R is B
            and L the longest row. Packed: R is 1 and L the sum of all rows.
        states: int64 [N], slots of R x L that score a valid response token.
        tokens: int64 [N], those response tokens (of B x T), in the same row-major order.
        shape: (B, T).
        packing: what a packed sequence needs beside its ids; None where rows are padded.
    """

    order: Tensor
    states: Tensor
    tokens: Tensor
    shape: tuple[int, int]
    packing: Packing | None = None

    @classmethod
    def of(cls, rollout: Rollout, *, own_template: bool, packed: bool = False) -> Places:
        """On the rollout's device."""
        layout, device = rollout.layout, rollout.mask.device
        prompt = layout.teacher if own_template and layout.teacher is not None else layout.prompt
        valid = numpy.concatenate([prompt, layout.read], -1)
        longest = max(2, int(valid.sum(-1).max(initial=0)))
        order = numpy.argsort(~valid, axis=-1, kind="stable")[:, :longest]
        scored = numpy.concatenate([numpy.zeros_like(prompt), layout.response], -1)
        scored = numpy.take_along_axis(scored, order, -1)[:, 1:]
        order = (order + valid.shape[1] * numpy.arange(len(valid))[:, None])[:, :-1]
        packing = None
        if packed and len(order):
            lengths = (valid.sum(-1) - 1).clip(min=1)
            kept = numpy.arange(order.shape[1]) < lengths[:, None]
            order, scored = order[kept][None], scored[kept][None]
            packing = Packing.of(lengths, device)
        shape = (layout.response.shape[0], layout.response.shape[1])
        states, tokens = numpy.flatnonzero(scored), numpy.flatnonzero(layout.response)
        return cls(_moved(order, device), _moved(states, device), _moved(tokens, device), shape, packing)

    def scatter(self, values: Tensor) -> Tensor:
        """[N, ...] values of the valid tokens -> [B, T, ...], 0 where masked, differentiable."""
        rows, columns = self.shape
        flat = values.new_zeros((rows * columns, *values.shape[1:])).index_copy(0, self.tokens, values)
        return flat.view(rows, columns, *values.shape[1:])

    def pick(self, states: Tensor) -> Tensor:
        """[B, L, H] at the scoring slots: [N, H] in row-major order; its backward adds rows, without sorting."""
        return states.flatten(0, 1).index_select(0, self.states)
