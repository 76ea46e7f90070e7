"""The testbed with tools: a secret table that can only be looked up, and a sum that a calculator makes.

    user        three words of the table                            abc+def+ghi
    assistant   looks the first one up                              lookup(abc)
    tool        its value                                           214
    ...         the other two
    assistant   adds them                                           calculator(214+109+187)
    tool        their sum                                           510
    assistant   the answer                                          \\boxed{510}

All that a student has to do is to copy the right characters from the right place. Where it copies a wrong one, the table has no
such key, or says something else, and the teacher, which has read right conversations only, goes on from a text it never saw.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_opd.errors import InputError
from lit_opd.testbed.task import BOX, WORD_LENGTH
from lit_opd.testbed.tokenizer import EOS, PAD, UNKNOWN, USER
from lit_opd.turns.tools import Calculator, LookUp, ToolEnvironment

NUM_KEYS = 200
NUM_WORDS = 3  # of a problem
LEAST, MOST = 100, 333  # of a value, so that a sum has three digits
TABLE_SEED = 21
TOOL = "<tool>"
OPEN, CLOSE = '<tool_call>\n{"name": "', '"}}\n</tool_call>'
LOOKUP = f'{OPEN}lookup", "arguments": {{"key": "'
CALCULATE = f'{OPEN}calculator", "arguments": {{"expression": "'
PIECES = (LOOKUP, CALCULATE, CLOSE, BOX, "error: ")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
MAX_LENGTH = 256

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<user>' -}}{%- elif message['role'] == 'tool' -%}{{- '<tool>' -}}{%- endif -%}"
    "{{- message['content'] -}}"
    "{%- for call in message.get('tool_calls') or [] -%}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) '
    "+ '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class ToolProblem:
    """Three words and their values.

    Args:
        words: keys of the table.
        values: theirs.
    """

    words: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the user says."""
        return "+".join(self.words)

    @property
    def answer(self) -> str:
        """The sum."""
        return str(sum(map(int, self.values)))

    @property
    def turns(self) -> list[tuple[str, str]]:
        """What the assistant says in each turn, and what it is answered; nothing after the last."""
        found = [(LOOKUP + word + CLOSE, value) for word, value in zip(self.words, self.values, strict=True)]
        return [*found, (CALCULATE + "+".join(self.values) + CLOSE, self.answer), (f"{BOX}{self.answer}}}", "")]


@lru_cache
def table() -> dict[str, str]:
    """The secret entries, key -> value."""
    rng, letters = random.Random(TABLE_SEED), string.ascii_lowercase
    numbers = rng.sample(range(len(letters) ** WORD_LENGTH), NUM_KEYS)
    words = [letters[n // 26**2] + letters[n // 26 % 26] + letters[n % 26] for n in numbers]
    return {word: str(rng.randint(LEAST, MOST)) for word in words}


def draw_problem(rng: random.Random) -> ToolProblem:
    """Three different words."""
    words = tuple(rng.sample(sorted(table()), NUM_WORDS))
    return ToolProblem(words, tuple(table()[word] for word in words))


def tool_problems(*, count: int, seed: int) -> list[ToolProblem]:
    """Different problems, fixed by ``seed``; a smaller count gives a prefix of a larger one.

    Raises:
        InputError: for a count below 1, or above what there is enough of.
    """
    limit = NUM_KEYS**NUM_WORDS // 16
    if not 1 <= count <= limit:
        raise InputError(f"`tool_problems.count` must be 1 to {limit}, got {count}; ask for fewer problems")
    rng = random.Random(seed)
    found: dict[str, ToolProblem] = {}
    while len(found) < count:
        problem = draw_problem(rng)
        found.setdefault(problem.prompt, problem)
    return list(found.values())


def make_tool_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer in which the frame of a call is one token."""
    words = (PAD, EOS, UNKNOWN, USER, TOOL, *PIECES, *CHARACTERS)
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    pieces = "|".join(_escaped(piece) for piece in sorted(PIECES, key=len, reverse=True))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pieces}|[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, TOOL],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def _escaped(text: str) -> str:
    """For a regular expression of the tokenizers package."""
    return "".join(f"\\x{{{ord(letter):x}}}" for letter in text)


class TableTools(ToolEnvironment):
    """The look-up and the calculator of the embedded task; its models know them without being shown."""

    def __init__(self) -> None:
        super().__init__([LookUp(table()), Calculator()], show=False)
