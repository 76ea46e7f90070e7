"""Responses in pieces: the tokens of one go, each row once, the version of every token, and counts that add up."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lit_opd.advantage import GroupReward
from lit_opd.errors import InputError
from lit_opd.evaluation import Reward, ValidationSettings
from lit_opd.module import OPDModule
from lit_opd.objective import PolicyLoss
from lit_opd.preflight.partial_checks import _check_columns
from lit_opd.prompts import Attempt, HindsightPrompt, PromptDataModule
from lit_opd.rollout import (
    DecodeSampler,
    LengthBudget,
    PartialSampler,
    RatioStop,
    ReplaySampler,
    Sampler,
    SamplingSettings,
    TransformersSampler,
    VLLMSampler,
)
from lit_opd.rollout.base import TextFacts, finish
from lit_opd.rollout.saved_responses import read_responses
from lit_opd.saved_steps import load_record, save_record
from lit_opd.streams import row_uniforms
from lit_opd.turns import TurnsSampler
from lit_opd.types import DataRow, FinishReason, PromptBatch, Rollout, StepRecord
from lit_opd.weighting import Uniform
from tests.helpers import fake_vllm as fake
from tests.helpers import fixed, tiny
from tests.helpers.talking import Counting

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, ROWS, SLOTS, BUDGET, CAP = 10, 6, 12, 4, 1.2  # of the file, of a batch; tokens; of the importance weight
ROUNDING = 1e-6  # transformers' norm is in float32 whatever the weights are
STOPS = [1, 5, 9, 13, 17, 21, 25, 29]  # an eighth of the vocabulary
ENGINES = {"decode": DecodeSampler, "transformers": TransformersSampler}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models so flat that rows end anywhere."""
    folder = tmp_path_factory.mktemp("flat")
    models = [tiny.qwen3(seed=seed) for seed in (1, 2)]
    for model in models:
        with torch.no_grad():
            model.lm_head.weight.mul_(0.02)
    student, teacher = (tiny.save(model, folder / str(number)) for number, model in enumerate(models))
    return student, teacher


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Batches of it cross an epoch."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{'a' * (i % 4)}{i} =", "answer": str(i)}) + "\n" for i in range(PROMPTS))
    )
    return str(path)


def partial(
    engine: type[Sampler] = DecodeSampler, *, budget: int = BUDGET, waiting: float = 0.5, **given: Any
) -> PartialSampler:
    own = {"max_new_tokens": SLOTS, "stop_token_ids": STOPS} | given
    return PartialSampler(engine(**own), budget, waiting)


def fit(
    folders: tuple[str, str],
    train_file: str,
    sampler: Sampler,
    *,
    watch: Sequence[L.Callback] = (),
    load: Path | None = None,
    steps: int = 5,
    lr: float = 0.0,
    samples: int = 1,
    batch: int = ROWS,
    hint: HindsightPrompt | None = None,
    **settings: Any,
) -> tuple[OPDModule, list[StepRecord]]:
    """A float64 run on the prompts of the file."""
    given = {
        "dtype": "float64",
        "weighting": Uniform(),
        "objective": PolicyLoss(importance_cap=CAP),
        "seed": 5,
    } | settings
    trained = fixed.module(
        folders,
        fixed.rollout(lengths=[1], prompt_lengths=[1], truncated=set()),
        sampler=sampler,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        **given,
    )
    shape = {"prompt_batch": batch, "samples_per_prompt": samples, "max_prompt_tokens": 24}
    data = PromptDataModule(train=train_file, teacher_prompt=hint, **shape)
    collect = fixed.Collect()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[collect, *watch],
    )  # fmt: skip
    trainer.fit(trained, datamodule=data, ckpt_path=load)
    return trained, collect.records


def handed_out(trained: OPDModule, steps: int) -> list[PromptBatch]:
    """The batches of the data, by step."""
    loader = trained.trainer.train_dataloader
    return [loader.batch(step) for step in range(steps)]


@pytest.fixture(scope="module")
def stood(folders, train_file) -> tuple[OPDModule, list[StepRecord]]:
    """A run of three steps that changes no weight; what it left is not changed by a test."""
    with pytest.warns(UserWarning, match=r"[1-3] responses with \d+ tokens were not finished when training ended"):
        return fit(folders, train_file, partial(), steps=3)


class Copy(L.Callback):
    """The student's weights before each step."""

    def __init__(self) -> None:
        self.students: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Keep them."""
        self.students.append(fixed.weights(pl_module))


class Told(L.Callback):
    """What each step logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Keep it."""
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# -- the tokens of one go ----------------------------------------------------------------------------------------------


# a budget that divides the longest response, and one that does not
@pytest.mark.parametrize(("engine", "budget"), [("decode", 4), ("transformers", 5)])
def test_with_weights_that_stay_a_continued_response_is_the_one_of_one_go(folders, train_file, engine, budget):
    """Tokens, log-probs and ends equal those that the engine draws in the step in which the row was begun; every row of the
    data is trained on once, or waits."""
    steps = 4
    sampler = partial(ENGINES[engine], budget=budget)
    trained, records = fit(folders, train_file, sampler, steps=steps)
    whole: dict[tuple[int, int], tuple[list[int], list[float], int]] = {}
    for step, prompts in enumerate(handed_out(trained, steps)):
        rollout = sampler.engine.sample(trained.student, prompts, trained.sampling_settings(step=step))
        for row, key in enumerate(prompts.row_keys.tolist()):
            whole[step, key] = of_row(rollout, row)
    continued, seen = 0, Counter()
    for record in records:
        rollout = record.rollout
        for row, key in enumerate(rollout.prompts.row_keys.tolist()):
            begun = int(rollout.version[row][0])
            ids, logprobs, reason = of_row(rollout, row)
            expected = whole[begun, key]
            assert ids == expected[0] and reason == expected[2]
            assert logprobs == pytest.approx(expected[1], abs=ROUNDING)
            seen[begun, key] += 1
            continued += begun < record.step - 1
    waiting = Counter((row.begun, int(row.prompt.row_keys)) for row in sampler._waiting)
    assert continued > 2 and seen + waiting == Counter(whole.keys())
    for row in sampler._waiting:
        assert row.ids == whole[row.begun, int(row.prompt.row_keys)][0][: len(row.ids)]


def of_row(rollout: Rollout, row: int) -> tuple[list[int], list[float], int]:
    mask = rollout.mask[row]
    return (
        rollout.response_ids[row][mask].tolist(), rollout.sampler_logprobs[row][mask].tolist(), int(rollout.finish_reason[row])
    )  # fmt: skip


def test_greedy_responses_are_those_of_one_go_too(stood):
    trained, sampler = stood[0], partial()
    (prompts,) = handed_out(trained, 1)
    asked = trained.sampling_settings(greedy=True, stop_ids=(1,))
    whole = sampler.engine.sample(trained.student, prompts, asked)
    parts: list[Rollout] = []
    for step in range(3):
        parts.append(sampler.sample(trained.student, prompts, replace(asked, replay="some", step=step)))
        sampler.take_unfinished()
    found = {}
    for part in parts:
        for row, key in enumerate(part.prompts.row_keys.tolist()):
            found.setdefault(key, of_row(part, row)[0])
    assert found == {key: of_row(whole, row)[0] for row, key in enumerate(prompts.row_keys.tolist())}


def test_random_numbers_go_on_where_a_row_stopped():
    keys = torch.tensor([7, 8, 9])
    settings = SamplingSettings(
        max_new_tokens=5, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3, step=9, begun=((2, 4), (9, 0), (2, 4))
    )
    found = settings.uniforms(keys)
    for row, (step, first) in enumerate(settings.begun):
        assert torch.equal(found[row], row_uniforms(3, keys[row : row + 1], step, first + 5)[0, first:])
    assert torch.equal(replace(settings, begun=()).uniforms(keys), row_uniforms(3, keys, 9, 5))


def test_what_a_step_may_train_on_is_known_before_it(stood):
    assert partial().trained_rows(ROWS) == (3, 9) and partial(waiting=0.4).trained_rows(ROWS) == (4, 8)
    assert DecodeSampler().trained_rows(ROWS) == (ROWS, ROWS)
    assert all(3 <= len(record.rollout) <= 9 for record in stood[1])


def test_evaluations_sample_whole_responses(stood):
    trained, _ = stood
    (prompts,) = handed_out(trained, 1)
    before = [row.text for row in trained.sampler._waiting]
    rollout = trained.generate(prompts)
    assert rollout.version is None and len(rollout) == len(prompts) and int(rollout.lengths.max()) > BUDGET
    assert before and [row.text for row in trained.sampler._waiting] == before


# -- weights that change -----------------------------------------------------------------------------------------------


def test_each_token_has_the_log_prob_and_the_version_of_the_weights_that_sampled_it(folders, train_file):
    """Both against forwards of copies of the student; the loss against loops over the tokens, importance weights in it."""
    copies, sampler = Copy(), partial()
    sampler.engine.max_logprob_gap = 1e-4  # far below what the weights move, so tokens of older ones are not compared
    _, records = fit(folders, train_file, sampler, watch=[copies], steps=4, lr=30.0)
    models = []
    for weights in copies.students:
        model = tiny.qwen3(seed=1).double()
        model.load_state_dict(weights)
        models.append(model)
    old, capped = 0, 0
    for step, record in enumerate(records):
        rollout, losses = record.rollout, []
        assert rollout.provenance.weights_version == step
        for row in range(len(rollout)):
            ids, said, _ = of_row(rollout, row)
            prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()
            versions = rollout.version[row][rollout.mask[row]].tolist()
            tables = [told(model, prompt, ids) for model in models[: step + 1]]
            total = 0.0
            for place, (version, logprob) in enumerate(zip(versions, said, strict=True)):
                assert version == versions[place - place % BUDGET]
                assert tables[version][place] == pytest.approx(logprob, abs=ROUNDING)
                assert all(
                    abs(tables[other][place] - logprob) > 3 * ROUNDING for other in range(step + 1) if other != version
                )
                now = tables[step][place]
                advantage = float(record.signal.teacher_logprobs[row, place]) - now
                importance = min(math.exp(now - logprob), CAP)
                old, capped = old + (version < step), capped + (importance == CAP)
                total -= importance * advantage
            losses.append(total / len(ids))
        assert float(reported(record)) == pytest.approx(sum(losses) / len(losses), rel=ROUNDING)
    assert old > 10 and capped > 2


@torch.no_grad()
def told(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """Log-probs of a response's tokens."""
    table = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return [float(row[token]) for row, token in zip(table, ids, strict=True)]


def reported(record: StepRecord) -> Tensor:
    """The sequence mean of the record's token losses."""
    mask = record.rollout.mask
    return (record.loss.sum(-1) / mask.sum(-1)).mean()


def test_the_gradient_of_ended_rows_is_that_of_the_same_rows_sampled_in_one_go(folders, stood):
    """The last batch of a run that stood still, given again as a plain rollout."""
    _, records = stood
    rollout = records[-1].rollout
    keys = torch.arange(len(rollout))  # a prompt of two epochs has the same key twice
    rollout = replace(rollout, prompts=replace(rollout.prompts, row_keys=keys))
    assert bool(rollout.older.any())
    found = []
    for one in (rollout, replace(rollout, version=None)):
        plain = fixed.module(folders, one, weighting=Uniform(), objective=PolicyLoss(importance_cap=CAP))
        found.append(fixed.gradient(plain, one.prompts))
    assert found[0][0] == found[1][0] == pytest.approx(float(reported(records[-1])), rel=1e-9)
    assert all(torch.equal(found[0][1][name], value) for name, value in found[1][1].items())


# -- going on ----------------------------------------------------------------------------------------------------------


class Save(L.Callback):
    """A checkpoint after one optimizer step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Save."""
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def assert_same(ours: Rollout, theirs: Rollout) -> None:
    for name in ("response_ids", "mask", "sampler_logprobs", "finish_reason", "version"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.prompts.ids, theirs.prompts.ids) and torch.equal(
        ours.prompts.row_keys, theirs.prompts.row_keys
    )
    assert ours.prompts.answers == theirs.prompts.answers and ours.prompts.row_ids == theirs.prompts.row_ids
    assert ours.provenance == theirs.provenance


def test_a_run_that_goes_on_is_the_run_that_did_not_stop(folders, train_file, tmp_path):
    save, told = Save(tmp_path / "at-2.ckpt", 2), [Told(), Told()]
    whole, all_steps = fit(folders, train_file, partial(), watch=[save, told[0]], steps=4, lr=1.0)
    kept = torch.load(save.path, weights_only=True)["unfinished_responses"]
    assert kept and {"prompt", "ids", "logprobs", "versions", "begun"} <= kept[0].keys()
    resumed, last_steps = fit(folders, train_file, partial(), watch=[told[1]], load=save.path, steps=4, lr=1.0)
    assert len(last_steps) == 2
    for ours, theirs in zip(last_steps, all_steps[2:], strict=True):
        assert_same(ours.rollout, theirs.rollout)
    for name, value in fixed.weights(whole).items():
        assert torch.equal(value, fixed.weights(resumed)[name]), name
    counts = ("train/tokens", "train/waiting_rows", "train/waiting_tokens", "train/trained_tokens", "train/loss")
    for ours, theirs in zip(told[1].rows, told[0].rows[2:], strict=True):
        assert {name: ours[name] for name in counts} == {name: theirs[name] for name in counts}


def test_a_step_that_fails_is_made_again_from_where_it_began(stood):
    trained, _ = stood
    sampler, settings = copy.copy(trained.sampler), trained.training_settings()
    prompts = trained.trainer.train_dataloader.coming()
    first = sampler.sample(trained.student, prompts, settings)
    state = sampler.unfinished_state()
    again = sampler.sample(trained.student, prompts, settings)
    assert_same(again, first)
    assert repr(sampler.unfinished_state()) == repr(state)  # of before the step, until it counts as made
    sampler.take_unfinished()
    assert repr(sampler.unfinished_state()) != repr(state)


def test_rows_of_two_ranks_are_dealt_to_one_with_their_groups_apart(stood):
    sampler = copy.copy(stood[0].sampler)
    own = sampler.unfinished_state()
    state = [{**row, "rank": rank, "world": 2} for rank in (0, 1) for row in own]
    sampler.restore_unfinished(state)
    assert len(sampler._waiting) == 2 * len(own) > 0
    assert len({row.group for row in sampler._waiting}) == len(state)  # ranks count their groups alike
    assert [row.text for row in sampler._waiting] == 2 * [row["prompt"].tolist() + row["ids"].tolist() for row in own]


def test_what_nobody_goes_on_with_is_said(stood):
    state = stood[0].sampler.unfinished_state()
    with pytest.warns(
        UserWarning, match=f"{len(state)} responses that were to be continued: they are dropped, since DecodeS"
    ):
        DecodeSampler().restore_unfinished(state)
    short = partial(max_new_tokens=BUDGET, budget=2)
    with pytest.warns(
        UserWarning, match=f"{len(state)} responses .* `model.sampler.max_new_tokens` {BUDGET} tokens or more"
    ):
        short.restore_unfinished(state)
    assert {(len(row.ids), row.reason) for row in short._waiting} == {(BUDGET, FinishReason.LENGTH)}


def test_rows_that_had_ended_behind_a_smaller_limit_are_cut_there_too(stood):
    """They waited for the others of their prompt."""
    first = stood[0].sampler.unfinished_state()[0]
    for length, reason, cut in ((SLOTS, FinishReason.STOP, True), (BUDGET, FinishReason.STOP, False)):
        lists = {"ids": torch.arange(length), "logprobs": torch.zeros(length), "versions": torch.zeros(length)}
        short = partial(max_new_tokens=BUDGET, budget=2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            short.restore_unfinished([{**first, **lists, "reason": int(reason)}])
        (row,) = short._waiting
        assert len(row.ids) == len(row.logprobs) == len(row.versions) == BUDGET and bool(said) == cut
        assert row.reason == (FinishReason.LENGTH if cut else FinishReason.STOP)


def test_a_column_that_no_checkpoint_holds_is_refused_before_the_run():
    rows = [
        DataRow({"n": 1, "parts": [{"a": None}]}, row_id="a"),
        DataRow({"when": datetime.date(2026, 1, 1)}, row_id="b"),
    ]
    data = SimpleNamespace(training_rows=rows[:1])
    _check_columns(data)
    data.training_rows = rows
    with pytest.raises(InputError, match="got date in column 'when' of row 'b'"):
        _check_columns(data)


def test_a_saved_step_has_versions_and_what_waited(stood, tmp_path):
    """And a replay of it takes the version of a response's first token."""
    record = stood[1][-1]
    path = save_record(record, tmp_path / "step-3.safetensors")
    again = load_record(path)
    assert torch.equal(again.rollout.version, record.rollout.version)
    assert int(again.waiting.responses) == len(stood[0].sampler._waiting) > 0
    facts = TextFacts(encode=list, decode=str, stop_ids=tuple(STOPS), end_id=1, vocabulary=64)
    found, _ = read_responses([str(path)], facts, response_column="", id_column=None)
    assert [row.weights_version for row in found] == record.rollout.version[:, 0].tolist()


# -- groups ------------------------------------------------------------------------------------------------------------


class Peers(HindsightPrompt):
    """Keeps whom each response was shown."""

    compares, max_prompt_tokens = True, 24

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str]]] = []

    def render(self, attempt: Attempt, peers: Sequence[Attempt]) -> str:
        """What the student reads."""
        self.seen.append((attempt.row.row_id, [peer.row.row_id for peer in peers]))
        return str(attempt.row.prompt[0]["content"])


def test_teacher_prompts_are_made_of_the_samples_of_one_prompt(folders, train_file):
    own = Peers()
    sampler, validation = partial(), ValidationSettings(divergence=False)
    _, records = fit(folders, train_file, sampler, steps=2, samples=3, batch=4, hint=own, validation=validation)
    assert {len(record.rollout) for record in records} != {12}
    assert len(own.seen) == sum(len(record.rollout) for record in records)
    assert all(peers == [row] * 2 for row, peers in own.seen)


class Long(Reward):
    """The number of tokens."""

    def score(self, responses: Sequence[str], rollout: Rollout) -> list[float | None]:
        """Of each row."""
        return [float(length) for length in rollout.lengths]


class OthersSaid(HindsightPrompt):
    """Is given the other samples of the prompt, and needs no reward; keeps whose they were."""

    compares = True
    max_prompt_tokens = 24

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def render(self, attempt, peers):
        """The prompt as it is."""
        self.seen.append([one.row.row_id for one in (attempt, *peers)])
        return attempt.row.prompt[0]["content"]


@pytest.mark.parametrize("by", ["reward", "hint", None])
def test_samples_of_a_prompt_end_in_one_batch_where_something_compares_them(folders, train_file, by):
    together, hint = by is not None, OthersSaid() if by == "hint" else None
    given = {"reward": Long(), "advantage": [GroupReward(1.0)]} if by == "reward" else {}
    trained, records = fit(folders, train_file, partial(), steps=3, samples=3, batch=4, hint=hint, **given)
    assert hint is None or {(len(ids), len(set(ids))) for ids in hint.seen} == {
        (3, 1)
    }  # of one prompt, and all of them
    whole = []
    for record in records:
        rollout = record.rollout
        begun = [int(rollout.version[row][0]) for row in range(len(rollout))]
        whole += Counter(zip(begun, rollout.prompts.row_ids, strict=True)).values()
    assert (set(whole) == {3}) == together
    if together:  # some rows of a group waited for others of it
        waited = [
            int(rollout.version[row][mask][-1]) < record.step - 1
            for record, rollout in [(record, record.rollout) for record in records]
            for row, mask in enumerate(rollout.mask)
        ]
        assert any(waited)


# -- what is logged ----------------------------------------------------------------------------------------------------


class Scripted(Sampler):
    """Writes rows of lengths that are known, ended by id 1; the log-prob of a token is its place in its row times -1/8."""

    max_logprob_gap = math.inf
    continues = True
    in_process = False  # as a server, which takes short and long rows at once

    def __init__(self, lengths: dict[tuple[int, int], int], **settings: Any) -> None:
        super().__init__(**settings)
        self.lengths, self.calls = lengths, []

    def sample(self, model: Any, prompts: PromptBatch, settings: Any) -> Rollout:
        """The next tokens of each row."""
        self.calls.append((len(prompts), settings.max_new_tokens))
        ids = torch.full((len(prompts), settings.max_new_tokens), 7)
        logprobs = torch.zeros(ids.shape, dtype=torch.float64)
        for row, (key, (step, drawn)) in enumerate(zip(prompts.row_keys.tolist(), settings.begun, strict=True)):
            left = self.lengths[step, key] - drawn
            if left <= settings.max_new_tokens:
                ids[row, left - 1] = 1
            logprobs[row] = -(drawn + torch.arange(settings.max_new_tokens)) / 8
        return finish(prompts, ids, logprobs, settings, engine="scripted")


@dataclass
class Line:
    """A row of the book that is kept by hand."""

    begun: int
    length: int
    cut: bool
    reached: int = 0
    versions: tuple[int, ...] = ()


def test_every_number_is_that_of_a_book_kept_by_hand(folders, train_file):
    """Lengths are known, so which rows are trained on in which step can be said without the sampler."""
    steps, script = 5, torch.Generator().manual_seed(2)
    trained, _ = fit(folders, train_file, partial(), steps=1)
    batches = handed_out(trained, steps)
    lengths = {
        (step, key): int(torch.randint(1, SLOTS + 6, (), generator=script))  # some longer than they may be
        for step, prompts in enumerate(batches)
        for key in prompts.row_keys.tolist()
    }
    engine = Scripted(lengths, max_new_tokens=SLOTS, stop_token_ids=[1])
    watch = Told()
    _, records = fit(folders, train_file, PartialSampler(engine, BUDGET, 0.34), watch=[watch], steps=steps, lr=1.0)
    book: list[Line] = []
    all_sampled = all_trained = rounds = 0
    for step, (prompts, told, record) in enumerate(zip(batches, watch.rows, records, strict=True)):
        new = [lengths[step, key] for key in prompts.row_keys.tolist()]
        book += [Line(step, min(length, SLOTS), cut=length > SLOTS) for length in new]
        sampled, most = 0, 2  # 0.34 of 6 rows
        while sampled == 0 or sum(line.reached < line.length for line in book) > most:
            rounds += 1
            for line in book:
                more = min(BUDGET, line.length - line.reached)
                line.reached, sampled = line.reached + more, sampled + more
                line.versions += (step,) * more
        done = [line for line in book if line.reached == line.length]
        book = [line for line in book if line.reached < line.length]
        versions = [version for line in done for version in line.versions]
        all_sampled, all_trained = all_sampled + sampled, all_trained + len(versions)
        gaps = {True: [], False: []}
        for row, line in enumerate(done):
            for place, version in enumerate(line.versions):
                gaps[version < step].append(abs(float(record.signal.student_logprobs[row, place]) + place / 8))
        expected = {
            "train/tokens": sampled,
            "train/trained_rows": len(done),
            "train/trained_tokens": len(versions),
            "train/response_length": mean([line.length for line in done]),
            "train/truncated_fraction": mean([line.cut for line in done]),
            "train/older_fraction": mean([version < step for version in versions]),
            "train/weights_behind": mean([step - version for version in versions]),
            "train/older_gap": mean(gaps[True]),
            "train/sampler_gap": mean(gaps[False]),
            "train/waiting_rows": len(book),
            "train/waiting_tokens": sum(line.reached for line in book),
            "train/waiting_steps": mean([step - line.begun for line in book]),
        }
        found = {name: told[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-9, nan_ok=True), step
        assert record.rollout.version[record.rollout.mask].tolist() == versions
    assert all_sampled == all_trained + sum(line.reached for line in book)
    assert (
        rounds > steps and len(engine.calls) == rounds
    )  # some steps need another round; one call each, as 4 divides 12
    assert {record.rollout.version.max().item() for record in records} == set(range(steps))


def mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# -- servers -----------------------------------------------------------------------------------------------------------


def test_a_server_is_sent_prompt_and_response_so_far(folders, train_file):
    """With seeds of their own; at temperature 0 a row is that of one go."""
    sent: list[dict[str, Any]] = []

    def note(server: Any, handler: Any, body: dict) -> bool:
        sent.append(body)
        return False

    with fake.serving(folders[0], model="student") as server:
        sampler = partial(VLLMSampler, urls=[server.url], timeout=5.0, start_seconds=5.0, max_logprob_gap=None)
        sampler.check(tokens=None, vocabulary=64)
        prompts = fixed.rollout(lengths=[1] * 3, prompt_lengths=[2, 3, 1], truncated=set()).prompts
        asked = SamplingSettings(max_new_tokens=SLOTS, stop_ids=(1, 5), pad_id=0, vocabulary=64, greedy=True)
        whole = sampler.sample(None, prompts, asked)
        server.always, found, steps = note, {}, 3
        for step in range(steps):
            more = replace(prompts, row_keys=prompts.row_keys + 10 * step)  # the same prompts again, as further rows
            rollout = sampler.sample(None, more, replace(asked, replay="some", step=step, weights_version=step))
            sampler.take_unfinished()
            found |= {int(key): of_row(rollout, row) for row, key in enumerate(rollout.prompts.row_keys)}
    assert found.keys() >= set(prompts.row_keys.tolist())
    for row, key in enumerate(prompts.row_keys.tolist()):
        ids, logprobs, reason = of_row(whole, row)
        assert found[key][0] == ids and found[key][2] == reason
        assert found[key][1] == pytest.approx(logprobs, abs=1e-5)
    texts = [prompts.ids[row][prompts.mask[row]].tolist() for row in range(3)]
    continued = [body["prompt"][0] for body in sent if body["prompt"][0] not in texts]
    starts = [text + of_row(whole, row)[0][:place] for row, text in enumerate(texts) for place in (4, 8)]
    assert continued and all(text in starts for text in continued)
    assert len({body["seed"] for body in sent}) == len(sent)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, -1, True, 2.5, SLOTS, SLOTS + 1])
def test_a_budget_is_some_tokens_and_leaves_some(budget):
    said = "below `sampler.max_new_tokens` 12" if budget >= SLOTS else ">= 1 token, a whole number"
    with pytest.raises(InputError, match=f"`PartialSampler.budget` must be {said}, got {budget}"):
        partial(budget=budget)


@pytest.mark.parametrize("waiting", [0.0, 1.0, -0.5, 2, math.nan])
def test_a_share_of_the_rows_waits(waiting):
    with pytest.raises(InputError, match=r"`PartialSampler.waiting` must be between 0 and 1"):
        partial(waiting=waiting)


def test_samplers_that_are_more_than_an_engine_stand_neither_inside_nor_around(tmp_path):
    engine = DecodeSampler(max_new_tokens=SLOTS)
    inside = "neither replays, environments nor partial rollouts stand inside one another"
    for wrong in (TurnsSampler(engine, Counting()), ReplaySampler("a.jsonl", engine), partial()):
        name = type(wrong).__name__
        with pytest.raises(
            InputError, match=f"`PartialSampler.sampler` must be one that draws .*, got '{name}'; {inside}"
        ):
            PartialSampler(wrong, BUDGET)
    with pytest.raises(
        InputError, match="one that heeds `SamplingSettings.begun`, got 'FixedSampler'; its random numbers"
    ):
        PartialSampler(fixed.FixedSampler(max_new_tokens=SLOTS), BUDGET)
    with pytest.raises(InputError, match="`PartialSampler.sampler.ahead` must be 0.*, got 1"):
        PartialSampler(VLLMSampler(["http://a"], ahead=1), BUDGET)
    with pytest.raises(InputError, match="`TurnsSampler.sampler` must be an engine that .*, got 'PartialSampler'"):
        TurnsSampler(partial(), Counting())
    with pytest.raises(
        InputError, match="`ReplaySampler.fresh` must be a sampler that draws tokens itself, got 'PartialS"
    ):
        ReplaySampler("a.jsonl", partial())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "length budget": ({"length_budget": LengthBudget(5)}, "`model.length_budget` must be null with PartialSampler"),
    "stop": (
        {"rollout_stop": RatioStop()},
        "`model.rollout_stop` must be null for responses sampled by PartialSampler",
    ),
    "one row": ({"batch": 1}, "`PartialSampler.waiting` must let a row wait, got 0.5 of the 1 rows of a rank"),
    "one group": (
        {"batch": 1, "samples": 3, "reward": Long()},
        "`PartialSampler.waiting` must let the 3 samples of a prompt, .* wait, got 0.5 of the 3 rows",
    ),
    "mini-batches": (
        {"mini_batches": 4, "steps": 8},
        "`model.mini_batches` must be at most the 3 rows .*, of which 3 may wait",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_be_is_refused_before_it_starts(name, folders, train_file):
    settings, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        fit(folders, train_file, partial(), **settings)


def test_a_policy_gradient_without_a_correction_is_told_of_it(folders, train_file):
    with pytest.warns(UserWarning, match="`PolicyLoss.importance_cap` is null: tokens that older weights"):
        fit(folders, train_file, partial(), steps=1, objective=PolicyLoss(importance_cap=None))


# -- two ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_of_two_ranks_keeps_its_own_rows(folders, train_file, tmp_path):
    """Every row of the data once, whichever rank has it; and a run that goes on is the one that did not stop, bit for bit."""
    sampler = {"class_path": "lit_opd.rollout.PartialSampler", "init_args": {
        "budget": BUDGET, "sampler": {"class_path": "lit_opd.rollout.DecodeSampler", "init_args": {
            "max_new_tokens": SLOTS, "stop_token_ids": STOPS}}}}  # fmt: skip
    config = {
        "wandb": {"mode": "disabled"}, "num_threads": 1, "checkpoint_every": 3,
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_steps": 6},
        "model": {
            "student": {"path": folders[0]}, "sampler": sampler,
            "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": folders[1]}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {"train": train_file, "prompt_batch": 2 * ROWS, "max_prompt_tokens": 24},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.partial_ranks", str(tmp_path), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    trained = [row for rank in ranks for step in rank["whole"]["rows"] for row in step]
    assert len(trained) == len({(begun, key) for begun, key, _ in trained})  # no row twice
    told = ranks[0]["whole"]["told"]
    counts = ("train/tokens", "train/waiting_rows", "train/trained_rows")
    assert [[row[name] for name in counts] for row in told] == [
        [row[name] for name in counts] for row in ranks[1]["whole"]["told"]
    ]
    assert len(trained) + told[-1]["train/waiting_rows"] == 6 * 2 * ROWS  # and none is lost
    assert sum(row["train/tokens"] for row in told) == sum(n for *_, n in trained) + told[-1]["train/waiting_tokens"]
    for rank in ranks:
        assert rank["again"]["rows"] == rank["whole"]["rows"][3:]
    ends = [load_file(tmp_path / name / "student/model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
