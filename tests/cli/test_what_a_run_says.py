"""The command line in the hands of users: runs that go on, replaced folders, their own loggers, callbacks and classes."""

from __future__ import annotations

import csv
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import Logger
from transformers import AutoModelForCausalLM

from callbacks import Progress, RunCheckpoint, default_callbacks
from callbacks.summary import spans as shown
from lit_opd.cli.command import OPDCLI, main
from tests.cli.test_cli import run, world
from tests.helpers import wandb_file

__all__ = ["world"]  # the fixture


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def half(world: Path) -> Path:
    """A run of two steps, whose best checkpoint is kept."""
    best = [
        {"class_path": "callbacks.RunCheckpoint", "init_args": {"monitor": "val/reverse_kl", "every": 1, "keep": 1}}
    ]
    run(
        world,
        world / "half",
        "--trainer.max_steps",
        "2",
        "--trainer.val_check_interval",
        "1",
        "--trainer.callbacks",
        json.dumps(best),
    )
    return world / "half"


def refused(capsys: pytest.CaptureFixture[str], world: Path, folder: Path, *words: str, command: str = "fit") -> str:
    """The one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(world, folder, *words, command=command)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    return said


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_does_not_go_on_under_another_label(half, world, capsys):
    before = (half / "summary.json").read_bytes(), (half / "config.yaml").read_bytes()
    words = ("--ckpt_path", "last", "--model.weighting", "Uniform")
    assert "`model.weighting` must be what the checkpoint" in refused(capsys, world, half, *words)
    assert "`trainer.max_steps` must be above the checkpoint's step 2" in refused(
        capsys, world, half, *words, "--allow_change", "weighting", "--trainer.max_steps", "2"
    )
    assert "weighting" in refused(capsys, world, half, *words, "--allow_change", "wieghting")
    assert "`trainer.max_steps` must be at least the checkpoint's step 2" in refused(
        capsys, world, half, *words[:2], "--trainer.max_steps", "1"
    )
    other = ("--data.prompt_batch", "4", "--seed_everything", "8")
    assert "--allow_change data seed" in refused(capsys, world, half, *words[:2], *other)
    assert ((half / "summary.json").read_bytes(), (half / "config.yaml").read_bytes()) == before


def test_a_change_by_name_trains_and_is_said(half, world):
    """A branch of its own: other weighting, other data from their start, another seed."""
    changes = ("--model.weighting", "Uniform", "--data.prompt_batch", "4", "--seed_everything", "8")
    run(world, world / "branch", "--ckpt_path", str(half / "checkpoints" / "step-2.ckpt"), *changes,
        "--allow_change", "weighting", "data", "seed", "--trainer.max_steps", "3")  # fmt: skip
    spans = summary(world / "branch")["trained"]
    assert [span["steps"] for span in spans] == [[1, 2], [3, 3]]
    assert [span["strategy"] for span in spans] == ["ImportanceWeighting", "Uniform"]
    assert spans[1]["changed"] == ["weighting", "data", "seed"]
    assert (
        shown(summary(world / "branch"))
        == "steps 1-2 ImportanceWeighting; 3-3 Uniform (changed: weighting, data, seed)"
    )
    assert yaml.safe_load((world / "branch" / "config.yaml").read_text())["allow_change"] == []


# -- a folder that is replaced -----------------------------------------------------------------------------------------


class Breaks(Callback):
    """Fails behind the first batch, before any checkpoint."""

    def on_train_batch_end(self, *args: Any) -> None:
        """As a full disk would."""
        raise RuntimeError("broken")


def test_a_config_empties_no_folder_and_a_replaced_run_stays_until_there_is_a_checkpoint(world, capsys):
    folder = world / "replaced"
    run(world, folder, "--trainer.max_steps", "2")
    before = (folder / "summary.json").read_bytes()
    (world / "old.yaml").write_text("overwrite: true\n")  # as saved configs once had it
    assert "must be empty or new" in refused(capsys, world, folder, "--config", str(world / "old.yaml"))
    assert (folder / "summary.json").read_bytes() == before
    argv = ["fit", "--config", str(world / "base.yaml"), "--run_dir", str(folder), "--overwrite", "true"]
    with pytest.raises(RuntimeError, match="broken") as failed:
        main(lambda: [Breaks(), *default_callbacks()], argv)
    aside = folder.with_name("replaced.replaced")
    assert (aside / "summary.json").read_bytes() == before and str(aside) in "".join(failed.value.__notes__)
    main(default_callbacks, [*argv, "--trainer.max_steps", "1"])
    assert not aside.exists() and summary(folder)["steps"] == 1


# -- seeds -------------------------------------------------------------------------------------------------------------


def first_rows(cli: OPDCLI) -> list[str]:
    cli.datamodule.trainer, cli.model._trainer = cli.trainer, cli.trainer
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.use_tokenizer(cli.model.tokenizer)
    return next(iter(cli.datamodule.train_dataloader())).row_ids  # type: ignore[no-any-return]


def test_the_runs_seed_moves_the_order_of_the_data_unless_the_data_have_their_own(world, monkeypatch):
    def rows(*words: str) -> list[str]:
        return first_rows(OPDCLI(args=["--config", str(world / "base.yaml"), *words], run=False))

    assert rows() == rows() != rows("--seed_everything", "8")
    assert rows("--data.seed", "3") == rows("--seed_everything", "8", "--data.seed", "3") != rows()
    assert rows("--model.seed", "8") == rows("--seed_everything", "8")  # the seed that the run is labelled with


# -- what loggers are told ---------------------------------------------------------------------------------------------


class Recorder(Logger):
    """A logger of the user's own."""

    told: dict[str, Any] = {}
    name, version = "recorder", 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep them."""
        Recorder.told = dict(params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Nothing."""


def test_every_logger_is_told_what_the_run_is_and_the_csv_file_stays(world, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-very-secret")
    recorder = f"{__name__}.Recorder"
    run(
        world,
        world / "logged",
        "--trainer.max_steps",
        "1",
        "--trainer.logger",
        recorder,
        "--vars",
        '{"note": "sk-very-secret"}',
    )
    told = Recorder.told
    assert (told["strategy"], told["objective"], told["seed"], told["learning_rate"]) == (
        "ImportanceWeighting", "PolicyLoss", 7, 1e-3,
    )  # fmt: skip
    assert told["model"]["weighting"]["init_args"]["w_max"] == 1.5 and told["data"]["prompt_batch"] == 8
    assert told["vars"]["note"] == "${oc.env:MY_API_KEY}"
    assert [row["step"] for row in csv.DictReader((world / "logged" / "metrics.csv").open()) if row["train/loss"]] == [
        "1"
    ]


def test_wandb_has_config_group_and_tags(world):
    run(world, world / "tracked", "--trainer.max_steps", "1", "--wandb.mode", "offline", "--wandb.tags", "[mine]")
    (data,) = (world / "tracked" / "wandb").glob("*run-*/*.wandb")
    found = list(wandb_file.records(data.read_bytes()))
    (begun,) = [record.run for record in found if record.HasField("run")]
    assert begun.run_group == "ImportanceWeighting" and list(begun.tags) == ["mine"]
    updates = [
        *begun.config.update,
        *(part for record in found if record.HasField("config") for part in record.config.update),
    ]
    config = {part.key: json.loads(part.value_json) for part in updates if part.key}
    assert config["seed"] == 7 and config["strategy"] == "ImportanceWeighting"
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-3


def events(folder: Path) -> list[Any]:
    """Records of the only TensorBoard file: length, check sum, content, check sum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (path,) = folder.rglob("*tfevents*")
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        found.append(event_pb2.Event.FromString(data[place + 12 : place + 12 + length]))
        place += 16 + length
    return found


def test_tensorboard_has_numbers_config_and_pictures_beside_the_csv_file(world, pictures):
    pytest.importorskip("tensorboardX")
    folder = world / "board"
    run(world, folder, "--trainer.max_steps", "1", "--tensorboard", "true")
    values = [value for event in events(folder / "tensorboard") for value in event.summary.value]
    (loss,) = [value.simple_value for value in values if value.tag == "train/loss"]
    (row,) = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["train/loss"]]
    assert loss == pytest.approx(float(row["train/loss"]), rel=1e-6)
    images = {value.tag: value.image for value in values if value.HasField("image")}
    shown = {path.stem for path in (folder / "pictures").glob("profile_by_*.png")}
    assert shown and all(images[f"profile_pictures/{name}"].height > 100 for name in shown)
    parameters = yaml.safe_load((folder / "tensorboard" / "hparams.yaml").read_text())
    assert (parameters["strategy"], parameters["seed"]) == ("ImportanceWeighting", 7)
    about = {value.tag: value.metadata.plugin_data.content for value in values if value.tag.startswith("_hparams_/")}
    assert "_hparams_/session_start_info" in about and b"val/reverse_kl" in about["_hparams_/experiment"]
    assert not any(value.tag == "hp_metric" for value in values)  # Lightning's, which is -1 unless somebody sets it


@pytest.mark.slow
def test_tensorboard_hides_what_was_logged_after_the_checkpoint_that_a_run_goes_back_to(world):
    """A start of a session at step 2 in the newer file: what the older one has from there on is not shown."""
    pytest.importorskip("tensorboardX")
    folder = world / "board-back"
    options = ["--tensorboard", "true", "--checkpoint_every", "1", "--data.val", "null", "--trainer.max_steps"]
    run(world, folder, *options, "2")
    (first,) = folder.rglob("*tfevents*")
    first.rename(world / first.name)
    run(world, folder, *options, "3", "--ckpt_path", str(folder / "checkpoints" / "step-1.ckpt"))
    starts = [event.step for event in events(folder / "tensorboard") if event.HasField("session_log")]
    assert starts[0] == 2


# -- callbacks and limits of the user's own ----------------------------------------------------------------------------


class Seen(Callback):
    """Row ids of the batches."""

    rows: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Keep them."""
        Seen.rows.append(sorted(batch.row_ids))


def test_a_checkpoint_callback_of_the_users_own_saves_and_overfitting_repeats_its_batches(world, tmp_path):
    """And Lightning's own default checkpoint does not come back with it."""
    Seen.rows = []
    mine = {
        "class_path": "ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path), "monitor": "val/reverse_kl", "save_top_k": 1},
    }
    given = [mine, {"class_path": f"{__name__}.Seen"}]
    run(world, world / "own", "--trainer.callbacks", json.dumps(given), "--trainer.overfit_batches", "2")
    assert len(list(tmp_path.glob("*.ckpt"))) == 1
    assert {path.name for path in (world / "own" / "checkpoints").glob("*.ckpt")} == {
        "step-2.ckpt",
        "step-4.ckpt",
        "last.ckpt",
    }
    assert Seen.rows[:2] == Seen.rows[2:] and Seen.rows[0] != Seen.rows[1] and len(Seen.rows) == 4


def kinds(world: Path, *words: str) -> list[type]:
    cli = OPDCLI(default_callbacks=default_callbacks, args=["--config", str(world / "base.yaml"), *words], run=False)
    return [type(callback) for callback in cli.trainer.callbacks]


def test_the_users_progress_bar_is_the_only_one(world):
    pytest.importorskip("rich")
    assert Progress in kinds(world) and RichProgressBar not in kinds(world)
    found = kinds(world, "--trainer.callbacks+=RichProgressBar")
    assert (
        RichProgressBar in found and Progress not in found and ModelCheckpoint not in found and RunCheckpoint in found
    )


class MyCheckpoint(RunCheckpoint):
    """A subclass takes the default one's place."""


def test_a_subclass_takes_the_place_of_a_default_callback(world):
    found = kinds(world, f"--trainer.callbacks+={__name__}.MyCheckpoint")
    assert MyCheckpoint in found and RunCheckpoint not in found


def test_the_interval_of_checkpoints_reaches_a_callback_of_the_users_own_or_is_said_to_have_no_effect(world):
    own = ["--trainer.callbacks+=RunCheckpoint", "--trainer.callbacks.monitor", "val/reverse_kl"]

    def interval(*words: str) -> int:
        args = ["--config", str(world / "base.yaml"), "--checkpoint_every", "7", *words]
        cli = OPDCLI(default_callbacks=default_callbacks, args=args, run=False)
        return next(callback.every for callback in cli.trainer.callbacks if isinstance(callback, RunCheckpoint))

    assert interval() == interval(*own) == 7
    with pytest.warns(UserWarning, match="`--checkpoint_every` 7 has no effect: `RunCheckpoint.every` is 3"):
        assert interval(*own, "--trainer.callbacks.every", "3") == 3


@pytest.mark.parametrize("logger", ["CSVLogger", "false"])
def test_options_of_loggers_that_others_take_the_place_of_are_said_to_have_no_effect(world, tmp_path, logger):
    own = ["--trainer.logger", logger, *(["--trainer.logger.save_dir", str(tmp_path)] if logger != "false" else [])]
    options = ["--wandb.mode", "offline", "--wandb.project", "mine", "--tensorboard", "true", "--deep", "false"]
    with pytest.warns(UserWarning, match="`--wandb.project, --tensorboard` has no effect beside `trainer.logger`"):
        run(world, tmp_path / "run", *own, *options, command="preflight")


def monitors(name: str) -> list[str]:
    return ["--trainer.callbacks+=EarlyStopping", f"--trainer.callbacks.monitor={name}"]


WITHOUT_HEADS = """{"class_path": "CachedTeacher", "init_args": {"folder": "scores", "teacher": {"class_path": "LocalTeacher",
    "init_args": {"path": "teacher"}}}}"""
UNMEASURED = [
    ([*monitors("val/greedy_accuracy"), "--model.validation.greedy=false"], "model.validation.greedy"),
    ([*monitors("val/avg_at_k"), "--model.validation.samples=0"], "model.validation.samples"),
    ([*monitors("val/reverse_kl"), "--model.validation.divergence=false"], "model.validation.divergence"),
    ([*monitors("val/reverse_kl"), "--model.teacher", WITHOUT_HEADS], "take val/disagreement"),
]


@pytest.mark.parametrize(("words", "named"), UNMEASURED)
def test_preflight_finds_what_a_callback_would_wait_for_in_vain(words, named, world, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(world, world / "checked", *words, command="preflight")
    assert named in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--trainer.callbacks+=LearningRateFinder"], "LearningRateFinder"),
        (
            ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={1: 2}"],
            "token_budget",
        ),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"], "'val_loss'"),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val_loss"], "'val_loss'"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/reverse_kl", "--data.val=null"],
            "data.val",
        ),
        *UNMEASURED,
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches"),
        (["--ckpt_path", "best"], "there is no"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_trained(words, named, world, capsys):
    assert named in refused(capsys, world, world / "refused", *words)
    assert not (world / "refused").exists()


def test_a_logger_whose_package_is_missing_is_one_line(world, capsys, monkeypatch):
    import lightning.fabric.loggers.tensorboard as tensorboard

    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard, name, False)
    for words in (
        ["--tensorboard", "true"],
        ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(world)],
    ):
        said = refused(capsys, world, world / "refused", *words)
        assert "tensorboard" in said and not (world / "refused").exists()


def test_a_class_in_the_folder_one_runs_from_is_found(world, tmp_path, monkeypatch):
    source = "from lit_opd.weighting import Uniform\n\n\nclass Mine(Uniform):\n    '''Mine.'''\n"
    (tmp_path / "weighting_of_mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    cli = OPDCLI(args=["--config", str(world / "base.yaml"), "--model.weighting", "weighting_of_mine.Mine"], run=False)
    assert type(cli.model.weighting).__name__ == "Mine"


# -- export ------------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_export_writes_the_checkpoint_that_is_named(half, tmp_path, capsys):
    """The last one is the exported student; the best is where the monitored metric was smallest; other folders are refused."""
    main(default_callbacks, ["export", "--run_dir", str(half), "--out", str(tmp_path / "last")])
    assert "optimizer step 2" in capsys.readouterr().out
    ours, theirs = weights(tmp_path / "last"), weights(half / "student")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = [
        row for row in csv.DictReader((half / "metrics.csv").open()) if row["val/reverse_kl"] and row["step"] != "0"
    ]
    best = min(rows, key=lambda row: float(row["val/reverse_kl"]))["step"]
    main(default_callbacks, ["export", "--run_dir", str(half), "--ckpt_path", "best"])
    assert f"optimizer step {best}: {half / 'student-best'}" in capsys.readouterr().out
    for words, named in (
        (["--run_dir", str(half), "--out", str(half)], "--out"),
        (["--run_dir", str(half), "--adapter", "true"], "--adapter"),
        (["--run_dir", str(tmp_path)], "--ckpt_path"),
        ([], "--run_dir"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(default_callbacks, ["export", *words])
        assert stop.value.code == 2 and named in capsys.readouterr().err


def test_a_dtype_of_adapters_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(args=["export", "--run_dir", str(tmp_path), "--adapter", "true", "--dtype", "bfloat16"])
    assert "`--dtype` must be left out with --adapter, got bfloat16" in capsys.readouterr().err


def test_export_of_adapters_merged_and_alone_on_their_base_and_no_other(world, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    folder = tmp_path / "run"
    run(world, folder, "--trainer.max_steps", "1", "--model.student.lora.rank", "2", "--model.optimizer.lr", "0.1")
    main(default_callbacks, ["export", "--run_dir", str(folder), "--out", str(tmp_path / "merged")])
    main(
        default_callbacks, ["export", "--run_dir", str(folder), "--out", str(tmp_path / "adapter"), "--adapter", "true"]
    )
    merged, student = weights(tmp_path / "merged"), weights(folder / "student")
    assert all(torch.equal(merged[name], student[name]) for name in student)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["model"]["student"]["path"])
    before = {name: value.clone() for name, value in base.named_parameters()}
    alone = dict(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().named_parameters())
    assert all(torch.allclose(alone[name], student[name], atol=1e-6) for name in student)
    assert any(not torch.equal(before[name], student[name]) for name in student)
    config["model"]["student"]["path"] = config["model"]["teacher"]["init_args"]["path"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(default_callbacks, ["export", "--run_dir", str(folder), "--out", str(tmp_path / "other")])
    assert "must be the base model" in capsys.readouterr().err and not (tmp_path / "other").exists()
