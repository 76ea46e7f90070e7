"""What the strategies share that read lists of likely tokens."""

from __future__ import annotations

from lit_opd.errors import require
from lit_opd.lists import is_list_length
from lit_opd.types import LIST_LENGTH
from lit_opd.weighting.base import WeightingStrategy


class _ReadsLists(WeightingStrategy):
    """Reads the leading ``k`` entries of lists, by default of both."""

    k: int

    def _set_k(self, k: int) -> None:
        require(is_list_length(k), f"{type(self).__name__}.k", f"an integer in [1, {LIST_LENGTH}]", k)
        self.k = k

    @property
    def requires(self) -> frozenset[str]:
        """Both lists."""
        return frozenset({"student_topk", "teacher_topk"})

    @property
    def list_length(self) -> int:
        """``k``."""
        return self.k
