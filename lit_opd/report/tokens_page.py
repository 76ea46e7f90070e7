"""One self-contained HTML page of responses, each token shaded by its weight and underlined by its disagreement.

No script and nothing to load: the page is text, styles and check boxes, under a policy that lets a browser run nothing. All
text of models and data is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lit_opd.types import FinishReason, Prediction

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
    """

    id: int
    text: str
    student_logprob: float
    teacher_logprob: float
    weight: float

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
        finish_reason: stop, length, budget or drift.
        tokens: the sampled ones, the end symbol included.
    """

    row_id: str
    prompt: str
    response: str
    reference: str | None
    finish_reason: str
    tokens: tuple[PredictedToken, ...]


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
    for token, text, values in zip(ids, token_texts(tokenizer, ids), numbers, strict=True):
        yield PredictedToken(token, text, *(round(value, DIGITS) for value in values))


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

_STYLE = """
:root { color-scheme: light dark; --shade: 37 99 235; --line: 217 45 32; }
@media (prefers-color-scheme: dark) { :root { --shade: 96 150 255; --line: 255 120 90; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0 0 .4rem; }
section { border-top: 1px solid rgb(128 128 128 / .4); padding: 1rem 0; }
pre { font: .9rem/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.prompt, .facts { color: GrayText; } .prompt { line-height: 1.4; }
.t { border-radius: 2px; padding-bottom: 2px; }
#w:checked ~ main .t { background: rgb(var(--shade) / calc(var(--w) * .6 + .04)); }
#d:checked ~ main .t { border-bottom: 3px solid rgb(var(--line) / var(--d)); }
.t:hover { outline: 1px solid currentcolor; }
.control { color: GrayText; } .zero { opacity: .5; }
.scale { display: inline-block; width: 8rem; height: .7rem; vertical-align: middle; }
label { margin-right: 1.5rem; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class _Scale:
    """What the shades stand for on this page."""

    least: float
    most: float
    disagreement: float

    def weight(self, value: float) -> float:
        """In [0, 1]; the middle where all weights are equal."""
        return 0.5 if self.most <= self.least else (value - self.least) / (self.most - self.least)

    def line(self, value: float) -> float:
        """In [0, 1]."""
        return min(1.0, value / self.disagreement) if self.disagreement > 0 else 0.0


def render(responses: Sequence[PredictedResponse], *, strategy: str, total: int | None = None) -> str:
    """The page.

    Args:
        responses: what to show.
        strategy: whose weights these are.
        total: responses there are, where the page shows only the first.
    """
    scale = _scale(responses)
    shown = (
        f"{len(responses)} of {total} responses" if total and total > len(responses) else f"{len(responses)} responses"
    )
    body = "\n".join(_section(response, scale) for response in responses)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Predictions: token weights of {escape(strategy)}</title><style>{_STYLE}</style></head><body>
<h1>Token weights of {escape(strategy)}, {shown}</h1>
<input type="checkbox" id="w" checked><label for="w">shade: weight {_gradient("--shade")}
{scale.least:.3g} to {scale.most:.3g}</label>
<input type="checkbox" id="d" checked><label for="d">underline: disagreement |teacher - student| {_gradient("--line")}
0 to {scale.disagreement:.3g} nats and more</label>
<main><p class="facts">Point at a token for its numbers. Weight 0 is faded; \u21b5 is a line break, \u00b7 part of a
character.</p>
{body}
</main></body></html>
"""


def _scale(responses: Sequence[PredictedResponse]) -> _Scale:
    tokens = [token for response in responses for token in response.tokens]
    if not tokens:
        return _Scale(0.0, 0.0, 0.0)
    weights = [token.weight for token in tokens]
    disagreements = sorted(token.disagreement for token in tokens)
    upper = disagreements[min(len(tokens) - 1, int(DISAGREEMENT_QUANTILE * len(tokens)))]
    return _Scale(min(weights), max(weights), upper)


def _gradient(colour: str) -> str:
    return f'<span class="scale" style="background:linear-gradient(90deg,transparent,rgb(var({colour})))"></span>'


def _section(response: PredictedResponse, scale: _Scale) -> str:
    count = len(response.tokens)
    mean = sum(token.weight for token in response.tokens) / count if count else 0.0
    gap = sum(token.disagreement for token in response.tokens) / count if count else 0.0
    facts = (
        f"{count} tokens, ended by {response.finish_reason}, mean weight {mean:.3f}, mean disagreement {gap:.3f} nats"
    )
    if response.reference is not None:
        facts += f", reference answer {response.reference}"
    spans = "".join(_span(place, token, scale) for place, token in enumerate(response.tokens, start=1))
    return (
        f'<section><h2>{escape(response.row_id)}</h2><pre class="prompt">{escape(response.prompt)}</pre>'
        f'<p class="facts">{escape(facts)}</p><pre>{spans}</pre></section>'
    )


def _span(place: int, token: PredictedToken, scale: _Scale) -> str:
    numbers = (
        f"position {place}: {token.text!r} (id {token.id})\nweight {token.weight:.4f}\nstudent {token.student_logprob:.4f}"
        f"\nteacher {token.teacher_logprob:.4f}\ndisagreement {token.disagreement:.4f} nats"
    )
    text = escape(token.text).replace("\n", "\u21b5\n") or "\u00b7"
    style = f"--w:{scale.weight(token.weight):.3f};--d:{scale.line(token.disagreement):.3f}"
    faded = " zero" if token.weight == 0 else ""
    return f'<span class="t{faded}" style="{style}" title="{escape(numbers)}">{text}</span>'
