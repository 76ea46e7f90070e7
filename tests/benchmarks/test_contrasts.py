"""Contrasts of finished sweeps: values against plain loops, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.studies.contrasts import judged, main, page, read_claim, read_sweeps
from benchmarks.studies.reproduce.outcomes import packed
from lit_opd.compare import paired_two_way
from lit_opd.errors import InputError

SEEDS, PROBLEMS, STEPS = (1, 2, 3, 4), 60, (0, 10, 20)
OURS, BASE, CURVE = "Mine, lr=4e-4", "Uniform, lr=2e-4", "MatchedCurve(strategy=Mine), lr=4e-4"
RIGHT = {OURS: 0.8, BASE: 0.5, CURVE: 0.79}  # chance that an answer is right
Answers = dict[tuple[str, int], np.ndarray]
ABOVE = {"variant": OURS, "minus": BASE, "expect": "above"}


def write_run(folder: Path, answers: np.ndarray, val: str) -> None:
    """What contrasts read of a finished run; answers bool [steps, problems]."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"val": val}}))
    rest = {"problems": answers.shape[1], "kl": [], "kl_bands": [], "weight_bands": []}
    lines = [rest | {"step": step, "right": packed(row.tolist())} for step, row in zip(STEPS, answers, strict=True)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sweep(folder: Path, answers: Answers, val: str = "val.jsonl") -> Path:
    runs = {}
    for number, ((variant, seed), rows) in enumerate(answers.items()):
        write_run(folder / f"run-{number}", rows, val)
        runs[f"run-{number}"] = {"variant": variant, "seed": seed, "code": {}}
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    return folder


def write_plan(path: Path, contrasts: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"claim": "mine is better", "seeds": list(SEEDS), "contrasts": contrasts} | more))
    return path


@pytest.fixture(scope="module")
def answers() -> Answers:
    generator = np.random.default_rng(0)
    return {
        (variant, seed): generator.random((len(STEPS), PROBLEMS)) < chance
        for variant, chance in RIGHT.items()
        for seed in SEEDS
    }


@pytest.fixture
def sweeps(tmp_path: Path, answers: Answers) -> list[Path]:
    mine = {key: rows for key, rows in answers.items() if key[0] == OURS}
    others = {key: rows for key, rows in answers.items() if key[0] != OURS}
    return [write_sweep(tmp_path / "mine", mine), write_sweep(tmp_path / "beside", others)]


def areas(answers: Answers, variant: str) -> dict[int, dict[str, float]]:
    """By trapezoids over 0, 10, 20, as a plain loop has them."""
    found: dict[int, dict[str, float]] = {}
    for (name, seed), rows in answers.items():
        if name == variant:
            first, middle, last = rows.astype(float)
            each = ((first + middle) / 2 * 10 + (middle + last) / 2 * 10) / 20
            found[seed] = {f"{problem:03d}": float(value) for problem, value in enumerate(each)}
    return found


def test_a_contrast_has_the_interval_of_paired_areas_and_p_is_adjusted_for_all_of_them(tmp_path, sweeps, answers):
    contrasts = [ABOVE, ABOVE | {"minus": CURVE}, ABOVE | {"minus": CURVE, "expect": "equal"}]
    plan = read_claim(write_plan(tmp_path / "claim.yaml", contrasts, margin=0.1))
    found = judged(plan, read_sweeps(sweeps))
    for each, name in zip(found, (BASE, CURVE), strict=False):
        right = paired_two_way(areas(answers, OURS), areas(answers, name))
        assert each.estimate is not None and right.low is not None and each.estimate.low is not None
        assert each.estimate.mean == pytest.approx(right.mean, abs=1e-12)
        assert each.estimate.low == pytest.approx(right.low, abs=2e-3)  # the number of draws differs
    first, second, third = (each.p for each in found)
    assert first < third < second  # by hand: Holm's factors are 3, 2 and 1
    assert [each.adjusted for each in found] == pytest.approx([3 * first, max(2 * third, second), 2 * third])
    assert [each.verdict for each in found] == ["supported", "not decided", "supported"]
    lines = [line.split("|")[-2].strip() for line in page(plan, found).splitlines() if "Mine" in line and "|" in line]
    assert lines == ["above", "not different", "within 0.1"]


def test_a_difference_on_the_other_side_contradicts_and_is_named(tmp_path, sweeps):
    contrast = {"variant": BASE, "minus": OURS, "expect": "above"}
    main([str(write_plan(tmp_path / "claim.yaml", [contrast])), *map(str, sweeps)])
    plan = read_claim(tmp_path / "claim.yaml")
    (line,) = [line for line in page(plan, judged(plan, read_sweeps(sweeps))).splitlines() if OURS in line]
    assert line.endswith("| contradicted | below |")


def test_nothing_is_decided_before_all_planned_seeds_are_there_and_others_do_not_count(tmp_path, sweeps):
    (sweeps[0] / "run-3" / "summary.json").unlink()
    plan = read_claim(write_plan(tmp_path / "claim.yaml", [ABOVE]))
    text = page(plan, judged(plan, read_sweeps(sweeps)))
    assert "| 3 of 4 |" in text and "| not finished | - |" in text and "Seeds are missing" in text
    plan["seeds"] = [1, 2]
    text = page(plan, judged(plan, read_sweeps(sweeps)))
    assert "| 2 of 2 |" in text and "missing" not in text


@pytest.mark.parametrize(
    ("contrasts", "more", "about"),
    [
        ([], {}, "must be a list with at least one"),
        ([ABOVE | {"expect": "better"}], {}, "must be one of above, below, equal, got 'better'"),
        ([ABOVE | {"measure": "accuracy"}], {}, "must be one of area, .* got 'accuracy'"),
        ([{"variant": OURS, "expect": "above"}], {}, "must have the keys expect, minus, variant"),
        ([ABOVE | {"expect": "equal"}], {}, "margin` must be above 0"),
        ([ABOVE], {"seeds": [1]}, "at least two different numbers"),
        ([ABOVE], {"alpha": 0.1}, "must have the keys claim, contrasts, seeds"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(contrasts, more, about, tmp_path):
    with pytest.raises(InputError, match=about):
        read_claim(write_plan(tmp_path / "claim.yaml", contrasts, **more))


def test_sweeps_that_cannot_be_compared_are_refused_in_one_line(tmp_path, sweeps, answers, capsys):
    plan = write_plan(tmp_path / "claim.yaml", [ABOVE | {"variant": "Other"}])

    def refused(*folders: Path) -> str:
        with pytest.raises(SystemExit, match="2"):
            main([str(plan), *map(str, folders)])
        return capsys.readouterr().err

    assert "got 'Other'" in refused(*sweeps)
    assert "once, got" in refused(sweeps[0], sweeps[0])
    other = write_sweep(tmp_path / "other", {(BASE, 1): answers[BASE, 1]}, val="val-2.jsonl")
    assert "measured alike" in refused(sweeps[0], other)
    assert "its sweep.json" in refused(tmp_path)
    (sweeps[0] / "run-0" / "problems.jsonl").unlink()
    assert "must hold the outcomes" in refused(*sweeps)
