"""A stop token scored with the mass of all stop tokens: by enumeration over a tiny vocabulary, and in whole steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.advantage import ValueBaseline
from lit_opd.errors import InputError
from lit_opd.models.vocabulary import stop_warning
from lit_opd.objective import Divergence
from lit_opd.preflight.module_checks import require_scored
from lit_opd.scoring.stops import StopClass, with_stop_mass
from lit_opd.scoring.tiles import Head, token_logprobs
from lit_opd.teacher import LocalTeacher, RemoteTeacher, RoutedTeacher
from lit_opd.teacher.remote import _missing, _Row
from lit_opd.types import Rollout
from tests.helpers import fake_vllm as fake
from tests.helpers import fixed, tiny

STOPS = (1,)  # of the student; the teacher ends at 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    student, teacher = tiny.pair(tmp_path_factory.mktemp("pair"))
    path = Path(teacher) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 3, 7]}))
    return student, teacher


@pytest.fixture(scope="module")
def rows() -> Rollout:
    return fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})


def loaded(path: str, **settings) -> LocalTeacher:
    teacher = LocalTeacher(path, dtype="float64", **settings)
    teacher.know_stop_ids(STOPS)
    teacher.load(vocabulary=64)
    return teacher


@torch.no_grad()
def probabilities(folder: str, rows: Rollout, row: int, temperature: float = 1.0) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    prompt = rows.prompts.ids[row][rows.prompts.mask[row]]
    response = rows.response_ids[row][rows.mask[row]]
    logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0]
    return torch.softmax(logits / temperature, -1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("ids", [(1,), (1, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_mass_is_the_sum_over_the_class(ids, temperature):
    """Token by token from the softmax; a class of the whole vocabulary has mass 1."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (6, 5))
    head, targets = Head(hidden, weight), torch.tensor([1, 0, 1, 3, 4, 1])
    own = token_logprobs(head, targets, temperature=temperature)
    found = with_stop_mass(own, head, targets, StopClass((1,), ids), temperature=temperature)
    table = torch.softmax(hidden @ weight.T / temperature, -1)
    expected = [
        sum(row[i] for i in ids) if target == 1 else row[target] for row, target in zip(table, targets, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected).log(), rtol=1e-12, atol=1e-12)
    if len(ids) == 5:
        assert float(found[targets == 1].abs().max()) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_only_the_token_that_ends_a_response_changes(folders, rows, temperature):
    own, summed = (loaded(folders[1], stop_mass=how).score(rows, temperature=temperature) for how in ("own", "sum"))
    for row in range(len(rows)):
        table = probabilities(folders[1], rows, row, temperature)
        ids = rows.response_ids[row][rows.mask[row]]
        expected = [
            q[[1, 3, 7]].sum() if token == 1 else q[token] for q, token in zip(table, ids.tolist(), strict=True)
        ]
        mine = summed.logprobs[row][rows.mask[row]]
        torch.testing.assert_close(mine, torch.stack(expected).log(), rtol=1e-6, atol=1e-7)
    changed = own.logprobs != summed.logprobs
    assert torch.equal(changed, rows.mask & (rows.response_ids == 1))
    assert bool((summed.logprobs[changed] > own.logprobs[changed]).all())


def test_the_teachers_own_end_in_the_middle_of_a_response_is_a_token_like_others(folders, rows):
    ids = rows.response_ids.clone()
    ids[0, 1] = 3
    rows = replace(rows, response_ids=ids)
    own, summed = (loaded(folders[1], stop_mass=how).score(rows).logprobs for how in ("own", "sum"))
    assert own[0, 1] == summed[0, 1]


def test_a_step_learns_from_the_mass(folders, rows):
    """The signal of a fit, and the routed teacher's; rows that end have another one than by default."""
    teachers = {"teacher": LocalTeacher(folders[1], dtype="float64", stop_mass="sum")}
    module = fixed.module(folders, rows, **teachers)
    signal = fixed.fit(module, rows.prompts).records[0].signal
    expected = loaded(folders[1], stop_mass="sum").score(rows).logprobs
    torch.testing.assert_close(signal.teacher_logprobs, expected, rtol=1e-6, atol=1e-6)
    inner = LocalTeacher(folders[1], stop_mass="sum")
    routed = RoutedTeacher({"a": LocalTeacher(folders[1]), "b": inner})
    routed.know_stop_ids(STOPS)
    assert inner.stop_ids == STOPS and routed.sums_stops


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": Divergence("forward_kl")},
        {"objective": Divergence("forward_kl", top_k=3)},
        {"advantage": [ValueBaseline()]},
    ],
    ids=["divergence", "top-k", "token KL"],
)
def test_whole_distributions_know_no_class(folders, rows, settings):
    module = fixed.module(folders, rows, teacher=LocalTeacher(folders[1], stop_mass="sum"), **settings)
    with pytest.raises(InputError, match="`model.teacher.stop_mass` must be own with `.*`, got sum: .*stop_token_ids"):
        require_scored(module.recipe, module.teacher, None)


def test_the_warning_points_to_the_setting_and_ends_with_it(folders):
    student, teacher = (LocalTeacher(folder).tokenizers()[0][0] for folder in folders)
    student.eos_token = "<user>"
    default = stop_warning(student, (2,), teacher)
    assert "`model.teacher.stop_mass` sum" in default
    assert "end of turn '<eos>' (1), and would write" in stop_warning(student, (2,), teacher, summed=True)
    assert stop_warning(student, (1, 2), teacher, summed=True) is None
    plain = LocalTeacher(folders[0]).tokenizers()[0][0]
    assert "sum has no effect: there is one stop token, 1" in stop_warning(plain, (1,), plain, summed=True)


def test_other_values_are_refused():
    with pytest.raises(InputError, match="`LocalTeacher.stop_mass` must be own or sum, got 'all'"):
        LocalTeacher("nowhere", stop_mass="all")


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 1}, {"top_k": 63}], ids=["no list", "a short list", "all in the list"]
)
def test_servers_give_the_same_mass(folders, rows, settings):
    """Three rows hold other tokens than their end in a list of one: those are asked for, and nothing where the list has all."""
    requires = frozenset({"teacher_topk"} if settings else ())
    local = loaded(folders[1], stop_mass="sum").score(rows).logprobs
    with fake.serving(folders[1]) as server:
        teacher = RemoteTeacher([server.url], folders[1], stop_mass="sum", rows_per_request=1, **settings)
        teacher.know_stop_ids(STOPS)
        server.max_logprobs = 63
        found = teacher.score(rows, requires=requires).logprobs
        ends = int((rows.mask & (rows.response_ids == 1)).sum())
        assert server.requests == len(rows) + (0 if settings.get("top_k") == 63 else 2 * ends)
    assert torch.allclose(found.double(), local, atol=1e-4, rtol=0)


def test_stops_that_cannot_matter_are_not_asked_for():
    """By hand: two missing of at most 1e-6 each beside 0.5 are a share of 4e-6; beside 1e-3 one of 2e-3."""
    listed = numpy.log(numpy.array([[0.5, 0.4, 1e-6]], numpy.float32))
    row = _Row(listed[:, 0], numpy.array([[1, 9, 8]]), listed)
    assert _missing(row, 0, {1: math.log(0.5)}, (1, 3, 7)) == []
    assert _missing(row, 0, {1: math.log(1e-3)}, (1, 3, 7)) == [3, 7]
    assert row.known(0, 1, (1, 9)) == pytest.approx({1: math.log(0.5), 9: math.log(0.4)})
