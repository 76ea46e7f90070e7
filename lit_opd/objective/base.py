"""What every objective promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_opd.scoring.listed import Listed
from lit_opd.scoring.shared import SharedHead
from lit_opd.scoring.tiles import Head
from lit_opd.types import TokenSignal

Whose = Literal["student", "teacher"]


@dataclass(frozen=True, eq=False)
class TokenLoss:
    """Per-token loss before aggregation.

    Args:
        values: [B, T] nats with gradient, weighted, 0 where masked.
        clipped: bool [B, T], True where clipping cut the gradient of a token with a weight above 0.
    """

    values: Tensor
    clipped: Tensor


class Objective(ABC):
    """Turns one forward's scores, the signal and the weights into a loss per token."""

    @property
    def requires(self) -> frozenset[str]:
        """Optional ``TokenSignal`` fields it reads; "teacher_distribution" for what ``token_divergence`` needs."""
        return frozenset()

    @property
    def reads_advantage(self) -> bool:
        """False when advantage transforms would have no effect."""
        return True

    @property
    def list_size(self) -> int | None:
        """Entries that ``token_divergence`` reads where the teacher has no head but lists; None where it needs the head."""
        return None

    def whose_list(self, *, asked: bool) -> Whose:
        """Whose likeliest tokens the teacher's lists must hold.

        Args:
            asked: the teacher can be asked about chosen tokens, else it lists its own likeliest ones only.
        Returns:
            "student" or "teacher".
        """
        return "teacher"

    def token_divergence(self, student: Head, teacher: Head | SharedHead | Listed, *, temperature: float) -> Tensor:
        """What an objective that requires "teacher_distribution" makes of both distributions: [N] nats, with gradient.

        Args:
            student: its head.
            teacher: its head, or its lists where ``list_size`` is not None; of one with another vocabulary what both share.
            temperature: divides the logits of heads.
        """
        raise NotImplementedError(f"{type(self).__name__} must define token_divergence")

    @abstractmethod
    def token_loss(
        self, student_logprobs: Tensor, signal: TokenSignal, weights: Tensor, *, divergence: Tensor | None = None
    ) -> TokenLoss:
        """The weighted loss of each token.

        Args:
            student_logprobs: [B, T] nats, with gradient.
            signal: detached; its student log-probs are those before the batch's first update.
            weights: [B, T], detached, 0 where a token does not count.
            divergence: [B, T] nats with gradient, ``token_divergence`` where "teacher_distribution" is required, else None.
        Returns:
            [B, T] nats, and which tokens were clipped.
        """
