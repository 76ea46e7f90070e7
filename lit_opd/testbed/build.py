"""Makes the assets: a warmed-up teacher and student with their tokenizer, and the prompts for distillation.

Measured on 2026-11-22 with seed 0, one thread of a 2-core x86 CPU (greedy on 256 validation prompts, avg@4 on 64,
temperature 1):

    teacher   347,648 parameters   240 steps   82 s   greedy 1.000   avg@4 .977
    student    91,904 parameters   192 steps   26 s   greedy  .469   avg@4 .164

``reader/`` is the student after it has learned to read hints, see ``hints.py``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from lit_opd.errors import InputError
from lit_opd.files import whole_folder
from lit_opd.testbed.accuracy import accuracy
from lit_opd.testbed.hints import learn_to_read
from lit_opd.testbed.task import Automaton, Problem, make_automaton, records, sample_problems, write_records
from lit_opd.testbed.tokenizer import make_tokenizer
from lit_opd.testbed.warmup import STUDENT, TEACHER, warm_up

NUM_TRAIN, NUM_VAL = 4096, 256
NUM_SAMPLED_PROMPTS, NUM_SAMPLES = 64, 4
PROMPT_SEED = 1
ENTRIES = ("teacher", "student", "reader", "train.jsonl", "val.jsonl")


def build(out: Path, *, seed: int = 0) -> None:
    """Train the models (about 3 minutes on one core) and write the folder ``out``, whole or not at all.

    Args:
        out: replaced when it is an older build.
        seed: of the initial weights and the warm-up problems; tables and prompts do not depend on it.

    Raises:
        InputError: when ``out`` exists and is not an older build.
    """
    require_replaceable(out)
    with whole_folder(out, replace=True) as draft:
        write_prompts(draft, make_automaton())
        write_models(draft, make_automaton(), seed=seed)
    print(f"wrote {out}, {folder_bytes(out) / 1e6:.2f} MB")


def require_replaceable(out: Path) -> None:
    """Refuse to replace anything but a build: a folder that holds only what a build holds."""
    if out.exists() and not (out.is_dir() and all(entry.name in ENTRIES for entry in out.iterdir())):
        raise InputError(
            f"`build.out` must be a new folder or an older build (only {', '.join(ENTRIES)}), got {out}; "
            "name another folder"
        )


def prompt_split(automaton: Automaton) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Problems to train on and to validate on: one draw of different problems cut in two, so no prompt is in both."""
    problems = sample_problems(automaton, count=NUM_TRAIN + NUM_VAL, seed=PROMPT_SEED)
    return problems[:NUM_TRAIN], problems[NUM_TRAIN:]


def write_prompts(out: Path, automaton: Automaton) -> None:
    """Write train.jsonl and val.jsonl."""
    train, val = prompt_split(automaton)
    write_records(out / "train.jsonl", records(train, name="train"))
    write_records(out / "val.jsonl", records(val, name="val"))


def write_models(out: Path, automaton: Automaton, *, seed: int) -> None:
    """Train, measure and save ``teacher/``, ``student/`` and ``reader/``."""
    tokenizer = make_tokenizer()
    for name, plan in (("teacher", TEACHER), ("student", STUDENT)):
        print(f"{name}: {plan}")
        model = warm_up(plan, automaton, tokenizer, seed=seed)
        print(f"{name}: {describe(model, tokenizer, automaton, seed=seed)}", flush=True)
        _save(model, tokenizer, out / name)
    reader = learn_to_read(model, automaton, tokenizer)
    print(f"reader: {describe(reader, tokenizer, automaton, seed=seed)}", flush=True)
    _save(reader, tokenizer, out / "reader")


def _save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def describe(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, automaton: Automaton, *, seed: int) -> str:
    """Size and accuracy of ``model`` on the validation problems, in one line."""
    rows = records(prompt_split(automaton)[1], name="val")
    greedy = accuracy(model, tokenizer, rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = accuracy(model, tokenizer, rows[:NUM_SAMPLED_PROMPTS], samples=NUM_SAMPLES)
    return f"{model.num_parameters()} parameters, greedy {greedy:.3f}, avg@{NUM_SAMPLES} {sampled:.3f}"


def folder_bytes(folder: Path) -> int:
    """Size of all files below ``folder``, bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
