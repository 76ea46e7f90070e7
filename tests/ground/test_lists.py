"""What two top-k lists say together, by hand: entries without mass are in no list."""

from __future__ import annotations

import math

import pytest
import torch

from lit_opd.lists import (
    candidates,
    is_list_length,
    leading,
    listed_in,
    named,
    overlap,
    overlap_advantage,
    teacher_mass,
)
from lit_opd.types import TopK


def lists(*rows: list[tuple[int, float]]) -> TopK:
    """[N, K] of (id, probability); probability 0 is an entry without mass."""
    ids = torch.tensor([[token for token, _ in row] for row in rows])
    return TopK(ids, torch.tensor([[p for _, p in row] for row in rows], dtype=torch.float64).log())


STUDENT = lists([(0, 0.5), (7, 0.3), (2, 0.1)], [(4, 0.6), (5, 0.3), (6, 0.1)])
TEACHER = lists([(7, 0.6), (3, 0.2), (0, 0.0)], [(4, 0.2), (0, 0.0), (0, 0.0)])  # id 0 without mass fills its lists


def test_entries_without_mass_are_in_no_list():
    assert listed_in(named(STUDENT), TEACHER).tolist() == [[False, True, False], [True, False, False]]
    assert listed_in(named(TEACHER), TEACHER).tolist() == [[True, True, False], [True, False, False]]


def test_overlap_is_a_share_of_k_tokens():
    assert overlap(STUDENT, TEACHER, 3).tolist() == pytest.approx([1 / 3, 1 / 3])
    assert overlap(STUDENT, TEACHER, 2).tolist() == [0.5, 0.5]
    assert overlap(STUDENT, TEACHER, 1).tolist() == [0.0, 1.0]


def test_the_teachers_mass_is_that_of_its_whole_list_on_the_students_leading_tokens():
    assert teacher_mass(STUDENT, TEACHER, 2).tolist() == pytest.approx([0.6, 0.2])
    assert teacher_mass(STUDENT, TEACHER, 1).tolist() == pytest.approx([0.0, 0.2])


def test_the_advantage_on_shared_tokens_is_a_mean_under_the_student():
    wide = lists([(0, 0.25), (7, 0.6), (2, 0.15)])
    found = overlap_advantage(lists([(0, 0.5), (7, 0.3), (9, 0.1)]), wide, 3)
    want = (0.5 * math.log(0.25 / 0.5) + 0.3 * math.log(0.6 / 0.3)) / 0.8
    assert found.tolist() == pytest.approx([want])
    assert overlap_advantage(STUDENT, TEACHER, 1).isnan().tolist() == [True, False]


def test_candidates_are_the_union_with_each_token_once():
    own = (torch.tensor([3, 8]), torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0]))
    either = candidates(STUDENT, TEACHER, 2, missing=-12.0, sampled=own)
    found = [
        {int(v): (round(float(p), 6), round(float(q), 6)) for v, p, q, here in zip(*row, strict=True) if here}
        for row in zip(either.ids, either.student, either.teacher, either.counted, strict=True)
    ]
    nats = {p: round(math.log(p), 6) for p in (0.1, 0.2, 0.3, 0.5, 0.6)}
    # the sampled 3 has its own log-prob under the student, whose list does not name it; 8 is in no list
    assert found[0] == {0: (nats[0.5], -12.0), 7: (nats[0.3], nats[0.6]), 3: (-1.0, nats[0.2])}
    assert found[1] == {4: (nats[0.6], nats[0.2]), 5: (nats[0.3], -12.0), 8: (-2.0, -4.0)}
    p, q = either.renormalised()
    assert p.exp().sum(-1).tolist() == pytest.approx([1.0, 1.0]) and q.exp().sum(-1).tolist() == pytest.approx(
        [1.0, 1.0]
    )
    assert not p[~either.counted].exp().any()


def test_lists_shorter_than_k_are_whole():
    assert leading(STUDENT, 32).ids.shape == (2, 3) and is_list_length(32)
    assert not any(map(is_list_length, (0, 33, 1.0, True, None)))
