"""The evaluation callback through real fits: schedule, rows, resumption, random streams, errors before training."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import EarlyAIMEEvaluation
from callbacks.early_aime import shared_out
from lit_opd.cli.command import OPDCLI
from lit_opd.errors import InputError
from lit_opd.evaluation.grading import Grader
from lit_opd.evaluation.statistics import bootstrap_interval
from lit_opd.models import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.prompts import PromptDataModule
from lit_opd.rollout import TransformersSampler, VLLMEngine
from lit_opd.teacher import LocalTeacher
from tests.helpers import fake_llm, fake_vllm, tiny
from tests.helpers import math_world as world
from tests.servers.test_server_recovery import write_config

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 240  # seconds; a hang is a failure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("aime")
    world.models(made)
    world.problems(made / "aime.jsonl")
    world.problems(made / "other.jsonl", 3, start=20)
    return made


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    sets = [str(folder / "aime.jsonl"), {"path": str(folder / "other.jsonl"), "id_prefix": "second"}]
    settings = world.evaluation(folder, sets=sets, target=0.01, steps=[0, 1, 2, 3])
    return world.run(world.config(folder / "with", [settings]), folder / "with" / "run")


def logged(run_dir: Path) -> list[tuple[int, str]]:
    """(step, metric) in the order of metrics.csv."""
    lines = csv.DictReader((run_dir / "metrics.csv").open())
    return [(int(line["step"]), name) for line in lines for name, value in line.items() if value]


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Evaluation metrics by step."""
    found: dict[int, dict[str, float]] = {}
    for line in csv.DictReader((run_dir / "metrics.csv").open()):
        values = {name: float(value) for name, value in line.items() if name.startswith("eval/") and value}
        found.setdefault(int(line["step"]), {}).update(values)
    return {step: values for step, values in found.items() if values}


# -- what an evaluation leaves behind ----------------------------------------------------------------------------------


def test_every_scheduled_step_has_a_line_for_every_sample_of_every_set(finished):
    counts = Counter((line["set"], line["step"]) for line in world.lines(finished))
    assert counts == {
        (name, step): problems * world.SAMPLES
        for name, problems in (("aime", world.PROBLEMS), ("second", 3))
        for step in (0, 1, 2, 3)
    }
    keys = {(line["set"], line["step"], line["problem_id"], line["sample"]) for line in world.lines(finished)}
    assert len(keys) == sum(counts.values())
    start = [line for line in world.lines(finished) if (line["set"], line["step"]) == ("aime", 0)]
    texts = {(line["problem_id"], line["text"]) for line in start}
    assert len(texts) > world.PROBLEMS  # every sample has a random stream of its own


def test_the_metrics_are_those_of_the_lines(finished):
    """Recomputed from the texts with the testbed's own idea of an answer."""
    logged = metrics(finished)
    assert set(logged) == {0, 1, 2, 3}
    for step in logged:
        rows = [line for line in world.lines(finished) if (line["set"], line["step"]) == ("aime", step)]
        right = [
            line["text"].rpartition("\\boxed{")[2].partition("}")[0].lstrip("0") == line["reference"].lstrip("0")
            for line in rows
        ]
        assert right == [line["correct"] for line in rows]
        by_id = {line["problem_id"]: [] for line in rows}
        for line in rows:
            by_id[line["problem_id"]].append(line["correct"])
        rates = [sum(values) / world.SAMPLES for values in by_id.values()]
        assert logged[step]["eval/aime/avg_at_k"] == pytest.approx(sum(rates) / len(rates))
        assert logged[step]["eval/aime/pass_at_4"] == pytest.approx(sum(rate > 0 for rate in rates) / len(rates))
        assert logged[step]["eval/aime/response_length"] == pytest.approx(
            sum(line["length"] for line in rows) / len(rows)
        )
    assert 0 < logged[0]["eval/aime/avg_at_k"] < 1  # the student is right now and then, or this test proves little


def test_differences_are_paired_with_step_0_and_the_target_names_its_step(finished):
    logged = metrics(finished)
    start, now = (metrics(finished)[step]["eval/aime/avg_at_k"] for step in (0, 2))
    assert "eval/aime/delta_start" not in logged[0]
    assert logged[2]["eval/aime/delta_start"] == pytest.approx(now - start)
    assert logged[2]["eval/aime/delta_start_low"] <= now - start <= logged[2]["eval/aime/delta_start_high"]
    assert logged[2]["eval/aime/steps_to_target"] == 0 == logged[2]["eval/aime/tokens_to_target"]
    tokens = {line["step"]: line["tokens"] for line in world.lines(finished)}
    trained = [
        float(line["train/tokens"])
        for line in csv.DictReader((finished / "metrics.csv").open())
        if line["train/tokens"]
    ]
    assert tokens == {0: 0, 1: trained[0], 2: trained[0] + trained[1], 3: sum(trained)}


def test_samples_come_from_the_distribution_that_was_asked_for(folder):
    """At a temperature near 0 the lines are what plain greedy ``generate`` of transformers writes."""
    settings = world.evaluation(folder, temperature=1e-4, samples=1)
    run = world.run(world.config(folder / "cold", [settings]), folder / "cold" / "run", command="validate")
    cold = world.lines(run, "evaluation-validate.jsonl")
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = [json.loads(line) for line in (folder / "aime.jsonl").read_text("utf-8-sig").splitlines() if line]
    for row in rows:
        chat = [{"role": "user", "content": row["Problem"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=48)[0, prompt["input_ids"].shape[1] :]
        (line,) = [line for line in cold if line["problem_id"] == str(row["id"])]
        assert line["text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_weights_are_the_same_with_and_without_the_callback(finished, folder):
    without = world.run(world.config(folder / "without"), folder / "without" / "run")
    ours, theirs = world.weights(finished), world.weights(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    start = dict(AutoModelForCausalLM.from_pretrained(folder / "student").named_parameters())
    assert any(not torch.equal(ours[name], start[name]) for name in start)


# -- kills and failures ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def calls(monkeypatch):
    """Rows of every sampling call of an evaluation, and a way to be killed at the n-th."""
    seen: list[int] = []
    limit = [10**9]
    sample = TransformersSampler.sample

    def counted(self, model, prompts, settings):
        if settings.domain >= 1 << 20:
            if len(seen) == limit[0]:
                raise Killed
            seen.append(len(prompts))
        return sample(self, model, prompts, settings)

    monkeypatch.setattr(TransformersSampler, "sample", counted)
    return seen, limit


def test_a_run_killed_inside_an_evaluation_completes_it_and_repeats_nothing(finished, folder, calls):
    """6 problems x 4 samples in batches of 10: the second of three batches of step 1 is the last before the kill."""
    seen, limit = calls
    path, run = world.config(folder / "killed", [world.evaluation(folder, steps=[0, 2])]), folder / "killed" / "run"
    limit[0] = 3 + 2
    with pytest.raises(Killed):
        world.run(path, run)
    assert Counter(line["step"] for line in world.lines(run)) == {0: 24, 2: 20}
    with (run / "evaluation.jsonl").open("a") as file:
        file.write('{"set": "aime", "step": 2, "problem_id": "0", "sam')
    seen.clear()
    limit[0] = 10**9
    world.run(path, run, "--ckpt_path", "last")
    assert seen == [4]
    ours = {(line["step"], line["problem_id"], line["sample"]): line for line in world.lines(run)}
    theirs = {
        (line["step"], line["problem_id"], line["sample"]): line
        for line in world.lines(finished)
        if line["set"] == "aime" and line["step"] in (0, 2)
    }
    assert len(world.lines(run)) == 48 and ours == theirs
    assert not (run / "evaluation.jsonl.aside").exists()
    assert metrics(run)[2] == pytest.approx({k: v for k, v in metrics(finished)[2].items() if k in metrics(run)[2]})


def test_a_resumed_run_repeats_no_finished_evaluation_unless_the_settings_changed(finished, folder, calls):
    """The run stopped at step 3, which was evaluated; the copy goes on from there."""
    seen, _ = calls
    run = Path(shutil.copytree(finished, folder / "again"))
    same = world.config(folder / "same", [world.evaluation(folder, steps=[0, 3])])
    world.run(same, run, "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert not seen and world.lines(run) == world.lines(finished)
    assert [step for step, name in logged(run) if name == "eval/aime/avg_at_k"] == [0, 1, 2, 3]
    changed = world.config(folder / "changed", [world.evaluation(folder, steps=[], every=4, temperature=0.5)])
    world.run(changed, run, "--ckpt_path", "last", "--trainer.max_steps", "5")
    assert seen == [10, 10, 4]
    assert len({line["settings"] for line in world.lines(run)}) == 3  # two sets, and the first with another temperature


@pytest.fixture(scope="module")
def four_steps(folder) -> tuple[Path, Path]:
    """A config that keeps every checkpoint and evaluates after every step, and its run."""
    keep = {"class_path": "callbacks.RunCheckpoint", "init_args": {"every": 1, "keep": 99}}
    path = world.config(folder / "four", [world.evaluation(folder, steps=[], every=1), keep], max_steps=4)
    return path, world.run(path, folder / "four" / "run")


def steps_of(run_dir: Path, name: str = "evaluation.jsonl") -> dict[int, int]:
    return dict(Counter(line["step"] for line in world.lines(run_dir, name)))


def test_a_run_that_goes_back_with_another_learning_rate_answers_its_later_steps_anew(
    four_steps, folder, calls, caplog
):
    seen, _ = calls
    path, run = four_steps[0], Path(shutil.copytree(four_steps[1], folder / "back", symlinks=True))
    before, back = world.lines(run), ("--ckpt_path", str(run / "checkpoints" / "step-2.ckpt"))
    with caplog.at_level("INFO"):
        world.run(path, run, *back, "--model.optimizer.lr", "0.05")
    assert "its evaluations at 3, 4 are in evaluation.jsonl.aside now" in caplog.text
    assert seen == [10, 10, 4] * 2 and steps_of(run) == dict.fromkeys(range(5), 24)
    assert world.lines(run)[:72] == before[:72] and world.lines(run, "evaluation.jsonl.aside") == before[72:]
    right = {step: [line["correct"] for line in world.lines(run) if line["step"] == step] for step in (3, 4)}
    for step in (3, 4):
        assert metrics(run)[step]["eval/aime/avg_at_k"] == pytest.approx(sum(right[step]) / 24)
    assert [line["text"] for line in world.lines(run)[72:]] != [line["text"] for line in before[72:]]
    seen.clear()
    world.run(path, run, *back)  # and back to the run that it was
    assert not seen and world.lines(run) == before
    assert steps_of(run, "evaluation.jsonl.aside") == {3: 24, 4: 24}


def test_lines_of_an_older_run_without_a_mark_count_up_to_the_step_that_it_goes_on_from(four_steps, folder, calls):
    seen, _ = calls
    path, run = four_steps[0], Path(shutil.copytree(four_steps[1], folder / "older", symlinks=True))
    older = [{name: value for name, value in line.items() if name != "weights"} for line in world.lines(run)]
    (run / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    world.run(path, run, "--ckpt_path", str(run / "checkpoints" / "step-3.ckpt"))
    assert seen == [10, 10, 4] and steps_of(run) == dict.fromkeys(range(5), 24)
    assert world.lines(run)[: 4 * 24] == older[: 4 * 24]


def test_modes_and_random_states_survive_a_failure():
    """The student stays in the mode that every part of it was in, and training goes on as if nothing had been sampled."""
    from lit_opd.evaluation import undisturbed

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train()
    model[1].eval()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="midway"), undisturbed(model):
        model.eval()
        torch.rand(100)
        raise RuntimeError("midway")
    assert [part.training for part in model.modules()] == [True, True, False]
    assert torch.equal(torch.rand(3), expected) and torch.is_grad_enabled()


def test_memory_that_runs_out_in_an_evaluation_names_the_settings(folder, tmp_path, capsys):
    starved = {
        "class_path": "tests.helpers.poisoned.Starved",
        "init_args": {"who": "student", "calls": [0], "training": False},
    }
    with pytest.raises(SystemExit) as stopped:
        world.run(world.config(folder / "starved", [starved, world.evaluation(folder)]), tmp_path / "run")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in message
    assert "out of memory while evaluating; lower `EarlyAIMEEvaluation.batch` or" in message


# -- engines of their own ----------------------------------------------------------------------------------------------


def write_problems(path: Path) -> str:
    path.write_text("".join(json.dumps({"problem": f"{n} + {n} =", "answer": 2 * n}) + "\n" for n in range(4)))
    return str(path)


def test_an_engine_that_trains_on_short_rows_answers_at_length(tmp_path, monkeypatch):
    """Its rows hold the longest prompt and answer of the sets, not those of training alone."""
    llm, folders = fake_llm.install(monkeypatch), tiny.pair(tmp_path)
    problems = write_problems(tmp_path / "problems.jsonl")
    sampler = VLLMEngine(str(tmp_path / "engine"), max_new_tokens=4, stop_token_ids=[63])
    trained = OPDModule(StudentSettings(folders[0]), LocalTeacher(folders[1]), sampler=sampler)
    callback = EarlyAIMEEvaluation(problems, samples=2, max_new_tokens=30, prompt_suffix=None)
    data = PromptDataModule(train=problems, val=problems, prompt_batch=2, max_prompt_tokens=12)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[callback], **quiet).validate(
        trained, datamodule=data
    )
    lengths = [line["length"] for line in world.lines(tmp_path, "evaluation-validate.jsonl")]
    assert len(lengths) == 8 and max(lengths) == 30 and llm.made.options["max_model_len"] < 64


def test_answers_that_servers_cannot_hold_are_refused_before_the_run(tmp_path, capsys):
    folders = tiny.pair(tmp_path)
    with fake_vllm.serving(folders[0], model="student", window=36) as server:
        config = write_config(tmp_path, folders, server.url)  # whose own rows are of 30 tokens
        settings = yaml.safe_load(config.read_text())
        given = {"sets": write_problems(tmp_path / "problems.jsonl"), "max_new_tokens": 40, "prompt_suffix": None}
        settings["trainer"]["callbacks"] = [{"class_path": "callbacks.EarlyAIMEEvaluation", "init_args": given}]
        config.write_text(yaml.safe_dump(settings))
        with pytest.raises(SystemExit):
            world.run(config, tmp_path / "run")
    said = capsys.readouterr().err
    assert "`EarlyAIMEEvaluation.max_new_tokens` must leave room in the servers' context of 36 tokens" in said
    assert "--max-model-len" in said and not (tmp_path / "run").exists()


def test_another_runs_lines_are_set_aside(folder, tmp_path):
    callback = EarlyAIMEEvaluation([str(folder / "aime.jsonl")])
    assert callback.steps == [0, 1, 2, 5, 10, 20]
    from callbacks.early_aime import _set_aside

    (tmp_path / "evaluation.jsonl").write_text("{}\n")
    with pytest.warns(UserWarning, match="evaluation.jsonl.previous"):
        _set_aside(tmp_path / "evaluation.jsonl")
    assert (tmp_path / "evaluation.jsonl.previous").read_text() == "{}\n"


# -- budgets, comparisons, loggers -------------------------------------------------------------------------------------


def test_a_token_budget_keeps_a_random_subset_and_says_so(folder, finished, caplog):
    settings = world.evaluation(folder, token_budget=3 * world.SAMPLES * 48, steps=[0, 1], compare_to=str(finished))
    path = world.config(folder / "budget", [settings])
    with caplog.at_level("INFO"):
        run = world.run(path, folder / "budget" / "run", "--trainer.max_steps", "1")
    assert "3 of 6 in aime" in caplog.text
    ids = [{line["problem_id"] for line in world.lines(run) if line["step"] == step} for step in (0, 1)]
    assert ids[0] == ids[1] and len(ids[0]) == 3
    assert metrics(run)[0]["eval/aime/problems"] == 3
    # the same weights, prompts and streams as the other run had: its common problems have the same samples
    for step in (0, 1):
        delta = [metrics(run)[step][f"eval/aime/delta_run{end}"] for end in ("", "_low", "_high")]
        assert delta == [0.0, 0.0, 0.0]


def test_minutes_are_measured_once_and_kept(folder, calls):
    seen, _ = calls
    path = world.config(folder / "minutes", [world.evaluation(folder, minutes=1e-6, steps=[0, 1])])
    run = world.run(path, folder / "minutes" / "run", "--trainer.max_steps", "1")
    assert seen == [10, world.SAMPLES, world.SAMPLES]  # the trial batch, then one problem a step
    assert {line["problems"] for line in world.lines(run)} == {1}


def test_sets_share_a_budget_alike_and_keep_one_problem():
    assert shared_out({"a": 30, "b": 500}, samples=32, rows=1e9) == {"a": 30, "b": 500}
    assert shared_out({"a": 30, "b": 300}, samples=4, rows=660) == {"a": 15, "b": 150}
    assert shared_out({"a": 30, "b": 300}, samples=4, rows=0) == {"a": 1, "b": 1}


def test_wandb_gets_a_table_of_flips(folder):
    path = world.config(folder / "wandb", [world.evaluation(folder, steps=[0, 1], batch=24)])
    changed = ["--wandb.mode", "offline", "--trainer.max_steps", "1", "--model.optimizer.lr", "0.05"]
    run = world.run(path, folder / "wandb" / "run", *changed)
    (table,) = run.rglob("media/table/eval/aime/flips*.table.json")
    values = json.loads(table.read_text())
    assert values["columns"] == ["problem_id", "problem", "reference", "start", "now", "change"]
    rates: dict[tuple[str, int], list[bool]] = {}
    for line in world.lines(run):
        rates.setdefault((line["problem_id"], line["step"]), []).append(line["correct"])
    assert values["data"]
    for problem_id, _, _, start, now, change in values["data"]:
        assert start == sum(rates[problem_id, 0]) / world.SAMPLES and now == sum(rates[problem_id, 1]) / world.SAMPLES
        assert change == now - start != 0


# -- stand-alone -------------------------------------------------------------------------------------------------------


def test_validate_on_a_checkpoint_and_test_on_an_exported_folder_give_the_same_numbers(folder, finished, capsys):
    path = world.config(folder / "alone", [world.evaluation(folder)])
    before = (finished / "evaluation.jsonl").read_text()
    checkpoint = str(finished / "checkpoints" / "last.ckpt")
    world.run(path, finished, "--ckpt_path", checkpoint, command="validate")
    world.run(path, finished, "--model.student.path", str(finished / "student"), command="test")
    assert capsys.readouterr().out.count("eval/aime/avg_at_k ") == 2
    one, two = world.lines(finished, "evaluation-validate.jsonl"), world.lines(finished, "evaluation-test.jsonl")
    assert [line["text"] for line in one] == [line["text"] for line in two]
    assert {line["step"] for line in one} == {world.STEPS} and len(one) == 24
    assert (finished / "evaluation.jsonl").read_text() == before


# -- the command line --------------------------------------------------------------------------------------------------


def snippet() -> dict:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    return yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])


def test_the_documented_yaml_is_what_the_parser_takes(folder, finished, tmp_path):
    """With local paths, a small window and another run's folder put in."""
    shown = snippet()
    values = shown["trainer"]["callbacks"][0]["init_args"]
    values["sets"] = [str(folder / "aime.jsonl"), {"path": str(folder / "other.jsonl"), "id_prefix": "second"}]
    values |= {"compare_to": str(finished), "max_new_tokens": 48}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(shown))
    base = world.config(folder / "base")
    cli = OPDCLI(args=["--config", str(base), "--config", str(tmp_path / "overlay.yaml")], run=False)
    (callback,) = [found for found in cli.trainer.callbacks if isinstance(found, EarlyAIMEEvaluation)]
    assert (callback.steps, callback.every, callback.samples, callback.target) == ([0, 1, 2, 5, 10, 20], 50, 32, 0.4)
    assert callback.template_options == {"enable_thinking": False}
    callback.check(cli.model, cli.datamodule)
    assert [loaded.name for loaded in callback._sets] == ["aime", "second"]


def test_problems_are_rendered_by_the_tokenizer_of_the_data(folder, tmp_path):
    other = AutoTokenizer.from_pretrained(folder / "student")
    other.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    other.save_pretrained(tmp_path / "other")
    base = world.config(folder / "named", [world.evaluation(folder, prompt_suffix="9")])
    cli = OPDCLI(args=["--config", str(base), "--data.tokenizer", str(tmp_path / "other")], run=False)
    (callback,) = [found for found in cli.trainer.callbacks if isinstance(found, EarlyAIMEEvaluation)]
    callback.check(cli.model, cli.datamodule)
    assert other.decode(callback._sets[0].problems[0].prompt.ids).replace(" ", "").endswith("9=")


def test_the_short_form_on_the_command_line(folder):
    base = world.config(folder / "short")
    name = ["--trainer.callbacks+=EarlyAIMEEvaluation", "--trainer.callbacks.sets", str(folder / "aime.jsonl")]
    cli = OPDCLI(args=["--config", str(base), *name], run=False)
    (callback,) = [found for found in cli.trainer.callbacks if isinstance(found, EarlyAIMEEvaluation)]
    assert [source.path for source in callback.sources] == [str(folder / "aime.jsonl")]


BAD_ROW = '\ufeff{"problem": "a=123", "answer": 1}\n\n{"problem": "a=123", "answer": null}\n'
BAD = {
    "missing answer": ({"sets": ["{folder}/bad.jsonl"]}, ["bad.jsonl:3", "answer is missing"]),
    "missing file": ({"sets": ["{folder}/nowhere.jsonl"]}, ["nowhere.jsonl"]),
    "no room": ({"max_new_tokens": 1000}, ["EarlyAIMEEvaluation.max_new_tokens", "1000"]),
    "samples": ({"samples": 0}, ["EarlyAIMEEvaluation.samples", "0"]),
    "no schedule": ({"steps": []}, ["EarlyAIMEEvaluation.steps"]),
    "nothing to compare": ({"compare_to": "{folder}/bad.jsonl"}, ["bad.jsonl:1", "lacks"]),
    "misspelt": ({"sample": 3}, ["sample"]),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_wrong_input_is_one_error_before_training_and_leaves_nothing(folder, tmp_path, capsys, case):
    settings, needles = BAD[case]
    (folder / "bad.jsonl").write_text(BAD_ROW, encoding="utf-8")
    text = json.dumps(world.evaluation(folder, **settings)).replace("{folder}", str(folder))
    with pytest.raises(SystemExit) as stopped:
        world.run(world.config(folder / "wrong", [json.loads(text)]), tmp_path / "run")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and all(needle in message for needle in needles), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("top_p", 1.5),
        ("every", 0),
        ("target", 2.0),
        ("batch", 0),
        ("minutes", 0.0),
        ("steps", [-1]),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=f"EarlyAIMEEvaluation.{field}"):
        EarlyAIMEEvaluation("a.jsonl", **{field: value})


def test_the_callback_goes_into_a_checkpoint_as_plain_values():
    callback = EarlyAIMEEvaluation("a.jsonl", grader=Grader(num_workers=1))
    callback._tokens, callback._planned = 12, {"a": 3}
    other = EarlyAIMEEvaluation("a.jsonl")
    other.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert (other._tokens, other._planned) == (12, {"a": 3})


# -- two ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_share_the_samples_and_agree_with_one(folder, finished):
    """The lines of step 0 are one process's, whichever rank drew them; the metrics count every sample once."""
    path = world.config(folder / "ranks", [world.evaluation(folder, steps=[0])], strategy="ddp")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "train.py",
        "fit",
    ]
    command += ["--config", str(path), "--run_dir", str(folder / "ranks" / "run")]
    command += ["--trainer.devices", "2", "--trainer.max_steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    ours = {(line["problem_id"], line["sample"]): line["text"] for line in world.lines(folder / "ranks" / "run")}
    theirs = [line for line in world.lines(finished) if line["set"] == "aime" and line["step"] == 0]
    assert len(world.lines(folder / "ranks" / "run")) == 24
    assert ours == {(line["problem_id"], line["sample"]): line["text"] for line in theirs}
    assert {line["weights"] for line in world.lines(folder / "ranks" / "run")} == {line["weights"] for line in theirs}
    first, second = metrics(folder / "ranks" / "run")[0], metrics(finished)[0]
    assert first == pytest.approx({name: second[name] for name in first})
    rates = [sum(line["correct"] for line in theirs if line["problem_id"] == str(n)) / 4 for n in range(6)]
    low, high = bootstrap_interval(torch.tensor(rates, dtype=torch.float64), seed=42)
    assert (low, high) == pytest.approx((first["eval/aime/avg_at_k_low"], first["eval/aime/avg_at_k_high"]), abs=0.05)
