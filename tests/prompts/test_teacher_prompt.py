"""The teacher's own prompt, of a row's columns: what it reads, and that nothing of it reaches the student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_opd.errors import InputError
from lit_opd.prompts import PromptDataModule, TeacherPrompt
from tests.helpers import tiny

ROWS = [
    {"id": "a", "problem": "one plus one", "solution": "it is 2", "n": 7, "info": {"hint": "two"}, "answer": "2"},
    {"id": "b", "problem": "x", "solution": "a longer way", "n": 8, "info": {"hint": "{solution}"}, "answer": "3"},
]


def write(folder: Path, rows=ROWS) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def batch(folder: Path, teacher_prompt, rows=ROWS, **settings):
    data = PromptDataModule(write(folder, rows), prompt_batch=len(rows), teacher_prompt=teacher_prompt, **settings)
    data.use_tokenizer(tiny.tokenizer("".join(map(chr, range(32, 127)))))
    data.setup("fit")
    loaded = next(iter(data.train_dataloader()))
    return data, {name: loaded.rows(loaded.row_keys.new_tensor([row])) for row, name in enumerate(loaded.row_ids)}


def text(tokenizer, ids, mask) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids[0][mask[0]].tolist()))


def read(data, row) -> tuple[str, str]:
    """What the student and what the teacher reads of one row."""
    tokenizer = data.encoder.tokenizer
    return text(tokenizer, row.ids, row.mask), text(tokenizer, row.teacher_ids, row.teacher_mask)


def test_the_columns_of_the_row_stand_in_the_teachers_prompt_alone(tmp_path):
    data, rows = batch(tmp_path, "{problem}; {solution} ({n}, {info.hint})")
    assert read(data, rows["a"]) == (
        "<user>one plus one<assistant>",
        "<user>one plus one; it is 2 (7, two)<assistant>",
    )


def test_prompts_are_padded_on_the_left_each_to_its_own_width(tmp_path):
    _, rows = batch(tmp_path, "{problem}{solution}")
    assert rows["b"].teacher_mask[0].tolist() == sorted(rows["b"].teacher_mask[0].tolist())
    assert rows["b"].teacher_mask.sum() == len("xa longer way") + 2 and rows["b"].mask.sum() == 3


def test_braces_in_the_data_are_text(tmp_path):
    data, rows = batch(tmp_path, "{info.hint} {problem}")
    assert read(data, rows["b"])[1] == "<user>{solution} x<assistant>"


def test_doubled_braces_are_braces(tmp_path):
    data, rows = batch(tmp_path, "{{{n}}} {{problem}} }}{{")
    assert read(data, rows["a"])[1] == "<user>{7} {problem} }{<assistant>"


def test_special_tokens_in_a_column_stay_text(tmp_path):
    rows = [{"id": "a", "problem": "p", "solution": "<eos>"}]
    data, found = batch(tmp_path, "{problem}{solution}", rows)
    tokens = data.encoder.tokenizer.convert_ids_to_tokens(found["a"].teacher_ids[0].tolist())
    assert tokens == ["<user>", "p", *"<eos>", "<assistant>"]


def test_messages_are_rendered_by_the_chat_template(tmp_path):
    turns = [{"role": "user", "content": "{solution}"}, {"role": "assistant", "content": "ok"}]
    data, rows = batch(tmp_path, [*turns, {"role": "user", "content": "{problem}?"}])
    assert read(data, rows["a"])[1] == "<user>it is 2ok<user>one plus one?<assistant>"


class Backwards(TeacherPrompt):
    """The student's prompt behind the solution from its end."""

    def render(self, row, prompt):
        """Text."""
        return row["solution"][::-1] + "|" + prompt


def test_a_class_of_ones_own_reads_row_and_prompt(tmp_path):
    data, rows = batch(tmp_path, Backwards())
    assert read(data, rows["a"])[1] == "<user>2 si ti|one plus one<assistant>"


def test_lengths_count_the_teachers_prompt(tmp_path):
    data, _ = batch(tmp_path, "{problem}{solution}{solution}")
    assert (
        data.longest_prompt == len("one plus one" + 2 * "it is 2") + 2
        or data.longest_prompt == len("x" + 2 * "a longer way") + 2
    )


def test_a_worked_solution_that_is_the_hint_is_not_taken_for_the_answer(tmp_path):
    rows = [
        {"id": "a", "problem": "p", "solution": "all of the way"},
        {"id": "b", "problem": "q", "solution": "so it is \\boxed{4}"},
    ]
    with pytest.warns(UserWarning, match="1 of 2 rows have no answer"):
        _, found = batch(tmp_path, "{problem} {solution}", rows)
    assert (found["a"].answers, found["b"].answers) == ((None,), ("4",))
    _, found = batch(tmp_path, "{problem} {solution}", rows, answer_column="solution")
    assert found["a"].answers == ("all of the way",)


def test_an_answer_that_is_the_hint_stays_the_answer(tmp_path):
    _, found = batch(tmp_path, "{problem} It is {answer}.")
    assert found["a"].answers == ("2",)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{problem} {solutoin}", ["rows.jsonl:1", "'solutoin'", "missing", "problem, solution, n, info, answer"]),
        ("{problem} {info.nothing}", ["rows.jsonl:1", "'info.nothing'"]),
        ("{problem!r}", ["'problem!r'"]),
        ("{info}", ["'info'", "text or a number", "dict"]),
        ("Solve it.", ["must name a column", "teacher_system_prompt"]),
        ("", ["must name a column"]),
        ([], ["must name a column"]),
        ("{problem} {}", ["empty pair of braces", "character 10"]),
        ("{problem} {solution", ["single '{'"]),
        ("{problem} }", ["single '}'", "double braces"]),
        ([{"role": "user"}], ["message 0", "`role` and `content`"]),
        ([{"role": "user", "content": "{problem}", "name": "x"}], ["message 0", "alone"]),
        ([{"role": "judge", "content": "{problem}"}], ["rows.jsonl:1", "role must be one of"]),
        (
            [{"role": "user", "content": "{problem}"}, {"role": "assistant", "content": "{solution}"}],
            ["must end with a user's turn", "rows.jsonl:1"],
        ),
    ],
    ids=str,
)
def test_a_template_that_cannot_be_filled_is_one_line_with_the_row(tmp_path, template, words):
    with pytest.raises(InputError) as refused:
        batch(tmp_path, template)
    message = str(refused.value)
    assert "\n" not in message and "teacher_prompt" in message and all(word in message for word in words)


@pytest.mark.parametrize("value", [None, True, ["a"], {"a": 1}], ids=str)
def test_a_value_that_is_no_text_names_its_row(tmp_path, value):
    rows = [{"id": "a", "problem": "p", "hint": "h"}, {"id": "b", "problem": "p", "hint": value}]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*'hint'.*text or a number"):
        batch(tmp_path, "{hint} {problem}", rows)


class Failing(TeacherPrompt):
    """Raises, or gives what is no prompt."""

    def __init__(self, result=None):
        self.result = result

    def render(self, row, prompt):
        """What it was given, or the value of a column that is not there."""
        return row["proof"] if self.result is None else self.result


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Failing(), ["Failing failed (KeyError: 'proof')", "columns found: id, problem"]),
        (Failing(3), ["'teacher_prompt' must hold text"]),
        (Failing(" "), ["'teacher_prompt' is empty"]),
    ],
)
def test_a_class_that_fails_is_named_with_the_row(tmp_path, own, words):
    with pytest.raises(InputError) as refused:
        batch(tmp_path, own)
    assert all(word in str(refused.value) for word in ["rows.jsonl:1", *words])
