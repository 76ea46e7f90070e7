"""Every guide does what it says: its files are written, and its commands run, with fewer and smaller steps."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.studies import contrasts
from benchmarks.studies.leaderboard import __main__ as leaderboard
from lit_opd.__main__ import main
from lit_opd.sweep.options import read
from lit_opd.sweep.variants import variants
from lit_opd.testbed import ASSETS
from tests.helpers import signals

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', flags=re.S | re.M)
SMALL = ["--trainer.max_steps=2", "--data.prompt_batch=2", "--wandb.mode=disabled", "--model.sampler.max_new_tokens=12"]
SMALL += ["--model.validation.samples=1"]
FEW = ["--data.train=few.jsonl", "--data.val=few.jsonl"]  # for the quickstart's thousands of rows
RUN_HERE = {  # guide -> what its last command leaves
    "own-strategy": "runs/compared/compare.html",
    "own-advantage": "runs/saturating/summary.json",
    "own-callback": "runs/praise/metrics.csv",
    "own-teacher": "runs/ensemble/summary.json",
    "own-sampler": "runs/plain/summary.json",
    "python-api": "runs/python/student/model.safetensors",
    "your-data": "runs/mine/summary.json",
    "sweep": "my_half.py",  # its sweeps are checked and listed, not trained: tests/sweep trains
}


def written(guide: str, folder: Path) -> list[list[str]]:
    """Write the files that a guide shows; returns its commands, in order."""
    commands = []
    for language, title, text in BLOCK.findall((GUIDES / f"{guide}.md").read_text()):
        if title:
            (folder / title).write_text(text)
        elif language == "bash":
            commands += [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in commands if words]


def small(words: list[str]) -> list[str]:
    """The command with less to do; words that come later win."""
    if words[0] == "sweep":
        return words if "--dry_run" in words else [*words, "--dry_run"]
    if words[0] not in ("fit", "preflight"):
        return words
    return [*words, *SMALL, *(FEW if "quickstart" in words else [])]


def status(words: list[str]) -> int:
    """Of a command that ends the process."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


CHECKED = {"sweep": pytest.mark.slow}  # four sweeps are checked, half a minute; that of the README is run


@pytest.mark.parametrize("guide", [pytest.param(name, marks=CHECKED.get(name, ())) for name in RUN_HERE])
def test_a_guides_files_and_commands_run(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    rows = (ASSETS / "val.jsonl").read_text().splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(rows[:4]))
    before = set(sys.modules)
    for program, *words in written(guide, tmp_path):
        if program == "python":
            runpy.run_path(words[0])["main"](steps=2, prompts=2)
        else:
            assert program == "lit-opd"
            done = main(small(words)) if words[0] != "sweep" else status(small(words))
            assert not done
    for name in [name for name in set(sys.modules) - before if name.startswith("my_")]:
        del sys.modules[name]
    left = tmp_path / RUN_HERE[guide]
    assert left.is_file()
    if left.name == "summary.json":
        assert json.loads(left.read_text())["steps"] == 2


def test_every_guide_is_run_here_or_by_a_test_that_names_it():
    others = {"lora", "wandb", "claim"}
    assert {path.stem for path in GUIDES.glob("*.md")} - others == set(RUN_HERE)


@pytest.fixture
def claim(tmp_path, monkeypatch):
    """The commands of its guide, in a folder with the files of it and of the guide whose weighting it takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    written("own-strategy", tmp_path)
    yield written("claim", tmp_path)
    sys.modules.pop("my_weighting", None)


def sweeps(commands: list[list[str]]) -> list[list[str]]:
    return [words[2:] for words in commands if words[:2] == ["lit-opd", "sweep"]]


def test_a_claims_contrasts_name_what_its_sweeps_train_on_the_seeds_of_its_plan(claim):
    plan = contrasts.read_claim(Path("claim.yaml"))
    _, *claimed = [read(words) for words in sweeps(claim)]
    names = [variant.name for asked in claimed for variant in variants(asked)]
    assert {spec[side] for spec in plan["contrasts"] for side in ("variant", "minus")} <= set(names)
    assert [asked.seeds for asked in claimed] == [tuple(plan["seeds"])] * 2
    tested = next(words for words in claim if "benchmarks.studies.contrasts" in words)
    assert tested[3:] == ["claim.yaml", *(str(asked.out) for asked in claimed)]


@pytest.mark.slow
def test_a_claim_is_tested_as_its_guide_says(claim, capsys):
    """Two seeds of two steps on eight problems; the tuning is checked and listed, not trained."""
    few = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.prompt_batch=2", "--data.val_limit=8"]
    Path("lit_opd").symlink_to(ASSETS.parents[1])
    leaderboard.main(claim[0][3:])
    for words in sweeps(claim):
        cut = [word for word in words if not re.fullmatch(r"100[2-9]", word)]
        more = ["--dry_run"] if "runs/tuning" in words else [*few, "--model.sampler.max_new_tokens=12"]
        assert status(["sweep", *cut, *more]) == 0
    plan = Path("claim.yaml")
    plan.write_text(re.sub(r"seeds: .*", "seeds: [1000, 1001]", plan.read_text()))
    capsys.readouterr()
    contrasts.main(["claim.yaml", "runs/mine", "runs/beside"])
    said = capsys.readouterr().out
    assert said.count("| 2 of 2 |") == 4 and "missing" not in said


def test_the_callback_of_its_guide_logs_the_share_of_liked_tokens_in_each_half(tmp_path, monkeypatch):
    """Against a loop over hand-made log-probs."""
    written("own-callback", tmp_path)
    signal = signals.small_signal([-1.0, -1.0, -1.0, -1.0, -1.0], [-0.5, -2.0, -0.5, -0.5, -2.0])
    logged: dict[str, float] = {}
    trainer = SimpleNamespace(loggers=[SimpleNamespace(log_metrics=lambda values, step: logged.update(values))])
    record = SimpleNamespace(signal=signal, skipped=False, step=1)
    callback = runpy.run_path(str(tmp_path / "my_callback.py"))["Praise"]()
    callback.on_train_batch_end(trainer, None, {"step": record}, None, 0)
    assert logged == {"praise/first_half": 0.5, "praise/second_half": pytest.approx(2 / 3)}
