"""Scores kept on disk: equal to computed ones, computed once, found by what they depend on, and never wrong."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_opd.errors import InputError
from lit_opd.models.student import StudentSettings
from lit_opd.objective import Divergence
from lit_opd.preflight.module_checks import require_scored
from lit_opd.teacher import (
    BaseModelTeacher,
    CachedTeacher,
    LocalTeacher,
    RemoteTeacher,
    RoutedTeacher,
    SelfTeacher,
)
from lit_opd.teacher.aligned import AlignedTeacher
from lit_opd.types import Replayed, Rollout
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fake_vllm as fake
from tests.helpers import fixed, tiny

ALL = frozenset({"teacher_entropy", "teacher_topk"})


class Counting(LocalTeacher):
    """Says how many rows it was asked for, call by call."""

    def __init__(self, path: str, **settings: Any) -> None:
        super().__init__(path, **({"dtype": "float64"} | settings))
        self._asked: list[int] = []  # no setting, by its underscore

    @property
    def asked(self) -> list[int]:
        """Rows by call."""
        return self._asked

    def score(self, rollout: Rollout, **settings: Any) -> Any:
        """Count, then score."""
        self._asked.append(len(rollout))
        return super().score(rollout, **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rows() -> Rollout:
    return fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})


def cached(path: str, folder: Path, *, teacher: Any = None, **settings: Any) -> CachedTeacher:
    found = CachedTeacher(Counting(path) if teacher is None else teacher, str(folder / "scores"), **settings)
    found.check(temperature=1.0, tokens=None)
    found.know_stop_ids((1,))
    found.load(vocabulary=64)
    return found


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "scores").glob("*/*.safetensors"))


def same(ours: Any, theirs: Any, mask: torch.Tensor) -> bool:
    """Log-probs, and what else there is, to the bit at valid tokens."""
    pairs = [(ours.logprobs, theirs.logprobs), (ours.entropy, theirs.entropy)]
    if theirs.topk is not None:
        pairs += [(ours.topk.ids, theirs.topk.ids), (ours.topk.logprobs, theirs.topk.logprobs)]
    return all(theirs is None or torch.equal(ours[mask], theirs[mask]) for ours, theirs in pairs)


@pytest.mark.parametrize("reads", [frozenset(), ALL], ids=["logprobs", "all"])
def test_scores_are_the_teachers_and_computed_once(folders, rows, tmp_path, reads):
    plain = Counting(folders[1])
    plain.load(vocabulary=64)
    expected = plain.score(rows, requires=reads)
    first = cached(folders[1], tmp_path)
    assert same(first.score(rows, requires=reads), expected, rows.mask) and len(entries(tmp_path)) == 6
    again = cached(folders[1], tmp_path)  # another process, as far as the folder knows
    found = again.score(rows, requires=reads)
    assert same(found, expected, rows.mask) and again.inner.asked == []
    assert not found.logprobs[~rows.mask].any() and found.logprobs.dtype == torch.float64


def test_only_rows_that_are_not_known_are_computed(folders, rows, tmp_path):
    teacher = cached(folders[1], tmp_path)
    teacher.score(rows.rows(torch.tensor([4, 1])).trimmed())
    whole = teacher.score(rows)
    assert teacher.inner.asked == [2, 4]
    plain = Counting(folders[1])
    plain.load(vocabulary=64)
    torch.testing.assert_close(whole.logprobs, plain.score(rows).logprobs, rtol=1e-10, atol=1e-10)


def test_rows_that_were_sampled_now_are_not_kept(folders, rows, tmp_path):
    old = torch.tensor([True, False, False, True, False, False])
    teacher = cached(folders[1], tmp_path)
    teacher.score(replace(rows, replayed=Replayed(old, old, torch.full((6,), -1))))
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    "change",
    ["temperature", "fields", "boundary", "prompt", "weights", "dtype", "stops", "revision", "vocabulary", "autocast"],
)
def test_what_scores_depend_on_is_in_the_key(folders, rows, tmp_path, change):
    cached(folders[1], tmp_path).score(rows)
    other, reads, settings = rows, frozenset(), {}
    path, teacher, given = folders[1], None, {}
    if change == "temperature":
        settings = {"temperature": 0.5}
    elif change == "fields":
        reads = ALL
    elif change == "boundary":  # the same tokens, of which the last of the prompt is the response's first
        part = rows.rows(torch.tensor([0, 1, 2, 4, 5]))  # the prompt of row 3 is one token
        ids, mask = (
            torch.cat([torch.zeros_like(value[:, :1]), value[:, :-1]], -1)
            for value in (part.prompts.ids, part.prompts.mask)
        )
        response = torch.cat([part.prompts.ids[:, -1:], part.response_ids], -1)
        valid = torch.cat([part.mask[:, :1], part.mask], -1)
        prompts = replace(part.prompts, ids=ids, mask=mask)
        other = replace(
            part, prompts=prompts, response_ids=response, mask=valid, sampler_logprobs=torch.zeros(valid.shape)
        )
    elif change == "prompt":
        other = replace(
            rows, prompts=replace(rows.prompts, teacher_ids=rows.prompts.ids + 1, teacher_mask=rows.prompts.mask)
        )
    elif change == "weights":
        path = folders[0]
    elif change == "dtype":
        teacher = Counting(path, dtype="float32")
    elif change == "stops":
        teacher = Counting(path, stop_mass="sum")
    elif change == "revision":
        given = {"revision": "other"}
    found = cached(path, tmp_path, teacher=teacher, **given)
    if change == "vocabulary":
        found._vocabulary = 63
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast"):
        found.score(other, requires=reads, **settings)
    assert found.inner.asked == [len(other)] and len(entries(tmp_path)) == 6 + len(other)


def test_the_angles_of_long_texts_are_in_the_key(rows, tmp_path):
    """A LongRoPE teacher scores the same row otherwise in a run whose rows may be longer than its first window."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi3",
        **sizes,
        **heads,
        original_max_position_embeddings=16,
        rope_parameters=rope,
        bos_token_id=2,
        eos_token_id=1,
    )
    path = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    found = []
    for longest in (16, 17, 16, None):
        teacher = CachedTeacher(Counting(path), str(tmp_path / "scores"))
        teacher.know_longest_row(longest)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            teacher.load(vocabulary=64)
        found.append((teacher.score(rows).logprobs, teacher.inner.asked))
    (short, first), (long, second), (again, third), (unknown, fourth) = found
    assert (first, second, third, fourth) == ([6], [6], [], [])
    assert torch.equal(short, again) and torch.equal(long, unknown) and not torch.allclose(short, long, atol=1e-3)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_the_class_of_stop_tokens_that_is_summed_is_in_the_key(rows, tmp_path, kind):
    """The teacher's generation config gets another end: weights, config.json and the student's stop ids stay."""
    model = tiny.save(tiny.qwen3(seed=2), tmp_path / "model")
    ends = Path(model) / "generation_config.json"

    def scored(folder: Path, stops: list[int], urls: list[str]) -> tuple[torch.Tensor, int]:
        ends.write_text(json.dumps({"eos_token_id": stops, "pad_token_id": 0}))
        local = LocalTeacher(model, dtype="float64", stop_mass="sum")
        inner = local if kind == "local" else RemoteTeacher(urls, model, stop_mass="sum")
        teacher = cached("", folder, teacher=inner, revision="one")
        return teacher.score(rows).logprobs, len(entries(folder))

    with fake.serving(model) as server:
        first, kept = scored(tmp_path, [1], [server.url])
        found, more = scored(tmp_path, [1, 3, 7], [server.url])
        fresh, _ = scored(tmp_path / "fresh", [1, 3, 7], [server.url])
        again, still = scored(tmp_path, [1], [server.url])
    assert (kept, more, still) == (6, 12, 12) and torch.equal(again, first)
    torch.testing.assert_close(found, fresh, rtol=1e-6, atol=1e-6)
    assert float((found - first).abs().max()) > 1.0  # nats


def test_what_an_environment_said_is_in_the_key(folders, rows, tmp_path):
    """The same sampled tokens behind another answer; and an answer in the place of a sampled token."""
    columns = torch.arange(9) == 1
    talk = {"mask": rows.mask & ~columns, "observed": rows.mask & columns, "turn": torch.zeros_like(rows.response_ids)}
    first = replace(rows, sampler_logprobs=torch.zeros(6, 9), **talk)
    teacher = cached(folders[1], tmp_path)
    teacher.score(first), teacher.score(first)
    said = torch.where(first.observed, first.response_ids + 1, first.response_ids)
    other = teacher.score(replace(first, response_ids=said))
    teacher.score(rows)
    assert teacher.inner.asked == [6, 5, 5]  # the row of one token has no answer
    plain = Counting(folders[1])
    plain.load(vocabulary=64)
    expected = plain.score(replace(first, response_ids=said))
    torch.testing.assert_close(other.logprobs, expected.logprobs, rtol=1e-10, atol=1e-10)


def test_a_teacher_that_moved_is_the_same_and_one_of_several_is_told_apart(folders, rows, tmp_path):
    cached(folders[1], tmp_path).score(rows)
    moved = cached(tiny.save(tiny.qwen3(seed=2), tmp_path / "moved"), tmp_path)
    moved.score(rows)
    assert moved.inner.asked == []
    named = [replace(rows, prompts=replace(rows.prompts, teachers=(name,) * 6)) for name in "ab"]
    routed = RoutedTeacher({"a": Counting(folders[0]), "b": Counting(folders[1])})
    both = cached("", tmp_path, teacher=routed)
    apart = [both.score(part).logprobs for part in named]
    assert not torch.equal(*apart) and torch.equal(both.score(named[0]).logprobs, apart[0])
    assert [part.asked for part in routed.named().values()] == [[6], [6]]


@pytest.mark.parametrize("damage", ["cut", "bit", "swapped", "empty"])
def test_a_damaged_entry_is_computed_anew_with_one_warning(folders, rows, tmp_path, damage):
    expected = cached(folders[1], tmp_path).score(rows).logprobs
    files = entries(tmp_path)[:2]
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents, strict=True):
        if damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "bit":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "swapped":
            file.write_bytes(contents[0] if content != contents[0] else contents[1])
        else:
            file.write_bytes(b"")
    teacher = cached(folders[1], tmp_path)
    with pytest.warns(UserWarning, match="such entries are computed anew") as said:
        found = teacher.score(rows).logprobs
    assert len([w for w in said if "anew" in str(w.message)]) == 1 and teacher.inner.asked == [2]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    teacher.score(rows)
    assert teacher.inner.asked == [2]  # it was put right


def test_the_folder_does_not_grow_beyond_its_bound(folders, rows, tmp_path):
    cached(folders[1], tmp_path).score(rows.rows(torch.tensor([0, 1])))
    size = sum(path.stat().st_size for path in entries(tmp_path))
    for room in (1, size, size + 10):
        teacher = cached(folders[1], tmp_path, max_gib=room / 2**30)
        with pytest.warns(UserWarning, match="no more are kept") as said:
            teacher.score(rows), teacher.score(rows)
        assert len([w for w in said if "no more" in str(w.message)]) == 1
        assert len(entries(tmp_path)) == 2 and teacher.inner.asked == [4, 4]


def test_the_bound_holds_while_entries_are_added(folders, rows, tmp_path):
    room = 1000  # of six entries of some 200 bytes each, the most of them
    teacher = cached(folders[1], tmp_path, max_gib=room / 2**30)
    teacher.score(rows), teacher.score(rows.rows(torch.arange(5, -1, -1)))
    size = sum(path.stat().st_size for path in entries(tmp_path))
    assert 0 < len(entries(tmp_path)) < 6 and size <= room


def test_a_run_learns_the_same_and_asks_once(folders, rows, tmp_path):
    """The lists too: the gradient of a divergence from the cache, new and read again, and of the teacher's own lists."""
    results = []
    for teacher in (Counting(folders[1]), *(CachedTeacher(Counting(folders[1]), str(tmp_path)) for _ in range(2))):
        objective = Divergence("forward_kl", top_k=8)
        module = fixed.module(folders, rows, teacher=teacher, weighting=Uniform(), objective=objective, token_budget=40)
        results.append(fixed.gradient(module, rows.prompts))
    assert teacher.inner.asked == []
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert fixed.relative_gap(gradient, results[0][1]) < 1e-5


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": SelfTeacher("live")}, r"must be one whose scores never change, got SelfTeacher\(update=live\)"),
        ({"teacher": RoutedTeacher({"a": SelfTeacher("ema")})}, "whose scores never change"),
        ({"teacher": CachedTeacher(LocalTeacher("x"), "y")}, "must hold no other CachedTeacher"),
        ({"teacher": AlignedTeacher(LocalTeacher("x"))}, "put the cache inside it"),
        ({"folder": ""}, "`CachedTeacher.folder` must be the path of a folder"),
        ({"max_gib": 0}, "`CachedTeacher.max_gib` must be > 0 and finite, got 0"),
        ({"max_gib": float("nan")}, "`CachedTeacher.max_gib` must be > 0 and finite"),
        ({"revision": ""}, "`CachedTeacher.revision` must be a name of the weights"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        CachedTeacher(**({"teacher": LocalTeacher("x"), "folder": "y"} | settings))


def test_weights_without_a_name_and_a_folder_that_is_none_are_refused(folders, rows, tmp_path):
    for silent in (BaseModelTeacher(), SelfTeacher("frozen"), RoutedTeacher({"a": BaseModelTeacher()})):
        with pytest.raises(InputError, match="`model.teacher.revision` must name the weights of"):
            cached("", tmp_path, teacher=silent)
        cached("", tmp_path, teacher=silent, revision="the first")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="`model.teacher.folder` must be a folder that can be written"):
        cached(folders[1], tmp_path / "file")
    away = CachedTeacher(RemoteTeacher(["http://host"], folders[1], top_k=3), str(tmp_path))
    with pytest.raises(InputError, match="`model.teacher.revision` must name the weights of `RemoteTeacher`"):
        away._revision()


def test_a_divergence_over_the_vocabulary_is_pointed_to_the_lists(folders, rows, tmp_path):
    teacher = CachedTeacher(LocalTeacher(folders[1]), str(tmp_path))
    module = fixed.module(
        folders, rows, teacher=teacher, objective=Divergence("forward_kl"), student=StudentSettings(folders[0])
    )
    with pytest.raises(InputError, match="`CachedTeacher` cannot give; set the objective's `top_k`, at most 32"):
        require_scored(module.recipe, module.teacher, None)
