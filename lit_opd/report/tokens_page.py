"""One self-contained HTML page of responses, each token shaded by its weight and underlined by its disagreement.

No script and nothing to load: the page is text, styles and check boxes, under a policy that lets a browser run nothing. How
it looks is in ``templates/tokens_page.html.j2``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from lit_opd.masked import turn_positions
from lit_opd.report import html
from lit_opd.types import FinishReason, Prediction, Rollout

DISAGREEMENT_QUANTILE = 0.95  # of the page's tokens; this much and more is underlined in full
DIGITS = 6  # of log-probs and weights in the file
_MOST_PENDING = 8  # tokens that may wait for the rest of a character


@dataclass(frozen=True)
class PredictedToken:
    """One sampled token.

    Args:
        id: in the vocabulary.
        text: what it adds to the response; empty while a character is incomplete.
        student_logprob: nats.
        teacher_logprob: nats.
        weight: what the run's strategy gives it, >= 0.
        turn: 0-based, of a conversation; None where a response is one turn.
        place: position in the turn, from 1.
        heard: what an environment answered right before it.
        scored: False where a teacher with another tokenizer has no score, which is 0 then; None else.
    """

    id: int
    text: str
    student_logprob: float
    teacher_logprob: float
    weight: float
    turn: int | None = None
    place: int | None = None
    heard: str | None = None
    scored: bool | None = None

    @property
    def disagreement(self) -> float:
        """|teacher - student|, nats."""
        return abs(self.teacher_logprob - self.student_logprob)


@dataclass(frozen=True)
class PredictedResponse:
    """One completion, a line of ``predictions.jsonl``.

    Args:
        row_id: of the prompt in the data.
        prompt: as rendered, special tokens included.
        response: its text without special tokens.
        reference: the right answer, None where the data has none.
        finish_reason: a ``FinishReason`` in small letters.
        tokens: the sampled ones, the end symbol included.
    """

    row_id: str
    prompt: str
    response: str
    reference: str | None
    finish_reason: str
    tokens: tuple[PredictedToken, ...]

    def to_json(self) -> dict[str, Any]:
        """A line of ``predictions.jsonl``; what a token has none of is left out."""
        line = asdict(self)
        line["tokens"] = [
            {name: value for name, value in token.items() if value is not None} for token in line["tokens"]
        ]
        return line

    @property
    def mean_weight(self) -> float:
        """Over the tokens that have a score; 0 without any."""
        return _mean([token.weight for token in _scored(self.tokens)])

    @property
    def mean_disagreement(self) -> float:
        """Nats, over the same tokens."""
        return _mean([token.disagreement for token in _scored(self.tokens)])


def _scored(tokens: Iterable[PredictedToken]) -> list[PredictedToken]:
    return [token for token in tokens if token.scored is not False]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# -- from tensors ------------------------------------------------------------------------------------------------------


def predicted_responses(prediction: Prediction, tokenizer: Any) -> list[PredictedResponse]:
    """The rows of a batch as text and numbers; rows that only fill the batch are left out."""
    rollout = prediction.rollout
    assert rollout.prompts.counted is not None and rollout.prompts.answers is not None
    rows = rollout.prompts.counted.nonzero().squeeze(-1).tolist()
    return [
        PredictedResponse(
            row_id=rollout.prompts.row_ids[row],
            prompt=_decode(tokenizer, rollout.prompts.ids[row][rollout.prompts.mask[row]].tolist()),
            response=tokenizer.decode(rollout.response_ids[row][rollout.mask[row]].tolist(), skip_special_tokens=True),
            reference=rollout.prompts.answers[row],
            finish_reason=FinishReason(int(rollout.finish_reason[row])).name.lower(),
            tokens=tuple(_tokens(prediction, row, tokenizer)),
        )
        for row in rows
    ]


def _tokens(prediction: Prediction, row: int, tokenizer: Any) -> Iterable[PredictedToken]:
    mask = prediction.rollout.mask[row]
    ids = prediction.rollout.response_ids[row][mask].tolist()
    columns = (prediction.signal.student_logprobs, prediction.signal.teacher_logprobs, prediction.weights)
    numbers = zip(*(column[row][mask].tolist() for column in columns), strict=True)
    told = turns_of(prediction.rollout, row, tokenizer)
    scored = [None if there else False for there in prediction.signal.mask[row][mask].tolist()]
    for token, text, values, where, has in zip(ids, token_texts(tokenizer, ids), numbers, told, scored, strict=True):
        student, teacher, weight = (round(value, DIGITS) for value in values)
        yield PredictedToken(token, text, student, teacher, weight, *where, scored=has)


def turns_of(rollout: Rollout, row: int, tokenizer: Any) -> list[tuple[int | None, int | None, str | None]]:
    """Of each sampled token its turn, its place in it, and what was heard right before; None where there is none of it."""
    count = int(rollout.mask[row].sum())
    if rollout.turn is None or rollout.observed is None:
        return [(None, None, None)] * count
    found: list[tuple[int | None, int | None, str | None]] = []
    heard: list[int] = []
    places = turn_positions(rollout.mask[row : row + 1], torch.where(rollout.mask, rollout.turn, 0)[row : row + 1])[0]
    columns = (rollout.response_ids[row], rollout.mask[row], rollout.observed[row], rollout.turn[row], places)
    for token, sampled, observed, turn, place in zip(*(column.tolist() for column in columns), strict=True):
        if observed:
            heard.append(token)
        elif sampled:
            found.append((turn, place, _decode(tokenizer, heard) if heard else None))
            heard = []
    return found


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character made of several tokens goes to the last of them."""
    texts: list[str] = []
    start = shown = 0  # ids[start:shown] is context, so that a leading space is not lost
    for end in range(1, len(ids) + 1):
        context, text = _decode(tokenizer, ids[start:shown]), _decode(tokenizer, ids[start:end])
        if text.endswith("\ufffd") and end - shown < _MOST_PENDING:
            texts.append("")
            continue
        texts.append(text[len(context) :])
        start, shown = shown, end
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


# -- the page ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """What the shades stand for on this page."""

    least: float
    most: float
    disagreement: float

    def weight(self, value: float) -> float:
        """In [0, 1]; the middle where all weights are equal."""
        return 0.5 if self.most <= self.least else max(0.0, (value - self.least) / (self.most - self.least))

    def line(self, value: float) -> float:
        """In [0, 1]."""
        return min(1.0, value / self.disagreement) if self.disagreement > 0 else 0.0


@dataclass(frozen=True)
class _Span:
    """A token as the page shows it.

    Args:
        text: never empty.
        heard: what an environment answered right before it.
        numbers: shown where one points at it.
        shade: its weight on the page's scale, in [0, 1].
        line: its disagreement on the page's scale, in [0, 1].
        faded: it has weight 0.
    """

    text: str
    heard: str
    numbers: str
    shade: str
    line: str
    faded: bool


def render(responses: Sequence[PredictedResponse], *, strategy: str, total: int | None = None) -> str:
    """The page.

    Args:
        responses: what to show.
        strategy: whose weights these are.
        total: responses there are, where the page shows only the first.
    """
    scale = _scale(responses)
    return html.render(
        "tokens_page.html.j2",
        responses=responses,
        spans=partial(_spans, scale),
        strategy=strategy,
        total=total,
        scale=scale,
    )


def _scale(responses: Sequence[PredictedResponse]) -> _Scale:
    tokens = _scored(token for response in responses for token in response.tokens)
    if not tokens:
        return _Scale(0.0, 0.0, 0.0)
    weights = [token.weight for token in tokens]
    disagreements = sorted(token.disagreement for token in tokens)
    upper = disagreements[min(len(tokens) - 1, int(DISAGREEMENT_QUANTILE * len(tokens)))]
    return _Scale(min(weights), max(weights), upper)


def _in_turn(token: PredictedToken) -> str:
    return "" if token.turn is None else f", {token.place} of turn {token.turn + 1}"


def _numbers(token: PredictedToken) -> str:
    if token.scored is False:
        return "no score: the teacher's tokens end elsewhere"
    return (
        f"weight {token.weight:.4f}\nstudent {token.student_logprob:.4f}\nteacher {token.teacher_logprob:.4f}\n"
        f"disagreement {token.disagreement:.4f} nats"
    )


def _spans(scale: _Scale, response: PredictedResponse) -> Iterator[_Span]:
    for place, token in enumerate(response.tokens, start=1):
        yield _Span(
            text=token.text.replace("\n", "\u21b5\n") or "\u00b7",
            heard=(token.heard or "").replace("\n", "\u21b5\n"),
            numbers=f"position {place}{_in_turn(token)}: {token.text!r} (id {token.id})\n{_numbers(token)}",
            shade=f"{scale.weight(token.weight):.3f}",
            line=f"{scale.line(token.disagreement):.3f}",
            faded=token.weight == 0,
        )
