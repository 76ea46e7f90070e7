"""What the one-process and the two-process runs both compute."""

from __future__ import annotations

from typing import Any

from lit_opd.types import Rollout
from lit_opd.weighting import BatchMeanOne, FirstFraction, ImportanceWeighting
from tests import fixed

LENGTHS = [5, 1, 9, 7, 3, 9, 2]
PROMPTS = [4, 6, 3, 8, 5, 2, 7]
TRUNCATED = {2, 5}
BUDGET = 17  # four micro-batches on one rank, three on the other


def rollout() -> Rollout:
    """Seven ragged rows, so that two ranks hold four and three."""
    return fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated=TRUNCATED)


def gradient_cases() -> dict[str, dict[str, Any]]:
    """Settings of the module by name: every aggregation, and a strategy of each scope."""
    weightings = {"sequence": ImportanceWeighting, "batch": lambda: BatchMeanOne(ImportanceWeighting())}
    found = {
        f"{aggregation}/{scope}": {"aggregation": aggregation, "weighting": build(), "token_budget": BUDGET}
        for aggregation in ("sequence-mean", "token-mean", "sequence-sum", "constant")
        for scope, build in weightings.items()
    }
    found["dropped tokens"] = {"weighting": FirstFraction(0.3), "token_budget": BUDGET}
    found["masked rows"] = {"weighting": ImportanceWeighting(), "token_budget": BUDGET, "truncated": "mask"}
    found["dropped rows"] = {"weighting": ImportanceWeighting(), "token_budget": BUDGET, "truncated": "drop"}
    return found
