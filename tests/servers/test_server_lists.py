"""Distributions from servers: lists of the likeliest tokens, and of chosen ones, against the local teacher and full tables."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.advantage import GroupReward, InfluenceShrinkage, RewardExtrapolation, ValueBaseline
from lit_opd.errors import InputError, ServerError
from lit_opd.evaluation import Reward
from lit_opd.objective import Divergence
from lit_opd.preflight.estimate import _listed
from lit_opd.preflight.memory import LISTED, Held, Rank, Workload
from lit_opd.preflight.module_checks import require_scored
from lit_opd.preflight.plan import read_plan
from lit_opd.preflight.sizes import model_size
from lit_opd.scoring.model import ScoringModel
from lit_opd.servers.client import Malformed
from lit_opd.step.micro_batches import MicroBatches
from lit_opd.step.recipe import Recipe
from lit_opd.step.scores import Scores
from lit_opd.step.token_budget import TokenBudget
from lit_opd.teacher import CachedTeacher, LocalTeacher, RemoteTeacher, RoutedTeacher
from lit_opd.teacher.answers import asked_logprobs, top_lists
from lit_opd.teacher.remote import _chosen_body, _read
from lit_opd.types import LIST_LENGTH, Rollout
from lit_opd.weighting.cdd import CDD
from lit_opd.weighting.combinators import Product, Shuffled
from lit_opd.weighting.entropy_gate import EntropyGate
from lit_opd.weighting.fire import FiRe
from lit_opd.weighting.prune_opd import PruneOPD
from lit_opd.weighting.tip import TIP
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fake_vllm as fake
from tests.helpers import fixed, tiny

FAST = {"timeout": 2.0, "retry_seconds": 3.0, "start_seconds": 1.0, "rows_per_request": 2}
LISTS = frozenset({"teacher_topk"})
CPU = read_plan({"accelerator": "cpu", "devices": 1}, strategy="auto", memory_gb=1.0)
BOTH = LISTS | {"teacher_entropy"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def server(folders):
    with fake.serving(folders[1]) as running:
        yield running


@pytest.fixture(scope="module")
def rows() -> Rollout:
    return fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})


def remote(folders, server, **changes) -> RemoteTeacher:
    return RemoteTeacher([server.url], folders[1], **(FAST | {"top_k": 20} | changes))


@torch.no_grad()
def tables(folder: str, rows: Rollout) -> torch.Tensor:
    """Log-probs [B, T, V], row by row without padding; 0 where masked."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = torch.zeros(*rows.mask.shape, 64)
    for row in range(len(rows)):
        prompt = rows.prompts.ids[row][rows.prompts.mask[row]]
        response = rows.response_ids[row][rows.mask[row]]
        scored = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0].log_softmax(-1)
        out[row, : len(response)] = scored[len(prompt) - 1 : -1]
    return out


# -- what a teacher gives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 20, 63])
def test_lists_are_the_likeliest_of_the_teachers_tables(folders, server, rows, k):
    table = tables(folders[1], rows)
    scores = remote(folders, server, top_k=k).score(rows, requires=LISTS)
    best = table.topk(k)
    assert torch.equal(scores.topk.ids[rows.mask], best.indices[rows.mask])
    assert torch.allclose(scores.topk.logprobs[rows.mask], best.values[rows.mask], atol=1e-5, rtol=0)
    assert not scores.topk.ids[~rows.mask].any() and not scores.topk.logprobs[~rows.mask].any()
    sampled = table.gather(-1, rows.response_ids.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(scores.logprobs, sampled * rows.mask, atol=1e-5, rtol=0)
    assert scores.entropy is None


def test_chosen_tokens_are_scored_beside_the_lists(folders, server, rows):
    server.scores_ids = True
    table = tables(folders[1], rows)
    chosen = torch.randint(0, 64, (*rows.mask.shape, 7), generator=torch.Generator().manual_seed(0))
    teacher = remote(folders, server)
    scores = teacher.score_candidates(rows, chosen, requires=LISTS)
    assert torch.equal(scores.candidates.ids, chosen)
    wanted = table.gather(-1, chosen) * rows.mask.unsqueeze(-1)
    assert torch.allclose(scores.candidates.logprobs, wanted, atol=1e-5, rtol=0)
    plain = teacher.score(rows, requires=LISTS)
    assert torch.allclose(scores.logprobs, plain.logprobs, atol=1e-6, rtol=0)
    assert torch.equal(scores.topk.ids, plain.topk.ids)
    assert teacher.score_candidates(rows, chosen).topk is None


@pytest.mark.parametrize("bound", ["lower", "upper"])
def test_the_entropy_is_bounded(folders, server, rows, bound):
    table = tables(folders[1], rows)
    exact = -(table.exp() * table).sum(-1)
    teacher = remote(folders, server, top_k=4, entropy_bound=bound)
    assert teacher.provides == BOTH
    found = teacher.score(rows, requires=frozenset({"teacher_entropy"}))
    assert found.topk is None and not found.entropy[~rows.mask].any()
    gap = (exact - found.entropy if bound == "lower" else found.entropy - exact)[rows.mask]
    assert float(gap.min()) > -1e-5 and float(gap.max()) > 0.01


def test_tokens_without_a_name_are_not_in_the_lists(folders, server, rows):
    teacher = remote(folders, server, top_k=10)
    with pytest.warns(UserWarning, match="64 embedding rows"):
        teacher.load(vocabulary=43)
    best = tables(folders[1], rows).topk(10)
    foreign = best.indices >= 43
    found = teacher.score(rows, requires=LISTS).topk
    assert bool(foreign[rows.mask].any())
    assert torch.equal(torch.isinf(found.logprobs[rows.mask]), foreign[rows.mask])
    assert torch.equal(found.ids[~foreign & rows.mask.unsqueeze(-1)], best.indices[~foreign & rows.mask.unsqueeze(-1)])


def test_rows_without_valid_tokens_are_not_sent(folders, server, rows):
    empty = replace(rows, mask=torch.zeros_like(rows.mask))
    found = remote(folders, server).score(empty, requires=LISTS)
    assert found.topk.ids.shape == (*rows.mask.shape, 20) and server.requests == 0


def test_rows_go_to_the_teacher_they_name_and_lists_are_cut_to_the_shortest(folders, server, rows):
    named = replace(rows, prompts=replace(rows.prompts, teachers=("b", "a", "a", "b", "a", "b")))
    near = LocalTeacher(folders[0])
    near.load(vocabulary=64)
    routed = RoutedTeacher({"a": near, "b": remote(folders, server)})
    assert routed.provides == LISTS and routed.list_size == 20 < LIST_LENGTH
    found = routed.score(named, requires=LISTS).topk
    for row, folder in enumerate([folders[1], folders[0], folders[0], folders[1], folders[0], folders[1]]):
        best = tables(folder, rows)[row].topk(20).indices
        assert torch.equal(found.ids[row][rows.mask[row]], best[rows.mask[row]])


# -- a step ------------------------------------------------------------------------------------------------------------


def trained(folders, rows, teacher, objective, **settings):
    module = fixed.module(folders, rows, teacher=teacher, dtype="float32", objective=objective, **settings)
    return fixed.gradient(module, rows.prompts)


SLOW = pytest.mark.slow
KINDS = [("reverse_kl", "student"), ("forward_kl", "teacher"), ("jsd", "teacher"), ("jsd", "student")]
KINDS += [pytest.param("reverse_kl", "teacher", marks=SLOW), pytest.param("forward_kl", "student", marks=SLOW)]


@pytest.mark.parametrize(("kind", "whose"), KINDS)
def test_a_step_with_a_server_equals_the_local_one(folders, server, rows, kind, whose):
    """Loss and gradient, the batch cut into micro-batches; of the teacher's list the first 12 of 20 are read."""
    server.scores_ids = whose == "student"
    spec = Divergence(kind, top_k=12, top_k_of=whose)
    settings = {"token_budget": 40, "weighting": Uniform()}
    loss, gradient = trained(folders, rows, remote(folders, server), spec, **settings)
    expected, theirs = trained(folders, rows, LocalTeacher(folders[1]), spec, **settings)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert fixed.relative_gap(gradient, theirs) < 1e-4


@pytest.mark.parametrize("asked", [True, False])
def test_reverse_kl_keeps_the_students_tokens_where_servers_can_be_asked(folders, server, rows, asked):
    server.scores_ids = asked
    settings = {"weighting": Uniform()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss, _ = trained(folders, rows, remote(folders, server), Divergence("reverse_kl", top_k=3), **settings)
    told = [str(w.message) for w in said if "keeps the teacher's 3 likeliest" in str(w.message)]
    assert len(told) == (not asked)
    whose = "student" if asked else "teacher"
    local = LocalTeacher(folders[1])
    expected, _ = trained(folders, rows, local, Divergence("reverse_kl", top_k=3, top_k_of=whose), **settings)
    other, _ = trained(
        folders, rows, local, Divergence("reverse_kl", top_k=3, top_k_of="teacher" if asked else "student"), **settings
    )
    assert loss == pytest.approx(expected, abs=1e-5) and abs(loss - other) > 1e-3


def test_lists_serve_every_update_of_a_batch(folders, server, rows):
    spec, settings = Divergence("forward_kl", top_k=12), {"mini_batches": 2, "epochs": 2, "dtype": "float32"}
    runs = []
    for teacher in (remote(folders, server), LocalTeacher(folders[1])):
        module = fixed.module(folders, rows, teacher=teacher, objective=spec, **settings)
        fixed.fit(module, rows.prompts, steps=4)
        runs.append(fixed.weights(module))
    start = fixed.module(folders, rows, **settings)
    start.configure_model()
    moved = fixed.relative_gap(runs[0], fixed.weights(start))
    assert fixed.relative_gap(*runs) < 1e-3 * moved


def test_a_gate_reads_the_bound(folders, server, rows):
    """The weights are those of the bound's own comparison with the threshold, by the tables."""
    table = tables(folders[1], rows)
    best = table.topk(20).values
    rest = (1 - best.exp().sum(-1)).clamp(min=1e-9)
    lower = -(best.exp() * best).sum(-1) - rest * rest.log()
    threshold = float(lower[rows.mask].median()) + 1e-4
    teacher = remote(folders, server, entropy_bound="lower")
    module = fixed.module(folders, rows, teacher=teacher, dtype="float32", weighting=EntropyGate(threshold, beta=0.25))
    record = fixed.fit(module, rows.prompts).records[0]
    expected = torch.where(lower <= threshold, 1.0, 0.25) * rows.mask
    assert torch.equal(record.weights, expected) and len(expected[rows.mask].unique()) == 2


# -- what the student, the run or a third model knows -------------------------------------------------------------------


class ByLength(Reward):
    """The number of tokens."""

    def score(self, responses, rollout):
        return rollout.lengths.tolist()


GROUPS = {"reward": ByLength(), "advantage": [GroupReward()]}
KNOWN_ELSEWHERE = {  # without lists of the teacher
    "student's entropy": {"weighting": TIP(0.5)},
    "student's list": {"advantage": [InfluenceShrinkage()]},
    "reward": GROUPS,
    "reference": {"with_reference": True, "advantage": [RewardExtrapolation(1.5)]},
}
BESIDE_LISTS = {
    "student at the teacher's list": {"weighting": CDD(rate=1.0, floor=0.1)},
    "lists of both": {"weighting": PruneOPD()},
    "lists, for a divergence too": {"weighting": TIP(0.5), "objective": Divergence("reverse_kl", top_k=12)},
    "entropies of both": {"weighting": FiRe()},
}
PLACES = {
    "alone": lambda teacher, folder: teacher,
    "routed": lambda teacher, folder: RoutedTeacher({"a": teacher}),
    "cached": lambda teacher, folder: CachedTeacher(teacher, str(folder), revision="one"),
}


def learned(folders, rows, teacher, **settings):
    """The record of a step."""
    module = fixed.module(folders, rows, teacher=teacher, dtype="float32", **settings)
    return fixed.fit(module, rows.prompts).records[0]


def in_pairs(rows: Rollout, teacher: str | None = None) -> Rollout:
    """Two rows a prompt, which name a teacher."""
    names = tuple(f"row-{row // 2}" for row in range(len(rows)))
    return replace(rows, prompts=replace(rows.prompts, row_ids=names, teachers=(teacher,) * len(rows)))


@pytest.mark.parametrize("name", sorted(KNOWN_ELSEWHERE | BESIDE_LISTS))
def test_a_server_is_asked_for_its_own_part_of_what_is_read(folders, server, rows, name):
    """Weights and advantages are those with a local teacher; a list of all tokens but one bounds the entropy exactly."""
    lists = {} if name in KNOWN_ELSEWHERE else {"top_k": 63, "entropy_bound": "lower"}
    settings = (KNOWN_ELSEWHERE | BESIDE_LISTS)[name]
    rows = in_pairs(rows)
    server.scores_ids = True
    found = learned(folders, rows, remote(folders, server, **({"top_k": None} | lists)), **settings)
    expected = learned(folders, rows, LocalTeacher(folders[1]), **settings)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(found.weights, expected.weights)
    close(found.signal.effective_advantage, expected.signal.effective_advantage)
    assert float(found.weights.std()) > 0 or float(found.signal.effective_advantage.std()) > 0


@pytest.mark.parametrize("place", sorted(PLACES))
def test_so_is_one_inside_another_teacher(folders, server, rows, tmp_path, place):
    rows, settings = in_pairs(rows, "a"), GROUPS | {"weighting": CDD(rate=1.0, floor=0.1)}
    found = learned(folders, rows, PLACES[place](remote(folders, server), tmp_path), **settings)
    expected = learned(folders, rows, LocalTeacher(folders[1]), **settings)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_servers_cannot_do_is_said_before_the_run(folders, server):
    server.max_logprobs = 20
    remote(folders, server).check(temperature=1.0, tokens=20)
    with pytest.raises(
        InputError, match="`model.teacher.top_k` must be at most.*got 21: .*greater than max allowed: 20"
    ):
        remote(folders, server, top_k=21).check(temperature=1.0, tokens=20)
    with pytest.raises(InputError, match="below the 64 entries of the vocabulary, got 64"):
        remote(folders, server, top_k=64).check(temperature=1.0, tokens=20)
    with pytest.raises(InputError, match="temperature.*0.7"):
        remote(folders, server).check(temperature=0.7, tokens=20)
    with pytest.raises(InputError, match="rows_per_request.*got 4 with rows of up to 20.*set it to 1"):
        remote(folders, server, rows_per_request=4, max_response_bytes=40_000).check(temperature=1.0, tokens=20)
    with pytest.raises(InputError, match="set it to 1 and `max_response_bytes` to"):
        remote(folders, server, max_response_bytes=10_000).check(temperature=1.0, tokens=20)
    server.always = fake.changed(lambda a: a["choices"][0].update(prompt_logprobs=[None, {"63": {"logprob": -1.0}}]))
    with pytest.raises(ServerError, match="lists 1 tokens at position 1, not the 20 likeliest"):
        remote(folders, server).check(temperature=1.0, tokens=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "`RemoteTeacher.top_k` must be an integer >= 1 or null, got 0"),
        ({"top_k": True}, "`RemoteTeacher.top_k` must be an integer >= 1 or null, got True"),
        ({"top_k": None, "entropy_bound": "lower"}, "`RemoteTeacher.entropy_bound` must be null unless top_k is set"),
        ({"entropy_bound": "exact"}, "`RemoteTeacher.entropy_bound` must be lower, upper or null, got 'exact'"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        RemoteTeacher(["http://host"], "nowhere", **({"top_k": 4} | settings))


REFUSED = {
    "more than is listed": (
        {"objective": Divergence("forward_kl", top_k=21)},
        {},
        "`Divergence.top_k` must be at most the 20 tokens that `RemoteTeacher` lists, got 21; lower it",
    ),
    "the whole vocabulary": (
        {"objective": Divergence("forward_kl")},
        {},
        "`Divergence` must have .*teacher_distribution.*set `top_k` of the objective",
    ),
    "no lists": (
        {"objective": Divergence("forward_kl", top_k=3)},
        {"top_k": None},
        "`Divergence` must have .*teacher_distribution.*set `top_k` of the objective and of `model.teacher`",
    ),
    "a KL as an advantage": (
        {"advantage": [ValueBaseline()]},
        {},
        "`ValueBaseline` must have .*token_kl.*expected gradient is zero: minimise it by the objective `Divergence`",
    ),
    "an entropy": (
        {"weighting": EntropyGate(1.0)},
        {},
        "`EntropyGate` must have .*teacher_entropy.*set `model.teacher.entropy_bound`",
    ),
    "a longer list": (
        {"weighting": Shuffled(Product([Uniform(), PruneOPD(k=16)]))},
        {"top_k": 15},
        "`Shuffled` must read at most the 15 tokens that `RemoteTeacher` lists, got 16; .*raise `model.teacher.top_k`",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_less_than_is_asked_for_is_refused(folders, server, rows, name):
    settings, changes, message = REFUSED[name]
    module = fixed.module(folders, rows, teacher=remote(folders, server, **changes), **settings)
    with pytest.raises(InputError, match=message):
        require_scored(module.recipe, module.teacher, None)


def test_lists_as_long_as_they_are_read_will_do(folders, server, rows):
    module = fixed.module(folders, rows, teacher=remote(folders, server, top_k=16), weighting=PruneOPD(k=16))
    require_scored(module.recipe, module.teacher, None)


def test_a_divergence_among_the_transforms_is_refused(folders, rows):
    with pytest.raises(InputError, match="`OPDModule.advantage` must hold.*got Divergence.*expected gradient is zero"):
        fixed.module(folders, rows, advantage=[Divergence("reverse_kl", top_k=3)])


def test_the_students_tokens_are_refused_where_servers_cannot_be_asked(folders, server, rows):
    spec = Divergence("jsd", top_k=3, top_k_of="student")
    with pytest.raises(InputError, match="`Divergence.top_k_of` must be teacher or null, got student.*403.*scale-out"):
        trained(folders, rows, remote(folders, server), spec)
    server.scores_ids, server.max_logprobs = True, 20
    spec = Divergence("jsd", top_k=20, top_k_of="student")
    with pytest.raises(InputError, match="got student.*--max-logprobs 21"):
        trained(folders, rows, remote(folders, server), spec)
    server.always = fake.changed(lambda a: a.pop("prompt_token_id_logprobs", None))  # a version that ignores the field
    with pytest.raises(InputError, match="got student.*no prompt_token_id_logprobs in the answer"):
        trained(folders, rows, remote(folders, server), Divergence("jsd", top_k=3, top_k_of="student"))


# -- answers that are wrong --------------------------------------------------------------------------------------------


def entry(answer: dict) -> dict:
    return answer["choices"][-1]["prompt_logprobs"][-1]


def own_first(answer: dict) -> list[str]:
    return list(entry(answer))


WRONG = {
    "fewer": (lambda a: entry(a).pop(own_first(a)[-1]), "not the 20 likeliest"),
    "no id": (lambda a: entry(a).update({"x": entry(a).pop(own_first(a)[-1])}), "'x', which is no token id"),
    "text": (lambda a: entry(a)[own_first(a)[-1]].update(logprob="-1.0"), "no usable log-prob"),
    "null": (lambda a: entry(a).update({own_first(a)[-1]: None}), "no usable log-prob"),
    "nan": (lambda a: entry(a)[own_first(a)[-1]].update(logprob=float("nan")), "no usable log-prob"),
    "clamped": (lambda a: entry(a)[own_first(a)[-1]].update(logprob=-9999.0), "no usable log-prob"),
    "logits": (lambda a: [e.update(logprob=-0.1) for e in entry(a).values()], "with a mass of"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_list_is_no_answer(server, name):
    change, message = WRONG[name]
    answer = server.complete({"prompt": [[5, 6, 7, 8]], "prompt_logprobs": 20, "max_tokens": 0, "model": "tiny"})
    read = partial(_read, prompt=[5], response=[6, 7, 8], k=20)
    assert read(answer["choices"][0]).ids.shape == (3, 20)
    change(answer)
    with pytest.raises(Malformed, match=message):
        read(answer["choices"][0])


def test_a_failed_request_is_tried_again_or_ends_the_run_and_is_never_zeros(folders, server, rows):
    fewer = fake.changed(WRONG["fewer"][0])
    teacher = remote(folders, server)
    whole = teacher.score(rows, requires=LISTS)
    server.faults = [fewer, fake.hang_up]
    again = teacher.score(rows, requires=LISTS)
    assert torch.equal(again.topk.logprobs, whole.topk.logprobs) and torch.equal(again.logprobs, whole.logprobs)
    server.always = fewer
    with pytest.raises(ServerError, match="model.teacher.urls.*not the 20 likeliest"):
        teacher.score(rows, requires=LISTS)


def array(change) -> dict:
    def changed(answer: dict) -> None:
        found = numpy.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])))
        data = io.BytesIO()
        numpy.save(data, change(found))
        answer["prompt_token_id_logprobs"] = base64.b64encode(data.getvalue()).decode()

    return changed


WRONG_ARRAYS = {
    "missing": (lambda a: a.pop("prompt_token_id_logprobs"), "has no prompt_token_id_logprobs"),
    "garbled": (lambda a: a.update(prompt_token_id_logprobs="!!"), "cannot be read"),
    "cut": (lambda a: a.update(prompt_token_id_logprobs=a["prompt_token_id_logprobs"][:40]), "cannot be read"),
    "shorter": (array(lambda found: found[1:]), "that are no .* numbers"),
    "whole numbers": (array(lambda found: found.astype(numpy.int64)), "that are no .* numbers"),
    "nan": (array(lambda found: found * numpy.nan), "no usable log-prob"),
    "padded": (array(lambda found: found - numpy.inf), "no usable log-prob"),
}


@pytest.mark.parametrize("name", sorted(WRONG_ARRAYS))
def test_wrong_scores_of_chosen_tokens_are_no_answer(server, name):
    change, message = WRONG_ARRAYS[name]
    answer = server.generate({"model": "tiny"} | _chosen_body([5, 6, 7, 8], [[1, 2], [3, 4]]))
    assert asked_logprobs(answer, (2, 2)).shape == (2, 2)
    change(answer)
    with pytest.raises(Malformed, match=message):
        asked_logprobs(answer, (2, 2))


def test_scores_of_another_model_end_the_run(folders, server, rows):
    server.scores_ids, server.always = True, fake.changed(lambda a: a.update(model="other"))
    teacher = remote(folders, server, retry_seconds=0.0)
    with pytest.raises(ServerError, match="model.teacher.urls.*comes from the model 'other'"):
        teacher.score_candidates(rows, torch.zeros(*rows.mask.shape, 2, dtype=torch.int64))


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_preflight_counts_the_lists_that_are_kept(folders, server, rows, whose):
    """Those of the score buffer behind a step, when the objective reads 12 entries a token and the teacher lists 20."""
    server.scores_ids = True
    teacher = remote(folders, server)
    spec = Divergence("jsd", top_k=12, top_k_of=whose)
    recipe = Recipe(Uniform(), spec, 9)
    student = ScoringModel(AutoModelForCausalLM.from_pretrained(folders[0]), vocabulary=64)
    scores = Scores(student, {"teacher": teacher}, recipe, rows, temperature=1.0, step=0)
    scores.score_frozen(MicroBatches(rows, TokenBudget(), None), lambda *phase: None)
    real = sum(value.nbytes for value in scores.buffer.values.values() if value.ndim == 3)
    size = Held(model_size(student.causal_lm.config), 4)
    work = Workload(rows=len(rows), prompt=6, response=9, listed=_listed(recipe, teacher))
    found = Rank(size, work, CPU).budget()
    assert all(found.phases[phase][LISTED] == real > 0 for phase in ("scoring", "head", "layers", "optimizer"))
    assert LISTED not in found.phases["rollout"]


def _file(header: bytes, content: bytes = b"") -> bytes:
    """A .npy file of version 1.0 with this header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    "data",
    [
        b"PK\x03\x04" + b"\0" * 40,
        _file(b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,), }\n"),
        _file(b"(("),
    ],
    ids=["archive", "larger than memory", "no header"],
)
def test_a_file_that_is_none_is_no_answer(data):
    with pytest.raises(Malformed, match="cannot be read"):
        asked_logprobs({"prompt_token_id_logprobs": base64.b64encode(data).decode()}, (1, 2))


@pytest.mark.parametrize("name", ["9" * 19, "9" * 5000])
def test_a_listed_id_that_no_token_can_have_is_no_answer(name):
    entries = [{"7": {"logprob": -1.0, "rank": 1}, name: {"logprob": -2.0, "rank": 2}}]
    with pytest.raises(Malformed, match="is no token id"):
        top_lists(entries, [7], 2, first=0)
