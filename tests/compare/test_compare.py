"""``train.py compare``: a known effect is found, no effect is not, and replayed gradients are the training step's own."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.image import imread

from callbacks import RolloutSamples, default_callbacks
from lit_opd import __main__ as entry
from lit_opd.cli.command import main
from lit_opd.compare.curves import mean_curve
from lit_opd.compare.differences import compare_runs
from lit_opd.compare.document import FOREST_WIDTH, Document, Interval, Section, Table, markdown_text
from lit_opd.compare.gradients import Gradient, ReplayModels, cosine, dot
from lit_opd.compare.pictures import draw_cosines, draw_weights, plain
from lit_opd.compare.replay import REFERENCES, GradientSums, Replay, WeightSums, find_files, replay_files
from lit_opd.compare.replay_report import replay_document
from lit_opd.compare.runs import Curve, Run, read_run, read_runs
from lit_opd.compare.runs_report import _data, runs_document
from lit_opd.compare.statistics import (
    Estimate,
    cut,
    mean_height,
    mean_interval,
    paired,
    paired_two_way,
    reached,
    t_quantile,
    two_way,
    two_way_interval,
)
from lit_opd.compare.strategies import read_strategies
from lit_opd.compare.verdict import reading
from lit_opd.errors import InputError
from lit_opd.evaluation.history import Comparison
from lit_opd.evaluation.rows import AnswerRow
from lit_opd.evaluation.statistics import bootstrap_interval
from lit_opd.objective import Divergence
from lit_opd.report.replay import load_record, save_record
from lit_opd.types import Rollout, StepRecord
from lit_opd.weighting.fire import FiRe
from lit_opd.weighting.fractions import FirstFraction, RandomFraction
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import cases, fixed, profiled, run_folder, tiny
from tests.helpers.pages import HOSTILE, Reader, assert_only_text

ROOT = Path(__file__).resolve().parents[2]
STEPS = (0, 10, 20, 30, 40)
TOKENS_A_STEP = 100
PUBLISHED_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, 100: 1.984}
HOSTILE_STRATEGY = "<script>alert(1)</script><b a='&'>\"{{ 7*7 }}{% raw %}{# gone #}"
HOSTILE_VARIANT = "<script>'&\"{{ 7*7 }}{% raw %}{# gone #}"  # a slash or a = would be the folder's
MOST_OF_200 = 17  # exclusions of 0 by a 95 % interval: 10 expected, binomial standard deviation 3.1


# -- synthetic runs ----------------------------------------------------------------------------------------------------


def write_run(
    folder: Path, values: dict[str, list[float]], *, seed: int, strategy: str, w_max: float = 1.5, lr: float = 4e-4
) -> Path:
    """A run folder as a fit leaves it: validation rows and training rows in turn."""
    folder.mkdir(parents=True)
    names = {"greedy": "val/greedy_accuracy", "avg_at_4": "val/avg_at_k", "reverse_kl": "val/reverse_kl"}
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/tokens", *names.values()])
        writer.writeheader()
        for step in range(STEPS[-1] + 1):
            if step:
                writer.writerow({"step": step, "train/tokens": float(TOKENS_A_STEP)})
            if step in STEPS:
                place = STEPS.index(step)
                writer.writerow({"step": step} | {names[name]: column[place] for name, column in values.items()})
    ends = {f"{name}_{when}": column[at] for name, column in values.items() for when, at in (("start", 0), ("end", -1))}
    spent = {"steps": STEPS[-1], "tokens": STEPS[-1] * TOKENS_A_STEP, "seconds": 1.0}
    (folder / "summary.json").write_text(json.dumps(ends | spent | {"seed": seed, "strategy": strategy}))
    weighting = {"class_path": f"lit_opd.weighting.{strategy}", "init_args": {"w_max": w_max}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}
    config = {"seed_everything": seed, "model": {"weighting": weighting, "optimizer": optimizer}}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def known(seed: int, gain: float) -> dict[str, list[float]]:
    """Straight lines: greedy from 0.4 + a part of the seed's own by ``gain`` a step; the KL falls twice as fast."""
    noise = np.random.default_rng(seed).normal(0.0, 0.001, len(STEPS))
    own = 0.01 * seed
    greedy = [0.4 + own + gain * step + wobble for step, wobble in zip(STEPS, noise, strict=True)]
    return {"greedy": greedy, "avg_at_4": [value / 2 for value in greedy], "reverse_kl": [2.0 - 2 * v for v in greedy]}


@pytest.fixture(scope="module")
def effect(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uniform gains 0.010 a step, IW 0.012; six common seeds, one of each besides."""
    root = tmp_path_factory.mktemp("effect")
    for seed in range(7):
        write_run(root / f"uniform-{seed}", known(seed, 0.010), seed=seed, strategy="Uniform")
        noisy = known(seed + 100 if seed == 6 else seed, 0.012)
        write_run(root / f"iw-{seed}", noisy, seed=seed + 100 if seed == 6 else seed, strategy="ImportanceWeighting")
    out = root / "out"
    main(
        list,
        [
            "compare",
            "runs",
            "--runs",
            f"{root}/*-*",
            "--baseline",
            "Uniform",
            "--out",
            str(out),
            "--target",
            "greedy=0.7",
        ],
    )
    return out


def quantity(out: Path, metric: str, name: str) -> dict[str, Any]:
    report = json.loads((out / "compare.json").read_text())
    return report["variants"]["ImportanceWeighting"]["metrics"][metric][name]["difference"]


def test_a_known_effect_is_found_with_its_sign_and_size(effect):
    """After 40 steps 40 * 0.002 more; the mean height of a line is half its rise; 0.7 is crossed at 30 or 25 steps less what
    the seed gives: (0.3 - 0.01 seed) / gain, on average over seeds 0 to 5 0.275 / 0.012 - 0.275 / 0.010 = -4.58."""
    expected = {
        ("greedy", "end"): 0.08,
        ("greedy", "area_steps"): 0.04,
        ("greedy", "area_tokens"): 0.04,
        ("greedy", "steps_to_target"): -4.58,
        ("greedy", "tokens_to_target"): -458.0,
        ("avg_at_4", "end"): 0.04,
        ("reverse_kl", "end"): -0.16,
        ("reverse_kl", "area_steps"): -0.08,
    }
    for (metric, name), size in expected.items():
        found = quantity(effect, metric, name)
        assert found["mean"] == pytest.approx(size, rel=0.03), (metric, name)
        assert found["low"] > 0 if size > 0 else found["high"] < 0
        assert found["count"] == 6


def test_the_interval_of_a_known_effect_covers_it_and_is_as_wide_as_the_noise(tmp_path):
    """Noise of their own, sd 0.02: differences have 0.028, an interval of six about 2 * 2.57 * 0.028 / 6 ** 0.5 = 0.06."""
    generator = np.random.default_rng(7)
    for seed in range(6):
        for name, gain in (("Uniform", 0.010), ("ImportanceWeighting", 0.012)):
            values = known(seed, gain)
            values["greedy"] = [value + generator.normal(0.0, 0.02) for value in values["greedy"]]
            write_run(tmp_path / f"{name}-{seed}", values, seed=seed, strategy=name)
    words = ["--runs", f"{tmp_path}/*-*", "--baseline", "Uniform", "--out", str(tmp_path / "out")]
    main(list, ["compare", "runs", *words])
    found = quantity(tmp_path / "out", "greedy", "end")
    ends = {
        name: [
            float(json.loads((tmp_path / f"{name}-{seed}" / "summary.json").read_text())["greedy_end"])
            for seed in range(6)
        ]
        for name in ("Uniform", "ImportanceWeighting")
    }
    gaps = np.subtract(ends["ImportanceWeighting"], ends["Uniform"])
    half = 2.570582 * gaps.std(ddof=1) / 6**0.5  # Student's 0.975 quantile at 5 degrees of freedom
    assert (found["low"], found["high"]) == (pytest.approx(gaps.mean() - half), pytest.approx(gaps.mean() + half))
    assert found["low"] < 0.08 < found["high"] and 0.02 < found["high"] - found["low"] < 0.15


def test_seeds_that_only_one_side_has_are_listed_and_not_paired(effect):
    notes = " ".join(json.loads((effect / "compare.json").read_text())["notes"])
    assert "unpaired seeds, 106 of ImportanceWeighting" in notes and "unpaired seeds, 6 of Uniform" in notes
    assert "differs from Uniform in model.weighting" in notes


def simulated(variant: str, seed: int, generator: np.random.Generator) -> Run:
    """A run whose every evaluation is noise around a curve that all runs share."""
    values = np.linspace(0.4, 0.8, len(STEPS)) + generator.normal(0.0, 0.05, len(STEPS))
    curve = Curve(STEPS, tuple(step * TOKENS_A_STEP for step in STEPS), tuple(values))
    summary = {"seed": seed, "steps": STEPS[-1], "tokens": STEPS[-1] * TOKENS_A_STEP, "greedy_end": values[-1]}
    return Run(Path(variant), variant, summary, {}, {"greedy": curve}, Comparison({}))


@pytest.mark.parametrize("seeds", [3, 6])
def test_identical_distributions_differ_no_more_often_than_the_intervals_promise(seeds):
    generator = np.random.default_rng(20260 + seeds)
    excluded = dict.fromkeys(("end", "area_steps", "steps_to_target"), 0)
    for _ in range(200):
        runs = [simulated(variant, seed, generator) for variant in ("a", "b") for seed in range(seeds)]
        found = compare_runs(runs, baseline="a", targets={"greedy": 0.6})
        for name in excluded:
            difference = found.cells["greedy", "b", name].difference
            excluded[name] += difference is not None and difference.excludes_zero
    assert max(excluded.values()) <= MOST_OF_200 and min(excluded.values()) >= 2, excluded


def test_the_percentile_bootstrap_would_break_that_promise():
    """Why seeds get Student t."""
    generator = torch.Generator().manual_seed(0)
    intervals = [
        bootstrap_interval(torch.randn(3, generator=generator, dtype=torch.float64), draws=200) for _ in range(200)
    ]
    assert sum(not low <= 0 <= high for low, high in intervals) > 2 * MOST_OF_200


def test_quantiles_of_t_are_the_published_ones():
    assert {freedom: round(t_quantile(freedom), 3) for freedom in PUBLISHED_T} == PUBLISHED_T


def test_paired_takes_common_seeds_only():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303."""
    found = paired({1: 2.0, 2: 4.0, 3: 6.0, 9: 100.0}, {1: 1.0, 2: 2.0, 3: 3.0, 8: -100.0})
    assert found.mean == 2.0 and found.count == 3
    assert found.low == pytest.approx(2 - 4.303 / math.sqrt(3), abs=1e-3)
    alone = paired({1: 2.0}, {1: 1.0})
    assert alone.low is None and not alone.excludes_zero
    with pytest.raises(InputError, match="common seed"):
        paired({1: 2.0}, {2: 1.0})


def test_curves_are_cut_at_the_horizon_and_crossed_between_evaluations():
    """Up to 15 the polygon 0, 1, 3 has area 5 + (1 + 2) / 2 * 5 = 12.5."""
    assert mean_height([0, 10, 20], [0.0, 1.0, 3.0], horizon=15) == pytest.approx(12.5 / 15)
    assert reached([0, 10, 20], [2.0, 1.0, 0.5], 0.75, rising=False) == 15.0
    assert cut([0, 10, 20], [2.0, 1.0, 0.5], start=15) == ([15, 20], [0.75, 0.5])
    assert cut([0, 10, 20], [2.0, 1.0, 0.5], start=0) == ([0, 10, 20], [2.0, 1.0, 0.5])
    assert reached([0, 10], [0.9, 0.1], 0.8, rising=True) == 0.0
    assert reached([0, 10], [0.0, 0.1], 0.8, rising=True) is None


def begun_at(variant: str, seed: int, steps: tuple[int, ...]) -> Run:
    """Greedy accuracy 0.2 at step 0, 0.4 at 10, 0.6 at 20 and from then on, evaluated at ``steps``."""
    values = tuple(float(np.interp(step, (0, 10, 20), (0.2, 0.4, 0.6))) for step in steps)
    summary = {"seed": seed, "steps": steps[-1], "tokens": 100 * steps[-1], "seconds": 1.0, "greedy_end": values[-1]}
    curve = Curve(steps, tuple(TOKENS_A_STEP * step for step in steps), values)
    return Run(Path(variant), variant, summary, {}, {"greedy": curve}, Comparison({}))


@pytest.mark.parametrize("target", [0.3, 0.5])
def test_curves_that_begin_later_are_compared_over_the_common_part(tmp_path, target):
    """From 10 on both have mean height 0.5. From its own begin one had 0.4, and crossed 0.3 at 5, where the other began at 10."""
    runs = [begun_at("whole", seed, (0, 10, 20)) for seed in (1, 2)]
    runs += [begun_at("later", seed, (10, 20)) for seed in (1, 2)]
    found = compare_runs(runs, baseline="whole", targets={"greedy": target})
    place = 10.0 if target == 0.3 else 15.0
    for quantity, value in (
        ("area_steps", 0.5), ("area_tokens", 0.5), ("steps_to_target", place), ("tokens_to_target", 100 * place)
    ):  # fmt: skip
        for variant in ("whole", "later"):
            assert found.cells["greedy", variant, quantity].mean.mean == pytest.approx(value), quantity
        difference = found.cells["greedy", "later", quantity].difference
        assert difference.mean == pytest.approx(0.0) and not difference.excludes_zero and not difference.censored
    assert found.notes == ["greedy: curves begin at 0 to 10 optimizer steps; areas and targets use the common part."]
    document = runs_document(found, tmp_path)
    assert "horizon 20 steps, 2,000 tokens, from 10 steps, 1,000 tokens on." in document.markdown()
    assert json.loads(json.dumps(_data(found)))["starts"] == {"greedy/steps": 10.0, "greedy/tokens": 1000.0}
    together = mean_curve(runs[1:3], "greedy", "steps")
    assert (together[0][0], together[0][-1]) == (10.0, 20.0)  # nothing was measured of one of them before


def test_curves_without_a_common_part_have_no_area_and_no_way_to_a_target(tmp_path):
    runs = [begun_at("early", seed, (0, 10)) for seed in (1, 2)] + [begun_at("late", seed, (20, 30)) for seed in (1, 2)]
    found = compare_runs(runs, baseline="early")
    assert {quantity for *_, quantity in found.cells} == {"end"}
    said = "greedy: no steps in common, a curve begins at 20 and another ends at 10; no areas and targets over steps."
    assert said in found.notes
    assert "areas and targets" not in " ".join(section.title for section in runs_document(found, tmp_path).sections)
    assert mean_curve([runs[0], runs[2]], "greedy", "steps") == ([], [])


def test_runs_that_never_reach_the_target_count_as_the_horizon_and_are_said_to(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"a-{seed}", known(seed, 0.010), seed=seed, strategy="Uniform")
        write_run(tmp_path / f"b-{seed}", known(seed, 0.010 if seed else 0.001), seed=seed, strategy="LastFraction")
    found = compare_runs(read_runs([f"{tmp_path}/*"]), baseline="Uniform", targets={"greedy": 0.7, "reverse_kl": -9.0})
    cell = found.cells["greedy", "LastFraction", "steps_to_target"]
    assert cell.mean.censored == 1 and cell.difference.censored == 1 and cell.difference.count == 3
    assert cell.difference.mean == pytest.approx((40 - 30) / 3, abs=0.2)
    nobody = found.cells["reverse_kl", "LastFraction", "steps_to_target"]
    assert nobody.mean.censored == 3 and nobody.mean.mean == 40 and nobody.difference is None


@pytest.mark.parametrize("gain", [-0.001, 0.0])
def test_a_baseline_that_gets_no_better_gives_no_target(tmp_path, gain):
    """Four fifths of the way down would be reached by everyone at step 0."""
    for seed in range(2):
        for strategy, rise in (("Uniform", gain), ("DASH", 0.01)):
            line = [0.47 + rise * step for step in STEPS]
            values = {"greedy": line, "reverse_kl": [2.0 - 2.0 * value for value in line]}
            write_run(tmp_path / f"{strategy}-{seed}", values, seed=seed, strategy=strategy)
    runs = read_runs([f"{tmp_path}/*"])
    found = compare_runs(runs, baseline="Uniform")
    assert not found.targets and not any("target" in quantity for *_, quantity in found.cells)
    assert found.cells["greedy", "DASH", "area_steps"].difference.mean == pytest.approx((0.01 - gain) * 20)
    end = 0.47 + 40 * gain
    assert f"greedy: no target, as Uniform does not get better on average (0.47 to {end:.4g})" in " ".join(found.notes)
    document = runs_document(found, tmp_path)
    assert "No target; horizon 40 steps, 4,000 tokens." in document.markdown()
    assert "set `--target reverse_kl=VALUE`" in document.lines()
    assert compare_runs(runs, baseline="DASH").targets.keys() == {"greedy", "reverse_kl"}
    assert compare_runs(runs, baseline="Uniform", targets={"greedy": 0.8}).targets == {"greedy": 0.8}


def test_runs_that_do_not_log_every_step_are_compared_over_steps_only(tmp_path):
    """The sum over logged batches would be too small a token axis, and a variant logged more rarely look the cheaper."""
    for seed, strategy in product(range(2), ("Uniform", "DASH")):
        folder = write_run(tmp_path / f"{strategy}-{seed}", known(seed, 0.01), seed=seed, strategy=strategy)
        if strategy == "DASH":
            rows = (folder / "metrics.csv").read_text().splitlines()
            kept = [
                row for row in rows if not row.split(",")[1] or not row[0].isdigit() or int(row.split(",")[0]) % 10 == 0
            ]
            (folder / "metrics.csv").write_text("\n".join(kept) + "\n")
    found = compare_runs(read_runs([f"{tmp_path}/*"]), baseline="Uniform")
    assert {quantity for *_, quantity in found.cells} == {"end", "area_steps", "steps_to_target"}
    gap = r"DASH-0/metrics.csv must sum to the 4,000 tokens of summary.json, got 400; .*log_every_n_steps 1"
    assert any(re.search("over steps only, 2 of the runs.*" + gap, note) for note in found.notes)
    assert "; horizon 40 steps." in runs_document(found, tmp_path).markdown()
    with pytest.raises(InputError, match=gap):
        found.variants["DASH"][0].curves["greedy"].along("tokens")


def test_one_seed_gives_no_interval(tmp_path):
    for strategy in ("Uniform", "DASH"):
        write_run(tmp_path / strategy, known(1, 0.01), seed=1, strategy=strategy)
    found = compare_runs(read_runs([f"{tmp_path}/*"]), baseline="Uniform")
    assert found.cells["greedy", "DASH", "end"].difference.low is None
    assert any("no interval" in note for note in found.notes)


def test_variants_are_named_by_strategy_by_prefix_or_by_a_key_of_the_config(tmp_path):
    four = write_run(tmp_path / "four", known(1, 0.01), seed=1, strategy="ImportanceWeighting", w_max=4.0)
    low = write_run(tmp_path / "low", known(1, 0.01), seed=1, strategy="ImportanceWeighting")
    assert read_run(four).variant == "ImportanceWeighting"
    assert [run.variant for run in read_runs([f"x={four}", str(low)])] == ["x", "ImportanceWeighting"]
    by_key = read_runs([str(four), str(low)], group_by=["model.weighting"])
    assert [run.variant for run in by_key] == ["ImportanceWeighting(w_max=4.0)", "ImportanceWeighting(w_max=1.5)"]
    assert read_run(four, group_by=["model.weighting.init_args.w_max"]).variant == "4.0"
    with pytest.raises(InputError, match="--group_by"):
        read_runs([str(four), str(low)])


def test_a_strategys_name_is_not_given_to_several_settings_of_it(tmp_path):
    """Each seed with another w_max: a mean over three weightings is none of ImportanceWeighting's."""
    for seed, w_max in ((1, 2.0), (2, 4.0), (3, 8.0)):
        write_run(tmp_path / f"uniform-{seed}", known(seed, 0.01), seed=seed, strategy="Uniform")
        write_run(tmp_path / f"iw-{seed}", known(seed, 0.01), seed=seed, strategy="ImportanceWeighting", w_max=w_max)
    words = [f"{tmp_path}/uniform-*", f"{tmp_path}/iw-*"]
    refusal = (
        r"one weighting a variant, got ImportanceWeighting\(w_max=2.0\) of \S*/iw-1 and ImportanceWeighting\(w_max=4.0\) of "
        r"\S*/iw-2, both ImportanceWeighting; set `--group_by model.weighting`, or name them \(name=folder\)"
    )
    with pytest.raises(InputError, match=refusal):
        read_runs(words)
    apart = read_runs(words, group_by=["model.weighting"])
    assert len({run.variant for run in apart}) == 4 and len(read_runs([words[0], f"{tmp_path}/iw-3"])) == 4
    together = read_runs([words[0], f"iw={words[1]}"])
    assert compare_runs(together, baseline="Uniform").notes == [
        "iw differs from Uniform in model.weighting.",
        "iw: runs of the same variant differ in model.weighting.init_args.w_max; means and intervals are over all of these "
        "settings.",
    ]


RATES = "model.optimizer.init_args.lr"
WITHIN = f"runs of the same variant differ in {RATES}; means and intervals are over all of these settings."


@pytest.mark.parametrize(
    ("uniform", "weighted", "notes"),
    [
        ((1e-3, 1e-3, 1e-3), (1e-3, 1e-3, 1e-3), []),
        ((1e-3, 1e-3, 1e-3), (2e-3, 2e-3, 2e-3), [f"b differs from a in {RATES}."]),
        ((1e-3, 1e-3, 1e-3), (1e-3, 2e-3, 1e-3), [f"b differs from a in {RATES} (seed 1).", f"b: {WITHIN}"]),
        ((1e-3, 2e-3, 3e-3), (1e-3, 1e-3, 1e-3), [f"b differs from a in {RATES} (seeds 1, 2).", f"a: {WITHIN}"]),
        ((1e-3, 1e-3, 3e-3), (1e-3, 1e-3, 3e-3), [f"a, b: {WITHIN}"]),
    ],
)
def test_settings_that_differ_between_any_two_runs_are_named(tmp_path, uniform, weighted, notes):
    for name, rates in (("a", uniform), ("b", weighted)):
        for seed, lr in enumerate(rates):
            write_run(tmp_path / f"{name}-{seed}", known(seed, 0.01), seed=seed, strategy="Uniform", lr=lr)
    found = compare_runs(read_runs([f"a={tmp_path}/a-*", f"b={tmp_path}/b-*"]), baseline="a")
    assert found.notes == notes


def write_answers(folder: Path, correct: dict[str, int], *, samples: int, step: int = 40) -> None:
    """A complete evaluation at a step: by problem, how many of its samples are right."""
    rows = [
        AnswerRow(
            set="aime", step=step, problem_id=problem, sample=sample, reference="1", answer="1", correct=sample < right,
            category="correct", length=3, finish_reason="stop", text="1", problems=len(correct), samples=samples, tokens=10,
            settings="s",
        )
        for problem, right in correct.items() for sample in range(samples)
    ]  # fmt: skip
    with (folder / "evaluation.jsonl").open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def test_problems_are_paired_and_averaged_over_common_seeds(tmp_path):
    """Eight problems of two samples; variant b solves one sample more of every other problem: + 1/4 on average."""
    for variant, seed in product("ab", (1, 2)):
        folder = write_run(tmp_path / f"{variant}-{seed}", known(seed, 0.01), seed=seed, strategy=variant)
        for step in (0, 40):
            solved = {f"p{n}": int(step == 40 and variant == "b" and n % 2 == 0) for n in range(8)}
            write_answers(folder, solved, samples=2, step=step)
    found = compare_runs(read_runs([f"{tmp_path}/*"]), baseline="a")
    cell = found.problems["aime", "b"]
    assert cell.mean == 0.25 and cell.difference[0] == 0.25 and (cell.problems, cell.seeds) == (8, 2)
    assert 0.0 < cell.difference[1] < 0.25 < cell.difference[2] <= 0.5
    assert cell.both.mean == 0.25 and cell.both.low < 0.25 < cell.both.high and cell.both.count == 2
    (written,) = json.loads(json.dumps(_data(found)))["variants"]["b"]["problems"].values()
    assert (written["both"]["low"], written["both"]["high"]) == (cell.both.low, cell.both.high)
    assert not any("same problems" in note for note in found.notes)


@pytest.mark.parametrize("more", [0, 1])
def test_a_difference_by_problem_is_of_one_seed_at_a_time(tmp_path, more):
    """Of five samples 1 is right with seed 1 and 3 with seed 2, on every problem; variant b has ``more`` of each. Seed 3 has no
    common problem. Averaged over other seeds on each side, problems 5 to 9 alone would give b - a = 0.4 without any effect."""
    asked = {("a", 1): range(10), ("b", 1): range(5), ("a", 2): range(5), ("b", 2): range(10)}
    for (variant, seed), numbers in (asked | {("a", 3): range(5), ("b", 3): range(5, 9)}).items():
        folder = write_run(tmp_path / f"{variant}-{seed}", known(seed, 0.01), seed=seed, strategy=variant)
        right = {1: 1, 2: 3, 3: 0}[seed] + more * (variant == "b")
        write_answers(folder, {f"p{number}": right for number in numbers}, samples=5)
    found = compare_runs(read_runs([f"{tmp_path}/*"]), baseline="a")
    cell = found.problems["aime", "b"]
    assert cell.difference == (pytest.approx(0.2 * more),) * 3
    assert cell.mean == pytest.approx(0.4 + 0.2 * more) and (cell.problems, cell.seeds) == (5, 2)
    assert cell.both.mean == pytest.approx(0.2 * more) and cell.both.count == 2
    assert [note for note in found.notes if "same problems" in note] == [
        "aime: b and a were not asked the same problems with every seed (4 to 10); differences are over the problems "
        "that both were asked with the same seed."
    ]


# -- seeds and problems at once ----------------------------------------------------------------------------------------

# standard deviations of seeds, problems and what is left
SOURCES = {"seeds": (1.0, 0.5, 1.0), "problems": (0.05, 1.0, 0.5), "neither": (0.0, 0.0, 1.0), "both": (0.15, 1.0, 1.0)}
SIMULATED, FEW_DRAWS = 150, 400


def simulated_table(seeds: int, problems: int, source: str, generator: np.random.Generator) -> np.ndarray:
    """[seeds, problems] around 0."""
    shapes = ((seeds, 1), (1, problems), (seeds, problems))
    return sum(
        (deviation * generator.normal(size=shape) for deviation, shape in zip(SOURCES[source], shapes, strict=True)),
        start=np.zeros((seeds, problems)),
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seeds", [5, 10])
def test_two_way_intervals_hold_the_truth_as_often_as_they_say(seeds, source):
    generator = np.random.default_rng(seeds)
    tables = [simulated_table(seeds, 50, source, generator) for _ in range(SIMULATED)]
    found = [two_way_interval(table, seed=number, draws=FEW_DRAWS) for number, table in enumerate(tables)]
    held = sum(each.low <= 0 <= each.high for each in found)
    assert 0.92 * SIMULATED <= held <= 0.98 * SIMULATED, held / SIMULATED


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seeds", [2, 4])
def test_two_way_tails_are_not_too_small_with_few_seeds(seeds, source):
    """Where the problems' part counts, the sum of both is wider than it need be; never narrower."""
    generator = np.random.default_rng(seeds)
    tables = [simulated_table(seeds, 50, source, generator) for _ in range(SIMULATED)]
    found = [two_way(table, seed=number, draws=FEW_DRAWS).below(0.0) for number, table in enumerate(tables)]
    assert sum(0.025 <= share <= 0.975 for share in found) >= 0.92 * SIMULATED
    assert sum(0.0025 <= share <= 0.9975 for share in found) >= 0.98 * SIMULATED  # of 99.5 %, as Holm's first step asks


def test_an_interval_over_seeds_or_over_problems_alone_would_not():
    generator = np.random.default_rng(3)
    by_seed = [mean_interval(simulated_table(10, 50, "problems", generator).mean(1).tolist()) for _ in range(SIMULATED)]
    assert sum(each.low <= 0 <= each.high for each in by_seed) < 0.7 * SIMULATED
    held = 0
    for _ in range(SIMULATED):
        means = simulated_table(10, 50, "seeds", generator).mean(0)
        held += abs(means.mean()) <= 1.96 * means.std(ddof=1) / 50**0.5
    assert held < 0.7 * SIMULATED


def test_a_two_way_interval_is_that_over_seeds_where_problems_do_not_vary_and_the_other_way_round():
    generator = np.random.default_rng(0)
    values = generator.normal(size=8)
    by_seed = two_way_interval(np.repeat(values[:, None], 40, axis=1), draws=40_000)
    exact = mean_interval(values.tolist())
    assert (by_seed.low, by_seed.high) == (pytest.approx(exact.low, abs=0.03), pytest.approx(exact.high, abs=0.03))
    values = generator.normal(size=400)
    by_problem = two_way_interval(np.repeat(values[None], 8, axis=0), draws=8_000)
    exact = mean_interval(values.tolist())
    assert (by_problem.low, by_problem.high) == (
        pytest.approx(exact.low, abs=0.01),
        pytest.approx(exact.high, abs=0.01),
    )
    assert by_problem == two_way_interval(np.repeat(values[None], 8, axis=0), draws=8_000)  # the same draws


@pytest.mark.parametrize("seeds", [2, 3, 4, 10])
def test_a_two_way_tail_is_that_of_plain_draws(seeds):
    """Student's t drawn, not integrated: far more of them than the far tail needs."""
    generator = np.random.default_rng(seeds)
    found = two_way(simulated_table(seeds, 50, "both", generator))
    drawn = found.mean + found.scale * generator.standard_t(seeds - 1, (200, len(found.again))) + found.again
    low, high = found.interval()
    for bound in (low, high, found.mean, found.mean - 3 * (found.mean - low)):
        assert found.below(bound) == pytest.approx((drawn <= bound).mean(), abs=1e-3)
        assert found.below(bound) + found.above(bound) == pytest.approx(1.0)
    assert (found.below(low), found.above(high)) == (pytest.approx(0.025, rel=1e-3), pytest.approx(0.025, rel=1e-3))


def test_p_of_few_seeds_is_as_small_as_their_effect_is_large():
    """Four seeds alone, effect d standard errors: the t of 3 degrees of freedom, in closed form. No floor of few draws."""
    table = np.repeat(np.array([-1.0, 1.0, -1.0, 1.0])[:, None], 30, axis=1)  # standard error 1 / sqrt(3)
    for effect in (1.0, 3.0, 10.0, 100.0):
        found, t = two_way(table + effect), effect * 3**0.5
        closed = 0.5 - (math.atan(t / 3**0.5) + t * 3**0.5 / (3 + t * t)) / math.pi
        assert found.below(0.0) == pytest.approx(closed, rel=1e-6)


def test_a_two_way_difference_is_of_what_all_have():
    """Seed 3 is unpaired, problem "c" is missing once: differences 1, 2 and 3, 4."""
    ours = {1: {"a": 2.0, "b": 3.0, "c": 9.0}, 2: {"a": 4.0, "b": 5.0}, 3: {"a": 99.0}}
    theirs = {1: {"a": 1.0, "b": 1.0, "c": 1.0}, 2: {"a": 1.0, "b": 1.0}}
    found = paired_two_way(ours, theirs)
    assert found.mean == 2.5 and found.count == 2 and found == two_way_interval([[1.0, 2.0], [3.0, 4.0]])
    assert two_way_interval([[1.0, 2.0]]).low is None and two_way_interval([[1.0], [2.0]]).high is None
    for sides in (({1: {"a": 1.0}}, {2: {"a": 1.0}}), ({1: {"a": 1.0}}, {1: {"b": 1.0}})):
        with pytest.raises(InputError, match="common seed and a problem"):
            paired_two_way(*sides)
    for table in ([1.0, 2.0], [[1.0, math.nan]], [[]]):
        with pytest.raises(InputError, match=r"table \[seeds, problems\] of finite numbers"):
            two_way_interval(table)


# -- what is written ---------------------------------------------------------------------------------------------------


def assert_drawn(path: Path) -> None:
    """Not blank, and with colour: frame and text alone are grey."""
    pixels = imread(path)[..., :3]
    coloured = pixels.max(-1) - pixels.min(-1) > 0.2
    assert pixels.std() > 0.05 and coloured.mean() > 0.002, (path, coloured.mean())


def test_pictures_show_something(effect):
    names = {path.name for path in effect.glob("*.png")}
    assert names == {"curve_greedy.png", "curve_avg_at_4.png", "curve_reverse_kl.png"}
    for name in names:
        assert_drawn(effect / name)


def test_the_page_stands_alone_and_names_are_text(tmp_path):
    """Strategy, variant and folder, through the command line."""
    pages = {}
    for kind, strategy, name in (("plain", "DASH", "x"), ("hostile", HOSTILE_STRATEGY, HOSTILE_VARIANT)):
        root, out = tmp_path / kind, tmp_path / kind / "out"
        for seed in (1, 2):
            write_run(root / f"a{seed}", known(seed, 0.01), seed=seed, strategy=strategy)
            write_run(root / f"b{seed}", known(seed, 0.01), seed=seed, strategy="b|c")
            write_run(root / f"c{seed}", known(seed, 0.01), seed=seed, strategy="DASH")
        words = ["--runs", f"{root}/[ab]*", f"{name}={root}/c*", "--baseline", "b|c", "--out", str(out)]
        main(list, ["compare", "runs", *words])
        pages[kind] = (out / "compare.html").read_text()
        assert "b\\|c" in (out / "compare.md").read_text()
    # title, heading, a note, the overview, and of three metrics a row of the end and one of each area and way to a target
    assert_only_text(pages["hostile"], pages["plain"], text=HOSTILE_STRATEGY, shown=19)
    assert Reader(pages["hostile"]).text.count(HOSTILE_VARIANT) == 19
    assert "<img " not in pages["hostile"]  # charts from the numbers


def test_the_verdict_is_what_the_interval_says(effect):
    report = json.loads((effect / "compare.json").read_text())
    own = report["verdict"]["ImportanceWeighting"]
    for metric, better in (("greedy", True), ("avg_at_4", True), ("reverse_kl", False)):
        end = quantity(effect, metric, "end")
        apart = end["low"] > 0 or end["high"] < 0
        said = "not different from" if not apart else "better than" if (end["mean"] > 0) == better else "worse than"
        assert own["reading"][metric] == f"{said} Uniform"
    end = quantity(effect, "greedy", "end")
    numbers = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**end)
    assert (
        own["sentence"]
        == report["headline"]
        == f"ImportanceWeighting: {numbers} greedy accuracy, 6 pairs: better than Uniform"
    )
    page = Reader((effect / "compare.html").read_text()).text
    assert page.index(own["sentence"]) < page.index("Verdict") < page.index(numbers, page.index("Verdict"))


@pytest.mark.parametrize(
    ("low", "high", "rising", "said"),
    [
        (0.1, 0.3, True, "better than B"),
        (0.1, 0.3, False, "worse than B"),
        (-0.3, -0.1, True, "worse than B"),
        (-0.3, -0.1, False, "better than B"),
        (-0.1, 0.3, True, "not different from B"),
        (0.0, 0.3, True, "not different from B"),
        (None, None, True, "one pair, so no interval: it may be chance"),
    ],
)
def test_a_reading_follows_the_side_of_the_interval(low, high, rising, said):
    mean = 0.2 if low is None else (low + high) / 2
    assert reading(Estimate(mean, low, high, 3 if low is not None else 1), rising=rising, baseline="B") == said
    assert reading(None, rising=rising, baseline="B") == "not measured beside B"
    assert reading(Estimate(mean, 0.1, 0.3, 3, censored=1), rising=True, baseline="B").startswith("not different")


def test_a_headline_names_every_variant_once(tmp_path):
    for seed in range(3):
        for name, gain in (("Base", 0.010), ("Good", 0.014), ("Bad", 0.006), ("Same", 0.0101)):
            noise = 0.0008 * math.sin(seed + len(name)) if name == "Same" else 0.0
            values = {"greedy": [0.3 + (gain + noise) * step for step in STEPS]}
            write_run(tmp_path / f"{name}-{seed}", values, seed=seed, strategy=name)
    found = compare_runs(read_runs([f"{tmp_path}/*-*"]), baseline="Base")
    said = "Greedy accuracy: Good better than Base; Bad worse than Base; Same not different from Base"
    document = runs_document(found, tmp_path / "out")
    assert document.headline == said and len(document.lines().splitlines()) == 1 + 3 + len(found.notes)
    assert document.lines().startswith(said) and document.markdown().index(said) < document.markdown().index(
        "## Verdict"
    )
    assert sum("differ from Base in" in note for note in found.notes) == 1  # one note for all three


def test_positions_are_the_means_of_the_runs_profiles(tmp_path):
    """Two seeds of last windows at 1 and 3 times (1 + tenth / 10): mean 2; the first windows are all at 4."""
    for name, levels in (("Base", (1.0, 3.0)), ("Other", (0.5, 0.5)), ("Without", ())):
        for seed in (0, 1):
            folder = write_run(tmp_path / f"{name}-{seed}", known(seed, 0.01), seed=seed, strategy=name)
            if levels:
                last = run_folder.window(40, level=levels[seed], weighted=name == "Other")
                run_folder.write(folder, windows=[run_folder.window(1, level=4.0), run_folder.window(2), last])
    found = compare_runs(read_runs([f"{tmp_path}/*-*"]), baseline="Base")
    document = runs_document(found, tmp_path / "out")
    drawn = run_folder.drawings(document.html())["Disagreement |q - s|, last window"]["series"]
    assert [series["name"] for series in drawn] == ["Base (n = 2)", "Other (n = 2)", "first window, all runs"]
    for series, level in zip(drawn, (2.0, 0.5, 4.0), strict=True):
        assert series["y"] == pytest.approx([level * (1 + tenth / 10) for tenth in range(10)])
    low, high = drawn[0]["low"][0], drawn[0]["high"][0]
    assert (low, high) == pytest.approx(
        (2 - PUBLISHED_T[1], 2 + PUBLISHED_T[1]), abs=1e-3
    )  # deviation sqrt 2, two seeds
    weights = run_folder.drawings(document.html())["Weight (0 where dropped), last window"]["series"]
    assert weights[0]["y"] == [1.0] * 10 and weights[1]["y"][0] == 1.5
    assert_drawn(tmp_path / "out" / "by_position.png")


MORE_NAMES = ["$", "_under_", r"\frac$", "a|b", "*a*"]
NAMES = ["$x_1$ and $y$", "<b>", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_NAMES)]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_variant_can_be_drawn_and_written(tmp_path, name):
    for seed in (1, 2):
        for own in (name, f"_{name}"):
            write_run(tmp_path / f"{len(own)}-{seed}", known(seed, 0.01), seed=seed, strategy=own)
    found = compare_runs(read_runs([f"{tmp_path}/*-*"]), baseline=name)
    document = runs_document(found, tmp_path / "out")
    assert_drawn(tmp_path / "out" / "curve_greedy.png")
    shown = plain(name)
    assert not is_math_text(shown) and not shown.startswith("_")
    draw_weights({name: [1.0] * 10}, tmp_path / "out")
    draw_cosines({name: dict.fromkeys(REFERENCES, 0.5)}, tmp_path / "out")
    assert name in document.headline
    text = document.markdown()
    for active in ("$x", "_under", "*a", "<b>"):
        assert re.search(r"(?<!\\)" + re.escape(active), text) is None


def test_names_are_text_in_markdown():
    for text in ("_a_ *b* `c` <d> [e](f) [g]: h", "# a", "- b", "> c", "1. d", "a\n\n# b"):
        written = markdown_text(text)
        assert "\n" not in written
        assert re.sub(r"\\([\W_])", r"\1", written) == " ".join(text.split())  # nothing is lost
        assert not re.match(r"#|[-+>] |\d+[.)] ", written)
        assert not re.search(r"(?<!\\)[*_`<]|(?<!\\)\](?=[(:])", written)
    assert markdown_text("0.831 [0.811, 0.851]") == "0.831 [0.811, 0.851]" and markdown_text("-0.003") == "-0.003"


def test_a_mean_that_is_far_out_is_an_arrow_and_squeezes_no_other():
    near = [Interval(0.1, 0.0, 0.2, marked=True), Interval(-0.1), Interval(0.05), Interval(0.02)]
    rows = [*near, Interval(-9.0, -9.5, -8.5, marked=True), None]
    first, low, *_, far, none = Table(["a"], [["x"]] * 6, intervals=rows).forest()
    assert (first["beyond"], low["beyond"], far["beyond"], none) == (0, 0, -1, None)
    assert (low["dot"], first["high"]) == ("0.0", f"{FOREST_WIDTH:.1f}")  # the scale is of the others alone
    page = Document("t", [Section("s", [], Table(["a"], [["x"]] * 6, intervals=rows))]).html()
    assert page.count('class="dot" d="M2 6') == 1 and page.count("<circle") == 4
    few = Table(["a"], [["x"]] * 4, intervals=rows[1:5]).forest()
    assert not any(drawn["beyond"] for drawn in few) and few[3]["low"] == "0.0"


def test_an_interval_is_drawn_where_it_is():
    rows = [Interval(0.5, 0.0, 1.0), Interval(-1.0, None, None), None, Interval(3.0, 2.0, 3.0, True)]
    first, second, third, last = Table(["a"], [["x"]] * 4, intervals=rows).forest()
    assert third is None and (second["dot"], second["zero"], second["low"]) == ("0.0", "44.0", None)  # -1 to 3 over 176
    assert (first["low"], first["dot"], first["high"]) == ("44.0", "66.0", "88.0") and not first["marked"]
    assert (last["low"], last["high"], last["marked"]) == ("132.0", "176.0", True)


def test_files_of_a_pattern_come_in_the_order_of_their_numbers(tmp_path):
    for step in (1, 2, 10, 20):
        (tmp_path / f"step-{step}.safetensors").touch()
    (tmp_path / "step-2-rank-1.safetensors").touch()
    names = [path.stem for path in find_files([f"{tmp_path}/*"])]
    assert names == ["step-1", "step-2-rank-1", "step-2", "step-10", "step-20"]


def test_every_part_of_a_document_is_text(tmp_path):
    Figure().savefig(tmp_path / "picture.png")

    def page(text: str) -> str:
        table = Table([text, text], [[text, text], [text, text]])
        return Document(text, [Section(text, [text, text], table, [tmp_path / "picture.png"]), Section(text)]).html()

    text = "".join(HOSTILE)
    # title, line above the heading, heading, two section titles, two paragraphs, six cells
    assert_only_text(page(text), page("a"), shown=13)
    assert (
        Reader(page(text)).values.count(text) == 5
    )  # the picture's description, and what four cells are called on a phone


def test_a_replays_files_strategies_and_notes_are_text(tmp_path):
    def page(text: str) -> str:
        sums, gradients = WeightSums(), GradientSums([1.0], {name: [1.0] for name in REFERENCES})
        found = Replay([Path(text.replace("/", ""))], {text: sums}, {text: gradients}, [text])
        return replay_document(found, tmp_path).html()

    # a note, a row of weights, a row by position, a row of gradients
    assert_only_text(page(HOSTILE_STRATEGY), page("a"), text=HOSTILE_STRATEGY, shown=4)
    assert HOSTILE_STRATEGY.replace("/", "") in Reader(page(HOSTILE_STRATEGY)).text


# -- replay ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory) -> Path:
    """The first step of a real fit with importance weighting, in float64."""
    run = tmp_path_factory.mktemp("run")
    profiled.fit(folders, run, [RolloutSamples(save_rollouts_every=1)], steps=1)
    return run / "rollouts" / "step-1.safetensors"


@pytest.fixture(scope="module")
def models(folders) -> ReplayModels:
    return ReplayModels(*folders, dtype="float64")


def relative(ours: Gradient, theirs: Gradient) -> float:
    gap = [a - b for a, b in zip(ours, theirs, strict=True)]
    return (dot(gap, gap) / dot(theirs, theirs)) ** 0.5


def trained_gradient(folders: tuple[str, str], models: ReplayModels, **settings: Any) -> Gradient:
    """What the real Trainer's step changes the weights by, in the order of the student's parameters."""
    rollout = cases.rollout()
    _, gradient = fixed.gradient(fixed.module(folders, rollout, **settings), rollout.prompts)
    return [gradient[name] for name, _ in models.student.causal_lm.named_parameters()]


def test_replayed_weights_are_those_of_the_run(saved):
    record = load_record(saved)
    (sums,) = replay_files([saved], {"iw": ImportanceWeighting()}).weights.values()
    found = sums.to_json()
    kept = record.weights[record.kept].double()
    assert found["weight_mean"] == pytest.approx(float(kept.mean()), rel=1e-12)
    assert found["weight_ess"] == pytest.approx(float(kept.sum() ** 2 / (len(kept) * kept.square().sum())), rel=1e-12)
    for tenth in range(10):  # by a slow loop over rows
        inside = [
            float(record.weights[row, t])
            for row, length in enumerate(cases.LENGTHS)
            for t in range(length)
            if tenth * 2 * length <= (2 * t + 1) * 10 < (tenth + 1) * 2 * length
        ]
        expected = pytest.approx(sum(inside) / len(inside), rel=1e-12) if inside else None
        assert found["weight_by_tenth"][tenth] == expected


def test_dropped_tokens_are_counted(saved):
    (sums,) = replay_files([saved], {"first": FirstFraction(0.5)}).weights.values()
    kept = sum(-(-length // 2) for length in cases.LENGTHS)
    found = sums.to_json()
    assert found["dropped_fraction"] == pytest.approx(1 - kept / sum(cases.LENGTHS))
    assert found["weight_mean"] == found["weight_ess"] == 1.0


def test_the_step_is_that_of_the_run(saved, models):
    """Scored anew with the run's models: the same log-probs, the same weights."""
    record = load_record(saved)
    again, _ = models.replay(record, ImportanceWeighting())
    assert torch.allclose(again.weights, record.weights, atol=1e-12)
    assert torch.allclose(again.signal.teacher_logprobs, record.signal.teacher_logprobs, atol=1e-12)


@pytest.mark.parametrize(
    "build",
    [Uniform, ImportanceWeighting, lambda: RandomFraction(0.5, seed=3), FiRe],
    ids=["uniform", "iw", "random", "fire"],
)
def test_gradients_are_those_of_the_training_step(saved, folders, models, build):
    _, ours = models.replay(load_record(saved), build())
    assert relative(ours, trained_gradient(folders, models, weighting=build())) < 1e-9


def test_the_exact_gradient_is_that_of_the_full_divergence(saved, folders, models):
    _, ours = models.replay(load_record(saved))
    theirs = trained_gradient(folders, models, weighting=Uniform(), objective=Divergence("reverse_kl"))
    assert relative(ours, theirs) < 1e-9


def test_uniform_has_cosine_one_with_itself_and_weights_change_it(saved, models):
    found = replay_files([saved], {"u": Uniform(), "iw": ImportanceWeighting(), "f": FirstFraction(0.3)}, models=models)
    by_name = {name: sums.to_json() for name, sums in found.gradients.items()}
    assert by_name["u"]["cosine"]["uniform"] == pytest.approx(1.0, abs=1e-12)
    assert by_name["exact KL"]["cosine"]["exact KL"] == pytest.approx(1.0, abs=1e-12)
    assert by_name["exact KL"]["cosine"]["uniform"] == by_name["u"]["cosine"]["exact KL"]
    assert by_name["f"]["cosine"]["uniform"] < by_name["iw"]["cosine"]["uniform"] < 1.0
    assert not found.notes


def test_sampled_gradients_average_to_the_exact_one(tmp_path):
    """All 25 responses of two tokens over five symbols, each by its probability: E[uniform] = E[exact KL]."""
    letters = tiny.tokenizer("x")
    student, teacher = (
        tiny.save(tiny.qwen3(seed=seed, rows=5), tmp_path / str(seed), with_tokenizer=letters) for seed in (1, 2)
    )
    models = ReplayModels(student, teacher, dtype="float64")
    sums: list[Gradient] = []
    total = 0.0
    for response in product(range(5), repeat=2):
        plain = record_of(response, torch.zeros(1, 2, dtype=torch.float64))
        scored, _ = models.replay(plain, Uniform())
        own = record_of(response, scored.signal.student_logprobs)  # the sampler is the student: importance weight 1
        probability = float(scored.signal.student_logprobs.sum().exp())
        total += probability
        pair = [models.replay(own, Uniform())[1], models.replay(own)[1]]
        pair = [[probability * part for part in gradient] for gradient in pair]
        sums = (
            pair if not sums else [[a + b for a, b in zip(*both, strict=True)] for both in zip(sums, pair, strict=True)]
        )
    sampled, exact = sums  # equal up to the float32 inside the model's norms
    assert total == pytest.approx(1.0, abs=1e-12)
    assert relative(sampled, exact) < 1e-6 and cosine(sampled, exact) == pytest.approx(1.0, abs=1e-12)


def record_of(response: tuple[int, ...], logprobs: torch.Tensor) -> StepRecord:
    """A saved batch of one response behind a prompt of three tokens."""
    shape = replace(cases.rollout(), sampler_logprobs=torch.zeros(7, 9)).rows(torch.tensor([0])).trimmed()
    ids = torch.tensor([response])
    mask = torch.ones_like(ids, dtype=torch.bool)
    prompts = replace(shape.prompts, ids=torch.tensor([[2, 4, 3]]), mask=torch.ones(1, 3, dtype=torch.bool))
    rollout = Rollout(prompts, ids, mask, logprobs, shape.finish_reason, shape.provenance)
    return StepRecord(
        rollout=rollout, signal=_silent(mask), weights=mask.double(), kept=mask, loss=mask.double(), clipped=~mask,
        finish_reason=shape.finish_reason, sampled_tokens=mask.sum(), grad_norm=torch.zeros(()), progress=0.0, step=1,
        seconds={},
    )  # fmt: skip


def _silent(mask: torch.Tensor) -> Any:
    from lit_opd.types import TokenSignal

    return TokenSignal(student_logprobs=mask.double(), teacher_logprobs=mask.double(), mask=mask)


def test_what_was_not_stored_is_computed_with_the_models_only(saved, models):
    with pytest.raises(InputError, match="FiRe.*student_entropy, teacher_entropy.*--student"):
        replay_files([saved], {"FiRe": FiRe()})
    (sums,) = replay_files([saved], {"FiRe": FiRe()}, models=models).weights.values()
    record, _ = models.replay(load_record(saved), FiRe())
    assert record.signal.student_entropy is not None
    assert sums.to_json()["weight_mean"] == pytest.approx(1.0)  # FiRe's rows have mean 1


def test_another_student_than_the_run_s_is_noted(saved, folders):
    (note,) = replay_files([saved], {"u": Uniform()}, models=ReplayModels(folders[1], folders[1])).notes
    assert "the given student is not the one of the run" in note


# -- wrong input -------------------------------------------------------------------------------------------------------


def test_strategies_take_arguments_as_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "own_file.py").write_text("from lit_opd.weighting import Uniform\n\nclass Mine(Uniform):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = read_strategies(
        [
            "Uniform",
            "{class_path: ImportanceWeighting, init_args: {w_max: 4}}",
            '{"class_path": "SequenceMeanOne", "init_args": {"strategy": {"class_path": "DASH"}}}',
            "own_file.Mine",
        ]
    )
    assert list(found) == ["Uniform", "ImportanceWeighting(w_max=4)", "SequenceMeanOne(strategy=DASH)", "Mine"]
    assert found["ImportanceWeighting(w_max=4)"].w_max == 4


def wrong_inputs(root: Path, saved: Path, folders: tuple[str, str]) -> dict[str, tuple[list[str], list[str]]]:
    """Words after ``compare``, and what the one line must say."""
    fine = write_run(root / "fine", known(1, 0.01), seed=1, strategy="Uniform")
    other = write_run(root / "other", known(2, 0.01), seed=2, strategy="DASH")
    going = write_run(root / "going", known(1, 0.01), seed=1, strategy="DASH")
    (going / "summary.json").unlink()
    stale = write_run(root / "stale", known(1, 0.01), seed=1, strategy="DASH")
    summary = json.loads((stale / "summary.json").read_text())
    (stale / "summary.json").write_text(json.dumps(summary | {"steps": 20}))
    again = write_run(root / "again", known(1, 0.01), seed=1, strategy="DASH")
    broken = write_run(root / "broken", known(1, 0.01), seed=1, strategy="DASH")
    (broken / "config.yaml").write_text("a: [")
    nan = write_run(root / "nan", {"greedy": [math.nan] * len(STEPS)}, seed=1, strategy="DASH")
    alien = root / "alien.safetensors"
    alien.write_text("hello")
    out = ["--out", str(root / "out")]

    def runs(*found: Any, baseline: str = "Uniform") -> list[str]:
        return ["runs", "--runs", *map(str, found), "--baseline", baseline, *out]

    def replay(path: Path, *strategies: str) -> list[str]:
        return ["replay", "--rollouts", str(path), "--strategies", *strategies, *out]

    return {
        "no such folder": (runs(root / "nowhere"), ["--runs", "nowhere"]),
        "unfinished": (runs(fine, going), ["going", "summary.json", "--ckpt_path last"]),
        "trained further": (runs(fine, stale), ["stale", "step 40", "20"]),
        "no common seed": (runs(fine, other), ["common seed", "Uniform (1)", "DASH with 2"]),
        "no such baseline": (runs(fine, baseline="iw"), ["--baseline", "Uniform", "'iw'"]),
        "same seed twice": (runs(fine, f"Uniform={again}"), ["fine", "again", "seed 1", "--group_by"]),
        "broken config": (runs(fine, broken), ["broken/config.yaml", "YAML"]),
        "no number in metrics": (runs(fine, nan), ["nan/metrics.csv", "'nan'"]),
        "no such metric": ([*runs(fine), "--target", "speed=1"], ["--target", "greedy", "'speed'"]),
        "no number": ([*runs(fine), "--target", "greedy"], ["--target", "'greedy'"]),
        "no such key": ([*runs(fine), "--group_by", "model.speed"], ["--group_by", "model.speed"]),
        "unknown strategy": (replay(saved, "Nonsense"), ["--strategies", "Nonsense"]),
        "unknown argument": (replay(saved, "{class_path: Geometric, init_args: {gama: 1}}"), ["--strategies", "gama"]),
        "value out of range": (
            replay(saved, "{class_path: ImportanceWeighting, init_args: {w_max: 0.5}}"),
            ["w_max", "0.5"],
        ),
        "twice": (replay(saved, "Uniform", "Uniform"), ["Uniform twice"]),
        "other file": (replay(alien, "Uniform"), ["alien.safetensors"]),
        "no such file": (replay(root / "step-9.safetensors", "Uniform"), ["step-9.safetensors"]),
        "one model": ([*replay(saved, "Uniform"), "--student", folders[0]], ["--teacher", "together"]),
    }


def test_wrong_input_is_one_line(tmp_path, saved, folders, capsys):
    for name, (words, expected) in wrong_inputs(tmp_path, saved, folders).items():
        with pytest.raises(SystemExit) as exit_:
            main(list, ["compare", *words])
        error = capsys.readouterr().err.strip()
        assert exit_.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1, (name, error)
        assert all(part in error for part in expected), (name, error)
    assert not (tmp_path / "out").exists()


# -- real runs ---------------------------------------------------------------------------------------------------------


def commands_of_the_page() -> list[list[str]]:
    """What docs/compare.md tells to type, behind ``python train.py``"""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(), flags=re.S)
    return [shlex.split(line)[2:] for block in blocks for line in block.splitlines()]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository, with two short fits of the quickstart in runs/, whole batches saved."""
    for name in ("configs", "lit_opd", "callbacks", "examples", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--data.prompt_batch", "8"]
    small += ["--data.val_limit", "8", "--wandb.mode", "disabled", "--model.sampler.max_new_tokens", "12"]
    small += ["--trainer.callbacks+", "callbacks.RolloutSamples", "--trainer.callbacks.save_rollouts_every", "1"]
    for folder, strategy in (("uniform-1", "Uniform"), ("iw-1", "ImportanceWeighting")):
        words = ["--model.weighting", strategy, "--run_dir", f"runs/{folder}"]
        main(default_callbacks, ["fit", "--config", "configs/quickstart.yaml", *small, *words])
    return tmp_path


@pytest.mark.slow
def test_real_runs_and_their_rollouts_are_compared_as_the_page_says(workplace):
    """Every command of the page, the first comparison as a process of its own; each run has its own
    page; sweeps are trained in tests/sweep."""
    for folder in ("uniform-1", "iw-1"):
        page = Reader(Path(f"runs/{folder}/report.html").read_text()).text
        summary = json.loads(Path(f"runs/{folder}/summary.json").read_text())
        assert f"{summary['strategy']}, 2 steps" in page and "Finished." in page
        drawn = run_folder.drawings(Path(f"runs/{folder}/report.html").read_text())
        assert drawn["KL(student || teacher)"]["series"][0]["y"][-1] == pytest.approx(
            summary["reverse_kl_end"], rel=1e-5
        )
        assert ("Weight (0 where dropped)" in drawn) == (folder == "iw-1")
    commands = commands_of_the_page()
    for command in (words for words in commands if words[0] == "sweep"):
        with pytest.raises(SystemExit, match="^0$"):
            entry.main([*command, *([] if "--dry_run" in command else ["--dry_run"])])
    first, *others = [words for words in commands if words[0] == "compare"]
    done = subprocess.run([sys.executable, "train.py", *first], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ImportanceWeighting: one paired seed (42)" in done.stdout and "Traceback" not in done.stderr
    report = json.loads(Path("runs/compare/compare.json").read_text())
    summary = json.loads(Path("runs/iw-1/summary.json").read_text())
    assert (
        report["variants"]["ImportanceWeighting"]["metrics"]["reverse_kl"]["end"]["mean"] == summary["reverse_kl_end"]
    )
    assert report["horizons"]["reverse_kl/tokens"] <= summary["tokens"]
    for command in others:
        main(list, command)
    assert json.loads(Path("runs/compare/compare.json").read_text())["baseline"] == "lit_opd.weighting.Uniform"

    replayed = json.loads(Path("runs/replay/compare.json").read_text())
    uniform = replayed["strategies"]["Uniform"]["gradient"]
    assert not replayed["notes"] and uniform["cosine"]["uniform"] == pytest.approx(1)
    record = load_record("runs/uniform-1/rollouts/step-1.safetensors")
    assert uniform["norm"] == pytest.approx(float(record.grad_norm), rel=1e-3)
    for name in ("weights.png", "cosines.png"):
        assert_drawn(Path("runs/replay") / name)


def test_a_saved_record_replays_after_a_round_trip(saved, tmp_path):
    """What another tool writes with ``save_record`` is read too."""
    again = save_record(load_record(saved), tmp_path / "copy.safetensors")
    first, second = (
        replay_files([path], {"u": ImportanceWeighting()}).weights["u"].to_json() for path in (saved, again)
    )
    assert first == second
