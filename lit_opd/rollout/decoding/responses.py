"""What is drawn, row by row: tokens, their log-probs, and which rows have ended, in buffers that are changed in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_opd.rollout.base import SamplingSettings
from lit_opd.rollout.decoding.drawing import choose


class Responses:
    """The responses of a batch. Beside its ``count`` rows a draw may have further ones that fill a bucket: they have ended, and
    what they draw goes to a row that nobody reads.

    Args:
        uniforms: float64 [B, T], a row's random numbers.
        settings: of the sampling.
    """

    def __init__(self, uniforms: Tensor, settings: SamplingSettings) -> None:
        self.settings, device = settings, uniforms.device
        self.count, self.slots = uniforms.shape
        self.total = self.count
        self.uniforms = F.pad(uniforms, (0, 0, 0, 1)).flatten()
        self.flat_ids = torch.full_like(self.uniforms, settings.pad_id, dtype=torch.int64)
        self.flat_logprobs: Tensor | None = None
        self.stops = torch.tensor(settings.stop_ids, dtype=torch.int64, device=device)
        self.rows = torch.arange(self.count, device=device)  # of the batch, those still written first
        self.place = self.rows * self.slots  # where a row's next token goes
        self.token = torch.full_like(self.rows, settings.pad_id)
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)

    @property
    def ids(self) -> Tensor:
        """int64 [B, T]."""
        return self.flat_ids.view(-1, self.slots)[: self.total]

    @property
    def logprobs(self) -> Tensor:
        """[B, T] nats."""
        assert self.flat_logprobs is not None
        return self.flat_logprobs.view(-1, self.slots)[: self.total]

    def draw(self, logits: Tensor) -> None:
        """The next token of every row from logits [R, V]: shapes stay, nothing is read back to the host."""
        token, logprob = choose(logits, self.uniforms.gather(0, self.place), self.settings)
        if self.flat_logprobs is None:
            self.flat_logprobs = logprob.new_zeros(self.flat_ids.shape)
        self.flat_ids.scatter_(0, self.place, token)
        self.flat_logprobs.scatter_(0, self.place, logprob)
        self.ended.logical_or_((token.unsqueeze(-1) == self.stops).any(-1))
        self.token.copy_(token)
        self.place.add_(1)

    def select(self, kept: Tensor, *, bucket: int) -> None:
        """Go on with some rows.

        Args:
            kept: int64 [R], places among the rows still written.
            bucket: rows of a draw from now on, at least R.
        """
        spare = self.total * self.slots + self.place[:1] % self.slots
        self.count, more = len(kept), bucket - len(kept)
        self.rows = in_place(self.rows, F.pad(self.rows[kept], (0, more), value=self.total))
        self.place = in_place(self.place, torch.cat([self.place[kept], spare.expand(more)]))
        self.ended = in_place(self.ended, F.pad(self.ended[kept], (0, more), value=True))
        self.token = in_place(self.token, F.pad(self.token[kept], (0, more), value=self.settings.pad_id))


def in_place(held: Tensor, new: Tensor) -> Tensor:
    """``new`` [...] in the memory of ``held``, if shape and dtype are the same: what was captured with ``held`` stays valid."""
    return held.copy_(new) if held.shape == new.shape and held.dtype == new.dtype else new
