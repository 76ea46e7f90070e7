"""Rows as people lay them out: nested columns, chats by other names, questions in two columns; nothing is lost unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_opd.errors import InputError
from lit_opd.prompts.sources import ColumnNames, DataSource, PromptRow, read_prompts

BRIEF, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 3 and 4."}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("lit_opd.prompts.sources.rank_zero_warn", found.append)
    return found


def read(folder: Path, row: dict[str, Any], *columns: Any, **settings: Any) -> PromptRow:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return read_prompts(DataSource(str(path), **settings), *columns)[0]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"reward_model": {"style": "rule", "ground_truth": "7"}}, "7"),
        ({"reward_model": '{"ground_truth": 7}'}, "7"),
        ({"answer": None, "reward_model": {"ground_truth": "7"}}, "7"),
        ({"answer": "8", "reward_model": {"ground_truth": "7"}}, "8"),
        ({"solution": "so it is \\boxed{7}", "ground_truth": "7"}, "7"),
        ({"extra_info": {"answer": "three and four\n#### 7"}}, "7"),
        ({"reward_model": None}, None),
    ],
)
@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": [ASK]},
        {"prompt": json.dumps([ASK])},
        {"instruction": "Add.", "input": "3 and 4"},
        {"conversations": [{"from": "human", "value": "Add 3 and 4."}]},
        {"question": "Add 3 and 4."},
    ],
)
def test_the_answer_is_found_in_every_layout(tmp_path: Path, prompt: dict, row: dict, answer: str | None) -> None:
    assert read(tmp_path, prompt | row).answer == answer


def test_parts_of_columns_are_named_with_dots(tmp_path: Path) -> None:
    row = {"x": {"q": ["first", {"t.ext": "second"}], "key": 5, "who": "math"}, "x.level": 3, "gold": {"a": [1, 2]}}
    columns = ColumnNames(prompt="x.q.1.t.ext", answer="gold.a.1", id="x.key", teacher="x.who")
    found = read(tmp_path, row, columns, filter="x.level >= 3")
    assert (found.prompt, found.answer, found.row_id, found.teacher) == ("second", "2", "5", "math")
    assert read(tmp_path, row, columns, filter="x.key in [5]").row_id == "5"
    with pytest.raises(InputError, match=r"`PromptDataModule.answer_column` .* got 'gold.b'; .* gold, gold.a"):
        read(tmp_path, row, ColumnNames(prompt="x.q.0", answer="gold.b"))
    with pytest.raises(InputError, match=r"answer column 'gold' must hold text .*dict.* with a dot"):
        read(tmp_path, row, ColumnNames(prompt="x.q.0", answer="gold"))
    with pytest.raises(InputError, match=r"no column 'x.nope' in .*columns found: x, x.q"):
        read(tmp_path, row, columns, filter="x.nope == 1")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("prompt", json.dumps([BRIEF, ASK])),
        ("messages", str([BRIEF, ASK])),  # as Python prints it
        ("prompt", [{"from": "system", "value": BRIEF["content"]}, {"from": "human", "value": ASK["content"]}]),
        ("conversations", [BRIEF, {"from": "user", "value": ASK["content"]}, {"from": "gpt", "value": "7"}]),
        ("messages", {"role": ["system", "user"], "content": [BRIEF["content"], ASK["content"]]}),
        ("conversations", json.dumps([BRIEF, {"from": "human", "value": ASK["content"]}])),
    ],
)
def test_a_chat_is_read_under_its_usual_names_and_forms(tmp_path: Path, column: str, value: object) -> None:
    assert read(tmp_path, {column: value}).prompt == [BRIEF, ASK]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "[{'role': 'user' 'content': 1"}, r"rows.jsonl:1: 'prompt' looks like chat messages as text"),
        ({"prompt": {"messages": [ASK]}}, r"set `prompt_column: prompt.messages`"),
        ({"prompt": json.dumps({"conversations": [ASK]})}, r"set `prompt_column: prompt.conversations`"),
        ({"conversations": [{"from": "oracle", "value": "x"}]}, r"role must be one of .* got str 'oracle'"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, r"role must be one of"),
        ({"instruction": "Sort.", "input": [3, 1]}, r"'input' must hold text beside 'instruction', got list"),
        ({"data": {"question": "x"}}, r"no prompt column .* columns found: data, data.question"),
    ],
)
def test_what_is_not_read_is_refused_with_the_setting(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, row)


@pytest.mark.parametrize("text", ['["a", "b"]', '{"role": "x"}', "[1, 2", "[{}]", '[{"role": "user"}]', "{x} [y]"])
def test_text_that_is_no_chat_stays_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, {"prompt": text}).prompt == text


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Sort.", "input": "3 1"}, "Sort.\n\n3 1"),
        ({"instruction": "Sort.", "input": ""}, "Sort."),
        ({"instruction": "Sort.", "input": None, "context": "3 1"}, "Sort.\n\n3 1"),
        ({"instruction": "Add 3 and 4.", "system": "Be brief."}, [BRIEF, ASK]),
        ({"question": "Add 3 and 4.", "system_prompt": "Be brief."}, [BRIEF, ASK]),
        ({"messages": [BRIEF, ASK], "system": "Be long."}, [BRIEF, ASK]),
        ({"conversations": [{"from": "human", "value": "Add 3 and 4."}], "system": "Be brief."}, [BRIEF, ASK]),
        (
            {"instruction": "Add 3 and 4.", "history": [["hi", "hello"]]},
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, ASK],
        ),
    ],
)
def test_columns_that_belong_together_make_one_prompt(
    tmp_path: Path, said: list[str], row: dict, prompt: object
) -> None:
    assert read(tmp_path, row | {"output": "an answer"}).prompt == prompt
    assert not said


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "Who?", "context": "It was Ada."}, "context"),
        ({"question": "Which?", "choices": ["a", "b"]}, "choices"),
        ({"problem": "x", "input": "y"}, "input"),
        ({"question": "Who?", "instruction": "Answer in German."}, "instruction"),
        ({"instruction": "x", "history": ["not a pair"]}, "history"),
        ({"prompt": [ASK], "tools": ["a hammer", "nails"]}, "tools"),
        ({"prompt": [ASK], "tools": "[a hammer]"}, "tools"),
    ],
)
def test_a_part_that_is_not_in_the_prompt_is_named(tmp_path: Path, said: list[str], row: dict, column: str) -> None:
    read(tmp_path, row)
    assert len(said) == 1 and f"'{column}' (first: " in said[0] and "rows.jsonl:1" in said[0]


def test_a_named_prompt_column_is_read_alone_and_its_parts_are_named(tmp_path: Path, said: list[str]) -> None:
    row = {"instruction": "Sort.", "input": "3 1", "system": "Be brief."}
    assert read(tmp_path, row, ColumnNames(prompt="instruction")).prompt == "Sort."
    assert "'input'" in said[0] and "'system'" in said[0]
    assert read(tmp_path, row | {"input": "", "system": None}, prompt_column="instruction").prompt == "Sort."
    assert len(said) == 1
