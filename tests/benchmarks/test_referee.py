"""The referee study: what its seeds move, what a record keeps by problem, and the verdicts of its hypotheses."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch

from benchmarks.studies.reproduce import worker
from benchmarks.studies.reproduce.assets import build_asset, paths_of
from benchmarks.studies.reproduce.hypotheses import (
    MEASURES,
    Outcomes,
    evidence,
    findings,
    holm,
    hypotheses_of,
    verdict,
)
from benchmarks.studies.reproduce.outcomes import by_problem, packed, unpacked
from benchmarks.studies.reproduce.plan import PLAN, Job, Plan, missing, read_plan
from benchmarks.studies.reproduce.problems import KeptAnswers, KeptDivergence
from benchmarks.studies.reproduce.referee import NOT_FINISHED, PART, compact, keep, write_referee
from benchmarks.studies.reproduce.results import all_results, area
from lit_opd.cli.command import OPDCLI
from lit_opd.errors import InputError
from lit_opd.testbed import read_records
from lit_opd.weighting import WeightingStrategy

REFEREE = PLAN.parent / "referee.yaml"
PARTS = ("base", "full")
ALL_SEEDS = 10
NUM_VAL = 1024
ROOT = Path(__file__).resolve().parents[2]


@cache
def plan_of() -> Plan:
    return read_plan(REFEREE)


@cache
def jobs_of() -> list[Job]:
    return plan_of().jobs(PARTS)


# -- the plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_has_the_seeds_and_conditions_the_hypotheses_ask_for():
    plan = plan_of()
    jobs = jobs_of()
    assert len({job.name for job in jobs}) == len(jobs) == (3 * 14 + 12) * ALL_SEEDS + 2 * 7 * 5
    for hypothesis in hypotheses_of(plan):
        for contrast in hypothesis.contrasts:
            for condition in contrast.conditions:
                seeds = plan.variants_of(condition)
                assert len(seeds[contrast.variant]) == ALL_SEEDS
                assert contrast.minus is None or len(seeds[contrast.minus]) == ALL_SEEDS
    assert {job.assets["data"][1]["num_val"] for job in jobs} == {NUM_VAL}


def test_no_seed_was_used_before():
    own = [seed for name in ("main", "tuning") for seed in plan_of().content["seeds"][name]]
    others = {
        seed
        for name in ("plan", "search", "confirm", "controls")
        for seeds in read_plan(PLAN.parent / f"{name}.yaml").content["seeds"].values()
        for seed in seeds
    }
    assert len(own) == len(set(own)) and not set(own) & (others | {0, 1, 2, 3, 4, 42})
    plan = plan_of()
    assert not {job.seed for job in plan.tuning_jobs()} & {job.seed for job in jobs_of()}
    assert "tuning" not in {job.condition for job in jobs_of()}  # learning rates are not tuned on what is measured


def test_a_stopped_study_has_whole_seeds():
    """Base first; then the three other conditions of ten seeds side by side; then the rest."""
    order = [(job.condition, job.seed) for job in jobs_of()]
    ten = ["all-legal", "perturbed-teacher", "chain-24"]
    rest = ["second-pair", "chain-6"]
    main = plan_of().content["seeds"]["main"]
    want = [("base", seed) for seed in main for _ in range(14)]
    want += [(name, seed) for seed in main for name in ten for _ in range(12 if name == "chain-24" else 14)]
    assert order == want + [(name, seed) for seed in main[:5] for name in rest for _ in range(7)]


def test_every_variant_parses_and_is_what_it_names():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--weighting", type=WeightingStrategy)
    for variant in plan_of().content["variants"].values():
        built = parser.instantiate_classes(parser.parse_object({"weighting": variant["weighting"]})).weighting
        assert f"lit_opd.weighting.{type(built).__name__}" == variant["weighting"]["class_path"]
    first = {job.variant: job for job in jobs_of() if job.condition == "base" and job.seed == 1000}
    words = first["null-advantage"].settings["model"]["advantage"]
    assert words == [{"class_path": "lit_opd.advantage.NullAdvantage", "init_args": {"value": -0.5}}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "iw"}, "H2` must name one of uniform, .* got 'iw'"),
        ({"measure": "speed"}, "H2` must name one of area, .* got 'speed'"),
        ({"expect": "more"}, "H2` must name one of above, below, equal, got 'more'"),
        ({"conditions": ["second-pair"], "variant": "sparse-10"}, "must name one of uniform, .* got 'sparse-10'"),
        ({"when": 1}, "must have the keys conditions, expect, variant, got .*when"),
    ],
)
def test_a_hypothesis_of_what_the_plan_does_not_have_is_refused(change, message):
    content = copy.deepcopy(plan_of().content)
    content["hypotheses"]["H2"]["contrasts"][0] |= change
    with pytest.raises(InputError, match=message):
        hypotheses_of(Plan(content, REFEREE))
    if change == {"expect": "more"}:
        content["hypotheses"]["H2"]["contrasts"][0]["expect"] = "equal"
        content["margin"] = 0
        with pytest.raises(InputError, match="margin` must be above 0"):
            hypotheses_of(Plan(content, REFEREE))


# -- what a seed moves ---------------------------------------------------------------------------------------------------


def small(spec: dict[str, Any]) -> dict[str, Any]:
    return spec | {"pool": 64, "num_train": 16, "num_val": 8}


def tiny_plan() -> Plan:
    """The plan with little data, and runs of a moment in base and second-pair."""
    content = copy.deepcopy(plan_of().content)
    content["data"] = {name: small(spec) for name, spec in content["data"].items()}
    tiny = {"hidden_size": 16, "num_steps": 1, "cosine": False, "chain_length": 2}
    content["models"] |= {"teacher": tiny | {"seed": 0}, "student": tiny | {"seed": 1}}
    content["data"] = {name: spec | {"chain_length": 2} for name, spec in content["data"].items()}
    models = {"teacher": "teacher", "student": "student"}
    for name in ("base", "second-pair"):
        content["conditions"][name]["models"] |= models
    settings = content["settings"]
    settings["checkpoint_every"], settings["trainer"] = (
        1,
        settings["trainer"] | {"max_steps": 2, "val_check_interval": 1},
    )
    settings["model"]["sampler"] = settings["model"]["sampler"] | {"init_args": {"max_new_tokens": 12}}
    settings["data"] |= {"prompt_batch": 4, "val_batch": 4}
    return Plan(content, REFEREE)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, list[Any]]:
    """Two seeds of base and one of second-pair, with what they train on."""
    plan, root = tiny_plan(), tmp_path_factory.mktemp("referee")
    jobs = [
        job
        for job in plan.jobs(PARTS)
        if job.variant == "iw-1.5"
        and (job.condition, job.seed) in (("base", 1000), ("base", 1001), ("second-pair", 1000))
    ]
    for asset in missing(jobs, root):
        build_asset(asset, root)
    return plan, root, jobs


def prompts_of(job: Any, root: Path, part: str) -> list[str]:
    return [row["prompt"] for row in read_records(Path(paths_of(job, root)["data"][part]))]


def test_a_seed_moves_order_and_split_and_conditions_have_problems_of_their_own(built):
    _, root, (first, second, other) = built
    train, val = ([prompts_of(job, root, part) for job in (first, second, other)] for part in ("train", "val"))
    assert val[0] == val[1] and len(val[0]) == 8 and not set(val[0]) & set(val[2])
    assert set(train[0]) != set(train[1]) and all(len(set(each)) == 16 for each in train)
    assert not set(val[0]) & (set(train[0]) | set(train[1]))
    orders = []
    for job in (first, second):
        path = worker.write_config(job, root)
        orders.append(OPDCLI(args=["--config", str(path)], run=False).datamodule.order_seed)
    assert orders == [1000, 1001]  # of the permutations of the training problems


def test_problems_survive_a_records_round_trip_and_add_up_to_what_was_logged(built):
    _, root, (first, *_) = built
    record = json.loads(json.dumps(worker.run_job(first, root)))
    assert record["problems"] == 8 and [step for step, _ in record["right"]] == [0, 1, 2]
    for (step, bits), (logged_step, greedy) in zip(record["right"], record["curves"]["greedy"], strict=True):
        assert step == logged_step and np.mean(unpacked(bits, 8)) == pytest.approx(greedy)
    assert MEASURES["area"](record).mean() == pytest.approx(area(record))
    assert MEASURES["greedy"](record).mean() == pytest.approx(record["curves"]["greedy"][-1][1])
    kl = np.array(record["kl"])
    assert kl.shape == (4, 3)  # one batch of samples
    assert kl[:, 0].mean() / 1000 == pytest.approx(record["curves"]["reverse_kl"][-1][1], rel=0.3)
    assert [step for step, _ in record["kl_bands"]] == [0, 2] and len(record["weight_bands"]) == 10
    weights = [value for value in record["weight_bands"] if value is not None]
    assert min(weights) <= record["means"]["weight_mean"] <= max(weights)


def test_rows_are_kept_in_their_order_and_only_those_that_count():
    kept = KeptAnswers()
    kept.update(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([True, True, False]))
    kept.update(torch.tensor([0.0, 1.0]), torch.tensor([True, True]))
    assert kept.right == [True, False, False, True] and float(kept.compute()) == 0.5
    kept.reset()
    assert kept.right == []


def test_divergence_of_a_rows_ends_is_that_of_hand_arithmetic():
    """Ten tokens: places 0.05 to 0.95, three of them below 0.3 and three from 0.7 on; four tokens: 0.125 and 0.875 alone."""
    kept = KeptDivergence()
    long, short = [float(value) for value in range(10)], [1.0, 2.0, 3.0, 6.0] + [99.0] * 6
    mask = torch.tensor([[True] * 10, [True] * 4 + [False] * 6, [False] * 10])
    kept.update(torch.tensor([long, short, long]), mask)
    assert kept.rows == [[4500, 1000, 8000], [3000, 1000, 6000]]
    assert float(kept.compute()) == pytest.approx((45 + 12) / 14)
    assert kept.bands.compute()[0] == 0.0 and kept.bands.compute()[9] == 9.0
    kept.reset()
    assert kept.rows == [] and not kept.bands.count.any()


def test_bits_come_back_whatever_their_number():
    generator = np.random.default_rng(0)
    for count in (1, 3, 4, 5, 8, 9, 1024):
        verdicts = [bool(bit) for bit in generator.integers(2, size=count)]
        text = packed(verdicts)
        assert unpacked(text, count) == verdicts and len(text) == -(-count // 4)
    assert packed([True] + [False] * 6 + [True]) == "81"


def test_a_run_without_the_file_keeps_nothing_by_problem(tmp_path):
    assert by_problem(tmp_path) == {}


def test_a_step_that_was_validated_twice_counts_once(tmp_path):
    """A resumed run validates the step it was killed in again."""
    line = {"problems": 4, "kl": [[1, 1, 1]], "kl_bands": [0.1], "weight_bands": [1.0]}
    lines = [line | {"step": step, "right": bits} for step, bits in ((0, "1"), (10, "3"), (10, "7"), (20, "f"))]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert by_problem(tmp_path)["right"] == [[0, "1"], [10, "7"], [20, "f"]]


# -- verdicts ------------------------------------------------------------------------------------------------------------


def test_holm_is_that_of_hand_arithmetic():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_evidence_is_of_the_nearer_bound():
    draws = np.linspace(0.001, 0.099, 999)
    assert evidence(draws, 0.05, "above", 0.0) == (pytest.approx(0.002), True)
    assert evidence(draws, 0.05, "below", 0.0) == (pytest.approx(0.002), False)
    p, agrees = evidence(draws, 0.05, "equal", 0.1)
    assert p == pytest.approx(0.002) and agrees
    p, agrees = evidence(draws, 0.05, "equal", 0.06)  # inside, but four tenths of the draws lie outside
    assert p == pytest.approx(0.8, abs=0.02) and agrees
    p, agrees = evidence(draws, 0.05, "equal", 0.0005)
    assert p == pytest.approx(0.002) and not agrees


FEW = 256  # problems of a made run
STEPS = (0, 10, 20, 30, 40)


def outcome_of(job: Any, *, lift: float, generator: np.random.Generator, easy: np.ndarray) -> dict[str, Any]:
    """A finished run: each problem right with its own chance, ``lift`` higher; half a nat more divergence late than early."""
    shift = 0.01 * np.random.default_rng(job.seed).standard_normal()  # of the seed, the same for all variants
    verdicts = generator.random((len(STEPS), FEW)) < easy + shift + lift
    kl = (1000 * np.abs(1 + 0.3 * generator.standard_normal((32, 3)) + np.array([0.25, 0.0, 0.5]))).astype(int)
    bands = [0.1 * band for band in range(10)]
    return {
        "run": job.name,
        "condition": job.condition,
        "variant": job.variant,
        "seed": job.seed,
        "label": "",
        "plan": job.plan,
        "settings": job.settings_sha,
        "learning_rate": 2e-4,
        "tokens": 214_300,
        "cpu_seconds": 40.0,
        "finished": "2026-11-27T08:00:00+00:00",
        "machine": "a machine",
        "code": "0123456789ab",
        "models": {},
        "means": {"weight_mean": 1.0, "weight_ess": 1.0, "grad_norm": 7.0 / 3.0, "clip_fraction": 0.0},
        "curves": {"greedy": [[step, float(each.mean())] for step, each in zip(STEPS, verdicts, strict=True)]}
        | {"avg_at_4": [], "reverse_kl": [[step, 1.0] for step in STEPS]},
        "bands": [[step, bands] for step in STEPS],
        "problems": FEW,
        "right": [[step, packed(list(each))] for step, each in zip(STEPS, verdicts, strict=True)],
        "kl": kl.tolist(),
        "kl_bands": [[0, bands], [40, bands]],
        "weight_bands": [1.0] * 9 + [None],
    }


def synthetic(jobs: list[Any], lifts: dict[str, float]) -> list[dict[str, Any]]:
    """A run for every job; a variant's lift is the same everywhere, but that of the two ratios turns in all-legal."""
    generator = np.random.default_rng(7)
    easy = np.clip(generator.normal(0.6, 0.2, FEW), 0.05, 0.85)
    turning = ("prefix-ratio", "windowed-ratio")
    signs = [-1 if job.variant in turning and job.condition == "all-legal" else 1 for job in jobs]
    return [
        outcome_of(job, lift=sign * lifts.get(job.variant, 0.0), generator=generator, easy=easy)
        for job, sign in zip(jobs, signs, strict=True)
    ]


LIFTS = {"last-30": -0.1, "prefix-ratio": 0.06, "windowed-ratio": 0.06, "null-advantage": -0.3, "cdd": -0.06}
VERDICTS = {
    "H1": "supported",
    "H2": "not decided",  # no effect
    "H3": "supported",
    "H4": "supported",  # no effect, and the interval within the margin
    "H5": "contradicted",
    "H6": "not decided",  # of two contrasts one has no effect
    "H7": "contradicted",
    "H8": "supported",
}


def test_made_effects_are_found_and_null_effects_are_not():
    jobs = [job for job in jobs_of() if job.condition in ("base", "all-legal")]
    found = findings(plan_of(), Outcomes(synthetic(jobs, LIFTS)), draws=2000)
    assert {name: verdict(each) for name, each in found.items()} == VERDICTS
    elsewhere = [each for each in found["H1"] if each.condition == "chain-24"]
    assert all(each.estimate is None and each.verdict == "not decided" for each in elsewhere)


def test_a_study_that_has_hardly_begun_decides_nothing():
    one = [job for job in jobs_of() if job.condition == "base" and job.seed == 1000]
    for records in ([], synthetic(one, LIFTS)):
        found = findings(plan_of(), Outcomes(records), draws=200)
        assert {verdict(each) for each in found.values()} == {"not decided"} and len(found) == 8


def test_the_page_of_an_unfinished_study_is_made_from_what_is_committed(tmp_path):
    """Two seeds of a few variants: the numbers are those of hand arithmetic, and what is kept stays without the runs."""
    plan, out = plan_of(), tmp_path / "docs"
    names = ("uniform", "iw-1.5", "last-30")
    jobs = [job for job in jobs_of() if job.condition == "base" and job.variant in names and job.seed < 1002]
    records = synthetic(jobs, LIFTS)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    out.mkdir()
    (out / "referee.md").write_text(f"before\n{PART.start}\nold\n{PART.end}\nafter\n")
    page = write_referee(plan, tmp_path / "runs", out).read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "\nold\n" not in page
    assert f"{len(jobs)} of {len(jobs_of())} planned runs are finished" in page and NOT_FINISHED in page
    assert "2 of 10" in page and "0 of 10" in page
    of = {(each["variant"], each["seed"]): each for each in records}

    def area_of(name: str) -> float:
        """By hand: trapezoids of ten steps over forty."""
        heights = [[value for _, value in of[name, seed]["curves"]["greedy"]] for seed in (1000, 1001)]
        return float(np.mean([(h[0] / 2 + h[1] + h[2] + h[3] + h[4] / 2) / 4 for h in heights]))

    rows = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| last-30 | 2 |")]
    assert rows[0][2].startswith(f"{area_of('last-30'):.3f} [")
    assert rows[0][3].strip("*").startswith(f"{area_of('last-30') - area_of('uniform'):+.3f} [")
    assert all((out / name).is_file() for name in re.findall(r"\]\((pictures/.*?)\)", page))
    kept = (out / plan.kept).read_text()
    assert len(kept.splitlines()) == len(jobs) and '"learning_rate":0.0002' in kept and '"grad_norm":2.3333' in kept
    again = keep(plan, all_results(tmp_path / "nowhere"), out / plan.kept)  # where no run is
    assert (out / plan.kept).read_text() == kept and [each["run"] for each in again] == [job.name for job in jobs]


def test_a_whole_study_fits_into_three_megabytes():
    job = jobs_of()[0]
    easy = np.full(NUM_VAL, 0.7)
    record = outcome_of(job, lift=0.0, generator=np.random.default_rng(0), easy=easy[:FEW])
    record |= {"right": [[step, "f" * (NUM_VAL // 4)] for step in STEPS], "kl": [[1234, 1234, 1234]] * 128}
    size = len(json.dumps(compact(record), separators=(",", ":")))
    assert size * len(jobs_of()) < 3e6


def test_what_is_kept_is_of_the_committed_plan():
    jobs = {job.name: job for job in jobs_of()}
    kept = [json.loads(line) for line in (ROOT / "docs" / read_plan(REFEREE).kept).read_text().splitlines()]
    assert all(record["settings"] == jobs[record["run"]].settings_sha for record in kept)
    for record in kept:
        bits = {step: np.mean(unpacked(bits, record["problems"])) for step, bits in record["right"]}
        assert all(bits[step] == pytest.approx(value, abs=1e-4) for step, value in record["curves"]["greedy"])
        assert record["problems"] == NUM_VAL
