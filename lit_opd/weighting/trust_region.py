"""TrOPD: never trust a token more than the student does."""

from __future__ import annotations

from torch import Tensor

from lit_opd.errors import is_integer, require
from lit_opd.streams import stream_seed, token_uniforms
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import DependsOn, WeightingStrategy

_DOMAIN = stream_seed(*b"TrustRegion")


class TrustRegion(WeightingStrategy):
    """Damps tokens that the teacher finds less likely than the student.

        w_t = min(exp(A_t), 1),   A_t = q_t - s_t        (sample: 1 with that probability, else 0)

    Source: TrOPD, reported in arXiv 2606.01249. Range [0, 1]; does not keep the mean weight (over the student's own
    samples it is 1 minus the total variation distance). The sampled variant has the plain one as its expectation; its
    zeros are weights, they stay in the denominator. Reads A_t itself, hence "token".

    Fails where the student has to unlearn: the tokens that the teacher objects to most count least.

    Args:
        sample: draw a 0/1 mask in place of the weight.
        seed: names the draws of ``sample``; they come from (seed, row key, step).
    Raises:
        ValueError: a seed that is no integer.
    """

    def __init__(self, sample: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.sample, self.seed = sample, seed
        require(is_integer(seed), f"{type(self).__name__}.seed", "an integer", seed)

    @property
    def depends_on(self) -> DependsOn:
        """Reads A_t."""
        return "token"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The weight and the mask."""
        return [cls(), cls(sample=True, seed=3)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """exp(min(A, 0)), or a draw with that probability, [B, T]."""
        trust = signal.log_ratio.clamp(max=0.0).exp()
        if not self.sample:
            return trust
        assert signal.row_keys is not None  # the record fills it
        draws = token_uniforms(self.seed, signal.row_keys, signal.step, signal.mask, domain=_DOMAIN)
        return (draws < trust).to(trust.dtype)
