"""Where in a turn: profile, samples and pages of conversations, against loops over lists."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.position_profile import build_window, record_quantities
from callbacks.rollout_samples import sample_rows
from lit_opd.report import profile_pictures
from lit_opd.report.profile import ProfileWindow
from lit_opd.report.profile_heat_maps import heat_map
from lit_opd.report.profile_history import ProfileHistory
from lit_opd.report.profile_pictures import NOW, profile_figure
from lit_opd.report.profile_sums import PositionProfileSums
from lit_opd.report.run_files import read_run_files
from lit_opd.report.run_page import render as render_page
from lit_opd.report.tokens_page import predicted_responses, render
from lit_opd.rollout import DecodeSampler
from lit_opd.types import Prediction, Rollout, StepRecord, TokenSignal
from tests.helpers import run_folder
from tests.helpers.talking import Counting, student, talked, tokenizer

TURNS, TURN_LENGTH = 3, 10


@pytest.fixture(scope="module")
def record() -> StepRecord:
    rollout = talked(DecodeSampler(max_new_tokens=60), Counting(), student())
    generator = torch.Generator().manual_seed(1)
    shape = rollout.mask.shape
    student_logprobs, teacher_logprobs, weights = -torch.rand(3, *shape, generator=generator, dtype=torch.float64)
    signal = TokenSignal(
        student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs, mask=rollout.mask, turn=rollout.turn,
        sampler_logprobs=torch.zeros(shape),
    )  # fmt: skip
    return StepRecord(
        rollout=rollout, signal=signal, weights=torch.where(rollout.mask, -weights, 0.0), kept=rollout.mask,
        loss=weights, clipped=torch.zeros(shape, dtype=torch.bool), finish_reason=rollout.finish_reason,
        sampled_tokens=rollout.mask.sum(), grad_norm=torch.zeros(()), progress=0.0, step=1, seconds={},
    )  # fmt: skip


def by_hand(record: StepRecord) -> list[tuple[int, int, float, float]]:
    """(turn, place in it from 1, disagreement, weight) of every sampled token."""
    found = []
    for row in range(len(record.rollout)):
        count: dict[int, int] = defaultdict(int)
        for column in range(record.rollout.mask.shape[1]):
            if record.rollout.mask[row, column]:
                turn = int(record.rollout.turn[row, column])
                count[turn] += 1
                gap = abs(
                    float(record.signal.teacher_logprobs[row, column] - record.signal.student_logprobs[row, column])
                )
                found.append((turn, count[turn], gap, float(record.weights[row, column])))
    return found


def window_of(record: StepRecord, **sizes: int) -> ProfileWindow:
    sums = PositionProfileSums(60, bins=8, **sizes)
    turn = record.signal.turn
    sums.update(record_quantities(record), mask=record.signal.mask, kept=record.kept, turn=turn)
    tables = sums.tables(sums.compute())
    return build_window(tables, edges=sums.edges, step=1, previous_step=0, scale="linear", turn_edges=sums.turn_edges)


def test_the_profile_by_turn_and_inside_a_turn_equals_slow_loops(record):
    window = window_of(record, turns=TURNS, turn_length=TURN_LENGTH)
    tokens = by_hand(record)
    assert window.by_turn is not None and window.in_turn is not None
    assert window.by_turn.start == window.by_turn.end == (1, 2, 3) and window.in_turn.end[-1] == TURN_LENGTH
    for axis, place in ((window.by_turn, lambda t: t[0] + 1), (window.in_turn, lambda t: t[1])):
        for bin_, (low, high) in enumerate(zip(axis.start, axis.end, strict=True)):
            inside = [token for token in tokens if low <= place(token) <= high]
            assert axis.count[bin_] == len(inside)
            for name, part in (("disagreement", 2), ("weight", 3)):
                mean = sum(token[part] for token in inside) / len(inside)
                assert axis.values[name][bin_] == pytest.approx(mean, rel=1e-12)
    assert sum(window.by_turn.count) == window.tokens == len(tokens)
    assert sum(window.in_turn.count) == sum(token[1] <= TURN_LENGTH for token in tokens) < len(tokens)
    assert sum(window.by_turn.values["gradient_share"]) == pytest.approx(1.0)
    assert ProfileWindow.from_json(window.to_json()) == window


def test_other_axes_stay_and_single_turns_have_no_new_ones(record):
    window, plain = window_of(record, turns=TURNS), window_of(record)
    assert window.absolute == plain.absolute and window.relative == plain.relative and window.scalars == plain.scalars
    assert plain.by_turn is None and "by_turn" not in plain.to_json()


def one_turn(rollout: Rollout) -> Rollout:
    return replace(rollout, turn=None, observed=None)


def test_samples_show_the_conversation_and_where_each_token_stands(record):
    letters = tokenizer()
    lines = sample_rows(record, letters, 6, tokens=100)
    for row, line in enumerate(lines):
        read = record.rollout.read[row]
        assert line["response"] == letters.decode(record.rollout.response_ids[row][read], skip_special_tokens=False)
        assert line["tokens"]["turn"] == record.rollout.turn[row][record.rollout.mask[row]].tolist()
        heard = [text for text in line["tokens"]["heard"] if text]
        assert len(heard) == int(record.rollout.num_turns[row]) - 1 and len(line["tokens"]["text"]) == line["length"]
        assert all(
            f" in {number}".replace(" ", "") in text.replace(" ", "") for number, text in enumerate(heard, start=1)
        )
    plain = sample_rows(replace(record, rollout=one_turn(record.rollout)), letters, 1, tokens=100)[0]
    assert set(plain["tokens"]) == {"text", "student_logprob", "teacher_logprob", "weight"}


def test_predictions_and_their_page_say_turn_place_and_what_was_heard(record):
    prediction = Prediction(rollout=record.rollout, signal=record.signal, weights=record.weights)
    found = predicted_responses(prediction, tokenizer())
    places = [(token.turn, token.place) for response in found for token in response.tokens]
    assert places == [(turn, place) for turn, place, _, _ in by_hand(record)]
    spoken: Any = next(token for token in found[1].tokens if token.heard)
    marked = replace(found[1], tokens=(replace(spoken, heard="<b>&"),))
    page = render([marked], strategy="Uniform")
    assert '<span class="heard">&lt;b&gt;&amp;</span>' in page and f"position 1, {spoken.place} of turn 2" in page
    plain = predicted_responses(replace(prediction, rollout=one_turn(record.rollout)), tokenizer())[0]
    assert not {"turn", "place", "heard"} & set(plain.to_json()["tokens"][0])
    assert "turn" not in render([plain], strategy="Uniform").split("<main>")[1]


# -- pictures ----------------------------------------------------------------------------------------------------------


def two_windows(record: StepRecord) -> tuple[ProfileWindow, ProfileWindow]:
    """Bins of one position each; turns that nobody said at the end."""
    now = replace(window_of(record, turns=TURNS + 3, turn_length=40), step=2, previous_step=1)
    return now, replace(now, step=1, previous_step=0)


def drawn(figure: Any, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title().startswith(title))


def test_a_conversations_pictures_show_turns_that_were_said_and_no_others(record):
    now, start = two_windows(record)
    assert now.by_turn is not None
    figure = profile_figure(now, start, "by_turn")
    axes = drawn(figure, "disagreement")
    (line,) = [line for line in axes.lines if line.get_color() == NOW]
    assert np.allclose(line.get_ydata()[:TURNS], now.by_turn.values["disagreement"][:TURNS])
    assert axes.get_xlim() == (0.5, TURNS + 0.5) and axes.get_xticks().tolist() == [1, 2, 3]
    assert axes.get_xlabel() == "turn" and "by turn" in figure.get_suptitle()
    (share,) = [line for line in drawn(figure, "sampled tokens").lines if line.get_color() == NOW]
    counts = np.bincount([turn for turn, *_ in by_hand(record)], minlength=TURNS)
    assert np.allclose(share.get_ydata()[:TURNS], 100 * counts / counts.sum())
    assert np.isnan(share.get_ydata()[TURNS:]).all()  # no line goes on to turns that nobody said
    assert not any(axes.get_title().startswith("who is") for axes in figure.axes)


def test_inside_a_turn_alive_are_the_turns_that_go_on(record):
    now, start = two_windows(record)
    assert now.in_turn is not None
    figure = profile_figure(now, start, "in_turn")
    axes = drawn(figure, "who is still writing")
    (line,) = [line for line in axes.lines if line.get_color() == NOW]
    places = [place for _, place, *_ in by_hand(record)]
    heights = np.nan_to_num(line.get_ydata())
    for low, high, alive in zip(now.in_turn.start, now.in_turn.end, heights, strict=True):
        first = sum(place <= now.in_turn.end[0] for place in places) / now.in_turn.end[0]
        inside = sum(low <= place <= high for place in places) / (high - low + 1)
        assert alive == pytest.approx(100 * inside / first)
    last = max(bin_ for bin_, count in enumerate(now.in_turn.count) if count)
    assert axes.get_xlim() == (0.5, now.in_turn.end[last] + 0.5) and last < len(now.in_turn.count) - 1
    assert axes.get_ylabel() == "% of turns" and "of the turns alive" in figure.legends[0].get_texts()[-1].get_text()


def test_pictures_by_turn_are_for_conversations_only(record, undrawn, monkeypatch, tmp_path):
    """Which ones there are; drawing each of them takes longer, and is tested above."""
    for name, place in (("profile_figure", 2), ("heat_map", 4)):
        monkeypatch.setattr(profile_pictures, name, lambda *args, place=place, **_: args[place])
    monkeypatch.setattr(profile_pictures, "_save", lambda shown, path: shown)
    now, start = two_windows(record)
    plain = [replace(window, in_turn=None, by_turn=None) for window in (now, start)]
    shown = {}
    for kind, windows in (("turns", (now, start)), ("plain", plain)):
        history = ProfileHistory()
        for window in windows[::-1]:
            history.add(window)
        shown[kind] = undrawn(history, now=windows[0], start=windows[1], folder=tmp_path)
    pair = ("in_turn", "by_turn")
    more = {"profile_by_position_in_turn": "in_turn", "profile_by_turn": "by_turn"}
    more |= {"heatmap_disagreement_by_turn": pair, "heatmap_weight_by_turn": pair}
    assert shown["turns"] == shown["plain"] | more and len(shown["plain"]) == 4


def test_a_heat_map_by_turn_ends_at_the_last_turn_said(record):
    now, start = two_windows(record)
    history = ProfileHistory()
    for window in (start, now):
        history.add(window)
    figure = heat_map(history, "disagreement", "disagreement", "nats", ("in_turn", "by_turn"))
    left, right = figure.axes[:2]
    assert right.get_ylim() == (0.5, TURNS + 0.5) and right.get_yticks().tolist() == [1, 2, 3]
    assert left.get_ylabel() == "position in the turn, tokens" and left.get_ylim()[1] < 40
    assert "pale" not in figure.get_suptitle() and not figure.legends


def test_a_turn_that_one_response_got_to_does_not_set_the_colours(record):
    now, _ = two_windows(record)
    assert now.by_turn is not None
    counts, values = list(now.by_turn.count), list(now.by_turn.values["disagreement"])
    counts[TURNS], values[TURNS] = 1, 50.0
    changed = replace(now.by_turn, count=tuple(counts), values={**now.by_turn.values, "disagreement": tuple(values)})
    history = ProfileHistory()
    history.add(replace(now, by_turn=changed))
    figure = heat_map(history, "disagreement", "disagreement", "nats", ("in_turn", "by_turn"))
    highest = figure.axes[1].collections[0].get_clim()[1]
    cells = [value for axis in (now.in_turn, now.by_turn) for value in axis.values["disagreement"] if value is not None]
    assert min(cells) < highest <= max(cells) < 50


# -- the page of a run -------------------------------------------------------------------------------------------------

TALKS = {
    "model": {
        "sampler": {
            "class_path": "lit_opd.turns.TurnsSampler",
            "init_args": {
                "sampler": {"class_path": "lit_opd.rollout.DecodeSampler", "init_args": {"max_new_tokens": 60, "top_k": 0}},
                "environment": {"class_path": "mine.Guess", "init_args": {"secret": 7}},
                "max_turns": 6, "max_turn_tokens": 20, "workers": 32,
            },
        }
    }
}  # fmt: skip


def test_the_page_of_a_run_shows_turns_rewards_and_what_sampled(record, tmp_path):
    now, start = two_windows(record)
    assert now.in_turn is not None and len(now.in_turn.count) == 8
    now = replace(now, in_turn=replace(now.in_turn, count=(100, 50, 4, *[0] * 5)))  # of 5 positions each
    logged = {
        "train/turns": 2.5,
        "train/reward": 0.25,
        "train/truncated_fraction": 0.5,
        "train/turns_cut_fraction": 0.125,
    }
    files: dict[str, Any] = {"windows": [start, now], "config": TALKS, "metrics": [{"step": 1, **logged}]}
    text = render_page(read_run_files(run_folder.write(tmp_path, **files)))
    found = run_folder.drawings(text)
    assert found["Turns of a response"]["series"][0]["y"] == [2.5] and found["Reward"]["series"][0]["y"] == [0.25]
    cut = {series["name"]: series["y"] for series in found["Responses cut short"]["series"]}
    assert cut == {"by max_new_tokens or max_turn_tokens": [50.0], "by max_turns": [12.5]}
    by_turn, inside = found["Disagreement by turn"], found["Disagreement inside a turn"]
    assert [series["x"] for series in by_turn["series"]] == [[1, 2, 3], [1, 2, 3]]
    assert [y is not None for y in inside["series"][0]["y"]] == [True, True, False]
    assert "fewer than 10% of the turns get there" in text
    said = "TurnsSampler(environment=Guess, max_turn_tokens=20, max_turns=6, sampler=DecodeSampler(max_new_tokens=60, top_k=0))"
    assert said in text


def test_names_in_hints_are_code_and_their_text_is_text(tmp_path):
    files: dict[str, Any] = {
        "hints": [{"step": 2, "hint": "set `a<b` & go"}],
        "metrics": [{"step": 1, "train/tokens": 5}],
    }
    text = render_page(read_run_files(run_folder.write(tmp_path, **files)))
    assert "set <code>a&lt;b</code> &amp; go" in text
