"""Strategies that know turns, against loops over lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.masked import turn_positions
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.by_turn import AfterObservation, PerTurn, TurnBalanced
from lit_opd.weighting.combinators import BatchMeanOne, Product
from lit_opd.weighting.fractions import FirstFraction, RandomFraction
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.tip import TIP
from lit_opd.weighting.uniform import Uniform
from tests.helpers.signals import FLOAT_FIELDS, random_signal

# sampled tokens (capital turn letter) and observed ones (.) of four rows
ROWS = ["AAA..BBBBB.CC", "AA", "A.B.C.D.....E", "AAAAAAAA...BB"]


def signal(seed: int = 0) -> TokenSignal:
    """Poisoned where a token was observed or is padding."""
    columns = max(map(len, ROWS))
    letters = [row.ljust(columns) for row in ROWS]
    mask = torch.tensor([[letter.isalpha() for letter in row] for row in letters])
    turn = torch.tensor(
        [[max(ord(letter) - ord("A"), 0) if letter.isalpha() else 99 for letter in row] for row in letters]
    )
    found = random_signal(mask, seed=seed)
    poisoned = {name: torch.where(mask, getattr(found, name), torch.nan) for name in FLOAT_FIELDS}
    return replace(found, turn=turn, **poisoned)


def turns(whole: TokenSignal) -> list[tuple[int, list[int]]]:
    """Row and columns of every turn."""
    return [
        (row, [column for column, found in enumerate(letters) if found == letter])
        for row, letters in enumerate(ROWS)
        for letter in sorted({*letters} - {"."})
    ]


def alone(whole: TokenSignal, row: int, columns: list[int]) -> TokenSignal:
    """A turn as a response of its own, without holes."""
    content = {name: getattr(whole, name)[row : row + 1, columns] for name in FLOAT_FIELDS}
    mask = torch.ones(1, len(columns), dtype=torch.bool)
    assert whole.row_keys is not None
    return TokenSignal(mask=mask, row_keys=whole.row_keys[row : row + 1], step=whole.step, **content)


def close(got: Tensor, wanted: list[float]) -> None:
    assert got.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("inner", [ImportanceWeighting(), Product([FirstFraction(0.5), ImportanceWeighting()])])
def test_per_turn_weighs_each_turn_as_a_response_of_its_own(inner: WeightingStrategy):
    whole, strategy = signal(), PerTurn(inner)
    weights, kept = strategy(whole), strategy.kept(whole)
    for row, columns in turns(whole):
        part = alone(whole, row, columns)
        close(weights[row, columns], inner(part)[0].tolist())
        assert kept[row, columns].tolist() == inner.kept(part)[0].tolist()
    assert not weights[~whole.mask].any() and not kept[~whole.mask].any()


def test_per_turn_of_one_turn_is_the_inner_strategy():
    whole = replace(signal(), turn=None)
    assert torch.equal(PerTurn(ImportanceWeighting())(whole), ImportanceWeighting()(whole))


def test_a_batch_scope_inside_compares_all_turns():
    whole = signal()
    inner = TIP(keep_fraction=0.5)
    kept = PerTurn(inner).kept(whole)
    assert PerTurn(inner).scope == "batch" and int(kept.sum()) == -(-int(whole.mask.sum()) // 2)
    close(PerTurn(BatchMeanOne(Uniform()))(whole)[whole.mask], [1.0] * int(whole.mask.sum()))


def test_random_choices_of_two_turns_are_their_own_and_the_first_is_the_rows():
    mask = torch.ones(64, 20, dtype=torch.bool)
    whole = replace(random_signal(mask), turn=(torch.arange(20) // 10).expand(64, 20))
    kept = PerTurn(RandomFraction(0.5)).kept(whole)
    assert set(kept[:, :10].sum(-1).tolist()) == set(kept[:, 10:].sum(-1).tolist()) == {5}
    assert not torch.equal(kept[:, :10], kept[:, 10:])
    first = TokenSignal(
        student_logprobs=whole.student_logprobs[:, :10], teacher_logprobs=whole.teacher_logprobs[:, :10],
        mask=mask[:, :10], row_keys=whole.row_keys, step=whole.step,
    )  # fmt: skip
    assert torch.equal(RandomFraction(0.5).kept(first), kept[:, :10])


@pytest.mark.parametrize(
    "inner", [Uniform(), ImportanceWeighting(), Product([FirstFraction(0.5), ImportanceWeighting()])]
)
def test_every_turn_of_a_row_has_the_same_total_and_the_row_keeps_its_own(inner: WeightingStrategy):
    whole = signal()
    before, weights = inner(whole), TurnBalanced(inner)(whole)
    for row in range(len(ROWS)):
        own = [columns for place, columns in turns(whole) if place == row]
        sums = [sum(before[row, columns].tolist()) for columns in own]
        counted = [value for value in sums if value > 0]
        for columns, value in zip(own, sums, strict=True):
            wanted = sum(sums) / len(counted) if value > 0 else 0.0
            assert sum(weights[row, columns].tolist()) == pytest.approx(wanted, rel=1e-12)
            if value > 0:
                close(weights[row, columns], [v * wanted / value for v in before[row, columns].tolist()])
        assert float(weights[row].sum()) == pytest.approx(float(before[row].sum()), rel=1e-12)
    assert not weights[~whole.mask].any()


def test_after_observation_counts_inside_the_turn():
    whole = signal()
    weights = AfterObservation(count=2, weight=3.0)(whole)
    for row, columns in turns(whole):
        later = ROWS[row][columns[0]] != "A"
        close(weights[row, columns], [3.0 if later and place < 2 else 1.0 for place in range(len(columns))])
    assert not weights[~whole.mask].any()
    close(AfterObservation()(replace(whole, turn=None))[whole.mask], [1.0] * int(whole.mask.sum()))


def test_positions_begin_anew_in_each_turn():
    whole = signal()
    assert whole.turn is not None
    found = turn_positions(whole.mask, torch.where(whole.mask, whole.turn, 0))
    for row, columns in turns(whole):
        assert found[row, columns].tolist() == list(range(1, len(columns) + 1))
    assert not found[~whole.mask].any()


def test_settings_out_of_range_are_named():
    for wrong in ({"count": 0}, {"count": 1.5}, {"weight": -1.0}, {"weight": float("inf")}):
        with pytest.raises(InputError, match=f"AfterObservation.{next(iter(wrong))}"):
            AfterObservation(**wrong)  # type: ignore[arg-type]
    for kind in (PerTurn, TurnBalanced):
        with pytest.raises(InputError, match="strategy` must be a WeightingStrategy"):
            kind(3)  # type: ignore[arg-type]
