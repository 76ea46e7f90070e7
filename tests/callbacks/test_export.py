"""The exported student: at the end, and at the steps that were asked for, whatever a batch makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from callbacks import ExportStudent, PositionProfile, RunCheckpoint
from tests.helpers import fixed, profiled, tiny

STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


class Weights(L.Callback):
    """A copy of the student's weights after each batch, by optimizer step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.at[trainer.global_step] = fixed.weights(pl_module)


def exported(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Weights by folder name."""
    models = {path.name: AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in folder.glob("student*")}
    return {name: dict(model.named_parameters()) for name, model in models.items()}


EXPORTED = [(2, 1, [2, 4, 6]), (3, 2, [4, 6]), (7, 1, []), (None, 1, [])]
EXPORTED += [pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 3, [6]), (5, 2, [6]), (1, 2, [2, 4, 6]))]


@pytest.mark.parametrize(("every", "updates", "steps"), EXPORTED)
def test_the_first_batch_end_at_or_behind_each_multiple_is_exported(folders, tmp_path, every, updates, steps):
    watch = Weights()
    settings = {"mini_batches": updates, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    profiled.fit(folders, tmp_path, [watch, ExportStudent(every=every)], steps=STEPS, settings=settings)
    found = exported(tmp_path)
    assert set(found) == {"student", *(f"student-step-{step}" for step in steps)}
    for name, weights in found.items():
        step = STEPS if name == "student" else int(name.rsplit("-", 1)[1])
        assert fixed.relative_gap(weights, watch.at[step]) == 0.0, name
    assert fixed.relative_gap(watch.at[STEPS], watch.at[STEPS - updates]) > 1e-4


def test_a_resumed_run_exports_what_the_whole_one_does(folders, tmp_path):
    """From a checkpoint at step 4, whose export every 4 steps was made; step 6 is no multiple, step 8 is."""
    settings, checkpoint = {"mini_batches": 2}, tmp_path / "middle.ckpt"
    profiled.fit(folders, tmp_path, [profiled.SaveAt(4, checkpoint)], steps=4, settings=settings)
    profiled.fit(folders, tmp_path, [ExportStudent(every=4)], steps=8, settings=settings, ckpt_path=checkpoint)
    assert {path.name for path in tmp_path.glob("student*")} == {"student", "student-step-8"}


def test_an_export_that_fails_at_the_end_comes_after_the_last_checkpoint(folders, tmp_path, monkeypatch):
    """By an error after which a run saves nothing any more: it may have come from an update cut short."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a library's own")

    monkeypatch.setattr("lit_opd.models.weights.export_folder", fails)
    with pytest.raises(RuntimeError, match="a library's own"):
        profiled.fit(folders, tmp_path, [ExportStudent(), RunCheckpoint(every=100)], steps=3, enable_checkpointing=True)
    assert (tmp_path / "checkpoints" / "step-3.ckpt").exists() and not (tmp_path / "student").exists()


def test_pictures_that_fail_cost_a_warning(folders, tmp_path, pictures):
    (tmp_path / "pictures").write_text("")  # a file in the way of the folder
    with pytest.warns(UserWarning, match="pictures could not be made"):
        profiled.fit(
            folders, tmp_path, [PositionProfile(), ExportStudent(), RunCheckpoint()], steps=2, enable_checkpointing=True
        )
    assert (tmp_path / "checkpoints" / "step-2.ckpt").exists() and (tmp_path / "student" / "config.json").exists()
    assert (tmp_path / "profile.jsonl").exists()
