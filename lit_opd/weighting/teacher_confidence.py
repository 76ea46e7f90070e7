"""Trust the teacher less after tokens it found unlikely."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_opd.errors import is_integer, require
from lit_opd.masked import floor_count, positions, running_sum, valid_columns
from lit_opd.types import TokenSignal
from lit_opd.weighting._ranges import is_nonnegative, is_unit
from lit_opd.weighting.base import DependsOn, WeightingStrategy

TILE_ENTRIES = 1 << 22  # window entries held at once: 16 MiB in float32, whatever B, T and the window are


class TeacherConfidence(WeightingStrategy):
    """Weights a token by how likely the teacher found the worst tokens just before it.

        m_t = min(i_t - 1, window)
        Q_t = mean of the largest max(1, floor((1 - quantile) * m_t)) of -q_k over the last m_t valid tokens before t
              (0 where m_t = 0)
        w_t = max(exp(-alpha * Q_t), floor)

    Source: published code of arXiv 2606.22600 (teacher prefix confidence). Range [floor, 1], the first token has 1;
    does not keep the mean weight. Departure: the window counts valid tokens, holes in the mask are skipped.

    Fails where a good continuation is one of many: a teacher with a wide choice finds each of them unlikely.

    Args:
        window: earlier tokens looked at, >= 1.
        quantile: share of the window that is ignored, in [0, 1]; 0 averages all of it, 1 takes the worst token.
        alpha: strength, >= 0; 0 is ``Uniform``.
        floor: smallest weight, in [0, 1].
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, window: int = 64, quantile: float = 0.9, alpha: float = 1.0, floor: float = 0.0) -> None:
        super().__init__()
        self.window, self.quantile, self.alpha, self.floor = window, quantile, alpha, floor
        name = type(self).__name__
        require(is_integer(window) and window >= 1, f"{name}.window", "an integer >= 1", window)
        require(is_unit(quantile), f"{name}.quantile", "in [0, 1]", quantile)
        require(is_nonnegative(alpha), f"{name}.alpha", "a finite number >= 0", alpha)
        require(is_unit(floor), f"{name}.floor", "in [0, 1]", floor)

    @property
    def depends_on(self) -> DependsOn:
        """Reads q_k of earlier tokens only."""
        return "prefix"

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """The published setting and each option."""
        return [cls(), cls(window=4, quantile=0.5), cls(window=1, quantile=1.0), cls(floor=0.3), cls(alpha=0.0)]

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """max(exp(-alpha * Q), floor), [B, T]."""
        place = (positions(signal.mask) - 1).clamp(min=0)
        surprise = (-signal.teacher_logprobs).gather(1, valid_columns(signal.mask))
        worst = self._worst_before(surprise).gather(1, place)
        return (-self.alpha * worst).exp().clamp(min=self.floor)

    def _worst_before(self, surprise: Tensor) -> Tensor:
        """Q of rows without holes: [B, T] -> [B, T]."""
        rows, columns = surprise.shape
        windows = pad(surprise, (self.window, 0), value=float("-inf")).unfold(1, self.window, 1)[:, :columns]
        seen = torch.arange(columns, device=surprise.device).clamp(max=self.window)
        tile = max(1, TILE_ENTRIES // max(1, rows * self.window))
        starts = range(0, columns, tile)
        parts = [self._top_mean(windows[:, at : at + tile], seen[at : at + tile]) for at in starts]
        return torch.cat(parts, 1) if parts else surprise

    def _top_mean(self, windows: Tensor, seen: Tensor) -> Tensor:
        """Mean of the largest entries: [B, C, window], of which the last ``seen`` [C] are tokens -> [B, C]."""
        counts = floor_count(1.0 - self.quantile, seen).clamp(min=1)
        most = max(1, int(floor_count(1.0 - self.quantile, torch.tensor(self.window))))
        sums = running_sum(windows.topk(most, dim=-1).values)
        index = (counts - 1).expand(windows.shape[:2]).unsqueeze(-1)
        means = sums.gather(-1, index).squeeze(-1) / counts
        return torch.where(seen > 0, means, means.new_zeros(()))
