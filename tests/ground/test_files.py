"""Files and folders written whole or not at all: an error, a kill or a full disk leaves what was there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from safetensors import SafetensorError

from benchmarks.studies.reproduce.results import LINES, mended
from lit_opd.compare import pictures
from lit_opd.compare.document import Document
from lit_opd.errors import InputError
from lit_opd.files import replace_or_refuse, replace_whole, whole_file, whole_folder
from lit_opd.models.export import export_folder
from lit_opd.report import profile_pictures
from lit_opd.report.replay import save_record
from lit_opd.testbed.task import write_records
from tests.callbacks.test_position_profile import record
from tests.helpers import tiny

NAME = "l\u00e4nge 10 % \u4e2d\u6587.txt"


class Interrupted(BaseException):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(target, *arguments) -> None:
    """Run it in a child that must kill itself."""
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_text("old")
    return path


def test_a_file_takes_the_new_content_and_nothing_is_left_beside_it(old):
    with whole_file(old) as draft:
        draft.write_text("new")
        assert old.read_text() == "old" and draft.parent == old.parent and draft.suffix == old.suffix
    assert old.read_text() == "new" and names(old.parent) == [NAME]


def test_the_folders_above_a_new_file_are_made(tmp_path):
    replace_whole(tmp_path / "a b" / "\u00fc" / NAME, b"new")
    assert (tmp_path / "a b" / "\u00fc" / NAME).read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError("disk"), ValueError("wrong"), Interrupted()], ids=repr)
def test_an_error_in_the_middle_leaves_the_old_file_alone(old, error):
    with pytest.raises(type(error)), whole_file(old) as draft:
        draft.write_text("half")
        raise error
    assert old.read_text() == "old" and names(old.parent) == [NAME]


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_file_alone(old):
    with pytest.raises(FileNotFoundError), whole_file(old):
        pass
    assert old.read_text() == "old" and names(old.parent) == [NAME]


def test_a_kill_in_the_middle_leaves_the_old_file_and_the_next_write_clears_up(old):
    def half() -> None:
        with whole_file(old) as draft:
            draft.write_text("half, and longer than what comes")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(half)
    assert old.read_text() == "old" and len(names(old.parent)) == 2
    with whole_file(old) as draft:
        assert not draft.exists()  # a writer may append
        draft.write_text("new")
    assert old.read_text() == "new" and names(old.parent) == [NAME]


def test_the_content_is_on_the_disk_before_it_has_the_name(old, monkeypatch):
    def refused(handle: int) -> None:
        assert os.readlink(f"/proc/self/fd/{handle}") == str(old.with_name(f".{NAME}"))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError, match="Input/output error"):
        replace_whole(old, b"new")
    assert old.read_text() == "old" and names(old.parent) == [NAME]


def test_a_full_disk_leaves_the_old_file_and_a_run_is_told_what_to_do(old, file_limit):
    file_limit(10)
    with pytest.raises(OSError, match="File too large"):
        replace_whole(old, b"x" * 100_000)
    with pytest.raises(InputError, match=r"--run_dir.*could not be written: \[Errno 27\].*free some space"):
        replace_or_refuse(old, b"x" * 11)
    file_limit(None)
    assert old.read_text() == "old" and names(old.parent) == [NAME]


def drawn(room):
    return lambda path: room._save(Figure(), path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path: Document("title", ()).write(path.parent), "compare.md"),
        (lambda path: write_records(path, [{"id": "a", "prompt": "b"}]), "train.jsonl"),
        (lambda path: save_record(record(0), path), "step-1.safetensors"),
        (drawn(pictures), "curve.png"),
        (drawn(profile_pictures), "profile.png"),
    ],
    ids=["report", "prompts", "step", "curves", "profile"],
)
def test_each_writer_leaves_the_old_file_where_the_disk_is_full_and_replaces_it_where_not(
    write, name, tmp_path, file_limit
):
    path = tmp_path / "a b" / name
    replace_whole(path, b"old")
    file_limit(5)
    with pytest.raises((OSError, SafetensorError)):
        write(path)
    file_limit(None)
    assert path.read_bytes() == b"old" and names(path.parent) == [name]
    write(path)
    assert path.read_bytes() != b"old" and not [found for found in names(path.parent) if found.startswith(".")]


def test_results_are_not_lost_where_their_cut_line_cannot_be_removed(tmp_path, file_limit):
    path = tmp_path / LINES
    path.write_text(json.dumps({"run": "a", "seed": 1}) + '\n{"run": "b", "se')
    before = path.read_bytes()
    file_limit(10)
    with pytest.raises(OSError, match="File too large"):
        mended(tmp_path)
    file_limit(None)
    assert path.read_bytes() == before and names(tmp_path) == [LINES]
    assert mended(tmp_path) == {"a": {"run": "a", "seed": 1}}
    assert path.read_bytes() == before[: before.index(b"\n") + 1]


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def older(tmp_path: Path) -> Path:
    folder = tmp_path / "w-\u00fc 1.5"
    folder.mkdir()
    (folder / "stale").write_text("old")
    return folder


def test_a_folder_takes_the_place_of_an_older_one_whole(older):
    with whole_folder(older, replace=True) as draft:
        (draft / "new").write_text("new")
        assert names(older) == ["stale"]
    assert names(older) == ["new"] and names(older.parent) == [older.name]


def test_a_folder_that_holds_something_is_left_alone_where_it_is_not_to_be_replaced(older):
    with pytest.raises(OSError, match="not empty"), whole_folder(older) as draft:
        (draft / "new").write_text("new")
    assert names(older) == ["stale"] and names(older.parent) == [older.name]
    (older / "stale").unlink()
    with whole_folder(older) as draft:
        (draft / "new").write_text("new")
    assert names(older) == ["new"] and names(older.parent) == [older.name]


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("error", [OSError("disk full"), Interrupted()], ids=repr)
def test_an_error_in_the_middle_leaves_the_older_folder_and_nothing_else(older, error, replace):
    with pytest.raises(type(error)), whole_folder(older, replace=replace) as draft:
        (draft / "half").write_text("half")
        raise error
    assert names(older) == ["stale"] and names(older.parent) == [older.name]
    with pytest.raises(type(error)), whole_folder(older / "deeper" / "folder", replace=replace) as draft:
        raise error
    assert names(older / "deeper") == []


def test_a_kill_in_the_middle_leaves_the_older_folder_under_its_name(older):
    def half() -> None:
        with whole_folder(older, replace=True) as draft:
            (draft / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(half)
    assert names(older) == ["stale"]
    with whole_folder(older, replace=True) as draft:
        (draft / "new").write_text("new")
    assert names(older) == ["new"]


def test_a_folder_is_for_the_users_that_the_machine_gives_new_folders_to(tmp_path):
    (tmp_path / "plain").mkdir()
    with whole_folder(tmp_path / "whole"):
        pass
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_gives_way_and_what_it_points_to_stays(older):
    link = older.with_name("link")
    link.symlink_to(older.name)
    with whole_folder(link, replace=True) as draft:
        (draft / "new").write_text("new")
    assert not link.is_symlink() and names(link) == ["new"] and names(older) == ["stale"]


def test_an_export_that_fails_leaves_the_older_export(older):
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            assert "model.safetensors" in names(folder)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_folder(tiny.qwen3(seed=1), Broken(), older, state=None)
    assert names(older) == ["stale"] and names(older.parent) == [older.name]
