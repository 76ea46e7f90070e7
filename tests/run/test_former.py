"""What is set aside where a run goes back, file by file; whole runs are in test_resume.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.run.checkpoint_files import newest
from lit_opd.run.former import set_later_aside


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_last_is_not_what_a_slurm_job_saved_after_the_step_that_the_run_goes_back_to(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": 10}, tmp_path / "checkpoints" / "step-10.ckpt")
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step-10.ckpt")
    for number, step in enumerate((10, 40)):
        torch.save({"global_step": step}, tmp_path / f"hpc_ckpt_{number}.ckpt")
    assert newest(tmp_path).name == "hpc_ckpt_1.ckpt"
    assert set_later_aside(tmp_path, 10) == tmp_path / "former" / "1"
    assert newest(tmp_path).name == "hpc_ckpt_0.ckpt"
    assert files(tmp_path / "former").keys() == {"1/hpc_ckpt_1.ckpt"}


def test_every_rank_and_every_length_of_a_number_is_told_apart(tmp_path: Path):
    """Names as text would put step-9 after step-10."""
    (tmp_path / "rollouts").mkdir()
    names = [f"step-{step}{rank}.safetensors" for step in (9, 10, 11, 100) for rank in ("", "-rank-1")]
    for name in names:
        (tmp_path / "rollouts" / name).write_text(name)
    aside = set_later_aside(tmp_path, 10)
    assert aside is not None and files(aside).keys() == {f"rollouts/{name}" for name in names[4:]}
    assert files(tmp_path / "rollouts").keys() == {*names[:4]}
    assert set_later_aside(tmp_path, 10) is None and set_later_aside(tmp_path, 9) == tmp_path / "former" / "2"


def test_the_lines_of_two_goings_back_are_all_kept(tmp_path: Path):
    path, lines = tmp_path / "profile.jsonl", [json.dumps({"step": step}) + "\n" for step in range(1, 9)]
    path.write_text("".join(lines) + '{"step": 9, "sca')  # a kill cut the last one
    for step in (6, 2):
        set_later_aside(tmp_path, step)
    kept = [(tmp_path / place / "profile.jsonl").read_text() for place in (".", "former/2", "former/1")]
    assert kept == ["".join(lines[:2]), "".join(lines[2:6]), "".join(lines[6:])]


def test_a_broken_line_is_named_and_nothing_is_moved(tmp_path: Path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\nnothing\n{"step": 3}\n')
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-3.safetensors").write_text("")
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"samples\.jsonl:2 must be a JSON object with its step"):
        set_later_aside(tmp_path, 2)
    assert files(tmp_path) == before
