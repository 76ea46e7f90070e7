"""N + M steps are N steps, a kill, and M steps: weights, optimizer, schedule and every line of every file, bit for bit."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import load_file

from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.compare import read_run
from lit_opd.errors import InputError
from lit_opd.run.checkpoint_files import problem
from lit_opd.sweep.checks import FINISHED, GOES_ON, SweepRun, _seen
from lit_opd.sweep.variants import Variant
from tests.cli.test_cli import write_prompts
from tests.helpers import cases, fixed, forks, tiny
from tests.helpers.wandb_file import records

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 480  # seconds; a hang is a failure
STEPS = 8
TIMES = ("time/", "throughput/")
FILES = ("profile.jsonl", "samples.jsonl", "evaluation.jsonl")


def write_config(folder: Path, models: tuple[str, str], *, every: int = 1, **changes: Any) -> Path:
    """A run of ``STEPS`` optimizer steps over 5 batches an epoch that keeps every checkpoint; dotted names change it."""
    student, teacher = models
    config: dict[str, Any] = {
        "seed_everything": 7,
        "num_threads": 1,
        "wandb": {"mode": "disabled"},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "val_check_interval": 3,
            "callbacks": [
                {"class_path": "callbacks.RunCheckpoint", "init_args": {"every": every, "keep": 99}},
                {"class_path": "callbacks.PositionProfile", "init_args": {"every": 2, "pictures_every": None}},
                {"class_path": "callbacks.RolloutSamples", "init_args": {"every": 2}},
                {"class_path": "callbacks.Throughput", "init_args": {"every": 2}},
            ],
        },
        "model": {
            "student": {"path": student, "lora": None},
            "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": teacher}},
            "sampler": {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": 6}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "validation": {"samples": 1},
        },
        "data": {
            "train": str(write_prompts(folder / "train.jsonl", 10)),
            "val": str(write_prompts(folder / "val.jsonl", 4)),
            "prompt_batch": 2,
            "samples_per_prompt": 2,
            "max_prompt_tokens": 24,
        },
    }
    for name, value in changes.items():
        *outer, last = name.split(".")
        place = config
        for key in outer:
            place = place[key]
        place[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def strategy(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lit_opd.weighting.{name}", "init_args": arguments}


SCHEDULE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": STEPS}}
HALVING = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
SHUFFLED = strategy("Shuffled", strategy=strategy("LinearDecay", gamma=0.3), seed=3)
CASES: dict[str, dict[str, Any]] = {
    "schedule, random strategy": {
        "model.lr_scheduler": SCHEDULE,
        "model.weighting": strategy("RandomFraction", fraction=0.5, seed=1),
    },
    "annealed strategy, length budget": {
        "model.weighting": strategy("AnnealedPrefixMask"),
        "model.length_budget": {"start": 2, "end": 6},
    },
    "several updates a batch, shuffled weights": {
        "model.mini_batches": 2,
        "model.weighting": SHUFFLED,
        "model.lr_scheduler": SCHEDULE,
    },
    "adapters alone": {"model.student.lora": {"rank": 2}, "model.lr_scheduler": SCHEDULE},
    "no validation": {"data.val": None, "model.weighting": strategy("AnnealedPrefixWeight")},
    "responses stopped by their prefix ratio": {
        "model.sampler": {"class_path": "lit_opd.rollout.DecodeSampler", "init_args": {"max_new_tokens": 6}},
        "model.rollout_stop": {"threshold": 0.3, "chunk": 2},
    },
}


def fit(config: Path, run_dir: Path, *words: str) -> Path:
    main(default_callbacks, ["fit", "--config", str(config), "--run_dir", str(run_dir), *words])
    return run_dir


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without times."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by their way."""
    if isinstance(value, dict):
        return {key: leaf for part in value for key, leaf in flat(value[part], f"{name}/{part}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for place, part in enumerate(value) for key, leaf in flat(part, f"{name}/{place}").items()}
    return {name: value}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    return ours == theirs or (ours != ours and theirs != theirs)


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Every line of every file and every exported weight, but for times."""
    assert metrics(ours) == metrics(theirs)
    for name in FILES:
        assert lines(ours, name) == lines(theirs, name), name
    summaries = [json.loads((run / "summary.json").read_text()) | {"seconds": 0} for run in (ours, theirs)]
    assert summaries[0] == summaries[1]
    weights = [load_file(run / "student" / "model.safetensors") for run in (ours, theirs)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Everything that the two runs left, but times and paths."""
    assert_same_files(ours, theirs)
    saved = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (ours, theirs)]
    for part in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "loops",
        "PromptDataModule",
        "callbacks",
        "global_step",
    ):
        left, right = (
            {name: leaf for name, leaf in flat(checkpoint[part]).items() if "/RunCheckpoint/" not in name}
            for checkpoint in saved
        )
        assert left.keys() == right.keys()
        differing = [name for name in left if not same(left[name], right[name]) and "/seconds" not in name]
        assert not differing, (part, differing[:5])


def killed_after(step: int, whole: Path, folder: Path) -> Path:
    """The run folder of a run that was killed some steps after its checkpoint of ``step``, in the middle of two lines; where the
    step is odd, before the validation that was due."""
    run = Path(shutil.copytree(whole, folder, symlinks=True))
    for path in run.glob("checkpoints/step-*"):
        if int(path.name.split(".")[0].removeprefix("step-")) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    last = run / "checkpoints" / "last.ckpt"
    last.unlink()
    last.symlink_to(f"step-{step}.ckpt")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        made = [row for row in rows if not (int(row["step"]) == step and step % 2 and row.get("val/reverse_kl"))]
        writer.writerows(made)
        file.write("0.1,0.2")
    with (run / "profile.jsonl").open("a") as file:
        file.write('{"step": 9, "sca')
    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.pair(tmp_path_factory.mktemp("models"))


SLOW = {"annealed strategy, length budget", "no validation", "schedule, random strategy"}
PARAMS = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in sorted(CASES)]


@pytest.fixture(scope="module", params=PARAMS)
def whole(request, models, tmp_path_factory) -> tuple[str, Path, Path]:
    """A case, its config, and the run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, models, **CASES[request.param])
    return request.param, config, fit(config, folder / "run")


# a validation is due after 3 and 6, an epoch of 5 batches ends after 5 (10 with two updates a batch), the run after 8
KILLED_AFTER = {
    "schedule, random strategy": (3, 5),
    "annealed strategy, length budget": (6, 8),
    "several updates a batch, shuffled weights": (6,),
    "adapters alone": (5,),
    "no validation": (1, 5),
    "responses stopped by their prefix ratio": (4,),
}


def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    case, config, undisturbed = whole
    for step in KILLED_AFTER[case]:
        run = killed_after(step, undisturbed, tmp_path / f"killed-{step}")
        fit(config, run, "--ckpt_path", "last")
        assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_from_every_step_and_again_from_every_later_one(whole, tmp_path):
    _, config, undisturbed = whole
    steps = sorted(int(path.stem.removeprefix("step-")) for path in undisturbed.glob("checkpoints/step-*.ckpt"))
    for step in steps:
        run = killed_after(step, undisturbed, tmp_path / f"killed-{step}")
        fit(config, run, "--ckpt_path", "last")
        assert_same_run(run, undisturbed)
        for later in steps:
            if later > step:
                again = killed_after(later, run, tmp_path / f"killed-{step}-{later}")
                fit(config, again, "--ckpt_path", "last")
                assert_same_run(again, undisturbed)


@pytest.mark.slow
def test_the_same_wandb_run_goes_on(models, tmp_path):
    """Offline: a file of its own, the same id."""
    config = write_config(tmp_path, models)
    steps = ["--trainer.max_steps"]
    for words in (["2"], ["3", "--ckpt_path", "last"]):
        fit(config, tmp_path / "run", "--wandb.mode", "offline", *steps, *words)
    paths = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    first, second = ([record.run for record in records(path.read_bytes()) if record.HasField("run")] for path in paths)
    assert first[0].run_id == second[0].run_id
    seen = [
        {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
        for path in paths
        for record in records(path.read_bytes())
        if record.HasField("history")
    ]
    assert [row["trainer/global_step"] for row in seen if "train/loss" in row] == ["1", "2", "3"]


def test_a_validation_that_the_checkpoint_had_is_not_made_again(models, tmp_path):
    """The checkpoint at the end comes after the step's validation; a kill during the export leaves no summary."""
    config = write_config(tmp_path, models, every=99, **{"trainer.max_steps": 1, "trainer.val_check_interval": 1})
    run = fit(config, tmp_path / "run")
    before = metrics(run), json.loads((run / "summary.json").read_text()) | {"seconds": 0}
    assert [row["step"] for row in before[0] if row["val/reverse_kl"]] == ["0", "1"]
    (run / "summary.json").unlink()
    fit(config, run, "--ckpt_path", "last")
    assert (metrics(run), json.loads((run / "summary.json").read_text()) | {"seconds": 0}) == before


class Dies(Callback):
    """Ends the process's work after the batch of a step, as a kill would: nothing more is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise SystemExit(9)


def test_a_finished_run_that_goes_back_and_is_killed_is_unfinished(models, tmp_path):
    """Its curves are those of the steps made again, its summary was that of the former end. It goes on to the same run."""
    config = write_config(tmp_path, models, **{"trainer.max_steps": 4, "trainer.val_check_interval": 2})
    sweep = SweepRun(Variant("Uniform", "mine", (), None, {}), 7, tmp_path / "out")
    run = fit(config, sweep.folder)
    former, whole = (run / "summary.json").read_bytes(), Path(shutil.copytree(run, tmp_path / "whole", symlinks=True))
    assert read_run(run).curves["reverse_kl"].steps == (0, 2, 4) and _seen(sweep).state == FINISHED
    words = ["fit", "--config", str(config), "--run_dir", str(run)]
    with pytest.raises(SystemExit, match="9"):
        main(lambda: [*default_callbacks(), Dies(3)], [*words, "--ckpt_path", str(run / "checkpoints" / "step-2.ckpt")])
    assert [row["step"] for row in metrics(run)][-1] == "3"
    with pytest.raises(InputError, match="must be finished runs, got .* without summary.json"):
        read_run(run)
    assert _seen(sweep).state == GOES_ON and (run / "summary.json.previous").read_bytes() == former
    (run / "summary.json").write_bytes(former)  # as earlier versions left the folder
    assert _seen(sweep).state == GOES_ON
    with pytest.raises(InputError, match="must be finished runs, got .*metrics.csv is at step 3 and whose .* at 4"):
        read_run(run)
    fit(config, run, "--ckpt_path", "last")
    assert_same_files(run, whole)
    assert _seen(sweep).state == FINISHED
    fit(config, run, "--ckpt_path", "last")  # no step is left: it stays finished
    assert read_run(run).summary["steps"] == 4


def later_than(step: int, run: Path) -> dict[str, list[int]]:
    """File -> the steps above ``step`` that it has, of files that have some."""
    found = {"metrics.csv": [int(row["step"]) for row in metrics(run)]} if (run / "metrics.csv").exists() else {}
    for name in ("profile.jsonl", "samples.jsonl"):
        found[name] = [line["step"] for line in lines(run, name)]
    for name in ("rollouts", "faults", "."):
        found[name] = [int(path.name.split(".")[0].rpartition("step-")[2]) for path in (run / name).glob("*step-*")]
    return {name: kept for name, steps in found.items() if (kept := sorted(at for at in steps if at > step))}


def test_what_a_run_has_of_later_steps_is_set_aside_where_it_goes_back(models, tmp_path, caplog):
    """Steps 3 to 8 are of the former past, though not all are made again: no reader of the folder takes both for one."""
    config = write_config(tmp_path, models, **{"trainer.val_check_interval": 2})
    settings = yaml.safe_load(config.read_text())
    samples = {"class_path": "callbacks.RolloutSamples", "init_args": {"every": 1, "save_rollouts_every": 1}}
    export = {"class_path": "callbacks.ExportStudent", "init_args": {"every": 4}}
    settings["trainer"]["callbacks"][2:3] = [samples, export]
    config.write_text(yaml.safe_dump(settings))
    run = fit(config, tmp_path / "run")
    (run / "faults").mkdir()
    (run / "faults" / "step-7.json").write_text("[]")  # as a skipped step leaves it
    before = later_than(2, run)
    assert before["rollouts"] == [3, 4, 5, 6, 7, 8] and before["."] == [4, 8] and before["faults"] == [7]
    weights, saved = (run / "student" / "model.safetensors").read_bytes(), (run / "config.yaml").read_bytes()
    rollout, whole = (run / "rollouts" / "step-3.safetensors").read_bytes(), metrics(run)
    words = ["fit", "--config", str(config), "--run_dir", str(run), "--ckpt_path", str(run / "checkpoints/step-2.ckpt")]
    words += ["--model.optimizer.lr", "1e-2"]
    with caplog.at_level("INFO"), pytest.raises(SystemExit, match="9"):
        main(lambda: [*default_callbacks(), Dies(3)], words)
    former = run / "former" / "1"
    assert f"the run goes on from step 2: what it had of later steps is in {former} now" in caplog.text
    made_again = later_than(2, run)
    assert set(sum(made_again.values(), [])) == {3} and "faults" not in made_again
    assert not (run / "student").exists() and "At step 3 of 8" in (run / "report.html").read_text()
    assert "Finished." in (former / "report.html").read_text()
    assert later_than(2, former) == before
    assert [row for row in whole if int(row["step"]) > 2] == metrics(former)
    assert (former / "student" / "model.safetensors").read_bytes() == weights
    assert (former / "config.yaml").read_bytes() == saved != (run / "config.yaml").read_bytes()
    assert json.loads((former / "summary.json").read_text())["steps"] == 8
    assert (former / "rollouts" / "step-3.safetensors").read_bytes() == rollout
    assert (run / "rollouts" / "step-3.safetensors").read_bytes() != rollout  # by the new learning rate
    fit(config, run, "--ckpt_path", "last", "--model.optimizer.lr", "1e-2")  # from step 2 once more
    assert later_than(2, run).keys() == before.keys() - {"faults"} and later_than(2, run / "former" / "2")
    assert later_than(2, former) == before


def test_a_checkpoint_of_another_run_does_not_go_on_in_a_run_folder(models, tmp_path, capsys):
    """Lines up to its step would be of the run that was there; a new folder, or a copy of the run's own, is fine."""
    config = write_config(tmp_path, models, **{"trainer.max_steps": 1, "data.val": None})
    first = fit(config, tmp_path / "first")
    other = Path(shutil.copytree(first, tmp_path / "other", symlinks=True))
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("lr: 0.001", "lr: 0.002"))
    words = ["--ckpt_path", str(first / "checkpoints" / "step-1.ckpt"), "--trainer.max_steps", "2"]
    before = (other / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        fit(config, other, *words)
    said = capsys.readouterr().err
    assert "`--run_dir` must be empty, new or the run of `--ckpt_path`" in said
    assert "its `model.optimizer.lr` is 0.002, that of the checkpoint 0.001" in said
    assert (other / "metrics.csv").read_bytes() == before
    (other / "config.yaml").write_text(text)
    fit(config, other, *words)
    assert {row["step"] for row in metrics(other)} == {"1", "2"}


def test_a_run_that_goes_on_at_its_newest_step_sets_nothing_aside(models, tmp_path):
    config = write_config(tmp_path, models, **{"trainer.max_steps": 2, "data.val": None})
    run = fit(config, tmp_path / "run")
    fit(config, run, "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert not (run / "former").exists() and {row["step"] for row in metrics(run)} == {"1", "2", "3"}


def test_a_run_that_ended_with_its_epoch_goes_on_with_the_next(models, tmp_path):
    """``fixed.fit`` has epochs of 8 batches; without end, the alarm ends the process."""

    def weights(steps: int, **paths: Path) -> dict[str, torch.Tensor]:
        trained = fixed.module(models, cases.rollout(), optimizer=cases.momentum)
        fixed.fit(trained, cases.rollout().prompts, steps=steps, **paths)
        assert trained.trainer.current_epoch == -(-steps // 8)  # epochs begun
        return fixed.weights(trained)

    signal.alarm(TIME_LIMIT)
    weights(8, save=tmp_path / "epoch.ckpt")
    ours, theirs = weights(9, load=tmp_path / "epoch.ckpt"), weights(9)
    signal.alarm(0)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


RATES = {
    "constant": ({}, [1e-3, 1e-4, 1e-4]),
    "schedule": ({"model.lr_scheduler": HALVING}, [5e-4, 2.5e-5, 1.25e-5]),
}


@pytest.mark.parametrize("case", [pytest.param("constant", marks=pytest.mark.slow), "schedule"])
def test_a_learning_rate_that_was_lowered_is_what_the_run_goes_on_with(models, tmp_path, case):
    """A tenth of it after the first step; the schedule goes on from where it is."""
    changes, rates = RATES[case]
    config = write_config(tmp_path, models, **{"trainer.max_steps": 1, "data.val": None}, **changes)
    run = fit(config, tmp_path / "run")
    options = ["--model.optimizer.lr", "1e-4", "--model.optimizer.weight_decay", "0.5", "--trainer.max_steps", "3"]
    told = r"the run goes on with lr 0.0001 instead of 0.001, weight_decay 0.5 instead of 0.01"
    with pytest.warns(UserWarning, match=told):
        fit(config, run, "--ckpt_path", "last", *options)
    found = [float(row["train/learning_rate"]) for row in metrics(run) if row["train/learning_rate"]]
    assert found == pytest.approx(rates)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5


def test_a_schedule_that_was_changed_says_that_it_goes_on_as_it_was(models, tmp_path):
    changes = {"trainer.max_steps": 1, "data.val": None, "model.lr_scheduler": HALVING}
    config = write_config(tmp_path, models, **changes)
    run = fit(config, tmp_path / "run")
    options = ["--ckpt_path", "last", "--model.lr_scheduler.gamma", "0.9", "--trainer.max_steps", "2"]
    with pytest.warns(UserWarning, match=r"lr_scheduler` was changed .* it goes on with gamma 0.5, not 0.9"):
        fit(config, run, *options)


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(models, tmp_path_factory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Runs under DDP."""
    return two_ranks(models, tmp_path_factory, "ddp")


@pytest.fixture(scope="module")
def sharded_ranks(models, tmp_path_factory) -> Path:
    """Folder of the runs with shards."""
    return two_ranks(models, tmp_path_factory, "shards")[1]


def two_ranks(models, tmp_path_factory, kind: str) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A config of two ranks, the folder with the runs of tests/helpers/resume_ranks.py, and what the ranks report."""
    folder = tmp_path_factory.mktemp("ranks")
    ddp = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"process_group_backend": "gloo"}}
    shared = {"trainer.devices": 2, "trainer.strategy": ddp, "trainer.max_steps": 5, "trainer.val_check_interval": 3}
    config = write_config(folder, models, **shared, **{"model.optimizer.init_args.lr": 1e-2})
    forks.succeed("tests.helpers.resume_ranks", str(folder), str(config), kind, logs=folder, timeout=TIME_LIMIT)
    return config, folder, [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_ranks_go_on_bit_for_bit_with_their_own_random_states(ranks):
    _, folder, reports = ranks
    assert_same_run(folder / "killed", folder / "whole")
    for report in reports:
        assert report["killed"][1] == report["whole"][1][3:]
    assert reports[0]["whole"][1] != reports[1]["whole"][1]


def test_a_signal_to_one_rank_stops_both_after_the_batch_and_nothing_is_lost(ranks):
    _, folder, reports = ranks
    for report in reports:
        assert report["stopped"] == (0, report["whole"][1][:3])
        assert report["went on"] == (None, report["whole"][1][3:])
    assert_same_run(folder / "stopped", folder / "whole")


def test_a_disk_that_is_full_for_the_writing_rank_stops_every_rank(ranks):
    for report in ranks[2]:
        assert "No space left on device" in report["full disk"] and "there is no checkpoint yet" in report["full disk"]


@pytest.mark.slow
def test_shards_are_whole_checked_and_go_on(sharded_ranks):
    folder = sharded_ranks
    checkpoints = folder / "shards" / "checkpoints"
    named = {line.split("  ")[1] for line in (checkpoints / "step-5.ckpt.sha256").read_text().splitlines()}
    assert named == {path.relative_to(checkpoints).as_posix() for path in (checkpoints / "step-5.ckpt").iterdir()}
    assert "step-5.ckpt/__1_0.distcp" in named and problem(checkpoints / "step-5.ckpt") is None
    assert_same_files(folder / "shards-killed", folder / "shards")
    shard = checkpoints / "step-5.ckpt" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "sha256" in (problem(checkpoints / "last.ckpt") or "")


def test_one_process_goes_on_from_two_correctly(ranks, tmp_path):
    """Same prompts, same tokens, same losses up to rounding; and it says that it is not bit for bit."""
    config, folder, _ = ranks
    run = killed_after(3, folder / "whole", tmp_path / "one")
    with pytest.warns(UserWarning, match="the checkpoint is of 2 ranks and the run goes on with 1"):
        fit(config, run, "--ckpt_path", "last", "--trainer.devices", "1", "--trainer.strategy", "auto")
    ours, theirs = metrics(run), metrics(folder / "whole")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for left, right in zip(ours, theirs, strict=True):
        for name in ("train/loss", "train/tokens", "train/reverse_kl_k1", "val/reverse_kl"):
            assert float(left[name] or 0) == pytest.approx(float(right[name] or 0), rel=1e-3, abs=1e-6)
