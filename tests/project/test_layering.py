"""The rooms of docs/design.md: who imports whom. The table is exact: what it allows is what is used."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room -> rooms it imports, from the ground up: a room stands below every room that imports it
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "answers": set(),
    "masked": set(),
    "streams": set(),
    "types": {"errors", "masked"},
    "files": {"errors"},
    "distributed": {"errors"},
    "lists": {"types"},
    "batchwise": {"masked", "distributed"},
    "hub": {"errors"},
    "shipped": set(),
    "one_name": set(),
    "prompts": {"types", "errors", "answers", "streams", "distributed", "hub", "shipped"},
    "models": {"errors", "files", "distributed", "hub"},
    "scoring": {"types", "errors", "masked"},
    "servers": {"errors", "distributed"},
    "saved_steps": {"types", "errors", "files"},
    "rollout": {"saved_steps", "types", "errors", "masked", "streams", "distributed", "servers", "scoring"},
    "turns": {"types", "errors", "answers", "distributed", "prompts", "rollout"},
    "teacher": {"types", "errors", "distributed", "models", "scoring", "servers"},
    "advantage": {"types", "errors", "masked", "batchwise"},
    "weighting": {"types", "errors", "masked", "streams", "distributed", "lists", "batchwise"},
    "objective": {"types", "errors", "masked", "scoring"},
    "step": {
        "types", "errors", "masked", "streams", "files", "distributed", "models", "scoring", "teacher", "advantage", "weighting",
        "objective",
    },
    "evaluation": {"types", "errors", "files", "answers", "masked", "streams", "distributed", "prompts", "rollout"},
    "run": {"errors", "files", "distributed", "models"},
    "preflight": {
        "types", "errors", "distributed", "shipped", "servers", "prompts", "models", "scoring", "rollout", "teacher", "advantage",
        "objective", "step", "evaluation", "run",
    },
    "module": {
        "types", "errors", "distributed", "prompts", "models", "scoring", "rollout", "teacher", "advantage", "weighting",
        "objective",
        "step", "evaluation", "run", "preflight",
    },
    "report": {"saved_steps", "types", "errors", "files", "shipped", "masked", "evaluation"},
    "compare": {
        "types", "errors", "files", "shipped", "masked", "models", "scoring", "teacher", "weighting", "objective", "step",
        "evaluation", "preflight", "report",
    },
    "testbed": {"errors", "files", "shipped", "prompts", "turns"},
    "cli": {
        "errors", "files", "distributed", "shipped", "prompts", "models", "scoring", "rollout", "run", "preflight", "module",
        "report", "compare",
    },
    "sweep": {"errors", "files", "shipped", "run", "compare", "report", "cli"},
    "callbacks": {
        "types", "errors", "files", "distributed", "lists", "shipped", "one_name", "prompts", "evaluation", "run", "report",
    },
    "__main__": {"errors", "shipped", "callbacks", "cli", "sweep"},
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every file of the library and of the callbacks, which have their name inside it, by its dotted name."""
    found = {}
    for root in (ROOT, ROOT / "callbacks"):
        for path in (root / "lit_opd" if root == ROOT else root).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if root == ROOT else ("lit_opd", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def nodes(path: Path) -> tuple[ast.Import | ast.ImportFrom | ast.Attribute, ...]:
    """Imports and attributes anywhere in a file."""
    kinds = ast.Import | ast.ImportFrom | ast.Attribute
    return tuple(node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))


def imports(path: Path) -> set[str]:
    """Files that a file imports by name, for annotations and inside functions too; ``from lit_opd import x`` is ``lit_opd.x``."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= named & MODULES.keys() or {node.module}
    return found & MODULES.keys()


@cache
def graph() -> dict[str, set[str]]:
    """What every module imports of the others."""
    return {name: imports(path) - {name} for name, path in MODULES.items()}


def room(name: str) -> str:
    """The package or single file of ``lit_opd`` that holds a module."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def used(own: str) -> set[str]:
    """Rooms that a room imports."""
    return {room(there) for name, names in graph().items() if room(name) == own for there in names} - {own, "lit_opd"}


def test_the_graph_sees_imports_of_every_form(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(
        "from lit_opd import distributed\nfrom lit_opd.types import Rollout\nimport lit_opd.files\n"
        "def f():\n    from lit_opd.run import lightning as inner\n"
    )
    expected = {"lit_opd.distributed", "lit_opd.types", "lit_opd.files", "lit_opd.run.lightning"}
    assert imports(file) == expected


@pytest.mark.parametrize("own", sorted(ALLOWED))
def test_a_room_imports_what_the_table_says_and_the_table_no_more(own):
    assert used(own) == ALLOWED[own]


def test_every_room_is_in_the_table():
    assert {room(name) for name in MODULES} - {"lit_opd"} == set(ALLOWED)


def test_the_table_of_the_design_page_has_every_room_in_this_order():
    """Its rows: what a room imports stands in its own row or above it."""
    table = (ROOT / "docs" / "design.md").read_text().split("\n## Rooms\n")[1].split("\n## ")[0]
    rows = [re.findall(r"`(\w+)(?:/|\.py)`", row) for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M)]
    place = {name: number for number, row in enumerate(rows) for name in row}
    assert set(place) - {"lit_opd"} == set(ALLOWED)
    assert [(own, there) for own in ALLOWED for there in ALLOWED[own] if place[there] > place[own]] == []


def test_no_arrow_points_back_up():
    order = list(ALLOWED)
    assert [(own, there) for own in order for there in ALLOWED[own] if order.index(there) > order.index(own)] == []


def test_no_two_files_import_each_other_by_any_way():
    below: dict[str, set[str]] = {}

    def reached(name: str, path: tuple[str, ...]) -> set[str]:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in below:
            below[name] = graph()[name].union(*(reached(there, (*path, name)) for there in graph()[name]))
        return below[name]

    for name in graph():
        reached(name, ())
    assert all(name not in found for name, found in below.items())


def test_no_file_asks_its_package_for_what_a_neighbour_defines():
    """Where the package's own ``__init__`` imports that file, it is half made by then; the neighbour is not."""
    for name, path in MODULES.items():
        for node in nodes(path):
            package = node.module if isinstance(node, ast.ImportFrom) else None
            assert name not in graph().get(package or "", ()), f"{path}:{node.lineno}: from {package} import ..."


def test_lit_opd_never_imports_callbacks():
    """But for the file that starts the command line with them."""
    others = [name for name in MODULES if room(name) not in ("callbacks", "__main__")]
    assert not any(room(there) == "callbacks" for name in others for there in graph()[name])


def test_one_file_knows_the_private_names_of_lightning():
    """The attributes of the trainer, its loops, connectors and strategies that begin with an underscore."""
    owners = ("trainer", "strategy", "loop", "fit_loop", "epoch_loop", "launcher", "connector", "lightning_module")
    for name, path in MODULES.items():
        if name == "lit_opd.run.lightning":
            continue
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                assert owner not in owners, f"{path}:{node.lineno}: {owner}.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
                assert not any(alias.name.startswith("_") for alias in node.names), f"{path}:{node.lineno}"


def test_writing_a_checkpoint_loads_no_client_of_servers():
    """What a file reaches when it is imported, through every package on the way."""
    seen, waiting = set(), ["lit_opd.run.checkpoint_files"]
    while waiting:
        name = waiting.pop()
        if name not in seen and name in graph():
            seen.add(name)
            waiting += [*graph()[name], name.rpartition(".")[0]]
    assert not any(room(name) in ("servers", "teacher", "module") for name in seen)


def test_only_the_client_of_servers_speaks_http():
    """Nothing else opens a connection of its own: one place decides on time, size and redirects."""
    for name, path in MODULES.items():
        named = {node.module or "" for node in nodes(path) if isinstance(node, ast.ImportFrom)}
        named |= {a.name for node in nodes(path) if isinstance(node, ast.Import) for a in node.names}
        roots = {module.split(".")[0] for module in named} | {module for module in named if module.startswith("http.")}
        assert not roots & {"httpx", "requests", "http.client", "urllib3"} or room(name) == "servers", path
