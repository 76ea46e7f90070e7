"""A run made before the rooms were redrawn (tests/assets/earlier_run, its first half) goes on, and ends where it ended then."""

from __future__ import annotations

import csv
import inspect
import json
import shutil
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from callbacks import default_callbacks
from lit_opd.cli.command import main

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path("tests/assets/earlier_run")  # as its config.yaml names it
NOT_COMPARED = ("time/", "throughput/")
CLOSE = {"rel": 1e-4, "abs": 1e-5}  # of float32 sums; another processor adds in another order


def fill(folder: Path) -> None:
    """Give every row of the embedding a token, as one of its own counted then; rows without one are cut today."""
    file, size = folder / "tokenizer.json", json.loads((folder / "config.json").read_text())["vocab_size"]
    content = json.loads(file.read_text())
    used = max(content["model"]["vocab"].values()) + 1
    content["model"]["vocab"] |= {f"<{number}>": number for number in range(used, size)}
    file.write_text(json.dumps(content))


def drop_newer(path: Path) -> None:
    """Leave out what the Lightning of then asked for and the one of here does not know."""
    config, known = yaml.safe_load(path.read_text()), inspect.signature(Trainer.__init__).parameters
    config["trainer"] = {name: value for name, value in config["trainer"].items() if name in known}
    if "weights_only" not in inspect.signature(Trainer.fit).parameters:
        config.pop("weights_only", None)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder as it was left at step 4 of 8, in a place like the repository."""
    shutil.copytree(ROOT / ASSETS, tmp_path / ASSETS)
    shutil.rmtree(tmp_path / ASSETS / "run" / "student")
    (tmp_path / ASSETS / "run" / "summary.json").unlink()
    for role in ("student", "teacher"):
        fill(tmp_path / ASSETS / role)
    drop_newer(tmp_path / ASSETS / "run" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path / ASSETS / "run"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_config_and_a_checkpoint_of_before_go_on(copied):
    """Weights, optimizer, schedule, random streams, counters: the second half writes the numbers it wrote then."""
    main(
        default_callbacks,
        ["fit", "--config", str(copied / "config.yaml"), "--run_dir", str(copied), "--ckpt_path",
         str(copied / "checkpoints" / "step-4.ckpt")],
    )  # fmt: skip
    ours, theirs = rows(copied / "metrics.csv"), rows(ROOT / ASSETS / "run" / "metrics.csv")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, old in zip(ours, theirs, strict=True):
        for name in (name for name in old if old[name] and not name.startswith(NOT_COMPARED)):
            assert float(mine[name]) == pytest.approx(float(old[name]), **CLOSE, nan_ok=True), (mine["step"], name)
    weights, before = (load_file(path / "student" / "model.safetensors") for path in (copied, ROOT / ASSETS / "run"))
    assert weights.keys() == before.keys()
    for name, value in before.items():
        assert float((weights[name] - value).abs().max()) < 1e-5, name
    assert json.loads((copied / "summary.json").read_text())["strategy"] == "RandomFraction"


def test_the_asset_is_what_was_written_then():
    """Nobody has made the run anew with newer code: its config has the keys of then and no others."""
    config = yaml.safe_load((ROOT / ASSETS / "run" / "config.yaml").read_text())
    assert config["seed_everything"] == 7 and config["trainer"]["max_steps"] == 8
    assert config["model"]["weighting"]["class_path"] == "lit_opd.weighting.RandomFraction"
