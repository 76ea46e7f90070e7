"""The search for a default: its plan, and the rule that names candidates."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from benchmarks.studies.reproduce.choice import Candidate, best, candidates
from benchmarks.studies.reproduce.hypotheses import Outcomes
from benchmarks.studies.reproduce.plan import PLAN, Job, Plan, extended, missing, read_plan
from benchmarks.studies.reproduce.referee import PART, write_referee
from lit_opd.compare.statistics import Estimate
from lit_opd.weighting import WeightingStrategy
from tests.helpers.made_runs import PARTS, synthetic

ROOT = Path(__file__).parents[2]
SEARCH = PLAN.parent / "default-search.yaml"


@cache
def plan_of() -> Plan:
    return read_plan(SEARCH)


def jobs_of() -> list[Job]:
    return plan_of().jobs(PARTS)


# -- the plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_has_seeds_and_problems_of_its_own():
    plan, jobs = plan_of(), jobs_of()
    referee = read_plan(PLAN.parent / "referee.yaml")
    known = {*referee.content["seeds"]["main"], *referee.content["seeds"]["tuning"]}
    assert not known & {*plan.content["seeds"]["main"], *plan.content["seeds"]["tuning"]}
    draws = {spec["seed"] for name, spec in plan.content["data"].items() if name.startswith("search-")}
    assert not draws & {spec["seed"] for spec in referee.content["data"].values()} and len(draws) == 4
    assert {job.assets["data"][1]["seed"] for job in jobs} == draws - {410}
    assert {job.assets["data"][1]["seed"] for job in plan.tuning_jobs()} == {410}
    assert len(jobs) == 3 * 3 * len(plan.content["variants"])


def test_the_models_are_the_referees():
    """So that the two share a folder of assets."""
    pairs = [job.assets[role] for job in jobs_of() for role in ("teacher", "student") if role in job.assets]
    assert {name for name, _ in pairs} == {
        "teacher-all-legal",
        "student-all-legal",
        "teacher-chain-6",
        "student-chain-6",
    }
    theirs = read_plan(PLAN.parent / "referee.yaml").content["models"]
    assert all(spec == theirs[name] for name, spec in pairs)


def test_every_candidate_is_a_weighting_and_stands_in_one_group():
    plan = plan_of()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--weighting", type=WeightingStrategy)
    for spec in plan.content["variants"].values():
        words = parser.parse_object({"weighting": spec["weighting"]})
        assert isinstance(parser.instantiate_classes(words).weighting, WeightingStrategy)
    named = [name for names in plan.content["search"]["choose"].values() for name in names]
    assert len(named) == len(set(named)) and set(plan.content["variants"]) - set(named) == {"uniform", "iw-1.5", "clip"}


def test_a_plan_with_rates_of_its_own_takes_none_of_the_other_plans():
    below = read_plan(PLAN.parent / "referee.yaml").content
    own = {"variants": {"uniform": {}}, "conditions": {"base": {}}}
    assert extended(below, own)["learning_rates"] == {"uniform": 2e-4}
    assert extended(below, own | {"learning_rates": {}})["learning_rates"] == {}
    assert "hypotheses" not in extended(below, own) and extended(below, own | {"hypotheses": {}})["hypotheses"] == {}


def test_the_confirmation_has_models_problems_and_seeds_that_no_plan_has():
    plan = read_plan(PLAN.parent / "default-confirm.yaml")
    its_own = {plan.path, PLAN.parent / "default-controls.yaml"}  # the latter counts its runs
    others = [read_plan(path).content for path in PLAN.parent.glob("*.yaml") if path not in its_own]
    assert len(others) >= 6
    seeds = {seed for other in others for purpose in other["seeds"].values() for seed in purpose}
    assert not seeds & {*plan.content["seeds"]["main"]} and len(plan.content["seeds"]["main"]) == 10
    known = [spec for other in others for key in ("models", "data") for spec in other[key].values()]
    draws = {spec["seed"] for other in others for spec in other["data"].values()}
    assets = [asset for job in plan.jobs(PARTS) for asset in job.assets.values()]
    assert {name for name, _ in assets} and not [name for name, spec in assets if spec in known]
    assert not draws & {spec["seed"] for name, spec in assets if "split" in spec}
    assert {role for job in plan.jobs(PARTS) for role in job.assets} == {"teacher", "student", "data"}
    assert not candidates(plan, Outcomes([]))  # it confirms and chooses nothing


def test_the_control_counts_the_confirmations_runs_and_adds_uniform_weights_at_the_candidates_rates():
    confirm, control = (read_plan(PLAN.parent / f"default-{name}.yaml") for name in ("confirm", "controls"))
    theirs = {job.name: job.settings for job in confirm.jobs(PARTS)}
    jobs = control.jobs(PARTS)
    new = {job.variant for job in jobs if job.name not in theirs}
    assert (
        all(job.settings == theirs[job.name] for job in jobs if job.name in theirs)
        and len(jobs) - 3 * 10 * len(new) == 120
    )
    rates = {job.variant: job.settings["model"]["optimizer"]["init_args"]["lr"] for job in jobs}
    assert new == {"uniform-baseline", "full-uniform", "full-vocabulary"}
    assert rates["uniform-baseline"] == rates["windowed-baseline"] == rates["windowed-ratio"]
    assert rates["full-uniform"] == rates["full-windowed"] == 2 * rates["full-vocabulary"]


def test_what_ships_is_what_was_confirmed():
    """The overlay's weighting and objective are those of the plan's runs."""
    overlay = yaml.safe_load((ROOT / "configs" / "objective" / "windowed_kl.yaml").read_text())
    jobs = read_plan(PLAN.parent / "default-confirm.yaml").jobs(PARTS)
    (run, *_) = [job for job in jobs if job.variant == "full-windowed"]
    assert overlay["model"] == {key: run.settings["model"][key] for key in ("objective", "weighting")}


# -- the rule ------------------------------------------------------------------------------------------------------------


def candidate(name: str, *intervals: tuple[float, float, float] | None) -> Candidate:
    estimates = [each and Estimate(*each, 3) for each in intervals]
    return Candidate(name, dict(zip("abc", estimates, strict=True)))


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([], "steady"),
        ([candidate("higher", (0.2, 0.1, 0.3), (0.0, -0.1, 0.1), (0.0, -0.1, 0.1))], "higher"),
        ([candidate("loses once", (0.5, 0.4, 0.6), (0.5, 0.4, 0.6), (-0.1, -0.2, -0.05))], "steady"),
        ([candidate("not run everywhere", (0.5, 0.4, 0.6), (0.5, 0.4, 0.6), None)], "steady"),
    ],
)
def test_named_is_the_largest_mean_of_those_that_lose_nowhere(others, named):
    steady = candidate("steady", (0.06, 0.01, 0.1), (0.06, 0.01, 0.1), (-0.01, -0.05, 0.05))
    found = best([steady, *others])
    assert found is not None and found.name == named
    assert best([candidate("none", None, None, None)]) is None and best([]) is None


def test_the_mean_of_the_conditions_has_an_interval_that_holds_the_truth():
    """Three conditions with spreads of their own, 4,000 times: about 95 % of the means' intervals hold the mean of the truths."""
    rng = np.random.default_rng(3)
    truths, spreads = np.array([0.1, 0.0, -0.05]), np.array([0.01, 0.02, 0.04])
    held = 0
    for draws in truths + spreads * rng.standard_normal((4000, 3)):
        found = candidate("one", *((x, x - 1.96 * s, x + 1.96 * s) for x, s in zip(draws, spreads, strict=True))).mean
        assert found is not None and found.mean == pytest.approx(draws.mean())
        held += found.low <= truths.mean() <= found.high
    assert 0.94 < held / 4000 < 0.96


def test_the_page_names_a_candidate_of_each_group_and_compares_with_every_reference(tmp_path):
    plan, jobs = plan_of(), jobs_of()
    few = ("uniform", "iw-1.5", "cdd", "leaky-ratio", "full-vocabulary", "full-windowed")
    jobs = [job for job in jobs if job.variant in few]
    records = synthetic(jobs, {"leaky-ratio": 0.08, "cdd": 0.03, "full-windowed": 0.1, "full-vocabulary": -0.1})
    assert [each.name for each in candidates(plan, Outcomes(records))["sampled token"]][0] == "cdd"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (tmp_path / "default-search.md").write_text(f"{PART.start}\n{PART.end}\n")
    page = write_referee(plan, tmp_path / "runs", tmp_path).read_text()
    named = [line.split(" | ")[1] for line in page.splitlines() if "**named**" in line]
    assert named == ["leaky-ratio", "full-windowed"]
    assert "### Area minus that of uniform" in page and "### Area minus that of iw-1.5" in page
    assert "### Verdicts" not in page and (tmp_path / plan.kept).is_file()
    assert plan.kept.parts == ("benchmarks", "default-search", "runs.jsonl")
    assert missing(jobs, tmp_path)  # no model was built for this


def test_the_plan_of_the_published_null_counts_the_referees_runs_and_trains_the_least_likely_tokens_beside():
    referee, null = (read_plan(PLAN.parent / f"{name}.yaml") for name in ("referee", "referee-null"))
    theirs = {job.name: job.settings_sha for job in referee.jobs(PARTS)}
    jobs = null.jobs(PARTS)
    new = [job for job in jobs if job.name not in theirs]
    assert all(job.settings_sha == theirs[job.name] for job in jobs if job.name in theirs)
    assert len(jobs) - len(new) == 40 and {job.variant for job in new} == {"null-20", "entropy-null", "least-likely-20"}
    weightings = {(job.settings["model"]["weighting"]["class_path"]) for job in new}
    assert weightings == {"lit_opd.weighting.LeastLikely"}
    fixed = {job.variant for job in new if job.settings["model"].get("advantage")}
    assert fixed == {"null-20", "entropy-null"} and len(new) == 3 * 2 * 10
