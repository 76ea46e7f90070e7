"""Saved responses: gradients against plain sums, which rows are sampled now, one rank and two, resuming, and what is refused."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from lit_opd.advantage import RewardGate, ValueBaseline
from lit_opd.errors import InputError
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence, Likelihood, PolicyLoss
from lit_opd.preflight.module_checks import setting_warnings
from lit_opd.preflight.replay_checks import check_replay
from lit_opd.prompts import PromptDataModule
from lit_opd.prompts.encoding import PromptEncoder, row_key
from lit_opd.report.replay import load_record, save_record
from lit_opd.rollout import DecodeSampler, ReplaySampler, SamplingSettings, VLLMSampler
from lit_opd.rollout.base import TextFacts
from lit_opd.step.recipe import WarmUp
from lit_opd.step.scalars import scalars
from lit_opd.teacher import LocalTeacher
from lit_opd.types import FinishReason, PromptBatch, Provenance, Rollout
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fixed, tiny

LENGTHS, PROMPTS, TRUNCATED = [5, 9, 1, 7, 3, 9], [4, 2, 6, 1, 3, 5], {1}
SETTINGS = SamplingSettings(max_new_tokens=9, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3, replay="some")
LETTERS = tiny.tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rows() -> Rollout:
    return fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated=TRUNCATED)


@pytest.fixture(scope="module")
def old(rows: Rollout) -> Rollout:
    """Other responses to the same prompts, sampled after 7 steps with log-probs of their own."""
    drawn = fixed.rollout(lengths=[7, 4, 6, 9, 2, 5], prompt_lengths=PROMPTS, truncated={3}, seed=9)
    logprobs = (
        -12.0 * torch.rand(drawn.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1.0
    )
    origin = Provenance("decode", weights_version=7)
    return replace(drawn, prompts=rows.prompts, sampler_logprobs=logprobs, provenance=origin)


@pytest.fixture(scope="module")
def saved(folders, old, tmp_path_factory) -> Path:
    """``old`` as a run leaves it: ``rollouts/step-1.safetensors``."""
    done = fixed.fit(fixed.module(folders, old, weighting=Uniform()), old.prompts)
    return save_record(done.records[0], tmp_path_factory.mktemp("run") / "rollouts" / "step-1.safetensors")


@pytest.fixture
def texts(rows: Rollout, tmp_path: Path) -> Path:
    """A line a row, its letters being its ids."""
    words = ["abc", "q", "zz top", "0 + 1 =", "hello", "x"]
    lines = [{"id": f"row-{row}", "response": word} for row, word in enumerate(words)]
    return written(tmp_path / "texts.jsonl", lines)


def written(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def facts(**changes: Any) -> TextFacts:
    def encode(text: str) -> list[int]:
        return LETTERS(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(ids: list[int]) -> str:
        return LETTERS.decode(ids, skip_special_tokens=True)

    given = {"encode": encode, "decode": decode, "stop_ids": (1,), "end_id": 1, "vocabulary": 64}
    return TextFacts(**(given | changes))


def replaying(paths: Path | list[str], rows: Rollout, **settings: Any) -> ReplaySampler:
    """One that has read its files; the other rows are those of ``rows``."""
    given = paths if isinstance(paths, list) else str(paths)
    return ReplaySampler(given, fresh=fixed.FixedSampler(rows, max_new_tokens=9), **settings)


def read(sampler: ReplaySampler, **changes: Any) -> ReplaySampler:
    sampler.know_texts(facts(**changes))
    return sampler


def row_logprobs(model: Any, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """[n] nats, with gradient."""
    logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, response.unsqueeze(-1)).squeeze(-1)


def by_hand(
    folder: str,
    prompts: PromptBatch,
    responses: list[torch.Tensor],
    token_loss: Callable[[int, torch.Tensor], torch.Tensor],
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the mean of rows of their token means, a row at a time with plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    parts = []
    for row, response in enumerate(responses):
        prompt = prompts.ids[row][prompts.mask[row]]
        parts.append(token_loss(row, row_logprobs(model, prompt, response)).mean())
    loss = torch.stack(parts).mean()
    loss.backward()
    return float(loss), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_a_policy_gradient_on_old_rollouts_is_corrected_token_by_token(folders, rows, old, saved):
    """min(exp(s - b), cap) with the saved b; the cap is met and not met."""
    module = fixed.module(
        folders, rows, weighting=Uniform(), sampler=replaying(saved, rows), objective=PolicyLoss(None, None)
    )
    loss, gradient = fixed.gradient(module, rows.prompts)
    teacher = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float64)
    capped = []

    def token_loss(row: int, s: torch.Tensor) -> torch.Tensor:
        response = old.response_ids[row][old.mask[row]]
        with torch.no_grad():
            q = row_logprobs(teacher, rows.prompts.ids[row][rows.prompts.mask[row]], response)
        weight = (s.detach() - old.sampler_logprobs[row][old.mask[row]].float()).exp()
        capped.append(weight > 5.0)
        return -weight.clamp(max=5.0) * (q - s.detach()) * (s - s.detach()).exp()

    responses = [ids[mask] for ids, mask in zip(old.response_ids, old.mask, strict=True)]
    expected, wanted = by_hand(folders[0], rows.prompts, responses, token_loss)
    assert 0.0 < torch.cat(capped).double().mean() < 1.0
    assert loss == pytest.approx(expected, rel=1e-5)
    assert fixed.relative_gap(gradient, wanted) < 1e-5


def test_likelihood_of_texts_is_plain_fine_tuning(folders, rows, texts):
    """Letters, then the end token."""
    module = fixed.module(folders, rows, weighting=Uniform(), sampler=replaying(texts, rows), objective=Likelihood())
    loss, gradient = fixed.gradient(module, rows.prompts)
    given = [json.loads(line)["response"] for line in texts.read_text().splitlines()]
    responses = [torch.tensor([*map(LETTERS.convert_tokens_to_ids, text), 1]) for text in given]
    expected, wanted = by_hand(folders[0], rows.prompts, responses, lambda row, s: -s)
    assert loss == pytest.approx(expected, rel=1e-6) and fixed.relative_gap(gradient, wanted) < 1e-8


def test_texts_without_a_known_sampler_count_as_the_students(folders, rows, texts):
    """Beside rows that were sampled now, which keep their correction."""
    near = replace(rows, sampler_logprobs=torch.full_like(rows.sampler_logprobs, -2.0))
    sampler = replaying(texts, near, on_policy_fraction=0.5, unknown_sampler="as_student")
    module = fixed.module(folders, near, weighting=Uniform(), sampler=sampler)
    signal = (record := fixed.fit(module, rows.prompts).records[0]).signal
    told = record.rollout.replayed
    assert told.old.sum() == 3 and torch.equal(told.known, ~told.old)
    assert torch.equal(signal.sampler_logprobs[told.old], signal.student_logprobs[told.old])
    assert (signal.sampler_logprobs[~told.old][signal.mask[~told.old]] == -2.0).all()


# -- which rows --------------------------------------------------------------------------------------------------------


def test_rows_are_those_that_were_saved(rows, old, saved):
    found = read(replaying(saved, rows)).sample(None, rows.prompts, SETTINGS)
    assert torch.equal(found.mask, old.mask) and torch.equal(found.response_ids[found.mask], old.response_ids[old.mask])
    assert torch.equal(found.sampler_logprobs, old.sampler_logprobs.float() * old.mask)
    assert torch.equal(found.finish_reason, old.finish_reason) and found.replayed.known.all()
    assert found.replayed.weights_version.tolist() == [7] * 6 and found.num_drawn.sum() == 0


def test_long_responses_are_cut_and_marked(rows, old, saved):
    shorter = read(replaying(saved, rows)).sample(None, rows.prompts, replace(SETTINGS, max_new_tokens=5))
    assert shorter.lengths.tolist() == [min(5, n) for n in (7, 4, 6, 9, 2, 5)]
    ends = [FinishReason.LENGTH if n > 5 else FinishReason.STOP for n in (7, 4, 6, 9, 2, 5)]
    assert shorter.finish_reason.tolist() == ends
    budgeted = read(replaying(saved, rows)).sample(
        None, rows.prompts, replace(SETTINGS, max_new_tokens=5, budgeted=True)
    )
    assert (budgeted.finish_reason == int(FinishReason.BUDGET)).sum() == 3


def test_outside_training_everything_is_sampled(rows, saved):
    found = read(replaying(saved, rows)).sample(None, rows.prompts, replace(SETTINGS, replay="none"))
    assert torch.equal(found.response_ids, rows.response_ids) and not found.replayed.old.any()


@pytest.mark.parametrize("share", [0.5, 0.4, 0.1])
def test_the_share_holds_exactly_or_on_average(rows, saved, share):
    sampler = read(replaying(saved, rows, on_policy_fraction=share))
    counts, drawn = [], torch.zeros(6)
    for step in range(200):
        found = sampler.sample(None, rows.prompts, replace(SETTINGS, step=step))
        now = ~found.replayed.old
        drawn += now
        counts.append(int(now.sum()))
        assert torch.equal(found.response_ids[now][rows.mask[now]], rows.response_ids[now][rows.mask[now]])
    assert {*counts} <= {math.floor(6 * share), math.ceil(6 * share)}
    assert sum(counts) / 200 == pytest.approx(6 * share, abs=0.15)
    assert (drawn / 200 - share).abs().max() < 0.15  # every row in its turn
    again = sampler.sample(None, rows.prompts, replace(SETTINGS, step=199))
    assert torch.equal(again.replayed.old, found.replayed.old)


def _rank(rank: int, place: str, results: Any, sampler: ReplaySampler, prompts: PromptBatch, steps: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    mine = prompts.rows(torch.arange(rank, len(prompts), 2))
    found = [sampler.sample(None, mine, replace(SETTINGS, step=step)) for step in range(steps)]
    results.put(
        (rank, [(r.prompts.row_ids, r.replayed.old.tolist(), r.response_ids.numpy(), r.mask.numpy()) for r in found])
    )
    dist.destroy_process_group()


def test_two_ranks_draw_the_rows_of_one(rows, saved, tmp_path):
    sampler = read(replaying(saved, rows, on_policy_fraction=0.35))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    place = str(tmp_path / "store")
    ranks = [context.Process(target=_rank, args=(r, place, results, sampler, rows.prompts, 8)) for r in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    for step in range(8):
        alone = sampler.sample(None, rows.prompts, replace(SETTINGS, step=step))
        whole = {name: (bool(old), alone.response_ids[row][alone.mask[row]].tolist())
                 for row, (name, old) in enumerate(zip(rows.prompts.row_ids, alone.replayed.old, strict=True))}  # fmt: skip
        parts = [
            (name, (old, ids[mask].tolist()))
            for rank in (0, 1)
            for name, old, ids, mask in zip(*found[rank][step], strict=True)
        ]
        assert len({name for name, _ in parts}) == len(parts) == 6 and dict(parts) == whole


def test_samples_of_a_prompt_are_different_responses_and_all_come(rows, tmp_path):
    lines = [{"id": "one", "response": letter * 3} for letter in "abcde"]
    sampler = read(replaying(written(tmp_path / "many.jsonl", lines), rows))
    seen = set()
    for step in range(40):
        prompts = PromptBatch(
            ids=torch.full((3, 2), 5),
            mask=torch.ones(3, 2, dtype=torch.bool),
            row_keys=torch.tensor([row_key("one", sample) for sample in range(3)]),
            row_ids=("one",) * 3,
        )
        found = sampler.sample(None, prompts, replace(SETTINGS, step=step)).response_ids[:, 0].tolist()
        assert len({*found}) == 3
        seen |= {*found}
    assert len(seen) == 5


def test_prompts_without_a_response_are_sampled_where_that_is_asked_for(rows, old, saved, tmp_path):
    part = save_record(load_record(saved).rows(torch.tensor([0, 2, 5])), tmp_path / "step-1.safetensors")
    sampler = read(replaying(part, rows, missing="sample"))
    found = sampler.sample(None, rows.prompts, SETTINGS)
    assert found.replayed.old.tolist() == [True, False, True, False, False, True]
    with pytest.raises(InputError, match="must hold a response to row 'row-1' of the data"):
        sampler.sample(None, rows.prompts, replace(SETTINGS, replay="all"))
    with pytest.raises(InputError, match="must hold a response to row 'row-1' of the data"):
        read(replaying(part, rows)).sample(None, rows.prompts, SETTINGS)


# -- a run -------------------------------------------------------------------------------------------------------------


def warming(folders: tuple[str, str], texts: Path, **settings: Any) -> OPDModule:
    """Two steps of fine-tuning, then the student's own samples and old texts, half and half."""
    sampler = ReplaySampler(str(texts), fresh=DecodeSampler(max_new_tokens=6), on_policy_fraction=0.5)
    return OPDModule(
        tiny_student(folders[0]),
        LocalTeacher(folders[1], dtype="float64"),
        sampler=sampler,
        weighting=Uniform(),
        objective=Divergence("reverse_kl"),
        warmup=WarmUp(2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        seed=5,
        **settings,
    )


def tiny_student(path: str) -> Any:
    from lit_opd.models.student import StudentSettings

    return StudentSettings(path, dtype="float64")


def test_a_warm_up_imitates_then_learns_from_the_teacher_and_resumes_exactly(folders, rows, texts, tmp_path):
    half = tmp_path / "half.ckpt"
    fixed.fit(warming(folders, texts), rows.prompts, steps=3, save=half)
    again, whole = warming(folders, texts), warming(folders, texts)
    fixed.fit(again, rows.prompts, steps=5, load=half)
    records = fixed.fit(whole, rows.prompts, steps=5).records
    assert [int(record.rollout.replayed.old.sum()) for record in records] == [6, 6, 3, 3, 3]
    for record in records[:2]:
        assert torch.equal(record.loss, -record.signal.student_logprobs)
    assert not torch.equal(records[2].loss, -records[2].signal.student_logprobs)
    assert records[2].loss.min() >= 0.0  # a divergence
    weights = fixed.weights(again)
    assert all(torch.equal(value, weights[name]) for name, value in fixed.weights(whole).items())
    texts.write_text(texts.read_text().replace("abc", "abd"))
    with pytest.raises(
        InputError, match="`model.sampler.paths` must hold what the checkpoint .*--allow_change sampler"
    ):
        fixed.fit(warming(folders, texts), rows.prompts, steps=5, load=half)


def test_metrics_tell_old_rows_from_new_ones(folders, rows, old, saved, texts):
    """By slow sums; NaN where there is nothing to compare. The divergence and the student's own log-probs are averages over what
    it sampled itself, so saved rows are not in them."""
    near = replace(rows, sampler_logprobs=torch.full_like(rows.sampler_logprobs, -2.0))
    module = fixed.module(folders, rows, weighting=Uniform(), sampler=replaying(saved, near, on_policy_fraction=0.5))
    record = fixed.fit(module, rows.prompts).records[0]
    found, signal = scalars(record), record.signal
    gaps: dict[bool, list[float]] = {True: [], False: []}
    own: list[tuple[float, float]] = []
    for row in range(6):
        is_old = bool(record.rollout.replayed.old[row])
        b = old.sampler_logprobs.float() if is_old else near.sampler_logprobs
        for t in range(int(record.rollout.lengths[row])):
            s, q = float(signal.student_logprobs[row, t]), float(signal.teacher_logprobs[row, t])
            gaps[is_old].append(abs(s - float(b[row, t])))
            own += [] if is_old else [(s, q)]
    assert found["train/replayed_fraction"] == 0.5
    assert float(found["train/replay_gap"]) == pytest.approx(sum(gaps[True]) / len(gaps[True]), rel=1e-6)
    assert float(found["train/sampler_gap"]) == pytest.approx(sum(gaps[False]) / len(gaps[False]), rel=1e-6)
    assert found["train/tokens"] == len(gaps[False])  # sampled now
    assert float(found["train/reverse_kl_k1"]) == pytest.approx(sum(s - q for s, q in own) / len(own), rel=1e-6)
    assert float(found["train/student_nll"]) == pytest.approx(-sum(s for s, _ in own) / len(own), rel=1e-6)
    told = fixed.module(folders, rows, weighting=Uniform(), sampler=replaying(texts, rows), objective=Likelihood())
    found = scalars(fixed.fit(told, rows.prompts).records[0])
    assert found["train/replayed_fraction"] == 1.0
    for name in ("replay_gap", "sampler_gap", "reverse_kl_k1", "student_nll"):
        assert math.isnan(found[f"train/{name}"]), name
    assert math.isfinite(found["train/disagreement"])  # of what is trained on


def test_a_likelihood_of_ones_own_samples_is_warned_of(folders, rows, saved):
    """Their expected gradient is zero; of rows that a reward chose it is not."""

    def said(**settings: Any) -> list[str]:
        return list(setting_warnings(fixed.module(folders, rows, objective=Likelihood(), **settings)))

    (warning,) = said()
    assert "`model.objective` Likelihood has `FixedSampler`" in warning and "take ReplaySampler" in warning
    later = replaying(saved, rows, on_policy_fraction=1.0)
    assert len(said(sampler=later, warmup=WarmUp(2))) == 1  # what follows the warm-up
    assert not said(sampler=replaying(saved, rows, on_policy_fraction=0.5))
    assert not said(advantage=[RewardGate("drop")])


def test_rollouts_of_a_replay_are_saved_with_who_sampled_them(folders, rows, saved, tmp_path):
    sampler = replaying(saved, rows, on_policy_fraction=0.5)
    module = fixed.module(folders, rows, weighting=Uniform(), sampler=sampler)
    record = fixed.fit(module, rows.prompts).records[0]
    loaded = load_record(save_record(record, tmp_path / "step-1.safetensors"))
    told = record.rollout.replayed
    assert torch.equal(loaded.rollout.replayed.old, told.old)
    versions = read(replaying(tmp_path / "step-1.safetensors", rows)).sample(None, rows.prompts, SETTINGS).replayed
    assert versions.weights_version.tolist() == torch.where(told.old, 7, 0).tolist()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy_fraction": 1.5}, r"`ReplaySampler.on_policy_fraction` must be in \[0, 1\], got 1.5"),
        ({"on_policy_fraction": float("nan")}, "`ReplaySampler.on_policy_fraction` must be in"),
        ({"unknown_sampler": "one"}, "`ReplaySampler.unknown_sampler` must be refuse or as_student, got 'one'"),
        ({"missing": "skip"}, "`ReplaySampler.missing` must be error or sample, got 'skip'"),
        ({"paths": []}, "`ReplaySampler.paths` must be at least one file or folder"),
        (
            {"fresh": VLLMSampler(["http://a"], ahead=1)},
            "`ReplaySampler.fresh.ahead` must be 0: part of a batch cannot be .*, got 1",
        ),
        (
            {"fresh": ReplaySampler("x")},
            "`ReplaySampler.fresh` must be a sampler that draws tokens itself, got 'ReplaySampler'",
        ),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        ReplaySampler(**({"paths": "x"} | settings))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad.jsonl:2: a line must be a JSON object, got b'\{'"),
        ("[1]", "bad.jsonl:2: a line must be a JSON object, got list"),
        ('{"id": "b"}', "bad.jsonl:2: column 'response' must be the response's text, got None"),
        ('{"id": "b", "response": ""}', "column 'response' must be the response's text, got ''"),
        ('{"id": "b", "response": 3}', "column 'response' must be the response's text, got 3"),
        ('{"id": null, "response": "x"}', "column 'id' must be the id of a row of the data, got None"),
        ('{"id": "b", "response": "x", "finish_reason": "eos"}', "finish_reason must be one of stop, length"),
        ('{"id": "b", "response": "x", "tokens": {"text": []}}', "a line of samples.jsonl is no response"),
        ('{"id": "b", "response": "x", "tokens": [{"id": 5}]}', "`tokens` must be those of the response"),
        ('{"id": "b", "response": "x", "tokens": [{"id": 99}]}', "`tokens` must be those of the response"),
        ("[" * 100_000, "a line must be a JSON object"),
        ('{"id": "b", "response": "x\\ud800"}', "must be text of whole characters"),
        ('{"id": "b", "response": "x", "finish_reason": ["stop"]}', "finish_reason must be one of stop, length"),
        (
            '{"id": "b", "response": "x", "tokens": [{"id": 5}, {"id": 5, "turn": 1}]}',
            "of one turn, got those of a conversation",
        ),
        ('{"id": "b", "response": "x", "tokens": 5}', "`tokens` must be those of the response"),
    ],
)
def test_a_wrong_line_is_named(rows, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "a", "response": "x"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read(replaying(path, rows))


def test_files_that_are_not_there_or_hold_nothing_are_named(rows, tmp_path):
    for name, message in (("none.jsonl", "files that exist"), ("x.txt", "files that exist"), ("", "without any")):
        with pytest.raises(InputError, match=message):
            read(replaying(tmp_path / name, rows))
    with pytest.raises(InputError, match="the file must hold responses, got none"):
        read(replaying(written(tmp_path / "empty.jsonl", []), rows))
    with pytest.raises(InputError, match="must be a safetensors file that exists"):
        (tmp_path / "step-1.safetensors").write_bytes(b"no")
        read(replaying(tmp_path, rows))


def test_responses_to_other_prompts_are_refused_before_the_run(rows, saved, texts):
    pairs = zip(rows.prompts.row_ids, rows.prompts.ids, rows.prompts.mask, strict=True)
    own = {name: ids[mask].int() for name, ids, mask in pairs}
    read(replaying(saved, rows), prompts=own)
    changed = own | {"row-3": own["row-3"] + 1}
    with pytest.raises(InputError, match="row 3: the response to 'row-3' must be to the data's prompt"):
        read(replaying(saved, rows), prompts=changed)
    with pytest.raises(InputError, match=r"got none to 1 of 7 \(first: 'more'\)"):
        read(replaying(texts, rows), prompts=own | {"more": own["row-0"]})
    with pytest.raises(InputError, match="by their row ids, got such as 'row-0' for prompts such as 'x-1'"):
        read(replaying(texts, rows), prompts={"x-1": own["row-0"]})
    with pytest.raises(InputError, match=r"must hold ids in \[0, 8\)"):
        read(replaying(saved, rows), vocabulary=8)
    with pytest.warns(UserWarning, match="of 6 responses, 5 answer no prompt of the data and are not used"):
        read(replaying(texts, rows), prompts={"row-1": own["row-1"]})
    with pytest.warns(UserWarning, match="6 prompts have fewer than samples_per_prompt 2"):
        read(replaying(texts, rows), prompts=own, samples=2)


def test_answers_to_other_prompts_of_the_same_row_ids_are_refused(folders, rows, tmp_path):
    """As of another slice; a line's prompt is its rendering in any template, or what somebody wrote."""
    asked = ["one  plus two", "three plus   four", "5 + 1 ="]
    train = str(written(tmp_path / "data.jsonl", [{"problem": text} for text in asked]))

    def check(prompts: list[Any]) -> None:
        lines = [{"row_id": f"data-{n}", "response": "ab", "prompt": prompt} for n, prompt in enumerate(prompts)]
        sampler = replaying(written(tmp_path / "predictions.jsonl", lines), rows)
        module = fixed.module(folders, rows, weighting=Uniform(), sampler=sampler, objective=Likelihood())
        data = PromptDataModule(train, prompt_batch=3).use_tokenizer(module.tokenizer).use_sampler(sampler)
        data.setup("fit")
        check_replay(module, data)

    rendered = [LETTERS.decode(PromptEncoder(LETTERS).encode(text)) for text in asked]
    check(rendered)
    check([f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{text.strip()}<|im_end|>" for text in asked])
    check([[{"role": "user", "content": "hello"}, {"role": "user", "content": asked[0].upper()}], None, {"of": "mine"}])
    turn = [{"role": "user", "content": asked[2]}]
    for prompts in (rendered[1:] + rendered[:1], [asked[1], None, None], [turn, None, None]):
        with pytest.raises(InputError, match=r"jsonl:1: .* 'data-0' .* 'one  plus two'; .* delete the col"):
            check(prompts)


def test_a_response_must_end_where_the_student_would(rows, old, saved, texts):
    """Stop ids of the run are others than those of the files."""
    for stops, message in (((5, 1), "goes on after the stop id 5"), ((60,), "ends with 1")):
        with pytest.raises(InputError, match=f"a response must end at the first of the run's stop ids .*{message}"):
            read(replaying(texts, rows), stop_ids=stops)
    with pytest.raises(InputError, match="a response must end at the first of the run's stop ids"):
        read(replaying(saved, rows), stop_ids=(1, int(old.response_ids[0, 0])))


def test_conversations_are_not_replayed(rows, saved, tmp_path):
    record = load_record(saved)
    observed = torch.zeros_like(record.rollout.mask)
    talk = replace(record.rollout, observed=observed, turn=torch.zeros_like(record.rollout.response_ids))
    path = save_record(replace(record, rollout=talk), tmp_path / "step-1.safetensors")
    with pytest.raises(InputError, match="must hold responses of one turn, got the conversations of"):
        read(replaying(path, rows))


def test_an_objective_that_may_not_read_what_is_saved_is_refused(folders, rows, saved, texts):
    def check(sampler: ReplaySampler | None = None, **settings: Any) -> None:
        given = {} if sampler is None else {"sampler": sampler}
        check_replay(fixed.module(folders, rows, weighting=Uniform(), **given, **settings), None)

    with pytest.raises(InputError, match="`PolicyLoss` must have the sampler's log-probs .*as_student"):
        check(replaying(texts, rows))
    check(replaying(texts, rows, unknown_sampler="as_student"))
    check(replaying(texts, rows), objective=Divergence("forward_kl"))
    check(replaying(saved, rows))
    with pytest.warns(UserWarning, match="importance_cap` is null: saved responses count as if"):
        check(replaying(saved, rows), objective=PolicyLoss(importance_cap=None))
    baseline = {"advantage": [ValueBaseline()]}
    with pytest.raises(
        InputError, match="no baseline with `ReplaySampler.unknown_sampler` as_student, got ValueBaseline: .*;"
    ):
        check(replaying(texts, rows, unknown_sampler="as_student"), **baseline)
    with pytest.raises(
        InputError, match="no baseline with `PolicyLoss.importance_cap` null, got ValueBaseline: .*; leave"
    ):
        check(replaying(saved, rows), objective=PolicyLoss(importance_cap=None), **baseline)
    check(replaying(saved, rows, unknown_sampler="as_student"), **baseline)  # the sampler is known
    check(replaying(texts, rows), objective=Divergence("forward_kl"), **baseline)  # without effect there
    first = replaying(texts, rows, unknown_sampler="as_student", on_policy_fraction=1.0)
    check(first, warmup=WarmUp(2), **baseline)  # the warm-up alone reads the texts, by a likelihood
    with pytest.raises(InputError, match="`ReplaySampler.on_policy_fraction` must be below 1 without `model.warmup`"):
        check(replaying(saved, rows, on_policy_fraction=1.0))
    check(replaying(texts, rows, on_policy_fraction=1.0), warmup=WarmUp(1))
    with pytest.raises(InputError, match="`PolicyLoss` must have the sampler's log-probs"):
        check(replaying(texts, rows, on_policy_fraction=1.0), warmup=WarmUp(1, PolicyLoss()))
    with pytest.raises(InputError, match="`model.sampler` must be ReplaySampler with `model.warmup`, got FixedSampler"):
        check(warmup=WarmUp(1))
    with pytest.raises(InputError, match="`WarmUp.steps` must be an integer >= 1, got 0"):
        WarmUp(0)


def test_prediction_files_are_read_by_their_tokens(rows, tmp_path):
    """The end symbol is among them; a cut row has none."""
    ids = LETTERS("ab", add_special_tokens=False)["input_ids"]
    text = LETTERS.decode(ids)
    lines = [
        {"row_id": "row-0", "response": text, "finish_reason": "stop", "tokens": [{"id": i} for i in [*ids, 1]]},
        {"row_id": "row-1", "response": text, "finish_reason": "length", "tokens": [{"id": i} for i in ids]},
        {"row_id": "row-2", "response": "ab", "finish_reason": "length"},
    ]
    found = read(replaying(written(tmp_path / "predictions.jsonl", lines), rows)).saved
    assert [found[f"row-{n}"][0].ids.tolist() for n in range(3)] == [[*ids, 1], ids, ids]
    assert [found[f"row-{n}"][0].finish_reason for n in range(3)] == [0, 1, 1]
    assert numpy.array([found[f"row-{n}"][0].logprobs is None for n in range(3)]).all()
