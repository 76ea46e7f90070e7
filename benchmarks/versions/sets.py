"""Sets of versions, made from ``setup.cfg`` itself, so that what is proven and what is promised cannot drift apart."""

from __future__ import annotations

from collections.abc import Mapping
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

CORE = ""  # what is always installed, beside the extras
TESTED_EXTRAS = ("eval", "data", "lora")
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis", "packaging")  # of the extra "dev", at any version
MEASURED = {"torch": "2.11.0", "transformers": "5.17.0", "lightning": "2.6.6"}  # the GPU machine of docs/verified.md
_BELOW = ("<", "<=", "~=")


@dataclass(frozen=True)
class Set:
    """Versions to install together.

    Args:
        name: of the environment.
        python: "3.11", the interpreter it is built with.
        lines: requirements, one a line, as pip takes them.
    """

    name: str
    python: str
    lines: tuple[str, ...]


def declared(setup_cfg: Path) -> dict[str, list[Requirement]]:
    """Requirements by extra, those of every installation under ``CORE``."""
    parser = _parser(setup_cfg)
    found = {CORE: _requirements(parser["options"]["install_requires"])}
    return found | {extra: _requirements(text) for extra, text in parser["options.extras_require"].items()}


def _parser(setup_cfg: Path) -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.read_string(setup_cfg.read_text(encoding="utf-8"))
    return parser


def _requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def lowest_python(setup_cfg: Path) -> str:
    """Of ``python_requires``."""
    return _lower_bound("python", SpecifierSet(_parser(setup_cfg)["options"]["python_requires"]))


def lower_bound(requirement: Requirement) -> str:
    """The lowest version that a requirement admits.

    Raises:
        ValueError: it names none, so nothing could prove it.
    """
    return _lower_bound(requirement.name, requirement.specifier)


def _lower_bound(name: str, specifier: SpecifierSet) -> str:
    bounds = [Version(part.version) for part in specifier if part.operator in (">=", "==", "~=")]
    if not bounds:
        raise ValueError(f"`{name}` must have a lower bound (>=), got {specifier or 'no bound'}")
    lowest = max(bounds)
    if not specifier.contains(lowest, prereleases=True):
        raise ValueError(f"`{name}` must admit its own lower bound {lowest}, got {specifier}")
    return str(lowest)


def pinned(requirement: Requirement, version: str) -> str:
    """The requirement at exactly ``version``; its extras stay."""
    return str(_with(requirement, SpecifierSet(f"=={version}")))


def unbounded(requirement: Requirement) -> str:
    """The requirement without its upper bounds, so that a new release is tried; excluded versions stay excluded."""
    kept = [str(part) for part in requirement.specifier if part.operator not in _BELOW]
    return str(_with(requirement, SpecifierSet(",".join(kept))))


def _with(requirement: Requirement, specifier: SpecifierSet) -> Requirement:
    changed = Requirement(str(requirement))
    changed.specifier = specifier
    return changed


def above_bounds(setup_cfg: Path, installed: Mapping[str, str]) -> list[str]:
    """Installed versions that ``setup.cfg`` does not admit, as "name version (bound)".

    Args:
        setup_cfg: the file.
        installed: versions by canonical name.
    """
    every = [requirement for part in declared(setup_cfg).values() for requirement in part]
    return [
        f"{requirement.name} {installed[name]} ({requirement.specifier})"
        for requirement in every
        if (name := canonicalize_name(requirement.name)) in installed
        and not requirement.specifier.contains(installed[name], prereleases=True)
    ]


def sets(setup_cfg: Path) -> dict[str, Set]:
    """The sets by name: "lowest", "measured" and "newest", each on a Python of its own."""
    parts = declared(setup_cfg)
    ours = [requirement for part in (CORE, *TESTED_EXTRAS) for requirement in parts[part]]
    tools = [str(requirement) for requirement in parts["dev"] if requirement.name in TEST_TOOLS]
    lowest = [pinned(requirement, lower_bound(requirement)) for requirement in ours]
    measured = [pinned(r, MEASURED[r.name]) if r.name in MEASURED else str(r) for r in ours]
    newest = [unbounded(requirement) for requirement in ours]
    return {
        "lowest": Set("lowest", lowest_python(setup_cfg), (*lowest, *tools)),
        "measured": Set("measured", "3.12", (*measured, *tools)),
        "newest": Set("newest", "3.13", (*newest, *tools)),
    }
