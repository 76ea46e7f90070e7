"""What a run leans on fails: W&B's process, its server, a grading worker, the hub. The run goes on, or says what to do."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import wandb

from callbacks import default_callbacks
from lit_opd.cli.command import main
from lit_opd.errors import InputError
from lit_opd.evaluation.grading import Grader, math_verify_available
from lit_opd.models.loading import empty_causal_lm, load_causal_lm, load_config, load_tokenizer
from tests.helpers import tiny, wandb_file
from tests.helpers.poisoned import write_config

STEPS = 6
HUB_ID = "some-org/some-model"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_config(folder, tiny.pair(folder), list("abcdefghijkl"))


@pytest.fixture
def own_wandb():
    """W&B's library as a new process has it, before and after: it keeps its process and the settings of the environment."""
    yield forget_wandb()
    forget_wandb()


def forget_wandb() -> None:
    """End W&B's process where it still lives."""
    with suppress(Exception):  # it was killed
        wandb.teardown()
    wandb.sdk.wandb_setup._singleton = None


def services() -> list[int]:
    """W&B's service processes that this process started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command, stat = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
            except OSError:  # it has just ended
                continue
            if b"wandb-core" in command and int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(folder.name))
    return found


class KillService(L.Callback):
    """Ends W&B's process after the second step."""

    killed = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """By its id."""
        if trainer.global_step == 2:
            for process in services():
                os.kill(process, signal.SIGKILL)
                self.killed += 1


def fit(config: Path, run: Path, *arguments: str, watch: L.Callback | None = None) -> list[str]:
    """The steps in metrics.csv of a fit with every default callback."""
    command = ["fit", "--config", str(config), "--run_dir", str(run), "--trainer.max_steps", str(STEPS), *arguments]
    main(lambda: [*default_callbacks(), *([watch] if watch else [])], command)
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
    with (run / "metrics.csv").open(newline="") as file:
        return sorted({line["step"] for line in csv.DictReader(file) if line["train/loss"]}, key=int)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the process in Linux's /proc")
def test_a_killed_wandb_process_costs_its_numbers_and_not_the_run(config, tmp_path, recwarn, own_wandb):
    kill = KillService()
    assert fit(config, tmp_path / "run", watch=kill) == [str(step + 1) for step in range(STEPS)]
    assert kill.killed == 1
    told = [str(warning.message) for warning in recwarn if "W&B is lost" in str(warning.message)]
    assert len(told) == 1 and "training goes on" in told[0]


@pytest.mark.slow
def test_a_wandb_server_that_cannot_be_reached_turns_the_run_offline(config, tmp_path, own_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.warns(UserWarning, match="cannot be reached.*goes on offline"):
        assert len(fit(config, tmp_path / "run", "--wandb.mode", "online")) == STEPS
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert wandb_file.history(offline)


@pytest.mark.skipif(not math_verify_available(), reason="math-verify is not installed")
def test_a_worker_killed_while_it_grades_is_replaced_and_every_answer_is_graded():
    """The slow answer is asked again by the new worker; it runs out of time there as it would have anyway."""
    grader = Grader(num_workers=1, seconds=1.0)
    grader.compare([("0.5", "1/2")])
    first = grader._workers[0].process
    assert first is not None
    killer = threading.Timer(0.4, os.kill, (first.pid, signal.SIGKILL))
    killer.start()
    start = time.perf_counter()
    outcomes = grader.compare([("9^{9^{9^9}}", "1/2"), ("0.5", "1/2"), ("0.5", "1/3")])
    assert outcomes == ["timeout", "correct", "wrong"]
    assert first.returncode == -signal.SIGKILL and time.perf_counter() - start > 0.4
    grader.close()


LOADERS = {
    "config": load_config,
    "tokenizer": load_tokenizer,
    "weights": lambda path, field: load_causal_lm(path, field, dtype="float32"),
    "shards": lambda path, field: empty_causal_lm(path, field, dtype="float32"),
}


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_a_hub_id_without_a_network_names_the_local_folder(name):
    with pytest.raises(
        InputError, match=rf"^`model\.teacher\.path` could not be loaded from '{HUB_ID}'.*local folder$"
    ) as caught:
        LOADERS[name](HUB_ID, "model.teacher.path")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["--model.student.path", "--model.teacher.path", "--data.train"])
def test_a_fit_with_a_hub_id_without_a_network_ends_with_one_line(config, tmp_path, capsys, setting):
    with pytest.raises(SystemExit) as stopped:
        main(default_callbacks, ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), setting, HUB_ID])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and HUB_ID in line and "local" in line
    assert not (tmp_path / "run").exists()
