"""What the conditions train on in place of the shipped models and prompts: built once, cached below the runs.

A folder is named after what it is made of, ``assets/<name>-<first digits of the specification's sha256>``, so that a changed plan
builds anew. It appears whole or not at all and holds ``asset.json``: specification, steps made, greedy accuracy.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Qwen3ForCausalLM

from benchmarks.studies.reproduce.plan import Asset, Job, folder_of
from lit_opd.errors import InputError
from lit_opd.files import whole_folder
from lit_opd.testbed import ASSETS
from lit_opd.testbed.accuracy import accuracy
from lit_opd.testbed.task import CHAIN_LENGTH, make_automaton, records, sample_problems, write_records
from lit_opd.testbed.tokenizer import make_tokenizer
from lit_opd.testbed.warmup import WarmUp, warm_up

NUM_TRAIN, NUM_VAL = 4096, 256
PROBE_SEED, NUM_PROBES = 2, 128  # problems that tell when a student has learned enough; not those of a validation
PROBE_EVERY = 8  # steps
SIZES = ("hidden_size", "num_steps", "cosine")


def paths_of(job: Job, root: Path) -> dict[str, Any]:
    """The settings that say where a job's models and prompts are."""
    found = {role: folder_of(asset, root) for role, asset in job.assets.items()}
    teacher, student = (found.get(role, ASSETS / role) for role in ("teacher", "student"))
    data = found.get("data", ASSETS)
    local = {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": str(teacher)}}
    return {
        "model": {"student": {"path": str(student)}, "teacher": local},
        "data": {"train": str(data / "train.jsonl"), "val": str(data / "val.jsonl")},
    }


def build_asset(asset: Asset, root: Path) -> dict[str, Any]:
    """Make one asset; returns the content of its ``asset.json``."""
    name, spec = asset
    folder = folder_of(asset, root)
    with whole_folder(folder) as draft:
        about = (write_model if "hidden_size" in spec else write_data)(name, spec, draft)
        (draft / "asset.json").write_text(json.dumps({"name": name, "specification": spec} | about, indent=2) + "\n")
    return dict(json.loads((folder / "asset.json").read_text()))


def write_data(name: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Prompts to train on and to validate on: one draw of different problems, cut in two.

    With a ``pool`` the first part has as many problems, of which ``split`` draws the ``num_train`` to train on.
    """
    train, val = drawn(spec)
    train = split_of(spec, train)
    write_records(folder / "train.jsonl", train)
    write_records(folder / "val.jsonl", val)
    return {"train": len(train), "val": len(val)}


def drawn(spec: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All rows that may be trained on, and those that are validated on: seconds for a large pool."""
    num_train, num_val = spec.get("num_train", NUM_TRAIN), spec.get("num_val", NUM_VAL)
    pool = spec.get("pool", num_train)
    problems = sample_problems(
        make_automaton(all_legal=spec.get("all_legal", False)),
        count=pool + num_val,
        seed=spec["seed"],
        chain_length=spec.get("chain_length", CHAIN_LENGTH),
    )
    return records(problems[:pool], name="train"), records(problems[pool:], name="val")


def split_of(spec: dict[str, Any], rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of a pool that the seed of ``split`` trains on; all without one."""
    return random.Random(spec["split"]).sample(rows, spec.get("num_train", NUM_TRAIN)) if "split" in spec else rows


def write_model(name: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Warm a model up and save it with its tokenizer; its greedy accuracy on problems that no run sees."""
    tokenizer, probes, steps = make_tokenizer(), probes_of(spec), Steps()
    until = spec.get("until")
    reached = None if until is None else lambda model: accuracy(model, tokenizer, probes) >= until
    model = warm_up(
        WarmUp(**{key: spec[key] for key in SIZES}),
        make_automaton(all_legal=spec.get("all_legal", False)),
        tokenizer,
        seed=spec["seed"],
        chain_length=spec.get("chain_length", CHAIN_LENGTH),
        perturbed=spec.get("perturbed", 0.0),
        full=make_automaton(all_legal=True),
        stop=steps.counted(reached),
    )
    greedy = accuracy(model, tokenizer, probes)
    require_accuracy(name, spec, greedy)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = round(time.monotonic() - steps.began)
    return {"greedy": greedy, "steps": steps.made, "parameters": model.num_parameters(), "seconds": seconds}


class Steps:
    """Counts the steps of a warm-up."""

    def __init__(self) -> None:
        self.made, self.began = 0, time.monotonic()

    def counted(self, reached: Callable[[Qwen3ForCausalLM], bool] | None) -> Callable[[Qwen3ForCausalLM, int], bool]:
        """A ``stop`` for ``warm_up`` that asks ``reached`` every few steps, in evaluation mode."""

        def stop(model: Qwen3ForCausalLM, step: int) -> bool:
            """Whether ``reached`` says so; between the steps at which it is asked, False."""
            self.made = step
            if reached is None or step % PROBE_EVERY:
                return False
            done = reached(model.eval())
            model.train()
            return done

        return stop


def probes_of(spec: dict[str, Any]) -> list[dict[str, str]]:
    """Problems of a model's own task, from a seed that neither prompts nor warm-up use."""
    automaton = make_automaton(all_legal=spec.get("all_legal", False))
    length = spec.get("chain_length", CHAIN_LENGTH)
    return records(sample_problems(automaton, count=NUM_PROBES, seed=PROBE_SEED, chain_length=length), name="probe")


def require_accuracy(name: str, spec: dict[str, Any], greedy: float) -> None:
    """Refuse a teacher that did not learn the task, or a student that never reached where it should start."""
    for key in ("at_least", "until"):
        if greedy < spec.get(key, 0.0):
            raise InputError(
                f"`models.{name}.{key}` must be reached within num_steps = {spec['num_steps']}, got greedy accuracy "
                f"{greedy:.3f} of {spec[key]}; give the warm-up more steps in the plan"
            )
