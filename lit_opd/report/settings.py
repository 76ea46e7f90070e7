"""Settings of a config as text."""

from __future__ import annotations

from typing import Any


def in_words(given: Any) -> str:
    """A class with its arguments as one writes it in Python: ``ImportanceWeighting(w_max=4)``."""
    if isinstance(given, list):
        return f"[{', '.join(map(in_words, given))}]"
    if not isinstance(given, dict) or "class_path" not in given:
        return str(given)
    arguments = ", ".join(f"{name}={in_words(value)}" for name, value in (given.get("init_args") or {}).items())
    name = str(given["class_path"]).rsplit(".", 1)[-1]
    return f"{name}({arguments})" if arguments else name


def setting(config: Any, key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    value = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def class_name(config: Any, key: str) -> str:
    """The class of a setting without its arguments; empty where there is none."""
    value = setting(config, key)
    path = value.get("class_path") if isinstance(value, dict) else value
    return str(path).rsplit(".", 1)[-1] if path else ""
