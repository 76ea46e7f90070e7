"""Random bytes, JSON, text and settings: an InputError (or a parser's line and status 2), or success; nothing else.

500 cases by default, the same ones every time; ``make test-slow`` draws 20,000 new ones.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lit_opd.answers import boxed_answer, canonical
from lit_opd.cli.command import OPDCLI
from lit_opd.errors import InputError
from lit_opd.evaluation.grading import Grade, extracted, number, quick_verdict, vote
from lit_opd.prompts.encoding import PromptEncoder, encode_rows
from lit_opd.prompts.filters import RowFilter
from lit_opd.prompts.sources import read_prompts
from tests.helpers.encoded import encode_prompts
from tests.prompts.test_prompts import END, START, make_tokenizer

SECONDS = 20  # that one case may take; milliseconds on a quiet machine
AT_LENGTH = 40  # times as many cases in the slow target
QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much)


@contextmanager
def watched() -> Iterator[None]:
    """A hang becomes a failure."""

    def late(*_: object) -> None:
        raise TimeoutError(f"a case took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Property:
    """What must hold for every draw.

    Args:
        cases: draws in a default run.
        draws: of the argument of ``holds``.
        holds: raises where the property does not hold; its second argument is an empty folder.
    """

    cases: int
    draws: st.SearchStrategy[Any]
    holds: Callable[[Any, Path], None]


def refused_or(attempt: Callable[[], Any]) -> Any:
    """The result, or the InputError, whose message must say something."""
    try:
        return attempt()
    except InputError as error:
        assert len(str(error)) > 10
        return error


# -- text and files ----------------------------------------------------------------------------------------------------

ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
HARD = st.sampled_from(
    [START, END, "<pad>", "<think>", "<|im_", "end|>", "\ue0f0", "\ue0f1", "\ue0f00\ue0f1", "\0", "\u202e", "\ufeff", "\ud800",
     "{{ x }}", "{% if %}", "{0}", "%s", "####", "\\boxed{", "{", "}", "\\", "\n", " ", "\u2028", "\U0001f600", "e\u0301"]
)  # fmt: skip
TEXT = st.lists(st.one_of(HARD, st.text(ANY_CHARACTER, max_size=8)), max_size=8).map("".join)
NAMES = st.sampled_from(
    ["prompt", "problem", "messages", "answer", "solution", "id", "teacher", "role", "content", "tool_calls"]
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool", "developer", "root", ""])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, ROLE),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(NAMES, TEXT), inner, max_size=5)),
    max_leaves=12,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLE, "content": st.one_of(TEXT, JSON)}), max_size=4)
PROMPT = st.one_of(TEXT, MESSAGES, JSON)
ROW = st.one_of(JSON, st.fixed_dictionaries({"prompt": PROMPT}, optional={"answer": JSON, "id": JSON, "teacher": JSON}))
LINE = st.one_of(
    st.binary(max_size=40),
    ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
)
FILE = st.one_of(st.binary(max_size=200), st.lists(LINE, max_size=5).map(b"\n".join))
ENCODER = PromptEncoder(make_tokenizer())
CONTROL = {ENCODER.tokenizer.convert_tokens_to_ids(token) for token in (START, END, "<pad>")}


def a_file_is_read_or_refused(content: bytes, folder: Path) -> None:
    path = folder.parent / "fuzz.jsonl"
    path.write_bytes(content)
    rows = refused_or(lambda: read_prompts(str(path)))
    if not isinstance(rows, InputError):
        refused_or(lambda: encode_rows(rows, ENCODER))


def a_prompt_is_framed_as_any_other(prompt: Any, folder: Path) -> None:
    """Whatever the text holds, the control tokens are those of the template."""
    for encoder in (ENCODER, PromptEncoder(ENCODER.tokenizer, chat_template=False)):
        batch = refused_or(lambda encoder=encoder: encode_prompts(encoder, [prompt]))
        if isinstance(batch, InputError):
            continue
        turns = prompt if isinstance(prompt, list) else [prompt]
        while isinstance(turns[-1], dict) and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        own = [int(token) for token in batch.ids[0] if int(token) in CONTROL]
        assert len(own) == (2 * len(turns) + 1 if encoder is ENCODER else 0)


def a_filter_is_parsed_or_refused(case: tuple[str, Any], folder: Path) -> None:
    text, value = case
    rule = refused_or(lambda: RowFilter.parse(text))
    if not isinstance(rule, InputError):
        refused_or(lambda: rule.keeps({rule.column: value}, "F:1", [rule.column]))


FILTER = st.tuples(
    st.one_of(TEXT, st.builds("{} {} {}".format, NAMES, st.sampled_from([">=", "==", "in", "not in", "<", "="]), TEXT)),
    JSON,
)

# -- answers -----------------------------------------------------------------------------------------------------------

PIECE = st.one_of(
    st.sampled_from(
        ["\\boxed", "\\fbox{", "\\boxed{", "\\text{", "\\frac{1}{2}", "{", "}", "\\", "#", "####", "$", " ", "\n", ",", "-", ".",
         "1", "042", "x_", "=", "^\\circ", "\\left", "\u2212", "\u0661", "\xb2", "1e5"]
    ),
    st.text(ANY_CHARACTER, max_size=6),
)  # fmt: skip
RESPONSE = st.one_of(
    st.lists(PIECE, max_size=20).map("".join),
    st.builds(lambda piece, count, tail: piece * count + tail, PIECE, st.integers(1000, 20_000), PIECE),
)


def an_answer_is_cut_out_whatever_it_is(case: tuple[str, str], folder: Path) -> None:
    response, reference = case
    found = extracted(response)
    assert isinstance(found, Grade) or (found and found.strip() == found)
    for answer in (found if isinstance(found, str) else response, reference):
        number(answer)
        assert isinstance(canonical(answer), str) and isinstance(vote(answer), str)
        assert quick_verdict(answer, reference) in (True, False, None)
    boxed_answer(response)


# -- settings ----------------------------------------------------------------------------------------------------------

ODD = [
    "null",
    "[]",
    "{}",
    "-1",
    "1e400",
    "nan",
    "${",
    "${x}",
    "${oc.env:NOPE}",
    "!!python/name:os.system",
    "Uniform",
    "a.b.C",
    "*a",
]
VALUE = st.one_of(TEXT, JSON.map(json.dumps), st.sampled_from(ODD))


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> OPDCLI:
    """A parser with everything in it, and a config that it takes."""
    path = tmp_path_factory.mktemp("cli") / "base.yaml"
    path.write_text(yaml.safe_dump({"model": {"student": {"path": "s"}, "teacher": {"init_args": {"path": "t"}}},
                                    "data": {"train": "d"}, "trainer": {"logger": False}}))  # fmt: skip
    made = OPDCLI(args=["--config", str(path)], run=False)
    made.base = ["--config", str(path)]
    return made


def parsed_or_refused(cli: OPDCLI, arguments: list[str]) -> None:
    """Accepted, or one line and status 2."""
    said = io.StringIO()
    with redirect_stderr(said):
        try:
            cli.parse_arguments(cli.parser, [*cli.base, *arguments])
        except SystemExit as stopped:
            lines = said.getvalue().splitlines()  # a library's warning may stand before the error
            errors = [line for line in lines if line.startswith("error: ")]
            assert stopped.code == 2 and len(errors) == 1 and errors[0] == lines[-1] and len(errors[0]) > 20, lines


def keys(cli: OPDCLI) -> st.SearchStrategy[str]:
    """Every option of the parser, and keys below those that take classes."""
    options = {text for action in cli.parser._actions for text in action.option_strings if text.startswith("--")}
    kept = sorted(text for text in options if "help" not in text and "print" not in text)
    below = [
        f"{text}.{name}" for text in kept if text.count(".") == 1 for name in ("class_path", "init_args", "path", "x")
    ]
    return st.sampled_from(kept + below[::7])


def config_properties(cli: OPDCLI) -> dict[str, Property]:
    def an_argument(case: tuple[str, str], folder: Path) -> None:
        parsed_or_refused(cli, [f"{case[0]}={case[1]}"])

    def a_file(case: str, folder: Path) -> None:
        path = folder.parent / "fuzz.yaml"
        path.write_text(case, errors="surrogatepass")
        parsed_or_refused(cli, ["--config", str(path)])

    name = keys(cli).map(lambda key: key.removeprefix("--"))
    nested = st.builds(lambda key, value: yaml.safe_dump(_nested(key.split("."), value)), name, JSON)
    text = st.one_of(TEXT, nested, st.builds("{}: {}".format, name, VALUE))
    return {"argument": Property(40, st.tuples(keys(cli), VALUE), an_argument), "YAML": Property(30, text, a_file)}


def _nested(parts: list[str], value: Any) -> Any:
    return value if not parts else {parts[0]: _nested(parts[1:], value)}


# -- running them ------------------------------------------------------------------------------------------------------

PROPERTIES = {
    "file": Property(130, FILE, a_file_is_read_or_refused),
    "rows": Property(70, st.lists(ROW, min_size=1, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
                     a_file_is_read_or_refused),
    "prompt": Property(100, PROMPT, a_prompt_is_framed_as_any_other),
    "filter": Property(50, FILTER, a_filter_is_parsed_or_refused),
    "answer": Property(80, st.tuples(RESPONSE, RESPONSE), an_answer_is_cut_out_whatever_it_is),
}  # fmt: skip
NAMED = [*PROPERTIES, "argument", "YAML"]


def check(cli: OPDCLI, name: str, folder: Path, times: int) -> None:
    """Draw the cases; nothing may be written."""
    chosen = (PROPERTIES | config_properties(cli))[name]
    folder.mkdir()

    def case(drawn: Any) -> None:
        with watched():
            chosen.holds(drawn, folder)

    fixed = settings(
        max_examples=chosen.cases * times,
        derandomize=times == 1,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=QUIET,
    )
    fixed(given(chosen.draws)(case))()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", NAMED)
def test_random_input_is_an_error_with_a_message_or_a_success(
    cli: OPDCLI, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # Lightning warns of arguments beside pytest's own
    check(cli, name, tmp_path / "empty", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_random_input_at_length(cli: OPDCLI, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # Lightning warns of arguments beside pytest's own
    check(cli, name, tmp_path / "empty", AT_LENGTH)


def test_the_cases_are_five_hundred(cli: OPDCLI) -> None:
    assert sum(one.cases for one in (PROPERTIES | config_properties(cli)).values()) == 500
