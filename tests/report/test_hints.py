"""Each sign of a sick run is told once, when it has lasted, and never in a healthy one."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from callbacks import RunHints
from lit_opd.files import read_lines
from lit_opd.report import hints
from lit_opd.report.hints import LASTS, Hints
from tests.helpers import fixed, tiny

HEALTHY = {
    "train/truncated_fraction": 0.2,
    "train/response_length": 30.0,
    "train/disagreement": 1.2,
    "train/weight_ess": 0.9,
}
STEPS = {
    "all responses cut": ({"train/truncated_fraction": 1.0, "train/response_length": 48.0}, (48, 48), "100% .* 48 tokens: raise"),
    "one response length": ({"train/response_length": 7.0}, (7, 7), "every response has 7 tokens: see in samples"),
    "no advantage": ({"train/disagreement": 1e-9}, (3, 9), "differ by 1.0e-09 nats a token: nothing can be learned"),
    "weights on few tokens": ({"train/weight_ess": 0.011}, (3, 9), "count as 1.1% of the tokens"),
}  # fmt: skip


def after(state: Hints, numbers: dict[str, float], ends: tuple[int, int] = (3, 9)) -> list[str]:
    return state.after_step(HEALTHY | numbers, shortest=ends[0], longest=ends[1])


@pytest.mark.parametrize("name", STEPS)
def test_a_sign_in_the_steps_is_told_once_when_it_has_lasted(name):
    numbers, ends, words = STEPS[name]
    state = Hints()
    found = [after(state, numbers, ends) for _ in range(LASTS + 3)]
    assert [len(lines) for lines in found] == [0] * (LASTS - 1) + [1] + [0] * 3
    assert re.search(words, found[LASTS - 1][0]) and state.told == [name]


@pytest.mark.parametrize("name", STEPS)
def test_a_sign_that_goes_away_again_is_not_told(name):
    numbers, ends, _ = STEPS[name]
    state = Hints()
    for _ in range(4):
        for given, own in [(numbers, ends)] * (LASTS - 1) + [({}, (3, 9))]:
            assert after(state, given, own) == []


def test_one_length_of_the_rows_that_are_left_is_none_of_all_responses():
    """With ``truncated: drop`` the batch holds the ended rows alone, here one of 7 tokens; 30 is the mean over all."""
    state = Hints()
    assert [after(state, {"train/truncated_fraction": 0.75}, (7, 7)) for _ in range(9)] == [[]] * 9


def test_a_skipped_step_is_no_sign():
    state = Hints()
    nan = {"train/disagreement": math.nan, "train/weight_ess": math.nan}
    assert [after(state, nan) for _ in range(9)] == [[]] * 9


def test_a_run_that_goes_on_counts_on_and_repeats_nothing():
    numbers, ends, _ = STEPS["no advantage"]
    state = Hints()
    for _ in range(LASTS - 1):
        after(state, numbers, ends)
    again = Hints(state.state())
    assert len(after(again, numbers, ends)) == 1
    assert [after(Hints(again.state()), numbers, ends) for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1.0, 1.3, 1.4, 1.5], 1),
        ([1.0, 1.1, 1.1, 1.1], 0),
        ([1.0, 1.5, 1.4, 1.3], 0),
        ([1.0, 1.3, 1.4, 1.5, 1.6, 1.7], 1),
        ([2.0, 1.0, 0.5], 0),
    ],
)
def test_a_reverse_kl_that_rises_above_its_start_is_told(values, told):
    state = Hints()
    lines = [line for value in values for line in state.after_validation({"val/reverse_kl": value}, looked=0, boxed=0)]
    assert len(lines) == told
    if told:
        assert "rose to 1.500 nats a token from 1.000" in lines[0]


@pytest.mark.parametrize(
    ("accuracy", "looked", "boxed", "told"), [(0.0, 8, 0, 1), (0.0, 8, 1, 0), (0.1, 8, 0, 0), (0.0, 0, 0, 0)]
)
def test_answers_that_are_never_boxed_are_told_where_none_was_right(accuracy, looked, boxed, told):
    state = Hints()
    numbers = {"val/greedy_accuracy": accuracy}
    lines = [line for _ in range(4) for line in state.after_validation(numbers, looked=looked, boxed=boxed)]
    assert len(lines) == told and all("none of 8 has its answer in \\boxed{}" in line for line in lines)


def test_every_sign_can_be_told():
    for sign in vars(hints).values():
        if isinstance(sign, hints.Sign):
            numbers = {**HEALTHY, "val/reverse_kl": 1.0, "first": 0.5, "looked": 8.0}
            assert "{" not in sign.hint(numbers).replace("{}", "")


def test_a_run_says_its_hints_and_a_resumed_one_does_not_again(tmp_path, caplog):
    """A student that is its own teacher, in real fits."""
    folder = tiny.pair(tmp_path)[0]
    rollout = fixed.rollout(lengths=[4, 2, 5], prompt_lengths=[3, 3, 3], truncated=set())

    def said(steps: int, **files: Path) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO"):
            trained = fixed.module((folder, folder), rollout)
            fixed.fit(trained, rollout.prompts, steps=steps, watch=RunHints(), default_root_dir=tmp_path, **files)
        return [record.message for record in caplog.records if record.message.startswith("hint: ")]

    file = tmp_path / "hints.jsonl"
    lines = said(LASTS + 1, save=tmp_path / "middle.ckpt")
    assert len(lines) == 2 and lines[0] == lines[1] and "is model.teacher the student itself?" in lines[0]
    assert read_lines(file) == [{"step": LASTS, "hint": lines[0].removeprefix("hint: ")}]
    file.write_text("")
    assert said(LASTS + 3, load=tmp_path / "middle.ckpt") == lines[:1]  # at the end alone
    assert [line["step"] for line in read_lines(file)] == [LASTS]
    assert said(LASTS - 1) == [] and read_lines(file) == []
