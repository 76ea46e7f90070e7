"""A tiny fit with evaluation sets, through the real command line, for the tests of evaluation and prediction.

The student is the testbed's: it boxes answers, some of them right.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from callbacks import ExportStudent, PredictionFiles, RngState, RunCheckpoint
from lit_opd.cli.command import main

ASSETS = Path(__file__).resolve().parents[2] / "lit_opd" / "testbed" / "assets"
STEPS = 3
SAMPLES = 4
PROBLEMS = 6
ROWS = 64  # of the embedded thousands of training prompts, all of which a run would read


def models(folder: Path) -> None:
    """A copy of student and teacher, where ``config`` looks for them."""
    for name in ("student", "teacher"):
        shutil.copytree(ASSETS / name, folder / name)


def problems(path: Path, count: int = PROBLEMS, *, start: int = 0, **extra: Any) -> Path:
    """Testbed problems in AIME's fields, with a byte-order mark and blank lines."""
    lines = (ASSETS / "val.jsonl").read_text().splitlines()[start : start + count]
    rows = [json.loads(line) for line in lines]
    text = "\n\n".join(
        json.dumps({"id": n, "Problem": row["prompt"], "Answer": int(row["answer"]), **extra})
        for n, row in enumerate(rows)
    )
    path.write_text("\ufeff" + text + "\n", encoding="utf-8")
    return path


def evaluation(folder: Path, **settings: Any) -> dict[str, Any]:
    """The callback's entry in a config, on one set in ``folder``."""
    values: dict[str, Any] = {
        "sets": [str(folder / "aime.jsonl")],
        "steps": [0, 1, 2],
        "samples": SAMPLES,
        "prompt_suffix": None,
        "max_new_tokens": 48,
        "batch": 10,
    }
    return {"class_path": "callbacks.EarlyAIMEEvaluation", "init_args": values | settings}


def config(folder: Path, callbacks: list[dict[str, Any]] | None = None, **trainer: Any) -> Path:
    """A complete config file in ``folder``; the models are beside that folder."""
    values = {
        "seed_everything": 7,
        "num_threads": 1,
        "wandb": {"mode": "disabled"},
        "checkpoint_every": 1,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "callbacks": callbacks or [], **trainer},
        "model": {
            "student": {"path": str(folder.parent / "student")},
            "teacher": {
                "class_path": "lit_opd.teacher.LocalTeacher",
                "init_args": {"path": str(folder.parent / "teacher")},
            },
            "sampler": {"class_path": "lit_opd.rollout.TransformersSampler", "init_args": {"max_new_tokens": 44}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "validation": {"samples": 1, "divergence": False},
        },
        "data": {
            "train": str(folder.parent / "train.jsonl"),
            "val": str(ASSETS / "val.jsonl"),
            "val_limit": 4,
            "prompt_batch": 4,
            "max_prompt_tokens": 48,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    prompts = (ASSETS / "train.jsonl").read_text().splitlines(keepends=True)
    (folder.parent / "train.jsonl").write_text(
        "".join(prompts[:ROWS])
    )  # one file for every config: a run is its data's
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def few_callbacks() -> list[Callback]:
    """Those of the default callbacks that these tests look at."""
    return [RngState(), ExportStudent(), PredictionFiles(), RunCheckpoint()]


def run(path: Path, run_dir: Path, *overrides: str, command: str = "fit") -> Path:
    """The real command line."""
    main(few_callbacks, [command, "--config", str(path), "--run_dir", str(run_dir), *overrides])
    return run_dir


def lines(run_dir: Path, name: str = "evaluation.jsonl") -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the exported student."""
    return dict(AutoModelForCausalLM.from_pretrained(run_dir / "student").named_parameters())


if __name__ == "__main__":  # under torchrun
    main(few_callbacks)
