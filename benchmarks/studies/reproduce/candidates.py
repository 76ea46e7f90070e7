"""Weightings that docs/search.md and docs/default-search.md try and the library does not have: they ship only if they win."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_opd.distributed import all_sum
from lit_opd.masked import masked_values, shifted_right
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import DependsOn, Scope, WeightingStrategy
from lit_opd.weighting.combinators import Product


def moving_sum(values: Tensor, window: int) -> Tensor:
    """Sum over the last ``window`` columns, the present one included, [B, T]."""
    sums = values.double().cumsum(-1)
    return sums - nn.functional.pad(sums, (window, 0))[:, : sums.shape[1]]


class WindowedRatio(WeightingStrategy):
    """The prefix ratio of the last ``window`` tokens alone: what the teacher forgave long ago does not count.

        w_t = exp(clip(sum_{t-window <= k < t} A_k, low, 0))

    Args:
        window: tokens looked back at, >= 1.
        low: smallest exponent, <= 0.
    """

    def __init__(self, window: int = 8, low: float = -3.0) -> None:
        super().__init__()
        self.window, self.low = window, low

    @property
    def depends_on(self) -> DependsOn:
        """Reads A_k of earlier tokens only."""
        return "prefix"

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """exp(clip(windowed sum of A, low, 0)), [B, T]."""
        ratio = masked_values(signal.log_ratio, signal.mask)
        return shifted_right(moving_sum(ratio, self.window)).clamp(self.low, 0.0).exp()


class TeacherEntropy(WeightingStrategy):
    """What reads the teacher's entropy up to t, which the tokens before t decide."""

    @property
    def requires(self) -> frozenset[str]:
        """The teacher's entropy."""
        return frozenset({"teacher_entropy"})

    @property
    def depends_on(self) -> DependsOn:
        """Reads q_k of earlier tokens, and H_k up to the token's own."""
        return "prefix"


class SurpriseDrift(TeacherEntropy):
    """Drift measured by the teacher's surprise beyond what it expects itself, not by the ratio.

        w_t = exp(clip(alpha * sum_{k<t} (q_k + H^T_k), low, 0))

    For a prefix that the teacher writes itself the sum is a martingale of mean 0.

    Args:
        alpha: strength, > 0.
        low: smallest exponent, <= 0.
    """

    def __init__(self, alpha: float = 1.0, low: float = -3.0) -> None:
        super().__init__()
        self.alpha, self.low = alpha, low

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """exp(clip(alpha * sum of (q + H) before t, low, 0)), [B, T]."""
        assert signal.teacher_entropy is not None  # required above
        excess = masked_values(signal.teacher_logprobs + signal.teacher_entropy, signal.mask).double()
        return (self.alpha * shifted_right(excess.cumsum(-1))).clamp(self.low, 0.0).exp()


class TeacherCertainty(TeacherEntropy):
    """How sure the teacher has been lately, which comes back where it finds its feet again.

        w_t = max(exp(-alpha * mean of H^T over the last ``window`` tokens, t included), floor)

    Args:
        window: tokens, >= 1.
        alpha: strength, > 0.
        floor: smallest weight, in [0, 1].
    """

    def __init__(self, window: int = 4, alpha: float = 1.0, floor: float = 0.0) -> None:
        super().__init__()
        self.window, self.alpha, self.floor = window, alpha, floor

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """max(exp(-alpha * windowed mean of H), floor), [B, T]."""
        assert signal.teacher_entropy is not None  # required above
        entropy = masked_values(signal.teacher_entropy, signal.mask)
        counts = moving_sum(signal.mask.double(), self.window).clamp(min=1.0)
        return (-self.alpha * moving_sum(entropy, self.window) / counts).exp().clamp(min=self.floor)


class Largest(Product):
    """The largest of several strategies' weights in place of their product: a floor that is itself a strategy.

    Args:
        strategies: at least one, none that drops tokens.
    """

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """Elementwise maximum, [B, T]."""
        return torch.stack([child.weights(signal, progress).double() for child in self.children_in_order]).amax(0)


# -- the second search: forgetting by degrees, and a teacher whose reliability is estimated ----------------------------------


class LeakyRatio(WeightingStrategy):
    """The prefix ratio that forgets by degrees, in place of a window's edge.

        w_t = max(exp(min(sum_{k<t} memory^(t-1-k) A_k, 0)), floor)

    Args:
        memory: what a token keeps of its say from one token to the next, in [0, 1]; 1 is the whole prefix.
        floor: smallest weight, in [0, 1].
    """

    def __init__(self, memory: float = 0.8, floor: float = 0.3) -> None:
        super().__init__()
        self.memory, self.floor = memory, floor

    @property
    def depends_on(self) -> DependsOn:
        """Reads A_k of earlier tokens only."""
        return "prefix"

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """max(exp(min(leaky sum of A, 0)), floor), [B, T]; sums in float64."""
        ratio = masked_values(signal.log_ratio, signal.mask).double()
        sums, held = [], torch.zeros_like(ratio[:, :1])
        for column in ratio.split(1, dim=-1):
            sums.append(held)
            held = self.memory * held + column
        return torch.cat(sums, -1).exp().clamp(self.floor, 1.0)


def agreement(signal: TokenSignal) -> Tensor:
    """min(p_T / p_S, 1) of each sampled token, [B, T] float64, 0 off the mask.

    Under the student its mean is 1 - TV, the total variation between the two distributions: what they have in common.
    """
    ratio = masked_values(signal.log_ratio, signal.mask).double().exp().clamp(max=1.0)
    return torch.where(signal.mask, ratio, 0.0)


def since_error(signal: TokenSignal, nats: float) -> Tensor:
    """Columns since the last earlier token with A <= -nats, int64 [B, T]; 0 where there is none."""
    error = (signal.log_ratio <= -nats) & signal.mask
    columns = torch.arange(error.shape[1], device=error.device).expand_as(error)
    last = torch.where(error, columns, -1).cummax(-1).values
    before = nn.functional.pad(last, (1, 0), value=-1)[:, :-1]
    return torch.where(before >= 0, columns - before, 0)


class Reliability(WeightingStrategy):
    """What estimates from a batch how much of the agreement the teacher and the student regain after an error.

    An error is a token with A <= -nats. Agreement is ``agreement``, and what is regained is its mean after an error, divided by
    its mean on prefixes without one: 1 where the teacher is as near to the student as before, whatever that was.

    Args:
        nats: from which disagreement on a token is an error, > 0.
        prior: tokens with the agreement of a prefix without an error that are added to each mean.
    """

    def __init__(self, nats: float = 3.0, prior: float = 8.0) -> None:
        super().__init__()
        self.nats, self.prior = nats, prior

    @property
    def scope(self) -> Scope:
        """Averages over all rows."""
        return "batch"

    def regained(self, signal: TokenSignal, group: Tensor, count: int) -> Tensor:
        """Mean agreement of the groups 1 to ``count`` (of ``group``, int64 [B, T]) over group 0: [count + 1] in [0, 1]."""
        flat, mask = group.flatten(), signal.mask.double()
        values = torch.stack([agreement(signal).flatten(), mask.flatten()])
        total, tokens = all_sum(values.new_zeros(2, count + 1).index_add_(1, flat, values)).unbind()
        whole = total[0] / tokens[0] if tokens[0] > 0 else torch.ones_like(total[0])
        means = (total + self.prior * whole) / (tokens + self.prior)
        share = (means / whole if whole > 0 else torch.ones_like(means)).clamp(max=1.0)
        share[0] = 1.0
        return share


class RecoveryCurve(Reliability):
    """Weighs a token by the agreement that is regained, on average over the batch, as far after an error as it stands.

        d_t = tokens since the last token before t with A <= -nats, at most ``reach``;   w_t = r_{d_t},   r_0 = 1 (no error yet)
        r_d = min(mean agreement of all tokens with d_t = d / mean agreement of those with none, 1)

    Window and floor of the windowed ratio become one curve that is measured.

    Args:
        nats, prior: see ``Reliability``.
        reach: distances told apart, >= 1; what is farther away counts as this far.
    """

    def __init__(self, nats: float = 3.0, prior: float = 8.0, reach: int = 24) -> None:
        super().__init__(nats, prior)
        self.reach = reach

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """r of each token's distance, [B, T]."""
        distance = since_error(signal, self.nats).clamp(max=self.reach)
        return self.regained(signal, distance, self.reach)[distance]


class AdaptiveFloor(Reliability):
    """The windowed ratio, never below the share of the agreement that is regained inside the window.

        w_t = max(min(exp(sum of A_k over the last window tokens), 1), r),   r as in ``Reliability``, of the tokens with an error
        among the last ``window``

    A teacher that stays right after errors has r near 1, and all weights are.

    Args:
        nats, prior: see ``Reliability``.
        window: tokens, >= 1.
    """

    def __init__(self, nats: float = 3.0, prior: float = 8.0, window: int = 8) -> None:
        super().__init__(nats, prior)
        self.window = window

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """max(windowed ratio, r), [B, T]."""
        distance = since_error(signal, self.nats)
        near = ((distance > 0) & (distance <= self.window)).long()
        floor = self.regained(signal, near, 1)[1]
        ratio = masked_values(signal.log_ratio, signal.mask)
        return shifted_right(moving_sum(ratio, self.window)).clamp(max=0.0).exp().clamp(min=floor)
