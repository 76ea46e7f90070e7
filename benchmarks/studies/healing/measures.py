"""What a student is measured by, problem by problem: divergence, likelihood of the teacher's answers, right answers, samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.healed_run import distinct_2, texts
from benchmarks.studies.healing.problems import is_right
from benchmarks.studies.policies import load_policy, sample
from lit_opd.evaluation.statistics import PositionBands
from lit_opd.models.loading import load_tokenizer
from lit_opd.models.vocabulary import configured_stops
from lit_opd.rollout import DecodeSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.types import PromptBatch, Provenance, Rollout

SAMPLING_SEED = 1234  # not a run's: all students answer from the same streams
BANDS = 10
DIGITS = 6  # that records keep
# By problem, in a record's order
MEASURES = {
    "reverse_kl": "held-out reverse KL, nats/token",
    "teacher_text_nll": "NLL of teacher-written answers, nats/token",
    "disagreement": "held-out disagreement, nats/token",
    "exact": "right answers, greedy",
}
BY_TENTH = ("reverse_kl", "disagreement")  # of them, those that are kept by tenth of the response, too
Figures = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """Held-out problems as a model is asked, and what its teacher wrote.

    Args:
        prompts: P rows.
        answers: P whole numbers.
        written: the teacher's responses at temperature 1.
        tokenizer: of both models.
        teacher: the frozen teacher.
        teacher_path: its folder.
        new_tokens: longest response.
    """

    prompts: PromptBatch
    answers: Sequence[int]
    written: Rollout
    tokenizer: Any
    teacher: ScoringModel
    teacher_path: str
    new_tokens: int


def row_means(values: Tensor, mask: Tensor) -> list[float]:
    """Mean over the valid tokens of each row, [B, T] -> B numbers."""
    means = (values.double() * mask).sum(-1) / mask.sum(-1)
    return [round(value, DIGITS) for value in means.tolist()]


def tenths(values: Tensor, mask: Tensor) -> list[list[float | None]]:
    """Means of each row by tenth of its valid tokens, [B, T] -> B lists of ``BANDS``; None where a tenth is empty."""
    found = []
    for row, valid in zip(values, mask, strict=True):
        bands = PositionBands(BANDS).to(mask.device)
        bands.update(row[None], valid[None])
        found.append(_rounded(bands.compute()))
    return found


def _rounded(means: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, DIGITS) for value in means.tolist()]


def how_long(rollout: Rollout, path: str, tokenizer: Any) -> Figures:
    """Tokens of each row, its end symbol among them, and 1 where it ended by itself, not at the longest length."""
    stops = configured_stops(path, tokenizer)
    rows = as_lists(rollout)
    return {"lengths": [len(row) for row in rows], "ended": [int(row[-1] in stops) for row in rows]}


def as_lists(rollout: Rollout) -> list[list[int]]:
    """Ids of the valid tokens of each row."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]


def from_lists(rows: Sequence[Sequence[int]], prompts: PromptBatch) -> Rollout:
    """Responses that were written before, to be scored."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros_like(mask, dtype=torch.int64)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    unknown = torch.zeros(mask.shape)
    ends = torch.zeros(len(rows), dtype=torch.int8)
    return Rollout(prompts, ids, mask, unknown, ends, Provenance("saved")).to(prompts.ids.device)


def asked(
    teacher_path: str,
    prompts: PromptBatch,
    answers: Sequence[int],
    *,
    new_tokens: int,
    device: str,
    written: Sequence[Sequence[int]] | None = None,
) -> Asked:
    """Load the teacher and let it write.

    Args:
        teacher_path: a Hugging Face folder.
        prompts: P rows.
        answers: P whole numbers.
        new_tokens: longest response.
        device: torch's name of it.
        written: ids of what it wrote before; None to write now.
    """
    tokenizer = load_tokenizer(teacher_path, "path")
    teacher, prompts = load_policy(teacher_path).to(device), prompts.to(device)
    if written is None:
        how: dict[str, Any] = {"new_tokens": new_tokens, "seed": SAMPLING_SEED, "sampler": DecodeSampler}
        rollout = sample(teacher, prompts, tokenizer, teacher_path, **how)
    else:
        rollout = from_lists(written, prompts)
    return Asked(prompts, answers, rollout, tokenizer, teacher, teacher_path, new_tokens)


def _answers(policy: ScoringModel, path: str, held: Asked, *, greedy: bool) -> Rollout:
    how: dict[str, Any] = {"new_tokens": held.new_tokens, "seed": SAMPLING_SEED, "sampler": DecodeSampler}
    how["greedy"] = greedy
    return sample(policy, held.prompts, held.tokenizer, path, **how)


def right_answers(policy: ScoringModel, path: str, held: Asked) -> tuple[list[float], list[str]]:
    """1 where the greedy response of a problem is right, and the responses."""
    greedy = _answers(policy, path, held, greedy=True)
    found = texts(greedy.response_ids, greedy.mask, held.tokenizer)
    return [float(is_right(text, answer)) for text, answer in zip(found, held.answers, strict=True)], found


@torch.no_grad()
def measure(path: str, held: Asked, *, shown: int) -> Figures:
    """Figures of the student in a folder.

    Args:
        path: the student's folder.
        held: what it is measured on.
        shown: how many problems' responses are kept as text.
    Returns:
        the lists of ``MEASURES``; of its samples ``lengths`` and ``ended``, ``tenths`` (of ``BY_TENTH``, problem by problem, None
        where a tenth is empty), ``bands`` (mean |q - s| by tenth of all responses), ``tokens``, ``distinct_2``; and ``samples``.
    """
    student = load_policy(path).to(held.prompts.ids.device)
    own = _answers(student, path, held, greedy=False)
    head = held.teacher.head(own)
    ours = student(own, wants=frozenset({"token_kl"}), against=head)
    gap = (held.teacher(own, head=head).logprobs - ours.logprobs).abs()
    bands = PositionBands(BANDS).to(own.mask.device)
    bands.update(gap, own.mask)
    exact, greedy = right_answers(student, path, held)
    sampled = texts(own.response_ids, own.mask, held.tokenizer)
    assert ours.token_kl is not None  # asked for
    return {
        "reverse_kl": row_means(ours.token_kl, own.mask),
        "teacher_text_nll": row_means(-student(held.written).logprobs, held.written.mask),
        "disagreement": row_means(gap, own.mask),
        "exact": exact,
        **how_long(own, path, held.tokenizer),
        "tenths": {name: tenths(values, own.mask) for name, values in zip(BY_TENTH, (ours.token_kl, gap), strict=True)},
        "bands": _rounded(bands.compute()),
        "tokens": int(own.mask.sum()),
        "distinct_2": round(distinct_2(own), DIGITS),
        "samples": [{"sampled": sampled[row], "greedy": greedy[row]} for row in range(min(shown, len(greedy)))],
    }


def measure_teacher(held: Asked, *, shown: int) -> Figures:
    """What the teacher itself reaches: right answers, the likelihood of its own answers, samples."""
    exact, greedy = right_answers(held.teacher, held.teacher_path, held)
    with torch.no_grad():
        own = row_means(-held.teacher(held.written).logprobs, held.written.mask)
    written = texts(held.written.response_ids, held.written.mask, held.tokenizer)
    return {
        "exact": exact,
        "teacher_text_nll": own,
        **how_long(held.written, held.teacher_path, held.tokenizer),
        "tokens": int(held.written.mask.sum()),
        "distinct_2": round(distinct_2(held.written), DIGITS),
        "samples": [{"sampled": written[row], "greedy": greedy[row]} for row in range(min(shown, len(greedy)))],
    }
