"""Seconds of training to greedy 0.80 on the testbed: this project's settings and TRL's IWOPDTrainer in turn.

    python -m benchmarks.speed.time_to_accuracy --trl-python PATH [--seeds 300 301 302] [--rounds 1] [--out docs]

Every run is a process of its own with one thread and starts from the shipped student. The clock stands still at every 256
prompts while the student's weights are saved; afterwards ``lit_opd.testbed.accuracy`` answers the 256 held-out
prompts greedily with each of them, for both sides. Sides take turns within a seed and see the same prompts in the same
order, which is checked token by token, as the ids that end a response are. Without ``--trl-python`` only this project
runs. ``make time-to-accuracy`` does all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speed.sides import add_options, add_out, facts, in_words, publish, require_sides, run
from benchmarks.speed.time_to_accuracy.crossing import crossings, shown, summary, table
from benchmarks.speed.time_to_accuracy.recorder import weights_file
from lit_opd.prompts.loading import PromptOrder
from lit_opd.testbed import ASSETS, read_records
from lit_opd.testbed.accuracy import accuracy

CONFIG = Path("configs/quickstart.yaml")
EVERY = 256  # prompts between two marks
NAME = "time-to-accuracy"  # of the page's part, and in the Makefile

FAST = {"model.token_budget": "6000", "model.optimizer.fused": "true"}  # the same numbers up to rounding, in less time
FORWARD_KL = {"model.objective": "Divergence", "model.objective.kind": "forward_kl"}
PREFIX_RATIO = {
    "model.weighting": "PrefixRatioTilt",
    "model.weighting.alpha": "1.0",
    "model.weighting.low": "-.inf",
    "model.weighting.high": "0.0",
}
STOPPED = {
    "model.rollout_stop": "RatioStop",
    "model.rollout_stop.threshold": "0.05",
    "model.rollout_stop.chunk": "16",
    "model.aggregation": "token-mean",
    "model.weighting": "Uniform",
}
WINDOWED = {"model.weighting": "WindowedPrefixRatio"}
OFTEN = {"data.prompt_batch": "32"}
# What each setting changes of configs/quickstart.yaml, by command-line name
OURS: dict[str, dict[str, str]] = {
    "published": {},
    "published, best setting": {**FAST, "model.weighting.w_max": "4.0"},
    "published, 32 prompts a step": FAST | OFTEN,
    "own, truncated prefix ratio": FAST | PREFIX_RATIO,
    "own, windowed prefix ratio": FAST | WINDOWED,
    "own, windowed prefix ratio, 32 prompts a step": FAST | WINDOWED | OFTEN,
    "own, full vocabulary": {**PREFIX_RATIO, **FORWARD_KL, "model.mini_batches": "4"},
    "own, full vocabulary, 32 prompts a step": PREFIX_RATIO | FORWARD_KL | OFTEN,
    "own, stopped": FAST | STOPPED,
    "own, stopped, 32 prompts a step": FAST | STOPPED | OFTEN,
    "own, stopped, full vocabulary, 32 prompts a step": STOPPED | FORWARD_KL | OFTEN,
}
# What each setting changes of the IWOPDConfig in trl_side.py
TRL: dict[str, dict[str, Any]] = {"TRL": {}, "TRL, 32 prompts a step": {"per_device_train_batch_size": 32}}
UPDATES = ("model.mini_batches", "model.epochs")  # whose product is the number of optimizer steps a rollout batch


class Judge:
    """Greedy accuracy of saved weights on the held-out prompts; the same for both sides."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(ASSETS / "student", dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
        self.rows = read_records(ASSETS / "val.jsonl")

    def accuracy(self, weights: Path | None = None) -> float:
        """Of a file's weights; of those that are loaded without one, the start's in a new judge."""
        if weights is not None:
            self.model.load_state_dict(load_file(weights))
        return accuracy(self.model, self.tokenizer, self.rows)

    def judge(self, result: dict[str, Any], folder: Path) -> None:
        """Add ``accuracy`` to every mark of a run."""
        for mark in result["marks"]:
            mark["accuracy"] = self.accuracy(weights_file(folder, mark["batches"]))


def batch_of(name: str) -> int:
    """Prompts a rollout batch of a setting."""
    batch: int = quickstart()["data"]["prompt_batch"]
    if name in OURS:
        return int(OURS[name].get("data.prompt_batch", batch))
    size, times = (TRL[name].get(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    return (size or batch) * (times or 1)


def words(overrides: dict[str, str], *, seed: int, batches: int, folder: Path) -> list[str]:
    """The command line of one of our runs: no evaluation, no loggers, no checkpoints."""
    updates = math.prod(int(overrides.get(name, 1)) for name in UPDATES)
    settings = {
        "run_dir": folder / "run",
        "seed_everything": seed,
        "data.seed": seed,
        "data.val": "null",
        "trainer.max_steps": batches * updates,
        "trainer.limit_val_batches": 0,
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "wandb.mode": "disabled",
        **overrides,
    }
    return ["fit", "--config", str(CONFIG), *(f"--{name}={value}" for name, value in settings.items())]


def write_prompts(path: Path, *, seed: int, count: int) -> None:
    """The training prompts in the order in which a run with this seed meets them."""
    rows = read_records(ASSETS / "train.jsonl")
    drawn = PromptOrder([len(rows)], None, seed).rows(0, count)
    path.write_text("".join(json.dumps(rows[row]) + "\n" for row in drawn))


def quickstart() -> dict[str, Any]:
    """The configuration that both sides share."""
    found: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    return found


def asked_of_trl(name: str, *, seed: int, prompts: Path) -> dict[str, Any]:
    """The arguments of trl_side.py that are the quickstart's, or what the setting changes."""
    shared = quickstart()
    model, data = shared["model"], shared["data"]
    return {
        "student": str(Path(model["student"]["path"]).absolute()),
        "teacher": str(Path(model["teacher"]["init_args"]["path"]).absolute()),
        "prompts": str(prompts),
        "rows": data["prompt_batch"],
        "max_prompt_tokens": data["max_prompt_tokens"],
        "max_new_tokens": model["sampler"]["init_args"]["max_new_tokens"],
        "w_max": model["weighting"]["init_args"]["w_max"],
        "optimizer": model["optimizer"]["init_args"] | {"fused": True},
        "lr_scheduler": model["lr_scheduler"]["init_args"],
        "seed": seed,
        "config": TRL[name],
    }


def one_run(name: str, *, seed: int, prompts: Path, count: int, trl_python: str | None, judge: Judge) -> dict[str, Any]:
    """One setting with one seed on the first ``count`` prompts of a file: its marks with accuracies."""
    batch = batch_of(name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        asked: dict[str, Any] = {"folder": place, "every": EVERY // batch, "batches": count // batch}
        if name in TRL:
            asked |= asked_of_trl(name, seed=seed, prompts=prompts)
        else:
            asked |= {"words": words(OURS[name], seed=seed, batches=count // batch, folder=folder)}
        result = run("time_to_accuracy", "trl" if name in TRL else "ours", [json.dumps(asked)], trl_python)
        judge.judge(result, folder)
    return {"setting": name, "seed": seed, **result}


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Both runs met the same prompts, as token ids and in one order, and end a response at the same ids.

    Raises:
        RuntimeError: they differ.
    """
    pairs = zip(distinct(one["rows"]), distinct(other["rows"]), strict=False)
    same = all(left == right for left, right in pairs)
    shared = [(result["first_prompt"], sorted(result["stop_ids"])) for result in (one, other)]
    if not same or shared[0] != shared[1]:
        raise RuntimeError(
            f"{one['setting']} and {other['setting']} must meet the same prompts and stop ids, got a first prompt and "
            f"stop ids of {shared[0]} and {shared[1]}, and {'equal' if same else 'different'} prompts in all"
        )


def distinct(rows: Sequence[int]) -> list[int]:
    """Without the repetitions of several samples a prompt."""
    return [row for row, _ in groupby(rows)]


def measured(
    names: list[str], *, seeds: list[int], rounds: int, count: int, trl_python: str | None, judge: Judge
) -> Iterator[dict[str, Any]]:
    """All runs, the settings taking turns within a seed."""
    with tempfile.TemporaryDirectory() as place:
        for seed in seeds * rounds:
            prompts = Path(place) / f"prompts-{seed}.jsonl"
            write_prompts(prompts, seed=seed, count=count)
            first: dict[str, Any] | None = None
            for name in names:
                found = one_run(name, seed=seed, prompts=prompts, count=count, trl_python=trl_python, judge=judge)
                first = first or found
                require_same(first, found)
                yield found


def body_of(about: dict[str, Any], summaries: dict[str, dict[str, Any]], asked: argparse.Namespace) -> str:
    """What the page shows."""
    seeds = ", ".join(str(seed) for seed in asked.seeds)
    head = f"{in_words(about)}; seeds {seeds}, {asked.rounds} round(s), {asked.prompts} prompts a run."
    return f"{head}\n\n{table(summaries, list(TRL))}"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; what cannot run is refused before anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=[*OURS, *TRL], default=None, help="default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[300, 301, 302])
    parser.add_argument("--prompts", type=int, default=5120, help="prompts a run, in multiples of 256")
    add_out(parser, NAME)
    add_options(parser, rounds=1)
    asked = parser.parse_args(arguments)
    asked.settings = asked.settings or [*OURS, *(TRL if asked.trl_python else [])]
    require_sides(parser, asked, trl=bool(set(asked.settings) & set(TRL)), target=NAME)
    if asked.prompts < EVERY or asked.prompts % EVERY:
        parser.error(f"--prompts must be a multiple of {EVERY}, got {asked.prompts}")
    return asked


def main(arguments: list[str] | None = None) -> None:
    """Run and print; with --out write JSON and the page's part after every run."""
    asked = parsed(arguments)
    torch.set_num_threads(1)
    judge, about = Judge(), facts(asked.trl_python)
    start, runs = judge.accuracy(), []
    how = {"seeds": asked.seeds, "rounds": asked.rounds, "count": asked.prompts, "trl_python": asked.trl_python}
    for found in measured(asked.settings, **how, judge=judge):
        runs.append({key: value for key, value in found.items() if key != "rows"})
        when = crossings(found["marks"], start)
        print(
            f"seed {found['seed']} {found['setting']}: {shown(when['cpu'])} s, {shown(when['steps'])} steps", flush=True
        )
        done = {name: [one for one in runs if one["setting"] == name] for name in asked.settings}
        summaries = {name: summary(own, start) for name, own in done.items() if own}
        if asked.out is not None:
            report = {"about": about, "settings": OURS | TRL, "start": start, "summaries": summaries, "runs": runs}
            publish(asked.out, NAME, report, body_of(about, summaries, asked))
    print(table(summaries, list(TRL)))


if __name__ == "__main__":
    main()
