"""Seconds of training to greedy 0.80 on the testbed: this project's settings and TRL's IWOPDTrainer in turn.

    python -m benchmarks.time_to_accuracy --trl-python PATH [--seeds 200 201 202] [--rounds 1] [--out docs]

Every run is a process of its own with one thread and starts from the shipped student. The clock stands still at every second
rollout batch while the student's weights are saved; afterwards ``lit_opd.testbed.accuracy`` answers the 256 held-out
prompts greedily with each of them, for both sides. Sides take turns within a seed and see the same prompts in the same
order, which is checked token by token, as the ids that end a response are. Without ``--trl-python`` only this project
runs. ``make time-to-accuracy`` does all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.__main__ import facts, run
from benchmarks.time_to_accuracy.crossing import crossings, shown, summary, table
from benchmarks.time_to_accuracy.recorder import weights_file
from lit_opd.prompt_loading import PromptOrder
from lit_opd.testbed import ASSETS, read_records
from lit_opd.testbed.accuracy import accuracy

HERE = Path(__file__).parent
CONFIG = Path("configs/quickstart.yaml")
EVERY = 2  # rollout batches between two marks
START, END = "<!-- time-to-accuracy -->", "<!-- /time-to-accuracy -->"

# What each setting changes of configs/quickstart.yaml, by command-line name
OURS: dict[str, dict[str, str]] = {
    "published": {},
}
# What each setting changes of the IWOPDConfig in trl_side.py
TRL: dict[str, dict[str, Any]] = {
    "TRL": {},
}
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
    return ["fit", "--config", str(CONFIG), *(w for name, value in settings.items() for w in (f"--{name}", str(value)))]


def write_prompts(path: Path, *, seed: int, batches: int) -> None:
    """The training prompts in the order in which a run with this seed meets them."""
    rows = read_records(ASSETS / "train.jsonl")
    order = PromptOrder([len(rows)], None, seed)
    drawn = order.rows(0, batches * quickstart()["data"]["prompt_batch"])
    path.write_text("".join(json.dumps(rows[row]) + "\n" for row in drawn))


def quickstart() -> dict[str, Any]:
    """The configuration that both sides share."""
    found: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    return found


def asked_of_trl(config: dict[str, Any], *, seed: int, batches: int, prompts: Path, folder: Path) -> dict[str, Any]:
    """The arguments of trl_side.py: the quickstart's."""
    shared = quickstart()
    model, data = shared["model"], shared["data"]
    return {
        **{role: str(Path(model[role].get("path") or model[role]["init_args"]["path"]).absolute()) for role in ROLES},
        "prompts": str(prompts),
        "rows": data["prompt_batch"],
        "max_prompt_tokens": data["max_prompt_tokens"],
        "max_new_tokens": model["sampler"]["init_args"]["max_new_tokens"],
        "w_max": model["weighting"]["init_args"]["w_max"],
        "optimizer": model["optimizer"]["init_args"] | {"fused": True},
        "lr_scheduler": model["lr_scheduler"]["init_args"],
        "seed": seed,
        "batches": batches,
        "folder": str(folder),
        "every": EVERY,
        "config": config,
    }


ROLES = ("student", "teacher")


def one_run(name: str, *, seed: int, batches: int, prompts: Path, trl_python: str | None, judge: Judge) -> dict[str, Any]:
    """One setting with one seed: its marks with accuracies."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if name in TRL:
            asked = asked_of_trl(TRL[name], seed=seed, batches=batches, prompts=prompts, folder=folder)
        else:
            line = words(OURS[name], seed=seed, batches=batches, folder=folder)
            asked = {"words": line, "folder": str(folder), "every": EVERY}
        result = run("trl" if name in TRL else "ours", [json.dumps(asked)], trl_python, HERE)
        judge.judge(result, folder)
    return {"setting": name, "seed": seed, **result}


def require_same(runs: Iterable[dict[str, Any]]) -> None:
    """All runs of a seed met the same prompts, as token ids and in one order, and end a response at the same ids.

    Raises:
        RuntimeError: two of them differ.
    """
    first, *others = runs
    for other in others:
        pairs = zip(distinct(first["rows"]), distinct(other["rows"]), strict=False)
        same = first["first_prompt"] == other["first_prompt"] and all(one == two for one, two in pairs)
        if not same or first["stop_ids"] != other["stop_ids"]:
            raise RuntimeError(f"{first['setting']} and {other['setting']} differ in prompts or stop ids: "
                               f"{first['first_prompt']} {first['stop_ids']}, {other['first_prompt']} {other['stop_ids']}")  # fmt: skip


def distinct(rows: Iterable[int]) -> list[int]:
    """Without the repetitions of several samples a prompt."""
    return [row for row, _ in groupby(rows)]


def measure(names: list[str], *, seeds: list[int], rounds: int, batches: int, trl_python: str | None) -> dict[str, Any]:
    """All runs, the settings taking turns within a seed, with the accuracy they start from."""
    judge = Judge()
    start, runs = judge.accuracy(), []
    with tempfile.TemporaryDirectory() as place:
        for turn in range(rounds):
            for seed in seeds:
                prompts = Path(place) / f"prompts-{seed}.jsonl"
                write_prompts(prompts, seed=seed, batches=batches)
                found = []
                for name in names:
                    found.append(one_run(name, seed=seed, batches=batches, prompts=prompts, trl_python=trl_python, judge=judge))
                    when = crossings(found[-1]["marks"], start)
                    print(f"round {turn + 1} seed {seed} {name}: {shown(when['cpu'])} s, {shown(when['steps'])} steps", flush=True)
                require_same(found)
                runs += [{key: value for key, value in one.items() if key != "rows"} for one in found]
    return {"start": start, "runs": runs}


def page(text: str, body: str) -> str:
    """A page with another part between its markers."""
    before, rest = text.split(START)
    return before + START + "\n" + body + END + rest.split(END)[1]


def main(arguments: list[str] | None = None) -> None:
    """Run and print; with --out write JSON and the page's part between its markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=[*OURS, *TRL], default=None, help="default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batches", type=int, default=40, help="rollout batches a run")
    parser.add_argument("--out", type=Path, default=None, help="folder with benchmarks.md")
    parser.add_argument("--trl-python", help="Python of an environment with TRL; without it only this project runs")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1 or asked.batches < EVERY:
        parser.error(f"--rounds must be >= 1 and --batches >= {EVERY}, got {asked.rounds} and {asked.batches}")
    names = asked.settings or [*OURS, *(TRL if asked.trl_python else [])]
    if set(names) & set(TRL) and not (asked.trl_python and Path(asked.trl_python).exists()):
        parser.error(f"--trl-python must be a Python with TRL, got {asked.trl_python}; `make time-to-accuracy` installs one")
    torch.set_num_threads(1)
    found = measure(names, seeds=asked.seeds, rounds=asked.rounds, batches=asked.batches, trl_python=asked.trl_python)
    summaries = {
        name: summary([one for one in found["runs"] if one["setting"] == name], found["start"]) for name in names
    }
    about = facts(asked.trl_python)
    body = table(summaries, list(TRL))
    print(body)
    if asked.out is not None:
        (asked.out / "benchmarks").mkdir(exist_ok=True)
        saved = {"about": about, "settings": OURS | TRL, "summaries": summaries, **found}
        (asked.out / "benchmarks" / "time_to_accuracy.json").write_text(json.dumps(saved, indent=1) + "\n")
        place = asked.out / "benchmarks.md"
        place.write_text(page(place.read_text(), f"{json.dumps(about)}\n\n{body}"))


if __name__ == "__main__":
    main()
