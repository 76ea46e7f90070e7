"""The sets of versions follow from setup.cfg, and the page says what ran and what did not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.versions import __main__ as versions
from benchmarks.versions import checks
from benchmarks.versions.checks import CHECKS, Check, run, summary
from benchmarks.versions.sets import above_bounds, lower_bound, pinned, sets, unbounded

ROOT = Path(__file__).resolve().parents[2]
SETUP = """[options]
python_requires = >=3.11
install_requires =
    torch>=2.9,<3
    lightning>=2.5.6,<2.7,!=2.6.2,!=2.6.3
    transformers >= 5.0
    Jinja2>=3.1
    jsonargparse[signatures,omegaconf]>=4.40,<4.54

[options.extras_require]
eval = math-verify>=0.7
data =
    pyarrow>=17
lora = peft>=0.18
vllm = vllm>=0.10
dev =
    pytest>=8
    ruff>=0.9
"""


@pytest.fixture
def setup_cfg(tmp_path: Path) -> Path:
    path = tmp_path / "setup.cfg"
    path.write_text(SETUP)
    return path


def test_the_lowest_set_is_every_lower_bound_of_core_and_tested_extras(setup_cfg):
    lowest = sets(setup_cfg)["lowest"]
    assert lowest.python == "3.11"
    assert set(lowest.lines) == {
        "torch==2.9", "lightning==2.5.6", "transformers==5.0", "Jinja2==3.1", "jsonargparse[omegaconf,signatures]==4.40",
        "math-verify==0.7", "pyarrow==17", "peft==0.18", "pytest>=8",
    }  # fmt: skip


def test_the_newest_set_has_no_upper_bound_and_keeps_what_is_excluded(setup_cfg):
    newest = [Requirement(line) for line in sets(setup_cfg)["newest"].lines]
    assert all(part.specifier.contains("999") for part in newest)
    (lightning,) = (part for part in newest if part.name == "lightning")
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3", "2.5.5"))
    (parser,) = (part for part in newest if part.name == "jsonargparse")
    assert parser.extras == {"signatures", "omegaconf"}


def test_no_set_of_this_project_can_install_a_malicious_release():
    for wanted in sets(ROOT / "setup.cfg").values():
        (lightning,) = (part for part in map(Requirement, wanted.lines) if part.name == "lightning")
        assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3")), wanted.name


@pytest.mark.parametrize(
    ("text", "bound"),
    [("a>=1.2", "1.2"), ("a>=1.2,<2,!=1.5", "1.2"), ("a~=1.4", "1.4"), ("a==3", "3"), ("a>=1,>=1.5", "1.5")],
)
def test_a_lower_bound_is_the_highest_of_those_named(text, bound):
    assert lower_bound(Requirement(text)) == bound


@pytest.mark.parametrize("text", ["a", "a<2", "a!=1", "a>=2,!=2.0", "a>=2,<2"])
def test_a_requirement_whose_lowest_version_cannot_be_named_is_refused(text):
    with pytest.raises(ValueError, match="`a` must"):
        lower_bound(Requirement(text))


def test_pinning_and_unbinding_keep_extras():
    requirement = Requirement("a[x]>=1,<2,!=1.5")
    assert pinned(requirement, "1.0") == "a[x]==1.0"
    assert Requirement(unbounded(requirement)) == Requirement("a[x]>=1,!=1.5")
    assert str(requirement.specifier) != str(Requirement(unbounded(requirement)).specifier)  # the first is left alone


def test_versions_outside_the_bounds_are_named(setup_cfg):
    found = above_bounds(setup_cfg, {"torch": "3.0", "jinja2": "3.1.6", "pyarrow": "16.1", "lightning": "2.6.6"})
    assert found == ["torch 3.0 (<3,>=2.9)", "pyarrow 16.1 (>=17)"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("38 passed, 4 skipped, 80 deselected, 47 warnings in 306.75s (0:05:06)\n", "38 passed, 4 skipped"),
        ("....\n==== 3 passed in 1.20s ====\n", "3 passed"),
        ("1 failed, 3 passed in 1.20s\n", ""),
        ("no tests ran in 0.01s\n", ""),
        ("5 skipped in 0.10s\n", ""),
        ("1 passed in 1.0s\n2 passed, 1 skipped in 2.0s\n", "2 passed, 1 skipped"),
    ],
)
def test_the_counts_are_those_of_pytests_last_line(text, expected):
    assert summary(text) == expected


def test_every_file_that_a_check_names_exists_and_every_flag_is_whole():
    for check in CHECKS:
        for command in check.commands:
            for word in command:
                assert not word.startswith(("tests/", "configs/", "train.py")) or (ROOT / word).exists(), word
    words = [word for check in CHECKS for command in check.commands for word in command]
    assert {"DDPStrategy", "ModelParallelStrategy", "--trainer.strategy.data_parallel_size"} <= set(words)


def test_a_check_fails_with_its_command_with_its_tests_and_with_its_time(tmp_path, monkeypatch):
    python = Path(sys.executable)

    def passed(*commands: tuple[str, ...]) -> bool:
        return run(Check("a, b", commands), python, tmp_path, tmp_path).passed

    assert passed(("-c", "print(1)"), ("-c", "import os; assert os.environ['PYTHONPATH']; print('{folder}')"))
    assert str(tmp_path) in (tmp_path / "a-b.log").read_text()
    assert not passed(("-c", "raise SystemExit(3)"), ("-c", "pass"))
    assert not passed(("-c", "print('no tests ran in 0.01s')", "pytest"))
    assert passed(("-c", "print('3 passed in 0.01s')", "pytest"))
    monkeypatch.setattr(checks, "TIME_LIMIT", 0.2)
    assert not passed(("-c", "import time; time.sleep(9)"))


def test_a_python_is_found_by_what_it_says_it_is():
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = versions.interpreter(own)
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"Python {own}.")
    assert versions.interpreter("3.99") is None


def test_the_page_names_what_failed_and_what_did_not_run():
    report = {
        "lowest": {
            "date": "2026-01-02", "python": "3.11", "versions": {"torch": "2.9.0"}, "above": [],
            "checks": {"lazy loading": [True, "3 passed"], "command line": [False, "status 1"]},
        },
        "newest": {
            "date": "2026-01-03", "python": "3.13", "reason": "no Python 3.13 was found", "versions": {}, "checks": {},
        },
    }  # fmt: skip
    body = versions.body_of(report)
    assert "| lazy loading | ok (3 passed) | not run |" in body and "| command line | FAILED | not run |" in body
    assert "| Python | 3.11 | 3.13 (no Python 3.13 was found) |" in body
    assert versions.failed(report) == ["lowest: command line"]


def test_the_page_is_what_the_command_writes_of_the_report_beside_it():
    report = json.loads((ROOT / "docs" / "benchmarks" / "versions.json").read_text())
    assert (
        f"<!-- versions -->\n{versions.body_of(report)}<!-- /versions -->\n"
        in (ROOT / "docs" / "verified.md").read_text()
    )
    assert set(report) <= set(sets(ROOT / "setup.cfg"))
    assert versions.failed(report) == []
