"""A batch that is sampled while the one before it trains: the same rows and streams, by weights that are one batch older."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lit_opd.errors import InputError
from lit_opd.module import OPDModule
from lit_opd.prompts import PromptDataModule
from lit_opd.rollout import LengthBudget, ReloadEndpoint, SamplingSettings, TransformersSampler, VLLMSampler
from lit_opd.rollout.ahead import from_state, to_state
from lit_opd.types import Rollout
from tests.helpers import fake_vllm as fake
from tests.helpers import fixed, tiny
from tests.servers.test_server_recovery import write_config

ROOT = Path(__file__).resolve().parents[2]
ROWS, STEPS, CHECKS = 4, 4, 1  # rows a batch; optimizer steps; completion requests of the checks before a run
FAST = {"timeout": 5.0, "retry_seconds": 1.0, "start_seconds": 5.0, "max_new_tokens": 6, "max_logprob_gap": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    """Ten prompts, so that batches of four cross an epoch."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + {i} ="}) + "\n" for i in range(10)))
    return str(path)


def fit(
    folders: tuple[str, str],
    train_file: str,
    url: str,
    pushed: Path,
    *,
    watch: tuple[L.Callback, ...] = (),
    load: Path | None = None,
    steps: int = STEPS,
    epochs: int = -1,
    lr: float = 0.1,
    sampling: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[OPDModule, fixed.Collect]:
    """A run on the prompts of the file, sampled by the server at ``url``."""
    sampler = VLLMSampler([url], sync=ReloadEndpoint(str(pushed)), **(FAST | (sampling or {})))
    trained = fixed.module(
        folders,
        fixed.rollout(lengths=[1], prompt_lengths=[1], truncated=set()),
        dtype="float32",
        sampler=sampler,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        seed=5,
        **settings,
    )
    data = PromptDataModule(train=train_file, prompt_batch=ROWS, max_prompt_tokens=24)
    collect = fixed.Collect()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[collect, *watch],
    )  # fmt: skip
    trainer.fit(trained, datamodule=data, ckpt_path=load)
    return trained, collect


def rollouts(collect: fixed.Collect) -> list[Rollout]:
    return [record.rollout for record in collect.records]


def as_of(trained: OPDModule, weights: dict[str, torch.Tensor]) -> Any:
    """The student with the weights of an earlier step."""
    trained.student.causal_lm.load_state_dict(weights)
    return trained.student


def assert_same(ours: Rollout, theirs: Rollout) -> None:
    assert ours.prompts.row_ids == theirs.prompts.row_ids and torch.equal(
        ours.prompts.row_keys, theirs.prompts.row_keys
    )
    assert torch.equal(ours.response_ids, theirs.response_ids) and torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.sampler_logprobs, theirs.sampler_logprobs)
    assert torch.equal(ours.finish_reason, theirs.finish_reason)


class Save(L.Callback):
    """A checkpoint after one optimizer step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


# -- the same batches --------------------------------------------------------------------------------------------------


def test_with_weights_that_stay_the_batches_are_those_of_no_overlap(folders, train_file, tmp_path):
    """At learning rate 0 only prompts, seeds and the length budget of each step are left to differ."""
    found = {}
    for ahead in (0, 1):
        with fake.serving(folders[0], model="student") as server:
            given = {"sampling": {"ahead": ahead}, "length_budget": LengthBudget(start=2, end=5)}
            _, collect = fit(folders, train_file, server.url, tmp_path / "pushed", lr=0.0, **given)
            found[ahead] = rollouts(collect)
            assert (
                server.requests == CHECKS + STEPS * ROWS
            )  # nothing is sampled twice, and nothing behind the last step
    assert len({rollout.mask.shape[1] for rollout in found[0]}) > 1  # the budget grows
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert_same(ours, theirs)


def test_each_batch_is_sampled_by_the_weights_one_batch_before(folders, train_file, tmp_path):
    """Its log-probs are those of the student as it then was, read by a forward of the copy that was pushed."""
    students: list[Any] = []

    class Copy(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            students.append(fixed.weights(pl_module))

    with fake.serving(folders[0], model="student") as server:
        trained, collect = fit(
            folders, train_file, server.url, tmp_path / "pushed", watch=(Copy(),), sampling={"ahead": 1}
        )
    done = rollouts(collect)
    assert [rollout.provenance.weights_version for rollout in done] == [0, 0, 1, 2]
    for step, rollout in enumerate(done):
        student = as_of(trained, students[rollout.provenance.weights_version])
        scored = student(rollout).logprobs.detach()
        torch.testing.assert_close(scored, rollout.sampler_logprobs, atol=1e-5, rtol=0)
        if step > 1:
            other = as_of(trained, students[step])(rollout).logprobs.detach()
            assert (other - rollout.sampler_logprobs).abs().max() > 1e-3


def test_the_age_of_the_weights_is_logged(folders, train_file, tmp_path):
    seen: dict[int, list[float]] = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.setdefault(ahead, []).append(float(trainer.callback_metrics["train/weights_behind"]))

    for ahead in (0, 1):
        with fake.serving(folders[0], model="student") as server:
            given = {"sampling": {"ahead": ahead}, "mini_batches": 2}
            fit(folders, train_file, server.url, tmp_path / "pushed", watch=(Watch(),), steps=6, **given)
    assert seen == {0: [0.0, 0.0, 0.0], 1: [0.0, 2.0, 2.0]}


def test_a_batch_is_on_its_way_while_the_one_before_trains(folders, train_file, tmp_path):
    """The server answers requests for the second batch only once the first is being updated with."""
    updating = threading.Event()

    class Phases(L.Callback):
        def on_phase(self, name: str, done: int, total: int) -> None:
            if name == "updating":
                updating.set()

    waited: list[bool] = []

    def hold(server: Any, handler: Any, body: dict) -> bool:
        waited.append(updating.wait(timeout=4))
        return False

    with fake.serving(folders[0], model="student") as server:
        server.faults = [fake.fine] * (CHECKS + ROWS) + [hold] * ROWS
        fit(folders, train_file, server.url, tmp_path / "pushed", watch=(Phases(),), steps=2, sampling={"ahead": 1})
    assert waited == [True] * ROWS


# -- what may go wrong -------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_the_run_that_did_not_stop(folders, train_file, tmp_path):
    """The batch that was on its way is in the checkpoint, with the version that sampled it."""
    with fake.serving(folders[0], model="student") as server:
        save = Save(tmp_path / "at-2.ckpt", 2)
        whole, all_steps = fit(
            folders, train_file, server.url, tmp_path / "pushed", watch=(save,), sampling={"ahead": 1}
        )
    kept = torch.load(save.path, weights_only=True)["sampled_ahead"]
    assert kept["version"] == 1 and kept["lengths"].shape == (ROWS,) and kept["step"] == 2
    with fake.serving(folders[0], model="student") as server:
        given = {"load": save.path, "sampling": {"ahead": 1}}
        resumed, last_steps = fit(folders, train_file, server.url, tmp_path / "again", **given)
        assert server.requests == CHECKS + ROWS  # the fourth batch alone; the third came with the checkpoint
    for ours, theirs in zip(rollouts(last_steps), rollouts(all_steps)[2:], strict=True):
        assert_same(ours, theirs)
        assert ours.provenance == theirs.provenance
    for name, value in fixed.weights(whole).items():
        assert torch.equal(value, fixed.weights(resumed)[name]), name


def test_a_checkpoint_that_is_only_evaluated_answers_by_its_own_weights(folders, train_file, tmp_path):
    """Not with the rows that an older student had begun for training, whose random numbers are those of a prediction."""
    with fake.serving(folders[0], model="student") as server:
        save = Save(tmp_path / "at-2.ckpt", 2)
        trained, _ = fit(folders, train_file, server.url, tmp_path / "pushed", watch=(save,), sampling={"ahead": 1})
        kept = torch.load(save.path, weights_only=True)
        keys = kept["sampled_ahead"]["keys"]
        prompts = fixed.rollout(lengths=[1] * ROWS, prompt_lengths=[4, 2, 3, 4], truncated=set()).prompts
        loader = DataLoader([replace(prompts, row_keys=keys)], batch_size=None)
        trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        (found,) = trainer.predict(trained, loader, ckpt_path=save.path)
    scored = trained.student(found.rollout).logprobs.detach()
    torch.testing.assert_close(scored, found.rollout.sampler_logprobs, atol=1e-5, rtol=0)


def test_a_batch_that_a_lost_server_had_is_sampled_again_by_the_weights_of_now(folders, train_file, tmp_path):
    with fake.serving(folders[0], model="student") as server, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        server.faults = [fake.fine] * (CHECKS + 2 * ROWS) + [fake.hang_up]  # in the third batch, on its way
        _, collect = fit(folders, train_file, server.url, tmp_path / "pushed", sampling={"ahead": 1})
    assert [rollout.provenance.weights_version for rollout in rollouts(collect)] == [0, 0, 2, 2]
    assert sum("sampled ahead by weights version 1 was lost" in str(each.message) for each in told) == 1


def test_weights_never_change_under_a_batch_that_is_on_its_way(folders, train_file, tmp_path):
    """A push, for an evaluation as for the next batch, waits for all answers."""
    done = threading.Event()

    def slow(server: Any, handler: Any, body: dict) -> bool:
        done.wait(timeout=0.2)
        assert server.reloads == 1  # the push before the first batch
        return False

    with fake.serving(folders[0], model="student") as server:
        server.faults = [fake.fine] * (CHECKS + ROWS) + [slow] * ROWS
        _, collect = fit(folders, train_file, server.url, tmp_path / "pushed", steps=2, sampling={"ahead": 1})
    assert [rollout.provenance.weights_version for rollout in rollouts(collect)] == [0, 0]


def test_nothing_is_sampled_ahead_of_the_end_of_the_epochs(folders, train_file, tmp_path):
    """Ten prompts are three batches of four."""
    with fake.serving(folders[0], model="student") as server:
        limits = {"steps": 100, "epochs": 1, "sampling": {"ahead": 1}}
        _, collect = fit(folders, train_file, server.url, tmp_path / "pushed", **limits)
        assert len(collect.records) == 3 and server.requests == CHECKS + 3 * ROWS


def test_what_a_checkpoint_keeps_is_given_back_row_by_row(folders, train_file, tmp_path):
    with fake.serving(folders[0], model="student") as server:
        sampler = VLLMSampler([server.url], ahead=1, **FAST)
        prompts = fixed.rollout(lengths=[1] * 3, prompt_lengths=[2, 3, 1], truncated=set()).prompts
        settings = SamplingSettings(max_new_tokens=4, stop_ids=(1,), pad_id=0, vocabulary=64)
        sampler.servers.check(tokens=None)
        sampler.begin(prompts, settings)
        state = to_state(sampler._ahead, lost=sampler.servers.num_lost)
        assert state is not None
        again = from_state(state, settings)
        keys = prompts.row_keys.tolist()
        rows = sampler._ahead.of(keys, lost=0)
        assert [ids for ids, _ in again.of(keys[::-1], lost=9)] == [ids for ids, _ in rows[::-1]]
        assert again.of([*keys, 1], lost=0) is None  # another batch
        assert sampler._ahead.of(keys, lost=1) is None  # a server went away meanwhile


@pytest.mark.parametrize("ahead", [2, -1, True, 0.5])
def test_one_batch_ahead_is_the_most(ahead):
    with pytest.raises(InputError, match="VLLMSampler.ahead` must be 0 or 1 batches, got"):
        VLLMSampler(["http://a"], ahead=ahead)


def test_data_of_ones_own_cannot_be_looked_into(folders, tmp_path):
    whole = fixed.rollout(lengths=[2], prompt_lengths=[2], truncated=set())
    with fake.serving(folders[0], model="student") as server:
        sampler = VLLMSampler([server.url], ahead=1, sync=ReloadEndpoint(str(tmp_path)), **FAST)
        with pytest.raises(InputError, match="model.sampler.ahead` must be 0 with training data of `DataLoader`"):
            fixed.fit(fixed.module(folders, whole, sampler=sampler, dtype="float32"), whole.prompts)


def test_samplers_in_this_process_sample_nothing_ahead():
    assert TransformersSampler().ahead == 0


@pytest.mark.slow
def test_two_ranks_keep_what_all_of_them_had_on_its_way(folders, tmp_path):
    """Four steps without a stop, and two and two with the checkpoint between them, end in the same weights."""
    ends = {}
    for name, words in {"whole": [], "again": ["--ckpt_path", str(tmp_path / "whole/checkpoints/step-2.ckpt")]}.items():
        with fake.serving(folders[0], model="student") as server:
            config = write_config(tmp_path, folders, server.url, ahead=1, max_logprob_gap=None)
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                "2",
                "train.py",
            ]
            command += ["fit", "--config", str(config), "--run_dir", str(tmp_path / name), *words]
            command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--checkpoint_every", "2"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            ends[name] = load_file(tmp_path / name / "student/model.safetensors")
    kept = torch.load(tmp_path / "whole/checkpoints/step-2.ckpt", weights_only=True)["sampled_ahead"]
    assert len(kept["keys"]) == len(set(kept["keys"].tolist())) == 4  # of both ranks
    assert all(torch.equal(value, ends["again"][name]) for name, value in ends["whole"].items())
