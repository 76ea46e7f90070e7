"""Likelihood of given texts."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.objective.base import Objective, TokenLoss
from lit_opd.types import TokenSignal


class Likelihood(Objective):
    """Makes the given tokens likelier, whoever wrote them: supervised fine-tuning.

        loss_t = - w_t s_t,   s_t the student's log-prob of token t at the sampling temperature

    Nats. Meant for texts that were not sampled now (``ReplaySampler``); on the student's own samples its expected gradient is
    zero. No advantage, no teacher and no importance weight enter. With temperature 1 and weights of 1 this is the usual loss of
    fine-tuning, averaged as ``aggregation`` says. The run's teacher says one thing all the same: where it has another tokenizer
    (``AlignedTeacher``), tokens that it cannot score are left out here too, and with its ``chunks="sum"`` a chunk counts as one.
    """

    @property
    def reads_advantage(self) -> bool:
        """No signal of a teacher enters."""
        return False

    def token_loss(
        self, student_logprobs: Tensor, signal: TokenSignal, weights: Tensor, *, divergence: Tensor | None = None
    ) -> TokenLoss:
        """- w_t s_t, [B, T] nats; nothing is ever clipped."""
        return TokenLoss(values=-weights * student_logprobs, clipped=torch.zeros_like(signal.mask))
