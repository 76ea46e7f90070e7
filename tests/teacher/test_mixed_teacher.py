"""Several teachers as one: against sums over the whole vocabulary in float64, in whole steps, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.errors import InputError
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence
from lit_opd.preflight import estimate, read_plan
from lit_opd.preflight.memory import MIXED
from lit_opd.preflight.module_checks import require_scored
from lit_opd.run.trained_settings import differences, trained_settings
from lit_opd.scoring import heads, tiles
from lit_opd.scoring.mixed import MixedHead
from lit_opd.scoring.tiles import Head
from lit_opd.teacher import LocalTeacher, MixedTeacher, RemoteTeacher
from lit_opd.types import Rollout
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fake_vllm as fake
from tests.helpers import fixed, tiny
from tests.objective.test_divergence import VOCABULARY, formula, head, probabilities, value

WEIGHTS = (0.3, 0.5, 0.2)
ALL = frozenset({"teacher_entropy", "teacher_topk", "token_kl", "teacher_distribution"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A student and two teachers."""
    folder = tmp_path_factory.mktemp("models")
    return (*tiny.pair(folder), tiny.save(tiny.qwen3(seed=5), folder / "third"))


@pytest.fixture(scope="module")
def rows() -> Rollout:
    return fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})


def local(folder: str, **settings) -> LocalTeacher:
    return LocalTeacher(folder, **({"dtype": "float64"} | settings))


def loaded(teacher: MixedTeacher) -> MixedTeacher:
    teacher.know_stop_ids((1,))
    teacher.load(vocabulary=64)
    return teacher


def mixed(how: str, tables: list[torch.Tensor], weights: tuple[float, ...]) -> torch.Tensor:
    """Probabilities, entry by entry."""
    if how == "mixture":
        return sum(w * q for w, q in zip(weights, tables, strict=True))
    powers = torch.stack([q**w for w, q in zip(weights, tables, strict=True)]).prod(0)
    return powers / powers.sum(-1, keepdim=True)


@torch.no_grad()
def tables(folder: str, rows: Rollout, temperature: float) -> torch.Tensor:
    """Probabilities [B, T, V], row by row without padding; 1 / V where masked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    out = torch.full((*rows.mask.shape, 64), 1 / 64, dtype=torch.float64)
    for row in range(len(rows)):
        prompt = rows.prompts.ids[row][rows.prompts.mask[row]]
        response = rows.response_ids[row][rows.mask[row]]
        logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        out[row, : len(response)] = torch.softmax(logits / temperature, -1)
    return out


# -- one head of several -----------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 1000])
def tile(request, monkeypatch):
    """Logits a tile: a row's, and all."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 7 * request.param)
    monkeypatch.setattr(tiles, "WHOLE_ELEMENTS", VOCABULARY * request.param)


@pytest.mark.parametrize("how", ["mixture", "product"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_divergence_from_several_heads_is_that_from_their_table(tile, how, temperature):
    student, parts = head(0, bias=True), tuple(head(seed, bias=seed == 2) for seed in (1, 2, 3))
    teacher = MixedHead.of(parts, WEIGHTS, how)
    q = mixed(how, [probabilities(part, temperature).detach() for part in parts], WEIGHTS)
    p = probabilities(student, temperature)
    for kind, beta in (("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.2)):
        ours = value(Divergence(kind, beta=beta), student, teacher, temperature)
        plain = formula(kind, p, q, beta)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
        mine, theirs = (torch.autograd.grad(out.sum(), student.hidden, retain_graph=True)[0] for out in (ours, plain))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    cut = value(Divergence("forward_kl", top_k=4), student, teacher, temperature)
    best = q.topk(4).indices
    buckets = [torch.cat([of.gather(-1, best), 1 - of.gather(-1, best).sum(-1, keepdim=True)], -1) for of in (p, q)]
    torch.testing.assert_close(cut, formula("forward_kl", *buckets, 0.5), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tiles.token_entropy(teacher, temperature=temperature), -(q * q.log()).sum(-1))
    torch.testing.assert_close(
        heads.token_kl(student, teacher, temperature=temperature), formula("reverse_kl", p, q, 0.5)
    )


@pytest.mark.parametrize("how", ["mixture", "product"])
def test_entries_without_a_name_have_no_mass(how):
    unused = torch.tensor([3, 7])
    parts = tuple(Head(of.hidden, of.weight, unused=unused) for of in (head(1), head(2)))
    teacher = MixedHead.of(parts, (0.5, 0.5), how)
    masses = teacher.logits(slice(None), 1.0).softmax(-1)
    assert not masses[:, unused].any() and bool(torch.isfinite(tiles.token_entropy(teacher)).all())


# -- the teacher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mixture", "product"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_the_mixed_tables(folders, rows, how, temperature):
    teacher = loaded(MixedTeacher([local(folders[1]), local(folders[2])], [0.3, 0.7], how))
    assert teacher.provides == ALL
    q = mixed(how, [tables(folder, rows, temperature) for folder in folders[1:]], (0.3, 0.7))
    scores = teacher.score(rows, temperature=temperature, requires=frozenset({"teacher_entropy", "teacher_topk"}))
    sampled = q.gather(-1, rows.response_ids.unsqueeze(-1)).squeeze(-1).log() * rows.mask
    torch.testing.assert_close(scores.logprobs, sampled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.entropy, -(q * q.log()).sum(-1) * rows.mask, rtol=1e-5, atol=1e-6)
    best = q.topk(32)
    assert torch.equal(scores.topk.ids[rows.mask], best.indices[rows.mask])
    torch.testing.assert_close(scores.topk.logprobs[rows.mask], best.values[rows.mask].log(), rtol=1e-5, atol=1e-6)
    assert torch.equal(teacher.score(rows, temperature=temperature).logprobs, scores.logprobs)


@pytest.mark.parametrize("how", ["mixture", "product"])
def test_two_copies_of_a_teacher_are_that_teacher(folders, rows, how):
    alone = local(folders[1])
    alone.load(vocabulary=64)
    twice = loaded(MixedTeacher([local(folders[1]), local(folders[1])], None, how))
    torch.testing.assert_close(twice.score(rows).logprobs, alone.score(rows).logprobs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["mixture", "product"])
@pytest.mark.parametrize("spec", [None, Divergence("reverse_kl")], ids=["policy", "reverse_kl"])
def test_a_step_learns_from_all_of_them(folders, rows, how, spec):
    """Signal, and the divergence's loss, of a fit in micro-batches against the tables."""
    teacher = MixedTeacher([local(folders[1]), local(folders[2])], [0.3, 0.7], how)
    settings = {} if spec is None else {"objective": spec}
    module = fixed.module(folders[:2], rows, teacher=teacher, weighting=Uniform(), token_budget=40, **settings)
    done = fixed.fit(module, rows.prompts)
    q = mixed(how, [tables(folder, rows, 1.0) for folder in folders[1:]], (0.3, 0.7))
    sampled = q.gather(-1, rows.response_ids.unsqueeze(-1)).squeeze(-1).log() * rows.mask
    torch.testing.assert_close(done.records[0].signal.teacher_logprobs, sampled, rtol=1e-5, atol=1e-6)
    if spec is not None:
        per_token = formula("reverse_kl", tables(folders[0], rows, 1.0), q, 0.5) * rows.mask
        expected = (per_token.sum(-1) / rows.mask.sum(-1)).mean()
        assert done.losses[0] == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


def test_a_mixture_takes_teachers_on_servers_and_stops_of_all(folders, rows, tmp_path):
    """Log-probs only; the stop token has the mixture of both masses."""
    third = tiny.save(tiny.qwen3(seed=5), tmp_path / "third")
    path = Path(third) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 3]}))
    with fake.serving(folders[1]) as server:
        away = RemoteTeacher([server.url], folders[1], top_k=5)
        teacher = loaded(MixedTeacher([away, local(third, stop_mass="sum")], [0.4, 0.6]))
        assert teacher.provides == frozenset() and teacher.sums_stops
        assert [part.field for part in teacher.named().values()] == [
            "model.teacher.teachers.0",
            "model.teacher.teachers.1",
        ]
        found = teacher.score(rows).logprobs
    near, far = (tables(folder, rows, 1.0) for folder in (folders[1], third))
    token = rows.response_ids.unsqueeze(-1)
    mass = torch.where(token == 1, far[..., [1, 3]].sum(-1, keepdim=True), far.gather(-1, token))
    expected = (0.4 * near.gather(-1, token) + 0.6 * mass).squeeze(-1).log() * rows.mask
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_other_weights_in_a_teachers_place_are_refused_unless_asked_for(folders, rows, tmp_path):
    """The checkpoint knows the files of both; a copy elsewhere has the same revision."""
    place = tiny.save(tiny.qwen3(seed=5), tmp_path / "teacher")
    assert local(place).revision() == local(folders[2]).revision() != local(folders[1]).revision()

    def module() -> OPDModule:
        teacher = MixedTeacher([local(folders[1]), local(place)])
        return fixed.module(folders[:2], rows, teacher=teacher, weighting=Uniform())

    saved = tmp_path / "saved.ckpt"
    fixed.fit(module(), rows.prompts, save=saved)
    fixed.fit(module(), rows.prompts, steps=2, load=saved)
    tiny.save(tiny.qwen3(seed=6), place)
    with pytest.raises(
        InputError, match="`model.teacher.teachers.1.path` must hold what the checkpoint .*--allow_change models"
    ):
        fixed.fit(module(), rows.prompts, steps=2, load=saved)
    asked = module()
    asked.state.allowed = frozenset({"models"})
    fixed.fit(asked, rows.prompts, steps=2, load=saved)


@pytest.mark.parametrize(("how", "spec"), [("product", None), ("mixture", Divergence("jsd")), ("mixture", None)])
def test_memory_counts_both_models_and_the_heads_that_are_read_together(folders, how, spec):
    """Against what real teachers hold: their weights, and the hidden states of a whole batch."""
    teacher = MixedTeacher([local(path, dtype="float32") for path in folders[1:]], None, how)
    rows = fixed.rollout(lengths=[6, 6, 6], prompt_lengths=[4, 4, 4], truncated=set())
    settings = {} if spec is None else {"objective": spec}
    module = fixed.module(folders[:2], rows, dtype="float32", teacher=teacher, weighting=Uniform(), **settings)
    data = SimpleNamespace(
        prompt_batch=3, samples_per_prompt=1, longest_prompt=4, val=None, val_fraction=0, val_batch=1
    )
    found = estimate(module, data, read_plan({"accelerator": "cpu", "devices": 1}, strategy="auto", memory_gb=1.0))
    loaded(teacher)
    weights = [w for part in teacher.teachers for w in part.policy.parameters()]
    assert found.always["frozen models"] == sum(w.nbytes for w in weights)
    if (how, spec) == ("mixture", None):
        assert MIXED not in found.phases["scoring"] and MIXED not in found.phases["head"]
        return
    with teacher.whole_head():
        head = teacher.full_head(rows)
    states = sum(part.hidden.nbytes for part in head.parts)
    tile = head.logits(slice(None), 1.0).nbytes
    assert found.phases["scoring"][MIXED] == found.phases["head"][MIXED] == states + tile


# -- what is refused ---------------------------------------------------------------------------------------------------

AWAY = RemoteTeacher(["http://host"], "nowhere", top_k=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teachers": [AWAY]}, "`MixedTeacher.teachers` must be at least two teachers, got 1"),
        ({"how": "mean"}, "`MixedTeacher.how` must be mixture or product, got 'mean'"),
        ({"weights": [0.5]}, r"`MixedTeacher.weights` must be 2 numbers in \(0, 1\], one a teacher, got \[0.5\]"),
        ({"weights": [1.0, 0.0]}, r"`MixedTeacher.weights` must be 2 numbers in \(0, 1\]"),
        ({"weights": [float("nan"), 0.5]}, r"`MixedTeacher.weights` must be 2 numbers in \(0, 1\]"),
        ({"weights": ["a", "b"]}, r"`MixedTeacher.weights` must be 2 numbers in \(0, 1\]"),
        ({"weights": [0.5, 0.4]}, "`MixedTeacher.weights` must be numbers that sum to 1.*they sum to 0.9"),
        ({"how": "product"}, r"`MixedTeacher.how` must be mixture with `RemoteTeacher` \(teacher 1\), got product"),
        (
            {"how": "product", "teachers": [local("a"), local("b", stop_mass="sum")]},
            r"must be mixture where a teacher has `stop_mass` sum \(teacher 1\)",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        MixedTeacher(**({"teachers": [local("a"), AWAY]} | settings))


def test_a_divergence_from_teachers_on_servers_is_refused(folders, rows):
    teacher = MixedTeacher([local(folders[1]), AWAY])
    for spec in (Divergence("forward_kl"), Divergence("forward_kl", top_k=3)):
        module = fixed.module(folders[:2], rows, teacher=teacher, objective=spec)
        with pytest.raises(
            InputError, match="`Divergence` must have .*teacher_distribution.*`MixedTeacher` cannot give"
        ):
            require_scored(module.recipe, module.teacher, None)


def test_a_checkpoint_knows_the_teachers_and_their_weights():
    """What another run may change: where a server is, not which teachers there are nor how much each counts."""

    def settings(weights: list[float], path: str = "a", url: str = "http://x") -> dict:
        parts = [
            {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": path}},
            {"class_path": "lit_opd.teacher.RemoteTeacher", "init_args": {"urls": [url], "tokenizer_path": "b"}},
        ]
        init = {"teachers": parts, "weights": weights}
        return trained_settings(
            {"model": {"teacher": {"class_path": "lit_opd.teacher.MixedTeacher", "init_args": init}}}
        )

    before = settings([0.5, 0.5])
    assert differences(before, settings([0.5, 0.5], url="http://y")) == {}
    changed = differences(before, settings([0.4, 0.6]))["models"]
    assert changed[0] == ("model.teacher.weights.0", 0.5, 0.4)
    assert differences(before, settings([0.2, 0.3, 0.5]))["models"][0][0] == "model.teacher.weights"
    assert differences(before, settings([0.5, 0.5], path="c"))["models"] == [
        ("model.teacher.teachers.0.path", "a", "c")
    ]
