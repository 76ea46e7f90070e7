"""The real command line on tiny real models: what a run leaves behind, and what wrong input says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import default_callbacks
from lit_opd.cli.command import main
from tests.helpers import tiny

STEPS = 4


def write_prompts(path: Path, count: int = 24, **extra: Any) -> Path:
    rows = [{"id": f"p{i}", "prompt": f"{i} + {i} =", "answer": str(2 * i), **extra} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, prompts and a config that names them."""
    folder = tmp_path_factory.mktemp("world")
    student, teacher = tiny.pair(folder)
    config = {
        "seed_everything": 7,
        "num_threads": 1,
        "wandb": {"mode": "disabled"},
        "checkpoint_every": 2,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "val_check_interval": 2},
        "model": {
            "student": {"path": student},
            "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": teacher}},
            "sampler": {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": 8}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "train": str(write_prompts(folder / "train.jsonl")),
            "val": str(write_prompts(folder / "val.jsonl", 8)),
            "prompt_batch": 8,
            "max_prompt_tokens": 24,
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(world: Path, run_dir: Path | None, *overrides: str, command: str = "fit") -> None:
    folder = ["--run_dir", str(run_dir)] if run_dir else []
    main(default_callbacks, [command, "--config", str(world / "base.yaml"), *folder, *overrides])


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(run_dir / "student").named_parameters())


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    run(world, world / "finished")
    return world / "finished"


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_the_run_folder_is_complete(finished):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    expected = {"config.yaml", "summary.json", "metrics.csv", "checkpoints/last.ckpt", f"checkpoints/step-{STEPS}.ckpt"}
    assert expected | {"student/model.safetensors", "student/tokenizer.json", "student/generation_config.json"} <= names


def test_the_summary_counts_what_was_sampled(finished):
    summary = json.loads((finished / "summary.json").read_text())
    keys = ["greedy", "avg_at_4", "reverse_kl"]
    expected = {f"{key}_{when}" for key in keys for when in ("start", "end")}
    assert set(summary) == expected | {"steps", "tokens", "seconds", "seed", "strategy", "trained"}
    assert (summary["steps"], summary["seed"], summary["strategy"]) == (STEPS, 7, "ImportanceWeighting")
    assert STEPS * 8 <= summary["tokens"] <= STEPS * 8 * 8
    assert summary["reverse_kl_end"] < summary["reverse_kl_start"]


def test_metrics_are_written_for_every_step(finished):
    import csv

    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in rows if row["val/reverse_kl"]] == [0, 2, 4]


def test_the_saved_config_runs_again_to_the_same_weights(finished, world):
    main(default_callbacks, ["fit", "--config", str(finished / "config.yaml"), "--run_dir", str(world / "again")])
    ours, theirs = exported(world / "again"), exported(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stopped_run_goes_on_to_the_same_weights(finished, world):
    folder = world / "stopped"
    run(world, folder, "--trainer.max_steps", "2")
    run(world, folder, "--ckpt_path", "last")
    ours, theirs = exported(folder), exported(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    summary = json.loads((folder / "summary.json").read_text())
    whole = json.loads((finished / "summary.json").read_text())
    assert summary["tokens"] == whole["tokens"] and summary["steps"] == STEPS
    assert summary["reverse_kl_start"] == whole["reverse_kl_start"]
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert len(lines) == len((finished / "metrics.csv").read_text().splitlines())


def test_the_config_of_a_continued_run_starts_a_run_of_its_own(world, capsys):
    """A run's file says what the run is: neither the checkpoint it went on from nor the leave to empty its folder."""
    folder, other = world / "goes-on", world / "goes-on-uniform"
    run(world, folder, "--trainer.max_steps", "2", "--overwrite", "true")
    run(world, folder, "--ckpt_path", "last")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["ckpt_path"] is None and saved["overwrite"] is False
    again = ["fit", "--config", str(folder / "config.yaml"), "--model.weighting", "Uniform", "--run_dir", str(other)]
    main(default_callbacks, again)
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (other, folder))
    assert ours["strategy"] == "Uniform" and ours["steps"] == STEPS and ours["tokens"] > 0
    assert ours["reverse_kl_start"] == theirs["reverse_kl_start"]  # from the first student, not from the finished one
    before = (other / "summary.json").read_bytes()
    with pytest.raises(SystemExit):
        main(default_callbacks, again)  # the folder is not emptied unasked
    assert "--overwrite" in capsys.readouterr().err and (other / "summary.json").read_bytes() == before


def test_the_exported_student_answers_as_the_module_does(finished, world):
    """Plain transformers on student/ gives the greedy accuracy of summary.json, and the module's own texts."""
    model = AutoModelForCausalLM.from_pretrained(finished / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    before = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[f"student.model.{name}"]), name
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 3 ="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == 1


def test_validate_test_and_predict_run_on_a_checkpoint(finished, world, capsys):
    for command in ("validate", "test", "predict"):
        run(world, None, "--ckpt_path", str(finished / "checkpoints" / "last.ckpt"), command=command)
    assert "val/reverse_kl" in capsys.readouterr().out


# -- overrides ---------------------------------------------------------------------------------------------------------

STRATEGY = """
import torch
from lit_opd.weighting import WeightingStrategy

class Mine(WeightingStrategy):
    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = k

    def weights(self, signal, progress):
        return torch.full_like(signal.student_logprobs, float(self.k))
"""


def test_a_strategy_in_the_users_own_file_is_one_override(world, tmp_path, monkeypatch):
    (tmp_path / "my_file.py").write_text(STRATEGY)
    monkeypatch.delitem(sys.modules, "my_file", raising=False)  # another test has one too
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = ["--trainer.max_steps", "2", "--model.weighting", "my_file.Mine", "--model.weighting.k", "3"]
    run(world, tmp_path / "run", *overrides)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["strategy"] == "Mine"
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/weight_mean")
    assert {float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]} == {3.0}


def test_interpolation_follows_overrides(world, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "vars: {rate: 0.5}\nmodel: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: '${vars.rate}'}}}\n"
    )
    run(world, tmp_path / "run", "--config", str(overlay), "--vars.rate", "0.25", "--trainer.max_steps", "2")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["optimizer"]["init_args"]["lr"] == 0.25


# -- wrong input -------------------------------------------------------------------------------------------------------


def bad_file(name: str, text: str):
    def build(folder: Path) -> list[str]:
        (folder / name).write_text(text)
        return ["--data.train", str(folder / name)]

    return build


def bad_teacher(**changes: Any):
    def build(folder: Path) -> list[str]:
        tokenizer = changes.get("tokenizer")
        model = tiny.qwen3(seed=3, rows=changes.get("rows", 64))
        tiny.save(model, folder / "teacher", with_tokenizer=tokenizer() if tokenizer else None)
        return ["--model.teacher.path", str(folder / "teacher")]

    return build


def no_pad(folder: Path) -> list[str]:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tiny.save(tiny.qwen3(seed=3), folder / "student", with_tokenizer=tokenizer)
    return ["--model.student.path", str(folder / "student")]


def folder_of_shards(folder: Path) -> list[str]:
    """What ModelParallelStrategy saves by default, as far as it is looked at before it is refused."""
    dcp.save({"state_dict": {"weight": torch.zeros(2)}}, checkpoint_id=folder / "shards.ckpt", no_dist=True)
    torch.save({"global_step": 2}, folder / "shards.ckpt" / "meta.pt")
    return ["--ckpt_path", str(folder / "shards.ckpt")]


def given(*overrides: str):
    return lambda folder: list(overrides)


BAD = {  # more in test_inputs.py, which has the whole table
    "missing model": (given("--model.student.path", "./nowhere"), ["model.student.path", "./nowhere"]),
    "missing data": (given("--data.train", "nowhere.jsonl"), ["nowhere.jsonl"]),
    "broken line": (bad_file("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n'), ["broken.jsonl:2"]),
    "other vocabulary": (
        bad_teacher(tokenizer=lambda: tiny.tokenizer("0123456789 =+abcdefghijklmnopqrstuvwxyz", rows=64)),
        ["39 tokens differ", "'0' (student 30, teacher 4)"],
    ),
    "no pad token": (no_pad, ["pad token", "model.student.pad_token"]),
    "more ranks than prompts": (
        given("--trainer.devices", "2", "--data.prompt_batch", "1"),
        ["prompt_batch", "2 ranks"],
    ),
    "shards in one process": (folder_of_shards, ["--ckpt_path", "consolidate_checkpoint", "shards.ckpt.consolidated"]),
    "w_max": (given("--model.weighting.w_max", "0.5"), ["ImportanceWeighting.w_max", "0.5"]),
    "clip in the trainer": (given("--trainer.gradient_clip_val", "1"), ["gradient_clip_norm"]),
    "accumulation in the trainer": (given("--trainer.accumulate_grad_batches", "2"), ["token_budget"]),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_wrong_input_is_one_clear_error_and_leaves_nothing(world, tmp_path, capsys, case):
    build, needles = BAD[case]
    overrides = build(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(world, tmp_path / "run", *overrides)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for needle in needles:
        assert needle in message
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_files_is_refused_and_kept(world, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(SystemExit):
        run(world, finished)
    assert "--overwrite" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


@pytest.mark.slow
def test_padded_rows_of_the_teachers_embedding_are_cut(world, tmp_path):
    """A teacher with 80 embedding rows for the same tokens trains a student with 64."""
    overrides = bad_teacher(rows=80, tokenizer=lambda: tiny.tokenizer(rows=64))(tmp_path)
    run(world, tmp_path / "run", *overrides, "--trainer.max_steps", "2")
    assert (tmp_path / "run" / "summary.json").exists()


def beside(world: Path, run_dir: Path, name: str) -> list[str]:
    """A fit that overwrites ``run_dir`` and reads ``name`` from it."""
    source = {"student": tiny.qwen3(seed=5), "train.jsonl": None, "base.yaml": None}[name]
    if source is not None:
        return ["--model.student.path", tiny.save(source, run_dir / name)]
    (run_dir / name).write_bytes((world / name).read_bytes())
    return ["--config" if name == "base.yaml" else "--data.train", str(run_dir / name)]


@pytest.mark.parametrize("name", ["student", "train.jsonl", "base.yaml"])
def test_overwriting_never_deletes_what_the_run_reads(world, tmp_path, capsys, name):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()
    overrides = beside(world, run_dir, name)
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(SystemExit):
        run(world, run_dir, *overrides, "--overwrite", "true")
    told = capsys.readouterr().err
    assert "`--overwrite` must be false" in told and str(run_dir / name) in told
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize("place", ["working directory", "no run's folder"])
def test_a_folder_that_is_no_run_is_not_overwritten_and_nobody_is_told_to(world, tmp_path, capsys, monkeypatch, place):
    (tmp_path / "thesis.tex").touch()
    if place == "working directory":
        (tmp_path / "config.yaml").touch()
        monkeypatch.chdir(tmp_path)
    folder = Path(".") if place == "working directory" else tmp_path
    for overwrite, told in (("false", "must be empty or new"), ("true", "`--overwrite` must be false")):
        with pytest.raises(SystemExit):
            run(world, folder, "--overwrite", overwrite)
        said = capsys.readouterr().err
        assert told in said and "--overwrite true" not in said
    assert (tmp_path / "thesis.tex").exists()
