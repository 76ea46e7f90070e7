"""Secrets out of what is printed or saved: passwords in addresses, and values of environment variables that hold keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

SHORTEST = 8  # characters of a value that is looked for; shorter ones ("true", "1") stand everywhere
_SECRET_NAME = re.compile(r"(?:^|_)(?:API_?KEY|ACCESS_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:$|_)", re.I)
_USERINFO = re.compile(r"(?<=://)[^/\s'\"]*@")


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Value -> name of the environment variables whose names say that they hold a key, longest value first."""
    environment = os.environ if environment is None else environment
    held = {value: name for name, value in environment.items() if _SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return dict(sorted(held.items(), key=lambda item: len(item[0]), reverse=True))


def redacted(text: str) -> str:
    """``text`` for a screen or a log.

    >>> redacted("http://me:pass@host:8000/v1")
    'http://***@host:8000/v1'
    """
    for form in sorted({form for value in secrets() for form in _forms(value)}, key=len, reverse=True):
        text = text.replace(form, "***")
    return _USERINFO.sub("***@", text)


def _forms(value: str) -> Iterator[str]:
    """How a secret may stand in a text: as it is or as Python, JSON and YAML quote it, whole or line by line."""
    for part in {value, *map(str.strip, value.splitlines())}:
        quoted = repr(part + "'\"")[1:-4]  # with both quotes Python escapes the single one
        double = yaml.safe_dump(part, default_style='"', width=float("inf"))[1:-2]
        json_forms = [json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
        forms = [part, quoted, repr(part)[1:-1], double, part.replace("'", "''"), *json_forms]
        yield from (form for form in forms if len(form) >= SHORTEST)


def with_references(config: str) -> str:
    """A YAML text to be saved, secrets from the environment as ``${oc.env:NAME}``, so that it runs again.

    Values are replaced before they are written: YAML escapes some characters and folds long lines.
    """
    return yaml.safe_dump(plain_values(config), default_flow_style=False, allow_unicode=True, sort_keys=False)


def plain_values(config: str) -> Any:
    """What the text of ``with_references`` says, without writing it."""
    return _referenced(yaml.safe_load(config), secrets())


def _referenced(value: Any, held: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {_referenced(key, held): _referenced(item, held) for key, item in value.items()}
    if isinstance(value, list):
        return [_referenced(item, held) for item in value]
    if not isinstance(value, str):
        return f"${{oc.env:{held[str(value)]}}}" if str(value) in held else value
    for secret, name in held.items():
        value = value.replace(secret, f"${{oc.env:{name}}}")
    return _USERINFO.sub("***@", value)


def one_line(text: str) -> str:
    """``text`` for one line of a screen: redacted, white space collapsed, control and direction characters written out."""
    line = " ".join(redacted(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
