"""What is learned: weighting, advantage, objective, aggregation, which rows count, and how often a batch is used."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from lit_opd.advantage import AdvantageTransform
from lit_opd.errors import require
from lit_opd.masked import masked_values
from lit_opd.objective import Aggregation, Likelihood, Objective
from lit_opd.types import FinishReason, Rollout, TokenSignal
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.uniform import Uniform

Truncated = Literal["keep", "mask", "drop"]


class Observer(Protocol):
    """A callback that asks for optional signal fields by name."""

    @property
    def requires(self) -> frozenset[str]:
        """Optional ``TokenSignal`` fields."""


def with_implied(required: frozenset[str]) -> frozenset[str]:
    """``required`` signal fields and those that they are computed from."""
    return required | {"teacher_topk"} if "student_at_teacher_topk" in required else required


class WarmUp:
    """The first steps of a run, which train on saved responses alone (``ReplaySampler``); the teacher still scores them.

    Args:
        steps: optimizer steps, >= 1; a batch that begins before belongs to it as a whole.
        objective: default ``Likelihood()``; ``Divergence("forward_kl")`` where the teacher gives distributions.
        weighting: how much each token counts, default ``Uniform()``.
    Raises:
        InputError: ``steps`` is no integer >= 1.
    """

    def __init__(
        self, steps: int, objective: Objective | None = None, weighting: WeightingStrategy | None = None
    ) -> None:
        is_count = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
        require(is_count, "WarmUp.steps", "an integer >= 1", steps)
        self.steps = steps
        self.objective = objective if objective is not None else Likelihood()
        self.weighting = weighting if weighting is not None else Uniform()

    def recipe(self, later: Recipe) -> Recipe:
        """What is learned until then, of what is learned ``later``: an advantage has no transforms yet."""
        return replace(later, objective=self.objective, weighting=self.weighting, advantage=())


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
        observers: what reads the signal without learning from it; ``requires`` of each is computed too.
    """

    weighting: WeightingStrategy
    objective: Objective
    max_new_tokens: int
    advantage: tuple[AdvantageTransform, ...] = ()
    aggregation: Aggregation = "sequence-mean"
    mini_batches: int = 1
    epochs: int = 1
    observers: tuple[Observer, ...] = ()

    @property
    def parts(self) -> list[WeightingStrategy | Objective | AdvantageTransform | Observer]:
        """Everything that reads the signal."""
        return [self.weighting, self.objective, *self.advantage, *self.observers]

    @property
    def required(self) -> frozenset[str]:
        """Optional signal fields that something reads."""
        return with_implied(frozenset().union(*(part.requires for part in self.parts)))

    @property
    def updates(self) -> int:
        """Optimizer steps a rollout batch makes."""
        return self.mini_batches * self.epochs

    @property
    def needs_scoring_pass(self) -> bool:
        """True when weights, advantages or denominators must be known before micro-batches are cut, or the batch is reused."""
        whole = "batch" in (self.weighting.scope, *(transform.scope for transform in self.advantage))
        return (
            self.updates > 1
            or whole
            or self.weighting.drops_tokens
            or any(part.drops_tokens for part in self.advantage)
        )

    def as_weighed(self, signal: TokenSignal) -> TokenSignal:
        """The signal without a token KL that only an observer or a prediction asked for: ``TIP`` reads one where it is there, and
        looking on must not change weights."""
        learned = [part for part in self.parts if part not in self.observers]
        if signal.token_kl is None or any("token_kl" in part.requires for part in learned):
            return signal
        return replace(signal, token_kl=None, validate=False)

    def weighted(self, signal: TokenSignal, progress: float) -> tuple[Tensor, Tensor]:
        """Weights [B, T], 0 where a token does not count, and bool [B, T], the tokens that count in the denominator.

        Args:
            signal: of the whole batch.
            progress: of the training, in [0, 1].
        Raises:
            InputError: a required field is missing, or a part returned a wrong shape or a value that is not allowed.
        """
        dropping = [transform.kept(signal) for transform in self.advantage if transform.drops_tokens]
        if not dropping:
            weighed = self.as_weighed(signal)
            return self.weighting(weighed, progress), self.weighting.kept(weighed, progress)
        stays = torch.stack(dropping).all(0)
        # A row without any token left is not in the batch, so that no mean over the batch counts it; single tokens that go are
        # still part of the prefix
        present = replace(signal, mask=signal.mask & stays.any(-1, keepdim=True), validate=False)
        weighed = self.as_weighed(present)
        weights, kept = self.weighting(weighed, progress), self.weighting.kept(weighed, progress) & stays
        return masked_values(weights, kept), kept


def apply_truncated(rollout: Rollout, policy: Truncated) -> Rollout:
    """Rows that reached ``max_new_tokens``, not those a length budget cut: "keep" trains on them, "mask" keeps the row without
    any valid token, "drop" removes it before it is scored. Both of the latter leave every denominator. A batch left without
    rows keeps one, fully masked; one left with fewer rows than mini-batches has none in the last of these."""
    if policy == "keep":
        return rollout
    ended = rollout.layout.finish_reason != int(FinishReason.LENGTH)
    masked = rollout.silenced(ended)
    return masked if policy == "mask" else masked.take(ended.nonzero()[0].tolist() or [0])


def progress(*, step: int, total: float) -> float:
    """Training progress p in [0, 1] of the coming optimizer step; 1 where the run's length is not known, or one step.

    Args:
        step: optimizer steps made so far.
        total: of the run, as ``total_steps`` says.
    """
    return 1.0 if total <= 1 or math.isinf(total) else min(1.0, step / (total - 1))


def total_steps(*, max_steps: int, batches: float, updates: int) -> float:
    """Optimizer steps of a run, which ends at the first of its bounds; infinite where it has none.

    Args:
        max_steps: its own bound of steps, below 1 for none.
        batches: rollout batches of all its epochs, maybe infinite.
        updates: optimizer steps a batch makes.
    """
    return min(max_steps if max_steps > 0 else math.inf, batches * updates)
