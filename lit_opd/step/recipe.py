"""What is learned: weighting, advantage, objective, aggregation, which rows count, and how often a batch is used."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lit_opd.advantage import AdvantageTransform
from lit_opd.objective import Aggregation, Objective
from lit_opd.types import FinishReason, Rollout
from lit_opd.weighting.base import WeightingStrategy

Truncated = Literal["keep", "mask", "drop"]


@dataclass(frozen=True)
class Recipe:
    """What a rollout batch is turned into.

    Args:
        weighting: how much each token counts.
        objective: the loss of a token.
        max_new_tokens: response slots, the divisor of the aggregation "constant".
        advantage: transforms of the advantage, in order.
        aggregation: how token losses become one scalar.
        mini_batches: optimizer steps a pass over the batch.
        epochs: passes over the batch.
    """

    weighting: WeightingStrategy
    objective: Objective
    max_new_tokens: int
    advantage: tuple[AdvantageTransform, ...] = ()
    aggregation: Aggregation = "sequence-mean"
    mini_batches: int = 1
    epochs: int = 1

    @property
    def parts(self) -> list[WeightingStrategy | Objective | AdvantageTransform]:
        """Everything that reads the signal."""
        return [self.weighting, self.objective, *self.advantage]

    @property
    def required(self) -> frozenset[str]:
        """Optional signal fields that something reads."""
        return frozenset().union(*(part.requires for part in self.parts))

    @property
    def updates(self) -> int:
        """Optimizer steps a rollout batch makes."""
        return self.mini_batches * self.epochs

    @property
    def needs_scoring_pass(self) -> bool:
        """True when weights or denominators must be known before micro-batches are cut, or the batch is reused."""
        return self.updates > 1 or self.weighting.scope == "batch" or self.weighting.drops_tokens


def apply_truncated(rollout: Rollout, policy: Truncated) -> Rollout:
    """Rows that reached ``max_new_tokens``, not those a length budget cut: "keep" trains on them, "mask" keeps the row without
    any valid token, "drop" removes it before it is scored. Both of the latter leave every denominator. A batch left without
    rows keeps one, fully masked."""
    if policy == "keep":
        return rollout
    finished = rollout.finish_reason != int(FinishReason.LENGTH)
    layout = rollout.layout
    ended = layout.finish_reason != int(FinishReason.LENGTH)
    observed = None if rollout.observed is None else rollout.observed & finished.unsqueeze(-1)
    masked = replace(rollout, mask=rollout.mask & finished.unsqueeze(-1), observed=observed)
    seen = None if layout.observed is None else layout.observed & ended[:, None]
    masked.with_layout(replace(layout, response=layout.response & ended[:, None], observed=seen))
    return masked if policy == "mask" else masked.take(ended.nonzero()[0].tolist() or [0])


def progress(*, step: int, max_steps: int, batches: float, updates: int) -> float:
    """Training progress p in [0, 1] of the coming optimizer step; 1 where the run's length is not known.

    Args:
        step: optimizer steps made so far.
        max_steps: of the run, below 1 for no bound.
        batches: rollout batches of the run where ``max_steps`` is no bound, maybe infinite.
        updates: optimizer steps a batch makes.
    """
    total = max_steps if max_steps > 0 else int(batches) * updates if math.isfinite(batches) else 1
    return 1.0 if total <= 1 else min(1.0, step / (total - 1))
