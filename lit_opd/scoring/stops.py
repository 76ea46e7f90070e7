"""The end of a text as one class of tokens: what ends a response for one model may be written otherwise by another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.scoring.heads import token_logprobs
from lit_opd.scoring.tiles import Head


@dataclass(frozen=True)
class StopClass:
    """Which tokens end a response.

    Args:
        sampled: ids at which a response of the student ends.
        ids: all that count as the same class: those, and at which the scoring model would end.
    """

    sampled: tuple[int, ...]
    ids: tuple[int, ...]


def with_stop_mass(
    logprobs: Tensor, head: Head, targets: Tensor, stops: StopClass, *, temperature: float = 1.0
) -> Tensor:
    """Log-probs of ``targets``, of a stop token in place of its own the log of the mass of its whole class.

        q(stop) = log sum over i in ids of exp(log q_i)

    Args:
        logprobs: [N] nats, of the targets; without gradient.
        head: N hidden states and the head.
        targets: int64 [N].
        stops: the class.
        temperature: > 0, divides the logits.
    Returns:
        [N] nats.
    """
    ends = torch.isin(targets, targets.new_tensor(stops.sampled)).nonzero().squeeze(-1)
    if not len(ends):  # which a head is not asked about
        return logprobs
    there = replace(head, hidden=head.hidden[ends])
    members = [token_logprobs(there, ends.new_full(ends.shape, stop), temperature=temperature) for stop in stops.ids]
    return logprobs.index_copy(0, ends, torch.stack(members).logsumexp(0).to(logprobs.dtype))
