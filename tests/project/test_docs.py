"""README and pages stay true: commands run, code runs, names are documented, configs are complete."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks import RunCheckpoint, default_callbacks
from examples.half_life import HalfLife
from lit_opd import __main__ as entry
from lit_opd.cli.command import main
from lit_opd.testbed.hints import path_of
from lit_opd.testbed.task import make_automaton
from lit_opd.types import FinishReason
from tests.helpers import signals, tiny

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SMALL = ["--trainer.max_steps", "2", "--data.prompt_batch", "8", "--data.val_limit", "8", "--wandb.mode", "disabled"]
FEW = ["--data.train", "few.jsonl", "--data.val", "few.jsonl"]  # for the embedded thousands of rows
LITTLE = [*SMALL, *FEW, "--model.sampler.max_new_tokens", "8", "--model.validation.samples", "1"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def readme_commands() -> list[list[str]]:
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python train.py")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository from the command line."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "lit_opd", "examples"):
        (folder / name).symlink_to(ROOT / name)
    few_rows(folder)
    return folder


def few_rows(folder: Path) -> Path:
    """The first of the embedded training prompts as ``few.jsonl``."""
    lines = (ROOT / "lit_opd/testbed/assets/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:64]))
    return folder / "few.jsonl"


def made_by_quickstart() -> list[str]:
    """The command behind ``make quickstart``."""
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "train.py fit" in line)
    return shlex.split(line)[2:]


@pytest.fixture(scope="module")
def quickstart(workplace) -> Path:
    """The run behind ``make quickstart``, on all of its data, with fewer and smaller steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        main(default_callbacks, [*made_by_quickstart(), *SMALL])
    return workplace / "runs" / "quickstart"


def test_every_command_of_the_readme_runs(workplace, quickstart, monkeypatch):
    """As printed, one after the other behind ``make quickstart``, with fewer and smaller steps on fewer rows."""
    monkeypatch.chdir(workplace)
    commands = readme_commands()
    assert len(commands) >= 8
    for command in commands:
        going_on = command[0] == "fit" and "--ckpt_path" in command
        if command[0] == "sweep":  # trained in tests/sweep
            with pytest.raises(SystemExit, match="^0$"):
                entry.main([*command, *LITTLE, "--dry_run"])
            continue
        small = [word if word != "2" or not going_on else "4" for word in LITTLE]
        main(default_callbacks, command if command[0] in ("compare", "export") else [*command, *small])
    strategies = {
        path.parent.name: json.loads(path.read_text())["strategy"] for path in Path("runs").glob("*/summary.json")
    }
    assert strategies == {
        "quickstart": "ImportanceWeighting",
        "iw": "ImportanceWeighting",
        "uniform": "Uniform",
        "decay": "LinearDecay",
        "half-life": "HalfLife",
    }
    assert json.loads(Path("runs/iw/summary.json").read_text())["steps"] == 4
    assert Path("runs/iw/exported/model.safetensors").is_file() and Path("runs/compared/compare.html").is_file()


def test_the_readmes_own_strategy_is_the_example():
    code = next(block for block in blocks(README, "python") if "WeightingStrategy" in block)
    found: dict[str, Any] = {}
    exec(code, found)
    signal = signals.small_signal([-1.0] * 6, [-2.0] * 6)
    ours, theirs = (kind(4.0)(signal, 0.5) for kind in (found["HalfLife"], HalfLife))
    assert torch.equal(ours, theirs) and ours[0, 4] == ours[0, 0] / 2


def test_every_logged_name_has_a_line_in_the_docs(quickstart):
    with (quickstart / "metrics.csv").open(newline="") as file:
        names = set(csv.DictReader(file).fieldnames or ())
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    undocumented = {name for name in names - {"step", "epoch"} if f"`{name}`" not in pages and "/band_" not in name}
    assert not undocumented


def test_the_page_of_plots_names_all_that_a_sample_holds_and_every_end_of_a_response(quickstart):
    page = (ROOT / "docs" / "reading-the-plots.md").read_text().split("\n## Samples\n")[1].split("\n## ")[0]
    sample = json.loads((quickstart / "samples.jsonl").read_text().splitlines()[0])
    assert not [name for name in [*sample, *sample["tokens"]] if f"`{name}`" not in page]
    ends = next(line for line in page.splitlines() if "`finish_reason`" in line).split("|")[2]
    assert not [reason.name for reason in FinishReason if not re.search(rf"\b{reason.name.lower()}\b", ends)]


# that all are complete and their settings are taken, tests/preflight says of each
TRAINED = {"iw_opd_qwen3_4b_from_30b_a3b_32gpu", "smollm2_healing", "tools_quickstart"}
EXPERIMENTS = [
    pytest.param(path, id=path.stem, marks=() if path.stem in TRAINED else pytest.mark.slow)
    for path in sorted((ROOT / "configs").glob("*.yaml"))
]


@pytest.mark.parametrize("path", EXPERIMENTS)
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
    if "environment" in settings["model"].get("sampler", {}).get("init_args", {}):  # the engine is inside
        overrides["--model.sampler.init_args.sampler.init_args.max_new_tokens"] = overrides.pop(
            "--model.sampler.max_new_tokens"
        )
    if settings["data"].get("val"):
        overrides["--data.val"] = str(prompts)
        del overrides["--data.val_fraction"]
    main(default_callbacks, ["fit", "--config", str(path), *(word for pair in overrides.items() for word in pair)])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
INDEX = ROOT / "docs" / "index.md"


def prose(page: Path) -> str:
    """Without blocks of code, whose brackets are no links and whose comments are no headings."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def links(page: Path) -> list[tuple[str, Path, str]]:
    """Relative links and pictures of a page as written, as a path, and the anchor behind #."""
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in target]
    split = [(target, *target.partition("#")[::2]) for target in targets]
    return [(target, (page.parent / path).resolve() if path else page, anchor) for target, path, anchor in split]


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in a link; a heading that occurs again gets -1, -2."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = sum(name == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", name) is not None for name in found)
        found.append(f"{slug}-{count}" if count else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_resolve_to_files_and_headings(page):
    missing = [
        written
        for written, path, anchor in links(page)
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path))
    ]
    assert not missing


def test_every_page_is_reached_from_the_index():
    known, found = set(), [INDEX]
    while found:
        page = found.pop()
        known.add(page)
        found += [path for _, path, _ in links(page) if path.suffix == ".md" and path.exists() and path not in known]
    assert not [page for page in PAGES if page not in known]


def test_the_readme_lists_the_tasks_in_the_order_of_the_index():
    tasks = re.findall(r"^\| \*\*(.+?)\*\* \|", INDEX.read_text(), flags=re.M)
    named = re.findall(r"^\| (.+?) \|", README.split("\n## Pages\n")[1].split("\n## ")[0], flags=re.M)[1:]
    assert tasks == named and len(tasks) == 10
    pages, listed = ({path for _, path, _ in links(page)} for page in (INDEX, ROOT / "README.md"))
    assert pages - listed <= {ROOT / "README.md", *long_tables()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_begins_with_what_it_is_for_and_speaks_plainly(page):
    """No "behind" where "after" is meant: pages use the word for nothing else."""
    title, _, first = page.read_text().split("\n", 2)
    assert title.startswith("# ") and re.match(r"[A-Z`\[#]", first)
    assert not re.findall(r"told\s+from|of\s+no\s+step|\bbehind\b", page.read_text(), flags=re.I)


def long_tables() -> list[Path]:
    return [ROOT / "docs" / f"{name}.md" for name in ("findings", "search", "confirm", "controls")]


@pytest.mark.parametrize("page", [ROOT / "docs" / "evidence.md", *long_tables()], ids=lambda page: page.stem)
def test_a_page_of_the_first_study_names_the_current_one_at_its_top(page):
    assert "belongs to the first study" in (first := page.read_text().split("\n\n")[1]) and "(referee.md)" in first


def test_the_storys_tables_are_those_of_the_long_pages():
    """Every number of a table of results, so that new results do not leave an old story behind."""
    story = (ROOT / "docs" / "evidence.md").read_text()
    rows = [line for line in story.splitlines() if re.match(r"\| (`|mean|start)", line)]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    figures = [cell for cell in cells if re.search(r"\d \[|\+- ", cell)]
    pages = [*long_tables(), ROOT / "docs" / "healing" / "study.md"]
    known = {cell.strip() for page in pages for line in page.read_text().splitlines() for cell in line.split("|")}
    assert len(figures) > 150 and not [figure for figure in figures if figure not in known]


INTERVAL = re.compile(r"[+-]?\d\.\d+ \[[+-]?\d\.\d+, [+-]?\d\.\d+\]")


def test_what_is_said_of_the_current_study_stands_in_its_tables():
    """Every interval of the README and of the referee's own words, in what a command wrote."""
    names = (
        "referee.md",
        "referee-rates.md",
        "referee-after.md",
        "referee-null.md",
        "default-search.md",
        "default-confirm.md",
        "default-controls.md",
        "leaderboard.md",
        "healing/study.md",
        "healing/models.md",
    )
    pages = [ROOT / "docs" / name for name in names]
    written = [re.split(r"<!-- \w+ -->", page.read_text(), maxsplit=1)[-1] for page in pages]
    known = {found for text in written for found in INTERVAL.findall(text)}
    own = [page.read_text().split("<!-- results -->")[0] for page in pages[:7]]
    for text in (README, *own):
        said = INTERVAL.findall(text)
        assert len(said) >= 6 and not [each for each in said if each not in known]


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


def reference_answers(path: Path, prompts: Path) -> Path:
    """Right answers to some of the embedded prompts, in the place of the teacher's."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    paths = {row["id"]: path_of(make_automaton(), row["prompt"]) for row in rows}
    lines = [{"id": name, "response": "".join(codes) + f"\\boxed{{{codes[-1]}}}"} for name, codes in paths.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_answers_that_predict_wrote_are_replayed(tmp_path):
    """The page's first command with fewer rows, then its run on them; other prompts are sampled."""
    quick = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--run_dir", str(tmp_path / "answers")]
    rows = ROOT / "lit_opd" / "testbed" / "assets"
    small = ["--data.val", str(rows / "train.jsonl"), "--data.val_limit", "16", "--data.val_batch", "16"]
    main(default_callbacks, ["predict", *quick, "--model.student.path", str(rows / "teacher"), *small])
    settings = [
        "--model.sampler.paths",
        str(tmp_path / "answers" / "predictions.jsonl"),
        "--model.sampler.missing",
        "sample",
    ]
    words = [
        "--config",
        str(ROOT / "configs" / "recipes" / "replay.yaml"),
        "--run_dir",
        str(tmp_path / "run"),
        *settings,
    ]
    words += ["--model.warmup", "null", "--trainer.max_steps", "1", "--data.val_limit", "4", "--wandb.mode", "disabled"]
    main(default_callbacks, ["fit", *words])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


def test_the_overlay_of_an_objective_trains_a_step(tmp_path):
    path, few = ROOT / "configs" / "objective" / "windowed_kl.yaml", few_rows(tmp_path)
    command = "python train.py fit --config configs/quickstart.yaml --config configs/objective/windowed_kl.yaml"
    assert (
        path.read_text().splitlines()[0] == f"# {command}" and command in (ROOT / "docs" / "strategies.md").read_text()
    )
    small = ["--trainer.max_steps", "1", "--data.prompt_batch", "4", "--data.val_batch", "4", "--data.val_limit", "4"]
    small += ["--data.train", str(few), "--data.val", str(few), "--model.validation.samples", "1"]
    words = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", str(path), "--wandb.mode", "disabled"]
    main(default_callbacks, ["fit", *words, "--run_dir", str(tmp_path / "run"), *small])
    ends = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert ends["steps"] == 1 and "WindowedPrefixRatio" in (tmp_path / "run" / "config.yaml").read_text()


ADVANTAGES = sorted((ROOT / "configs" / "advantage").glob("*.yaml"))
TRAINED_ADVANTAGES = {"null_advantage", "residual_reward"}  # one on the quickstart, one on the recipe with a reward
FEW_ROWS = ["--trainer.max_steps", "1", "--data.prompt_batch", "4", "--data.val_batch", "4", "--data.val_limit", "4"]
FEW_ROWS += ["--model.validation.samples", "1", "--wandb.mode", "disabled"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p.stem in TRAINED_ADVANTAGES else pytest.mark.slow) for p in ADVANTAGES],
)
def test_the_overlay_of_an_advantage_trains_a_step(path, tmp_path):
    """Laid over the config that its first line names; the page of strategies links to it beside its class."""
    first, few = path.read_text().splitlines()[0], few_rows(tmp_path)
    base = re.fullmatch(rf"# python train\.py fit --config (\S+) --config configs/advantage/{path.name}", first)[1]
    (named,) = yaml.safe_load(path.read_text())["model"]["advantage"]
    name = (named if isinstance(named, str) else named["class_path"]).rpartition(".")[2]
    rows = (ROOT / "docs" / "strategies.md").read_text().splitlines()
    assert [row for row in rows if row.startswith(f"| `{name}(") and f"(../configs/advantage/{path.name})" in row]
    words = ["--config", str(ROOT / base), "--config", str(path), "--run_dir", str(tmp_path / "run"), *FEW_ROWS]
    main(default_callbacks, ["fit", *words, "--data.train", str(few), "--data.val", str(few)])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    (used,) = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["advantage"]
    assert used["class_path"].rpartition(".")[2] == name


def test_every_advantage_of_this_half_year_has_an_overlay():
    """Those of a paper of 2026 that are no part of the older set."""
    named = {path.stem.replace("_", "") for path in ADVANTAGES}
    found = {"NullAdvantage", "EntropyNull", "RewardFloor", "InfluenceShrinkage", "ResidualReward", "RewardGate"}
    assert named == {name.lower() for name in found}


@pytest.mark.slow
def test_the_overlay_of_partial_rollouts_trains_a_step(tmp_path):
    path, few = ROOT / "configs" / "sampling" / "partial.yaml", few_rows(tmp_path)
    words = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", str(path), *FEW_ROWS]
    main(
        default_callbacks,
        ["fit", *words, "--data.train", str(few), "--data.val", str(few), "--run_dir", str(tmp_path / "run")],
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    assert "PartialSampler" in (tmp_path / "run" / "config.yaml").read_text()


def test_frozen_rollouts_are_written_and_trained_on_by_their_two_commands(tmp_path):
    """What the untrained student wrote, with its log-probs, answers every prompt of the run; nothing is sampled for training."""
    path, few = ROOT / "configs" / "sampling" / "frozen.yaml", few_rows(tmp_path)
    assert "(../configs/sampling/frozen.yaml)" in (ROOT / "docs" / "strategies.md").read_text()
    first, *_, writes = [line[1:].strip() for line in path.read_text().splitlines() if "python train.py" in line]
    quick = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
    assert first == "python train.py fit --config configs/quickstart.yaml --config configs/sampling/frozen.yaml"
    given = shlex.split(writes)[5:]  # after fit --config FILE
    (few.parent / "few.jsonl").write_text("".join(few.read_text().splitlines(keepends=True)[:8]))
    data = ["--data.train", str(few), "--data.val", str(few)]
    given[given.index("runs/untrained")] = str(tmp_path / "untrained")
    main(default_callbacks, ["fit", *quick, *given, *FEW_ROWS, *data, "--trainer.max_steps", "2"])
    replay = ["--config", str(path), "--model.sampler.paths", str(tmp_path / "untrained" / "rollouts")]
    main(default_callbacks, ["fit", *quick, *replay, "--run_dir", str(tmp_path / "run"), *FEW_ROWS, *data])
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (gap,) = [row["train/replay_gap"] for row in rows if row.get("train/replay_gap")]
    assert abs(float(gap)) < 1e-4  # the student has not moved yet: its log-probs are those that were saved


@pytest.mark.parametrize(
    "name", ["opsd", "sdft", "replay", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdpo", "reward"))]
)
def test_every_recipe_trains_a_step(name, tmp_path):
    """On the embedded task, with smaller batches of fewer rows; its command is on line 1 and its page names it."""
    path = ROOT / "configs" / "recipes" / f"{name}.yaml"
    command = f"python train.py fit --config configs/recipes/{name}.yaml"
    assert path.read_text().splitlines()[0] == f"# {command}"
    assert command in (ROOT / "docs" / "recipes" / f"{name}.md").read_text()
    data = yaml.safe_load(path.read_text())["data"]
    assert all((ROOT / data[part]).is_file() for part in ("train", "val"))
    few = few_rows(tmp_path)
    small = ["--trainer.max_steps", "1", "--data.prompt_batch", "4", "--data.val_batch", "4", "--data.val_limit", "4"]
    small += ["--data.train", str(few), "--data.val", str(few), "--model.validation.samples", "1"]
    if name == "replay":
        small += ["--model.sampler.paths", str(reference_answers(tmp_path / "answers.jsonl", few))]
    words = ["--config", str(path), "--run_dir", str(tmp_path / "run"), "--wandb.mode", "disabled", *small]
    main(default_callbacks, ["fit", *words])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
