"""The study on a real model, on tiny ones: real processes, nothing repeated, figures from the runs' own files."""

from __future__ import annotations

import csv
import json
import platform
import re
import shutil
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from benchmarks.studies import healed_run, healing_study
from tests.helpers import tiny

SMALL = {
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 1,
    "model.sampler.max_new_tokens": 20,
    "data.prompt_batch": 2,
    "data.val_batch": 2,
    "data.val_limit": 2,
    "data.val_fraction": 0.2,
    "data.max_prompt_tokens": 32,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("healing")
    student, teacher = tiny.pair(folder)
    prompts = folder / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"what is {n} + {n}"}) + "\n" for n in range(10)))
    settings = SMALL | {
        "model.student.path": student,
        "model.teacher.init_args.path": teacher,
        "data.train": str(prompts),
    }
    runs = ["--runs", str(folder / "runs"), "--out", str(folder / "out"), "--seeds", "0"]
    return runs + [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
def test_a_study_trains_each_weighting_once_and_tells_their_ends(words, monkeypatch):
    chosen = {name: healing_study.VARIANTS[name] for name in ("uniform", "first-30")}
    monkeypatch.setattr(healing_study, "VARIANTS", chosen)
    healing_study.main(words)
    runs, out = (Path(words[words.index(name) + 1]) for name in ("--runs", "--out"))
    made = {path: path.stat().st_mtime_ns for path in runs.glob("*/study.json")}
    assert {path.parent.name for path in made} == {"uniform-0", "first-30-0"}
    assert not list(runs.glob("*/checkpoints")) and not list(runs.glob("*/student"))
    healing_study.main(words)
    assert made == {path: path.stat().st_mtime_ns for path in runs.glob("*/study.json")}  # nothing was repeated
    records = {record["variant"]: record for record in json.loads((out / "study.json").read_text())}
    page = (out / "study.md").read_text()
    assert f"{platform.python_version()}, {records['uniform']['finished']} to " in page and "seeds 0." in page
    for name, record in records.items():
        with (runs / f"{name}-0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        ends = [float(row["val/reverse_kl"]) for row in rows if row["val/reverse_kl"]]
        assert record["curves"]["reverse_kl"][-1][1] == pytest.approx(ends[-1])
        assert f"| {name} | 1 | {ends[-1]:.3f} |" in page
    weights = [yaml_of(runs / f"{name}-0")["model"]["weighting"]["class_path"] for name in ("uniform", "first-30")]
    assert weights == ["lit_opd.weighting.Uniform", "lit_opd.weighting.FirstFraction"]
    assert matplotlib.image.imread(out / "study.png").std() > 0.05

    assert all(yaml_of(runs / f"{name}-0")["vars"]["settings"] == records[name]["settings"] for name in records)


@pytest.mark.slow
def test_a_run_that_was_killed_behind_its_export_is_finished(words):
    """The student is exported before the summary is written."""
    folder, extra = Path(words[words.index("--runs") + 1]).with_name("killed") / "uniform-0", words[6:]
    healing_study.train(folder, "uniform", 0, extra)
    assert (folder / "student").is_dir()
    (folder / "summary.json").unlink()
    record = healing_study.study(folder, "uniform", 0, extra)
    assert record["steps"] == json.loads((folder / "summary.json").read_text())["steps"] > 0
    (folder / "student").mkdir()  # killed before the weights went
    again = healing_study.study(folder, "uniform", 0, extra)
    assert again == json.loads(json.dumps(record)) and not (folder / "student").exists()


def test_a_folder_with_runs_of_other_settings_is_refused(words, monkeypatch, tmp_path, capsys):
    """Finished or only begun: a trial of a few steps would be mixed into the study."""

    def refused(arguments: list[str], name: str) -> bool:
        with pytest.raises(SystemExit, match="2"):
            healing_study.main(arguments)
        return f"`--runs` must hold runs of these settings, got {name} of others" in capsys.readouterr().err

    monkeypatch.setattr(healing_study, "VARIANTS", {"uniform": healing_study.VARIANTS["uniform"]})
    monkeypatch.setattr(healing_study, "train", pytest.fail)
    (tmp_path / "uniform-0").mkdir()
    begun = ["--runs", str(tmp_path), *words[2:]]
    settings = healing_study.own_settings("uniform", 0, words[6:])
    (tmp_path / "uniform-0.yaml").write_text(yaml.safe_dump(settings))
    healing_study.require_unchanged(tmp_path, [("uniform", 0)], words[6:])
    assert refused([*begun, "--trainer.max_steps", "3"], "uniform-0")
    (tmp_path / "uniform-0" / "study.json").write_text(json.dumps({"settings": settings["vars"]["settings"]}))
    (tmp_path / "uniform-0.yaml").unlink()
    assert refused([*begun, "--trainer.max_steps", "3"], "uniform-0")
    healing_study.require_unchanged(tmp_path, [("uniform", 0)], words[6:])
    (tmp_path / "other.yaml").write_text(healing_study.CONFIG.read_text() + "overwrite: true\n")
    with monkeypatch.context() as changed:
        changed.setattr(healing_study, "CONFIG", tmp_path / "other.yaml")
        assert refused(begun, "uniform-0")
    monkeypatch.setitem(healing_study.VARIANTS, "uniform", {"class_path": "lit_opd.weighting.DASH"})
    assert refused(begun, "uniform-0")


FIGURES = {"prompts": 2, "distinct_2_teacher": 0.5, "teacher_text_nll_start": 4.0, "teacher_text_nll_end": 3.0}
FIGURES |= {"distinct_2_start": 0.8, "distinct_2_end": 0.6}


@pytest.fixture
def measured_run(tmp_path, monkeypatch):
    """A run folder whose models were measured."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    (folder / "metrics.csv").write_text("step,train/reverse_kl_k1,val/reverse_kl\n0,,2.0\n1,1.9,\n2,1.6,1.5\n")
    summary = {"strategy": "Uniform", "steps": 2, "tokens": 1234, "seed": 0, "seconds": 3.2}
    (folder / "summary.json").write_text(json.dumps(summary))
    shown = [{"prompt": "what is\n1 + 1", "start": "one", "end": "two"}]
    monkeypatch.setattr(healed_run, "measure", lambda run, config: (FIGURES, shown))
    return folder


def test_the_report_of_a_run_leaves_the_words_around_it(measured_run, tmp_path):
    """The shipped page lost its story to the command that it gives."""
    out = tmp_path / "out"
    shutil.copytree(healing_study.ROOT / "docs" / "healing", out)
    before, after = re.split(r"(?<=<!-- healing -->\n).*(?=<!-- /healing -->\n)", page_of(out), flags=re.S)
    for folder in (out, tmp_path / "new"):
        healed_run.main([str(measured_run), "--out", str(folder)])
        assert "| reverse KL, nats/token, held-out samples | 2.000 | 1.500 | -25 % |" in page_of(folder)
        assert "Uniform, 2 steps, 1,234 sampled tokens" in page_of(folder) and "> what is 1 + 1\n" in page_of(folder)
        assert json.loads((folder / "healing.json").read_text())["figures"] == FIGURES
        assert matplotlib.image.imread(folder / "healing.png").std() > 0.05
    assert page_of(out).startswith(before) and page_of(out).endswith(after) and "Weightings compared" in after
    assert page_of(tmp_path / "new").startswith("# Healing\n\n<!-- healing -->\nUniform")


def test_a_page_without_a_place_for_the_report_is_refused_before_anything_is_measured(
    measured_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(healed_run, "measure", pytest.fail)
    (tmp_path / "healing.md").write_text("words by hand\n")
    with pytest.raises(SystemExit, match="2"):
        healed_run.main([str(measured_run), "--out", str(tmp_path)])
    assert "with the lines <!-- healing --> and" in capsys.readouterr().err
    assert page_of(tmp_path) == "words by hand\n"


def page_of(folder: Path) -> str:
    return (folder / "healing.md").read_text()


def test_every_run_has_files_of_its_own():
    names = [f"{variant}-{seed}" for variant in healing_study.VARIANTS for seed in (0, 1)]
    assert len({healing_study.beside_run(Path("runs") / name, ".yaml") for name in names}) == len(names)


def yaml_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_the_page_is_what_the_command_writes_and_says_what_its_intervals_leave_out(tmp_path):
    docs = Path(__file__).resolve().parents[2] / "docs" / "healing"
    records = json.loads((docs / "study.json").read_text())
    assert healing_study.write_page(records, tmp_path).read_text() == (docs / "study.md").read_text()
    assert "all runs saw the prompts in one order" in (docs / "study.md").read_text()
    moved = [record | {"data_order": healing_study.BY_SEED} for record in records]
    assert "the intervals contain both" in healing_study.write_page(moved, tmp_path).read_text()
