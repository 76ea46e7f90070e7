"""The prefix ratio that forgets: only the last tokens count, and never for nothing."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from lit_opd.errors import is_integer, require
from lit_opd.masked import positions, valid_columns
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_unit
from lit_opd.weighting.base import DependsOn, WeightingStrategy


class WindowedPrefixRatio(WeightingStrategy):
    """Weights a token by the truncated teacher-to-student ratio of the last tokens before it, and by a floor at least.

        w_t = max(min(exp(sum of A_k over the last window valid tokens before t), 1), floor),   A_k = q_k - s_k

    After a token that the teacher would hardly have written, the teacher's signal counts less for ``window`` tokens and then in
    full again; ``PrefixRatioTilt`` keeps the ratio of the whole prefix.

    In conversations, what the environment said is skipped: the window of a turn's first tokens reaches back into the turn before.
    ``PerTurn`` around it stops that.

    Source: ours, found by the search of docs/search.md; docs/confirm.md has the evidence. The ratio is that of the theory of
    arXiv 2606.22600, see ``PrefixRatioTilt``. Range [floor, 1], the first token has 1; does not keep the mean weight.

    Fails where disagreement does not grow with the position: then it takes weight from tokens whose signal is good.

    Args:
        window: earlier tokens looked at, >= 1; as many as a response has is ``PrefixRatioTilt(1.0, log(floor), 0.0)``.
        floor: smallest weight, in [0, 1]; 1 is ``Uniform``.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, window: int = 8, floor: float = 0.3) -> None:
        super().__init__()
        self.window, self.floor = window, floor
        name = type(self).__name__
        require(is_integer(window) and window >= 1, f"{name}.window", "an integer >= 1", window)
        require(is_unit(floor), f"{name}.floor", "in [0, 1]", floor)

    @property
    def depends_on(self) -> DependsOn:
        """Reads A_k of earlier tokens only."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The default, each option, and the ratio of the token before alone."""
        return [cls(), cls(window=3, floor=0.0), cls(window=1), cls(floor=1.0), cls(window=500, floor=0.1)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """max(min(exp(windowed sum of A), 1), floor), [B, T]; sums in float64."""
        ratio = (signal.teacher_logprobs.double() - signal.student_logprobs.double()).gather(
            1, valid_columns(signal.mask)
        )
        # summed, not subtracted from one another: a sum of all that is infinite has no difference
        windows = pad(ratio, (self.window, 0)).unfold(1, self.window, 1)[:, : ratio.shape[1]]
        place = (positions(signal.mask) - 1).clamp(min=0)
        return windows.sum(-1).gather(1, place).exp().clamp(self.floor, 1.0)
