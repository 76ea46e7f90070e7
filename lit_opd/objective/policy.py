"""The policy-gradient objective. The project's one minus sign between advantage and loss is here."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.errors import require
from lit_opd.objective.base import Objective, TokenLoss
from lit_opd.types import TokenSignal


class PolicyLoss(Objective):
    """REINFORCE on the per-token advantage, with PPO's clips for batches that are used more than once.

        ratio_t = exp(s_t - s_old_t)
        gain_t  = min(ratio_t A_t, clamp(ratio_t, 1 - clip, 1 + clip) A_t)
        gain_t  = max(gain_t, dual_clip A_t) where A_t < 0
        loss_t  = - w_t * min(exp(s_old_t - b_t), importance_cap) * gain_t

    On the first update the ratio is exactly 1 and the gradient is that of - w_t A_t s_t. Walk one token: the teacher likes
    it more (A > 0), so the loss falls as s rises. Source: method.md sections 0 and 4.5; PPO clip 0.2, dual clip 3.0 and the
    truncated importance weight 5.0 are the published run's.

    Args:
        clip: half-width of the trust interval, in (0, 1); None for no clipping.
        dual_clip: bound on the loss of negative advantages, > 1; None for none.
        importance_cap: bound on the sampler-to-trainer importance weight, > 0; None leaves the weight out.
    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self, clip: float | None = 0.2, dual_clip: float | None = 3.0, importance_cap: float | None = 5.0
    ) -> None:
        self.clip, self.dual_clip, self.importance_cap = clip, dual_clip, importance_cap
        name = type(self).__name__
        require(clip is None or 0 < clip < 1, f"{name}.clip", "in (0, 1) or null", clip)
        require(dual_clip is None or dual_clip > 1, f"{name}.dual_clip", "> 1 or null", dual_clip)
        require(importance_cap is None or importance_cap > 0, f"{name}.importance_cap", "> 0 or null", importance_cap)

    def token_loss(
        self, student_logprobs: Tensor, signal: TokenSignal, weights: Tensor, *, divergence: Tensor | None = None
    ) -> TokenLoss:
        """loss_t of the class, [B, T] nats; clipped where the gain is not ratio_t A_t and the weight not 0."""
        advantage = signal.effective_advantage
        ratio = (student_logprobs - signal.student_logprobs).exp()
        unclipped = ratio * advantage
        gain = unclipped
        if self.clip is not None:
            gain = torch.minimum(gain, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        if self.dual_clip is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual_clip * advantage), gain)
        clipped = (gain != unclipped) & signal.mask & (weights > 0)
        return TokenLoss(values=-weights * self._importance(signal) * gain, clipped=clipped)

    def _importance(self, signal: TokenSignal) -> Tensor:
        """[B, T] detached truncated importance weight, 1 where the sampler's log-probs are not known."""
        if self.importance_cap is None or signal.sampler_logprobs is None:
            return torch.ones_like(signal.student_logprobs)
        return (signal.student_logprobs - signal.sampler_logprobs).exp().clamp(max=self.importance_cap)
