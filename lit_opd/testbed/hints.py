"""Self-distillation on the automaton: a hint for the teacher, and a student that can read it.

The hint is the start of the path that is asked for, the codes of its first states, before the problem:

    student reads   "fsjqhk...=417"
    teacher reads   "093417...=fsjqhk...=417"

The embedded student never saw such a prompt and could do nothing with it. ``learn_to_read`` teaches it that alone: to write what
the hint says where there is one, and otherwise what it would have written. Half of the hints are random codes, which the tables
cannot have told it, so it learns to copy and no transition.

Measured on 2026-11-27, seed 7, 150 steps, greedy on all 256 validation problems: without a hint .469 before and .500 after, with
one .676 after. Before, it answers no problem after a hint.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from lit_opd.errors import InputError
from lit_opd.prompts import PeerDemonstration, TeacherPrompt
from lit_opd.prompts.hindsight import Without
from lit_opd.testbed.task import (
    CHAIN_LENGTH,
    CODE_LENGTH,
    WORD_LENGTH,
    Automaton,
    Problem,
    make_automaton,
    sample_problem,
)
from lit_opd.testbed.tokenizer import prompt_ids
from lit_opd.testbed.warmup import response_logits

HINT_CODES = 6  # half of the path
PEER_PROMPT_TOKENS = 96  # a whole path as the hint, the problem, and the chat's tokens
READER_SEED = 7
NUM_STEPS, BATCH_SIZE, LR, RISE_STEPS = 150, 24, 3e-3, 10
BETAS, MAX_GRAD_NORM = (0.9, 0.98), 1.0


class StartOfPath(TeacherPrompt):
    """The first codes of the path before the problem, from the secret tables: the embedded rows have no such column.

    Args:
        codes: how many; the student can read 6.
    Raises:
        InputError: fewer than one.
    """

    def __init__(self, codes: int = HINT_CODES) -> None:
        if codes < 1:
            raise InputError(
                f"`StartOfPath.codes` must be at least 1, got {codes}; without a hint leave `teacher_prompt` out"
            )
        self.codes = codes

    def render(self, row: Mapping[str, Any], prompt: Any) -> str:
        """Hint, "=", and the row's prompt."""
        path = path_of(make_automaton(), row["prompt"])
        return hinted(path[: self.codes], row["prompt"])


class StartOfPeer(PeerDemonstration):
    """The first codes of a right answer among the other samples of the problem, before the problem: SDPO with a hint that the
    embedded student can read.

    Args:
        codes: how many; the student can read 6.
        without: of rows whose problem no other sample solved, as in ``PeerDemonstration``.
    Raises:
        InputError: fewer than one.
    """

    def __init__(self, codes: int = HINT_CODES, without: Without = "drop") -> None:
        if codes < 1:
            raise InputError(f"`StartOfPeer.codes` must be at least 1, got {codes}")
        super().__init__("{demonstration}={prompt}", without=without, max_prompt_tokens=PEER_PROMPT_TOKENS)
        self.codes = codes

    def demonstration(self, text: str) -> str:
        """The start of it."""
        return super().demonstration(text)[: self.codes * CODE_LENGTH]


def hinted(codes: Sequence[str], prompt: str) -> str:
    """A problem after a hint."""
    return "".join(codes) + "=" + prompt


def path_of(automaton: Automaton, prompt: str) -> tuple[str, ...]:
    """The codes that a problem's text asks for.

    Raises:
        InputError: it is no problem of this automaton.
    """
    words, _, start = prompt.partition("=")
    names = [words[at : at + WORD_LENGTH] for at in range(0, len(words), WORD_LENGTH)]
    found = []
    try:
        state: int | None = automaton.codes.index(start)
        for name in names:
            state = automaton.targets[state][automaton.words.index(name)]  # type: ignore[index]  # None is caught below
            found.append(automaton.codes[state])  # type: ignore[index]
    except (ValueError, TypeError) as error:
        raise InputError(f"a prompt must be a legal problem of the embedded task, got {prompt!r}") from error
    return tuple(found)


def learn_to_read(
    student: Qwen3ForCausalLM,
    automaton: Automaton,
    tokenizer: PreTrainedTokenizerFast,
    *,
    codes: int = HINT_CODES,
    steps: int = NUM_STEPS,
    seed: int = READER_SEED,
) -> Qwen3ForCausalLM:
    """A copy of ``student`` that writes what a hint says, and else what ``student`` would.

    Args:
        student: of the testbed, left as it is.
        automaton: its tables.
        tokenizer: makes the chat format.
        codes: of a hint.
        steps: optimizer steps.
        seed: of the problems.
    """
    model, rng = deepcopy(student), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
    for step in range(steps):
        factor = min(1.0, (step + 1) / RISE_STEPS) * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
        for group in optimizer.param_groups:
            group["lr"] = LR * factor
        loss = _reading_loss(model, student, automaton, tokenizer, rng, codes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    return model.eval()


def _reading_loss(
    model: Qwen3ForCausalLM,
    student: Qwen3ForCausalLM,
    automaton: Automaton,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    codes: int,
) -> Tensor:
    """KL to the student without a hint, likelihood of the hint's codes, and KL to the student after them; nats a token."""
    told = codes * CODE_LENGTH
    real = [sample_problem(automaton, rng, chain_length=CHAIN_LENGTH) for _ in range(BATCH_SIZE)]
    drawn = [sample_problem(automaton, rng, chain_length=CHAIN_LENGTH) for _ in range(BATCH_SIZE)]
    made_up = [replace(one, codes=tuple(rng.choice(automaton.codes) for _ in one.codes)) for one in drawn]
    plain = _batch([(one.prompt, one) for one in real], tokenizer)
    behind = _batch([(hinted(one.codes[:codes], one.prompt), one) for one in real + made_up], tokenizer)
    with torch.no_grad():
        wanted = response_logits(student, *plain)
    logits = response_logits(model, *behind)
    copied = cross_entropy(logits[:, :told].transpose(1, 2), behind[1][:, :told])
    rest = _kl(logits[: len(real), told:], wanted[:, told:])
    return _kl(response_logits(model, *plain), wanted) + copied + rest


def _batch(pairs: Sequence[tuple[str, Problem]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Prompt ids [B, P] and response ids [B, T]."""
    prompts = [prompt_ids(tokenizer, prompt) for prompt, _ in pairs]
    responses = [tokenizer.encode(one.response) + [tokenizer.eos_token_id] for _, one in pairs]
    return torch.tensor(prompts), torch.tensor(responses)


def _kl(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || model), mean over [B, T]."""
    values = kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    return values.sum(-1).mean()
