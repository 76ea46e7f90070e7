"""A server that fails while training: the state before the failed batch is saved, and going on from it loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from callbacks import default_callbacks
from callbacks.checkpoint import RunCheckpoint
from lit_opd.cli.command import main
from lit_opd.errors import InputError
from lit_opd.step.optimisation import LightningOptimisation
from tests.helpers import cases, fixed, forks, tiny
from tests.helpers import fake_vllm as fake

ROOT = Path(__file__).resolve().parents[2]
ROWS, STEPS, CHECKS = 4, 4, 2  # rows a batch; optimizer steps; completion requests of the checks before a run
TIME_LIMIT = 200  # seconds; a hang is a failure
TOLERANCE = 1e-4  # nats


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"))


# -- one process, through the command line -----------------------------------------------------------------------------


def write_config(folder: Path, folders: tuple[str, str], url: str, **sampler) -> Path:
    """Four steps of a student sampled at ``url``; no checkpoint falls before the end."""
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sync = {"class_path": "lit_opd.rollout.ReloadEndpoint", "init_args": {"folder": str(folder / "pushed")}}
    drawing = {
        "urls": [url],
        "max_new_tokens": 6,
        "sync": sync,
        "timeout": 5.0,
        "retry_seconds": 0.5,
        "start_seconds": 1.0,
    }
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    config = {
        "wandb": {"mode": "disabled"},
        "num_threads": 1,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "val_check_interval": 2},
        "model": {
            "student": {"path": folders[0]},
            "teacher": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": folders[1]}},
            "sampler": {"class_path": "lit_opd.rollout.VLLMSampler", "init_args": drawing | sampler},
            "optimizer": adamw,
            "validation": {"samples": 1},
        },
        "data": {
            "train": str(folder / "train.jsonl"),
            "val": str(folder / "train.jsonl"),
            "val_limit": ROWS,
            "prompt_batch": ROWS,
            "max_prompt_tokens": 24,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def fit(config: Path, run_dir: Path, *words: str) -> dict[str, torch.Tensor]:
    """The exported student's weights."""
    main(default_callbacks, ["fit", "--config", str(config), "--run_dir", str(run_dir), *words])
    return load_file(run_dir / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory) -> tuple[dict[str, torch.Tensor], int]:
    """Weights of the run that nothing disturbs, and its completion requests."""
    folder = tmp_path_factory.mktemp("whole")
    with fake.serving(folders[0], model="student") as server:
        weights = fit(write_config(folder, folders, server.url), folder / "run")
        return weights, server.requests


# requests that succeed before the server fails for good; validation before training takes 2 * ROWS, as at step 2
FAILS_AFTER = {
    "in the validation before training": CHECKS + ROWS,
    "in the third batch": CHECKS + 6 * ROWS + 1,
    "in the validation at step 2": CHECKS + 5 * ROWS,
}


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("in the validation before training", marks=pytest.mark.slow),
        "in the third batch",
        "in the validation at step 2",
    ],
)
def test_a_run_whose_server_failed_goes_on_and_loses_nothing(folders, whole, tmp_path, capsys, when):
    run = tmp_path / "run"
    with fake.serving(folders[0], model="student") as server:
        config = write_config(tmp_path, folders, server.url)
        server.faults = [fake.fine] * FAILS_AFTER[when]
        server.always = fake.status(500)
        with pytest.raises(SystemExit):
            fit(config, run)
        said = capsys.readouterr().err
        assert "answered with HTTP status 500" in said and f"in {run}/checkpoints/last.ckpt" in said
        assert said.rstrip().endswith("go on with --ckpt_path last")
        saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        assert saved == (0 if "before" in when else 2)
        server.always = None
        ours = fit(config, run, "--ckpt_path", "last")
    theirs, _ = whole
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_whole_run_takes_the_requests_that_the_cases_count(whole):
    assert whole[1] == CHECKS + STEPS * ROWS + 3 * 2 * ROWS


def test_stale_weights_stop_the_run_with_its_state_saved(folders, tmp_path, capsys):
    with fake.serving(folders[1], model="student") as server:  # another model than the student
        config = write_config(tmp_path, folders, server.url, sync=None, max_logprob_gap=0.05)
        with pytest.raises(SystemExit):
            fit(config, tmp_path / "run")
    said = capsys.readouterr().err
    assert "max_logprob_gap" in said and "(optimizer step 0) is in" in said
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_half_a_batch_is_not_saved(folders, tmp_path, monkeypatch):
    """The second batch fails after the first of its two optimizer steps: the checkpoint of the first batch stays."""
    trained = fixed.module(folders, cases.rollout(), mini_batches=2)
    apply, calls = LightningOptimisation.apply, []

    def failing(optimisation):
        calls.append(trained.global_step)
        if len(calls) == 4:
            raise InputError("the fourth update fails")
        return apply(optimisation)

    monkeypatch.setattr(LightningOptimisation, "apply", failing)
    checkpoint = RunCheckpoint(every=2, dirpath=str(tmp_path))
    with pytest.raises(InputError) as caught:
        fixed.fit(trained, cases.rollout().prompts, steps=4, watch=checkpoint, enable_checkpointing=True)
    assert "had made 1 of its optimizer steps" in caught.value.__notes__[0]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


# -- two processes -----------------------------------------------------------------------------------------------------


def two_ranks(folder: Path, folders: tuple[str, str], urls: list[str], cases: str) -> list[dict]:
    """What each rank reports; see tests/helpers/served_ranks.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.served_ranks", str(folder), cases, *folders, *urls]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(folder / f"report-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_an_adapter_that_one_rank_finds_lost_is_loaded_for_both(folders, tmp_path):
    """All rows of rank 0 have arrived when rank 1 is told that there is no such model."""
    prompts = cases.rollout().prompts
    own = [tuple(ids[mask].tolist()) for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
    lost = threading.Event()

    def restarted(server: fake.FakeServer, handler: Any, body: dict) -> bool:
        if tuple(body["prompt"][0]) in own[1::2] and not lost.is_set():  # rank 1's
            while server.requests < len(own[::2]):
                time.sleep(0.01)
            with server.lock:  # under which answers are made
                if not lost.is_set():
                    server.adapters.clear()
                    lost.set()
        return False

    with fake.serving(folders[0], model="student") as server:
        server.always = restarted
        forks.succeed(
            "tests.helpers.sampling_ranks", str(tmp_path), "adapter", *folders, server.url, logs=tmp_path, timeout=60
        )
        (name,) = server.adapters
    reports = [torch.load(tmp_path / f"report-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [report["model"] for report in reports] == [name] * 2 and name.endswith("-2")
    assert reports[0]["keys"] != reports[1]["keys"] and max(report["gap"] for report in reports) < TOLERANCE


@pytest.mark.slow
def test_two_ranks_sample_their_own_rows_and_fail_together(folders, tmp_path):
    """Each rank has a server of its own, so that one of them can fail alone."""
    with (
        fake.serving(folders[0], model="student") as first,
        fake.serving(folders[0], model="student") as second,
    ):
        cases = "trains", "loses a connection", "fails for good"
        reports = two_ranks(tmp_path, folders, [first.url, second.url], ",".join(cases))
    by_case = {case: [report[case] for report in reports] for case in cases}
    trained, lost, failed = (by_case[case] for case in cases)
    assert trained[0]["weights"] == trained[1]["weights"] and trained[0]["keys"] != trained[1]["keys"]
    assert trained[0]["versions"] == trained[1]["versions"] == [0, 1, 2]
    assert lost[0]["weights"] == lost[1]["weights"] == trained[0]["weights"]
    assert lost[0]["pushes"] == trained[0]["pushes"] + 1 and lost[1]["pushes"] == 0
    for report in failed:
        assert second.url in report["error"] and "HTTP status 500" in report["error"] and report["saved"] == 1
