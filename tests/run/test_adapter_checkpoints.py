"""Checkpoints of a student with adapters: the adapters alone, on the base they were trained on, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_opd.errors import InputError
from lit_opd.models.base import base_mark
from tests.helpers import cases, fixed, tiny

pytest.importorskip("peft")
HALF = cases.STEPS // 2
PROMPTS = cases.rollout().prompts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def half(folders, tmp_path_factory) -> Path:
    """A checkpoint in the middle of the run."""
    path: Path = tmp_path_factory.mktemp("half") / "half.ckpt"
    fixed.fit(cases.adapted(folders), PROMPTS, steps=HALF, save=path)
    return path


@pytest.fixture(scope="module")
def whole(folders) -> dict[str, torch.Tensor]:
    """The weights of the run that nothing stopped."""
    trained = cases.adapted(folders)
    fixed.fit(trained, PROMPTS, steps=cases.STEPS)
    return fixed.weights(trained)


def resumed(folders: tuple[str, str], checkpoint: Path, **settings: Any) -> dict[str, torch.Tensor]:
    trained = cases.adapted(folders, **settings)
    fixed.fit(trained, PROMPTS, steps=cases.STEPS, load=checkpoint)
    return fixed.weights(trained)


def copied(folders: tuple[str, str], to: Path) -> tuple[str, str]:
    return str(shutil.copytree(folders[0], to)), folders[1]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All of nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def test_a_checkpoint_holds_adapters_and_their_momenta_and_no_weight_of_the_base(folders, half):
    saved = torch.load(half, weights_only=True)
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    names = {name for name, _ in base.named_modules()}
    adapted = {name.split(".lora_")[0].rsplit("base_model.model.", 1)[1] for name in saved["state_dict"]}
    assert adapted and adapted <= names and all(".lora_" in name for name in saved["state_dict"])
    (optimizer,) = saved["optimizer_states"]
    assert set(optimizer["state"]) == set(saved["state_dict"])
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors(saved)}
    assert sum(stored.values()) < 2.5 * sum(value.nbytes for value in saved["state_dict"].values())


def test_a_run_goes_on_bit_for_bit(folders, half, whole):
    found = resumed(folders, half)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_an_older_checkpoint_with_all_weights_goes_on(folders, half, whole, tmp_path):
    saved = torch.load(half, weights_only=True)
    module = cases.adapted(folders)
    module.configure_model()
    everything = {f"student.{name}": value for name, value in module.student.state_dict().items()}
    assert len(everything) > len(saved["state_dict"])
    saved["state_dict"] = everything | saved["state_dict"]
    saved["student_shapes"] = {name: list(value.shape) for name, value in saved["state_dict"].items()}
    del saved["student_base"]
    torch.save(saved, tmp_path / "older.ckpt")
    found = resumed(folders, tmp_path / "older.ckpt")
    assert all(torch.equal(found[name], whole[name]) for name in whole)


# -- the base ----------------------------------------------------------------------------------------------------------


def change_weights(folder: Path) -> None:
    """As one small step of training would: every number a little, sizes and headers as they were."""
    file = folder / "model.safetensors"
    size = file.stat().st_size
    save_file({name: value * 1.0001 for name, value in load_file(file).items()}, file, {"format": "pt"})
    assert file.stat().st_size == size


def change_config(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "named"), [(change_weights, "another weights"), (change_config, "another config.json")]
)
def test_another_base_is_refused_in_one_line(folders, half, tmp_path, change, named):
    other = copied(folders, tmp_path / "other")
    change(Path(other[0]))
    with pytest.raises(InputError, match=named) as refused:
        resumed(other, half)
    said = str(refused.value)
    assert "`model.student.path`" in said and folders[0] in said and other[0] in said and "\n" not in said


def test_the_same_base_elsewhere_in_other_files_and_settings_is_the_same(folders, half, whole, tmp_path):
    moved = copied(folders, tmp_path / "moved")
    config = Path(moved[0]) / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"transformers_version": "5.0.0", "use_cache": False})
    )
    assert all(torch.equal(value, whole[name]) for name, value in resumed(moved, half).items())
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype="auto")
    model.save_pretrained(tmp_path / "cut", max_shard_size="8KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    marks = [base_mark(path, "model.student.path") for path in (folders[0], str(tmp_path / "cut"))]
    assert marks[0]["weights"] == marks[1]["weights"] and marks[0]["config"] == marks[1]["config"]


def test_every_weight_is_in_the_mark(folders, tmp_path):
    """Whichever of them is trained by itself, the mark is another one."""
    file = Path(copied(folders, tmp_path / "one")[0]) / "model.safetensors"
    weights, own = load_file(file), base_mark(folders[0], "model.student.path")["weights"]
    for name in weights:
        save_file(weights | {name: weights[name] + 0.001}, file, {"format": "pt"})
        assert base_mark(str(file.parent), "model.student.path")["weights"] != own, name


def test_another_student_is_refused_in_one_line(folders, half):
    for trained in (
        cases.adapted(folders, rank=3),
        fixed.module(folders, cases.rollout(), optimizer=cases.momentum, token_budget=cases.BUDGET),
    ):
        with pytest.raises(InputError, match=r"`--ckpt_path` must be a checkpoint of this student") as refused:
            fixed.fit(trained, PROMPTS, steps=cases.STEPS, load=half)
        assert "\n" not in str(refused.value)
