"""The secret automaton: a task on which a teacher's later tokens are worthless once the student has erred.

100 states, each named by a random 3-digit code; 20 operations, each spelled as a 3-letter word; every state has 4 legal
operations with fixed targets. The tables are secret: a model has to have learned them from legal paths. A wrong code
makes the next operation, or the code itself, one the teacher has never seen, so what it says later carries no signal.

    prompt      the operation words, "=", the code of the start state       "fsjqhk...=417"      3 L + 4 characters
    response    the codes visited, then the last one boxed                  "093...\\boxed{093}"  3 L + 5 tokens

One word per code keeps the distance from an operation to its code constant (with a distance that grows a step,
supervision of prefixes stagnates for a reason that has nothing to do with position bias).

``all_legal=True`` is the control: the same states and words, every operation legal in every state, so that a teacher
trained on it stays right after an error.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lit_opd.errors import InputError
from lit_opd.files import replace_whole

NUM_STATES = 100
NUM_OPERATIONS = 20
NUM_LEGAL = 4
CHAIN_LENGTH = 12
TABLE_SEED = 20
CODE_LENGTH = WORD_LENGTH = 3
BOX = "\\boxed{"


@dataclass(frozen=True)
class Automaton:
    """The secret tables.

    Args:
        codes: one 3-digit code a state, all different.
        words: one 3-letter word an operation, all different.
        targets: state -> operation -> the state it leads to, None where the operation is illegal.
    """

    codes: tuple[str, ...]
    words: tuple[str, ...]
    targets: tuple[tuple[int | None, ...], ...]

    def legal(self, state: int) -> tuple[int, ...]:
        """The operations allowed in ``state``, ascending."""
        return tuple(op for op, target in enumerate(self.targets[state]) if target is not None)


@dataclass(frozen=True)
class Problem:
    """A legal path.

    Args:
        words: the operations applied, in order.
        start: code of the state the path starts in.
        codes: code of the state after each operation.
    """

    words: tuple[str, ...]
    start: str
    codes: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return "".join(self.words) + "=" + self.start

    @property
    def answer(self) -> str:
        """Code of the last state: three digits, leading zeros kept."""
        return self.codes[-1]

    @property
    def response(self) -> str:
        """The reference response, without the end symbol."""
        return "".join(self.codes) + BOX + self.answer + "}"


@lru_cache
def make_automaton(*, all_legal: bool = False, seed: int = TABLE_SEED) -> Automaton:
    """Draw the tables; the control shares codes, words and the legal transitions with the task itself."""
    rng = random.Random(seed)
    codes = tuple(f"{number:0{CODE_LENGTH}d}" for number in rng.sample(range(10**CODE_LENGTH), NUM_STATES))
    letters = string.ascii_lowercase
    numbers = rng.sample(range(len(letters) ** WORD_LENGTH), NUM_OPERATIONS)
    words = tuple(letters[n // 26**2] + letters[n // 26 % 26] + letters[n % 26] for n in numbers)
    legal = [set(rng.sample(range(NUM_OPERATIONS), NUM_LEGAL)) for _ in range(NUM_STATES)]
    table = [[rng.randrange(NUM_STATES) for _ in range(NUM_OPERATIONS)] for _ in range(NUM_STATES)]
    targets = tuple(
        tuple(target if all_legal or op in legal[state] else None for op, target in enumerate(row))
        for state, row in enumerate(table)
    )
    return Automaton(codes=codes, words=words, targets=targets)


def sample_problem(automaton: Automaton, rng: random.Random, *, chain_length: int = CHAIN_LENGTH) -> Problem:
    """One legal path: a uniform start state, then a uniform legal operation a step."""
    if chain_length < 1:
        raise InputError(f"`sample_problem.chain_length` must be 1 or more, got {chain_length}; the default is 12")
    state: int = rng.randrange(NUM_STATES)
    start, words, codes = automaton.codes[state], [], []
    for _ in range(chain_length):
        op = rng.choice(automaton.legal(state))
        target = automaton.targets[state][op]
        assert target is not None  # op is a legal one
        state = target
        words.append(automaton.words[op])
        codes.append(automaton.codes[state])
    return Problem(words=tuple(words), start=start, codes=tuple(codes))


def sample_problems(
    automaton: Automaton, *, count: int, seed: int, chain_length: int = CHAIN_LENGTH
) -> tuple[Problem, ...]:
    """``count`` different legal paths, fixed by ``seed``; a smaller count gives a prefix of a larger one.

    Raises:
        InputError: for a count below 1, or above half of the paths that exist at this length.
    """
    limit = NUM_STATES * len(automaton.legal(0)) ** chain_length // 2
    if not 1 <= count <= limit:
        raise InputError(
            f"`sample_problems.count` must be 1 to {limit} at chain length {chain_length}, got {count}; "
            "ask for fewer problems or for a longer chain"
        )
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = sample_problem(automaton, rng, chain_length=chain_length)
        problems.setdefault(problem.prompt, problem)
    return tuple(problems.values())


def records(problems: Iterable[Problem], *, name: str) -> list[dict[str, str]]:
    """The data rows of ``problems``: {"id", "prompt", "answer"}, ids "name-00000" and up."""
    return [
        {"id": f"{name}-{index:05d}", "prompt": problem.prompt, "answer": problem.answer}
        for index, problem in enumerate(problems)
    ]


def write_records(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write ``rows`` as JSON lines; ``path`` appears whole or not at all."""
    replace_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_records(path: Path) -> list[dict[str, str]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
