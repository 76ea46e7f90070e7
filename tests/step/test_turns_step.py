"""One step on conversations of three turns, against a slow script that reads every token and scores the sampled ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.types import FinishReason, PromptBatch, Provenance, Rollout
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.by_turn import AfterObservation, PerTurn, TurnBalanced
from lit_opd.weighting.fractions import FirstFraction
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fixed, tiny

# sampled tokens of each turn in capitals, what was answered as dots; an empty row, and one that only heard
ROWS = ["AAA..BBB.C", "A.....B.CCC", "AAAAA", "AA.BBBB..CC", "", "AAA.."]
PROMPTS = [4, 2, 6, 3, 5, 1]
SAME = 1e-10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Padding holds garbage, and so do the sampler's log-probs of what it did not sample."""
    generator = torch.Generator().manual_seed(3)
    columns, slots = max(map(len, ROWS)), max(PROMPTS)
    letters = [row.ljust(columns) for row in ROWS]
    mask = torch.tensor([[letter.isalpha() for letter in row] for row in letters])
    observed = torch.tensor([[letter == "." for letter in row] for row in letters])
    turn = torch.tensor(
        [[max(0, ord(letter) - ord("A")) if letter.isalpha() else 0 for letter in row] for row in letters]
    )
    ids = torch.randint(4, fixed.NUM_LETTERS, (2, len(ROWS), max(columns, slots)), generator=generator)
    prompts = PromptBatch(
        ids=ids[0, :, :slots],
        mask=torch.arange(slots) >= slots - torch.tensor(PROMPTS).unsqueeze(-1),
        row_keys=torch.arange(100, 100 + len(ROWS)),
        row_ids=tuple(f"row-{row}" for row in range(len(ROWS))),
    )
    return Rollout(
        prompts, ids[1, :, :columns], mask, torch.where(mask, 0.0, torch.nan), torch.zeros(len(ROWS), dtype=torch.int8),
        Provenance("fixed"), observed=observed, turn=turn,
    )  # fmt: skip


def slow(
    folders: tuple[str, str], rollout: Rollout, weigh: Callable[[list[float], list[int]], list[Any]], how: str
) -> Any:
    """Loss and gradient of - Agg[ sg(w A) s ], a row at a time; a weight None leaves the denominator."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders)
    rows = []
    for row, letters in enumerate(ROWS):
        prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()
        ids = torch.tensor([prompt + rollout.response_ids[row][: len(letters)].tolist()])
        places = [len(prompt) + column for column, letter in enumerate(letters) if letter.isalpha()]
        tables = [torch.log(torch.softmax(model(ids).logits[0], -1)) for model in (student, teacher)]
        ours, theirs = ([table[place - 1, ids[0, place]] for place in places] for table in tables)
        advantage = [float(q) - float(s) for q, s in zip(theirs, ours, strict=True)]
        weights = weigh([abs(a) for a in advantage], [ord(letter) - ord("A") for letter in letters if letter.isalpha()])
        kept = [(s, w, a) for s, w, a in zip(ours, weights, advantage, strict=True) if w is not None]
        rows += [kept] if kept else []
    tokens = sum(map(len, rows))
    divide = {
        "sequence-mean": lambda row: len(row) * len(rows),
        "token-mean": lambda row: tokens,
        "sequence-sum": lambda row: len(rows),
        "constant": lambda row: len(rows) * max(map(len, ROWS)),
    }[how]
    sum(-(w * a) * s / divide(row) for row in rows for s, w, a in row).backward()
    return sum(-(w * a) / divide(row) for row in rows for s, w, a in row), {
        n: p.grad for n, p in student.named_parameters()
    }


def importance(d: list[float], turns: list[int]) -> list[float]:
    total, behind, found = sum(d) + 1e-8, 0.0, []
    for value in d:
        found.append(1 + 0.5 * min(max(1 - behind / total, 0.0), 1.0))
        behind += value
    return found


def by_turn(d: list[float], turns: list[int]) -> list[float]:
    return [
        w
        for turn in sorted(set(turns))
        for w in importance([x for x, k in zip(d, turns, strict=True) if k == turn], [])
    ]


def balanced(d: list[float], turns: list[int]) -> list[float]:
    return [len(d) / len(set(turns)) / turns.count(turn) for turn in turns]


def after(d: list[float], turns: list[int]) -> list[float]:
    return [2.5 if turn and turns[place - 1] != turn else 1.0 for place, turn in enumerate(turns)]


def halves(d: list[float], turns: list[int]) -> list[Any]:
    return [1.0 if place < -(-len(d) // 2) else None for place in range(len(d))]


def ones(d: list[float], turns: list[int]) -> list[float]:
    return [1.0] * len(d)


CASES: dict[str, tuple[WeightingStrategy, Callable[..., list[Any]]]] = {
    "IW-OPD": (ImportanceWeighting(), importance),
    "per turn": (PerTurn(ImportanceWeighting()), by_turn),
    "balanced": (TurnBalanced(Uniform()), balanced),
    "after": (AfterObservation(count=1, weight=2.5), after),
    "dropped": (FirstFraction(0.5), halves),
}


def module(folders: tuple[str, str], rollout: Rollout, **settings: Any) -> Any:
    return fixed.module(folders, rollout, **({"objective": PolicyLoss(importance_cap=None)} | settings))


@pytest.mark.parametrize(
    ("case", "budget"),
    [("IW-OPD", None), ("per turn", 18), ("balanced", None), ("after", None), ("dropped", 18)],
)
def test_a_step_of_three_turns_equals_the_slow_script(folders, rollout, case, budget):
    strategy, weigh = CASES[case]
    loss, ours = fixed.gradient(module(folders, rollout, weighting=strategy, token_budget=budget), rollout.prompts)
    expected, theirs = slow(folders, rollout, weigh, "sequence-mean")
    assert loss == pytest.approx(float(expected), rel=SAME)
    assert fixed.relative_gap(ours, theirs) < SAME


@pytest.mark.parametrize("how", ["token-mean", "sequence-sum", "constant"])
def test_denominators_count_sampled_tokens_only(folders, rollout, how):
    trained = module(folders, rollout, weighting=Uniform(), aggregation=how)
    loss, ours = fixed.gradient(trained, rollout.prompts)
    expected, theirs = slow(folders, rollout, ones, how)
    assert loss == pytest.approx(float(expected), rel=SAME)
    assert fixed.relative_gap(ours, theirs) < SAME


def test_micro_batches_and_packed_columns_change_nothing_for_a_divergence(folders, rollout):
    found = [
        fixed.gradient(module(folders, rollout, objective=Divergence("reverse_kl"), weighting=PerTurn(ImportanceWeighting()),
                              token_budget=budget), rollout.prompts)[1] for budget in (None, 18)
    ]  # fmt: skip
    assert fixed.relative_gap(*found) < SAME


def test_what_was_observed_is_read_by_both_and_scored_by_none(folders, rollout):
    record = fixed.fit(module(folders, rollout), rollout.prompts).records[0]
    assert not record.signal.log_ratio[~rollout.mask].any() and not record.weights[~rollout.mask].any()
    assert not record.loss[~rollout.mask].any() and int(record.sampled_tokens) == int(rollout.mask.sum())
    assert torch.equal(record.signal.turn, rollout.turn)
    other = rollout.response_ids.clone()
    other[0, 3] = 60  # what row 0 was answered first
    changed = fixed.fit(module(folders, replace(rollout, response_ids=other)), rollout.prompts).records[0]
    for name in ("student_logprobs", "teacher_logprobs"):
        same = getattr(changed.signal, name) == getattr(record.signal, name)
        assert same[0, :3].all() and not same[0, 5:10][rollout.mask[0, 5:10]].any() and same[1:].all()


def test_cut_rows_leave_with_what_they_heard(folders, rollout):
    finish = rollout.finish_reason.clone()
    finish[1] = int(FinishReason.LENGTH)
    cut = replace(rollout, finish_reason=finish)
    left = [0, 2, 3, 4, 5]
    _, expected = fixed.gradient(module(folders, rollout.take(left)), rollout.take(left).prompts)
    for policy in ("mask", "drop"):
        _, ours = fixed.gradient(module(folders, cut, truncated=policy), cut.prompts)
        assert fixed.relative_gap(ours, expected) < 1e-9
