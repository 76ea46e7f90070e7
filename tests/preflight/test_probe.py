"""Preflight's rows that run the real models, and the checks of the machine that a fit makes by itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks import ExportStudent, RunCheckpoint, default_callbacks
from lit_opd.advantage import RewardExtrapolation
from lit_opd.cli.command import main
from lit_opd.preflight import CHECKS, Finding, PlannedRun, examine, read_plan
from lit_opd.preflight.checks import _written
from lit_opd.preflight.trainer import PreflightTrainer
from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.rollout import TransformersSampler
from lit_opd.teacher import LocalTeacher
from tests.helpers import cases, fixed, poisoned, tiny

PROBED = ("log-probs", "own teacher")
CPU = {"accelerator": "cpu", "devices": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return poisoned.write_config(folder, tiny.pair(folder), list("abcdefgh"))


class OtherTemperature(TransformersSampler):
    """Draws at another temperature than it says."""

    def sample(self, model: Any, prompts: Any, settings: Any) -> Any:
        """Twice as hot."""
        return super().sample(model, prompts, replace(settings, temperature=2.0))


def run_of(
    config: Path, *, sampler: Any = None, teacher: Any = None, hint: str | None = None, **options: Any
) -> PlannedRun:
    """The run of a config's models and data, set up as the rows before the probed ones leave it."""
    settings = yaml.safe_load(config.read_text())
    third = {name: options.pop(name) for name in ("reference", "advantage") if name in options}
    models = settings["model"]["student"]["path"], teacher or settings["model"]["teacher"]["init_args"]["path"]
    sampler = sampler or TransformersSampler(max_new_tokens=4)
    module = fixed.module(models, cases.rollout(), sampler=sampler, dtype="float32", **third)
    data = PromptDataModule(**settings["data"], teacher_prompt=hint).use_tokenizer(module.tokenizer)
    trainer = PreflightTrainer(**CPU, logger=False, enable_checkpointing=False, use_distributed_sampler=False)
    plan = read_plan(options.pop("trainer", CPU), strategy="auto", memory_gb=8.0)
    run = PlannedRun(
        module=module, data=data, trainer=trainer, plan=plan, run_dir=config.parent / "run", settings=options
    )
    data.trainer = trainer
    data.setup("fit")
    return run


def rows(run: PlannedRun) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(run, {name: CHECKS[name] for name in PROBED})}


def test_models_that_agree_are_ok_and_the_figures_are_shown(config):
    found = rows(run_of(config))
    assert [finding.status for finding in found.values()] == ["ok", "ok"]
    assert "(bound 0.001)" in found["log-probs"].found and "|teacher - student|" in found["log-probs"].found
    assert "row by row" in found["own teacher"].found


def test_a_sampler_that_draws_from_something_else_is_an_error(config):
    found = rows(run_of(config, sampler=OtherTemperature(max_new_tokens=4)))
    assert found["log-probs"].status == "error" and "bound 0.001" in found["log-probs"].found
    assert "temperature" in found["log-probs"].remedy
    assert found["own teacher"].status == "ok"  # the probe was made, and that part is right


def test_a_teacher_that_is_not_finite_is_an_error_that_names_it(config, tmp_path):
    teacher = tiny.qwen3(seed=2)
    with torch.no_grad():
        teacher.lm_head.weight[7] = float("nan")
    found = rows(run_of(config, teacher=tiny.save(teacher, tmp_path / "teacher")))
    assert found["log-probs"].status == "error" and "the teacher's log-probs are not finite" in found["log-probs"].found
    assert found["own teacher"].status == "warning" and "log-probs" in found["own teacher"].found


def test_a_reference_does_not_read_what_only_the_teacher_is_told(config, tmp_path):
    """The hint's token, which no response here has, is NaN in the reference."""
    model, hint = tiny.qwen3(seed=3), "+"
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.tokenizer().convert_tokens_to_ids(hint)] = float("nan")
    reference = LocalTeacher(tiny.save(model, tmp_path / "reference"))
    third = {"reference": reference, "advantage": [RewardExtrapolation(1.5)]}
    found = rows(run_of(config, hint=hint + "{prompt}", **third))
    assert [finding.status for finding in found.values()] == ["ok", "ok"]


def test_a_student_whose_log_probs_depend_on_the_batch_is_an_error(config):
    run = run_of(config)
    run.module.trainer = run.trainer
    run.module.configure_model()
    block = run.module.student.causal_lm.get_decoder().layers[0]
    block.register_forward_hook(lambda layer, inputs, output: output + len(output))  # one row or four
    found = rows(run)["own teacher"]
    assert found.status == "error" and "eager" in found.remedy


def test_a_model_that_breaks_is_a_row_and_no_traceback(config):
    run = run_of(config)
    run.module.configure_model()
    run.module.student.causal_lm.lm_head.forward = None
    run.module.student.run = None
    found = rows(run)["log-probs"]
    assert found.status == "error" and "could not be sampled and scored: TypeError" in found.found


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        ({"deep": False}, "ok", "--deep false"),
        ({"trainer": {"accelerator": "gpu", "devices": 1}}, "warning", "on this machine's CPU"),
        ({"trainer": {"accelerator": "gpu", "devices": 1}, "deep": True}, "ok", "nats"),
    ],
)
def test_models_are_loaded_where_that_is_cheap_or_asked_for(config, options, status, reason):
    found = rows(run_of(config, **options))["log-probs"]
    assert found.status == status and reason in found.found
    assert bool(found.remedy) == (status == "warning")


def test_a_folder_without_weights_is_a_warning(config, tmp_path):
    tiny.save(tiny.qwen3(seed=2), tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    found = rows(run_of(config, teacher=str(tmp_path / "teacher")))["log-probs"]
    assert found.status == "warning" and "no weights in" in found.found


def test_errors_before_it_come_first(config):
    run = run_of(config)
    run.failed.append("data")
    assert rows(run)["log-probs"].found == "not probed: first the errors of: data"


# -- what a fit checks by itself ---------------------------------------------------------------------------------------


def keep_everything() -> list[Any]:
    """The default callbacks, with more checkpoints than any disk holds."""
    found = default_callbacks()
    for callback in found:
        if hasattr(callback, "save_top_k"):
            callback.save_top_k = 10**12
    return found


CASES = {
    "disk": ([], keep_everything, "RunCheckpoint.keep"),
    "W&B": (["--wandb.mode", "online"], default_callbacks, "set WANDB_API_KEY"),
    "run folder": (["--run_dir", "{file}/run"], default_callbacks, "is not writable"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_fit_that_this_machine_cannot_hold_is_refused_before_it_leaves_a_file(
    config, tmp_path, capsys, monkeypatch, name
):
    arguments, callbacks, told = CASES[name]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "file").chmod(0o600)
    before = sorted(tmp_path.rglob("*"))
    given = [word.format(file=tmp_path / "file") for word in arguments]
    command = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), *given]
    with pytest.raises(SystemExit) as stopped:
        main(callbacks, command)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and told in line
    assert sorted(tmp_path.rglob("*")) == before


def disk_row(config: Path, run_dir: Path, *, keep: int, dirpath: Path | None = None, **options: Any) -> Finding:
    """Checkpoints of a tiny model without optimizer state."""
    run = run_of(config, **options)
    run.run_dir = run_dir
    run.trainer.callbacks.append(RunCheckpoint(keep=keep, dirpath=dirpath and str(dirpath)))
    (found,) = examine(run, {"disk": CHECKS["disk"]})
    return found


def test_what_the_run_deletes_counts_as_free(config, tmp_path):
    """A file without blocks, as large as the rest of the disk, in place of a former run's checkpoints."""
    free, weights = shutil.disk_usage(tmp_path).free, 4 * sum(p.numel() for p in tiny.qwen3(seed=1).parameters())
    former, keep = tmp_path / "run" / "checkpoints" / "step-5.ckpt", int(1.5 * free / weights)
    former.parent.mkdir(parents=True)
    with former.open("wb") as file:
        file.truncate(free)
    assert disk_row(config, tmp_path / "run", keep=keep).status == "error"
    assert disk_row(config, tmp_path / "run", keep=keep, ckpt_path="last").status == "ok"
    assert disk_row(config, tmp_path / "run", keep=keep, overwrite=True).status == "ok"
    former.rename(former.with_name("other"))
    assert disk_row(config, tmp_path / "run", keep=keep, ckpt_path="last").status == "error"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="a second disk that every Linux has")
def test_checkpoints_are_looked_for_on_their_own_disk(config, tmp_path):
    found = disk_row(config, tmp_path / "run", keep=10**12, dirpath=Path("/dev/shm/no/such/folder"))
    assert found.status == "error" and "are free in /dev/shm" in found.found
    here = disk_row(config, tmp_path / "run", keep=1, dirpath=Path("/dev/shm/no/such/folder"))
    assert here.status == "ok" and here.found.count("are free in") == 2


def test_students_exported_on_the_way_take_room_too(config, tmp_path):
    """Ten steps, every fourth: after 4, 8 and at the end; a run that goes on from step 5 writes two of them."""
    weights = 4 * sum(p.numel() for p in tiny.qwen3(seed=1).parameters())
    run = run_of(config)
    run.run_dir, run.trainer.fit_loop.epoch_loop.max_steps = tmp_path / "run", 10
    assert _written(run) == {tmp_path / "run": weights}
    run.trainer.callbacks.append(ExportStudent(every=4))
    assert _written(run) == {tmp_path / "run": 3 * weights}
    run.trainer.callbacks[-1] = ExportStudent(every=4, path=str(tmp_path / "other" / "model"))
    assert _written(run) == {tmp_path / "other": 3 * weights}
    assert [path.name for path in ExportStudent(every=4).exports(tmp_path, range(6, 11))] == [
        "student-step-8",
        "student",
    ]


def test_online_wandb_with_a_key_is_ok(config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    found = examine(run_of(config, wandb={"mode": "online"}), {"W&B": CHECKS["W&B"]})
    assert found == [Finding("ok", "online", name="W&B")]
