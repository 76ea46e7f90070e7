"""What jsonargparse says about wrong arguments, in one line: key, value, what is allowed, the nearest valid name.

Its own messages are lists of everything that was tried. They are read here as text; what is not recognised stays, on one
line.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lit_opd.cli.redaction import one_line
from lit_opd.shipped import program

USAGE_ERROR = 2
_SHOWN = 120  # characters of a value
_KNOWN = 6  # classes listed where no name is near
_HELP = f"{program()} fit --help all lists all settings"

_KEY = re.compile(r'^(?P<indent>[ -]*).*?Parser key "(?P<key>[^"]*)"(?: element \d+)?:', re.M)
_GIVEN = re.compile(r"(?:Given value: |Got value: )(?P<value>.*?)(?:\. Got value: |$)", re.M)
_NESTED = re.compile(r"NestedArg\(key='(?P<key>[^']*)', val=(?P<value>.*)\)$")
_UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: (?P<name>\S+) ?(?P<value>.*)", re.S)
_UNKNOWN_KEY = re.compile(
    r"(?:Subcommand '(?P<command>[^']*)'|Group '(?P<group>[^']*)') does not accept option '(?P<key>[^']*)'"
)
_UNKNOWN_OPTION = re.compile(r"Option '(?P<key>[^']*)' is not accepted")
_REQUIRED = re.compile(r"the following arguments are required: (?P<keys>[^\n]*?)(?:\. Got value|$)", re.M)
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']*)'")
_BASE = re.compile(r"(?:<class '|list\[)(?P<path>[\w.]+)")
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (?P<a>\S+)|No module named (?P<b>\S+)|(?P<c>module \S+ has no attribute \S+?)(?:\.|$)"
    r"|(?:Import path )?(?P<d>\S+)? ?does not correspond to a subclass of|(?P<e>Not a valid subclass of)",
    re.M,
)  # fmt: skip
_EXPECTED = re.compile(r"Expected an? (?P<kind><class '[\w.]+'>|typing\.Literal\[.*?\])(?=\.|$|\s)", re.M)
_ARGUMENT = re.compile(r"argument (?P<name>--[\w.]+)(?:/\S+)?: (?P<what>.*)", re.S)
_CHOICE = re.compile(r"invalid choice: (?P<value>'[^']*') \(choose from (?P<choices>.*)\)", re.S)
_YAML = re.compile(r"Problems parsing config: (?P<what>.*)", re.S)
_NO_MAPPING = re.compile(r"Unexpected config: (?P<what>.*)", re.S)
_NAMES = {
    "NoneType": "null", "str": "text", "int": "a whole number", "float": "a number", "bool": "true or false",
    "dict": "a mapping", "list": "a list",
}  # fmt: skip


class OneLineParser(LightningArgumentParser):
    """Lightning's parser; wrong arguments end with one line on standard error and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message's one-line form and exit."""
        if not self.exit_on_error:  # a parser inside a parser: the outer one prints
            super().error(message, ex)
        print(f"error: {explained(message, self)}", file=sys.stderr)
        self.exit(USAGE_ERROR)
        raise AssertionError  # exit does not return


def explained(message: str, parser: Any) -> str:
    """One line for a message of jsonargparse.

    Args:
        message: what it said.
        parser: whose options are looked through for the nearest name.
    """
    for form in (_unknown_argument, _unknown_key, _choice, _argument, _file):
        found = form(message, parser)
        if found is not None:
            return one_line(found)
    return one_line(_about_key(message, parser))


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; the nearest is X", the help where nothing is near."""
    found = get_close_matches(name, sorted(set(names)), n=1, cutoff=0.6)
    return f"; the nearest is {found[0]}" if found else "; " + _HELP


# -- the forms ---------------------------------------------------------------------------------------------------------


def _unknown_argument(message: str, parser: Any) -> str | None:
    match = _UNKNOWN_ARGUMENT.search(message)
    if match is None:
        return None
    name, _, value = match["name"].partition("=")
    got = _short(value or match["value"])
    if not name.startswith("-"):
        return f"`{name}` is no setting: arguments must be --key value{', got ' + got if got else ''}; {_HELP}"
    return f"`{name}` is no setting{', got ' + got if got else ''}{nearest(name, _options(parser))}"


def _unknown_key(message: str, parser: Any) -> str | None:
    match = _UNKNOWN_KEY.search(message)
    if match is None:
        return None
    key = ".".join(filter(None, [match["group"], match["key"]]))
    return f"`{key}` is no setting{nearest(key, [name.removeprefix('--') for name in _options(parser)])}"


def _choice(message: str, parser: Any) -> str | None:
    match = _CHOICE.search(message)
    return match and f"the command must be one of {match['choices']}, got {match['value']}"


def _argument(message: str, parser: Any) -> str | None:
    match = _ARGUMENT.match(message)
    return match and f"`{match['name']}`: {match['what']}; {_HELP}"


def _file(message: str, parser: Any) -> str | None:
    if match := _YAML.search(message):
        what = match["what"].replace('in "<unicode string>", ', "at ")
        return f"`--config` must be YAML, got {what}; correct the file"
    if match := _NO_MAPPING.search(message):
        return f"`--config` must be a YAML mapping of settings, got {_short(match['what']) or 'an empty file'}; write key: value"
    return None


def _about_key(message: str, parser: Any) -> str:
    key, value, owner = _key(message), _value(message), _class(message)
    if match := _NESTED.match(value):
        key, value = key if key.endswith(f".{match['key']}") else f"{key}.{match['key']}", match["value"]
    if match := _UNKNOWN_OPTION.search(message):
        name = match["key"]
        key = key if key.endswith(f".{name}") else ".".join(filter(None, [key, name]))
        return f"`{key}` is no setting{_of(owner)}, got {_short(value)}{nearest(name, _parameters(owner))}"
    if match := _REQUIRED.search(message):
        names = [".".join(filter(None, [key, name.removeprefix("fit.")])) for name in match["keys"].split(", ")]
        return f"`{', '.join(names)}` must be given, got nothing: there is no default; {_HELP}"
    if not key:
        return message
    if allowed := _allowed(message):
        return f"`{key}` must be {' or '.join(allowed)}, got {_short(value) or 'an empty text'}; {_HELP}"
    if match := _NO_CLASS.search(message):
        return _no_class(message, key, value, match)
    return f"`{key}`: {message.partition(':')[2]}; {_HELP}"


def _no_class(message: str, key: str, value: str, match: re.Match[str]) -> str:
    base, got = _base(message), _short(value)
    wanted = f"name a {base.__name__}" if base is not None else "name a class or function that can be imported"
    reason = f" ({one_line(match[0])})" if match["b"] or match["c"] else ""
    known = sorted({cls.__name__ for cls in _subclasses(base)}) if base is not None else []
    found = get_close_matches(got.rpartition(".")[2], known, n=1)
    remedy = f"the nearest is {found[0]}" if found else "give a class path"
    if (base.__name__ if base is not None else "", got.rpartition(".")[2]) == ("AdvantageTransform", "Divergence"):
        remedy = "as a detached advantage a divergence has an expected gradient of zero, set `model.objective` to it"
    elif known and not found:
        remedy = f"give one of {', '.join(known[:_KNOWN])}, ... or the class path of your own"
    return f"`{key}` must {wanted}, got {got}{reason}; {remedy}"


# -- parts of a message ------------------------------------------------------------------------------------------------


def _key(message: str) -> str:
    """The keys of nested parsers, outer first, joined; of alternatives the first."""
    parts: list[str] = []
    depth = -1
    for match in _KEY.finditer(message):
        if len(match["indent"]) > depth or not parts:
            parts.append(match["key"])
            depth = len(match["indent"])
    return ".".join(parts)


def _value(message: str) -> str:
    """The innermost value: it is reported first."""
    match = _GIVEN.search(message)
    return match["value"].strip() if match else ""


def _class(message: str) -> str:
    """The innermost class whose arguments were read."""
    found = _CLASS.findall(message)
    return found[-1] if found else ""


def _of(owner: str) -> str:
    return f" of {owner.rpartition('.')[2]}" if owner else ""


def _allowed(message: str) -> list[str]:
    """What the alternatives of the innermost key expect, in words; empty where only null would do beside a class."""
    words = dict.fromkeys(_words(match["kind"]) for match in _EXPECTED.finditer(_innermost(message)))
    return [] if set(words) <= {"null"} else list(words)


def _innermost(message: str) -> str:
    """The lines about the last key: those that are indented more than its own line."""
    keys = list(_KEY.finditer(message))
    if not keys:
        return message
    depth, kept = len(keys[-1]["indent"]), []
    for line in message[keys[-1].end() :].splitlines():
        if line.strip() and len(line) - len(line.lstrip()) <= depth:
            break
        kept.append(line)
    return "\n".join(kept)


def _words(kind: str) -> str:
    if kind.startswith("typing.Literal["):
        choices = ast.literal_eval(kind.removeprefix("typing.Literal"))
        return f"one of {', '.join(map(str, choices))}"
    name = kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return _NAMES.get(name, name)


def _base(message: str) -> type | None:
    """The class of which the key takes subclasses, as far as the message names it."""
    for match in _BASE.finditer(message):
        module, _, name = match["path"].rpartition(".")
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type) and module not in ("", "builtins"):
            return found
    return None


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        if not cls.__name__.startswith("_"):
            yield cls
        yield from _subclasses(cls)


def _parameters(path: str) -> list[str]:
    """Argument names of a class that was imported already."""
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return list(inspect.signature(cls).parameters) if isinstance(cls, type) else []


def _options(parser: Any) -> set[str]:
    """All option strings of a parser and its subcommands."""
    found = set()
    for action in parser._actions:
        found |= {option for option in action.option_strings if option.startswith("--")}
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            found |= _options(inner)
    return found


def _short(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
