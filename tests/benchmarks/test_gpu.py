"""The check of a GPU machine runs with tiny shapes, says what failed, and writes its pages from its rows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import decoding, engine, heads, page, runs, steps
from benchmarks.gpu.bench import Bench, read_rows
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sizes import FULL, TINY
from callbacks import default_callbacks
from lit_opd.cli.command import OPDCLI
from lit_opd.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("section", TINY, "cpu", tmp_path, tmp_path / "rows.jsonl", deadline=time.monotonic() + 600)


@pytest.mark.parametrize(
    ("section", "rows"),
    [(decoding.parity, 3), (decoding.decode, 12), (decoding.profile, 2), (heads.run, 7), (steps.run, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_section_measures_every_row(bench, section, rows):
    section(bench)
    found = read_rows(bench.rows)
    assert len(found) == rows and not [row for row in found if "error" in row]
    skipped = [row["what"] for row in found if "skipped" in row]
    assert all("cut-cross-entropy" in what or "Liger" in what for what in skipped)


def test_parity_says_a_gap_that_is_more_than_rounding(bench, monkeypatch):
    monkeypatch.setattr(decoding, "GAPS", dict.fromkeys(decoding.GAPS, -1.0))
    decoding.parity(bench)
    assert ["a mean gap of" in row["error"] for row in read_rows(bench.rows)] == [True] * 3


def test_the_heads_are_compared_with_plain_logits(bench, monkeypatch):
    monkeypatch.setitem(heads.WAYS, "ours", lambda *args: heads.ours(*args) * 1.5)
    heads.run(bench)
    row = next(row for row in read_rows(bench.rows) if row["what"] == "log-probs, ours, float32")
    assert row["states_gradient"] == pytest.approx(0.5, abs=1e-4) and row["weight_gradient"] == pytest.approx(
        0.5, abs=1e-4
    )


def test_steps_give_seconds_by_phase_that_add_up(bench):
    steps.run(bench)
    for row, size in zip(read_rows(bench.rows), TINY.steps, strict=True):
        assert row["tokens"] == size.rows * size.tokens and row["finite"]
        assert row["step_s"] >= row["sampling_s"] + row["teacher_s"]
        assert row["sampling_s"] > 0 and row["teacher_s"] > 0 and row["update_s"] > 0


def test_a_section_that_fails_or_comes_too_late_says_so_alone(tmp_path, monkeypatch, capsys):
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\ncase $3 in heads) echo out of memory; exit 3;; esac\nsleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(command, "LEAST_SECONDS", 0.1)
    options = Namespace(folder=tmp_path, device="cpu", tiny=True, minutes=8.0)
    rows = tmp_path / "rows.jsonl"
    for name, left in (("heads", 60.0), ("decode", 0.5), ("steps", 0.0)):
        command.run_section(name, options, rows, left)
    heads_row, decode_row, steps_row = read_rows(rows)
    assert heads_row["error"] == "ended with status 3; out of memory"
    assert decode_row["error"].startswith("stopped at its limit of 0 s")
    assert steps_row["skipped"] == "no time left of --minutes 8"


@pytest.mark.slow
def test_the_command_runs_a_section_and_its_status_says_whether_all_is_well(tmp_path):
    words = [
        "-m",
        "benchmarks.gpu",
        "--tiny",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path),
        "--sections",
        "environment",
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["what"] for row in rows] == ["environment", "section"]
    assert rows[0]["versions"]["torch"] == torch.__version__ and rows[0]["tiny"]


def test_an_engine_that_is_not_there_is_skipped(bench):
    engine.run(bench)
    assert read_rows(bench.rows) == [{"section": "section", "what": "engine", "skipped": "no GPU"}]


def test_every_section_together_has_time_in_eight_minutes_where_none_hangs():
    assert set(SECTIONS) >= {
        "environment",
        "parity",
        "decode",
        "heads",
        "steps",
        "profile",
        "runs",
        "resume",
        "ranks",
        "engine",
    }
    assert all(10 <= section.seconds <= 150 for section in SECTIONS.values())


@pytest.fixture(scope="module")
def cli() -> OPDCLI:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["train.py"])
        return OPDCLI(default_callbacks=default_callbacks, args=["--config", runs.CONFIG], run=False)


def parsed(cli: OPDCLI, words: list[str]) -> Any:
    """The ``trainer`` section that a ``train.py fit`` command comes to."""
    assert words[:2] == ["train.py", "fit"]
    cli.parse_arguments(cli.parser, words[2:])
    return cli.config.trainer


@pytest.mark.parametrize("name", list(runs.RUNS))
def test_the_command_of_every_run_is_understood(name, bench, cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    bench.device, bench.sizes = "cuda", FULL
    trainer = parsed(cli, runs.words(bench, name, runs.RUNS[name].options, 3))
    assert trainer.accelerator == "gpu" and trainer.max_steps == 3


def test_fsdp1_is_a_class_with_options(bench, cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    strategy = parsed(cli, runs.words(bench, "FSDP1", runs.RUNS["FSDP1"].options, 3)).strategy
    assert strategy.class_path.endswith("FSDPStrategy") and "cpu_offload" in strategy.init_args


def commands_of(text: str) -> list[list[str]]:
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.S)
    return [
        shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.startswith("python")
    ]


def test_every_command_of_the_page_of_what_ran_on_a_gpu_is_parsed(cli, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = commands_of((ROOT / "docs" / "verified.md").read_text())
    assert len(found) >= 6
    for words in found:
        if words[1] == "train.py":
            assert parsed(cli, words[1:]).accelerator == "gpu"
            continue
        assert words[1:3] == ["-m", "benchmarks.gpu"], words
        monkeypatch.setattr(sys, "argv", words[2:])
        monkeypatch.setattr(command, "measured", lambda options: ROOT / "docs" / page.ROWS)
        monkeypatch.setattr(command, "publish", lambda docs, rows: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert command.main() in (0, 1)
    capsys.readouterr()


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--rows", "nowhere.jsonl"], ["--sections", "nothing"]])
def test_what_cannot_be_measured_is_refused_with_status_2(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err


# -- pages ---------------------------------------------------------------------------------------------------------------


def test_the_pages_are_what_the_rows_say(tmp_path):
    rows = read_rows(ROOT / "docs" / page.ROWS)
    for name, place, body in (
        (page.VERIFIED, page.PATHS, page.paths(rows)),
        (page.BENCHMARKS, page.FIGURES, page.figures(rows)),
    ):
        text = (ROOT / "docs" / name).read_text()
        assert place.require(ROOT / "docs" / name).split(f"{place.start}\n")[1].startswith(body), name
        (tmp_path / name).write_text(text.replace(body, ""))
    (tmp_path / "benchmarks").mkdir()
    page.publish(tmp_path, rows)
    for name in (page.VERIFIED, page.BENCHMARKS):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text()
    with pytest.raises(InputError, match="gpu-paths"):
        (tmp_path / page.VERIFIED).write_text("nothing")
        page.publish(tmp_path, rows)


def test_a_state_never_hides_a_failure_and_a_target_says_when_it_was_not_measured():
    assert page.state(None) == "unverified"
    assert page.state({"section": "a", "what": "b", "skipped": "one GPU"}) == "unverified: one GPU"
    assert page.state({"section": "a", "what": "b", "error": "boom\nmore"}) == "**failed**: boom"
    assert page.state({"section": "a", "what": "b", "bit_for_bit": False}) == "bit for bit: no"
    ran = {"steps": 6, "greedy_start": 0.1, "greedy_end": 0.5, "reverse_kl_start": 2.0, "reverse_kl_end": 1.0}
    assert page.state({"section": "a", "what": "b", **ran}).startswith("ran 6 steps: greedy 0.100 to 0.500")
    assert {line[2] for line in page.targets([])} == {page.NOT_MEASURED}
    measured = {"section": "decode", "what": "bf16-mixed, DecodeSampler, 32 rows", "ms": 3.5}
    assert "3.5 ms" in [line[2] for line in page.targets([measured])]


def test_every_claim_names_a_row_that_a_section_writes(bench):
    for claim in page.CLAIMS:
        known = {"runs": runs.RUNS, "ranks": ("DDP", "FSDP2", "FSDP1"), "resume": ("deterministic", "default")}
        known |= {"parity": ("bf16-mixed", "float32"), "engine": ("eager", "CUDA graphs", "CUDA IPC")}
        assert claim.what in known[claim.section], claim
    names = {size.name for size in FULL.steps}
    assert all(what in names for section, what in page.TARGETS if section == "steps")


@pytest.mark.slow
def test_whole_runs_resume_and_ranks_pass_on_this_machine(bench):
    for section in (runs.run, runs.resume, runs.ranks):
        section(bench)
    found = read_rows(bench.rows)
    assert not [row for row in found if "error" in row], found
    assert {row["what"] for row in found if "skipped" in row} == {"FSDP1", "VLLMEngine"}
    equal = next(row for row in found if row["what"] == "deterministic")
    assert json.loads(json.dumps(equal))["bit_for_bit"] is True
