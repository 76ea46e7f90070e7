"""What looks wrong in a run, said in the terminal while it runs and once more at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_opd.evaluation.validation import decoder
from lit_opd.files import append_lines, as_lines, replace_or_refuse
from lit_opd.report.hints import Hints
from lit_opd.types import Rollout

LOOKED = 32  # responses that are read for an answer
BOX = "\\boxed"
FILE = "hints.jsonl"


class RunHints(Callback):
    """One line for each sign of ``lit_opd.report.hints``, once a run; a resumed run repeats none. All are in ``hints.jsonl``."""

    def __init__(self) -> None:
        self._hints = Hints()
        self._said: list[dict[str, Any]] = []  # step and hint
        self._rollout: Rollout | None = None  # of the last step
        self._answers = (0, 0)  # of the last step before a checkpoint that the run went on from
        self._texts: Callable[[Rollout], list[str]] = lambda rollout: []

    def state_dict(self) -> dict[str, Any]:
        """What was said, and what has lasted for how long."""
        return {**self._hints.state(), "said": list(self._said), "answers": list(self._looked())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self._hints, self._said = Hints(state_dict), list(state_dict["said"])
        looked, boxed = state_dict["answers"]
        self._answers = looked, boxed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Responses can be read from now on."""
        self._texts = decoder(pl_module.tokenizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The file holds what was said up to here, of a run that goes on too."""
        path = Path(trainer.default_root_dir) / FILE
        if trainer.is_global_zero and (self._said or path.is_file()):
            replace_or_refuse(path, as_lines(self._said))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the step's numbers; they are the same on every rank, lengths and texts are rank 0's."""
        if not trainer.is_global_zero:
            return
        self._rollout = outputs["step"].rollout
        lengths = self._rollout.layout.response.sum(-1)
        if len(lengths):
            numbers = _numbers(trainer, "train/")
            found = self._hints.after_step(numbers, shortest=int(lengths.min()), longest=int(lengths.max()))
            self._say(trainer, found)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what was validated."""
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        numbers = _numbers(trainer, "val/")
        looked, boxed = self._looked() if numbers.get("val/greedy_accuracy") == 0.0 else (0, 0)
        self._say(trainer, self._hints.after_validation(numbers, looked=looked, boxed=boxed))

    def _looked(self) -> tuple[int, int]:
        """A few responses of the last step, and how many of them have an answer in a box."""
        if self._rollout is None:
            return self._answers
        texts = self._texts(self._rollout.take(list(range(min(LOOKED, len(self._rollout))))))
        return len(texts), sum(BOX in text for text in texts)

    def _say(self, trainer: Trainer, lines: list[str]) -> None:
        found = [{"step": trainer.global_step, "hint": line} for line in lines]
        self._said += found
        for line in lines:
            rank_zero_info(f"hint: {line}")
        if found:
            append_lines(Path(trainer.default_root_dir) / FILE, found)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once more, where the end of a long log is read first."""
        for said in self._said:
            rank_zero_info(f"hint: {said['hint']}")


def _numbers(trainer: Trainer, prefix: str) -> dict[str, float]:
    """What was logged under a prefix."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
