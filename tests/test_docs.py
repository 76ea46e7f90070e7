"""README and pages stay true: commands run, code runs, names are documented, configs are complete."""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from callbacks import RunCheckpoint, default_callbacks
from lit_opd.cli.command import main
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SMALL = ["--trainer.max_steps", "2", "--data.prompt_batch", "8", "--data.val_limit", "8", "--wandb.mode", "disabled"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def readme_commands() -> list[list[str]]:
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python train.py")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository from the command line, with the README's own strategy in my_file.py."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "lit_opd"):
        (folder / name).symlink_to(ROOT / name)
    code = next(block for block in blocks(README, "python") if "WeightingStrategy" in block)
    (folder / "my_file.py").write_text(code.replace("class HalfLife", "class Mine"))
    return folder


def test_every_command_of_the_readme_runs(workplace, monkeypatch):
    """In their order, with fewer and smaller steps."""
    monkeypatch.delitem(sys.modules, "my_file", raising=False)  # another test has one too
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    commands = readme_commands()
    assert len(commands) >= 6
    for command in commands:
        small = [word if word != "2" or "--ckpt_path" not in command else "4" for word in SMALL]
        main(default_callbacks, [*command, *small])
    strategies = {
        path.parent.name: json.loads(path.read_text())["strategy"] for path in Path("runs").glob("*/summary.json")
    }
    assert strategies == {
        "quickstart": "ImportanceWeighting",
        "uniform": "Uniform",
        "decay": "LinearDecay",
        "mine": "Mine",
    }
    assert json.loads(Path("runs/quickstart/summary.json").read_text())["steps"] == 4


def test_every_logged_name_has_a_line_in_the_docs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    main(default_callbacks, ["fit", "--config", "configs/quickstart.yaml", "--run_dir", "runs/names", *SMALL])
    with Path("runs/names/metrics.csv").open(newline="") as file:
        names = set(csv.DictReader(file).fieldnames or ())
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    undocumented = {name for name in names - {"step", "epoch"} if f"`{name}`" not in pages and "/band_" not in name}
    assert not undocumented


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_file_trains_a_step_on_tiny_models(path, tmp_path):
    """Complete, with its command on line 1; paths, sizes and the machine's devices are replaced."""
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and f"--config configs/{path.name}" in first
    student, teacher = tiny.pair(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i), "difficulty": 7} for i in range(60)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "--model.student.path": student,
        "--model.teacher.path": teacher,
        "--data.train": str(prompts),
        "--data.prompt_batch": "4",
        "--data.max_prompt_tokens": "24",
        "--model.sampler.max_new_tokens": "8",
        "--data.val_fraction": "0.1",
        "--trainer.max_steps": "1",
        "--trainer.accelerator": "cpu",
        "--trainer.devices": "1",
        "--trainer.num_nodes": "1",
        "--trainer.strategy": "auto",
        "--trainer.precision": "32-true",
        "--num_threads": "1",
        "--wandb.mode": "disabled",
        "--run_dir": str(tmp_path / "run"),
    }
    settings = yaml.safe_load(path.read_text())
    if settings["model"].get("sampler", {}).get("class_path", "").endswith("VLLMEngine"):  # not installed here
        overrides = {"--model.sampler": "TransformersSampler"} | overrides
    if settings["data"].get("val"):
        overrides["--data.val"] = str(prompts)
        del overrides["--data.val_fraction"]
    main(default_callbacks, ["fit", "--config", str(path), *(word for pair in overrides.items() for word in pair)])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


def test_links_of_the_readme_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()]
    assert not missing


def test_every_paper_named_anywhere_is_in_the_one_list_of_references():
    """And the list names nothing that the repository does not use."""
    pattern = re.compile(r"\b2\d{3}\.\d{5}\b")
    listed = set(re.findall(r"^\| (2\d{3}\.\d{5}) \|", (ROOT / "docs" / "references.md").read_text(), flags=re.M))
    sources = [
        path
        for folder in ("lit_opd", "callbacks", "configs", "docs", "benchmarks")
        for path in (ROOT / folder).rglob("*")
    ]
    texts = [path for path in [*sources, ROOT / "README.md"] if path.suffix in {".py", ".md", ".yaml"}]
    named = {found for path in texts if path.name != "references.md" for found in pattern.findall(path.read_text())}
    assert named == listed


def test_every_test_that_the_reliability_page_names_exists_and_its_yaml_parses():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"^\|.*\| ([^|]*) \|$", page, flags=re.M)
    cells = [cell for cell in named if "`tests/" in cell]
    assert len(cells) >= 12
    for cell in cells:
        for file, tests in re.findall(r"`(tests/[\w/]+\.py)`: ([^;]*)", cell):
            code = (ROOT / file).read_text()
            missing = [name for name in re.findall(r"`(test_\w+)`", tests) if f"def {name}(" not in code]
            assert not missing, (file, missing)
    for block in blocks(page, "yaml"):
        (callback,) = yaml.safe_load(block)["trainer"]["callbacks"]
        RunCheckpoint(**callback["init_args"])
