"""The comparison's arithmetic: medians over all rounds, what is left of a step, and ratios."""

from __future__ import annotations

import pytest

from benchmarks.speed.peers.__main__ import main, summary, table
from benchmarks.speed.peers.settings import Setting

SETTING = Setting("small", batch=2, tokens=50, vocabulary=64)


def test_a_summary_is_the_median_of_every_step_of_every_round():
    runs = [
        {"seconds": [1.0, 9.0], "generate": [0.25, 0.5], "teacher": [0.25, 0.25], "peak": 3e6},
        {"seconds": [2.0], "generate": [0.25], "teacher": [0.5], "peak": 5e6},
    ]
    found = summary(runs, SETTING)
    assert found["seconds"] == 2.0 and (found["lowest"], found["highest"]) == (1.0, 9.0)
    assert found["rest"] == 2.0 - 0.25 - 0.25
    assert found["tokens_per_second"] == 50.0  # 2 rows of 50 tokens in 2 s
    assert found["peak"] == 5e6


def test_ratios_are_those_of_trl_over_ours_and_stand_in_our_row():
    ours = summary([{"seconds": [2.0], "generate": [0.5], "teacher": [0.5], "peak": 1e7}], SETTING)
    trl = summary([{"seconds": [5.0], "generate": [3.0], "peak": 4e7}], SETTING)
    rows = [line.strip("| ").split(" | ") for line in table({"small iw-opd": {"ours": ours, "trl": trl}}).splitlines()]
    assert rows[2][:3] == ["small", "iw-opd", "ours"] and rows[2][-2:] == ["2.50", "4.00"]
    assert rows[3][:3] == ["small", "iw-opd", "trl"] and "in rest" in rows[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--trl-python", "/no/python"], "got /no/python; `make bench-peers`"),
    ],
)
def test_settings_that_cannot_run_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
