"""Checkpoint files: whole or not there, checked, pruned; disks that are full, folders that cannot be written, damage."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from callbacks import RunCheckpoint, default_callbacks
from lit_opd.cli.command import main
from lit_opd.errors import InputError
from lit_opd.run.checkpoint_files import best, problem
from lit_opd.run.csv_logger import drop_later_lines
from tests.helpers import tiny
from tests.run.test_resume import assert_same_run, fit, killed_after, lines, metrics, write_config

STEPS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, models, **{"trainer.max_steps": STEPS, "trainer.val_check_interval": 2})
    return config, fit(config, folder / "run")


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/step-*.ckpt"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def error_of(config: Path, run: Path, *words: str, callbacks: Any = default_callbacks) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(callbacks, ["fit", "--config", str(config), "--run_dir", str(run), *words])
    return int(stopped.value.code)


# -- what is there -----------------------------------------------------------------------------------------------------


def test_every_checkpoint_has_its_check_sum_and_last_is_a_link_to_the_newest(whole):
    folder = whole[1] / "checkpoints"
    assert os.readlink(folder / "last.ckpt") == f"step-{STEPS}.ckpt"
    for step in range(1, STEPS + 1):
        digest = hashlib.sha256((folder / f"step-{step}.ckpt").read_bytes()).hexdigest()
        assert (folder / f"step-{step}.ckpt.sha256").read_text() == f"{digest}  step-{step}.ckpt\n"
    checked = subprocess.run(["sha256sum", "-c", "step-2.ckpt.sha256"], cwd=folder, capture_output=True, text=True)
    assert checked.stdout == "step-2.ckpt: OK\n"
    assert len(list(folder.iterdir())) == 2 * STEPS + 1  # no temporary file


def checkpoints(*others: dict[str, Any], **options: Any) -> list[str]:
    given = {"class_path": "callbacks.RunCheckpoint", "init_args": options}
    return ["--trainer.callbacks", json.dumps([given, *others])]


def best_of(run: Path) -> dict[str, int]:
    """The best of the validations at steps 2 and 4 by the divergence, by mode."""
    by_step = {int(row["step"]): float(row["val/reverse_kl"]) for row in metrics(run) if row.get("val/reverse_kl")}
    found = {mode: {"min": min, "max": max}[mode]((2, 4), key=lambda step: by_step[step]) for mode in ("min", "max")}
    assert found["min"] != found["max"]
    return found


def test_the_newest_and_the_best_are_kept(whole, tmp_path):
    """The best is not the first one saved by ``every``."""
    config, undisturbed = whole
    for mode, step in best_of(undisturbed).items():
        run = tmp_path / mode
        fit(config, run, *checkpoints(every=3, keep=1, monitor="val/reverse_kl", mode=mode))
        assert saved_steps(run) == sorted({step, STEPS})
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["RunCheckpoint"]
        assert state["names"][-1] == f"step-{STEPS}.ckpt"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_is_found_where_its_step_was_saved_before_its_validation(whole, tmp_path, mode):
    """Steps 2 and 4 are saved by ``every`` and validated then; the best of a mode is one of them."""
    config, undisturbed = whole
    run = fit(config, tmp_path / "run", *checkpoints(every=2, keep=1, monitor="val/reverse_kl", mode=mode))
    step = best_of(undisturbed)[mode]
    assert best(run) == run / "checkpoints" / f"step-{step}.ckpt" and saved_steps(run) == sorted({step, STEPS})
    further = ["--ckpt_path", "last", "--trainer.max_steps", str(STEPS + 1), "--trainer.limit_val_batches", "0"]
    fit(config, run, *checkpoints(every=2, keep=1, monitor="val/reverse_kl", mode=mode), *further)
    assert best(run) == run / "checkpoints" / f"step-{step}.ckpt" and saved_steps(run) == [step, STEPS + 1]


def test_the_best_of_lightnings_callback_is_found_where_the_last_step_was_saved_before_its_validation(whole, tmp_path):
    config, undisturbed = whole
    mode = next(mode for mode, step in best_of(undisturbed).items() if step == STEPS)
    theirs = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
              "init_args": {"monitor": "val/reverse_kl", "mode": mode, "filename": "theirs-{step}"}}  # fmt: skip
    run = fit(config, tmp_path / "run", *checkpoints(theirs, every=2))
    assert best(run).name == f"theirs-step={STEPS}.ckpt" and best(run).is_file()


def test_an_unknown_metric_is_an_error_that_names_the_logged_ones(whole, tmp_path, capsys):
    assert error_of(whole[0], tmp_path / "run", *checkpoints(every=1, monitor="val/acuracy")) == 2
    said = capsys.readouterr().err
    assert "`RunCheckpoint.monitor`" in said and "val/reverse_kl" in said
    assert error_of(whole[0], tmp_path / "two", *checkpoints(monitor="val/reverse_kl"), "--data.val", "null") == 2
    assert "`data.val` is null" in capsys.readouterr().err and not (tmp_path / "two").exists()


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}, {"mode": "least"}, {"monitor": "loss"}])
def test_a_value_out_of_range_is_named(options):
    with pytest.raises(InputError, match=f"RunCheckpoint.{next(iter(options))}"):
        RunCheckpoint(**options)


# -- damage ------------------------------------------------------------------------------------------------------------


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder, symlinks=True))


def test_a_damaged_newest_checkpoint_is_skipped_loudly(whole, tmp_path):
    config, undisturbed = whole
    run = copy_of(undisturbed, tmp_path / "run")
    flip_a_byte(run / "checkpoints" / f"step-{STEPS}.ckpt")
    with pytest.warns(UserWarning, match=rf"step-{STEPS}\.ckpt CANNOT BE USED.*sha256.*step-{STEPS - 1}\.ckpt instead"):
        fit(config, run, "--ckpt_path", "last")
    assert_same_run(run, undisturbed)


def test_damage_is_an_error_where_nothing_whole_is_left_or_the_path_was_given(whole, tmp_path, capsys):
    config, undisturbed = whole
    run = killed_after(2, undisturbed, tmp_path / "run")
    flip_a_byte(run / "checkpoints" / "step-2.ckpt")
    assert error_of(config, run, "--ckpt_path", str(run / "checkpoints" / "step-2.ckpt")) == 2
    assert "must be a whole checkpoint" in capsys.readouterr().err
    (run / "checkpoints" / "step-1.ckpt").write_bytes(b"PK")
    assert error_of(config, run, "--ckpt_path", "last") == 2
    said = capsys.readouterr().err
    assert "none is" in said and "step-1.ckpt: " in said and "step-2.ckpt: " in said


def test_without_a_check_sum_the_files_own_ones_decide(whole, tmp_path):
    path = copy_of(whole[1], tmp_path / "run") / "checkpoints" / "step-1.ckpt"
    path.with_name("step-1.ckpt.sha256").unlink()
    assert problem(path) is None
    weights = torch.load(path, weights_only=True)["state_dict"]
    place = path.read_bytes().index(weights["student.model.lm_head.weight"].numpy().tobytes())
    content = bytearray(path.read_bytes())
    content[place + 5] ^= 1
    path.write_bytes(content)
    assert "is damaged" in (problem(path) or "")


def test_any_damage_of_a_header_is_an_answer_and_no_traceback(tmp_path):
    """Without a check sum; flags and methods of each of the zip's headers: unknown ones, encryption, compression."""
    path = tmp_path / "step-1.ckpt"
    torch.save({"global_step": 1}, path)
    content, found = path.read_bytes(), set()
    headers = [match.end() for match in re.finditer(rb"PK\x01\x02|PK\x03\x04", content)]
    for header, place, change in itertools.product(headers, range(8), (1, 4, 8)):
        damaged = bytearray(content)
        damaged[header + place] ^= change
        path.write_bytes(damaged)
        found.add(problem(path))
    said = " ".join(reason for reason in found if reason)
    assert "encrypted" in said and "compression method" in said and "decompressing" in said and "" not in found


class Keeps(Callback):
    """A user's callback with a state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.value}


@pytest.mark.parametrize("value", [np.float64(0.5), Path("best.txt")])
def test_a_state_that_no_run_could_go_on_from_is_an_error_when_it_is_saved(whole, tmp_path, capsys, value):
    run = tmp_path / "run"
    assert error_of(whole[0], run, callbacks=lambda: [Keeps(value), *default_callbacks()]) == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert "`Keeps` must save plain values" in said and f"it names {'numpy' if value == 0.5 else 'pathlib'}" in said
    assert "there is no checkpoint yet" in said and list((run / "checkpoints").iterdir()) == []


# -- disks -------------------------------------------------------------------------------------------------------------


class At(Callback):
    """Does something at the start of the batch after an optimizer step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.action()


def test_a_full_disk_while_checkpointing_stops_the_run_and_keeps_the_last_checkpoint(
    whole, tmp_path, capsys, file_limit
):
    config, undisturbed = whole
    run, room = tmp_path / "run", (undisturbed / "checkpoints" / "step-1.ckpt").stat().st_size // 2
    assert error_of(config, run, callbacks=lambda: [At(2, lambda: file_limit(room)), *default_callbacks()]) == 2
    file_limit(None)
    said = capsys.readouterr().err.split("error: ")[-1]
    for needle in (
        "step-3.ckpt",
        "File too large",
        "free space",
        f"the last checkpoint is {run}/checkpoints/last.ckpt",
    ):
        assert needle in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "last.ckpt", "step-1.ckpt", "step-1.ckpt.sha256", "step-2.ckpt", "step-2.ckpt.sha256"
    ]  # fmt: skip
    fit(config, run, "--ckpt_path", "last")
    assert_same_run(run, undisturbed)


def test_a_full_disk_while_logging_loses_no_line_once_there_is_room_again(whole, tmp_path, file_limit, capsys):
    """``capsys`` keeps standard error out of files."""
    config, run = whole[0], tmp_path / "run"
    every = checkpoints(every=4, keep=1)
    with pytest.warns(UserWarning, match=r"metrics\.csv could not be written .*File too large"):
        fit_with([At(1, lambda: file_limit(10)), At(3, lambda: file_limit(None))], config, run, *every)
    names = ("profile.jsonl", "samples.jsonl")
    plain = fit(config, tmp_path / "plain", *every)
    assert metrics(run) == metrics(plain)
    assert [lines(run, name) for name in names] == [lines(plain, name) for name in names]


@pytest.mark.slow
def test_a_full_disk_where_a_run_goes_on_leaves_its_files_whole(whole, tmp_path, file_limit, capsys):
    """The disk has room for the look at it before the run, and not for the files after it."""

    class Full(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            file_limit(100)

    run = killed_after(2, whole[1], tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in ("metrics.csv", "config.yaml")}
    assert error_of(whole[0], run, "--ckpt_path", "last", callbacks=lambda: [Full(), *default_callbacks()]) == 2
    assert "config.yaml could not be written: [Errno 27]" in capsys.readouterr().err
    file_limit(None)
    assert before == {name: (run / name).read_bytes() for name in before} and not (run / "former").exists()
    file_limit(100)
    with pytest.raises(InputError, match=r"--run_dir.*metrics\.csv could not be written: \[Errno 27\]"):
        drop_later_lines(run / "metrics.csv", 2)
    file_limit(None)
    assert before == {name: (run / name).read_bytes() for name in before} and not list(run.glob(".*"))
    fit(whole[0], run, "--ckpt_path", "last")
    assert_same_run(run, whole[1])


def fit_with(callbacks: list[Callback], config: Path, run: Path, *words: str) -> None:
    main(lambda: [*callbacks, *default_callbacks()], ["fit", "--config", str(config), "--run_dir", str(run), *words])


def test_a_checkpoint_folder_that_cannot_be_written_stops_the_run_and_keeps_what_was_saved(whole, tmp_path, capsys):
    """A file in the folder's place: that stops a superuser too."""
    config, undisturbed = whole
    run, kept = tmp_path / "run", tmp_path / "kept"

    def take_away() -> None:
        (run / "checkpoints").rename(kept)
        (run / "checkpoints").write_text("")

    assert error_of(config, run, callbacks=lambda: [At(2, take_away), *default_callbacks()]) == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert "`RunCheckpoint.dirpath` must be a writable folder" in said and "step-3.ckpt" in said
    (run / "checkpoints").unlink()
    kept.rename(run / "checkpoints")
    fit(config, run, "--ckpt_path", "last")
    assert_same_run(run, undisturbed)
