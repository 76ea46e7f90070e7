"""The pictures of the position profile: a panel for what was measured, no empty cell, lines and legends where they belong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lit_opd.report.profile import ProfileWindow
from lit_opd.report.profile_heat_maps import heat_map
from lit_opd.report.profile_history import ProfileHistory
from lit_opd.report.profile_pictures import MOST_IN_A_ROW, _rows_of, profile_figure
from tests.helpers import run_folder

ALIVE = (1.0, 1.0, 0.5, 0.1, 0.05, 0.01)


def window(step: int, **more: tuple[float, ...]) -> ProfileWindow:
    """With further quantities by absolute position; drift shoots up where few are alive."""
    made = run_folder.window(step, alive=ALIVE)
    values = made.absolute.values | {"drift": (0.0, 1.0, 2.0, 3.0, 400.0, 500.0)} | more
    return replace(made, absolute=replace(made.absolute, values=values))


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_a_panel_that_measured_nothing_is_left_out():
    zero, some = (0.0,) * 6, (0.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    plain = titles(profile_figure(window(2), window(1), "absolute"))
    assert plain == ["who is still writing", "disagreement |q - s|", "drift: |q - s| summed before"]
    still = window(2, truncated_fraction=zero, clip_fraction=zero)
    assert "truncated, clipped" not in titles(profile_figure(still, still, "absolute"))
    assert "truncated, clipped" in titles(profile_figure(still, window(1, clip_fraction=some), "absolute"))


def test_the_advantage_is_drawn_where_the_loss_reads_it():
    both = window(1, advantage=(-1.0,) * 6, gradient_share=(0.1,) * 6)
    read, unread = (titles(profile_figure(both, both, "absolute", reads_advantage=reads)) for reads in (True, False))
    assert set(read) - set(unread) == {"advantage A (what the loss reads)", "share of the gradient"}


@pytest.mark.parametrize("count", range(1, 10))
def test_no_cell_of_the_grid_stays_empty(count):
    rows = _rows_of(count)
    assert sum(rows) == count and max(rows) <= MOST_IN_A_ROW and max(rows) - min(rows) <= 1


def test_no_line_goes_on_where_few_responses_are_alive():
    figure = profile_figure(window(2), window(1), "absolute")
    drift = next(axes for axes in figure.axes if axes.get_title().startswith("drift"))
    lines = [line for line in drift.lines if len(line.get_xdata()) == len(ALIVE)]
    assert len(lines) == 2
    for line in lines:
        assert np.isfinite(line.get_ydata()).tolist() == [share >= 0.1 for share in ALIVE]
    assert drift.get_ylim()[1] < 10
    alive = next(axes for axes in figure.axes if axes.get_title() == "who is still writing")
    assert all(np.isfinite(line.get_ydata()).all() for line in alive.lines)


def test_legends_stand_beside_the_data():
    with_two = window(2, kl_k1=(1.0,) * 6, kl_k3=(1.1,) * 6)
    figures = [profile_figure(with_two, window(1), "absolute")]
    history = ProfileHistory()
    for step in (1, 2):
        history.add(window(step))
    figures.append(heat_map(history, "disagreement", "disagreement", "nats"))
    for figure in figures:
        figure.canvas.draw()
        own = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
        assert own or figure.legends
        for legend in (*own, *figure.legends):
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.patch.get_window_extent()) for axes in figure.axes)


def test_the_letters_are_explained():
    text = profile_figure(window(2), window(1), "absolute").get_suptitle()
    assert "q, s: log-probs that teacher and student give" in text


def test_columns_of_heat_maps_stand_at_their_steps_where_a_window_has_no_token():
    """As in the second of four steps whose responses are all cut, with ``truncated: mask``."""
    nothing = window(2)
    nothing = replace(
        nothing,
        absolute=replace(nothing.absolute, values={"survivor_fraction": (0.0,) * 6}),
        relative=replace(nothing.relative, values={}),
    )
    history = ProfileHistory()
    for made in (
        run_folder.window(1, level=1.0),
        nothing,
        run_folder.window(3, level=3.0),
        run_folder.window(4, level=4.0),
    ):
        history.add(made)
    assert history.step_edges(600).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    for axis in ("absolute", "relative"):
        column = history.table(axis, "disagreement", 600)[:, 0]
        assert np.isnan(column[1]) and column[[0, 2, 3]].tolist() == [1.0, 3.0, 4.0]
    heat_map(history, "weight", "weight", "mean weight").canvas.draw()


def test_the_start_is_drawn_where_the_last_window_has_no_token():
    nothing = replace(window(2), absolute=replace(window(2).absolute, values={"survivor_fraction": (0.0,) * 6}))
    figure = profile_figure(nothing, window(1), "absolute")
    axes = next(axes for axes in figure.axes if axes.get_title().startswith("disagreement"))
    lines = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == len(ALIVE)]
    assert [bool(np.isfinite(line).any()) for line in lines] == [True, False]


def test_windows_that_share_a_column_of_a_heat_map_count_by_their_tokens():
    """Two windows in one column: 30 tokens at 1 nat and 10 at 5 are 2 nats a token; the alive share is that of the windows."""
    history = ProfileHistory()
    for step, level, count in ((1, 1.0, 30), (2, 5.0, 10)):
        made = run_folder.window(step, level=level, alive=(1.0, 1.0, 0.5, 0.5, 0.5, 0.5 * step))
        counted = {
            axis: replace(getattr(made, axis), count=(count,) * len(getattr(made, axis).start))
            for axis in ("absolute", "relative")
        }
        history.add(replace(made, **counted))
    assert (
        history.table("absolute", "disagreement", 1)[0, 0] == history.table("relative", "disagreement", 1)[0, 0] == 2.0
    )
    assert history.table("absolute", "survivor_fraction", 1)[0, -1] == 0.75
