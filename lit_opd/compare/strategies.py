"""Weighting strategies from the words of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lit_opd.errors import InputError
from lit_opd.report.settings import in_words
from lit_opd.weighting import WeightingStrategy


def read_strategies(words: Sequence[str]) -> dict[str, WeightingStrategy]:
    """Strategies by the name they are shown with: the class, with arguments where some were given.

    Args:
        words: each a short name, a class path, or ``{class_path: NAME, init_args: {...}}`` in YAML or JSON.
    Raises:
        InputError: an unknown strategy or argument, or one named twice.
    """
    found: dict[str, WeightingStrategy] = {}
    for word in words:
        name, strategy = read_strategy(word)
        if name in found:
            raise InputError(f"`--strategies` must name each strategy once, got {name} twice")
        found[name] = strategy
    return found


def read_strategy(word: str) -> tuple[str, WeightingStrategy]:
    """One strategy and its name; see ``read_strategies``."""
    name, _, strategy = _read(word, "--strategies")
    return name, strategy


def read_setting(word: str, *, option: str) -> tuple[str, dict[str, Any]]:
    """The name of a strategy, as ``read_strategies`` has it, and its ``{class_path, init_args}`` with every argument.

    Args:
        word: as for ``read_strategies``.
        option: that it was given with, for errors.
    Raises:
        InputError: an unknown strategy, or a wrong argument.
    """
    name, setting, _ = _read(word, option)
    return name, setting


def _read(word: str, option: str) -> tuple[str, dict[str, Any], WeightingStrategy]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=WeightingStrategy)
    try:
        given = yaml.safe_load(word)
        parsed = parser.parse_object({"strategy": given})
        strategy = parser.instantiate_classes(parsed).strategy
        setting = yaml.safe_load(parser.dump(parsed, skip_none=False))["strategy"]
    except (ArgumentError, yaml.YAMLError, ImportError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"`{option}` must name weighting strategies, got {word!r}: {_last_line(error)}") from error
    return in_words({"class_path": given} if isinstance(given, str) else given), setting, strategy


def _last_line(error: Exception) -> str:
    """jsonargparse explains over several lines; the last one with a reason is nearest to the cause."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    return lines[-1] if lines else type(error).__name__
