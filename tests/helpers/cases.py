"""What the one-process and the two-process runs both compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_opd.advantage import RewardExtrapolation, ValueBaseline
from lit_opd.models.student import LoraSettings, StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence
from lit_opd.rollout import DecodeSampler
from lit_opd.turns import Environment, Episode, Response, TurnsSampler
from lit_opd.types import DataRow, PromptBatch, Rollout, TokenSignal
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.by_turn import PerTurn, TurnBalanced
from lit_opd.weighting.combinators import BatchMeanOne
from lit_opd.weighting.decay import LinearDecay
from lit_opd.weighting.fire_rows import FiReRows
from lit_opd.weighting.fractions import FirstFraction
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fixed

LENGTHS = [5, 1, 9, 7, 3, 9, 2]
PROMPTS = [4, 6, 3, 8, 5, 2, 7]
TRUNCATED = {2, 5}
BUDGET = 17  # four micro-batches on one rank, three on the other
SHORT = {
    "max_new_tokens": 24,
    "stop_token_ids": [1, *range(40, 64)],
}  # the two ranks then sample different numbers of columns


def rollout() -> Rollout:
    """Seven ragged rows, so that two ranks hold four and three."""
    return fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated=TRUNCATED)


def rollout_of(settings: dict[str, Any]) -> Rollout:
    """The rows of a gradient case, whose "turns" is taken out of its settings: there all rows heard something at column 2."""
    plain = rollout()
    if not settings.pop("turns", False):
        return plain
    heard = plain.mask & (torch.arange(plain.mask.shape[1]) == 2)
    turn = (torch.arange(plain.mask.shape[1]) >= 2).long().expand(plain.mask.shape)
    return replace(plain, mask=plain.mask & ~heard, observed=heard, turn=turn)


class Uneven(Environment):
    """Rows of the first rank may speak three times, those of the second once."""

    def step(self, state: Episode, response: Response) -> Any:
        """How often it was heard."""
        return f"heard {state.turn}", state.row["n"] % 2 == 1 or state.turn == 3, 1.0


def conversing() -> tuple[TurnsSampler, PromptBatch]:
    """A sampler of conversations, and prompts with their rows."""
    engine = DecodeSampler(max_new_tokens=48, stop_token_ids=[1, *range(20, 64)])
    asked = [{"role": "user", "content": "a"}]
    prompts = rollout().prompts
    data = tuple(DataRow({"n": n}, row_id=name, prompt=asked) for n, name in enumerate(prompts.row_ids))
    return TurnsSampler(engine, Uneven(), max_turn_tokens=8), replace(prompts, data=data)


class TopKMass(WeightingStrategy):
    """The teacher's mass on its three likeliest tokens plus the student's likewise."""

    @property
    def requires(self) -> frozenset[str]:
        """Both lists."""
        return frozenset({"student_topk", "teacher_topk"})

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """[B, T] in [0, 2]."""
        assert signal.student_topk is not None and signal.teacher_topk is not None
        return sum(top.logprobs[..., :3].exp().sum(-1) for top in (signal.student_topk, signal.teacher_topk))


def gradient_cases() -> dict[str, dict[str, Any]]:
    """Settings of the module by name: every aggregation, and a strategy of each scope."""
    weightings = {"sequence": ImportanceWeighting, "batch": lambda: BatchMeanOne(ImportanceWeighting())}
    found = {
        f"{aggregation}/{scope}": {"aggregation": aggregation, "weighting": build(), "token_budget": BUDGET}
        for aggregation in ("sequence-mean", "token-mean", "sequence-sum", "constant")
        for scope, build in weightings.items()
    }
    found["dropped tokens"] = {"weighting": FirstFraction(0.3), "token_budget": BUDGET}
    found["dropped by a strategy"] = {"weighting": FiReRows(0.5), "aggregation": "constant", "token_budget": BUDGET}
    found["masked rows"] = {"weighting": ImportanceWeighting(), "token_budget": BUDGET, "truncated": "mask"}
    found["dropped rows"] = {"weighting": ImportanceWeighting(), "token_budget": BUDGET, "truncated": "drop"}
    found |= {
        f"divergence/{name}": {"objective": objective, "weighting": weighting, "token_budget": BUDGET}
        for name, objective, weighting in (
            ("reverse_kl", Divergence("reverse_kl"), ImportanceWeighting()),
            ("jsd top 6/batch", Divergence("jsd", top_k=6), BatchMeanOne(ImportanceWeighting())),
        )
    }
    found["token kl"] = {"advantage": [ValueBaseline()], "weighting": LinearDecay(0.5), "token_budget": BUDGET}
    found["token kl/batch"] = found["token kl"] | {"weighting": BatchMeanOne(TopKMass())}
    found["reference"] = {"advantage": [RewardExtrapolation(1.5)], "with_reference": True, "token_budget": BUDGET}
    found["turns"] = {"weighting": PerTurn(ImportanceWeighting()), "token_budget": BUDGET, "turns": True}
    found["turns/tokens"] = {"weighting": TurnBalanced(Uniform()), "aggregation": "token-mean", "turns": True}
    found["recomputed"] = {"gradient_checkpointing": True, "weighting": ImportanceWeighting(), "token_budget": BUDGET}
    return found


EMPTY_RANK = {1, 3, 5}  # what the second rank holds: with truncated="drop" nothing is left there
ONE_ROW = {2, 3, 5}  # what is cut where the second rank keeps one row, fewer than mini-batches, and the first three
STEPS = 4  # of the fits that are interrupted after half of them


def momentum(parameters: Any) -> torch.optim.Optimizer:
    """Gradient descent with a state to save."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adapted(folders: tuple[str, str], *, rank: int = 2, **settings: Any) -> OPDModule:
    """A module whose student has adapters, the same ones at every call."""
    torch.manual_seed(5)  # of the adapters' first values
    student = StudentSettings(folders[0], dtype="float64", lora=LoraSettings(rank=rank), **settings)
    return fixed.module(folders, rollout(), student=student, optimizer=momentum, token_budget=BUDGET)


def fit_cases() -> dict[str, dict[str, Any]]:
    """Settings of the module by name, clipping active; "empty rank" goes with ``EMPTY_RANK``, "one row" with
    ``ONE_ROW``."""
    shared: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "gradient_clip_norm": 0.05,
        "token_budget": BUDGET,
    }
    return {
        "clipped": shared | {"weighting": ImportanceWeighting()},
        "empty rank": shared | {"truncated": "drop"},
        "uneven lengths": shared | {"token_budget": 40},
        "empty rank/batch": shared | {"truncated": "drop", "weighting": BatchMeanOne(ImportanceWeighting())},
        "one row": shared | {"truncated": "drop", "mini_batches": 3},
    }


def fit_rollout(name: str) -> Rollout:
    """The rows of a case of ``fit_cases``; of "uneven lengths" one rank holds 113 response tokens, the other 4."""
    if name == "uneven lengths":
        return fixed.rollout(lengths=[30, 1, 25, 1, 28, 2, 30], prompt_lengths=PROMPTS, truncated=set())
    truncated = EMPTY_RANK if name.startswith("empty") else ONE_ROW if name == "one row" else TRUNCATED
    return fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated=truncated)
