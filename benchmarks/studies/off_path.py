"""Is a testbed teacher right after an error? Its codes after one wrong code, with the error's own path as the truth.

    python -m benchmarks.studies.off_path --teacher shipped=lit_opd/testbed/assets/teacher --teacher NAME=FOLDER

Each problem of a seed of its own gets one wrong code, that of a random state, at a random one of its first eight codes; the
path goes on from there by the tables with every operation legal, which is what a teacher that "stays right" would
continue with. The teacher reads it all; a code counts as right where the argmax of all three digits is. Written per number
of codes after the error: share of right codes and nats per code. ``legal`` means that the operation is one of the
four that legal paths take from the state that stands there, which chance makes one in five.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_opd.compare.document import markdown_table
from lit_opd.testbed.task import CODE_LENGTH, NUM_STATES, Automaton, Problem, make_automaton, sample_problems
from lit_opd.testbed.tokenizer import make_tokenizer
from lit_opd.testbed.warmup import response_logits, supervised_batch

SEED = 77  # neither data, warm-up nor probes use it
FIRST_ERRORS = 8
GROUPS = ("before the error", "1 after", "2 after", "3 after", "4 and more after")


@dataclass(frozen=True)
class Erring:
    """A problem with one wrong code.

    Args:
        problem: its codes go on from the wrong one.
        place: index of the wrong code.
        legal: for every code, whether its operation is one of those that legal paths take there.
    """

    problem: Problem
    place: int
    legal: list[bool]


def err(problem: Problem, legal: Automaton, full: Automaton, rng: random.Random) -> Erring:
    """``problem`` with a wrong code among its first ``FIRST_ERRORS``."""
    place = rng.randrange(min(FIRST_ERRORS, len(problem.codes)))
    state, codes, allowed = full.codes.index(problem.start), [], []
    for step, word in enumerate(problem.words):
        operation = full.words.index(word)
        target = full.targets[state][operation]
        assert target is not None  # every operation is legal in the full tables
        allowed.append(legal.targets[state][operation] is not None)
        if step == place:
            target = rng.choice([other for other in range(NUM_STATES) if other != target])
        state = target
        codes.append(full.codes[state])
    return Erring(replace(problem, codes=tuple(codes)), place, allowed)


@torch.no_grad()
def code_scores(folder: Path, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Of every code: right under argmax, bool [B, L]; its negative log-likelihood in nats, [B, L]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, responses = supervised_batch(problems, make_tokenizer())
    logprobs = response_logits(model, prompts, responses).log_softmax(-1)
    right = logprobs.argmax(-1) == responses
    nats = -logprobs.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
    width = CODE_LENGTH * len(problems[0].codes)
    shape = len(problems), -1, CODE_LENGTH
    return right[:, :width].reshape(shape).all(-1), nats[:, :width].reshape(shape).sum(-1)


def group(step: int, place: int) -> str | None:
    """Which row of the table a code belongs to; None for the wrong code itself."""
    if step == place:
        return None
    return GROUPS[0] if step < place else GROUPS[min(step - place, len(GROUPS) - 1)]


def table(names: Sequence[str], folders: Sequence[Path], rows: Sequence[Erring]) -> str:
    """Markdown: a row a group, a column a teacher."""
    scores = [code_scores(folder, [row.problem for row in rows]) for folder in folders]
    lines = []
    for title in GROUPS:
        for kind in (True, False):
            where = torch.tensor(
                [[group(t, row.place) == title and ok == kind for t, ok in enumerate(row.legal)] for row in rows]
            )
            if where.any():
                cells = [cell(right[where], nats[where]) for right, nats in scores]
                label = f"{title}, {'legal' if kind else 'illegal'} operation"
                lines.append([label, str(int(where.sum())), *cells])
    return markdown_table(["codes", "count", *(f"{name}: right, nats/code" for name in names)], lines)


def cell(right: Tensor, nats: Tensor) -> str:
    """Share of ``right``, bool [N], with its standard error, and the mean of ``nats``, [N]."""
    share = right.double().mean().item()
    return f"{share:.3f} +- {sqrt(share * (1 - share) / len(right)):.3f}, {nats.double().mean().item():.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--count", type=int, default=1024, help="problems, at least 1")
    asked = parser.parse_args(arguments)
    pairs = [text.partition("=") for text in asked.teacher]
    for name, _, folder in pairs:
        if not name or not (Path(folder) / "config.json").is_file():
            parser.error(f"--teacher must be NAME=FOLDER with a model in the folder, got {name}={folder}")
    if asked.count < 1:
        parser.error(f"--count must be at least 1, got {asked.count}")
    torch.set_num_threads(1)
    legal, full, rng = make_automaton(), make_automaton(all_legal=True), random.Random(SEED)
    rows = [err(problem, legal, full, rng) for problem in sample_problems(legal, count=asked.count, seed=SEED)]
    print(table([name for name, _, _ in pairs], [Path(folder) for _, _, folder in pairs], rows))


if __name__ == "__main__":
    main()
