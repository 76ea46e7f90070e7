"""Secrets out of what is printed or saved: passwords in addresses, and values of environment variables that hold keys."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

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
    for value in secrets():
        text = text.replace(value, "***")
    return _USERINFO.sub("***@", text)


def with_references(config: str) -> str:
    """A YAML text to be saved, secrets from the environment as ``${oc.env:NAME}``, so that it runs again."""
    for value, name in secrets().items():
        config = config.replace(value, f"${{oc.env:{name}}}")
    return _USERINFO.sub("***@", config)


def one_line(text: str) -> str:
    """``text`` for one line of a screen: redacted, white space collapsed, control and direction characters written out."""
    line = " ".join(redacted(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
