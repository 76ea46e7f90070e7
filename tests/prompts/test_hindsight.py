"""Teacher prompts made after sampling: which response is shown to whom, what is left out, and that the student is left alone."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import decoders

from lit_opd.errors import InputError
from lit_opd.prompts import Attempt, HindsightPrompt, PeerDemonstration, PromptDataModule
from lit_opd.prompts.hindsight import _draws, warn_once
from lit_opd.prompts.loading import PromptLoader
from lit_opd.types import DataRow, PromptBatch, Provenance, Rollout
from tests.helpers import tiny

NAN = float("nan")
PRINTABLE = "".join(map(chr, range(32, 127)))
ROWS = [{"id": "a", "problem": "one", "n": 7, "answer": "1"}, {"id": "b", "problem": "x", "n": 8, "answer": "2"}]


def module(folder: Path, own, rows=ROWS, *, samples: int = 3, **settings) -> PromptDataModule:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"prompt_batch": len(rows), "samples_per_prompt": samples, "prompt_column": "problem"} | settings
    data = PromptDataModule(str(folder / "rows.jsonl"), teacher_prompt=own, **settings)
    tokenizer = tiny.tokenizer(PRINTABLE)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # texts without blanks between the letters
    data.use_tokenizer(tokenizer)
    data.setup("fit")
    return data


def sampled(data: PromptDataModule, texts: list[str], rewards: list[float] | None, prompts=None) -> Rollout:
    """What a sampler would return for these responses, each with an end token."""
    prompts = next(iter(data.train_dataloader())) if prompts is None else prompts
    tokenizer = data.encoder.tokenizer
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
    response = torch.full(mask.shape, 5)
    response[mask] = torch.tensor([token for row in ids for token in row])
    reward = None if rewards is None else torch.tensor(rewards, dtype=torch.float32)
    return Rollout(
        prompts, response, mask, torch.zeros(mask.shape), torch.zeros(len(texts), dtype=torch.int8), Provenance("x"),
        reward=reward,
    )  # fmt: skip


def read(data: PromptDataModule, rollout: Rollout) -> list[str]:
    """What the teacher reads before each response."""
    tokenizer, prompts = data.encoder.tokenizer, rollout.prompts
    return [
        "".join(tokenizer.convert_ids_to_tokens(ids[mask].tolist()))
        for ids, mask in zip(prompts.teacher_ids, prompts.teacher_mask, strict=True)
    ]


def told(folder: Path, own, texts, rewards, **settings) -> tuple[PromptDataModule, Rollout, Rollout, list[int]]:
    data = module(folder, own, **settings)
    before = sampled(data, texts, rewards)
    after, counts = data.hindsight(before)
    return data, before, after, counts.tolist()


PEER = "{prompt}; {demonstration} ({n})"


def test_the_first_successful_other_response_stands_in_the_teachers_prompt(tmp_path):
    texts = ["p", "q", "r", "s", "t", "u"]
    data, before, after, counts = told(tmp_path, PeerDemonstration(PEER), texts, [0.0, 1.0, 0.5, NAN, 0.4, 0.9])
    first, second = [row["problem"] for row in sorted(ROWS, key=lambda r: before.prompts.row_ids.index(r["id"]))]
    names = {row["problem"]: row["n"] for row in ROWS}

    def shown(problem: str, text: str) -> str:
        return f"<user>{problem}; {text} ({names[problem]})<assistant>"

    assert read(data, after) == [
        shown(first, "q"), shown(first, "r"), shown(first, "q"),
        shown(second, "u"), shown(second, "u"), f"<user>{second}<assistant>",
    ]  # fmt: skip
    assert counts == [6, 5, 0]
    assert after.mask.any(-1).tolist() == [True] * 5 + [False]


def slow(texts: list[str], rewards: list[float], samples: int) -> list[str | None]:
    """The demonstration of each row, by brute force."""
    found: list[str | None] = []
    for own in range(len(texts)):
        group = [row for row in range(len(texts)) if row // samples == own // samples and row != own]
        found.append(next((texts[row] for row in group if rewards[row] >= 0.5), None))
    return found


@pytest.mark.parametrize("without", ["drop", "plain"])
def test_no_row_reads_itself_and_the_student_keeps_what_it_read_and_wrote(tmp_path, without):
    data = module(tmp_path, PeerDemonstration("{prompt}>{demonstration}", without=without), samples=4)
    batch, rng = next(iter(data.train_dataloader())), random.Random(3)
    for _ in range(40):
        texts = rng.sample([f"{number:03d}" for number in range(100)], 8)
        rewards = [rng.choice([0.0, 0.5, 1.0, NAN]) if rng.random() < 0.6 else 0.0 for _ in texts]
        before = sampled(data, texts, rewards, batch)
        after, counts = data.hindsight(before)
        wanted = slow(texts, rewards, 4)
        for own, hint, text in zip(texts, wanted, read(data, after), strict=True):
            assert own not in text and (f">{hint}" in text if hint else ">" not in text.replace("<user>", "")[:-11])
        hinted = torch.tensor([hint is not None for hint in wanted])
        assert counts.tolist() == [8, int(hinted.sum()), 0]
        assert torch.equal(after.mask, before.mask & hinted.unsqueeze(-1) if without == "drop" else before.mask)
        assert (
            torch.equal(after.num_drawn, before.num_drawn)
            and torch.equal(after.reward, before.reward)
            or NAN in rewards
        )
        for name in ("ids", "mask", "row_keys"):
            assert torch.equal(getattr(after.prompts, name), getattr(before.prompts, name))
        assert torch.equal(after.response_ids, before.response_ids)


def test_peers_are_neighbours_of_one_draw_however_many_a_prompt_has():
    found = _draws(["a", "a", "b", "a", "a", "a", "a"], 2)
    assert [[*draw] for draw in found] == [[0, 1], [0, 1], [2], [3, 4], [3, 4], [5, 6], [5, 6]]
    assert _draws([], 2) == [] and _draws(["a"] * 3, 8) == [range(3)] * 3


def test_the_host_knows_the_new_layout_without_reading_the_device(tmp_path):
    _, _, after, _ = told(tmp_path, PeerDemonstration(), ["p", "q", "rr", "s", "t", "u"], [0, 1, 0, 0, 0, 0])
    known, fresh = after.layout, replace(after).layout
    for name in ("prompt", "response", "teacher", "finish_reason"):
        assert (getattr(known, name) == getattr(fresh, name)).all(), name
    assert known.row_lengths == fresh.row_lengths


def test_two_ranks_show_what_one_shows_where_a_batch_holds_a_prompt_twice(tmp_path):
    data = module(tmp_path, PeerDemonstration("{prompt}>{demonstration}"), samples=2, prompt_batch=4)
    texts = {}

    def responses(prompts: PromptBatch) -> list[str]:
        for key in prompts.row_keys.tolist():
            texts.setdefault(key, f"{len(texts):02d}")
        return [texts[key] for key in prompts.row_keys.tolist()]

    def shown(world: int) -> dict[int, str]:
        found = {}
        for rank in range(world):
            loader = data.train_dataloader()
            own = PromptLoader(
                loader.prompts, loader.order, prompt_batch=4, samples_per_prompt=2, rank=rank, world=world
            )
            prompts = own.batch(0)
            rewards = [float(int(text) % 3 != 0) for text in responses(prompts)]
            after, _ = data.hindsight(sampled(data, responses(prompts), rewards, prompts))
            found |= dict(zip(prompts.row_keys.tolist(), read(data, after), strict=True))
        return found

    one = shown(1)
    assert len(one) == 8 and one == shown(2) == shown(4)


def test_earlier_turns_stay_and_the_last_turn_becomes_the_template(tmp_path):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go"},
    ]
    rows = [{"id": "a", "problem": turns}]
    data, _, after, _ = told(
        tmp_path, PeerDemonstration("{prompt}: {demonstration}"), ["p", "q"], [1, 0], rows=rows, samples=2
    )
    assert read(data, after)[1] == "<user>hiyes<user>go: p<assistant>"


def test_a_template_of_messages_is_the_whole_conversation(tmp_path):
    template = [{"role": "user", "content": "{demonstration}"}, {"role": "assistant", "content": "ok"}]
    own = PeerDemonstration([*template, {"role": "user", "content": "{prompt}?"}])
    data, _, after, _ = told(tmp_path, own, ["p", "q", "r", "s", "t", "u"], [1, 0, 0, 1, 0, 0])
    assert read(data, after)[1].startswith("<user>pok<user>") and read(data, after)[1].endswith("?<assistant>")


def test_without_a_chat_template_it_is_text(tmp_path):
    data, _, after, _ = told(
        tmp_path,
        PeerDemonstration("{prompt}: {demonstration}"),
        list("pqrstu"),
        [1, 0, 0, 0, 1, 0],
        chat_template=False,
    )
    assert read(data, after)[1].endswith(": p") and "<user>" not in read(data, after)[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>so</think> 3", "3"),
        ("so</think>3 ", "3"),
        ("<think>so", "<think>so"),
        ("a</think>b</think> c", "c"),
        ("{prompt} {n}", "{prompt} {n}"),
    ],
)
def test_what_of_a_response_is_shown(text, shown):
    peer = [Attempt(DataRow(), text, 1.0, True)]
    attempt = Attempt(DataRow(prompt=[{"role": "user", "content": "q"}]), "own", 0.0, True)
    assert PeerDemonstration("{demonstration}|{prompt}").render(attempt, peer) == f"{shown}|q"
    assert (
        PeerDemonstration("{demonstration}|{prompt}", remove_thinking=False).render(attempt, peer)
        == f"{text.strip()}|q"
    )


def test_a_response_of_thinking_alone_is_no_demonstration():
    attempt = Attempt(DataRow(prompt=[{"role": "user", "content": "q"}]), "own", 0.0, True)
    peers = [Attempt(DataRow(), text, 1.0, True) for text in ("<think>so</think>", " ", "3")]
    assert PeerDemonstration("{demonstration}").render(attempt, peers) == "3"
    assert PeerDemonstration("{demonstration}").render(attempt, peers[:2]) is None


def test_a_prompt_that_is_too_long_counts_as_none_and_is_counted(tmp_path):
    texts, rewards = ["p" * 30, "q", "r", "s", "t", "u"], [1, 0, 0, 1, 0, 0]
    for most, hinted, refused in ((32, 4, 0), (31, 2, 2), (3, 2, 2), (2, 0, 4)):
        own = PeerDemonstration("{demonstration}", max_prompt_tokens=most)
        _, _, after, counts = told(tmp_path, own, texts, rewards)
        assert counts == [6, hinted, refused] and int(after.mask.any(-1).sum()) == hinted


@pytest.mark.parametrize("mode", ["escape", "refuse"])
def test_a_control_token_that_a_student_spells_stays_text_and_ends_no_run(tmp_path, mode):
    data = module(tmp_path, PeerDemonstration("{prompt}{demonstration}"), special_tokens_in_text=mode)
    before = sampled(data, ["p", "q", "r", "s", "t", "u"], [1, 0, 0, 1, 0, 0])
    spelled = data.encoder.tokenizer.convert_tokens_to_ids(list("<eos>"))
    ids = before.response_ids.new_full((6, 6), 1)
    ids[:, :5] = torch.tensor(spelled)
    mask = torch.ones(6, 6, dtype=torch.bool)
    before = replace(before, response_ids=ids, mask=mask, sampler_logprobs=torch.zeros(6, 6))
    after, counts = data.hindsight(before)
    tokens = data.encoder.tokenizer.convert_ids_to_tokens(after.prompts.teacher_ids[1].tolist())
    assert counts.tolist() == [6, 4, 0] and tokens[-6:] == [*"<eos>", "<assistant>"]


class Breaks(HindsightPrompt):
    """A chat template cannot take what it makes, once it was tried."""

    def render(self, attempt, peers):
        """Text that the template below refuses."""
        return "boom" if attempt.text == "p" else "fine"


def test_a_text_that_the_chat_template_cannot_take_ends_no_run(tmp_path):
    data = module(tmp_path, Breaks())
    source = "{% if messages[0].content == 'boom' %}{{ raise_exception('no') }}{% endif %}" + tiny.TEMPLATE
    data.teacher_encoder.tokenizer.chat_template = source
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"row '.' \(teacher\): the chat template failed.*train/hint_refused_fraction"):
        after, counts = data.hindsight(sampled(data, list("pqrstu"), None))
    assert counts.tolist() == [6, 5, 1] and after.mask.any(-1).tolist() == [False] + [True] * 5


class Graded(HindsightPrompt):
    """What a grader says of this very attempt: no reward and no other sample is needed."""

    def render(self, attempt, peers):
        """The row's answer beside what was written, where that is wrong."""
        right = attempt.text == attempt.row.answer
        return None if right else f"{attempt.row['problem']} Not {attempt.text}: {attempt.row['n']}"


def test_a_class_of_ones_own_says_what_is_wrong_with_the_attempt(tmp_path):
    data = module(tmp_path, Graded(), samples=1, rows=ROWS[:1])
    wrong, right = (data.hindsight(sampled(data, [text], None)) for text in ("5", "1"))
    assert read(data, wrong[0]) == ["<user>one Not 5: 7<assistant>"] and wrong[1].tolist() == [1, 1, 0]
    assert not right[0].mask.any() and right[1].tolist() == [1, 0, 0]


def test_the_data_rows_go_no_further_unless_something_asks_for_them(tmp_path):
    for keep in (False, True):
        _, before, after, _ = told(tmp_path, PeerDemonstration(PEER), list("pqrstu"), [1.0] * 6, keep_rows=keep)
        assert before.prompts.data is not None and (after.prompts.data is not None) == keep


def test_a_worked_solution_in_the_template_is_not_taken_for_the_answer(tmp_path):
    rows = [{"id": "a", "problem": "p", "solution": "all of the way"}]
    with pytest.warns(UserWarning, match="1 of 1 rows have no answer"):
        data = module(tmp_path, PeerDemonstration("{solution} {demonstration}"), rows, samples=2)
    assert next(iter(data.train_dataloader())).answers == (None, None)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "{prompt}"}, ["PeerDemonstration.template", "{demonstration}"]),
        ({"template": ""}, ["PeerDemonstration.template"]),
        ({"template": []}, ["PeerDemonstration.template"]),
        ({"template": "{{demonstration}}"}, ["PeerDemonstration.template"]),
        ({"template": "{demonstration} {"}, ["single '{'"]),
        ({"template": "{demonstration} {}"}, ["empty pair of braces"]),
        ({"template": [{"role": "user"}]}, ["message 0", "`role` and `content`"]),
        ({"success": NAN}, ["PeerDemonstration.success", "nan"]),
        ({"success": float("inf")}, ["PeerDemonstration.success"]),
        ({"without": "keep"}, ["PeerDemonstration.without", "drop or plain"]),
        ({"max_prompt_tokens": 0}, ["PeerDemonstration.max_prompt_tokens"]),
        ({"max_prompt_tokens": True}, ["PeerDemonstration.max_prompt_tokens"]),
        ({"max_prompt_tokens": 1.5}, ["PeerDemonstration.max_prompt_tokens"]),
    ],
    ids=str,
)
def test_a_setting_outside_its_range_is_one_line(settings, words):
    with pytest.raises(InputError) as refused:
        PeerDemonstration(**settings)
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    ("template", "rows", "words"),
    [
        ("{demonstration} {solutoin}", ROWS, ["rows.jsonl:1", "'solutoin'", "missing", "problem, n, answer"]),
        (
            "{demonstration} {n}",
            [*ROWS, {"id": "c", "problem": "y", "n": None}],
            ["rows.jsonl:3", "'n'", "text or a number"],
        ),
        ([{"role": "judge", "content": "{demonstration}"}], ROWS, ["rows.jsonl:1", "role must be one of"]),
        (
            [{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{demonstration}"}],
            ROWS,
            ["rows.jsonl:1", "must end with a user's turn"],
        ),
    ],
    ids=str,
)
def test_a_template_that_a_row_cannot_fill_is_found_before_the_run(tmp_path, template, rows, words):
    with pytest.raises(InputError) as refused:
        module(tmp_path, PeerDemonstration(template), rows)
    message = str(refused.value)
    assert "\n" not in message and "teacher_prompt" in message and all(word in message for word in words)
    assert "made up" not in message


def test_a_chat_template_that_fails_on_hints_is_found_before_the_run(tmp_path):
    options = {
        "chat_template": "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + tiny.TEMPLATE
    }
    template = [{"role": "system", "content": "{demonstration}"}, {"role": "user", "content": "{prompt}"}]
    with pytest.raises(InputError, match=r"rows\.jsonl:1 \(teacher\): the chat template failed"):
        module(tmp_path, PeerDemonstration(template), teacher_template_options=options)


class Failing(HindsightPrompt):
    """Raises, or gives what is no prompt."""

    def __init__(self, result=None):
        self.result = result

    def render(self, attempt, peers):
        """What it was given, or a column that is not there."""
        return attempt.row["proof"] if self.result is None else self.result


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Failing(), ["Failing failed (KeyError: 'proof')"]),
        (Failing(3), ["'teacher_prompt' must hold text"]),
        (Failing(" "), ["'teacher_prompt' is empty"]),
        (
            Failing([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
            ["end with a user's turn"],
        ),
    ],
)
def test_a_class_that_fails_is_named_with_the_row(tmp_path, own, words):
    data = module(tmp_path, own)
    with pytest.raises(InputError) as refused:
        data.hindsight(sampled(data, list("pqrstu"), None))
    assert all(word in str(refused.value) for word in ["row '", "teacher_prompt", *words])
