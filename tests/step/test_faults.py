"""Faults inside a step, injected for real: weights that are no numbers, gradients that are none, memory that runs out."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import re
import resource
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from callbacks import RunCheckpoint, default_callbacks
from lit_opd.cli.command import main
from lit_opd.errors import InputError
from lit_opd.module import default_optimizer
from lit_opd.objective import Divergence
from lit_opd.rollout import TransformersSampler
from lit_opd.step.skips import bad_rows, finite
from lit_opd.step.token_budget import TokenBudget
from lit_opd.weighting.combinators import BatchMeanOne
from lit_opd.weighting.importance import ImportanceWeighting
from tests.helpers import cases, fault_ranks, fixed, forks, poisoned, tiny

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 240  # seconds; a hang is a failure
NAN, INF = float("nan"), float("inf")
KINDS = {"teacher": ("teacher", NAN), "student": ("student", INF), "gradient": ("nobody", 0.0)}
SETTINGS: dict[str, dict[str, Any]] = {
    "one update": {},
    "two mini-batches, two epochs": {"mini_batches": 2, "epochs": 2},
    "batch scope": {"weighting": BatchMeanOne(ImportanceWeighting())},
    "divergence": {"objective": Divergence("reverse_kl")},
    "AdamW": {"optimizer": default_optimizer},  # moves a weight without a gradient by momentum and decay alone
}
SKIPPED = [
    pytest.param("teacher", "one update", marks=pytest.mark.slow),
    ("teacher", "batch scope"),
    pytest.param("teacher", "divergence", marks=pytest.mark.slow),
    pytest.param("teacher", "two mini-batches, two epochs", marks=pytest.mark.slow),
    pytest.param("student", "one update", marks=pytest.mark.slow),
    ("student", "two mini-batches, two epochs"),
    ("gradient", "AdamW"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by kind of fault."""
    return {kind: poisoned.folders(tmp_path_factory.mktemp(kind), *KINDS[kind]) for kind in KINDS}


# -- values that are no numbers ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:optimizer step")
@pytest.mark.parametrize(("kind", "name"), SKIPPED)
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(models, tmp_path, kind, name):
    """Good, bad, good equals good, good: weights and optimizer bit for bit; step counter and schedule go on."""
    settings = SETTINGS[name] | {"trainer": {"default_root_dir": tmp_path}}
    settings["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    updates = settings.get("mini_batches", 1) * settings.get("epochs", 1)
    watch = poisoned.BadGradient(1) if kind == "gradient" else None
    trained, collect = poisoned.fit(models[kind], bad={1}, steps=3 * updates, watch=watch, **settings)
    plain, _ = poisoned.fit(models[kind], bad=set(), steps=2 * updates, **settings)
    assert poisoned.bits(fixed.weights(trained)) == poisoned.bits(fixed.weights(plain))
    assert poisoned.optimizer_state(trained) == poisoned.optimizer_state(plain)
    assert [record.skipped for record in collect.records] == [False, True, False]
    assert not collect.records[1].kept.any() and torch.isfinite(collect.records[1].signal.log_ratio).all()
    assert trained.global_step == trained.lr_schedulers().last_epoch == 3 * updates
    assert (trained.skips.total, trained.skips.in_a_row) == (updates, 0)


@pytest.mark.filterwarnings("ignore:optimizer step")
def test_a_bad_gradient_at_a_later_update_leaves_the_first_ones_in_place(models, tmp_path):
    """Two mini-batches: row 3 is in the first, so a NaN of rows 4 to 6 comes at the second update."""

    class Second(poisoned.BadGradient):
        """Hooks between the updates."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            """Not yet."""

        def on_phase(self, name: str, done: int, total: int) -> None:
            """After the first of two."""
            if (name, done, total) == ("updating", 1, 2):
                super().on_train_batch_start(*self.told, batch_idx=self.batch)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Remember whom to hook."""
            self.told = (trainer, pl_module, None)

    root = {"trainer": {"default_root_dir": tmp_path}}
    trained, collect = poisoned.fit(models["gradient"], bad=set(), steps=2, watch=Second(0), mini_batches=2, **root)
    assert trained.global_step == 2 and trained.skips.total == 1 and collect.records[0].skipped
    rows = json.loads((tmp_path / "faults" / "step-2.json").read_text())["rows"]
    assert [row["row"] for row in rows] == [4, 5, 6] and {row["field"] for row in rows} == {"gradient"}
    momenta = trained.trainer.optimizers[0].state
    assert momenta and all(torch.isfinite(state["momentum_buffer"]).all() for state in momenta.values())


def test_the_rows_are_kept_and_named(models, tmp_path):
    with pytest.warns(UserWarning, match=r"optimizer step 2 was skipped.*'row-3' \(teacher_logprobs is nan at .* 0\)"):
        poisoned.fit(models["teacher"], bad={1}, steps=2, trainer={"default_root_dir": tmp_path})
    found = json.loads((tmp_path / "faults" / "step-2.json").read_text())
    assert (found["step"], found["not_finite"], found["world_size"]) == (2, ["teacher_logprobs"], 1)
    row = {"rank": 0, "row": 3, "row_id": "row-3", "row_key": 103}
    assert found["rows"] == [row | {"field": "teacher_logprobs", "position": 0, "value": "nan"}]
    saved, whole = load_file(tmp_path / "faults" / "step-2.safetensors"), poisoned.bad_rollout()
    assert saved["rows"].tolist() == [3] and saved["row_keys"].tolist() == [103]
    assert torch.equal(saved["response_ids"][0], whole.response_ids[3])
    assert torch.equal(saved["prompt_ids"][0], whole.prompts.ids[3]) and torch.equal(saved["mask"][0], whole.mask[3])
    # attention adds 0 times NaN to the positions before the token too; padding stays 0
    assert torch.equal(torch.isnan(saved["teacher_logprobs"]), saved["mask"])
    assert torch.isfinite(saved["student_logprobs"]).all()


@pytest.mark.filterwarnings("ignore:optimizer step")
@pytest.mark.parametrize(("most", "stops_at"), [(0, 1), (1, 1), (3, 3)])
def test_the_run_stops_after_some_in_a_row_with_its_state_saved(models, tmp_path, most, stops_at):
    checkpoint = RunCheckpoint(every=100, dirpath=str(tmp_path))
    trainer = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    settings = {"max_skipped_steps": most, "watch": checkpoint, "trainer": trainer}
    with pytest.raises(InputError, match=r"max_skipped_steps.*teacher_logprobs not finite; data row 'row-3'") as caught:
        poisoned.fit(models["teacher"], bad=set(range(8)), steps=8, **settings)
    assert caught.value.on_every_rank and f"optimizer step {stops_at}:" in str(caught.value)
    assert f"(optimizer step {stops_at - 1}) is in" in caught.value.__notes__[0]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (saved["global_step"], saved["skipped_steps"]) == (stops_at - 1, stops_at - 1)
    assert (tmp_path / "faults" / f"step-{stops_at}.safetensors").exists()


@pytest.mark.filterwarnings("ignore:optimizer step")
def test_a_good_step_between_starts_the_count_again(models, tmp_path):
    trained, _ = poisoned.fit(models["teacher"], bad={0, 1, 3, 4}, steps=6, trainer={"default_root_dir": tmp_path})
    assert trained.skips.total == 4


def test_a_folder_that_cannot_be_written_costs_the_files_only(models, tmp_path):
    (tmp_path / "faults").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be written"):
        trained, _ = poisoned.fit(models["teacher"], bad={0}, steps=2, trainer={"default_root_dir": tmp_path})
    assert trained.skips.total == 1


def test_a_disk_that_fills_up_under_a_fault_file_keeps_no_part_of_it(models, tmp_path, file_limit, capsys):
    """``capsys`` keeps standard error out of files."""

    class Full(Callback):
        """While a batch runs."""

        def on_train_batch_start(self, *_: Any) -> None:
            file_limit(100)

        def on_train_batch_end(self, *_: Any) -> None:
            file_limit(None)

    with pytest.warns(UserWarning, match=r"step-1\.safetensors could not be written"):
        trained, _ = poisoned.fit(
            models["teacher"], bad={0}, steps=2, watch=Full(), trainer={"default_root_dir": tmp_path}
        )
    assert trained.skips.total == 1 and list((tmp_path / "faults").iterdir()) == []


def test_infinities_count_on_valid_tokens_only():
    rollout = cases.rollout()
    values = torch.zeros(rollout.mask.shape)
    values[0, 1], values[1, 5], values[2, 0] = -INF, NAN, INF  # row 1 has one token, so its NaN is padding
    found = bad_rows(["teacher_logprobs"], {"teacher_logprobs": values}, rollout, list(range(7)))
    shown = [(row.row, row.position, row.value) for row in found]
    assert shown == [(0, 1, "-inf"), (2, 0, "inf")]
    assert finite(values).abs().sum() == 0


def test_a_negative_number_of_skips_is_refused(models):
    with pytest.raises(InputError, match=r"`OPDModule\.max_skipped_steps` must be >= 0, got -1"):
        fixed.module(models["gradient"], cases.rollout(), max_skipped_steps=-1)


# -- the command line with every default callback ----------------------------------------------------------------------


def poisoned_letter(folder: Path) -> tuple[str, str]:
    """Models of which the teacher cannot read an "=" sign."""
    teacher = tiny.qwen3(seed=2)
    with torch.no_grad():
        teacher.get_input_embeddings().weight[tiny.tokenizer().get_vocab()["="]] = NAN
    return tiny.save(tiny.qwen3(seed=1), folder / "student"), tiny.save(teacher, folder / "teacher")


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_every_callback_counts_the_step_and_ends(tmp_path):
    config = poisoned.write_config(tmp_path, poisoned_letter(tmp_path), [*"abcdefghijk", "1 + 1 ="])
    main(
        default_callbacks,
        ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--wandb.mode", "disabled"],
    )
    run = tmp_path / "run"
    with (run / "metrics.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["train/skipped_steps"]]
    counts = [int(float(line["train/skipped_steps"])) for line in lines]
    assert counts[-1] == 1 and [int(line["step"]) for line in lines] == [1, 2, 3]
    bad = counts.index(1)
    for name in ("train/loss", "train/reverse_kl_k1"):
        assert [math.isfinite(float(line[name])) for line in lines] == [place != bad for place in range(3)]
    (row,) = json.loads((run / "faults" / f"step-{bad + 1}.json").read_text())["rows"]
    assert row["row_id"].startswith("p11")
    profile = [json.loads(line)["step"] for line in (run / "profile.jsonl").read_text().splitlines()]
    assert bad + 1 not in profile and len(profile) == 2
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (3, 12)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_stops_says_so_in_one_line_and_goes_on_from_its_state(tmp_path, capsys):
    config = str(poisoned.write_config(tmp_path, poisoned_letter(tmp_path), [f"{letter} =" for letter in "abcdefgh"]))
    arguments = ["fit", "--config", config, "--run_dir", str(tmp_path / "run"), "--wandb.mode", "disabled"]
    with pytest.raises(SystemExit) as stopped:
        main(default_callbacks, arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "max_skipped_steps" in line and "data row 'p" in line and "faults/step-3.json" in line
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    main(default_callbacks, [*arguments, "--ckpt_path", "last", "--model.max_skipped_steps", "4"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


# -- two processes -----------------------------------------------------------------------------------------------------


RANKS = [pytest.param(fault_ranks.FAST, id="fast"), pytest.param(fault_ranks.SLOW, id="slow", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=RANKS)
def two_ranks(request, models, tmp_path_factory):
    """Folder of the run, and what both ranks report by case."""
    out = tmp_path_factory.mktemp("ranks")
    words = [str(out), ",".join(request.param), *models["teacher"], *models["student"]]
    forks.run("tests.helpers.fault_ranks", *words, logs=out, timeout=TIME_LIMIT, cwd=out)
    assert (out / "rank-1.pt").exists(), forks.said(out)
    first, second = (torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    return out, {named: (first[named], second[named]) for named in request.param}


def test_both_ranks_skip_a_step_that_is_not_finite_on_one(two_ranks):
    out, reports = two_ranks
    for named, ranks in reports.items():
        if named.endswith("stopped"):
            continue
        for found in ranks:
            assert found["skipped"] == [False, True, False], named
            assert found["same weights"] and found["same state"], named
        assert [len(found["warnings"]) for found in ranks] == [1, 0]


def test_the_rows_of_one_rank_are_kept(two_ranks):
    out, reports = two_ranks
    for named in reports:
        kind = named.split()[1]
        if kind in ("teacher", "student"):
            (row,) = json.loads((out / named / "faults" / "step-2.json").read_text())["rows"]
            assert (row["rank"], row["row"], row["row_id"], row["field"]) == (1, 1, "row-3", f"{kind}_logprobs")
            files = sorted(path.name for path in (out / named / "faults").iterdir())
            assert files == ["step-2-rank-1.safetensors", "step-2.json"]


def test_both_ranks_stop_with_one_error_and_the_state_saved(two_ranks):
    out, reports = two_ranks
    stopped = [ranks for named, ranks in reports.items() if named.endswith("stopped")]
    assert stopped
    for first, second in stopped:
        assert first["error"] == second["error"] and "data row 'row-3'" in first["error"]
        assert "(optimizer step 1) is in" in first["notes"][0]


def test_a_row_over_the_budget_on_one_rank_is_the_error_of_both(two_ranks):
    out, _ = two_ranks
    first, second = ((out / f"long-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith(
        "InputError: `OPDModule.token_budget` must hold the longest row, got 14 for a row of 15 tokens"
    )


def test_memory_that_runs_out_on_one_rank_ends_both(two_ranks):
    out, _ = two_ranks
    other, own = ((out / f"starved-{rank}").read_text() for rank in (0, 1))
    assert own.startswith("InputError: `model.token_budget` must be lower, got 17: out of memory at optimizer step 1")
    assert "on rank 1" in own and "you tried to allocate" in own
    assert other.startswith("RuntimeError") and "onnection" in other


# -- memory that runs out ----------------------------------------------------------------------------------------------


def one_step(models: tuple[str, str], watch: Any = None, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The module and the gradient of one step."""
    trained = fixed.module(models, cases.rollout(), **settings)
    start = fixed.StartWeights()

    class Both(type(start)):  # type: ignore[misc]
        """Keeps the start, then does what ``watch`` does."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Both."""
            super().on_train_start(trainer, pl_module)
            if watch is not None:
                watch.on_train_start(trainer, pl_module)

    both = Both()
    fixed.fit(trained, cases.rollout().prompts, watch=both)
    after = fixed.weights(trained)
    return trained, {name: both.weights[name] - after[name] for name in after}


CUTS: dict[str, dict[str, Any]] = {
    "no budget": {"token_budget": None},
    "budget": {"token_budget": 45},
    "batch scope": {"token_budget": 45, "weighting": BatchMeanOne(ImportanceWeighting())},
    "divergence": {"token_budget": 45, "objective": Divergence("reverse_kl")},
}
LONGEST = max(map(sum, zip(cases.PROMPTS, cases.LENGTHS, strict=True)))  # 15 tokens
HALVED = [
    ("no budget", "student"),
    ("no budget", "teacher"),
    pytest.param("divergence", "student", marks=pytest.mark.slow),
    pytest.param("budget", "student", marks=pytest.mark.slow),
    pytest.param("batch scope", "student", marks=pytest.mark.slow),
]
WHERE = {"student": True, "teacher": False}  # who runs out, and whether with a gradient


@pytest.mark.parametrize(("name", "where"), HALVED)
def test_a_step_made_again_with_half_the_budget_has_the_same_gradient(models, name, where):
    settings = CUTS[name]
    watch = poisoned.Starved(where, {0}, training=WHERE[where])
    with pytest.warns(UserWarning, match=r"out of memory at optimizer step 1 .* `model\.token_budget` (\d+)"):
        trained, ours = one_step(models["gradient"], watch, **settings)
    _, theirs = one_step(models["gradient"], **settings)
    assert fixed.relative_gap(ours, theirs) < 1e-12
    whole = len(cases.LENGTHS) * LONGEST
    assert trained.budget.halved == (settings["token_budget"] or whole) // 2
    assert max(watch.seen[1:]) <= max(trained.budget.halved, LONGEST) < watch.seen[0]
    assert trained.token_budget == settings["token_budget"]


def test_memory_that_runs_out_between_two_backwards_leaves_no_gradient_behind(models):
    watch = poisoned.Starved("student", {2})
    with pytest.warns(UserWarning, match="made again"):
        _, ours = one_step(models["gradient"], watch, token_budget=30)
    _, theirs = one_step(models["gradient"], token_budget=30)
    assert len(watch.seen) > 5 and fixed.relative_gap(ours, theirs) < 1e-12


@pytest.mark.filterwarnings("ignore:out of memory")
def test_the_halved_budget_stays_and_a_second_time_is_an_error_with_numbers(models):
    """Two micro-batches a step after the first attempt, so the sixth call is the third step's first."""
    watch = poisoned.Starved("student", {0, 5})
    told = r"got 52, halved once before: out of memory at optimizer step 3 in a micro-batch of 3 rows x 15 tokens again"
    with pytest.raises(InputError, match=told):
        poisoned.fit(models["gradient"], bad=set(), steps=9, watch=watch, token_budget=None)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_halved_budget_goes_on_with_the_run_unless_another_is_set(models, tmp_path):
    def gone_on(load: Path | None, budget: int | None, watch: Any = None) -> int | None:
        trained = fixed.module(models["gradient"], cases.rollout(), optimizer=cases.momentum, token_budget=budget)
        steps = 1 if load is None else 2
        fixed.fit(
            trained, cases.rollout().prompts, steps=steps, watch=watch, load=load, save=tmp_path / f"{steps}.ckpt"
        )
        return trained.budget.halved

    halved = gone_on(None, None, poisoned.Starved("student", {0}))
    assert halved == 52 and gone_on(tmp_path / "1.ckpt", None) == halved
    assert gone_on(tmp_path / "2.ckpt", None) == halved and gone_on(tmp_path / "1.ckpt", 60) is None


def test_a_single_row_cannot_be_cut(models):
    watch = poisoned.Starved("student", {0})
    with pytest.raises(
        InputError, match=r"1 rows x 15 tokens which cannot be cut.*you tried to allocate 1152921504606846976"
    ):
        poisoned.fit(models["gradient"], bad=set(), steps=1, watch=watch, token_budget=LONGEST)


def test_half_a_budget_always_cuts_what_did_not_fit():
    room = TokenBudget()
    with pytest.warns(UserWarning):
        room.halve(1000, rows=4, longest=20, step=1, error=MemoryError())
    assert room.halved == 40
    assert room.budget(1000, [10, 90]) == 90  # a longer row is a micro-batch of its own
    assert room.budget(1000, [10, 20]) == 40


def test_memory_that_runs_out_while_sampling_names_the_settings(models):
    watch = poisoned.Starved("student", {0}, training=False)
    settings = {"sampler": TransformersSampler(max_new_tokens=4), "weighting": ImportanceWeighting()}
    trained = fixed.module(models["gradient"], cases.rollout(), **settings)
    with pytest.raises(InputError, match=r"out of memory while sampling; lower `data\.prompt_batch`"):
        fixed.fit(trained, cases.rollout().prompts, watch=watch)


def test_memory_that_runs_out_in_a_validation_names_the_settings(models):
    watch = poisoned.Starved("student", {0}, training=False)
    watch.on_validation_start = watch.on_train_start
    trained = fixed.module(models["gradient"], cases.rollout())
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    with pytest.raises(InputError, match=r"out of memory while validating; lower `data\.val_batch` or `model\.valid"):
        L.Trainer(**trainer, callbacks=[watch]).validate(
            trained, DataLoader([cases.rollout().prompts], batch_size=None)
        )


def test_memory_that_runs_out_in_clipping_names_the_settings(models, monkeypatch):
    monkeypatch.setattr("lit_opd.step.optimisation.clip_gradients", lambda *given: torch.empty(poisoned.IMPOSSIBLE))
    with pytest.raises(InputError, match=r"out of memory while clipping the gradients; .*`model\.student\.lora`"):
        poisoned.fit(models["gradient"], bad=set(), steps=1)


class Hungry(torch.optim.SGD):
    """Asks for what no machine has in its second step."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        """The first one is made."""
        self.steps += 1
        if self.steps == 2:
            torch.empty(poisoned.IMPOSSIBLE, dtype=torch.uint8)
        return super().step(closure)


def test_memory_that_runs_out_in_an_update_saves_no_half_updated_weights(models, tmp_path):
    settings = {
        "watch": RunCheckpoint(every=1, dirpath=str(tmp_path)),
        "optimizer": lambda given: Hungry(given, lr=0.1),
    }
    trainer = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    with pytest.raises(
        InputError, match=r"out of memory while updating the weights; .*`model\.student\.lora`"
    ) as caught:
        poisoned.fit(models["gradient"], bad=set(), steps=3, trainer=trainer, **settings)
    assert "an update was cut short, so nothing was saved; the last checkpoint is" in caught.value.__notes__[0]


def limited(models: tuple[str, str], out: Path, megabytes: int | None) -> None:
    """A step of long rows under a limit on address space, in a process of its own; writes what it found."""
    whole = fixed.rollout(lengths=[400] * 32, prompt_lengths=[10] * 32, truncated=set())
    trained = fixed.module(models, whole, dtype="float32")

    class Limit(fixed.StartWeights):
        """Sets the limit once everything is loaded."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """That far above what is in use."""
            super().on_train_start(trainer, pl_module)
            self.used = process_kb("VmSize")
            if megabytes is not None:
                resource.setrlimit(resource.RLIMIT_AS, (self.used + megabytes * 1000 << 10, resource.RLIM_INFINITY))

    start = Limit()
    fixed.fit(trained, whole.prompts, watch=start)
    after = fixed.weights(trained)
    found = {name: start.weights[name] - after[name] for name in after}
    torch.save({"gradient": found, "halved": trained.budget.halved, "grew": process_kb("VmPeak") - start.used}, out)


def process_kb(name: str) -> int:
    """A figure of /proc/self/status."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a limit on address space, as Linux has it")
def test_a_step_that_does_not_fit_into_memory_is_made_in_halves(tmp_path):
    """The kernel refuses memory for real, above 45 % of what the undisturbed step took: half the rows fit into that."""
    models = tuple(tiny.save(tiny.qwen3(seed=seed, hidden=64), tmp_path / str(seed)) for seed in (1, 2))
    fresh, found, limit = multiprocessing.get_context("spawn"), [], None  # a forked one inherits free memory
    for name in ("whole", "halves"):
        process = fresh.Process(target=limited, args=(models, tmp_path / name, limit))
        process.start()
        process.join(TIME_LIMIT)
        assert process.exitcode == 0
        found.append(torch.load(tmp_path / name, weights_only=True))
        limit = int(found[0]["grew"] * 0.45 / 1000)
    assert [result["halved"] for result in found] == [None, 32 * 410 // 2]
    assert fixed.relative_gap(found[1]["gradient"], found[0]["gradient"]) < 1e-6
