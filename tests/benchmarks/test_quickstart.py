"""The quickstart over several seeds: which finished runs it believes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.studies.quickstart import run_all, words_of
from lit_opd.errors import InputError
from lit_opd.sweep.checks import settings_of


def test_a_finished_run_of_other_settings_is_refused_and_one_of_the_same_is_kept(tmp_path: Path):
    folder, options = tmp_path / "seed-0", ["--trainer.max_steps", "7"]
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings_of(words_of(0, folder, options))))
    (folder / "summary.json").write_text(json.dumps({"steps": 7}))
    assert run_all(tmp_path, [0], options) == [{"steps": 7}]
    with pytest.raises(InputError, match=f"`trainer.max_steps` must be what {folder} was trained with, 7, got 8; give"):
        run_all(tmp_path, [0], ["--trainer.max_steps", "8"])
