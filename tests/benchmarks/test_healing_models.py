"""Two real models healed, on tiny ones: the plan, the problems, real runs that stop and go on, records, the page, pieces."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import matplotlib.image
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks.studies.healing import __main__ as command
from benchmarks.studies.healing import measures, pieces, report, worker
from benchmarks.studies.healing.plan import PLAN, Plan, read_plan
from benchmarks.studies.healing.problems import TEMPLATES, answer_of, is_right, problems, value
from benchmarks.studies.healing.records import Place, read, write
from benchmarks.studies.healing.runner import TimeLimit, run_jobs
from lit_opd.errors import InputError
from lit_opd.sweep.crew import TaskFailed
from lit_opd.types import FinishReason
from tests.helpers import tiny

DOCS = Path(__file__).resolve().parents[2] / "docs" / "healing"
NEW_TOKENS, STEPS = 12, 2


def content() -> dict:
    return yaml.safe_load(PLAN.read_text())


# -- the plan and its problems -------------------------------------------------------------------------------------------


def test_the_plan_is_what_was_asked_for():
    plan = read_plan()
    jobs = plan.jobs("cpu")
    assert len(jobs) == len({job.name for job in jobs}) == 2 * 8 * 3
    first = jobs[: 2 * 3 * 3]
    assert {job.variant for job in first} == {"uniform", "iw-1.5", "null-advantage"} and all(
        j.steps >= 60 for j in first
    )
    cuda = plan.jobs("cuda")
    assert [job.name for job in cuda] == [job.name for job in jobs]
    assert {job.batch for job in cuda} == {16 * job.batch for job in jobs} and {job.steps for job in cuda} == {400}
    for job in jobs:
        assert job.settings["model"]["sampler"]["init_args"]["max_new_tokens"] == 128
        assert job.settings["seed_everything"] == job.seed and "seed" not in job.settings["data"]
        advantages = {
            "null-advantage": [{"class_path": "lit_opd.advantage.NullAdvantage", "init_args": {"value": -0.5}}],
            "windowed-baseline": [{"class_path": "lit_opd.advantage.ValueBaseline"}],
        }
        assert job.settings["model"].get("advantage") == advantages.get(job.variant)
        objective = {"full-windowed": "Divergence"}.get(job.variant, "PolicyLoss")
        assert job.settings["model"]["objective"]["class_path"] == f"lit_opd.objective.{objective}"
        for part in (job.settings["model"]["weighting"], *job.settings["model"].get("advantage", ())):
            module, name = part["class_path"].rsplit(".", 1)
            getattr(importlib.import_module(module), name)(**part.get("init_args", {}))
    assert jobs[0].settings_sha != jobs[1].settings_sha != cuda[1].settings_sha


def test_a_seed_has_problems_of_its_own_and_none_that_is_measured():
    plan = read_plan()
    sets = {seed: {problem.question for problem in plan.training(seed)} for seed in plan.content["seeds"]}
    held = {problem.question for problem in plan.held_out}
    assert all(len(own) == plan.content["train"]["count"] and not own & held for own in sets.values())
    assert len(held) == 64 and len(sets[11] & sets[12]) < len(sets[11]) / 2
    assert [p.question for p in plan.training(11)] == [p.question for p in read_plan().training(11)]
    assert {job.prompts for job in plan.jobs("cpu", models=["smollm2"], seeds=[11])} != {
        job.prompts for job in plan.jobs("cpu", models=["smollm2"], seeds=[12])
    }


def test_the_answers_are_right():
    """Each kind of problem worked out from the numbers in its text, by a rule of its own."""
    rules = {
        "finds": lambda n: n[0] + n[1],
        "gave": lambda n: n[0] - n[1],
        "boxes": lambda n: n[0] * n[1],
        "times as many": lambda n: n[0] + n[0] * n[1],
        "pays with": lambda n: n[2] - n[0] * n[1],
        "weeks": lambda n: n[0] * n[1] * 7,
        "fewer": lambda n: n[0] + (n[0] - n[1]),
        "passengers": lambda n: n[0] - n[1] + n[2],
        "earns": lambda n: n[0] * n[1] * n[2],
        "equally": lambda n: n[0] / n[1],
        "bakes": lambda n: n[0] / n[1] * n[2],
        "rope": lambda n: n[0] - n[1] * n[2],
    }
    met = dict.fromkeys(rules, 0)
    for problem in problems("test", 300, seed=3):
        kind = next(name for name in rules if name in problem.question)
        met[kind] += 1
        assert problem.answer == rules[kind]([int(n) for n in re.findall(r"\d+", problem.question)]) >= 0, problem
    assert len(rules) == len(TEMPLATES) and min(met.values()) > 5


def test_an_expression_that_is_not_whole_is_our_own_mistake():
    assert value("a / b * c", {"a": 6, "b": 4, "c": 2}) == 3
    with pytest.raises(ValueError, match="must be whole, got 3/2"):
        value("a / b", {"a": 6, "b": 4})


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So 3 + 4 = 7.", 7),
        ("The answer is 1,234 dollars", 1234),
        (r"Then \boxed{12}, which is 3 more than 9.", 12),
        ("9 - 2\n#### 7\n", 7),
        ("It is 7.\n\nQuestion: Tom has 3 pens.\nAnswer: 5", 7),
        ("-4", -4),
        ("7.0", 7),
        ("7.5", 7.5),
        ("No number at all", None),
        ("", None),
    ],
)
def test_the_answer_is_the_box_or_the_last_number_before_a_next_question(response, answer):
    assert answer_of(response) == answer
    assert is_right(response, 7) == (answer == 7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "tpu"], "`--device` must name one of cpu, cuda, got 'tpu'"),
        (["run", "--models", "llama"], "`--models` must name one of smollm2, gemma3, got 'llama'"),
        (["--variants", "dash"], "`--variants` must name one of uniform"),
        (["--seeds", "1"], "`--seeds` must name one of 11, 12, 13, got 1"),
        (["--jobs", "0"], "`--jobs` must be above 0 and finite, got 0"),
        (["--minutes", "-1"], "`--minutes` must be above 0 and finite, got -1.0"),
        (["--minutes", "nan"], "`--minutes` must be above 0 and finite, got nan"),
        (["--plan", "nowhere.yaml"], "`--plan` must be a file, got nowhere.yaml"),
        (["--weights", "nowhere"], "`--weights` must hold smollm2/teacher"),
        (["pieces", "--out", "x", "--megabytes", "61", "--models", "smollm2"], "`--megabytes` must be 1 to 60, got 61"),
        (["assemble", "--from", "nowhere"], "`--from` must hold smollm2.pieces.json"),
    ],
)
def test_wrong_input_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = pieces.Source(lambda: _there(tmp_path / "a.gguf"), pytest.fail)
    monkeypatch.setitem(pieces.SOURCES, "smollm2", source)
    with pytest.raises(SystemExit, match="2"):
        command.main(words)
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--device", "cuda", "--minutes", "5"])
    assert "got cuda where torch finds no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra": 1}, "got others in: extra"),
        ({"first": ["dash"]}, "first` must name one of uniform"),
        ({"contrasts": [["cdd", "dash"]]}, "contrasts` must name one of uniform"),
        ({"reference": "dash"}, "reference` must name one of uniform"),
        ({"devices": {"cpu": {"steps": 1}}}, "got others in: devices.cpu.batch, devices.cpu.settings"),
    ],
)
def test_a_plan_that_is_none_is_refused(change, said, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content() | change, sort_keys=False))
    with pytest.raises(InputError, match=re.escape(said)):
        read_plan(path)


# -- runs of tiny models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """A plan of one tiny model, its weights, and no run."""
    folder = tmp_path_factory.mktemp("healing-models")
    for seed, name in ((1, "student"), (2, "teacher")):
        tiny.save(tiny.qwen3(seed=seed, window=256), folder / "weights" / "tiny" / name)
    own = content()
    frame = {
        "title": "Tiny",
        "folder": "tiny",
        "make": "nothing",
        "frame": "{question} =",
        "data": {"chat_template": True},
    }
    own |= {
        "models": {"tiny": frame},
        "seeds": [11],
        "held_out": {"count": 4, "seed": 5},
        "train": {"count": 6},
        "new_tokens": NEW_TOKENS,
    }
    own["settings"]["data"]["max_prompt_tokens"] = 200
    own["devices"]["cpu"] |= {"steps": STEPS}
    own["devices"]["cpu"]["settings"]["checkpoint_every"] = 1
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(own, sort_keys=False))
    return Place(read_plan(path), folder / "runs", folder / "weights", folder / "records")


def fresh(place: Place, name: str) -> Place:
    return replace(place, runs=place.runs.with_name(name), records=place.records.with_name(f"{name}-records"))


@torch.no_grad()
def test_a_measurement_equals_loops_over_transformers_own_logits(place):
    held = worker.held_problems(place, "tiny", "cpu")
    path = str(place.pair("tiny") / "student")
    found = measures.measure(path, held, shown=2)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(place.pair("tiny") / who).eval() for who in ("student", "teacher")
    )
    own = measures._answers(measures.load_policy(path), path, held, greedy=False)
    assert found["tokens"] == int(own.mask.sum())
    tenths: list[list[float]] = [[] for _ in range(10)]
    gaps_of: list[list[float]] = []
    for row in range(4):
        prompt = held.prompts.ids[row][held.prompts.mask[row]]
        response = own.response_ids[row][own.mask[row]]
        both = [_logprobs(model, prompt, response) for model in (student, teacher)]
        kl = [(p.exp() * (p - q)).sum() for p, q in zip(*both, strict=True)]
        assert found["reverse_kl"][row] == pytest.approx(float(torch.stack(kl).mean()), abs=1e-5)
        gaps = [abs(float(q[token] - p[token])) for p, q, token in zip(*both, response.tolist(), strict=True)]
        assert found["disagreement"][row] == pytest.approx(fmean(gaps), abs=1e-5)
        gaps_of.append(gaps)
        for place_in_row, gap in enumerate(gaps):
            tenths[int((place_in_row + 0.5) / len(gaps) * 10)].append(gap)
        written = held.written.response_ids[row][held.written.mask[row]]
        said = _logprobs(student, prompt, written)
        nll = [-float(own_row[token]) for own_row, token in zip(said, written.tolist(), strict=True)]
        assert found["teacher_text_nll"][row] == pytest.approx(fmean(nll), abs=1e-5)
    for row, own_gaps in enumerate(gaps_of):
        expected = [
            [g for i, g in enumerate(own_gaps) if int((i + 0.5) / len(own_gaps) * 10) == band] for band in range(10)
        ]
        assert found["tenths"]["disagreement"][row] == [
            pytest.approx(fmean(g), abs=1e-5) if g else None for g in expected
        ]
        of_row = [value for value in found["tenths"]["reverse_kl"][row] if value is not None]
        assert min(of_row) <= found["reverse_kl"][row] <= max(of_row)
    assert found["lengths"] == [len(own_gaps) for own_gaps in gaps_of] and sum(found["lengths"]) == found["tokens"]
    assert found["ended"] == [int(reason == FinishReason.STOP) for reason in own.finish_reason.tolist()]
    assert found["bands"] == [pytest.approx(fmean(gaps), abs=1e-5) if gaps else None for gaps in tenths]
    assert len(found["samples"]) == 2 and found["exact"] == [0.0] * 4


def _logprobs(model, prompt, response):
    """[n, V] at each response token."""
    ids = torch.cat([prompt, response])[None]
    return model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def test_right_answers_are_counted_by_problem(place, monkeypatch):
    held = worker.held_problems(place, "tiny", "cpu")
    said = [f"so it is {answer + wrong}" for answer, wrong in zip(held.answers, (0, 1, 0, 0), strict=True)]
    monkeypatch.setattr(measures, "texts", lambda ids, mask, tokenizer: said)
    assert measures.right_answers(held.teacher, held.teacher_path, held)[0] == [1.0, 0.0, 1.0, 1.0]


def test_what_the_teacher_wrote_is_kept_and_scored_as_it_was(place):
    first = worker.held_problems(place, "tiny", "cpu")
    again = worker.held_problems(place, "tiny", "cpu")
    assert again.written.provenance.engine == "saved" or first.written.provenance.engine == "saved"
    assert measures.as_lists(first.written) == measures.as_lists(again.written)
    saved = measures.from_lists(measures.as_lists(first.written), first.prompts)
    with torch.no_grad():
        both = [measures.row_means(-first.teacher(one).logprobs, one.mask) for one in (first.written, saved)]
    assert both[0] == pytest.approx(both[1], abs=1e-6) and min(both[0]) > 0


def stop_at(step: int):
    def told(steps: int) -> None:
        if steps == step:
            raise RuntimeError("stopped here")

    return told


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_record_of_one_that_was_not(place):
    job = place.plan.job("tiny", "cdd", 11, "cpu")
    whole, stopped = fresh(place, "whole"), fresh(place, "stopped")
    expected = worker.run_job(job, whole)
    with pytest.raises(TaskFailed, match="stopped here"):
        worker.run_job(job, stopped, stop_at(2))  # before the checkpoint of step 2 is written
    folder = stopped.runs / "cpu" / job.name
    assert read(stopped.record(job)) is None and (folder / "checkpoints" / "last.ckpt").exists()
    found = worker.run_job(job, stopped)
    timed = {"seconds": 0, "finished": ""}
    assert found | timed == expected | timed and found["end"]["reverse_kl"] != []
    assert json.loads(stopped.record(job).read_text()) == found
    assert not (folder / "checkpoints").exists() and not (folder / "student").exists()


@pytest.mark.slow
def test_the_plan_runs_and_a_second_call_repeats_nothing(place, capsys):
    """Three variants through the same command line as real ones; records say what training did."""
    own = fresh(place, "all")
    jobs = own.plan.jobs("cpu", variants=["uniform", "null-advantage", "first-30"])
    first = run_jobs(jobs, own, workers=0)
    assert (first.status, first.finished) == (0, ["tiny-start", *(job.name for job in jobs)])
    made = {path: path.read_bytes() for path in own.records.rglob("*.json")}
    again = run_jobs(jobs, own, workers=0)
    assert (again.finished, again.kept) == ([], [job.name for job in jobs])
    assert made == {path: path.read_bytes() for path in own.records.rglob("*.json")}
    ends = {job.variant: read(own.record(job)) for job in jobs}
    config = yaml.safe_load((own.runs / "cpu" / "tiny-null-advantage-11" / "config.yaml").read_text())
    assert config["model"]["advantage"][0]["init_args"]["value"] == -0.5
    assert config["vars"]["plan"] == own.plan.sha == ends["uniform"]["plan"]
    assert 0 < ends["uniform"]["tokens"] <= STEPS * 2 * NEW_TOKENS
    assert [step for step, _ in ends["uniform"]["training_kl"]] == [1, 2]
    assert ends["uniform"]["training_kl"][0] == ends["null-advantage"]["training_kl"][0]  # the same streams and prompts
    assert ends["uniform"]["end"]["reverse_kl"] != ends["null-advantage"]["end"]["reverse_kl"]
    retrained = replace(own, weights=own.weights.with_name("other-weights"))
    shutil.copytree(own.weights, retrained.weights)
    tiny.save(tiny.qwen3(seed=3, window=256), retrained.weights / "tiny" / "student")
    with pytest.raises(InputError, match=r"must hold runs of the weights in .*, got tiny-uniform of others"):
        run_jobs(own.plan.jobs("cpu", variants=["uniform", "cdd"]), retrained, workers=0)
    assert not worker.is_of(own.runs / "cpu" / "tiny-uniform-11", jobs[0], retrained)
    assert worker.is_of(own.runs / "cpu" / "tiny-uniform-11", jobs[0], own)
    changed = content_of(own) | {"new_tokens": NEW_TOKENS + 1}
    other = replace(own, plan=Plan(changed, own.plan.path))
    with pytest.raises(InputError, match="must hold runs of these settings"):
        run_jobs(other.plan.jobs("cpu", variants=["uniform"]), other, workers=0)
    with pytest.raises(InputError, match="must hold starts of this plan"):
        run_jobs(other.plan.jobs("cpu", variants=["iw-1.5"]), other, workers=0)


@pytest.mark.slow
def test_the_command_stops_when_its_minutes_are_over_and_goes_on(place, capsys):
    """Real processes, the first of them ended while it works."""
    own = fresh(place, "timed")
    words = ["--plan", own.plan.path, "--runs", own.runs, "--weights", own.weights, "--records", own.records]
    words = [*map(str, words), "--jobs", "1", "--variants", "uniform"]
    with pytest.raises(SystemExit, match="^0$"):
        command.main([*words, "--minutes", "0.02"])
    assert "stopped: the minutes are over; the same command goes on" in capsys.readouterr().out
    job = own.plan.job("tiny", "uniform", 11, "cpu")
    assert read(own.record(job)) is None
    with pytest.raises(SystemExit, match="^0$"):
        command.main([*words, "--minutes", "10"])
    assert f"2/2 runs | {job.name}: reverse kl" in capsys.readouterr().out
    assert read(own.record(job))["steps"] == STEPS and read(own.start("cpu", "tiny")) is not None


def content_of(place: Place) -> dict:
    return yaml.safe_load(place.plan.path.read_text())


def test_the_minutes_end_a_block_and_leave_the_next_alone():
    limit, began = TimeLimit(0.05 / 60), time.monotonic()
    with pytest.raises(KeyboardInterrupt), limit():
        time.sleep(5)
    assert limit.over and time.monotonic() - began < 4
    with TimeLimit(0.05 / 60)():
        pass
    time.sleep(0.1)  # an alarm that stayed would end the process
    none = TimeLimit(None)
    with none():
        pass
    assert not none.over


def test_the_training_curve_of_a_record_is_short_and_its_means_are_the_curves():
    points = [(step, float(step)) for step in range(1, 401)]
    kept = worker.thinned(points)
    assert len(kept) <= worker.CURVE_POINTS and kept[0] == [8, 4.5] and kept[-1] == [400, 396.5]


def test_a_skipped_step_is_left_out_of_the_training_curve_and_counted(tmp_path):
    """It logs NaN, which no record can hold."""
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/reverse_kl_k1\n1,2.0\n2,nan\n3,4.0\n")
    assert worker.training_curve(tmp_path) == {"training_kl": [[1, 2.0], [3, 4.0]], "skipped_steps": 1}
    file.write_text("step,train/reverse_kl_k1\n1,2.0\n3,4.0\n")
    assert worker.training_curve(tmp_path) == {"training_kl": [[1, 2.0], [3, 4.0]]}


# -- the page ------------------------------------------------------------------------------------------------------------

KLS = {"uniform": {11: [1.0, 2.0], 12: [1.2, 2.4]}, "iw-1.5": {11: [0.9, 1.8], 12: [1.1, 2.2]}, "cdd": {11: [2.0, 3.0]}}


def made_up(kl: list[float]) -> dict:
    bands = [2.0, *([1.5] * 8), 1.0]
    tenths = {"disagreement": [bands, [3.0, *bands[1:]]], "reverse_kl": [bands, [None, *bands[1:]]]}
    shown = [{"sampled": "a `b` | c", "greedy": "7"}]
    return {"reverse_kl": kl, "teacher_text_nll": kl, "disagreement": kl, "exact": [0.0, 1.0]} | {
        "bands": bands, "tenths": tenths, "lengths": [4, 5], "ended": [1, 0], "tokens": 9, "distinct_2": 0.5, "samples": shown,
    }  # fmt: skip


@pytest.fixture
def finished(place) -> Place:
    """A plan with two seeds and three variants of it finished, one on one seed only."""
    own = content_of(place) | {"seeds": [11, 12], "held_out": {"count": 2, "seed": 5}}
    here = replace(fresh(place, "page"), plan=Plan(own, place.plan.path))
    shutil.rmtree(here.records, ignore_errors=True)
    about = {
        "plan": here.plan.sha,
        "steps": 2,
        "batch": 2,
        "tokens": 9,
        "machine": "a machine",
        "finished": "2026-01-01",
    }
    for variant, seeds in KLS.items():
        for seed, kl in seeds.items():
            job = here.plan.job("tiny", variant, seed, "cpu")
            write(
                here.record(job),
                {
                    **about,
                    "settings": job.settings_sha,
                    "seconds": 60.0,
                    "end": {**made_up(kl), "distinct_2": 0.4 if seed == 11 else 0.6},
                },
            )
    start = {
        "settings": here.plan and here.start_sha("tiny"),
        "problems": ["How many?"],
        "student": made_up([3.0, 5.0]),
    }
    write(here.start("cpu", "tiny"), {**start, "teacher": made_up([0.5, 0.5])})
    return here


def test_the_page_says_what_was_run_and_its_numbers_are_the_records(finished, tmp_path):
    page = report.write_report(finished.plan, finished.records, tmp_path).read_text()
    assert "5 of 16 runs, 2 steps of 2 prompts" in page and "None of 16 runs is finished." in page
    assert "18 differences were looked at" in page  # 8 and 4 from uniform and of cdd from IW-OPD, 6 of late from early
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in page.splitlines() if line.startswith("| ")}
    assert rows["(start)"][2].startswith("4.000") or "| (start) |  | 4.000 |" in page
    assert "| iw-1.5 | 2 | 1.500 [" in page and "| cdd | 1 | 2.500 |" in page
    assert re.search(r"\*\*-0\.150 \[-0\.\d+, -0\.\d+\]\*\*|-0\.150 \[", page)  # mean of -.1 -.2 -.1 -.2
    assert "| cdd - iw-1.5 | +1.150 |" in page and "null-advantage - start" not in page  # seed 11: 2, 3 against .9, 1.8
    assert report.contrast(_results(finished), "tiny", "uniform", "start", "reverse_kl").mean == pytest.approx(
        1.65 - 4.0
    )
    assert "| +1.000 |" in page  # cdd on one seed has no interval
    uniform = next(line for line in page.splitlines() if line.startswith("| uniform | 2.000 | 1.000"))
    assert (
        uniform.split(" | ")[3] == "-1.000"
    )  # of the one problem that has a token in its first tenth, so without an interval
    assert uniform.split(" | ")[4:6] == ["2.500", "1.000"] and "-1.500 [" in uniform
    assert "| tokens a response | ended by itself | different bigrams |" in page
    assert "| 4 | 50 % | 0.500 |" in page and "| 4 | 50 % | 0.500 (0.400 to 0.600) |" in page
    assert "- uniform, seed 11: `a 'b' | c`" in page and "> How many?" in page
    assert matplotlib.image.imread(tmp_path / "models_cpu.png").std() > 0.05
    assert not (tmp_path / "models_cuda.png").exists()
    assert report.write_report(finished.plan, finished.records, tmp_path).read_text() == page


def _results(place: Place) -> report.Results:
    return report.read_results(place.plan, "cpu", place.records)


def test_without_the_reference_and_without_any_run_there_is_a_page(finished, tmp_path):
    for seed in (11, 12):
        finished.record(finished.plan.job("tiny", "uniform", seed, "cpu")).unlink()
    page = report.write_report(finished.plan, finished.records, tmp_path / "some").read_text()
    assert "3 of 16 runs" in page and "8 differences were looked at" in page
    page = report.write_report(finished.plan, tmp_path / "none", tmp_path / "empty").read_text()
    assert page.count("None of 16 runs is finished.") == 2 and "![" not in page


def test_a_plan_that_has_changed_since_says_so_and_counts_what_kept_its_settings(finished, tmp_path):
    page = report.write_report(finished.plan, finished.records, tmp_path / "same").read_text()
    assert "The plan has changed" not in page
    other = Plan(finished.plan.content | {"question": "another"}, finished.plan.path)
    page = report.write_report(other, finished.records, tmp_path / "other").read_text()
    assert f"**The plan has changed since:** it is {other.sha[:12]} now." in page and "and counted: 5 runs." in page


def test_records_of_other_settings_are_no_results(finished, tmp_path):
    other = Plan(finished.plan.content | {"new_tokens": 99}, finished.plan.path)
    with pytest.raises(InputError, match="the plan has changed"):
        report.write_report(other, finished.records, tmp_path)


def test_the_committed_page_is_what_the_command_writes(tmp_path):
    shutil.copy(DOCS / "models.md", tmp_path)
    report.write_report(read_plan(), DOCS / "runs", tmp_path)
    assert (tmp_path / "models.md").read_text() == (DOCS / "models.md").read_text()


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="must hold records in JSON, got .*a.json"):
        read(tmp_path / "a.json")


# -- pieces --------------------------------------------------------------------------------------------------------------


def _there(path: Path):
    from contextlib import nullcontext

    path.write_bytes(bytes(range(256)) * 8000)
    return nullcontext(path)


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """Three pieces of a file of 2 MB, each in a folder of its own, and a conversion that keeps the file."""

    def convert(folder: Path, *, gguf: Path) -> None:
        (folder / "student").mkdir(parents=True)
        (folder / "student" / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setitem(pieces.SOURCES, "smollm2", pieces.Source(lambda: _there(tmp_path / "a.gguf"), convert))
    plan = read_plan()
    with pieces.SOURCES["smollm2"].file() as file:
        written = pieces.cut("smollm2", file, tmp_path / "pieces", plan, megabytes=1)
    for number, path in enumerate(written):
        folder = tmp_path / "carried" / str(number)
        folder.mkdir(parents=True)
        path.rename(folder / path.name)
    return plan, tmp_path


def test_pieces_are_joined_to_the_file_they_were_cut_from(carried):
    plan, folder = carried
    sizes = sorted(path.stat().st_size for path in (folder / "carried").rglob("smollm2.gguf.*"))
    assert sizes == [48_000, 10**6, 10**6]
    out = pieces.assemble("smollm2", folder / "carried", folder / "weights", plan)
    assert (out / "student" / "config.json").read_bytes() == (folder / "a.gguf").read_bytes()
    (folder / "carried" / "0" / "smollm2.pieces.json").unlink()  # nothing is read where the model is there
    assert pieces.assemble("smollm2", folder / "carried", folder / "weights", plan) == out


def test_missing_damaged_and_foreign_pieces_are_named(carried):
    plan, folder = carried
    third = next((folder / "carried").rglob("smollm2.gguf.02"))
    content = third.read_bytes()
    third.write_bytes(content[:-1] + b"x")
    with pytest.raises(InputError, match=r"got .*smollm2.gguf.02 of another sha256"):
        pieces.assemble("smollm2", folder / "carried", folder / "weights", plan)
    third.unlink()
    with pytest.raises(InputError, match=r"must hold all pieces of smollm2, got .* without smollm2.gguf.02$"):
        pieces.assemble("smollm2", folder / "carried", folder / "weights", plan)
    other = Plan(plan.content | {"train": {"count": 7}}, plan.path)
    with pytest.raises(InputError, match="must be of this plan's prompts"):
        pieces.assemble("smollm2", folder / "carried", folder / "weights", other)
    assert not (folder / "weights" / "smollm2").exists()
