"""What a run did, in one file and one short table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lit_opd.callbacks.report import RunReport

from lit_opd.distributed import shared_failure
from lit_opd.evaluation.validation import SUMMARISED
from lit_opd.files import replace_whole
from lit_opd.run.lightning import callbacks_of
from lit_opd.shipped import program

FILE = "summary.json"


class Summary(Callback):
    """``summary.json`` in the run folder, and the table at the end. Counts go on over a resumed run.

    The file says that the run is finished: where one goes on to make further steps, or makes steps again, that of its former end
    becomes ``summary.json.previous`` before the first of them.
    """

    def __init__(self) -> None:
        self._start: dict[str, float | None] = {}
        self._end: dict[str, float | None] = {}
        self._tokens = 0
        self._seconds = 0.0
        self._clock = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        measured = {"start": dict(self._start), "end": dict(self._end)}
        return measured | {"tokens": self._tokens, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._start, self._tokens = dict(state_dict["start"]), state_dict["tokens"]
        self._end, self._seconds = dict(state_dict.get("end", {})), state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + (time.perf_counter() - self._clock if self._clock else 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the run is no finished one; a finished one that has no step left to make does not come here."""
        with shared_failure():
            if trainer.is_global_zero:
                _set_aside(Path(trainer.default_root_dir) / FILE, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the fit's first measurement as the start and the newest as the end; Lightning's sanity check is none."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        found = {name: trainer.callback_metrics.get(key) for name, key in SUMMARISED.items()}
        values = {name: None if value is None else float(value) for name, value in found.items()}
        if getattr(getattr(pl_module, "validation", None), "samples", 4) != 4:
            values["avg_at_4"] = None
        self._end = values
        if not self._start:
            self._start = dict(values)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the sampled tokens of all ranks."""
        self._tokens += int(trainer.callback_metrics["train/tokens"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file and show the table: after ``on_train_end``, whose validation is the run's end."""
        if stage != "fit" or trainer.interrupted or not trainer.is_global_zero or trainer.global_step == 0:
            return
        summary = self.values(trainer, pl_module)
        folder = Path(trainer.default_root_dir)
        replace_whole(folder / FILE, (json.dumps(summary, indent=2) + "\n").encode())
        paged = any(isinstance(other, RunReport) for other in callbacks_of(trainer))
        rank_zero_info(table(summary, folder, paged=paged))

    def values(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The content of ``summary.json``, see docs/metrics.md: KL in nats a token, accuracies in [0, 1], wall seconds."""
        trained = getattr(getattr(pl_module, "state", None), "trained", None)
        measured = {
            f"{name}_{when}": values.get(name)
            for name in SUMMARISED
            for when, values in (("start", self._start), ("end", self._end))
        }
        return measured | {
            "steps": trainer.global_step,
            "tokens": self._tokens,
            "seconds": round(self._elapsed(), 3),
            "seed": getattr(pl_module, "seed", None),
            "strategy": type(getattr(pl_module, "weighting", None)).__name__,
            "trained": trained.summary(trainer.global_step) if trained is not None else [],
        }


def _set_aside(path: Path, step: int) -> None:
    if path.is_file():
        path.replace(path.with_name(f"{path.name}.previous"))
        rank_zero_info(f"the run goes on from step {step}: {path.name} of its former end is {path.name}.previous now")


def table(summary: dict[str, Any], folder: Path, *, paged: bool) -> str:
    """Start against end, where the files are, ``paged`` with the page, and what to do next."""
    other = "ImportanceWeighting" if summary["strategy"] == "Uniform" else "Uniform"
    labels = {"greedy": "greedy accuracy", "avg_at_4": "avg@4", "reverse_kl": "reverse KL (nats/token)"}
    rows = [f"{'':26}{'start':>9}{'end':>9}"]
    for name, label in labels.items():
        start, end = summary[f"{name}_start"], summary[f"{name}_end"]
        if end is not None:
            rows.append(f"{label:26}{'-' if start is None else f'{start:.3f}':>9}{end:>9.3f}")
    rows += [
        f"{spans(summary)}, {summary['tokens']:,} sampled tokens, {summary['seconds']:.0f} s",
        f"run folder: {folder} (summary.json, metrics.csv, checkpoints/, student/)",
        *([f"on one page: {folder}/report.html"] if paged else []),
        f"next: {program()} fit --config {folder}/config.yaml --model.weighting {other} --run_dir {folder}-{other.lower()}",
    ]
    return "\n".join(["", *rows])


def spans(summary: dict[str, Any]) -> str:
    """The strategy and its steps; every span of a run that went on with other settings."""
    parts = summary["trained"]
    if len(parts) < 2:
        return f"{summary['strategy']}, {summary['steps']} steps"
    first = f"steps {parts[0]['steps'][0]}-{parts[0]['steps'][1]} {parts[0]['strategy']}"
    later = [f"{p['steps'][0]}-{p['steps'][1]} {p['strategy']} (changed: {', '.join(p['changed'])})" for p in parts[1:]]
    return "; ".join([first, *later])
