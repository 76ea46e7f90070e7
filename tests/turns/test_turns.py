"""Conversations with an environment: one forward over the whole row against what was sampled turn by turn."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import warnings
from dataclasses import replace
from itertools import count, repeat
from typing import Any

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.evaluation.sets import load_sets
from lit_opd.prompts import HindsightPrompt, PeerDemonstration
from lit_opd.prompts.encoding import PromptEncoder, collate, encode_rows
from lit_opd.prompts.hindsight import Hindsight
from lit_opd.prompts.sources import DataSource, PromptRow
from lit_opd.report.replay import load_record, save_record
from lit_opd.rollout import DecodeSampler, ReplaySampler, TransformersSampler, VLLMSampler
from lit_opd.step.recipe import apply_truncated
from lit_opd.step.scalars import turn_scalars
from lit_opd.teacher import RemoteTeacher
from lit_opd.turns import Answer, Environment, TurnsSampler, stage
from lit_opd.turns.environment import PROMPT_ROLES, Refused, checked_answer, checked_messages
from lit_opd.types import FinishReason, Rollout, StepRecord, TokenSignal
from tests.helpers import tiny
from tests.helpers.fake_vllm import serving
from tests.helpers.talking import (
    ASSISTANT,
    EOS,
    STOPS,
    USER,
    Again,
    Counting,
    prompts,
    sampler,
    settings,
    student,
    talked,
    tokenizer,
)

SAME = 1e-6  # nats: transformers' norms round to float32 in a float64 model
LETTERS = tokenizer().get_vocab()


@pytest.fixture(scope="module")
def policy():
    return student()


@pytest.fixture(scope="module", params=["decode", "own forward", "retold"])
def engine(request):
    return request.param


ENGINES = {"decode": DecodeSampler, "own forward": TransformersSampler, "retold": Again}


def sampled(kind: str, policy: Any, environment: Environment | None = None, **options: Any) -> Rollout:
    return talked(ENGINES[kind](max_new_tokens=60), environment or Counting(), policy, **options)


def turns_of(rollout: Rollout, row: int) -> list[list[int]]:
    """Ids of a row, cut where sampled and observed tokens meet."""
    read = rollout.read[row]
    ids, mine = rollout.response_ids[row][read].tolist(), rollout.mask[row][read].tolist()
    cuts = [0, *(place for place in range(1, len(ids)) if mine[place] != mine[place - 1]), len(ids)]
    return [ids[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


@pytest.fixture(scope="module")
def conversations(policy, engine):
    return sampled(engine, policy)


def test_log_probs_of_all_turns_are_those_of_one_forward(policy, conversations):
    assert sorted(conversations.num_turns.tolist())[-1] == 3 and int(conversations.num_turns.min()) == 1
    scored = policy(conversations).logprobs
    scored = scored.detach()
    assert float((scored - conversations.sampler_logprobs).abs().max()) < SAME
    assert policy.causal_lm.dtype == torch.float64 and float(scored[conversations.mask].max()) < 0


def test_between_turns_stand_the_tokens_of_the_template_and_nothing_else(conversations):
    for row in range(len(conversations)):
        parts = turns_of(conversations, row)
        for place in range(1, len(parts), 2):
            before, heard = parts[place - 1], parts[place]
            assert before[-1] in STOPS
            said = f"{len(before)} in {place // 2 + 1}"
            closing = (
                [] if before[-1] == EOS else [EOS]
            )  # the template closes an answer; its own end symbol stands once
            assert heard == [*closing, USER, *(LETTERS[letter] for letter in said), ASSISTANT]


def test_turns_lengths_rewards_and_reasons_say_what_happened(conversations):
    finish, stop, length = conversations.finish_reason.tolist(), int(FinishReason.STOP), int(FinishReason.LENGTH)
    for row in range(len(conversations)):
        parts = turns_of(conversations, row)
        mine = [len(part) for part in parts[::2]]
        assert conversations.turn_lengths[row][: len(mine)].tolist() == mine
        assert int(conversations.turn_lengths[row].sum()) == int(conversations.lengths[row]) == sum(mine)
        read = conversations.read[row]
        turn = [place // 2 + place % 2 for place, part in enumerate(parts) for _ in part]
        assert (
            conversations.turn[row][read].tolist() == turn and not (conversations.mask & conversations.observed).any()
        )
        answered = sum(part[-1] in STOPS for part in parts[::2])
        assert float(conversations.reward[row].nan_to_num()) == 0.5 * answered
        assert finish[row] == (stop if answered == 3 else length)
    assert {stop, length} == set(finish)


def test_every_engine_says_the_same(policy, conversations):
    reference = sampled("decode", policy)
    assert torch.equal(reference.response_ids, conversations.response_ids)
    assert torch.equal(reference.mask, conversations.mask) and torch.equal(reference.turn, conversations.turn)


class Counted(Again):
    """Counts its calls."""

    calls = 0

    def sample(self, *given: Any) -> Rollout:
        self.calls += 1
        return super().sample(*given)


def test_a_turn_is_one_call_of_the_engine_whatever_room_its_rows_have(policy):
    engine = Counted(max_new_tokens=60)
    rollout = talked(engine, Counting(), policy, max_turn_tokens=None)
    assert engine.calls == int(rollout.num_turns.max()) == 3 and len(set(rollout.turn_lengths[:, 0].tolist())) > 2
    again = talked(DecodeSampler(max_new_tokens=60), Counting(), policy, max_turn_tokens=None)
    assert torch.equal(rollout.response_ids, again.response_ids) and torch.equal(rollout.mask, again.mask)


def test_the_first_turn_is_what_the_engine_says_alone(policy, conversations):
    alone = DecodeSampler(max_new_tokens=12).sample(policy, replace(prompts(), data=None), settings(max_new_tokens=12))
    for row in range(len(alone)):
        length = int(alone.lengths[row])
        assert conversations.response_ids[row][:length].tolist() == alone.response_ids[row][:length].tolist()
        assert int(conversations.turn_lengths[row][0]) == length


def test_later_turns_draw_numbers_of_their_own(policy):
    """Else two turns of a row would be as alike as their prompts."""
    from lit_opd.streams import row_uniforms, turn_keys

    keys = torch.arange(5)
    first, second = (row_uniforms(0, turn_keys(keys, turn), 0, 8) for turn in (0, 1))
    assert torch.equal(first, row_uniforms(0, keys, 0, 8)) and not (first == second).any()


def test_a_row_does_not_depend_on_the_others(policy, engine):
    whole, batch = sampled(engine, policy), prompts()
    one = batch.rows(torch.tensor([2]))
    alone = sampler(ENGINES[engine](max_new_tokens=60), Counting()).sample(policy, one, settings())
    length = int(alone.mask[0].sum() + alone.observed[0].sum())
    assert alone.response_ids[0][:length].tolist() == whole.response_ids[2][:length].tolist()


def test_greedy_answers_are_greedy_in_every_turn(policy, engine):
    rollout = sampled(engine, policy, settings={"greedy": True, "stop_ids": tuple(range(4, 40))})
    assert int(rollout.num_turns.max()) == 3
    logits = policy.causal_lm
    for row in range(len(rollout)):
        read = rollout.read[row]
        ids = rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist() + rollout.response_ids[row][read].tolist()
        start = int(rollout.prompts.mask[row].sum())
        best = logits(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        for place, mine in enumerate(rollout.mask[row][read].tolist()):
            assert not mine or ids[start + place] == best[start + place - 1]


# -- servers -----------------------------------------------------------------------------------------------------------


def test_a_server_is_sent_what_the_row_holds_and_a_remote_teacher_scores_it(policy, tmp_path):
    path = tiny.save(policy.causal_lm.float(), tmp_path / "student", with_tokenizer=tokenizer())
    policy.causal_lm.double()
    seen: list[list[int]] = []
    with serving(path, window=256) as server:
        server.always = lambda server, handler, body: seen.extend(body["prompt"])
        engine = VLLMSampler([server.url], max_new_tokens=60, max_logprob_gap=None)
        rollout = talked(engine, Counting(), policy)
        server.always = None
        theirs = RemoteTeacher([server.url], tokenizer_path=path).score(rollout).logprobs
    ours = policy(rollout).logprobs
    assert int(rollout.num_turns.max()) == 3 and rollout.provenance.engine == "vllm"
    torch.testing.assert_close(ours.float(), rollout.sampler_logprobs.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.float(), theirs, atol=1e-4, rtol=0)
    for row in range(len(rollout)):
        text = rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()
        parts = turns_of(rollout, row)
        for place in range(0, len(parts), 2):
            assert text + [token for part in parts[:place] for token in part] in seen


# -- environments that fail --------------------------------------------------------------------------------------------


class Failing(Counting):
    """Row 1 fails in its second turn, or in reset, as told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def reset(self, row: Any) -> Any:
        if self.how == "reset" and row["n"] == 1:
            raise KeyError("no such thing")
        if self.how == "empty" and row["n"] == 1:
            return []
        if self.how == "no call" and row["n"] == 1:
            return [*super().reset(row), {"role": "assistant", "content": None, "tool_calls": [3]}, *super().reset(row)]
        return super().reset(row)

    def step(self, state: Any, response: Any) -> Any:
        found = super().step(state, response)
        if state.row["n"] != 1 or state.turn < 2:
            return (found[0], found[1], 3e38) if self.how == "sum" and state.row["n"] == 1 else found
        if self.how == "late":
            time.sleep(5)
        if self.how == "raises":
            raise RuntimeError("broke\nat length")
        return {
            "nothing": None, "nan": ("a", False, float("nan")), "no observation": (None, False, 1.0),
            "ids": ([3, 4], False, None),
            "role": Answer([{"role": "assistant", "content": "I"}]), "a word": "done",
            "half a character": ("\ud800", False, None), "sum": (None, True, 3e38),
        }.get(self.how, found)  # fmt: skip


WRONG = {
    "raises": "RuntimeError: broke", "late": "no result within 0.2 s", "nothing": "got NoneType", "nan": "finite number",
    "no observation": "text or a list of messages", "ids": "must give messages", "role": "role of user, tool",
    "a word": "must return an Answer", "reset": "KeyError", "empty": "list of messages",
    "half a character": "whole characters", "sum": "rewards whose sum", "no call": "an object with `name`",
}  # fmt: skip


@pytest.mark.parametrize("how", sorted(WRONG))
def test_what_fails_in_a_row_ends_that_row_alone_and_is_told(policy, how):
    # every letter ends a turn, so that row 1 has a second one
    options = {"timeout": 0.2, "settings": {"stop_ids": tuple(range(4, 64))}}
    good = sampled("decode", policy, **options)
    with pytest.warns(match=WRONG[how]) as said:
        rollout = sampled("decode", policy, Failing(how), **options)
    assert "row 'r1'" in str(said[0].message) and len([w for w in said if "row 'r1'" in str(w.message)]) == 1
    others = [0, 2, 3, 4, 5]
    columns = rollout.mask.shape[1]
    assert torch.equal(rollout.response_ids[others], good.response_ids[others][:, :columns])
    assert rollout.finish_reason[others].tolist() == good.finish_reason[others].tolist()
    assert int(rollout.finish_reason[1]) == int(FinishReason.ENVIRONMENT)
    assert int(rollout.num_turns[1]) == (0 if how in ("reset", "empty", "no call") else 2)
    assert float(policy(rollout).logprobs[1].sum()) == pytest.approx(float(rollout.sampler_logprobs[1].sum()), abs=1e-5)
    with pytest.raises(InputError, match="row 'r1'.*on_failure: end_row"):
        sampled("decode", policy, Failing(how), on_failure="raise", **options)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (([{"role": "user", "content": "a", "x": object()}], False, None), "JSON values"),
        (([{"role": "user", "content": "\ud800"}], False, None), "whole characters"),
        (([{"role": "user", "tool_calls": [1]}], False, None), "tool calls in messages of the assistant alone"),
        ((None, True, 1e39), "finite number"),
        ((None, True, 10**400), "finite number"),
        ((None, True, torch.zeros(2)), "finite number"),
        ((None, True, "1"), "finite number"),
    ],
)
def test_an_answer_that_nothing_can_read_is_refused(answer, words):
    with pytest.raises(Refused, match=words):
        checked_answer(answer, "user")


def test_a_reward_may_be_a_number_of_any_kind():
    assert [checked_answer((None, True, one), "user").reward for one in (2, torch.tensor(0.5), 1e38)] == [
        2.0,
        0.5,
        1e38,
    ]


def test_what_an_assistant_called_has_the_form_that_templates_read():
    given = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert checked_messages(given, PROMPT_ROLES) == [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_a_batch_whose_rows_all_fail_is_empty_and_scored(policy):
    class Broken(Counting):
        def reset(self, row: Any) -> Any:
            raise ValueError("down")

    for kind in ("decode", "retold"):
        with pytest.warns(match="down"):
            rollout = sampled(kind, policy, Broken())
        assert not rollout.mask.any() and policy(rollout).logprobs.abs().sum() == 0 and rollout.reward.isnan().all()


def test_an_answer_over_the_window_ends_its_row_as_cut(policy, engine):
    class Long(Counting):
        def step(self, state: Any, response: Any) -> Any:
            return "a" * (70 if state.row["n"] == 2 else 1), state.turn == 2, None

    rollout = sampled(engine, policy, Long(), settings={"stop_ids": tuple(range(4, 64))})
    assert int(rollout.finish_reason[2]) == int(FinishReason.LENGTH) and int(rollout.num_turns[2]) == 1
    assert set(rollout.num_turns[[0, 1, 3, 4, 5]].tolist()) == {2}
    told = {"stop_ids": tuple(range(4, 64)), "budgeted": True}
    for most, reason in ((60, FinishReason.LENGTH), (90, FinishReason.BUDGET)):  # into 60 it does not fit either
        talk = ENGINES[engine](max_new_tokens=most)
        budgeted = talked(talk, Long(), policy, settings=told | {"max_new_tokens": most - 18})
        assert int(budgeted.finish_reason[2]) == int(reason) and int(budgeted.num_turns[2]) == 1


def test_under_a_budget_a_row_that_a_turns_own_bound_cuts_is_not_the_budgets(policy, engine):
    """A turn of 12 tokens without an end is cut by `max_turn_tokens`, a shorter one by what the budget left of the row; an answer
    that would have fitted without the budget is cut by it."""
    cut: dict[int, int] = {int(FinishReason.LENGTH): 0, int(FinishReason.BUDGET): 0}
    for seed in range(3):
        rollout = sampled(engine, policy, settings={"max_new_tokens": 30, "budgeted": True, "seed": seed})
        for row, reason in enumerate(rollout.finish_reason.tolist()):
            said = turns_of(rollout, row)[-1]
            if said[-1] not in STOPS:
                by_turn = len(said) == 12
                assert reason == int(FinishReason.LENGTH if by_turn else FinishReason.BUDGET)
                cut[reason] += 1
            elif reason != int(FinishReason.STOP):
                assert reason == int(FinishReason.BUDGET)
    assert all(cut.values()), cut


def test_the_last_turn_allowed_is_answered_for_its_reward(policy):
    rollout = sampled("decode", policy, Counting(9), max_turns=2, settings={"stop_ids": tuple(range(4, 64))})
    assert set(rollout.finish_reason.tolist()) == {int(FinishReason.TURNS)}
    assert set(rollout.reward.tolist()) == {1.0} and set(rollout.num_turns.tolist()) == {2}


def test_ids_beyond_the_shared_vocabulary_end_the_row(policy):
    with pytest.warns(match=r"outside \[0, 37\)"):
        rollout = sampled("decode", policy, settings={"vocabulary": 37, "stop_ids": tuple(range(4, 37))})
    assert set(rollout.finish_reason.tolist()) == {int(FinishReason.ENVIRONMENT)}


def test_special_tokens_in_an_answer_stay_text(policy):
    class Hostile(Counting):
        def step(self, state: Any, response: Any) -> Any:
            return "a<eos><assistant>b", state.turn == 2, None

    rollout = sampled("decode", policy, Hostile(), settings={"stop_ids": tuple(range(4, 64))})
    heard = turns_of(rollout, 0)[1]
    assert heard.count(ASSISTANT) == 1 and heard.count(EOS) == 1 and heard[-1] == ASSISTANT
    assert [LETTERS[letter] for letter in "eos"] == heard[4:7]


# -- ways to answer ----------------------------------------------------------------------------------------------------


class Awaited(Counting):
    async def step(self, state: Any, response: Any) -> Any:
        await asyncio.sleep(5 if state.row["n"] == 1 else 0.01)
        return Counting.step(self, state, response)


class Together(Counting):
    def step_all(self, states: Any, responses: Any) -> Any:
        pairs = zip(states, responses, strict=True)
        return [OSError("gone") if s.row["n"] == 1 else Counting.step(self, s, r) for s, r in pairs]


class TooFew(Counting):
    def step_all(self, states: Any, responses: Any) -> Any:
        return []


@pytest.mark.parametrize("kind", [Awaited, Together])
def test_coroutines_and_batches_answer_as_threads_do(policy, kind):
    options = {"timeout": 0.3, "settings": {"stop_ids": tuple(range(4, 64))}}
    good = sampled("decode", policy, **options)
    with pytest.warns(match="row 'r1'"):
        rollout = sampled("decode", policy, kind(), **options)
    assert torch.equal(rollout.response_ids[2:], good.response_ids[2:])
    assert int(rollout.finish_reason[1]) == int(FinishReason.ENVIRONMENT) and int(rollout.num_turns[1]) == 1


class Connected(Counting):
    """Holds what belongs to an event loop, as the connections of a client do."""

    async def step(self, state: Any, response: Any) -> Any:
        own = vars(self).setdefault("loop", asyncio.get_running_loop())
        assert own is asyncio.get_running_loop()
        return Counting.step(self, state, response)


def test_coroutines_of_all_turns_share_an_event_loop(policy):
    rollout = sampled("decode", policy, Connected(), settings={"stop_ids": tuple(range(4, 64))})
    assert set(rollout.num_turns.tolist()) == {3} and set(rollout.reward.tolist()) == {1.5}


def test_a_coroutine_that_blocks_fails_with_those_that_wait_and_the_next_batch_has_a_new_loop(monkeypatch):
    monkeypatch.setattr(stage, "_GRACE", 0.0)
    blocked = threading.Event()

    async def step(number: int) -> int:
        if number == 1:
            blocked.wait(20)
        return number

    found = stage.run_all(step, [(0,), (1,), (2,)], timeout=0.1, workers=3)
    assert found[1].timed_out and found[2].timed_out
    assert stage.run_all(step, [(0,), (2,)], timeout=20.0, workers=1) == [0, 2]
    blocked.set()


@pytest.mark.parametrize("kind", ["threads", "coroutines"])
def test_an_interruption_begins_no_further_call(kind):
    """Calls may have effects of their own: a file, a request, an account."""
    begun: list[int] = []

    def step(number: int) -> None:
        begun.append(number)
        time.sleep(0.2)

    async def awaited(number: int) -> None:
        begun.append(number)
        await asyncio.sleep(0.2)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            stage.run_all(step if kind == "threads" else awaited, [(n,) for n in range(100)], timeout=60.0, workers=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    then = len(begun)
    time.sleep(1.0)
    assert 0 < then < 10 and len(begun) <= then + 1  # that which was just taken


def test_a_coroutine_that_is_cancelled_from_within_fails_alone():
    async def step(number: int) -> int:
        if number == 1:
            raise asyncio.CancelledError("own")
        await asyncio.sleep(0.1)
        return number

    found = stage.run_all(step, [(0,), (1,), (2,)], timeout=5.0, workers=3)
    assert (found[0], found[2]) == (0, 2) and found[1].why.startswith("CancelledError") and not found[1].timed_out


@pytest.mark.parametrize("error", [SystemExit(3), TimeoutError("own")])
def test_what_a_call_raises_is_its_own_whatever_it_is(error):
    def step(_: int) -> None:
        raise error

    async def awaited(_: int) -> None:
        raise error

    for function in (step, awaited):
        (found,) = stage.run_all(function, [(0,)], timeout=5.0, workers=1)
        assert not found.timed_out and found.why.startswith(type(error).__name__)


def test_threads_that_never_return_end_the_run_before_they_use_it_up(monkeypatch):
    monkeypatch.setattr(stage, "MOST_LEFT", 1)
    monkeypatch.setattr(stage, "_left", [])  # other tests leave some behind
    ended = threading.Event()
    for _ in range(2):
        assert stage.run_all(ended.wait, [(10,)], timeout=0.05, workers=1)[0].timed_out
    with pytest.raises(InputError, match=r"2 calls that took longer than `timeout` 0.05 s still run"):
        stage.run_all(ended.wait, [(10,)], timeout=0.05, workers=1)
    ended.set()
    for thread in stage._left:
        thread.join()
    assert stage.run_all(ended.wait, [(10,)], timeout=1.0, workers=1) == [True]


def test_a_batch_of_answers_must_have_one_a_row(policy):
    with pytest.warns(match=r"a list of \d answers"):
        rollout = sampled("decode", policy, TooFew(), settings={"stop_ids": tuple(range(4, 64))})
    assert set(rollout.finish_reason.tolist()) == {int(FinishReason.ENVIRONMENT)}


def test_rows_are_answered_at_the_same_time(policy):
    class Slow(Counting):
        def step(self, state: Any, response: Any) -> Any:
            time.sleep(0.2)
            return None, True, None

    began = time.monotonic()
    sampled("decode", policy, Slow(), settings={"stop_ids": tuple(range(4, 64))})
    assert time.monotonic() - began < 6 * 0.2


def test_reset_may_ask_something_else(policy, engine):
    class Other(Counting):
        def reset(self, row: Any) -> Any:
            asked = [*row.prompt, {"role": "assistant", "content": "c"}, {"role": "user", "content": f"d{row['n']}"}]
            return asked if row["n"] == 3 else row.prompt

    rollout, plain = sampled(engine, policy, Other()), prompts()
    text = rollout.prompts.ids[3][rollout.prompts.mask[3]].tolist()
    letters = [*"abababab"]
    assert text == [
        USER,
        *map(LETTERS.get, letters),
        ASSISTANT,
        LETTERS["c"],
        EOS,
        USER,
        LETTERS["d"],
        LETTERS["3"],
        ASSISTANT,
    ]
    assert rollout.prompts.ids[2][rollout.prompts.mask[2]].tolist() == plain.ids[2][plain.mask[2]].tolist()
    assert float((policy(rollout).logprobs - rollout.sampler_logprobs).abs().max()) < SAME


# -- what is refused before a run --------------------------------------------------------------------------------------

REWRITES = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{{ message.content }}"
    "{% if loop.last %}<eos>{% endif %}{% else %}<user>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DROPS = REWRITES.replace("{% if loop.last %}<eos>{% endif %}", "<eos>").replace(
    "{% else %}", "{% elif loop.index < 3 %}"
)


@pytest.mark.parametrize(
    ("template", "message"), [(REWRITES, "writes an answer otherwise"), (DROPS, "does not render message 2")]
)
def test_a_template_that_cannot_go_on_is_refused_before_the_run(template, message):
    talk = TurnsSampler(DecodeSampler(max_new_tokens=8), Counting())
    with pytest.raises(InputError, match=message):
        talk.attach(tokenizer(template), None)


def test_a_template_that_rewrites_the_past_is_told_of_and_the_row_keeps_what_was_read(policy):
    thinks = "{% if add_generation_prompt %}<assistant>"
    template = tokenizer().chat_template.replace(thinks, thinks + "t")
    talk = TurnsSampler(DecodeSampler(max_new_tokens=60), Counting(), max_turn_tokens=12)
    encoder = PromptEncoder(tokenizer(template))
    with pytest.warns(match="rows keep the tokens"):
        talk.attach(encoder.tokenizer, encoder)
    rollout = talk.sample(policy, prompts(encoder=encoder), settings(stop_ids=tuple(range(4, 64))))
    assert turns_of(rollout, 0)[1][-2:] == [ASSISTANT, LETTERS["t"]]


def test_settings_out_of_range_and_missing_rows_are_one_line(policy):
    engine = DecodeSampler(max_new_tokens=8)
    for wrong in ({"max_turns": 0}, {"max_turn_tokens": 0}, {"timeout": 0}, {"workers": 0}, {"on_failure": "count"}):
        with pytest.raises(InputError, match=f"TurnsSampler.{next(iter(wrong))}"):
            TurnsSampler(engine, Counting(), **wrong)
    for whole in (TurnsSampler(engine, Counting()), ReplaySampler("saved.jsonl")):
        with pytest.raises(InputError, match="single turns"):
            TurnsSampler(whole, Counting())
    with pytest.raises(InputError, match="`TurnsSampler.sampler.ahead` must be 0"):
        TurnsSampler(VLLMSampler(["http://a"], ahead=1), Counting())
    with pytest.raises(InputError, match="keep_rows"):
        sampler(engine, Counting()).sample(policy, replace(prompts(), data=None), settings(max_new_tokens=8))
    bare = tiny.tokenizer(rows=64)
    bare.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        TurnsSampler(engine, Counting()).attach(bare, None)


# -- records -----------------------------------------------------------------------------------------------------------


def record_of(rollout: Rollout) -> StepRecord:
    zeros, shape = torch.zeros(rollout.mask.shape, dtype=torch.float64), rollout.mask
    signal = TokenSignal(
        student_logprobs=zeros - 1, teacher_logprobs=zeros - 2, mask=shape, turn=rollout.turn, reward=rollout.reward,
        sampler_logprobs=zeros,
    )  # fmt: skip
    return StepRecord(
        rollout=rollout, signal=signal, weights=zeros, kept=shape, loss=zeros, clipped=shape, finish_reason=rollout.finish_reason,
        reward=rollout.reward, sampled_tokens=shape.sum(), grad_norm=torch.zeros(()), progress=0.0, step=1, seconds={},
    )  # fmt: skip


def test_cutting_joining_and_saving_keep_every_token(policy, tmp_path):
    rollout = sampled("decode", policy)
    whole = policy(rollout).logprobs
    parts = [rollout.take([row]).trimmed() for row in (3, 1, 4)]
    assert [part.mask.shape[1] for part in parts] == [int(rollout.read[row].sum()) for row in (3, 1, 4)]
    again = Rollout.joined(parts)
    for place, row in enumerate((3, 1, 4)):
        gap = policy(again).logprobs[place] - whole[row][: again.mask.shape[1]]
        assert float(gap.abs().max()) < SAME
        assert torch.equal(again.observed[place], rollout.observed[row][: again.mask.shape[1]])
    stored = load_record(save_record(record_of(rollout), tmp_path / "step.safetensors")).rollout
    assert torch.equal(stored.turn, rollout.turn) and torch.equal(stored.observed, rollout.observed)
    assert torch.equal(stored.reward.nan_to_num(), rollout.reward.nan_to_num()) and stored.prompts.data is None


def test_truncated_rows_are_left_out_with_their_answers(policy):
    rollout = sampled("decode", policy)
    cut = rollout.finish_reason == int(FinishReason.LENGTH)
    masked = apply_truncated(rollout, "mask")
    assert not (masked.mask | masked.observed)[cut].any() and (masked.layout.read.sum(-1) > 0).sum() == int(
        (~cut).sum()
    )
    assert len(apply_truncated(rollout, "drop")) == int((~cut).sum())


def test_metrics_count_turns_answers_and_failures(policy):
    with pytest.warns(match="KeyError"):
        rollout = sampled("decode", policy, Failing("reset"))
    found = {name: float(value) for name, value in turn_scalars(record_of(rollout)).items()}
    turns = [len(turns_of(rollout, row)[::2]) for row in range(6) if row != 1]
    rewards = [float(reward) for reward in rollout.reward if not torch.isnan(reward)]
    assert found == {
        "train/turns": pytest.approx(sum(turns) / 5),
        "train/turn_length": pytest.approx(int(rollout.mask.sum()) / sum(turns)),
        "train/observed_tokens": int(rollout.observed.sum()),
        "train/environment_failed_fraction": pytest.approx(1 / 6),
        "train/turns_cut_fraction": 0.0,
        "train/reward": pytest.approx(sum(rewards) / len(rewards)),
    }
    assert turn_scalars(record_of(replace(rollout, observed=None, turn=None, reward=None))) == {}


def test_problems_of_an_evaluation_can_be_talked_about(policy, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "p", "problem": "a+b", "answer": "3", "n": 7}\n')
    encoder = PromptEncoder(tokenizer())
    (loaded,) = load_sets([DataSource(str(path))], encoder, suffix="", seed=0)
    (problem,) = loaded.problems
    assert problem.prompt.data is not None and problem.prompt.data["n"] == 7
    batch = collate([problem.prompt], 0)
    rollout = sampler(DecodeSampler(max_new_tokens=60), Counting()).sample(policy, batch, settings())
    assert int(rollout.num_turns[0]) >= 1


class Told(HindsightPrompt):
    """Shows the teacher how long the conversation was."""

    def render(self, attempt: Any, peers: Any) -> str:
        return f"{len(attempt.text.split())} of {attempt.row['n']}"


def test_a_teachers_prompt_may_be_made_of_a_conversation_and_its_row(policy):
    encoder, rollout = PromptEncoder(tokenizer()), sampled("decode", policy)
    told, counts = Hindsight(Told(), student=encoder, teacher=encoder, samples=1, pad_id=0)(rollout)
    assert counts.tolist() == [6, 6, 0] and torch.equal(told.observed, rollout.observed)
    for row in range(6):
        said = encoder.tokenizer.decode(rollout.response_ids[row][rollout.read[row]], skip_special_tokens=True)
        ids = told.prompts.teacher_ids[row][told.prompts.teacher_mask[row]].tolist()
        assert ids == encoder.encode(f"{len(said.split())} of {row}")


class Ruled(Counting):
    """Asks something else than the data; every sample another thing, where told."""

    def __init__(self, each: bool = False) -> None:
        super().__init__(turns=0)
        self.asked = count() if each else repeat(0)

    def reset(self, row: Any) -> Any:
        return [{"role": "user", "content": f"rule {next(self.asked)} {row.prompt[0]['content']}"}]


def demonstrated(policy: Any, environment: Environment) -> tuple[Rollout, Rollout]:
    """Two samples of each prompt, and the same with what the teacher reads."""
    encoder = PromptEncoder(tokenizer())
    rows = [PromptRow(f"r{n}", "ab" * (n + 1), columns={"n": n}) for n in range(3)]
    encoded = [one for one in encode_rows(rows, encoder, keep_rows=True) for _ in range(2)]
    batch = collate(encoded, 0, samples=[0, 1] * 3)
    rollout = sampler(DecodeSampler(max_new_tokens=60), environment).sample(
        policy, batch, settings(stop_ids=tuple(range(4, 64)))
    )
    peers = PeerDemonstration("{prompt} = {demonstration}", without="plain")
    told, _ = Hindsight(peers, student=encoder, teacher=encoder, samples=2, pad_id=0, keeps_rows=True)(rollout)
    return rollout, told


def test_a_demonstration_stands_after_what_reset_asked(policy):
    rollout, told = demonstrated(policy, Ruled())
    encoder = PromptEncoder(tokenizer())
    for row, other in ((0, 1), (1, 0), (4, 5)):
        asked = f"rule 0 {'ab' * (row // 2 + 1)}"
        assert rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist() == encoder.encode(asked)
        said = encoder.tokenizer.decode(rollout.response_ids[other][rollout.read[other]], skip_special_tokens=True)
        ids = told.prompts.teacher_ids[row][told.prompts.teacher_mask[row]].tolist()
        assert ids == encoder.encode(f"{asked} = {said.strip()}")


def test_who_was_asked_something_else_is_no_peer(policy):
    rollout, told = demonstrated(policy, Ruled(each=True))
    for row in range(6):
        ids = told.prompts.teacher_ids[row][told.prompts.teacher_mask[row]]
        assert ids.tolist() == rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()


def test_observed_and_turn_come_together(policy):
    rollout = sampled("decode", policy)
    with pytest.raises(InputError, match="together"):
        replace(rollout, turn=None)


@pytest.fixture(autouse=True)
def no_other_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the environment .* failed.*")
        yield
