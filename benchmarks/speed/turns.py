"""CPU seconds of a rollout of several turns with and without going on from the keys and values of the earlier turns.

    python -m benchmarks.speed.turns --prompt 1024 --turns 3

A random Qwen3 says a fixed number of tokens in each turn and hears as many as asked, in one thread: only time is measured. Both
sides take turns, the tokens of both are compared, and the medians are told. CPU seconds, so that a busy machine does little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from lit_opd.rollout import DecodeSampler, Sampler, SamplingSettings, TransformersSampler
from lit_opd.rollout.base import Conversation
from lit_opd.rollout.retold import Retold
from lit_opd.scoring.model import ScoringModel
from lit_opd.types import PromptBatch

VOCABULARY = 4096
RAGGED = 8  # the shortest prompt is shorter by a share of 1 / RAGGED, and so are the answers
ENGINES: dict[str, type[Sampler]] = {"TransformersSampler": TransformersSampler, "DecodeSampler": DecodeSampler}


@dataclass(frozen=True)
class Sizes:
    """What is read and said.

    Args:
        rows: of the batch.
        prompt: tokens of the longest prompt.
        said: tokens a turn.
        heard: tokens of the longest answer.
        turns: of a conversation.
    """

    rows: int
    prompt: int
    said: int
    heard: int
    turns: int

    @property
    def slots(self) -> int:
        """Tokens after a prompt."""
        return self.turns * self.said + (self.turns - 1) * self.heard


def student(sizes: Sizes) -> ScoringModel:
    """10 million parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2 * (sizes.prompt + sizes.slots),
    )  # fmt: skip
    policy = ScoringModel(Qwen3ForCausalLM(config).eval(), vocabulary=VOCABULARY)
    policy.choose_path("student")
    return policy


def prompts(sizes: Sizes) -> PromptBatch:
    """Random and ragged."""
    lengths = _lengths(sizes.prompt, sizes.rows)
    ids = torch.randint(0, VOCABULARY, (sizes.rows, sizes.prompt), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(sizes.prompt) >= sizes.prompt - torch.tensor(lengths).unsqueeze(-1)
    return PromptBatch(ids, mask, torch.arange(sizes.rows), tuple(map(str, range(sizes.rows))))


def _lengths(longest: int, rows: int) -> list[int]:
    return [longest - longest * row // (RAGGED * rows) for row in range(rows)]


def spoken(talk: Conversation, sizes: Sizes) -> list[Tensor]:
    """Ids of every turn, int64 [R, n] each."""
    said, rows = [], range(sizes.rows)
    draw = torch.Generator().manual_seed(2)
    for turn in range(sizes.turns):
        said.append(talk.speak([sizes.said] * sizes.rows).ids)
        if turn + 1 < sizes.turns:
            heard = [
                torch.randint(0, VOCABULARY, (n,), generator=draw).tolist() for n in _lengths(sizes.heard, sizes.rows)
            ]
            talk.hear(rows, heard)
    return said


@torch.no_grad()
def measure(sampler: Sampler, policy: Any, sizes: Sizes, rounds: int) -> dict[str, float]:
    """Median seconds of a rollout that reads everything again and of one that goes on.

    Raises:
        RuntimeError: the engine does not go on, or says something else.
    """
    settings = SamplingSettings(max_new_tokens=sizes.slots, stop_ids=(), pad_id=0, vocabulary=VOCABULARY)
    batch = prompts(sizes)
    seconds: dict[str, list[float]] = {"again": [], "going on": []}
    for _ in range(rounds + 1):
        found: dict[str, Sequence[Tensor]] = {}
        for way in seconds:
            start = time.process_time()
            talk = (
                Retold(sampler, policy, batch, settings)
                if way == "again"
                else sampler.converse(policy, batch, settings)
            )
            if talk is None:
                raise RuntimeError(f"{type(sampler).__name__} does not go on")
            found[way] = spoken(talk, sizes)
            seconds[way].append(time.process_time() - start)
        if not all(map(torch.equal, found["again"], found["going on"])):
            raise RuntimeError(f"{type(sampler).__name__} says something else when it goes on")
    return {
        way: statistics.median(own[1:]) for way, own in seconds.items()
    }  # the first has the checks of a model in it


def main() -> None:
    """Each engine, both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size, what in (
        ("rows", 8, "of the batch"), ("prompt", 1024, "tokens of the longest prompt"), ("said", 16, "tokens a turn"),
        ("heard", 64, "tokens of the longest answer"), ("turns", 3, "of a conversation"), ("rounds", 3, "that are counted"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size, help=f"{what}, default {size}")
    asked = vars(parser.parse_args())
    rounds = asked.pop("rounds")
    sizes = Sizes(**asked)
    torch.set_num_threads(1)
    policy = student(sizes)
    for name, kind in ENGINES.items():
        found = measure(kind(max_new_tokens=sizes.slots), policy, sizes, rounds)
        again, on = found["again"], found["going on"]
        print(f"{name}: {again:.2f} CPU s reading again, {on:.2f} going on, {again / on:.2f} times as fast")


if __name__ == "__main__":
    main()
