"""The theory's own weight: the teacher-to-student ratio of the prefix."""

from __future__ import annotations

from torch import Tensor

from lit_opd.errors import is_finite, require
from lit_opd.masked import masked_values, running_sum, shifted_right
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_fraction
from lit_opd.weighting.base import DependsOn, WeightingStrategy

LARGEST_EXPONENT = 80.0  # exp(88.7) is the end of float32, and sums of weights must stay finite too


class PrefixRatioTilt(WeightingStrategy):
    """Weights a token by the teacher-to-student probability ratio of the prefix it continues.

        w_t = exp(clip(alpha * sum_{k<t} A_k, low, high)),   A_k = q_k - s_k

    Source: the theory of arXiv 2606.22600 (re-weighting student states to those of the best reachable target, up to a
    suffix factor and a constant, so not "exact"). Range [exp(low), exp(high)]; the first token has 1 where
    low <= 0 <= high. Does not keep the mean weight. Departure: the clip, which bounds the variance;
    alpha = 1, low = -inf, high = 0 is the truncated prefix ratio, the best of our prototype.

    Fails in long responses: small disagreements add up, the weight goes to its lower end and does not come back, also where the
    teacher has found its way again.

    Args:
        alpha: strength of the tilt in (0, 1], 1/(1 + lambda) in the paper.
        low: smallest exponent, -inf for none.
        high: largest exponent, at most 80 so that weights stay finite in float32.
    Raises:
        ValueError: alpha outside (0, 1], NaN, high > 80 or low > high.
    """

    def __init__(self, alpha: float = 0.5, low: float = -5.0, high: float = 5.0) -> None:
        super().__init__()
        self.alpha, self.low, self.high = alpha, low, high
        name = type(self).__name__
        require(is_fraction(alpha), f"{name}.alpha", "in (0, 1]", alpha)
        highest = f"a finite number <= {LARGEST_EXPONENT:g}"
        require(is_finite(high) and high <= LARGEST_EXPONENT, f"{name}.high", highest, high)
        low_is_number = is_finite(low) or low == float("-inf")
        require(low_is_number and low <= high, f"{name}.low", f"a number <= high = {high:g}, or -inf", low)

    @property
    def depends_on(self) -> DependsOn:
        """Reads A_k of earlier tokens only."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The default, the truncated prefix ratio, and a tilt that can only amplify."""
        return [cls(), cls(alpha=1.0, low=float("-inf"), high=0.0), cls(alpha=0.1, low=0.0, high=2.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """exp(clip(alpha * prefix sum of A, low, high)), [B, T]; the sum in float64, exp would magnify its rounding."""
        ratio = signal.teacher_logprobs.double() - signal.student_logprobs.double()
        # shifted, not subtracted: the rounding of A_t - A_t would let the weight at t read token t
        behind = shifted_right(running_sum(masked_values(ratio, signal.mask)))
        return (self.alpha * behind).clamp(self.low, self.high).exp()
