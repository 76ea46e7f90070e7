"""Tools: calls read from text, run, and answered; prompts that show them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lit_opd.errors import InputError
from lit_opd.prompts.encoding import PromptEncoder
from lit_opd.prompts.following import Following
from lit_opd.prompts.sources import read_prompts
from lit_opd.turns import Episode, Response
from lit_opd.turns.calls import Call, tool_calls
from lit_opd.turns.tools import Calculator, LookUp, Tool, ToolEnvironment, ToolError, answer_reward
from lit_opd.types import DataRow
from tests.helpers import tiny

CALLS: list[tuple[str, list[Call]]] = [
    ("no call", []),
    (
        'a <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call> b',
        [Call("add", {"a": 1, "b": [2]})],
    ),
    ('<tool_call>{"name": "add"}</tool_call>', [Call("add")]),
    ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [Call("add", {"a": 1})]),
    ('<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>', [Call("a"), Call("b")]),
    (
        "<tool_call>\n<function=run>\n<parameter=code>\nx = '<a>'\nprint(x)\n</parameter>\n<parameter=n>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        [Call("run", {"code": "x = '<a>'\nprint(x)", "n": 3})],
    ),
    ("<tool_call><function=now></function></tool_call>", [Call("now")]),
]


@pytest.mark.parametrize(("text", "found"), CALLS)
def test_calls_are_read_in_both_forms(text, found):
    assert tool_calls(text) == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<tool_call>{1}</tool_call>", "no JSON"),
        ("<tool_call>[1]</tool_call>", "an object with"),
        ('<tool_call>{"arguments": {}}</tool_call>', "an object with"),
        ('<tool_call>{"name": "a", "arguments": [1]}</tool_call>', "must be an object"),
        ('<tool_call>{"name": "a", "arguments": "x"}</tool_call>', "must be an object"),
        ('<tool_call>{"name": "a"}', "not closed"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "no JSON"),
        ("<tool_call><function=a>loose</function></tool_call>", "between the parameters"),
        ('<tool_call>{"name": "a"}<tool_call>{"name": "b"}</tool_call>', "not closed"),
    ],
)
def test_what_begins_as_a_call_and_is_none_is_told(text, why):
    assert why in (tool_calls(text)[0].wrong or "")


class Divide(Tool):
    """One number by another.

    Not part of what is shown.
    """

    name = "divide"

    def call(self, by: int, number: float = 1.0, name: str = "") -> str:
        if by == 13:
            raise OSError("bad luck")
        if by == 0:
            raise ToolError("by zero")
        return str(number / by)


class Wide(Tool):
    """Takes lists, and what may be left out."""

    name = "wide"

    def call(self, keys: list[str], count: int | None = None, note: str | None = None, size: int | float = 1) -> str:
        return f"{keys} {count} {note}"


def environment(**options: Any) -> ToolEnvironment:
    return ToolEnvironment([Calculator(), LookUp({"a": "7", "b": "8", "7": "seven"}), Divide(), Wide()], **options)


def answer(text: str, row: DataRow | None = None, **options: Any) -> Any:
    return environment(**options).step(Episode(DataRow() if row is None else row), Response(text, ()))


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def coder(name: str, parameter: str, value: str) -> str:
    """A call as Qwen 3 Coder writes it."""
    written = f"<parameter={parameter}>\n{value}\n</parameter>"
    return f"<tool_call>\n<function={name}>\n{written}\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (call("calculator", expression="2^10 - (3+1)/8"), "2047/2"),
        (call("calculator", expression="041+1"), "42"),
        (call("calculator", expression="9^9^9^9"), "error: not an arithmetic expression"),
        (call("calculator", expression="9^5000"), "error: the value has too many digits to be written"),
        (coder("calculator", "expression", "12"), "12"),
        (coder("lookup", "key", "7"), "seven"),
        (coder("lookup", "key", '"b"'), "error: no such key"),
        (coder("divide", "by", "4"), "0.25"),
        (call("wide", keys=["a", "b"], count=2), "['a', 'b'] 2 None"),
        (call("wide", keys=[], count=None, note=None), "[] None None"),
        (coder("wide", "keys", '["7"]'), "['7'] None None"),
        (call("wide", keys=[], note=1), "error: note must be text"),
        (call("calculator", expression="__import__('os')"), "error: not an arithmetic expression"),
        (call("calculator", expression="1+" * 400 + "1"), "error: not an arithmetic expression"),
        (call("calculator", expression=3), "error: expression must be text"),
        (call("lookup", key="b"), "8"),
        (call("lookup", key="c"), "error: no such key"),
        (call("lookup"), "error: missing a required argument: 'key'"),
        (call("lookup", key="a", more=1), "error: got an unexpected keyword argument 'more'"),
        (call("divide", by=4), "0.25"),
        (call("divide", by=0), "error: by zero"),
        (call("search", text="x"), "error: no tool search"),
        ("<tool_call>{", "error: the call is not closed by </tool_call>"),
    ],
)
def test_a_call_is_run_and_what_is_wrong_with_it_told(said, heard):
    assert answer(said).observation == [{"role": "tool", "content": heard}] and not answer(said).done


def test_several_calls_have_a_message_each_up_to_a_number():
    found = answer(call("lookup", key="a") * 3, calls=2).observation
    assert [message["content"] for message in found] == ["7", "7", "error: too many calls"]


def test_failures_of_a_tool_and_unknown_ones_as_configured_are_the_environments():
    with pytest.raises(OSError, match="bad luck"):
        answer(call("divide", by=13))
    with pytest.raises(LookupError, match="'search', there is calculator, lookup, divide, wide"):
        answer(call("search"), unknown="end_row")


@pytest.mark.parametrize(
    ("text", "reference", "reward"),
    [("so \\boxed{42}", "42.0", 1.0), ("\\boxed{41}", "42", 0.0), ("42", "42", 0.0), ("\\boxed{42", "42", 0.0), ("x", None, None),
     ("\\boxed{\\sin(1)^2+\\cos(1)^2}", "1", None), (f"\\boxed{{{7:01200}}}", "7", 0.0)],
)  # fmt: skip
def test_a_turn_without_a_call_ends_with_its_reward(text, reference, reward):
    row = DataRow(answer=reference)
    assert answer_reward(text, row) == reward and answer(text, row).done and answer(text, row).reward == reward


def test_what_the_student_is_shown_is_made_of_docstring_and_annotations():
    shown = environment().tools
    assert shown is not None and environment(show=False).tools is None
    assert shown[2] == {
        "type": "function",
        "function": {
            "name": "divide",
            "description": "One number by another.",
            "parameters": {
                "type": "object",
                "properties": {"by": {"type": "integer"}, "number": {"type": "number"}, "name": {"type": "string"}},
                "required": ["by"],
            },
        },
    }
    assert shown[3]["function"]["parameters"]["properties"] == {
        "keys": {"type": "array"}, "count": {"type": "integer"}, "note": {"type": "string"}, "size": {"type": "number"},
    }  # fmt: skip


def test_wrong_settings_are_one_line(tmp_path):
    with pytest.raises(InputError, match="different names"):
        ToolEnvironment([Calculator(), Calculator()])
    for wrong in ({"tools": []}, {"unknown": "raise"}, {"calls": 0}):
        with pytest.raises(InputError, match=f"ToolEnvironment.{next(iter(wrong))}"):
            ToolEnvironment(**({"tools": [Calculator()]} | wrong))
    (tmp_path / "table.json").write_text('{"a": 1}')
    for path in (tmp_path / "none.json", tmp_path / "table.json"):
        with pytest.raises(InputError, match=r"LookUp.entries"):
            LookUp(str(path))
    (tmp_path / "table.json").write_text('{"a": "1"}')
    assert LookUp(str(tmp_path / "table.json")).call("a") == "1"


def test_half_a_character_in_a_call_is_told_as_a_whole_one():
    """No tokenizer reads half a one, and JSON can spell it."""
    said = '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
    answer = ToolEnvironment([Calculator()]).step(Episode(DataRow()), Response(said, ()))
    assert answer.observation == [{"role": "tool", "content": "error: no tool ?"}]


# -- prompts that show tools -------------------------------------------------------------------------------------------

HERMES = (
    "{% if tools %}<user>{% for tool in tools %}{{ tool | tojson }} {% endfor %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.name }}={{ call.function.arguments | tojson }}{% endfor %}<eos>"
    "{% else %}<user>{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = [{"name": "add", "description": "a sum", "parameters": {"type": "object"}}]


def hermes(template: str = HERMES) -> Any:
    letters = tiny.LETTERS + '{}":,[]_<>|'
    built = tiny.tokenizer(letters, rows=80)
    built.chat_template = template
    return built


def rows(tmp_path: Any, *content: dict[str, Any]) -> list[Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return read_prompts(str(path))


CONVERSATION = [
    {"role": "user", "content": "add 1"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "x1", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "name": "add", "tool_call_id": "x1", "content": "1"},
]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [{"type": "function", "function": TOOLS[0]}]])
def test_rows_with_tools_calls_and_results_are_rendered_as_the_template_would(tmp_path, tools):
    (row,) = rows(tmp_path, {"messages": CONVERSATION, "tools": tools})
    tokenizer = hermes()
    ids = PromptEncoder(tokenizer).encode(row.prompt, tools=row.tools)
    schemas = [{"type": "function", "function": TOOLS[0]}]
    called = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": [called]}, CONVERSATION[2]]
    wanted = tokenizer.apply_chat_template(messages, tools=schemas, add_generation_prompt=True, return_dict=False)
    assert ids == wanted and "add={" in tokenizer.decode(ids).replace(" ", "")


def test_the_encoders_own_tools_are_shown_where_a_row_names_none(tmp_path):
    (plain,) = rows(tmp_path, {"prompt": "add 1"})
    schemas = [{"type": "function", "function": TOOLS[0]}]
    encoder = PromptEncoder(hermes(), tools=schemas)
    assert encoder.encode(plain.prompt, tools=plain.tools) == PromptEncoder(hermes()).encode(
        plain.prompt, tools=schemas
    )


def test_a_text_in_a_prompt_with_tools_stays_text(tmp_path):
    (row,) = rows(tmp_path, {"prompt": "<eos>1", "tools": TOOLS})
    tokenizer = hermes()
    ids = PromptEncoder(tokenizer).encode(row.prompt, tools=row.tools)
    assert tokenizer.eos_token_id not in ids and ids.count(tokenizer.convert_tokens_to_ids("<user>")) == 2


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"prompt": "a", "tools": TOOLS}, HERMES.replace("{{ tool | tojson }}", ""), "does not render the tool 'add'"),
        ({"messages": CONVERSATION}, HERMES.replace("{{ call.function.name }}", ""), "does not render the call of 'add'"),
        ({"prompt": "a", "tools": [{"name": "add", "description": "<eos>"}]}, HERMES, "must not hold a special token"),
        (
            {"messages": [CONVERSATION[0], {"role": "assistant", "tool_calls": [{"name": "a", "arguments": {"b": "<eos>"}}]},
                          CONVERSATION[2]]},
            HERMES, "must not hold a special token",
        ),
    ],
)  # fmt: skip
def test_tools_that_a_template_hides_or_that_spell_its_tokens_are_refused(tmp_path, row, template, message):
    (read,) = rows(tmp_path, row)
    with pytest.raises(InputError, match=message):
        PromptEncoder(hermes(template)).encode(read.prompt, tools=read.tools)
    with pytest.raises(InputError, match="tools need a chat template"):
        PromptEncoder(hermes(), False).encode("a", tools=[{"type": "function", "function": TOOLS[0]}])


def parameters(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string"} | more for name, more in properties.items()}}


WEATHER = {"name": "weather", "parameters": parameters(city={"enum": ["bern", None]}) | {"required": ["city"]}}
CALC = {"type": "function", "function": {"name": "calc", "parameters": parameters(expression={})}}


def used(calls: list[dict[str, Any]], tools: Any, **more: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    return {
        "messages": [{"role": "user", "content": "go"}, said, {"role": "tool", "content": "1"}],
        "tools": tools,
    } | more


USES = [
    used(
        [{"id": "x1", "type": "function", "function": {"name": "weather", "arguments": {"city": "bern"}}}],
        [WEATHER, CALC],
    ),
    used([{"name": "calc", "arguments": {"expression": "1"}}, {"name": "weather", "arguments": {}}], [CALC]),
    used([{"name": "calc", "arguments": {"expression": "1"}}], None, note="x"),
]
AS_TEXT = [
    used([{"name": "calc", "arguments": json.dumps({"expression": None})}], json.dumps([WEATHER | {"strict": None}])),
    used([{"name": "weather", "arguments": "{}", "id": "x1"}], json.dumps([CALC])),
]


@pytest.mark.parametrize("content", [USES, AS_TEXT])
def test_tools_and_calls_are_the_same_from_arrow_as_from_json_lines(tmp_path, monkeypatch, content):
    """Arrow gives every object of a column the keys of all; text keeps the nulls that were written."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    wanted = [(row.prompt, row.tools) for row in rows(tmp_path, *content)]
    table = pytest.importorskip("pyarrow").Table.from_pylist(content)
    __import__("pyarrow.parquet").parquet.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "folder" / "train.jsonl")
    for name in ("rows.parquet", "saved", "folder"):
        assert [(row.prompt, row.tools) for row in read_prompts(str(tmp_path / name))] == wanted, name
    if content is USES:
        assert wanted[1][0][1]["tool_calls"][0]["function"]["arguments"] == {"expression": "1"}
        assert "enum" not in str(wanted[1][1]) and wanted[2][1] is None
    else:
        assert "None" in str(wanted[0])


def test_a_null_in_tools_and_calls_of_json_lines_stays(tmp_path):
    tool = {"name": "add", "parameters": {"properties": {"a": {"default": None}}}}
    (row,) = rows(tmp_path, used([{"name": "add", "arguments": {"a": None}}], [tool]))
    assert row.tools == [{"type": "function", "function": tool}]
    assert row.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "tools": [{"description": "no name"}]},
            "rows.jsonl:1: tool 0 must be a JSON schema with a `name`",
        ),
        ({"messages": [CONVERSATION[0], {"role": "assistant", "tool_calls": 3}]}, "message 1 .*must be a list"),
        (
            {"messages": [CONVERSATION[0], {"role": "assistant", "tool_calls": [{"name": 3}]}]},
            "call 0 must be an object",
        ),
        (
            {"messages": [CONVERSATION[0], {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}]},
            "`arguments` must hold JSON",
        ),
    ],
)
def test_broken_tools_and_calls_are_named_by_row(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        rows(tmp_path, row)


def test_results_of_tools_follow_an_answer_as_the_template_writes_them():
    tokenizer = hermes()
    found = Following(PromptEncoder(tokenizer)).ids(
        ("user",), [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}], closing=tokenizer.eos_token_id
    )
    assert tokenizer.convert_ids_to_tokens(found) == ["<user>", "1", "<user>", "2", "<assistant>"]


def test_a_name_beside_a_result_can_write_no_control_token():
    template = HERMES.replace("<user>{{ message.content }}", "<user>{{ message.name }}{{ message.content }}")
    result = [{"role": "tool", "name": "<eos>", "content": "1"}]
    with pytest.raises(InputError, match=r"beside its content, got '<eos>'"):
        Following(PromptEncoder(hermes(template))).ids(("user",), result, closing=None)
    trusting = Following(PromptEncoder(hermes(template), special_tokens_in_text="allow"))
    assert hermes().eos_token_id in trusting.ids(("user",), result, closing=None)
