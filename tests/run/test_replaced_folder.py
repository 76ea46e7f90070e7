"""A run that is overwritten stays until the new one has a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_opd.errors import InputError
from lit_opd.run.replaced_folder import ReplacedFolder

NOBODY = SimpleNamespace(), SimpleNamespace()


def former(folder: Path, content: str = "former") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(content)
    return folder


def checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-1.ckpt").touch()


def test_it_is_deleted_at_the_first_checkpoint_and_not_before(tmp_path):
    folder = former(tmp_path / "run")
    replaced = ReplacedFolder(folder)
    replaced.move()
    folder.mkdir()
    replaced.on_train_batch_end(*NOBODY)
    assert (tmp_path / "run.replaced" / "config.yaml").read_text() == "former" and str(
        tmp_path / "run.replaced"
    ) in replaced.note()
    checkpoint(folder)
    replaced.on_train_batch_end(*NOBODY)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and replaced.note() == ""


def test_a_run_that_never_began_leaves_the_former_one(tmp_path):
    replaced = ReplacedFolder(former(tmp_path / "run"))
    replaced.move()
    replaced.put_back()
    assert (tmp_path / "run" / "config.yaml").read_text() == "former" and len(list(tmp_path.iterdir())) == 1


def test_tries_without_a_checkpoint_pile_up_and_go_together(tmp_path):
    for number in range(3):
        former(tmp_path / "run", str(number))
        replaced = ReplacedFolder(tmp_path / "run")
        replaced.move()
    kept = {path.name: (path / "config.yaml").read_text() for path in tmp_path.iterdir()}
    assert kept == {"run.replaced": "0", "run.replaced-2": "1", "run.replaced-3": "2"}
    former(tmp_path / "run.replaced-by-hand"), former(tmp_path / "other.replaced")
    checkpoint(tmp_path / "run")
    replaced.teardown(*NOBODY, "fit")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.replaced-by-hand", "other.replaced"}


def test_a_link_stays_a_link(tmp_path):
    target = former(tmp_path / "disk" / "run")
    (tmp_path / "run").symlink_to(target)
    replaced = ReplacedFolder(tmp_path / "run")
    replaced.move()
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "run.replaced").is_dir()


def test_a_disk_that_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="Device or resource busy; delete it by hand"):
        ReplacedFolder(former(tmp_path / "run")).move()
    assert (tmp_path / "run" / "config.yaml").exists()
