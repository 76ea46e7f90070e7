"""What the module's validation measures: exact match, avg@k, divergence from the teacher."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_opd.distributed import largest, shared_failure
from lit_opd.errors import InputError
from lit_opd.evaluation.answering import Answering
from lit_opd.evaluation.grading import Grader, is_integer, math_verify_available
from lit_opd.evaluation.statistics import PositionBands, WeightedMean
from lit_opd.types import PromptBatch, Rollout, TokenSignal

VALIDATION_DOMAIN = 1  # sample j of validation draws from the streams of domain 1 + j; training uses 0
BANDS = 10
# what summary.json and comparisons call the measurements of a run
SUMMARISED = {"greedy": "val/greedy_accuracy", "avg_at_4": "val/avg_at_k", "reverse_kl": "val/reverse_kl"}


@dataclass
class ValidationSettings:
    """What ``validation_step`` measures.

    Args:
        greedy: exact match of greedy answers, where the data has answers.
        samples: samples a prompt for avg@k, where the data has answers; sample 0 also serves the divergence.
        divergence: full-vocabulary KL(student || teacher) and disagreement by position, on samples drawn as in training.
        max_new_tokens: response slots, default the sampler's.
        before_training: measure once before the first step.
        batch_limit: validation batches whose samples are drawn; greedy answers use all. None for all.
    Raises:
        InputError: a value outside its range.
    """

    greedy: bool = True
    samples: int = 4
    divergence: bool = True
    max_new_tokens: int | None = None
    before_training: bool = True
    batch_limit: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("max_new_tokens", 1), ("batch_limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"`ValidationSettings.{name}` must be >= {least}, got {value}")


class Evaluator(nn.Module):
    """Collects validation metrics over batches and ranks.

    Args:
        settings: what to measure.
    """

    def __init__(self, settings: ValidationSettings) -> None:
        super().__init__()
        self.settings = settings
        names = ("greedy_accuracy", "avg_at_k", "reverse_kl", "disagreement", "truncated_fraction", "response_length")
        self.means = nn.ModuleDict({name: WeightedMean() for name in names})
        self.bands = PositionBands(BANDS)
        self.grader = Grader(mathematics=math_verify_available())

    def _mean(self, name: str) -> WeightedMean:
        return cast(WeightedMean, self.means[name])

    def measure(self, student: Answering, prompts: PromptBatch, batch_idx: int, *, max_new_tokens: int) -> None:
        """Sample and grade one batch; called on every rank, which all make the same calls whatever their own rows hold.

        Args:
            student: samples and scores.
            prompts: B rows.
            batch_idx: number of the batch.
            max_new_tokens: response slots.
        Raises:
            InputError: a score is not finite, or an answer cannot be graded for want of a worker.
        """
        settings, decode = self.settings, decoder(student.tokenizer)
        answered = bool(largest(int(has_answers(prompts)), prompts.ids.device))
        if settings.greedy and answered:
            greedy = student.sampling_settings(greedy=True, max_new_tokens=max_new_tokens)
            self.add_answers("greedy_accuracy", student.generate(prompts, greedy), decode)
        if settings.batch_limit is not None and batch_idx >= settings.batch_limit:
            return
        samples = settings.samples if answered else 0
        drawn = max(samples, int(settings.divergence))
        for sample in range(drawn):
            stream = {"domain": VALIDATION_DOMAIN + sample, "step": 0}
            rollout = student.generate(prompts, student.sampling_settings(max_new_tokens=max_new_tokens, **stream))
            self.add_lengths(rollout)
            if samples > sample:
                self.add_answers("avg_at_k", rollout, decode)
            if sample == 0 and settings.divergence:
                self.add_divergence(student.student_signal(rollout), prompts.counted)  # type: ignore[arg-type]
            student.phase("evaluating", sample + 1, drawn)

    def add_answers(self, name: str, rollout: Rollout, decode: Callable[[Rollout], list[str]]) -> None:
        """Grade the responses of rows that have an answer and count; called on every rank.

        Args:
            name: "greedy_accuracy" or "avg_at_k".
            rollout: B rows.
            decode: response texts of a rollout.
        """
        answers, counted = rollout.prompts.answers, rollout.prompts.counted
        assert answers is not None and counted is not None
        rows = [row for row, answer in enumerate(answers) if answer is not None]
        texts, references = decode(rollout), [answer for answer in answers if answer is not None]
        self._say_how(references)
        graded = torch.zeros(len(answers), dtype=torch.float64)
        with shared_failure():
            grades = self.grader.grade([texts[row] for row in rows], references)
        graded[rows] = torch.tensor([float(grade.correct) for grade in grades], dtype=torch.float64)
        has_answer = torch.tensor([answer is not None for answer in answers], device=counted.device)
        self._mean(name).update(graded.to(counted.device), has_answer & counted)

    def _say_how(self, references: list[str]) -> None:
        if not self.grader.mathematics and not all(map(is_integer, references)):
            rank_zero_warn_once(
                "validation compares answers that are no integers as text; pip install 'lit-opd[eval]' for more"
            )

    def add_lengths(self, rollout: Rollout) -> None:
        """Count truncated rows and response tokens of sampled responses, [B, T]."""
        counted = rollout.prompts.counted
        assert counted is not None
        self._mean("truncated_fraction").update((~rollout.finished).double(), counted)
        self._mean("response_length").update(rollout.lengths.double(), counted)

    def add_divergence(self, signal: TokenSignal, counted: Tensor) -> None:
        """Full-vocabulary KL where known, and disagreement by position.

        Args:
            signal: [B, T] nats; ``token_kl`` may be None.
            counted: bool [B], False on rows that only fill a batch.
        """
        mask = signal.mask & counted.unsqueeze(-1)
        if signal.token_kl is not None:
            self._mean("reverse_kl").update(signal.token_kl, mask)
        self._mean("disagreement").update(signal.disagreement, mask)
        self.bands.update(signal.disagreement, mask)

    def compute(self) -> dict[str, float]:
        """Means over all rows and ranks since the last reset, by metric name (units: docs/metrics.md); what was not measured is
        left out. A collective."""
        with warnings.catch_warnings():  # every rank computes every metric, updated or not: computing is a collective
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            values = {f"val/{name}": float(metric.compute()) for name, metric in self.means.items()}  # type: ignore[operator]
            bands = self.bands.compute().tolist()
        for band, value in enumerate(bands):
            values[f"val/disagreement/band_{band * 100 // BANDS:02d}"] = value
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def reset(self) -> None:
        """Forget everything."""
        for metric in [*self.means.values(), self.bands]:
            metric.reset()  # type: ignore[operator]


@lru_cache
def rank_zero_warn_once(message: str) -> None:
    """Warn once a process."""
    rank_zero_warn(message)


def has_answers(prompts: PromptBatch) -> bool:
    """True when at least one row has a reference answer."""
    return any(answer is not None for answer in prompts.answers or ())


def decoder(tokenizer: Any) -> Callable[[Rollout], list[str]]:
    """A function from a rollout to its response texts, special tokens left out."""

    def decode(rollout: Rollout) -> list[str]:
        rows = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]
        return [str(text) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]

    return decode
