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

from benchmarks.studies.plans import digest
from benchmarks.studies.reproduce import worker
from benchmarks.studies.reproduce.assets import build_asset, paths_of, split_of
from benchmarks.studies.reproduce.hypotheses import (
    ALPHA,
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
from benchmarks.studies.reproduce.referee import (
    NOT_FINISHED,
    PART,
    compact,
    contrast_table,
    ends_of,
    keep,
    measure_table,
    overview,
    tallied,
    write_referee,
)
from benchmarks.studies.reproduce.results import all_results, area
from lit_opd.cli.command import OPDCLI
from lit_opd.compare.statistics import TwoWay, mean_interval, two_way
from lit_opd.errors import InputError
from lit_opd.testbed import read_records
from lit_opd.weighting import WeightingStrategy
from tests.helpers.made_runs import FEW, PARTS, REFEREE, STEPS, outcome_of, plan_of, synthetic, tiny_plan

ALL_SEEDS = 10
NUM_VAL = 1024
ROOT = Path(__file__).resolve().parents[2]


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


def test_the_plan_and_its_runs_are_those_that_finished_runs_are_known_by():
    """By one bit more or less every finished run would count as another plan's."""
    settings = sorted((job.name, job.settings_sha) for job in jobs_of())
    assert plan_of().sha == "41d62fee2abbde2b529b05ab2f95558c517677c39f1ca532552861de47bc9898"
    assert digest(settings) == "0b9dddd76b28de4f1400c82c0dfb20f5eda02991812d3cc1e4c5e67883bded41"


# -- what a seed moves ---------------------------------------------------------------------------------------------------


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


def test_seeds_share_a_quarter_of_their_problems_and_what_that_hides_is_what_the_page_says():
    """Each problem adds to what is learnt: seeds that draw from one pool differ less than from pools of their own."""
    spec, generator = {"num_train": 16}, np.random.default_rng(0)
    means, within, shared = [], [], []
    for study in range(400):
        pool = generator.normal(size=64).tolist()
        drawn = [
            split_of(spec | {"split": ALL_SEEDS * study + seed}, list(enumerate(pool))) for seed in range(ALL_SEEDS)
        ]
        of_seeds = [np.mean([value for _, value in rows]) for rows in drawn]
        means.append(np.mean(of_seeds))
        within.append(np.var(of_seeds, ddof=1) / ALL_SEEDS)
        shared.append(len({at for at, _ in drawn[0]} & {at for at, _ in drawn[1]}) / 16)
    assert np.mean(shared) == pytest.approx(0.25, abs=0.02)
    assert np.var(means) / np.mean(within) == pytest.approx(1 + ALL_SEEDS / 3, rel=0.2)


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


def seen(low: float, high: float) -> TwoWay:
    """999 equal steps around the middle, and no seeds that differ."""
    middle = (low + high) / 2
    return TwoWay(middle, scale=0.0, freedom=3, again=np.linspace(low, high, 999) - middle)


def test_evidence_is_of_the_nearer_bound():
    draws = seen(0.001, 0.099)
    assert evidence(draws, "above", 0.0) == (pytest.approx(0.002), True)
    assert evidence(draws, "below", 0.0) == (pytest.approx(0.002), False)
    p, agrees = evidence(draws, "equal", 0.1)
    assert p == pytest.approx(0.002) and agrees
    p, agrees = evidence(draws, "equal", 0.06)  # inside, but four tenths of the draws lie outside
    assert p == pytest.approx(0.8, abs=0.02) and agrees
    p, agrees = evidence(draws, "equal", 0.0005)
    assert p == pytest.approx(0.002) and not agrees
    mirrored = seen(-0.099, -0.001)
    assert evidence(mirrored, "below", 0.0) == (pytest.approx(0.002), True)
    assert evidence(mirrored, "equal", 0.06)[0] == pytest.approx(0.8, abs=0.02)
    assert evidence(mirrored, "equal", 0.0005) == (pytest.approx(0.002), False)


@pytest.mark.parametrize("expect", ["above", "equal"])
def test_a_verdict_at_five_percent_is_an_interval_that_leaves_the_bound_out(expect):
    """Of the same bootstrap: where 0, or a margin, is moved over an end of the interval, p goes through 0.05."""
    found = two_way(np.random.default_rng(2).normal(0.5, 1.0, (5, 60)))
    low, high = found.interval()
    for end, inwards in ((low, 1), (high, -1)):
        for step, decided in ((-1e-3, True), (1e-3, False)):
            bound = end + inwards * step
            if expect == "equal":  # both margins lie far off but for the one at the end
                moved = TwoWay(found.mean - bound + inwards * -10, found.scale, found.freedom, found.again)
                p, agrees = evidence(moved, "equal", 10.0)
                assert agrees
            else:
                p, _ = evidence(TwoWay(found.mean - bound, found.scale, found.freedom, found.again), "above", 0.0)
            assert (p - 2 / len(found.again) < ALPHA) == decided, (end, step, p)


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
    found = findings(plan_of(), Outcomes(synthetic(jobs, LIFTS), draws=2000))
    assert {name: verdict(each) for name, each in found.items()} == VERDICTS
    elsewhere = [each for each in found["H1"] if each.condition == "chain-24"]
    assert all(each.estimate is None and each.verdict == "not decided" for each in elsewhere)


def test_a_difference_has_one_interval_wherever_it_is_shown():
    """The table of contrasts and the overview of a page: the same pair, the same ends."""
    jobs = [job for job in jobs_of() if job.condition == "base"]
    outcomes = Outcomes(synthetic(jobs, LIFTS), draws=300)
    found = [each for of in findings(plan_of(), outcomes).values() for each in of if each.estimate]
    assert len(found) > 8
    for each in found:
        asked = each.contrast
        assert each.estimate == outcomes.estimate(each.condition, asked.variant, asked.minus, asked.measure)


def test_a_study_that_has_hardly_begun_decides_nothing():
    one = [job for job in jobs_of() if job.condition == "base" and job.seed == 1000]
    for records in ([], synthetic(one, LIFTS)):
        found = findings(plan_of(), Outcomes(records, draws=200))
        assert {verdict(each) for each in found.values()} == {"not decided"} and len(found) == 8


def partly_finished() -> list[dict[str, Any]]:
    """Base: uniform with three seeds, cdd with three others of which two are the same, one run each of what is left.

    all-legal has one run, of a variant without its partner there.
    """
    done = {("uniform", 0), ("uniform", 1), ("uniform", 2), ("cdd", 1), ("cdd", 2), ("cdd", 3), ("last-30", 0)}
    done |= {("sparse-10", 3)}
    jobs = [job for job in jobs_of() if job.condition == "base" and (job.variant, job.seed - 1000) in done]
    alone = [job for job in jobs_of() if (job.condition, job.variant, job.seed) == ("all-legal", "prefix-ratio", 1000)]
    return synthetic(jobs + alone, LIFTS)


def areas_of(records: list[dict[str, Any]], variant: str) -> dict[int, float]:
    """By hand: trapezoids of ten steps over forty."""
    runs = {each["seed"]: [v for _, v in each["curves"]["greedy"]] for each in records if each["variant"] == variant}
    return {seed: (h[0] / 2 + h[1] + h[2] + h[3] + h[4] / 2) / 4 for seed, h in runs.items()}


def test_a_difference_is_of_the_seeds_that_both_have_and_says_of_how_many():
    plan, records = plan_of(), partly_finished()
    outcomes = Outcomes(records)
    ours, theirs = areas_of(records, "cdd"), areas_of(records, "uniform")
    found = outcomes.estimate("base", "cdd", "uniform", "area")
    assert found.count == 2 and found.mean == pytest.approx(np.mean([ours[s] - theirs[s] for s in (1001, 1002)]))
    of = {name: outcomes.runs["base", name] for name in ("uniform", "cdd", "last-30", "sparse-10")}
    own = {name: {"area": outcomes.estimate("base", name, None, "area")} for name in of}
    versus = {n: {"area": outcomes.estimate("base", n, "uniform", "area")} for n in of if n != "uniform"}
    table = measure_table(list(of), of, own, versus, ["area"])
    rows = {cells[0]: cells for cells in (line[2:-2].split(" | ") for line in table.splitlines())}
    assert [rows[name][1] for name in of] == ["3", "3 (2 paired)", "1", "1 (0 paired)"]
    assert f"{np.mean(list(ours.values())):.3f} [" in rows["cdd"][2] and "[" in rows["cdd"][3]
    assert "[" not in "".join(rows["last-30"]) and rows["sparse-10"][3] == ""
    table = "".join(overview(plan, outcomes, "area"))
    assert "all-legal" not in table and "prefix-ratio" not in table and "sparse-10" not in table


def test_a_partly_finished_study_claims_no_more_than_it_has():
    plan, records = plan_of(), partly_finished()
    found = findings(plan, Outcomes(records, draws=200))
    assert {verdict(each) for each in found.values()} == {"not decided"}
    rows = [line[2:-2].split(" | ") for line in contrast_table(plan, hypotheses_of(plan), found).splitlines()[2:]]
    known = {(row[0], row[3]): row for row in rows if row[-1] != "not run"}
    assert set(known) == {("H8", "base, primary")}  # uniform alone; no other has both sides of a pair
    assert known["H8", "base, primary"][7] == "3 of 10" and "[" in known["H8", "base, primary"][4]
    assert all(row[4:7] == ["", "", ""] and row[7] == "0 of 10" for row in rows if row[-1] == "not run")
    assert tallied(found["H3"]) == "4 not decided (4 not run)" and tallied(found["H8"]) == "1 not decided"


def test_a_claim_with_a_primary_contrast_that_has_not_run_is_not_supported():
    """The prefix ratio and its window in base, far above uniform; nothing in all-legal, where they should be below it."""
    names = ("uniform", "prefix-ratio", "windowed-ratio")
    jobs = [job for job in jobs_of() if job.condition == "base" and job.variant in names]
    found = findings(plan_of(), Outcomes(synthetic(jobs, LIFTS), draws=2000))
    assert tallied(found["H3"]) == "2 supported, 2 not decided (2 not run)" and verdict(found["H3"]) == "not decided"
    secondary = [each for each in found["H3"] if each.adjusted is None]
    assert secondary and all(each.estimate is None for each in secondary)


def test_a_verdict_that_decides_nothing_stands_in_parentheses():
    names, conditions = ("uniform", "null-advantage"), ("base", "all-legal")
    jobs = [job for job in jobs_of() if job.condition in conditions and job.variant in names and job.seed < 1004]
    found = findings(plan_of(), Outcomes(synthetic(jobs, LIFTS), draws=2000))
    table = contrast_table(plan_of(), hypotheses_of(plan_of()), found)
    rows = {tuple(line[2:-2].split(" | ")[::3][:2]): line for line in table.splitlines() if line.startswith("| H5")}
    assert rows["H5", "base, primary"].endswith("| 4 of 10 | contradicted |")
    assert rows["H5", "all-legal"].endswith("|  | 4 of 10 | (contradicted) |")


def test_one_seed_has_a_difference_and_no_p():
    """1.000 would read as a test that was made."""
    jobs = [job for job in jobs_of() if job.condition == "base" and job.variant in ("uniform", "null-advantage")]
    records = synthetic([job for job in jobs if job.seed == 1000], LIFTS)
    table = contrast_table(plan_of(), hypotheses_of(plan_of()), findings(plan_of(), Outcomes(records, draws=200)))
    (row,) = (line[2:-2].split(" | ") for line in table.splitlines() if "| H5 |" in line and "primary" in line)
    ours, theirs = (areas_of(records, name)[1000] for name in ("null-advantage", "uniform"))
    assert row[4:] == [f"{ours - theirs:+.3f}", "", "", "1 of 10", "not decided"]


def test_before_training_the_runs_of_a_seed_count_once():
    """Three variants of one seed start alike: two seeds are two values, not four."""
    records = [
        {"seed": seed, "kl_bands": [[0, [value] * 9 + [None]]]}
        for seed, value in ((1, 1.0), (1, 1.0), (1, 1.0), (2, 3.0))
    ]
    found = ends_of(records, 0, slice(-3, None))
    assert found == mean_interval([1.0, 3.0]) and found.count == 2


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
    gaps = {key: np.mean([late - early for _, early, late in record["kl"]]) / 1000 for key, record in of.items()}
    wider = np.mean([gaps["last-30", seed] - gaps["uniform", seed] for seed in (1000, 1001)])
    narrows = page.split("### The gap (late minus early KL) minus that of uniform\n")[1].split("###")[0]
    (row,) = [line[2:-2].split(" | ") for line in narrows.splitlines() if line.startswith("| last-30 |")]
    assert row[1].strip("*").startswith(f"{wider:+.3f} [")
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
