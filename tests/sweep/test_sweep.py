"""``lit-opd sweep``: what it runs, that it goes on where it stopped, what it refuses before the first run, what it says."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_opd import __main__ as entry
from lit_opd import shipped
from lit_opd.cli.command import main
from lit_opd.compare import compare_runs, read_run
from lit_opd.errors import InputError
from lit_opd.sweep import checks, command, options, variants
from lit_opd.sweep.ending import labels, table
from tests.compare.test_compare import known, write_run
from tests.helpers import forks
from tests.sweep import parts

LONGEST_LINE, NUM_PROMPTS = 80, 16
SMALL = (
    "--trainer.max_steps 2 --trainer.val_check_interval 1 --checkpoint_every 1 --data.prompt_batch 4 --data.val_limit 4"
)
SMALL += " --data.val_batch 4 --model.sampler.max_new_tokens 8 --model.validation.samples 1 --wandb.mode disabled"
SMALL += " --data.train train.jsonl --data.val train.jsonl"
BASE = ["--config", "quickstart", "--weightings", "Uniform", "mine.Mine", "--seeds", "3", *SMALL.split()]
MINE = "from lit_opd.weighting import LinearDecay\n\n\nclass Mine(LinearDecay):\n    def __init__(self, gamma: float = 0.5):\n"
MINE += "        super().__init__(gamma)\n"


def sweep(*words: str) -> int:
    return command.run([*BASE, *words], parts.callbacks)


def refused(words: Sequence[str], about: str) -> None:
    with pytest.raises(InputError, match=about) as error:
        command.run(list(words), parts.callbacks)
    assert "\n" not in str(error.value)


def write_files() -> None:
    """What a user's folder holds: prompts, and a weighting of his own."""
    lines = Path(shipped.shipped_path("lit_opd/testbed/assets/train.jsonl")).read_text().splitlines(keepends=True)
    Path("train.jsonl").write_text("".join(lines[:NUM_PROMPTS]))
    Path("mine.py").write_text(MINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a weighting of his own, and the sweep of two runs in it, of which one ended its process."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("lit_opd.sweep.crew.SPAWN", forks.Forked)
        write_files()
        Path(parts.CRASH).write_text("Mine")
        status = sweep()
        Path(parts.CRASH).unlink()
    (folder / "status").write_text(str(status))
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """What would change if a file were written again."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in found.items()}


def numbers(folder: Path) -> list[dict[str, str]]:
    """``metrics.csv`` without times, and without what a resumed run counts anew."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: text for name, text in row.items() if name.startswith("val/") or "loss" in name} for row in rows]


# -- from start to end ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_ends_as_single_fits_would(here, capfd):
    """A run that ended its process is named with its log, the other is kept; the same command trains what is left."""
    uniform, mine = (here / "runs/sweep" / name / "seed-3" for name in ("Uniform", "Mine"))
    assert (here / "status").read_text() == "1" and not (mine / "summary.json").exists()
    assert (mine / "checkpoints/step-1.ckpt").exists() and (here / "runs/sweep/compare/compare.html").exists()
    kept = files(uniform)
    capfd.readouterr()
    assert sweep("--jobs", "2", "--baseline", "Uniform") == 0
    said = capfd.readouterr().out
    assert "2 runs (2 variants x 1 seed), 2 steps each" in said
    assert "1 runs finished, 1 were finished before, 0 failed" in said and files(uniform) == kept
    assert "open runs/sweep/compare/compare.html" in said and max(map(len, said.splitlines())) <= LONGEST_LINE
    assert (
        "validation at step 0" not in (here / "runs/sweep/logs/Mine/seed-3.log").read_text().split("Seed set to 3")[2]
    )
    words = ["fit", "--config", "quickstart", *SMALL.split(), "--seed_everything", "3", "--num_threads", "1"]
    main(
        parts.callbacks,
        shipped.with_config_files([*words, "--model.weighting", "mine.Mine", "--run_dir", "runs/alone"]),
    )
    assert numbers(here / "runs/alone") == numbers(mine)
    assert all(
        torch.equal(a, b) for a, b in zip(*(weights_of(folder) for folder in (here / "runs/alone", mine)), strict=True)
    )
    record = json.loads((here / "runs/sweep/sweep.json").read_text())
    assert (
        list(record["variants"]) == ["Uniform", "Mine"] and record["seeds"] == [3] and record["command"][:2] == BASE[:2]
    )
    document = json.loads((here / "runs/sweep/compare/compare.json").read_text())
    runs = [read_run(folder, variant=name) for folder, name in ((uniform, "Uniform"), (mine, "Mine"))]
    found = compare_runs(runs, baseline="Uniform").cells["greedy", "Mine", "end"].mean.mean
    assert document["variants"]["Mine"]["metrics"]["greedy"]["end"]["mean"] == found


def weights_of(folder: Path) -> list[torch.Tensor]:
    return list(load_file(folder / "student/model.safetensors").values())


@pytest.mark.parametrize(
    ("more", "about"),
    [
        (
            ["--trainer.max_steps", "3"],
            "`trainer.max_steps` must be what Uniform/seed-3 was begun with, 2, got 3; give",
        ),
        (["--model.validation.greedy", "false"], "`model.validation.greedy` must be .*, True, got False; give another"),
    ],
)
def test_a_run_that_was_begun_with_other_settings_is_refused(here, more, about):
    """What is there stays as it is."""
    before = files(here)
    refused([*BASE, *more], about)
    assert files(here) == before


def test_a_run_that_was_begun_with_other_code_is_refused(here, tmp_path, monkeypatch):
    shutil.copytree(here, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    record = json.loads(Path("runs/sweep/sweep.json").read_text())
    ((file, digest),) = record["runs"]["Mine/seed-3"]["code"].items()
    assert file.endswith("mine.py") and record["runs"]["Uniform/seed-3"]["code"] == {}
    record["runs"]["Mine/seed-3"]["code"] = {file: digest[::-1]}
    Path("runs/sweep/sweep.json").write_text(json.dumps(record))
    refused(BASE, "mine.py` must hold the code that Mine/seed-3 was begun with, got another; give another --out, or")


@pytest.mark.slow
def test_a_run_whose_settings_changed_on_the_way_is_refused(here, tmp_path, monkeypatch):
    """Its config is that of its last part, and its label would be: half of it was trained at another learning rate."""
    shutil.copytree(here, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    uniform, rate = Path("runs/sweep/Uniform/seed-3"), ["--model.optimizer.lr", "5e-4"]
    words = [
        "fit",
        "--config",
        "quickstart",
        *SMALL.split(),
        "--seed_everything",
        "3",
        "--model.weighting",
        "Uniform",
        *rate,
    ]
    words += ["--run_dir", str(uniform), "--ckpt_path", str(uniform / "checkpoints" / "step-1.ckpt")]
    main(parts.callbacks, shipped.with_config_files(words))
    refused([*BASE, *rate], "Uniform/seed-3 must be trained with the same settings .*, got others from step 2 on")


def test_a_dry_run_lists_the_runs_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_files()
    words = ["--config", "quickstart", "--grid", "model.optimizer.lr=1e-4,2e-4", "--seeds", "1", "2", *SMALL.split()]
    words += ["--data.seed", "5"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process of its own
        assert command.run([*words, "--dry_run"], parts.callbacks) == 0
    said = capsys.readouterr().out.splitlines()
    assert "4 runs (2 variants x 2 seeds), 2 steps each, 1 at a time, in runs/sweep" in said
    assert [line.split(":")[0].strip() for line in said[-4:]] == [
        f"lr={rate}/seed-{seed}" for seed in (1, 2) for rate in ("1e-4", "2e-4")
    ]
    assert any(line.startswith("warning: 2 seeds") for line in said) and not Path("runs").exists()
    assert [
        line for line in said if line.startswith("warning: `data.seed` is 5: all seeds see the prompts in one order")
    ]
    epochs = ["--trainer.max_steps", "100", "--trainer.max_epochs", "2"]  # of 4 batches
    assert (
        command.run(["--config", "quickstart", "--seeds", "1", *SMALL.split(), *epochs, "--dry_run"], parts.callbacks)
        == 0
    )
    assert "8 steps each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["--trainer.max_stepz", "3"], "Uniform/seed-3: `--trainer.max_stepz` is no setting, got 3; the nearest"),
        (["--data.train", "nothing.jsonl"], "Uniform/seed-3: .*nothing.jsonl"),
        (["--grid", "model.weighting.gamma=0.5"], "Uniform-gamma=0.5/seed-3: `.*gamma"),
        (["--model.seed", "4"], "`model.seed` must be null in a sweep, got 4"),
        (["--baseline", "uniform"], "`--baseline` must be one of the variants Uniform, Mine, got 'uniform'"),
        (["--weightings", "Unifrm"], "`--weightings` must name weighting strategies, got 'Unifrm'"),
    ],
)
def test_a_run_that_cannot_train_is_named_before_the_first_starts(tmp_path, monkeypatch, words, about):
    monkeypatch.chdir(tmp_path)
    write_files()
    refused([*BASE, *words], about)
    assert not Path("runs").exists()


# -- words ---------------------------------------------------------------------------------------------------------------


def test_words_that_are_not_the_sweeps_go_to_fit_in_their_order():
    words = "--a.b 1 --seeds 1 2 --c=-0.5 --seed_everythin 3 --weightings Uniform DASH --d+ x --weightings TIP".split()
    asked = options.read(words)
    assert asked.overrides == ("--a.b", "1", "--c=-0.5", "--seed_everythin", "3", "--d+", "x")
    assert asked.weightings == ("Uniform", "DASH", "TIP") and asked.seeds == (1, 2)
    assert options.read([]).seeds == (1, 2, 3) and options.read([]).out == Path("runs/sweep")


@pytest.mark.parametrize(
    ("words", "about"),
    [
        ("--seeds 1 1", "`--seeds` must name each once, got 1 twice"),
        ("--seeds 1 two", "`--seeds` must be whole numbers in .*, got 'two'"),
        ("--seeds -1", "`--seeds` must be whole numbers in .*, got -1"),
        (f"--seeds {2**32}", "`--seeds` must be whole numbers in"),
        ("--jobs 0", "`--jobs` must be a whole number >= 1, got 0"),
        ("--jobs 1.5", "`--jobs` must be a whole number >= 1, got '1.5'"),
        ("--weightings Uniform Uniform", "`--weightings` must name each once, got Uniform twice"),
        ("--grid a.b", "`--grid` must be SETTING=VALUE,VALUE .*, got 'a.b'"),
        ("--grid a.b=", "`--grid` must be SETTING=VALUE,VALUE"),
        ("--grid a.b=1,,2", "`--grid` must be SETTING=VALUE,VALUE"),
        ("--grid =1", "`--grid` must be SETTING=VALUE,VALUE"),
        ("--grid a=1,1", "`--grid a` must name each once, got 1 twice"),
        ("--grid a=1 --grid a=2", "`--grid` must name each setting once, got a twice"),
        ("--grid run_dir=a,b", "`--grid` must name settings of a run, got run_dir"),
        ("--run_dir x", "`--run_dir` must not be given to a sweep"),
        ("--seed_everything 3", "`--seed_everything` must not be given to a sweep"),
        ("--ckpt_path=last", "`--ckpt_path` must not be given to a sweep"),
        ("--grid a=1,2 --a 3", "`--a` must not be given to a sweep: --grid varies it"),
        ("--weightings Uniform --model.weighting DASH", "`--model.weighting` must not be given beside --weightings"),
        ("--weightings TIP --model.weighting.keep_fraction 1", "`--model.weighting.keep_fraction` must not be given"),
        ("--weightings Uniform --grid model.weighting=DASH,TIP", "`--grid` must not vary model.weighting beside"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(words, about):
    with pytest.raises(InputError, match=about):
        options.read(words.split())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4, 2e-4", ["1e-4", "2e-4"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("{class_path: A, init_args: {b: [1, 2]}},C", ["{class_path: A, init_args: {b: [1, 2]}}", "C"]),
        ("'a,b',\"c,]\",d", ["'a,b'", '"c,]"', "d"]),
    ],
)
def test_a_comma_inside_brackets_or_quotes_parts_no_values(text, values):
    assert options.split(text) == values


def test_the_product_of_the_grid_crosses_every_weighting():
    words = [
        "--weightings",
        "Uniform",
        "TIP",
        "--grid",
        "model.optimizer.lr=1e-4,2e-4",
        "--grid",
        "data.too_long=filter,error",
    ]
    found = variants.variants(options.read(words))
    assert [variant.name for variant in found] == [
        f"{name}, lr={rate}, too_long={how}"
        for name in ("Uniform", "TIP")
        for rate in ("1e-4", "2e-4")
        for how in ("filter", "error")
    ]
    assert found[5].words[-4:] == ("--model.optimizer.lr", "1e-4", "--data.too_long", "error")
    assert len({variant.folder for variant in found}) == 8


def test_settings_of_one_class_have_names_of_their_own_and_whole_arguments():
    """A short name is the class with its defaults, whatever arguments the config's weighting has."""
    four = "{class_path: ImportanceWeighting, init_args: {w_max: 4}}"
    found = variants.variants(options.read(["--weightings", "ImportanceWeighting", four]))
    assert [variant.name for variant in found] == ["ImportanceWeighting", "ImportanceWeighting(w_max=4)"]
    assert [variant.folder for variant in found] == ["ImportanceWeighting", "ImportanceWeighting-w_max=4"]
    assert [variant.weighting["init_args"]["w_max"] for variant in found] == [1.5, 4.0]  # type: ignore[index]
    assert all("signed: false" in variant.words[1] for variant in found)


def test_one_setting_written_in_two_ways_is_refused():
    same = ["lit_opd.weighting.ImportanceWeighting", "{class_path: ImportanceWeighting, init_args: {w_max: 1.5}}"]
    for other in same:
        with pytest.raises(InputError, match="`--weightings` must be different settings, got .* same as Importance"):
            variants.variants(options.read(["--weightings", "ImportanceWeighting", other]))


def test_two_classes_that_are_called_alike_are_told_apart_by_their_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("sweep_a", "sweep_b"):
        (tmp_path / f"{name}.py").write_text(
            "from lit_opd.weighting import Uniform\n\n\nclass Mine(Uniform):\n    pass\n"
        )
    found = variants.variants(options.read(["--weightings", "sweep_a.Mine", "sweep_b.Mine"]))
    assert [variant.name for variant in found] == ["sweep_a.Mine", "sweep_b.Mine"]


def test_folders_have_plain_names_that_no_other_folder_of_the_sweep_has():
    taken = set(variants.TAKEN)
    names = ["Compare", "a b/c:d", "a(b c d)", "../x", "$x$", "", "x" * 200]
    folders = []
    for name in names:
        folders.append(variants.folder_name(name, taken))
        taken.add(folders[-1].lower())
    assert folders[:6] == ["Compare-2", "a-b-c-d", "a-b-c-d-2", "x", "x-2", "variant"] and len(folders[6]) <= 80
    assert variants.plain("_a$b$") == "ab"


def test_every_process_has_cards_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert checks.places(1, 4) == [{}] and checks.places(3, 0) == [{}, {}, {}]
    assert checks.places(2, 2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(InputError, match="`--jobs` must be at most 2 with 2 of 4 cards a run, got 3"):
        checks.places(3, 2)


# -- the end -------------------------------------------------------------------------------------------------------------


def test_the_last_table_fits_80_columns_and_has_the_numbers_of_the_comparison(tmp_path):
    long = "WindowedPrefixRatio(window=8, floor=0.3), lr=0.0002, teacher=a-very-long-name-without-a-space-in-it"
    for seed in range(4):
        write_run(tmp_path / f"u-{seed}", known(seed, 0.010), seed=seed, strategy="Uniform")
        write_run(tmp_path / f"i-{seed}", known(seed, 0.012), seed=seed, strategy="ImportanceWeighting")
    runs = [read_run(tmp_path / f"u-{seed}", variant="Uniform") for seed in range(4)]
    runs += [read_run(tmp_path / f"i-{seed}", variant=long) for seed in range(4)]
    lines = list(table(compare_runs(runs, baseline="Uniform")))
    assert max(map(len, lines)) <= LONGEST_LINE
    gap = next(line for line in lines if "difference" in line)
    assert "+0.080 [+0.080, +0.080] *" in gap and "-0.160 [-0.160, -0.160] *" in gap  # 0.002 a step, 40 steps
    mean = sum(0.4 + 0.01 * seed + 0.4 for seed in range(4)) / 4
    row = next(line for line in lines if line.startswith("Uniform"))
    assert float(row.split()[2]) == pytest.approx(mean, abs=0.002) and row.split()[1] == "4"
    assert " *  -0.160" in gap  # columns do not touch
    at = next(place for place, line in enumerate(lines) if line.startswith("WindowedP...ace-in-it 4"))
    assert lines[at + 1] == gap  # the name takes one line, and stands whole at the end
    key = next(place for place, line in enumerate(lines) if line.startswith("WindowedP...ace-in-it is"))
    assert "".join(lines[key:]).replace(" ", "") == f"WindowedP...ace-in-it is {long}".replace(" ", "")


def test_no_two_names_of_a_table_are_shortened_alike():
    names = [f"PrefixRatioTilt(alpha={alpha}, low=-5.0, high=0.0)" for alpha in range(12)]
    names += ["Uniform", "Prefi...=0.0)", "A" * 13, "B" * 14]  # the second is what the first long one would be cut to
    found = labels(names, 13)
    assert list(found) == names and len(set(found.values())) == len(names)
    assert all(len(short) <= 13 for short in found.values())
    assert all(found[name] == name for name in names[12:15]) and found["B" * 14] == "BBBBB...BBBBB"
    assert found[names[0]] == "Pref....0) #2" and found[names[11]] == "Pre....0) #13"


def test_the_help_fits_80_columns_and_a_wrong_word_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        entry.main(["sweep", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, said.splitlines())) <= LONGEST_LINE and "--grid" in said
    with pytest.raises(SystemExit) as ended:
        entry.main(["sweep", "--jobs", "none"])
    assert (
        ended.value.code == 2 and capsys.readouterr().err == "error: `--jobs` must be a whole number >= 1, got 'none'\n"
    )
