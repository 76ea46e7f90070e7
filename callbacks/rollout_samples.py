"""What the student writes, with what the teacher thinks of it; and whole rollout batches for replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_opd.errors import InputError
from lit_opd.evaluation.grading import quick_outcome
from lit_opd.files import append_lines, drop_lines_after
from lit_opd.report.replay import save_record
from lit_opd.report.tokens_page import token_texts, turns_of
from lit_opd.run.tracking import crossed, log_media, wandb_runs
from lit_opd.types import FinishReason, Rollout, StepRecord

FILE = "samples.jsonl"
FOLDER = "rollouts"
TENTHS = 10
DIGITS = 4  # decimals of a token's numbers


class RolloutSamples(Callback):
    """A few responses of the first batch and of every N steps after: ``samples.jsonl`` and a W&B table ``samples``.

    Args:
        every: optimizer steps between samples.
        count: rows shown, the first ones of rank 0's batch (prompts come shuffled, so they are a fair sample).
        tokens: of each response, the first ones, whose own numbers are written too (some 40 bytes a token); 0 for none.
        save_rollouts_every: optimizer steps between whole batches saved as ``rollouts/step-N.safetensors`` (further ranks
            add ``-rank-R``), read back by ``lit_opd.report.replay.load_rollout``; None for none.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self, every: int = 10, count: int = 4, save_rollouts_every: int | None = None, tokens: int = 1024
    ) -> None:
        self.every, self.count, self.save_rollouts_every = every, count, save_rollouts_every
        self.tokens = tokens
        if tokens < 0:
            raise InputError(f"`RolloutSamples.tokens` must be >= 0, got {tokens}")
        for name in ("every", "count", "save_rollouts_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`RolloutSamples.{name}` must be >= 1, got {value}")
        self._last = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the lines of steps that the run will make again."""
        self._last = trainer.global_step
        if trainer.is_global_zero:
            drop_lines_after(Path(trainer.default_root_dir) / FILE, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write on schedule; the rows of a skipped step are in ``faults/``."""
        record: StepRecord = outputs["step"]
        if record.skipped:
            return
        last, self._last = self._last, record.step
        if trainer.is_global_zero and (last == 0 or crossed(record.step, last, self.every)):
            self._write_samples(trainer, pl_module.tokenizer, record)
        if self.save_rollouts_every and crossed(record.step, last, self.save_rollouts_every):
            suffix = "" if trainer.is_global_zero else f"-rank-{trainer.global_rank}"
            path = Path(trainer.default_root_dir) / FOLDER / f"step-{record.step}{suffix}.safetensors"
            save_record(record, path, rank=str(trainer.global_rank), world_size=str(trainer.world_size))

    def _write_samples(self, trainer: Trainer, tokenizer: Any, record: StepRecord) -> None:
        samples = sample_rows(record, tokenizer, self.count, tokens=self.tokens)
        append_lines(Path(trainer.default_root_dir) / FILE, samples)
        if wandb_runs(trainer):
            log_media(trainer, {"samples": wandb_table(samples)}, record.step)


def sample_rows(record: StepRecord, tokenizer: Any, count: int, *, tokens: int = 0) -> list[dict[str, Any]]:
    """The first ``count`` rows as lines of ``samples.jsonl``; one transfer of those rows only.

    Args:
        record: of a step.
        tokenizer: of the student.
        count: rows.
        tokens: of each response, that are written one by one.
    Returns:
        a line a row; log-probs, KL and disagreement in nats, length in tokens.
    """
    rows = torch.arange(min(count, len(record.rollout)))
    rollout, signal = record.rollout.rows(rows).to("cpu"), record.signal.rows(rows).to("cpu")
    weights = record.weights[: len(rows)].cpu()
    prompts = rollout.prompts
    found = []
    for row in rows.tolist():
        mask = rollout.mask[row]
        ids = rollout.response_ids[row][mask]
        answer = None if prompts.answers is None else prompts.answers[row]
        scored = signal.mask[row]  # fewer where the teacher has another tokenizer
        ratio, weight = signal.log_ratio[row][scored], weights[row][scored]
        found.append(
            {
                "step": record.step,
                "row_id": prompts.row_ids[row],
                "prompt": tokenizer.decode(prompts.ids[row][prompts.mask[row]], skip_special_tokens=False),
                "response": tokenizer.decode(rollout.response_ids[row][rollout.read[row]], skip_special_tokens=False),
                "answer": answer,
                "verdict": _verdict(tokenizer.decode(ids, skip_special_tokens=True), answer),
                "teacher": None if prompts.teachers is None else prompts.teachers[row],
                "length": int(mask.sum()),
                "finish_reason": FinishReason(int(rollout.finish_reason[row])).name.lower(),
                "reverse_kl_k1": _mean(-ratio) if rollout.sampled_now[row] else None,
                "disagreement": _mean(ratio.abs()),
                "weight_mean": _mean(weight),
                "disagreement_by_tenth": _tenths(ratio.abs()),
                "weight_by_tenth": _tenths(weight),
            }
        )
        if tokens:
            shown = [
                column[row][mask][:tokens] for column in (signal.student_logprobs, signal.teacher_logprobs, weights)
            ]
            found[-1]["tokens"] = _tokens(tokenizer, ids[:tokens], *shown) | _turns(tokenizer, rollout, row, tokens)
    return found


def _verdict(response: str, answer: str | None) -> str | None:
    """Right, wrong or without an answer, as far as text and numbers say it; None where they do not, or nothing is known."""
    outcome = None if answer is None else quick_outcome(response, answer)
    return None if outcome is None else str(outcome)


def _tokens(tokenizer: Any, ids: torch.Tensor, *columns: torch.Tensor) -> dict[str, list[Any]]:
    """Text and numbers of each token, a list a quantity."""
    names = ("student_logprob", "teacher_logprob", "weight")
    numbers = {
        name: [round(value, DIGITS) for value in column.tolist()] for name, column in zip(names, columns, strict=True)
    }
    return {"text": token_texts(tokenizer, ids.tolist()), **numbers}


def _turns(tokenizer: Any, rollout: Rollout, row: int, count: int) -> dict[str, list[Any]]:
    """Of a conversation the turn of each token from 0, and what was heard before it; nothing where a response is one turn."""
    if rollout.turn is None:
        return {}
    told = turns_of(rollout, row, tokenizer)[:count]
    return {"turn": [turn for turn, _, _ in told], "heard": [heard or "" for _, _, heard in told]}


def _mean(values: torch.Tensor) -> float | None:
    """None for a row without tokens."""
    return float(values.double().mean()) if len(values) else None


def _tenths(values: torch.Tensor) -> list[float | None]:
    """Means over the tenths of the response, by (position - 1/2) / length; None where a short response has no token."""
    place = (2 * torch.arange(len(values)) + 1) * TENTHS // (2 * max(len(values), 1))
    return [_mean(values[place == tenth]) for tenth in range(TENTHS)]


def wandb_table(samples: Sequence[dict[str, Any]]) -> Any:
    """The samples without their lists and tokens."""
    import wandb

    columns: list[Any] = [name for name, value in samples[0].items() if not isinstance(value, list | dict)]
    return wandb.Table(columns=columns, data=[[sample[name] for name in columns] for sample in samples])
