"""The evidence bench: what its plan covers, that a killed reproduction goes on, and the report's arithmetic."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonargparse
import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback

import lit_opd.weighting
from benchmarks.studies.figures import BETTER, OPEN, WORSE, draw_estimate, far_of, limit, plt
from benchmarks.studies.plans import merged
from benchmarks.studies.reproduce import tune, worker
from benchmarks.studies.reproduce.__main__ import main
from benchmarks.studies.reproduce.assets import build_asset, paths_of
from benchmarks.studies.reproduce.candidates import (
    AdaptiveFloor,
    Largest,
    LeakyRatio,
    RecoveryCurve,
    SurpriseDrift,
    TeacherCertainty,
    WindowedRatio,
)
from benchmarks.studies.reproduce.pictures import draw_curves, draw_differences
from benchmarks.studies.reproduce.plan import PLAN, Plan, folder_of, missing, read_plan
from benchmarks.studies.reproduce.report import PART, choose, coloured, write_report
from benchmarks.studies.reproduce.results import finish, read_record, read_results
from lit_opd.cli.command import OPDCLI
from lit_opd.compare.statistics import Estimate, mean_height, paired, reached
from lit_opd.errors import InputError
from lit_opd.sweep.crew import TaskFailed
from lit_opd.testbed import make_automaton, make_tokenizer, read_records, sample_problems
from lit_opd.testbed.warmup import (
    NOT_SUPERVISED,
    make_model,
    perturb,
    supervised_batch,
    supervised_step,
    supervised_targets,
)
from lit_opd.types import TokenSignal
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.tilt import PrefixRatioTilt
from lit_opd.weighting.windowed_ratio import WindowedPrefixRatio

START, END = f"{PART.start}\n", f"{PART.end}\n"
SEARCH, CONFIRM = PLAN.parent / "search.yaml", PLAN.parent / "confirm.yaml"
ROOT = Path(__file__).resolve().parents[2]
TINY_SETTINGS = {
    "checkpoint_every": 1,
    "trainer": {"max_steps": 2, "val_check_interval": 1},
    "model": {"sampler": {"init_args": {"max_new_tokens": 12}}, "validation": {"samples": 1}},
    "data": {"prompt_batch": 4, "val_batch": 4},
}
TINY = {"hidden_size": 16, "num_steps": 1, "cosine": False, "chain_length": 2}


def tiny_content() -> dict[str, Any]:
    """The committed plan cut to two variants, two seeds and two steps on models of a moment."""
    content = copy.deepcopy(read_plan().content)
    content["settings"] = merged(content["settings"], TINY_SETTINGS)
    content["tuning"] |= {"condition": "base", "learning_rates": [1e-3, 2e-3], "settings": {}}
    content["learning_rates"] = {}
    content["variants"] = {name: content["variants"][name] | {"seeds": 2} for name in ("uniform", "iw-1.5")}
    assets = {"teacher": "teacher", "student": "student", "data": "data"}
    content["conditions"] = {"base": {"part": "base", "about": "tiny", "models": assets}}
    content["models"] = {"teacher": TINY | {"seed": 0}, "student": TINY | {"seed": 1}}
    content["data"] = {"data": {"chain_length": 2, "seed": 1, "num_train": 16, "num_val": 4}}
    return content


def write_plan(path: Path, content: dict[str, Any]) -> Path:
    """With the markers that tuning writes between."""
    rates = yaml.safe_dump({"learning_rates": content["learning_rates"]})
    rest = yaml.safe_dump({key: value for key, value in content.items() if key != "learning_rates"}, sort_keys=False)
    path.write_text(f"{tune.PART.start}\n{rates}{tune.PART.end}\n{rest}")
    return path


# -- the plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_has_the_runs_the_issue_asks_for():
    plan = read_plan()
    jobs = plan.jobs()
    seeds = {variant: len(found) for variant, found in plan.variants_of("base").items()}
    six = {"uniform", "iw-1.5", "iw-4", "truncated-ratio", "last-30"}
    three = {"first-30", "random-30", "iw-signed", "iw-mean-one", "scale-control", "linear-decay", "iw-reversed"}
    three |= {"iw-shuffled", "late-rising", "trust-region", "teacher-confidence"}
    assert {name for name, count in seeds.items() if count == 6} == six
    assert {name for name, count in seeds.items() if count == 3} == three
    assert set(seeds.values()) == {6, 3, 2}
    assert 90 <= len(jobs) <= 110 and len({job.name for job in jobs}) == len(jobs)
    assert all(job.steps == 40 for job in jobs)


def test_every_weighting_of_the_library_is_in_the_plan():
    text = json.dumps(read_plan().content["variants"])
    classes = set(re.findall(r"lit_opd\.weighting\.(\w+)", text))
    """The plan was fixed before these came; the evidence of WindowedPrefixRatio is confirm.yaml's."""
    found_after = {"WindowedPrefixRatio", "PerTurn", "TurnBalanced", "AfterObservation", "MatchedCurve"}
    found_after |= {
        "CDD",
        "PruneOPD",
        "TAOPD",
        "PGT",
        "SelecTKD",
        "IEROPD",
        "DIALOPD",
        "SparseTokens",
        "FiReRows",
        "REOPOLD",
    }
    found_after |= {"LeastLikely"}
    assert classes == set(lit_opd.weighting.__all__) - {"WeightingStrategy"} - found_after


def test_every_variant_is_the_strategy_it_names():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--weighting", type=WeightingStrategy)
    for variant in read_plan().content["variants"].values():
        built = parser.instantiate_classes(parser.parse_object({"weighting": variant["weighting"]})).weighting
        assert f"lit_opd.weighting.{type(built).__name__}" == variant["weighting"]["class_path"]
    tilt = read_plan().content["variants"]["truncated-ratio"]["weighting"]["init_args"]
    assert tilt == {"alpha": 1.0, "low": float("-inf"), "high": 0.0}


def test_every_condition_parses_and_differs_from_base_in_one_factor(tmp_path):
    plan = read_plan()
    first = {job.condition: job for job in plan.jobs(("base", "full")) if job.variant == "uniform" and job.seed == 10}
    assert set(first) == set(plan.content["conditions"])
    for condition, job in first.items():
        spec = plan.content["conditions"][condition]
        changed = {key for key in ("settings", "models", "rate") if key in spec}
        whole_task = changed == {"settings", "models"} and condition.startswith("chain-")  # lengths follow the chains
        assert whole_task or len(changed) == (condition not in ("base", "zero-weighted"))
        path = tmp_path / f"{condition}.yaml"
        path.write_text(yaml.safe_dump(merged(job.settings, paths_of(job, tmp_path))))
        module = OPDCLI(args=["--config", str(path)], run=False).model
        assert type(module.weighting).__name__ == "Uniform"
        assert (module.aggregation == "token-mean") == (condition == "token-mean")
        assert (type(module.objective).__name__ == "Divergence") == (condition == "full-vocabulary")


def test_development_and_held_out_share_neither_seeds_nor_conditions():
    content = read_plan().content
    seeds = [seed for group in content["seeds"].values() for seed in group]
    assert len(seeds) == len(set(seeds))
    development, held_out = (set(content["search"][name]) for name in ("development", "held_out"))
    assert not development & held_out and development | held_out <= set(content["conditions"])


def test_a_plan_that_extends_another_has_what_it_names_itself():
    whole, search = read_plan(), read_plan(SEARCH)
    assert (
        search.content["settings"] == whole.content["settings"] and search.content["target"] == whole.content["target"]
    )
    assert set(search.content["conditions"]) == set(whole.content["search"]["development"])
    assert search.content["seeds"]["main"] == whole.content["seeds"]["development"]
    for name, condition in search.content["conditions"].items():
        assert condition.get("models") == whole.content["conditions"][name].get("models")
    jobs, others = search.jobs(("base", "full")), {job.name: job for job in whole.jobs(("base", "full"))}
    assert not {job.name for job in jobs} & set(others)  # other seeds
    uniform = next(job for job in jobs if job.variant == "uniform" and job.condition == "base")
    twin = others["base/uniform/seed-10"]
    assert uniform.settings == twin.settings | {"seed_everything": uniform.seed}


def test_the_searchs_own_weightings_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (-4 * torch.rand(3, 12, generator=generator) for _ in range(2))
    entropy = torch.rand(3, 12, generator=generator)
    mask = torch.arange(12) < torch.tensor([12, 7, 1]).unsqueeze(-1)
    signal = TokenSignal(student_logprobs=student, teacher_logprobs=teacher, mask=mask, teacher_entropy=entropy)
    window, drift = WindowedRatio(window=3, low=-2.0), SurpriseDrift(alpha=0.5, low=-2.0)
    sure, most = TeacherCertainty(window=3, alpha=2.0, floor=0.1), Largest([window, drift])
    found = {strategy: strategy(signal, 0.0) for strategy in (window, drift, sure, most)}
    for row, column in mask.nonzero().tolist():
        a, q, h = ((teacher - student)[row].tolist(), teacher[row].tolist(), entropy[row].tolist())
        ratio = math.exp(min(0.0, max(-2.0, sum(a[max(0, column - 3) : column]))))
        surprise = sum(q[k] + h[k] for k in range(column))
        drifted = math.exp(min(0.0, max(-2.0, 0.5 * surprise)))
        recent = h[max(0, column - 2) : column + 1]
        certain = max(0.1, math.exp(-2.0 * sum(recent) / len(recent)))
        expected = {window: ratio, drift: drifted, sure: certain, most: max(ratio, drifted)}
        for strategy, value in expected.items():
            assert float(found[strategy][row, column]) == pytest.approx(value, rel=1e-5)
    assert all(not weights[~mask].any() for weights in found.values())


def test_the_second_searchs_own_weightings_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    student = -3 * torch.rand(4, 12, generator=generator)
    teacher = (
        student + 1.0 - torch.rand(4, 12, generator=generator) * torch.arange(12)
    )  # they part as the response goes on
    mask = torch.arange(12) < torch.tensor([12, 7, 1, 0]).unsqueeze(-1)
    signal = TokenSignal(student_logprobs=student, teacher_logprobs=teacher, mask=mask)
    leaky = LeakyRatio(memory=0.5, floor=0.2)
    curve, floor = RecoveryCurve(nats=2.0, prior=1.0, reach=3), AdaptiveFloor(nats=2.0, prior=1.0, window=4)
    a = (teacher - student).tolist()
    places = [(row, column) for row, column in mask.nonzero().tolist()]
    errors = {(row, column): [k for k in range(column) if a[row][k] <= -2.0] for row, column in places}
    far = {place: place[1] - known[-1] if known else 0 for place, known in errors.items()}

    def mean_of(chosen, start=(0.0, 0)):
        agreed = [math.exp(min(a[row][column], 0.0)) for row, column in chosen]
        return (sum(agreed) + start[0]) / (len(agreed) + start[1])

    whole = mean_of([place for place in places if not far[place]])
    curve_of = {d: min(mean_of([p for p in places if min(far[p], 3) == d], (whole, 1)) / whole, 1.0) for d in (1, 2, 3)}
    smallest = min(mean_of([p for p in places if 0 < far[p] <= 4], (whole, 1)) / whole, 1.0)
    assert 0.3 < smallest < 0.95 and any(value < 0.95 for value in curve_of.values())  # else nothing is tested
    for row, column in places:
        kept = sum(0.5 ** (column - 1 - k) * a[row][k] for k in range(column))
        window = math.exp(min(0.0, sum(a[row][max(0, column - 4) : column])))
        expected = {
            leaky: max(math.exp(min(kept, 0.0)), 0.2),
            curve: curve_of[min(far[row, column], 3)] if far[row, column] else 1.0,
            floor: max(window, smallest),
        }
        for strategy, value in expected.items():
            assert float(strategy(signal, 0.0)[row, column]) == pytest.approx(value, rel=1e-5)


def test_where_no_error_is_seen_the_estimated_reliability_is_whole():
    mask = torch.tensor([[True, True, True], [False, False, False]])
    agreed = TokenSignal(
        student_logprobs=torch.full((2, 3), -1.0), teacher_logprobs=torch.full((2, 3), -1.2), mask=mask
    )
    none = TokenSignal(
        student_logprobs=agreed.student_logprobs, teacher_logprobs=agreed.teacher_logprobs, mask=mask & False
    )
    for strategy in (RecoveryCurve(), AdaptiveFloor()):
        assert torch.equal(strategy(agreed, 0.0) == 1.0, mask)
        assert not strategy(none, 0.0).any()


def test_the_shipped_weighting_is_the_one_that_was_confirmed():
    """The search ran a class of its own; a window as long as the response is the tilt with that floor."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (-3 * torch.rand(4, 30, generator=generator) for _ in range(2))
    mask = torch.arange(30) < torch.tensor([30, 20, 1, 0]).unsqueeze(-1)
    signal = TokenSignal(student_logprobs=student, teacher_logprobs=teacher, mask=mask)
    spec = read_plan(CONFIRM).content["variants"]["window-8-floor-0.3"]["weighting"]["init_args"]
    shipped, tried = (strategy(signal, 0.0) for strategy in (WindowedPrefixRatio(), WindowedRatio(**spec)))
    torch.testing.assert_close(shipped, tried, rtol=1e-6, atol=0.0)
    whole = PrefixRatioTilt(alpha=1.0, low=math.log(0.3), high=0.0)(signal, 0.0)
    torch.testing.assert_close(WindowedPrefixRatio(window=30)(signal, 0.0), whole, rtol=1e-6, atol=0.0)
    assert not torch.allclose(shipped, whole)


def test_the_confirmation_is_on_what_was_held_out():
    whole, confirm = read_plan(), read_plan(CONFIRM)
    assert set(confirm.content["conditions"]) == set(whole.content["search"]["held_out"])
    assert confirm.content["seeds"]["main"] == whole.content["seeds"]["held_out"]
    assert confirm.content["settings"] == whole.content["settings"]
    jobs = confirm.jobs(("base", "full"))
    assert len(jobs) == 96 and {job.settings["model"]["optimizer"]["init_args"]["lr"] for job in jobs} == {2e-4}


def test_the_controls_share_the_main_plans_runs():
    parts = ("base", "full")
    jobs = read_plan(PLAN.parent / "controls.yaml").jobs(parts)
    known = {job.name: job for job in read_plan().jobs(parts)}
    shared = [job for job in jobs if job.name in known]
    assert {job.variant for job in shared} == {"uniform", "iw-1.5", "truncated-ratio"}
    assert len(jobs) == 6 * 6 + 2 * 4 * 3 and len(shared) == 3 * 6 + 2 * 3 * 3
    assert all(job.settings_sha == known[job.name].settings_sha for job in shared)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--weighting", type=WeightingStrategy)
    for job in jobs:
        parser.instantiate_classes(parser.parse_object({"weighting": job.settings["model"]["weighting"]}))


def test_the_hash_is_of_the_content_alone(tmp_path):
    plan = read_plan()
    commented = tmp_path / "plan.yaml"
    commented.write_text("# another comment\n" + PLAN.read_text())
    assert read_plan(commented).sha == plan.sha
    changed = copy.deepcopy(plan.content)
    changed["variants"]["iw-1.5"]["weighting"]["init_args"]["w_max"] = 1.6
    other = Plan(changed, PLAN)
    assert other.sha != plan.sha
    differing = [a.variant for a, b in zip(plan.jobs(), other.jobs(), strict=True) if a.settings_sha != b.settings_sha]
    assert differing == ["iw-1.5"] * 6  # the other runs are what they were


@pytest.mark.parametrize("name", ["plan", "search", "confirm", "controls"])
def test_finished_results_are_still_those_of_their_plan(name):
    """The page of each plan has the hash it was made under; class paths are part of it, wherever the classes are now."""
    plan = read_plan(PLAN.parent / f"{name}.yaml")
    assert f"Plan sha256 `{plan.sha}`" in (ROOT / "docs" / plan.page).read_text()


def test_the_searchs_class_paths_are_its_weightings():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--weighting", type=WeightingStrategy)
    own = {}
    for name, variant in read_plan(SEARCH).content["variants"].items():
        built = parser.instantiate_classes(parser.parse_object({"weighting": variant["weighting"]})).weighting
        if type(built).__module__.startswith("benchmarks"):
            own[name] = type(built)
    single = {"window-8": WindowedRatio, "window-8-floor-0.3": WindowedRatio, "surprise": SurpriseDrift}
    assert own == single | {"certainty": TeacherCertainty, "ratio-or-certainty": Largest}


def test_another_class_takes_its_own_arguments_only():
    objective = {"class_path": "A", "init_args": {"clip": 0.2}}
    assert merged({"o": objective}, {"o": {"class_path": "B"}}) == {"o": {"class_path": "B"}}
    assert merged({"o": objective}, {"o": {"init_args": {"cap": 1}}})["o"]["init_args"] == {"clip": 0.2, "cap": 1}


def test_a_plan_that_names_what_it_does_not_have_is_refused():
    content = tiny_content()
    content["conditions"]["base"] |= {"variants": ["unifrom"], "seeds": 1}
    with pytest.raises(InputError, match=r"conditions.base.variants.*got 'unifrom'"):
        Plan(content, PLAN)
    with pytest.raises(InputError, match="targets"):
        Plan(tiny_content() | {"targets": 1}, PLAN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold the keys .* with None"),
        ("extends: [", "must be YAML"),
        ("variants: {new: {seeds: 2}}", "variants.new` must have a `weighting`, got keys \\['seeds'\\]"),
        ("conditions: {chain-25: {part: full}}", "conditions.chain-25` must have about, part, got keys"),
        ("variants: {uniform: {seeds: 9}}", "variants.uniform.seeds` must be 1 to 6, .* got 9"),
        ("conditions: {base: {variants: [uniform], seeds: 7}}", "conditions.base.seeds` must be 1 to 6, .* got 7"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(tmp_path, text, message):
    shutil.copy(PLAN, tmp_path / "plan.yaml")
    (tmp_path / "own.yaml").write_text(f"extends: plan.yaml\n{text}" if text.startswith(("v", "c")) else text)
    with pytest.raises(InputError, match=message):
        read_plan(tmp_path / "own.yaml")


def test_no_variant_takes_the_settings_rate_beside_tuned_ones(tmp_path):
    """A misspelt ``like`` trained at 4e-4 where all others took 2e-4."""
    shutil.copy(PLAN, tmp_path / "plan.yaml")
    own, spec = tmp_path / "own.yaml", "{seeds: 2, weighting: {class_path: lit_opd.weighting.Uniform}"
    for variant, wanted in (
        (f"{spec}, like: truncated-raito}}", "got truncated-raito"),
        (f"{spec}}}", "got nothing"),
    ):
        own.write_text(f"extends: plan.yaml\nvariants: {{new: {variant}}}\nconditions: {{base: {{part: base}}}}\n")
        with pytest.raises(InputError, match=f"new.*{wanted}"):
            read_plan(own).jobs()
    own.write_text(
        f"extends: plan.yaml\nvariants: {{new: {spec}, like: iw-4-reversed}}}}\nconditions: {{base: {{part: base}}}}\n"
    )
    assert {job.settings["model"]["optimizer"]["init_args"]["lr"] for job in read_plan(own).jobs()} == {4e-4}


def test_tuning_a_plan_without_a_place_for_the_rates_is_refused_before_it_trains(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--plan", str(SEARCH), "--runs", str(tmp_path / "runs")])
    assert (
        "`--plan` must lead to a file with the lines # <tuned>" in capsys.readouterr().err
        and not (tmp_path / "runs").exists()
    )


def test_the_page_of_findings_tells_the_plans_numbers():
    plan, page = read_plan(), (ROOT / "docs" / "findings.md").read_text()
    assert page.count(START) == page.count(END) == 1
    assert f"{len(plan.jobs())} runs" in page and f"{len(plan.jobs(('full',)))} more runs" in page
    num_others = len(plan.variants_of("base")) - 1
    assert f"holds {num_others} variants" in page and f"of {4 * num_others}\n  intervals" in page


# -- what the conditions train on ------------------------------------------------------------------------------------------


def test_assets_are_built_once_and_a_changed_specification_builds_anew(tmp_path):
    plan = Plan(tiny_content(), PLAN)
    wanted = missing(plan.jobs(), tmp_path)
    assert sorted(name for name, _ in wanted) == ["data", "student", "teacher"]
    about = {asset[0]: build_asset(asset, tmp_path) for asset in wanted}
    assert about["teacher"]["steps"] == 1 and 0 <= about["teacher"]["greedy"] <= 1
    assert missing(plan.jobs(), tmp_path) == []
    train, val = (read_records(folder_of(wanted[-1], tmp_path) / f"{part}.jsonl") for part in ("train", "val"))
    assert (len(train), len(val)) == (16, 4)
    assert len({row["prompt"] for row in train + val}) == 20 and len(train[0]["prompt"]) == 10  # 2 x 3 + "=" + 3
    longer = tiny_content()
    longer["models"]["student"]["num_steps"] = 2
    assert [name for name, _ in missing(Plan(longer, PLAN).jobs(), tmp_path)] == ["student"]


@pytest.mark.parametrize("extra", [{"all_legal": True}, {"perturbed": 0.5}, {"hidden_size": 24, "chain_length": 3}])
def test_every_kind_of_model_can_be_built_again_to_the_same_weights(tmp_path, extra):
    spec = TINY | {"seed": 3, "num_steps": 2} | extra
    first, second = (build_asset(("model", spec), tmp_path / side) for side in ("a", "b"))
    one, two = (folder_of(("model", spec), tmp_path / side) / "model.safetensors" for side in ("a", "b"))
    assert one.read_bytes() == two.read_bytes() and first["greedy"] == second["greedy"]


def test_a_student_stops_at_its_accuracy_and_a_model_below_its_own_is_refused(tmp_path):
    assert build_asset(("student", TINY | {"seed": 0, "num_steps": 20, "until": 0.0}), tmp_path)["steps"] == 8
    with pytest.raises(InputError, match=r"models.teacher.at_least.*got greedy accuracy 0.000 of 0.9"):
        build_asset(("teacher", TINY | {"seed": 0, "at_least": 0.9}), tmp_path)
    assert [path.name.rsplit("-", 1)[0] for path in (tmp_path / "assets").iterdir()] == ["student"]


def test_a_perturbed_path_goes_on_by_the_full_tables_from_the_wrong_code():
    full, problem = make_automaton(all_legal=True), sample_problems(make_automaton(), count=1, seed=4)[0]
    changed, replaced = perturb(problem, full, random.Random(1), 0.3)
    assert (changed.words, changed.start) == (problem.words, problem.start) and 0 < sum(replaced) < 12
    state = full.codes.index(problem.start)
    for word, code, wrong in zip(changed.words, changed.codes, replaced, strict=True):
        target = full.targets[state][full.words.index(word)]
        assert wrong or code == full.codes[target]
        state = full.codes.index(code)
    assert changed.response.endswith("\\boxed{" + changed.codes[-1] + "}")
    assert perturb(problem, full, random.Random(1), 0.0) == (problem, [False] * 12)


def test_replaced_codes_are_read_and_not_learned():
    tokenizer, problems = make_tokenizer(), sample_problems(make_automaton(), count=2, seed=4, chain_length=2)
    prompts, responses = supervised_batch(problems, tokenizer)
    targets = supervised_targets(responses, [[True, False], [False, False]])
    assert (targets == NOT_SUPERVISED).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    model = make_model(16, tokenizer)
    with torch.no_grad():  # a slow loop over the supervised tokens
        logprobs = model(input_ids=torch.cat([prompts, responses], -1)).logits.log_softmax(-1)
    before, length = prompts.shape[1] - 1, responses.shape[1]
    counted = [(row, t) for row in range(2) for t in range(length) if row == 1 or t >= 3]
    want = -sum(logprobs[row, before + t, responses[row, t]] for row, t in counted) / len(counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.testing.assert_close(supervised_step(model, (prompts, responses), optimizer, 1.0, targets=targets), want)


# -- runs that go on -------------------------------------------------------------------------------------------------------


class Fault(Callback):
    """Ends a run in its second step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            raise RuntimeError("the lights went out")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder with the tiny plan's assets."""
    for asset in missing(Plan(tiny_content(), PLAN).jobs(), tmp_path):
        build_asset(asset, tmp_path)
    return tmp_path


def test_a_broken_run_goes_on_from_its_checkpoint_to_the_same_result(built, monkeypatch):
    """And a run is the same whatever its process did before."""
    plan = Plan(tiny_content(), PLAN)
    broken, other = plan.jobs()[:2]
    whole = worker.run_job(broken, built)
    worker.run_job(other, built)
    os.rename(built / broken.name, built / "whole")
    callbacks = worker.run_callbacks
    monkeypatch.setattr(worker, "run_callbacks", lambda: [*callbacks(), Fault()])
    with pytest.raises(TaskFailed, match="the lights went out"):
        worker.run_job(broken, built)
    log = built / "logs" / f"{broken.name}.log"
    assert "Traceback" in log.read_text() and not (built / broken.name / "reproduce.json").exists()
    monkeypatch.setattr(worker, "run_callbacks", callbacks)
    assert worker.resumable(broken, built / broken.name)
    again = worker.run_job(broken, built)
    same = ("curves", "bands", "means", "tokens", "settings", "plan")
    assert {key: again[key] for key in same} == {key: whole[key] for key in same}
    assert log.read_text().count("validation at step 0") == 2  # of the whole run and of the broken one, not of the last
    assert (
        whole["plan"] == yaml.safe_load((built / broken.name / "config.yaml").read_text())["vars"]["plan"] == plan.sha
    )
    assert not (built / broken.name / "checkpoints").exists()


def finished(root: Path) -> dict[str, tuple[int, int]]:
    """Finished runs by name, and what would change if they ran again."""
    return {
        str(path.parent.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("reproduce.json")
    }


def wait_for(condition: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process is there and no zombie, which has no command line."""
    path = Path(f"/proc/{process}/cmdline")
    return path.exists() and bool(path.read_bytes())


def test_a_run_with_a_skipped_step_is_recorded_and_says_so(tmp_path):
    """A skipped step logs NaN for what it did not do; the finished run had been refused by every later call."""
    (job, *_) = Plan(tiny_content(), PLAN).jobs()
    heads = (
        "step,train/tokens,val/greedy_accuracy,train/weight_mean,train/weight_ess,train/grad_norm,train/clip_fraction"
    )
    rows = ["0,,0.25,,,,", "1,10,,1.0,0.5,3.0,0.0", "2,10,,nan,nan,nan,nan", "3,10,,2.0,1.0,5.0,0.5", "3,,0.5,,,,"]
    (tmp_path / "metrics.csv").write_text("\n".join([heads, *rows]) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "tokens": 30}))
    spent = {"cpu_seconds": 1.0, "wall_seconds": 1.0}
    record = finish(job, tmp_path, models={}, code="0123456789ab", **spent)
    means = {"weight_mean": 1.5, "weight_ess": 0.75, "grad_norm": 4.0, "clip_fraction": 0.25}
    assert (record["means"], record["skipped_steps"]) == (means, 1)
    kept = read_record(tmp_path)
    assert kept is not None and kept["means"] == means and kept["curves"]["greedy"] == [[0, 0.25], [3, 0.5]]
    (tmp_path / "metrics.csv").write_text("\n".join([heads, rows[0], rows[1], rows[3], rows[4]]) + "\n")
    whole = finish(job, tmp_path, models={}, code="0123456789ab", **spent)
    assert whole["means"] == means and "skipped_steps" not in whole


@pytest.mark.slow
def test_a_killed_reproduction_goes_on_without_repeating_finished_runs(built, capfd):
    """And a run that fails is named with its reason and its log, while the others go on."""
    content = tiny_content()
    wrong = {"class_path": "lit_opd.weighting.ImportanceWeighting", "init_args": {"w_max": 0.5}}
    content["variants"]["wrong"] = {"seeds": 1, "weighting": wrong}
    plan = write_plan(built / "plan.yaml", content)
    words = ["run", "--plan", str(plan), "--runs", str(built), "--jobs", "1"]
    runner = subprocess.Popen([sys.executable, "-m", "benchmarks.studies.reproduce", *words], cwd=ROOT)
    wait_for(lambda: finished(built))
    workers = [int(word) for word in Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()]
    assert any(map(alive, workers))
    runner.kill()
    runner.wait()
    wait_for(lambda: not any(map(alive, workers)), seconds=10)  # or they would go on beside the next call's
    before, names = finished(built), {job.name for job in read_plan(plan).jobs() if job.variant != "wrong"}
    assert set(before) < names
    with (built / "results.jsonl").open("a") as file:
        file.write('{"run": "base/uni')  # as a kill in the middle of a write would leave it
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    after = finished(built)
    assert set(after) == names and {name: after[name] for name in before} == before
    assert set(read_results(built)) == names
    lines = (built / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(names)  # no double, and none lost where the kill fell between a run and its line
    out = capfd.readouterr().out
    assert f"{len(names) - len(before)} runs finished, {len(before)} were finished before, 1 failed" in out
    failure = next(line for line in out.splitlines() if line.startswith("failed: base/wrong/seed-10: "))
    assert "ImportanceWeighting.w_max" in failure and str(built / "logs" / "base" / "wrong" / "seed-10.log") in failure
    changed = tiny_content()
    changed["settings"]["trainer"]["max_steps"] = 3
    with pytest.raises(SystemExit):
        main(["run", "--plan", str(write_plan(built / "plan.yaml", changed)), "--runs", str(built)])
    assert "4 finished under other settings" in capfd.readouterr().err and finished(built) == after


# -- tuning ----------------------------------------------------------------------------------------------------------------


def record_of(
    job: Any, *, greedy: list[float], kl: float = 1.0, plan: str | None = None, **extra: Any
) -> dict[str, Any]:
    """A finished run with these evaluations at steps 0, 10, 20 ..."""
    steps = [10 * place for place in range(len(greedy))]
    curves = {
        name: [[step, value] for step, value in zip(steps, greedy, strict=True)] for name in ("greedy", "avg_at_4")
    }
    return {
        "run": job.name,
        "condition": job.condition,
        "variant": job.variant,
        "seed": job.seed,
        "plan": plan or job.plan,
        "settings": job.settings_sha,
        "learning_rate": job.settings["model"]["optimizer"]["init_args"]["lr"],
        "cpu_seconds": 42.0,
        "finished": "2026-11-23T00:00:00+00:00",
        "machine": "a machine",
        "models": {},
        "tokens": 214_300,
        "code": "0123456789ab",
        "curves": curves | {"reverse_kl": [[step, kl] for step in steps]},
        "bands": [[step, [0.5 + 0.1 * band for band in range(10)]] for step in steps],
        "means": {"weight_mean": 1.25, "weight_ess": 0.9, "grad_norm": 7.0, "clip_fraction": 0.0},
    } | extra


def test_the_rate_is_the_one_with_the_largest_area_and_within_the_tolerance_the_smallest(tmp_path):
    plan = read_plan(write_plan(tmp_path / "plan.yaml", tiny_content()))
    greedy = {("uniform", 1e-3): [0.4, 0.8, 0.8], ("uniform", 2e-3): [0.4, 0.4, 0.9]}  # areas 0.7 and 0.525
    greedy |= {("iw-1.5", 1e-3): [0.4, 0.6, 0.7], ("iw-1.5", 2e-3): [0.4, 0.6, 0.8]}  # areas 0.575 and 0.6
    rate = {job.name: job.settings["model"]["optimizer"]["init_args"]["lr"] for job in plan.tuning_jobs()}
    keys = {job.name: (job.variant, rate[job.name]) for job in plan.tuning_jobs()}
    records = [record_of(job, greedy=greedy[keys[job.name]]) for job in plan.tuning_jobs()]
    assert tune.area(records[0]) == pytest.approx(0.7)
    tuned = tune.write_rates(plan, tune.by_variant(plan, records))
    assert tuned.content["learning_rates"] == {"uniform": 1e-3, "iw-1.5": 2e-3} and tuned.tuned and not plan.tuned
    assert tuned.sha != plan.sha and tuned.untuned_sha == plan.untuned_sha
    assert {job.variant: job.settings["model"]["optimizer"]["init_args"]["lr"] for job in tuned.jobs()} == {
        "uniform": 1e-3,
        "iw-1.5": 2e-3,
    }
    assert "| uniform | **0.700 (1.00)** | 0.525 (1.00) | yes |" in tune.table_path(plan).read_text()
    text = tuned.path.read_text()
    assert tune.write_rates(tuned, tune.by_variant(tuned, reversed(records))).path.read_text() == text
    assert tune.chosen(records[2:], tolerance=0.024) == 2e-3 and tune.chosen(records[2:], tolerance=0.026) == 1e-3
    with pytest.raises(InputError, match="none of this plan for base/iw-1.5/lr-0.002/seed-50"):
        tune.by_variant(plan, records[:-1])


# -- the report ------------------------------------------------------------------------------------------------------------


def synthetic(
    plan: Plan, effects: dict[str, list[float]], parts: tuple[str, ...] = ("base",)
) -> dict[str, dict[str, Any]]:
    """Uniform ends at 0.80, 0.82, 0.84 ...; a variant at its effects above that, by seed."""
    records = {}
    for job in plan.jobs(parts):
        place = plan.content["seeds"]["main"].index(job.seed)
        end = 0.80 + 0.02 * place + effects.get(job.variant, [0.0] * 6)[place]
        records[job.name] = record_of(job, greedy=[0.4, 0.6, 0.7, 0.7, end], kl=1.0 - end)
    return records


@pytest.fixture
def unpictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the page says in words: its pictures, two a condition, take most of its time."""
    for name in ("draw_curves", "draw_differences"):
        monkeypatch.setattr(f"benchmarks.studies.reproduce.pictures.{name}", lambda *given: None)


def page_with(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "findings.md").write_text(f"before\n{START}old\n{END}after\n")
    return folder


def row_of(page: str, variant: str, table: int = 0) -> list[str]:
    """Cells of a variant's row in the n-th table that has one."""
    rows = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith(f"| {variant} |")]
    return rows[table]


def test_the_reports_numbers_are_those_of_hand_arithmetic(tmp_path, unpictured):
    plan = read_plan()
    records = synthetic(plan, {"iw-signed": [0.01, 0.03, 0.05], "dash": [0.02, 0.02]})
    page = write_report(plan, list(records.values()), page_with(tmp_path)).read_text()
    assert page.startswith(f"before\n{START}") and page.endswith(f"{END}after\n") and "old" not in page
    row = row_of(page, "iw-signed")
    # ends 0.81, 0.85, 0.89: mean 0.85, sd 0.04; differences 0.01, 0.03, 0.05: mean 0.03, sd 0.02, half 4.303 * 0.02 / sqrt(3)
    assert row[:3] == ["iw-signed", "3", "0.850 +- 0.040"]
    assert row[7] == "+0.030 [-0.020, +0.080]"
    # of area: 40 steps, only the last quarter's end differs: a difference d makes d * 10 / 2 / 40
    assert row[10] == "+0.004 [-0.002, +0.010]"
    # to 0.80 from 0.70 at step 30: 30 + 10 * 0.10 / (end - 0.70) = 39.09, 36.67, 35.26: mean 37.0, sd 1.94, half 4.8
    assert row[6] == "37.0 [32.2, 41.8]"
    assert row_of(page, "dash")[7] == "**+0.020 [+0.020, +0.020]**"
    assert row_of(page, "uniform")[7] == "" and row_of(page, "uniform")[1] == "6"
    rate = f"{plan.rate_of('iw-signed') or 4e-4:g}"
    assert row_of(page, "iw-signed", table=1) == ["iw-signed", rate, "1.250", "0.900", "7.000", "0.000", "214"]
    assert plan.sha in page and "All of them were made under this plan." in page and "95 of 308" in page


def test_a_condition_with_bases_models_is_paired_with_base(tmp_path):
    """Zero-weighted tokens against dropped ones: the variant with the base variant it is like."""
    plan = read_plan()
    records = synthetic(plan, {})
    for job in plan.jobs(("full",)):
        if job.condition == "zero-weighted" and job.seed in (10, 11):  # 0.80, 0.82 in base; 0.85 and 0.89 here
            end = 0.85 if job.seed == 10 else 0.89
            records[job.name] = record_of(job, greedy=[0.4, 0.6, 0.7, 0.7, end], kl=1.0 - end)
    page = write_report(plan, list(records.values()), page_with(tmp_path)).read_text()
    pictures = re.findall(r"\]\((pictures/.*?)\)", page)
    assert len(pictures) == 4 and all((tmp_path / name).is_file() for name in pictures)
    page = page.split("zero-weighted minus base")[1]
    # differences 0.05 and 0.07: mean 0.06, sd 0.0141, half 12.706 * 0.0141 / sqrt(2) = 0.127
    assert row_of(page, "first-30-zero")[:3] == ["first-30-zero", "base, first-30", "+0.060 [-0.067, +0.187]"]


def test_a_search_compares_every_variant_with_its_references(tmp_path):
    plan = read_plan(SEARCH)
    folder = tmp_path
    (folder / "search.md").write_text(f"{START}{END}")
    page = write_report(plan, list(synthetic(plan, {"iw-4": [0.01, 0.03, 0.05]}).values()), folder).read_text()
    against_uniform, against_iw = (page.split(f"### greedy minus that of {name}")[1] for name in ("uniform", "iw-4"))
    assert row_of(against_uniform, "iw-4") == ["iw-4", "+0.030 [-0.020, +0.080]"]
    assert row_of(against_iw, "uniform") == ["uniform", "-0.030 [-0.080, +0.020]"]
    assert row_of(against_uniform, "floor-0.1")[1].startswith("+0.000")
    assert (folder / "pictures" / "search-base-curves.png").is_file()


def test_the_whole_plan_ends_with_every_variant_in_every_condition(tmp_path, unpictured):
    plan = read_plan()
    records = synthetic(plan, {"iw-4": [0.01, 0.03, 0.05, 0.03, 0.03, 0.03]}, parts=("base", "full"))
    for record in (r for r in records.values() if r["variant"] == "iw-4" and r["condition"] == "chain-6"):
        record["curves"]["greedy"][-1][1] += 0.12
    page = write_report(plan, list(records.values()), page_with(tmp_path)).read_text()
    table = page.split("### greedy minus that of uniform")[1]
    heads = next(line for line in table.splitlines() if line.startswith("| variant"))[2:-2].split(" | ")
    assert heads == ["variant", *(name for name in plan.content["conditions"] if name != "zero-weighted"), "mean"]
    row = row_of(table, "iw-4")
    assert row[heads.index("chain-6")] == "**+0.150 [+0.100, +0.200]**"
    # twelve conditions, eleven of 0.03 and one of 0.15: mean 0.04, sd 0.12 / sqrt(12), half 2.201 * 0.12 / 12 = 0.022
    assert row[-1] == "**+0.040 [+0.018, +0.062]**"
    assert row_of(table, "random-30")[-1] == "" and "| last-30-zero |" not in table


@pytest.mark.slow
def test_a_confirmation_says_by_its_rule_what_won(tmp_path, unpictured):
    content = copy.deepcopy(read_plan(SEARCH).content)
    content["search"] |= {"references": ["uniform", "iw-1.5"], "wins_in": 3}
    plan = Plan(content, tmp_path / "confirm.yaml")
    (tmp_path / "confirm.md").write_text(f"{START}{END}")
    raised = {
        "floor-0.1": [0.02, 0.03, 0.04],
        "floor-0.3": [0.02, 0.03, 0.04],
        "surprise": [0.02, 0.03, 0.04],
        "iw-4": [-0.03, 0.03, 0.0],
    }
    records = synthetic(plan, raised, parts=("base", "full"))
    lower = {name: record for name, record in records.items() if record["condition"] == "all-legal"}
    for record in (r for r in lower.values() if r["variant"] == "surprise"):
        record["curves"]["greedy"][-1][1] -= 0.1
    for record in (r for r in lower.values() if r["variant"] == "floor-0.3"):  # the area alone
        record["curves"]["greedy"][1][1] -= 0.2
    page = write_report(plan, list(records.values()), tmp_path).read_text().split("### Verdict")[1]
    everywhere = "base, all-legal, chain-6, student-160"
    assert row_of(page, "floor-0.1") == ["floor-0.1", "greedy", everywhere, "none", "**confirmed**"]
    assert row_of(page, "surprise") == [
        "surprise", "greedy", "base, chain-6, student-160", "all-legal", "not confirmed"
    ]  # fmt: skip
    assert row_of(page, "iw-4")[2:] == ["none", "none", "not confirmed"]
    assert row_of(page, "floor-0.3")[2:] == [everywhere, "none", "not confirmed"]
    assert row_of(page, "floor-0.3", table=1)[3:] == ["all-legal", "not confirmed"]
    fewer = [record for record in records.values() if record["condition"] != "student-160"]
    page = write_report(plan, fewer, tmp_path).read_text().split("### Verdict")[1]
    assert row_of(page, "floor-0.1")[-1] == "open: 3 of 4 conditions"
    last = "student-160/floor-0.1/seed-102"
    page = write_report(plan, [record for name, record in records.items() if name != last], tmp_path).read_text()
    page = page.split("### Verdict")[1]
    assert row_of(page, "floor-0.1")[-1] == "open: 3 of 4 conditions"
    assert row_of(page, "floor-0.3")[-1] == "not confirmed"


def test_models_that_are_not_the_shipped_ones_are_named_with_their_accuracy(tmp_path, unpictured):
    plan = read_plan()
    models = {"teacher": {"name": "teacher-x", "greedy": 0.97, "steps": 360}}
    records = {job.name: record_of(job, greedy=[0.4, 0.6], models=models) for job in plan.jobs()[:2]}
    page = write_report(plan, list(records.values()), page_with(tmp_path)).read_text()
    assert (
        "The student starts at greedy 0.400. Models: teacher-x (greedy 0.970 on 128 other problems, 360 steps)." in page
    )
    assert "code `0123456789ab`" in page


def test_a_run_that_never_reaches_the_target_counts_as_its_last_step(tmp_path, unpictured):
    """Or a variant would look the faster the more of its runs fail."""
    plan, effects = read_plan(), {"last-30": [-0.3] * 6, "iw-signed": [-0.1, -0.1, 0.05]}
    page = write_report(plan, list(synthetic(plan, effects).values()), page_with(tmp_path)).read_text()
    assert row_of(page, "last-30")[6] == "> 40.0 (never, 6 of 6)"
    assert row_of(page, "iw-signed")[6] == ">= 38.4 (2 of 3 censored)"  # 40, 40, 35.26


def test_runs_without_uniform_have_no_differences_and_no_picture_of_them(tmp_path):
    plan = read_plan()
    records = {name: record for name, record in synthetic(plan, {}).items() if record["variant"] == "dash"}
    page = write_report(plan, list(records.values()), page_with(tmp_path)).read_text()
    assert row_of(page, "dash")[7:] == [""] * 4 and "2 of 95 runs" in page
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["reproduce-base-curves.png"]


def test_a_plan_that_changed_after_results_existed_is_told_and_nothing_is_mixed_silently(tmp_path, unpictured):
    plan = read_plan()
    records = synthetic(plan, {})
    changed = copy.deepcopy(plan.content)
    changed["variants"]["iw-1.5"]["weighting"]["init_args"]["w_max"] = 1.6
    later = Plan(changed, PLAN)
    chosen = choose(later, records.values())
    assert {record["variant"] for record in chosen.other} == {"iw-1.5"} and len(chosen.other) == 6
    assert len(chosen.older) == len(chosen.counted) == 89
    page = write_report(later, list(records.values()), page_with(tmp_path)).read_text()
    assert later.sha in page and "**The plan changed after results existed.**" in page
    assert f"with the settings this one has, and counted: 89 runs of plan `{plan.sha[:12]}`" in page
    assert f"left out: 6 runs of plan `{plan.sha[:12]}` (base/iw-1.5/seed-10" in page
    assert not any(line.startswith("| iw-1.5 |") for line in page.splitlines())
    with pytest.raises(InputError, match="got 6 others"):
        write_report(later, chosen.other, tmp_path)


@pytest.mark.slow
def test_runs_of_another_plan_in_the_same_folder_are_no_change_of_the_plan(tmp_path, unpictured):
    plan, search = read_plan(), read_plan(SEARCH)
    shared = [*synthetic(plan, {}).values(), *synthetic(search, {}).values()]
    (page_with(tmp_path) / "search.md").write_text(f"{START}{END}")
    for each in (plan, search):
        page = write_report(each, shared, tmp_path).read_text()
        assert "All of them were made under this plan." in page and "left out" not in page


def test_runs_shared_with_the_plan_below_are_no_change_either(tmp_path, unpictured):
    plan, controls = read_plan(), read_plan(PLAN.parent / "controls.yaml")
    runs = [*synthetic(controls, {}).values(), *synthetic(plan, {}).values()]
    (tmp_path / "controls.md").write_text(f"{START}{END}")
    page = write_report(controls, runs, tmp_path).read_text()
    assert "36 of 60 planned runs" in page and "The plan changed" not in page
    assert f"Shared with plan.yaml: 18 runs of plan `{plan.sha[:12]}` (base/uniform/seed-10, " in page


@pytest.mark.slow
def test_results_that_were_replaced_leave_a_trace(tmp_path, unpictured):
    plan = read_plan()
    records = synthetic(plan, {})
    run = records["base/iw-1.5/seed-10"]
    lines = [run | {"plan": "f" * 64, "settings": "0" * 64}, *records.values()]
    page = write_report(plan, lines, page_with(tmp_path)).read_text()
    assert "**The plan changed after results existed.**" in page and "95 of " in page
    assert f"under other settings, and replaced: 1 runs of plan `{'f' * 12}` (base/iw-1.5/seed-10)." in page
    page = write_report(plan, [dict(run), *records.values()], page_with(tmp_path)).read_text()
    assert "The plan changed" not in page
    assert f"under the same settings, and replaced: 1 runs of plan `{plan.sha[:12]}` (base/iw-1.5/seed-10)." in page


def test_paired_differences_pair_by_seed():
    ours, theirs = {1: 0.9, 2: 0.5, 3: 0.7, 9: 0.0}, {3: 0.5, 2: 0.4, 1: 0.6}
    found = paired(ours, theirs)  # 0.3, 0.1, 0.2: mean 0.2, sd 0.1, half 4.30265 * 0.1 / sqrt(3) = 0.24841
    assert (found.count, found.mean) == (3, pytest.approx(0.2))
    assert (found.low, found.high) == (pytest.approx(-0.04841, abs=1e-5), pytest.approx(0.44841, abs=1e-5))
    assert paired({1: 1.0}, {1: 0.5}) == Estimate(0.5, None, None, 1)
    with pytest.raises(InputError, match="must have a common seed"):
        paired({1: 1.0}, {2: 0.5})


def test_curves_are_read_between_their_points():
    assert mean_height([0, 10, 40], [0.0, 1.0, 1.0], horizon=40) == pytest.approx(35 / 40)
    assert reached([0, 10, 20], [0.2, 0.4, 0.8], 0.5, rising=True) == pytest.approx(12.5)
    assert reached([0, 10], [0.9, 0.1], 0.5, rising=True) == 0.0
    assert reached([0, 10], [0.1, 0.2], 0.5, rising=True) is None


def test_curves_name_references_then_most_seeds():
    def runs(count, height):
        return [{"curves": {"greedy": [(0, height), (40, height)]}}] * count

    made = {"ours": runs(3, 0.7), "uniform": runs(3, 0.2), "first": runs(3, 0.4), "more": runs(6, 0.1)}
    made |= {f"low-{i}": runs(3, 0.3) for i in range(3)}
    assert coloured(made, []) == ["more", "ours", "uniform", "first", "low-0", "low-1"]
    made["more"] = runs(3, 0.1)
    assert coloured(made, ["uniform"]) == ["uniform", "ours", "first", "low-0", "low-1", "low-2"]


def test_pictures_are_not_blank(tmp_path):
    plan = read_plan()
    records = synthetic(plan, {"iw-4": [0.05] * 6})
    runs = {name: [r for r in records.values() if r["variant"] == name] for name in ("uniform", "iw-4")}
    draw_curves(runs, tmp_path / "curves.png", ["uniform", "iw-4"])
    found = {"iw-4": {"greedy": Estimate(0.05, 0.01, 0.09, 6), "reverse KL": None}}
    draw_differences(found, tmp_path / "differences.png")
    for name, num_panels in (("curves", 3), ("differences", 1)):
        image = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        for panel in np.array_split(image, num_panels, axis=1):
            coloured = (panel.max(-1) - panel.min(-1)) > 0.3  # what is drawn of the runs; frames and words are grey
            assert coloured.sum() > 200


def test_one_mean_that_is_far_out_is_written_and_the_axis_holds_the_other_intervals():
    near = [Estimate(mean, mean - 0.02, mean + 0.02, 4) for mean in (-0.03, 0.01, 0.04)]
    wide, out = Estimate(0.02, -2.0, 2.0, 2), Estimate(-0.9, -1.0, -0.8, 4)
    figure, axis = plt.subplots()
    far = far_of([each.mean for each in (*near, wide, out)])
    for row, each in enumerate((*near, wide, out)):
        draw_estimate(axis, row, each, far=far)
    limit(axis, [*near, wide, out], far)
    left, right = axis.get_xlim()
    assert -0.07 < left < -0.05 and 0.06 < right < 0.08  # neither the wide interval nor the far mean counts
    assert [text.get_text() for text in axis.texts] == ["\u25c2 -0.90 [-1.00, -0.80]"]
    dots = [line.get_color() for line in axis.lines if line.get_marker() == "o"]
    assert dots == [WORSE, OPEN, BETTER, OPEN] and axis.texts[0].get_color() == WORSE
    draw_estimate(axis, 5, near[0], less_is_better=True)
    assert axis.lines[-1].get_color() == BETTER
    plt.close(figure)
