"""A student that talks with an environment: a tiny model, an encoder, prompts with their data rows."""

from __future__ import annotations

from typing import Any

import torch

from lit_opd.prompts.encoding import PromptEncoder, collate, encode_rows
from lit_opd.prompts.sources import PromptRow
from lit_opd.rollout import Sampler, SamplingSettings, TransformersSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.turns import Environment, Episode, Response, TurnsSampler
from lit_opd.types import PromptBatch, Rollout
from tests.helpers import tiny

# marks where a message begins, and closes an answer with its end symbol
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>"
    "{% else %}<user>{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOS, USER, ASSISTANT = 1, 2, 3
STOPS = (EOS, 9, 11, 13, 20)
WINDOW = 256


def tokenizer(template: str = TEMPLATE) -> Any:
    """One token a character."""
    built = tiny.tokenizer(rows=64)
    built.chat_template = template
    return built


def student(seed: int = 4, dtype: torch.dtype = torch.float64) -> ScoringModel:
    """Flat enough that turns end at different places."""
    model = tiny.qwen3(seed=seed, window=WINDOW)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.15)
    return scored(model.to(dtype))


def scored(model: Any) -> ScoringModel:
    """As a run has it."""
    policy = ScoringModel(model.eval(), vocabulary=64)
    policy.choose_path("student")
    return policy


def prompts(count: int = 6, encoder: PromptEncoder | None = None) -> PromptBatch:
    """Of different lengths, with their rows."""
    encoder = encoder or PromptEncoder(tokenizer())
    rows = [PromptRow(f"r{n}", "ab" * (n + 1), answer=str(n), columns={"n": n}) for n in range(count)]
    return collate(encode_rows(rows, encoder, keep_rows=True), 0)


def settings(**changes: Any) -> SamplingSettings:
    """Of a rollout of 60 slots."""
    return SamplingSettings(**({"max_new_tokens": 60, "stop_ids": STOPS, "pad_id": 0, "vocabulary": 64} | changes))


class Counting(Environment):
    """Says how many tokens it heard and which turn it was, at most ``turns`` times."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    def step(self, state: Episode, response: Response) -> Any:
        """Half a point a turn."""
        return f"{len(response.ids)} in {state.turn}", state.turn >= self.turns, 0.5


class Again(TransformersSampler):
    """Reads the conversation again in each turn, by ``generate``: the reference."""

    def converse(self, *_: Any) -> None:
        """Never goes on."""


def sampler(engine: Sampler, environment: Environment, **options: Any) -> TurnsSampler:
    """Attached to the tokenizer."""
    found = TurnsSampler(engine, environment, **({"max_turns": 4, "max_turn_tokens": 12} | options))
    found.attach(tokenizer(), None)
    return found


def talked(engine: Sampler, environment: Environment, policy: ScoringModel, **options: Any) -> Rollout:
    """One batch."""
    changes = options.pop("settings", {})
    return sampler(engine, environment, **options).sample(policy, prompts(), settings(**changes))
