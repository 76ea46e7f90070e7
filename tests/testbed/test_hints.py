"""The hint of the embedded self-distillation, and the student that reads it."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from lit_opd.errors import InputError
from lit_opd.testbed import ASSETS, make_automaton, make_tokenizer, read_records
from lit_opd.testbed.accuracy import accuracy
from lit_opd.testbed.hints import StartOfPath, learn_to_read, path_of

ROWS = read_records(ASSETS / "val.jsonl")
NUM_GRADED = 96


def test_the_hint_is_the_start_of_the_path_that_ends_in_the_answer():
    for row in ROWS[:50]:
        hint, problem = StartOfPath(12).render(row, row["prompt"]).split("=", 1)
        assert problem == row["prompt"] and len(hint) == 36 and hint.endswith(row["answer"])
        assert StartOfPath(4).render(row, row["prompt"]) == f"{hint[:12]}={problem}"


@pytest.mark.parametrize("prompt", ["", "abc=417", "=1", "two plus two"])
def test_another_prompt_is_refused(prompt):
    with pytest.raises(InputError, match="legal problem"):
        path_of(make_automaton(), prompt + "?")


def test_a_hint_of_nothing_is_refused():
    with pytest.raises(InputError, match=r"StartOfPath\.codes.*got 0"):
        StartOfPath(0)


def test_the_reader_does_better_with_a_hint_and_the_student_cannot_read_one():
    """On 96 problems one standard error is 0.05."""
    tokenizer, own = make_tokenizer(), StartOfPath()
    rows = [{**row, "prompt": own.render(row, row["prompt"])} for row in ROWS[:NUM_GRADED]]
    reader, student = (AutoModelForCausalLM.from_pretrained(ASSETS / name) for name in ("reader", "student"))
    assert accuracy(reader, tokenizer, rows) > accuracy(reader, tokenizer, ROWS[:NUM_GRADED]) + 0.05
    assert accuracy(student, tokenizer, rows) < 0.05


def test_learning_to_read_leaves_the_student_alone_and_is_repeatable():
    student = AutoModelForCausalLM.from_pretrained(ASSETS / "student")
    before = {name: value.clone() for name, value in student.named_parameters()}
    one, two = (learn_to_read(student, make_automaton(), make_tokenizer(), steps=2) for _ in range(2))
    assert all(value.equal(before[name]) for name, value in student.named_parameters())
    assert all(value.equal(dict(two.named_parameters())[name]) for name, value in one.named_parameters())
    assert not any(value.equal(before[name]) for name, value in one.named_parameters())
