"""Time to accuracy: the arithmetic by hand, and one real run of this project's side against a run of its command line."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import pytest

from benchmarks.speed.sides import run
from benchmarks.speed.time_to_accuracy.__main__ import Judge, parsed, require_same, words, write_prompts
from benchmarks.speed.time_to_accuracy.crossing import crossing, summary, table
from callbacks import ExportStudent
from lit_opd.cli.command import main as run_cli
from lit_opd.testbed import read_records
from lit_opd.testbed.accuracy import accuracy
from lit_opd.testbed.tokenizer import prompt_ids


def marks(cpu: list[float], accuracies: list[float]) -> list[dict[str, float]]:
    """Marks 256 responses apart, six optimizer steps and 1000 tokens each, wall time twice the CPU time."""
    return [
        {"responses": 256 * i, "steps": 6 * i, "tokens": 1000 * i, "cpu": x, "wall": 2 * x, "accuracy": y}
        for i, (x, y) in enumerate(zip(cpu, accuracies, strict=True), start=1)
    ]


def test_the_crossing_is_the_first_one_and_linear_between_points():
    # 0.7 at 20 to 0.9 at 30: half of the way is 25; that it falls below 0.80 again later does not count
    assert crossing([0, 10, 20, 30, 40], [0.5, 0.6, 0.7, 0.9, 0.6], 0.8) == pytest.approx(25.0)
    assert crossing([0, 10, 20], [0.5, 0.8, 0.7], 0.8) == 10.0
    assert crossing([3, 10], [0.9, 0.7], 0.8) == 3.0
    assert crossing([0, 10], [0.5, 0.79], 0.8) == math.inf


def test_a_summary_is_the_median_and_range_over_runs_of_their_own_crossings():
    parts = {"generate": 4.0, "teacher": 2.0, "rest": 2.0}
    runs = [
        {"marks": marks([4.0, 8.0], [0.5, 0.9]), "parts": parts},  # 3/4 of the way: 7 s, step 10.5, token 1750
        {"marks": marks([2.0, 6.0], [0.8, 0.8]), "parts": parts},  # 2 s, step 6, token 1000
        {"marks": marks([3.0, 9.0], [0.4, 0.8]), "parts": parts},  # 9 s, step 12, token 2000
    ]
    found = summary(runs, start=0.4)
    assert found["cpu"] == pytest.approx({"median": 7.0, "lowest": 2.0, "highest": 9.0})
    assert found["wall"]["median"] == pytest.approx(14.0)
    assert found["steps"]["median"] == pytest.approx(10.5) and found["tokens"]["median"] == pytest.approx(1750.0)
    assert found["cpu_per_unit"] == 2.0  # 8, 6 and 9 seconds for four times 128 responses
    assert found["reached"] == 3 and found["parts"] == {"generate": 1.0, "teacher": 0.5, "rest": 0.5}


def test_the_table_has_the_reference_over_each_row_and_says_who_never_got_there():
    fast, slow, never = (
        summary([{"marks": marks([x, 2 * x], accuracies)}], start=0.4)
        for x, accuracies in ((2.0, [0.8, 0.9]), (6.0, [0.8, 0.9]), (5.0, [0.5, 0.7]))
    )
    half = summary([{"marks": marks([2.0, 4.0], values)} for values in ([0.8, 0.9], [0.5, 0.7])], start=0.4)
    lines = table({"fast": fast, "never": never, "half": half, "TRL": slow}, ["TRL"]).splitlines()
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert rows["setting"][-1] == "TRL / this"
    assert rows["fast"][1] == "2.0 (2.0 to 2.0)" and rows["fast"][-1] == "3.00"  # 6 s over 2 s
    assert rows["never"][1] == "never in 512 responses" and rows["never"][-1] == ""
    assert rows["half"][1] == "never (2.0 to never; 1 of 2 runs never)" and rows["half"][-1] == ""
    assert rows["TRL"][-1] == ""


def test_runs_on_other_prompts_or_stop_ids_are_refused():
    one = {"setting": "a", "rows": [1, 1, 2, 2], "first_prompt": [7], "stop_ids": [1]}
    require_same(one, one | {"setting": "b", "rows": [1, 2, 3]})  # two samples a prompt, and a longer run
    for change in ({"rows": [1, 3]}, {"first_prompt": [0, 7]}, {"stop_ids": [1, 2]}):
        with pytest.raises(RuntimeError, match="a and b must meet the same prompts"):
            require_same(one, one | {"setting": "b"} | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--prompts", "300"], "--prompts must be a multiple of 256, got 300"),
        (["--settings", "TRL"], "--trl-python must be a Python with TRL, got None"),
        (["--out", "nowhere"], "a file with the lines <!-- time-to-accuracy --> and"),
    ],
)
def test_settings_that_cannot_run_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parsed(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run_is_the_command_line_s_and_its_accuracy_that_of_the_exported_student(tmp_path):
    small = {"data.prompt_batch": "32", "model.mini_batches": "2"}
    line = words(small, seed=3, batches=2, folder=tmp_path)
    asked = {"words": line, "folder": str(tmp_path), "every": 2}
    result = run("time_to_accuracy", "ours", [json.dumps(asked)], None)
    judge = Judge()
    judge.rows = judge.rows[:64]
    start = judge.accuracy()
    judge.judge(result, tmp_path)
    (mark,) = result["marks"]
    assert (mark["batches"], mark["responses"], mark["steps"]) == (2, 64, 4)
    assert 64 * 10 < mark["tokens"] <= 64 * 48 and 0 < mark["cpu"]
    assert result["stop_ids"] == [1] and result["rows"] == checksums(tmp_path, judge, seed=3, count=64)

    again = tmp_path / "again"
    run_cli(lambda: [ExportStudent()], [*line[:3], *words(small, seed=3, batches=2, folder=again)[3:]])
    exported = judge.model.from_pretrained(again / "run" / "student")
    assert mark["accuracy"] == accuracy(exported, judge.tokenizer, judge.rows) != start


def checksums(folder: Path, judge: Judge, *, seed: int, count: int) -> list[int]:
    """Of the prompts in the file that TRL reads in order."""
    write_prompts(folder / "prompts.jsonl", seed=seed, count=count)
    prompts = [row["prompt"] for row in read_records(folder / "prompts.jsonl")]
    return [zlib.crc32(str(prompt_ids(judge.tokenizer, prompt)).encode()) for prompt in prompts]
