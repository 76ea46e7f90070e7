"""What runs in an environment of ``make test-versions``, and how it is told from what does not."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

TIME_LIMIT = 3600  # seconds a command
SHORT = ("--data.val_limit", "32", "--wandb.mode", "disabled")
QUICKSTART = ("train.py", "fit", "--config", "configs/quickstart.yaml", *SHORT, "--run_dir", "{folder}/quickstart")
TWO_RANKS = ("--trainer.devices", "2", "--trainer.max_steps", "3", "--overwrite", "true")
FSDP2 = ("data_parallel_size=2", "tensor_parallel_size=1", "process_group_backend=gloo")
DISTRIBUTED = "tests/step/test_distributed.py"
_PASSED = re.compile(r"^(?:=+ )?(?P<counts>\d+ passed[^=\n]*?) in [\d.]+s", re.M)


@dataclass(frozen=True)
class Check:
    """Commands of one row of the table, run one after the other until one fails.

    Args:
        name: what it shows.
        commands: arguments of the environment's Python; "{folder}" is a folder for their files.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Result:
    """Of a check: whether every command ended well, and what the last one said."""

    passed: bool
    said: str


def pytest(*words: str) -> tuple[str, ...]:
    """A command that runs tests."""
    return ("-m", "pytest", "-p", "no:cacheprovider", *words)


def two_ranks(strategy: str, *settings: str) -> tuple[str, ...]:
    """Three steps of the quickstart on two processes."""
    given = [word for pair in settings for word in (f"--trainer.strategy.{pair.split('=')[0]}", pair.split("=")[1])]
    folder = f"{{folder}}/{strategy}"
    return (*QUICKSTART[:-1], folder, *TWO_RANKS, "--trainer.strategy", strategy, *given)


CHECKS = (
    Check("quickstart, 3 steps", ((*QUICKSTART, "--trainer.max_steps", "3", "--overwrite", "true"),)),
    Check("resume to step 5", ((*QUICKSTART, "--trainer.max_steps", "5", "--ckpt_path", "last"),)),
    Check("DDP, 2 ranks", (two_ranks("DDPStrategy", "process_group_backend=gloo"), pytest(DISTRIBUTED, "-k", "ddp"))),
    Check("FSDP2, 2 ranks", (two_ranks("ModelParallelStrategy", *FSDP2), pytest(DISTRIBUTED, "-k", "fsdp2"))),
    Check("FSDP1, 2 ranks", (pytest(DISTRIBUTED, "-k", "fsdp1", "-m", "not vllm"),)),  # slow elsewhere
    Check("lazy loading", (pytest("tests/models/test_lazy.py"),)),
    Check("scoring and sampling", (pytest("tests/scoring", "tests/rollout/test_decode.py"),)),
    Check("prompts and data", (pytest("tests/prompts/test_prompts.py"),)),
    Check("strategy contract", (pytest("tests/weighting"),)),
    Check("command line", (pytest("tests/cli"),)),
    Check("checkpoints and resume", (pytest("tests/run"),)),
)


def run(check: Check, python: Path, folder: Path, root: Path) -> Result:
    """Run a check; all that it prints is kept in ``folder``.

    Args:
        check: what to run.
        python: of the environment.
        folder: for run folders and logs.
        root: of the repository.
    """
    log, said = folder / f"{check.name.replace(' ', '-').replace(',', '')}.log", ""
    with log.open("w") as file:
        for command in check.commands:
            words = [str(python), *(word.format(folder=folder) for word in command)]
            start = file.tell()
            status = _status(words, file, root)
            text = log.read_text()[start:]
            said = summary(text) if "pytest" in command else "ran"
            if status != 0 or (said == "" and "pytest" in command):
                return Result(False, f"status {status}, see {log.relative_to(root)}")
    return Result(True, said)


def _status(words: list[str], file: object, root: Path) -> int | str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        return subprocess.run(  # a hang is a failure too
            words, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=TIME_LIMIT
        ).returncode
    except subprocess.TimeoutExpired:
        return f"none after {TIME_LIMIT} s"


def summary(text: str) -> str:
    """The counts of pytest's last line, without its warnings; empty where no test passed."""
    found = _PASSED.findall(text)
    parts = found[-1].split(", ") if found else []
    return ", ".join(part for part in parts if part.split()[1] in ("passed", "skipped"))
