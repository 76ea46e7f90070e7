"""What the runs of ``metric_runs`` should log, computed slowly: each row scored alone and without padding, then plain loops.

From the package come only the scripted responses; the models are transformers', the updates a script. ``STEP``, ``WITH_BUDGET``,
``VALIDATION`` and ``PROFILE`` say name by name what docs/metrics.md means, in terms of tokens and rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_opd.types import Rollout
from tests.helpers import metric_runs as runs
from tests.helpers.metric_runs import CUT, DRIFT, SHORT, SLOTS, STOP, Case

NAN = float("nan")


@dataclass
class Token:
    """A sampled token; log-probs in nats.

    Args:
        row: of the batch.
        i: position, from 1.
        n: tokens of its response.
        s: the student's log-prob before the batch's first update.
        q: the teacher's.
        b: the sampler's.
        student_entropy: over the vocabulary.
        teacher_entropy: likewise.
        kl: KL(student || teacher) over the vocabulary.
        finished: the response ended by itself.
        drift: sum of |q - s| over the tokens before.
        weight: 0 where dropped.
        kept: in the denominator.
        clipped: in the last pass.
    """

    row: int
    i: int
    n: int
    s: float
    q: float
    b: float
    student_entropy: float
    teacher_entropy: float
    kl: float
    finished: bool
    drift: float = 0.0
    weight: float = 0.0
    kept: bool = True
    clipped: bool = False

    @property
    def gap(self) -> float:
        """|q - s|."""
        return abs(self.q - self.s)

    @property
    def advantage(self) -> float:
        """What the loss reads."""
        return min(max(self.q - self.s, -runs.A_CLIP), runs.A_CLIP)

    @property
    def importance(self) -> float:
        """Of the sampler against the student, capped."""
        return min(math.exp(self.s - self.b), runs.CAP)


@dataclass
class Step:
    """One rollout batch.

    Args:
        number: optimizer steps made when it ended.
        tokens: that were trained on, row by row.
        rows: all that were sampled: tokens, how it ended, tokens cut off again.
        losses: reported, of each update.
        grad_norm: at the last update, before clipping.
        learning_rate: of the step to come.
        budget: tokens a response might have, None without one.
        skipped: not made.
        skipped_steps: so far.
    """

    number: int
    tokens: list[Token]
    rows: list[tuple[int, int, int]]
    losses: list[float]
    grad_norm: float
    learning_rate: float
    budget: int | None
    skipped: bool
    skipped_steps: int


@dataclass
class Answer:
    """A response of a validation.

    Args:
        draw: number of the sample; ``GREEDY`` for the greedy one.
        right: None where the question has no answer.
        finished: ended by itself.
        tokens: scored ones, of sample 0; else as many empty places.
    """

    draw: int
    right: bool | None
    finished: bool
    tokens: Sequence[Token | None]


@dataclass
class Truth:
    """Everything that a run should log.

    Args:
        steps: batches in order.
        validations: the first and the last, by optimizer step.
    """

    steps: list[Step] = field(default_factory=list)
    validations: dict[int, list[Answer]] = field(default_factory=dict)


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return math.fsum(values) / len(values) if values else NAN


# -- name by name ------------------------------------------------------------------------------------------------------


def kept(step: Step) -> list[Token]:
    """Tokens in the denominator."""
    return [token for token in step.tokens if token.kept]


def ended(reason: int) -> Callable[[Step], float]:
    """The share of the sampled rows that ended so."""
    return lambda step: mean([row[1] == int(reason) for row in step.rows])


def effective_share(step: Step) -> float:
    """(sum w)^2 / (n sum w^2)."""
    weights = [token.weight for token in kept(step)]
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))


def share_clipped(tokens: list[Token]) -> float:
    """Of the tokens that have a gradient to cut."""
    return mean([token.clipped for token in tokens if token.weight > 0])


def saved(step: Step) -> float:
    """Tokens from those sampled to the limit, of rows that a budget or the stop cut."""
    return sum(SLOTS - length - cut for length, reason, cut in step.rows if reason in (int(SHORT), int(DRIFT)))


BY_TRAINING: dict[str, Callable[[Step], float]] = {  # NaN where the step was skipped
    "train/loss": lambda step: mean(step.losses),
    "train/reverse_kl_k1": lambda step: mean([token.s - token.q for token in step.tokens]),
    "train/disagreement": lambda step: mean([token.gap for token in step.tokens]),
    "train/student_nll": lambda step: mean([-token.s for token in step.tokens]),
    "train/sampler_gap": lambda step: mean([abs(token.s - token.b) for token in step.tokens]),
    "train/weight_mean": lambda step: mean([token.weight for token in kept(step)]),
    "train/weight_ess": effective_share,
    "train/clip_fraction": lambda step: share_clipped(step.tokens),
    "train/grad_norm": lambda step: step.grad_norm,
}
STEP: dict[str, Callable[[Step], float]] = {
    name: lambda step, value=value: NAN if step.skipped else value(step)  # type: ignore[misc]
    for name, value in BY_TRAINING.items()
} | {
    "train/skipped_steps": lambda step: step.skipped_steps,
    "train/learning_rate": lambda step: step.learning_rate,
    "train/tokens": lambda step: sum(length + cut for length, _, cut in step.rows),
    "train/response_length": lambda step: mean([length for length, _, _ in step.rows]),
    "train/truncated_fraction": ended(CUT),
    "train/budget_fraction": ended(SHORT),
    "train/stopped_fraction": ended(DRIFT),
}
WITH_BUDGET: dict[str, Callable[[Step], float]] = {
    "train/length_budget": lambda step: step.budget or NAN,
    "train/tokens_saved_at_most": saved,
    "train/weights_behind": lambda step: step.number // runs.UPDATES - 1,  # the k-th batch is scripted as k steps old
}


def first_sample(answers: list[Answer]) -> list[Token]:
    """The tokens that student and teacher are compared on."""
    return [token for answer in answers if answer.draw == 0 for token in answer.tokens if token is not None]


def sampled(answers: list[Answer]) -> list[Answer]:
    """All responses but the greedy ones."""
    return [answer for answer in answers if answer.draw != runs.GREEDY]


def correct(answers: list[Answer]) -> float:
    """The share of right ones where there is an answer."""
    return mean([answer.right for answer in answers if answer.right is not None])


def band(tenth: int) -> Callable[[list[Answer]], float]:
    """Disagreement where the middle of the token, (i - 1/2) / n, is in this tenth; in whole numbers."""
    return lambda answers: mean(
        [token.gap for token in first_sample(answers) if (2 * token.i - 1) * 10 // (2 * token.n) == tenth]
    )


VALIDATION: dict[str, Callable[[list[Answer]], float]] = {
    "val/greedy_accuracy": lambda answers: correct([answer for answer in answers if answer.draw == runs.GREEDY]),
    "val/avg_at_k": lambda answers: correct(sampled(answers)),
    "val/reverse_kl": lambda answers: mean([token.kl for token in first_sample(answers)]),
    "val/disagreement": lambda answers: mean([token.gap for token in first_sample(answers)]),
    "val/truncated_fraction": lambda answers: mean([not answer.finished for answer in sampled(answers)]),
    "val/response_length": lambda answers: mean([len(answer.tokens) for answer in sampled(answers)]),
} | {f"val/disagreement/band_{tenth}0": band(tenth) for tenth in range(10)}

QUANTITIES: dict[str, Callable[[Token], float]] = {
    "advantage": lambda token: token.advantage,
    "disagreement": lambda token: token.gap,
    "drift": lambda token: token.drift,
    "kl_k1": lambda token: token.s - token.q,
    "kl_k3": lambda token: math.exp(token.q - token.s) - 1 - (token.q - token.s),
    "weight": lambda token: token.weight,
    "kept_fraction": lambda token: token.kept,
    "gradient_size": lambda token: abs(token.weight * token.advantage),
    "truncated_fraction": lambda token: not token.finished,
}
ENTROPIES: dict[str, Callable[[Token], float]] = {
    "student_entropy": lambda token: token.student_entropy,
    "teacher_entropy": lambda token: token.teacher_entropy,
}
BANDS: dict[str, Callable[[Token], bool]] = {  # ceil(n / 10), ceil(3 n / 10) in whole numbers
    "first_10": lambda token: token.i <= -(-token.n // 10),
    "first_30": lambda token: token.i <= -(-3 * token.n // 10),
    "last_30": lambda token: token.i > token.n - -(-3 * token.n // 10),
}


def share_of_gradient(tokens: list[Token], inside: list[Token]) -> float:
    """The part of the sum of |w A|."""
    size = QUANTITIES["gradient_size"]
    return math.fsum(map(size, inside)) / math.fsum(map(size, tokens))


def gradient_scale(tokens: list[Token]) -> float:
    """sqrt(sum (w A)^2 / sum A^2) over the kept tokens."""
    counted = [token for token in tokens if token.kept]
    squares = [math.fsum((w(t) * t.advantage) ** 2 for t in counted) for w in (lambda t: t.weight, lambda t: 1.0)]
    return math.sqrt(squares[0] / squares[1])


PROFILE: dict[str, Callable[[list[Token]], float]] = {
    f"profile/{name}/{what}": lambda tokens, place=place, value=value: mean([value(t) for t in tokens if place(t)])
    for name, place in BANDS.items()
    for what, value in (QUANTITIES | ENTROPIES).items()
}  # type: ignore[misc]
PROFILE |= {
    f"profile/{name}/gradient_share": lambda tokens, place=place: share_of_gradient(tokens, list(filter(place, tokens)))
    for name, place in BANDS.items()
}  # type: ignore[misc]
PROFILE |= {
    f"profile/{name}/clip_fraction": lambda tokens, place=place: share_clipped(list(filter(place, tokens)))
    for name, place in BANDS.items()
}  # type: ignore[misc]
PROFILE["train/gradient_scale_proxy"] = gradient_scale


# -- scores ------------------------------------------------------------------------------------------------------------


def distribution(model: torch.nn.Module, rollout: Rollout, row: int) -> Tensor:
    """Log-probs [n, V] at each place of a response: the logits of a slot are those of the next token, and rows of the embedding
    that name no token of the tokenizer have no mass."""
    prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()
    response = rollout.response_ids[row][rollout.mask[row]].tolist()
    logits = model(torch.tensor([prompt + response])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1, : len(runs.tokenizer())] / runs.TEMPERATURE, -1)


def chosen(table: Tensor, rollout: Rollout, row: int) -> list[Tensor]:
    """The log-probs of a response's tokens, a scalar each."""
    return [table[place, token] for place, token in enumerate(rollout.response_ids[row][rollout.mask[row]].tolist())]


class Slow:
    """A run, computed slowly.

    Args:
        folders: of student and teacher.
        case: what is run.
        ranks: on how many processes, which cut the batch into mini-batches each for itself.
    """

    def __init__(self, folders: tuple[str, str], case: Case, *, ranks: int) -> None:
        self.student, self.teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders
        )
        self.case, self.ranks = case, ranks
        self.made = self.skipped = 0  # optimizer steps

    def truth(self) -> Truth:
        """Train, and validate before and behind it."""
        found = Truth()
        found.validations[0] = self.validation()
        for place, rollout in enumerate(self.case.rollouts):
            found.steps.append(self.batch(rollout, skip=place == self.case.bad))
        found.validations[self.made] = self.validation()
        return found

    @torch.no_grad()
    def tokens(self, rollout: Rollout, row: int) -> list[Token]:
        """Of one response, without weights."""
        ours, theirs = (distribution(model, rollout, row) for model in (self.student, self.teacher))
        logprobs = [[float(value) for value in chosen(table, rollout, row)] for table in (ours, theirs)]
        sampler = rollout.sampler_logprobs[row][rollout.mask[row]].tolist()
        found, drift = [], 0.0
        for i, (p, q, s, t, b) in enumerate(zip(ours.tolist(), theirs.tolist(), *logprobs, sampler, strict=True), 1):
            token = Token(
                row=row, i=i, n=len(sampler), s=s, q=t, b=b,
                student_entropy=-math.fsum(math.exp(a) * a for a in p),
                teacher_entropy=-math.fsum(math.exp(a) * a for a in q),
                kl=math.fsum(math.exp(a) * (a - c) for a, c in zip(p, q, strict=True)),
                finished=int(rollout.finish_reason[row]) == int(STOP), drift=drift,
            )  # fmt: skip
            drift += token.gap
            found.append(token)
        return found

    # -- training ------------------------------------------------------------------------------------------------------

    def batch(self, rollout: Rollout, *, skip: bool) -> Step:
        """All updates of one batch."""
        sampled_rows = list(
            zip(*(v.tolist() for v in (rollout.lengths, rollout.finish_reason, rollout.drawn)), strict=True)
        )
        ranks = [[row for row in rows if self.stays(rollout, row)] for rows in runs.RANK_ROWS[self.ranks]]
        rows = {row: self.tokens(rollout, row) for part in ranks for row in part}
        for tokens in rows.values():
            self.weigh(tokens)
        losses, norm, progress = [], NAN, self.made / (self.case.steps - 1)
        for chunk in self.chunks(ranks):
            if not skip:
                loss, norm = self.update(rollout, {row: rows[row] for row in chunk})
                losses.append(loss)
            self.made, self.skipped = self.made + 1, self.skipped + skip
        budget = round(runs.BUDGET.start + (runs.BUDGET.end - runs.BUDGET.start) * progress)
        return Step(
            number=self.made,
            tokens=[token for row in sorted(rows) for token in rows[row]],
            rows=[(length, reason, drawn - length) for length, reason, drawn in sampled_rows],
            losses=losses,
            grad_norm=norm,
            learning_rate=runs.RATE * runs.DECAY**self.made,
            budget=budget if self.case.budgeted else None,
            skipped=skip,
            skipped_steps=self.skipped,
        )

    def stays(self, rollout: Rollout, row: int) -> bool:
        """Rows that reached the limit are dropped before they are scored, where the case says so."""
        return self.case.settings["truncated"] == "keep" or int(rollout.finish_reason[row]) != int(CUT)

    def chunks(self, ranks: list[list[int]]) -> list[list[int]]:
        """The rows of each update: every rank cuts its own into parts, of which the first may be one longer."""
        parts = self.case.settings["mini_batches"]
        found: list[list[int]] = [[] for _ in range(parts)]
        for rows in ranks:
            sizes = [len(rows) // parts + (part < len(rows) % parts) for part in range(parts)]
            for part, size in enumerate(sizes):
                found[part] += rows[sum(sizes[:part]) :][:size]
        return found * self.case.settings["epochs"]

    def weigh(self, tokens: list[Token]) -> None:
        """Weights of a response."""
        total, behind = math.fsum(token.gap for token in tokens) + 1e-8, 0.0
        for token in tokens:
            if self.case.weighting == "uneven":
                token.kept = token.i % 3 != 0
                token.weight = (0.5 + 1 / token.i + min(token.gap, 1.0)) if token.kept else 0.0
            else:
                token.weight = 1 + 0.5 * min(max(1 - behind / total, 0.0), 1.0)
            behind += token.gap

    def update(self, rollout: Rollout, rows: dict[int, list[Token]]) -> tuple[float, float]:
        """One optimizer step; the reported loss and the gradient's norm."""
        loss: Tensor | float = 0.0
        for row, tokens in rows.items():
            now = chosen(distribution(self.student, rollout, row), rollout, row)
            for token, s in zip(tokens, now, strict=True):
                loss = loss - token.weight * token.importance * self.gain(token, s) / self.divisor(rows, tokens)
        self.student.zero_grad()
        assert isinstance(loss, Tensor)
        loss.backward()
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        rate = runs.RATE * runs.DECAY**self.made * min(1.0, runs.BOUND / (norm + 1e-6))
        with torch.no_grad():
            for parameter in self.student.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        return float(loss.detach()), norm

    def gain(self, token: Token, s: Tensor) -> Tensor | float:
        """What the loss is minus of, in cases; notes what was cut."""
        ratio, advantage = torch.exp(s - token.s), token.advantage
        token.clipped = True
        if advantage > 0 and ratio > 1 + runs.CLIP:
            return advantage * (1 + runs.CLIP)
        if advantage < 0 and ratio < 1 - runs.CLIP:
            return advantage * (1 - runs.CLIP)
        if advantage < 0 and ratio > runs.DUAL:
            return advantage * runs.DUAL
        token.clipped = False
        return advantage * ratio

    def divisor(self, rows: dict[int, list[Token]], tokens: list[Token]) -> int:
        """sequence-mean: the row's kept tokens times rows; constant: slots times rows."""
        if self.case.settings["aggregation"] == "constant":
            return SLOTS * len(rows)
        return sum(token.kept for token in tokens) * len(rows)

    # -- validation ----------------------------------------------------------------------------------------------------

    def validation(self) -> list[Answer]:
        """All responses that are drawn and counted, whichever rank drew them."""
        found = []
        for place, (first, second) in enumerate(runs.RANK_QUESTIONS):
            answered = any(runs.QUESTIONS[row][0] is not None for row in (*first, *second))
            draws = [runs.GREEDY] if answered else []
            if place < runs.BATCH_LIMIT:
                draws += range(self.case.samples if answered else 1)
            counted = [row for row in (*first, *second) if row not in runs.FILLERS]
            found += [self.answer(row, draw) for row in counted for draw in draws]
        return found

    def answer(self, row: int, draw: int) -> Answer:
        """Graded by the mark in front of its text."""
        end, verdict, *text = runs.QUESTIONS[row][1][draw + 1]
        length = max(len(text) + (end == "S"), 1)
        tokens = self.tokens(runs.evaluated(draw), row) if draw == 0 else [None] * length
        assert len(tokens) == length
        return Answer(draw=draw, right={"+": True, "-": False, ".": None}[verdict], finished=end == "S", tokens=tokens)
