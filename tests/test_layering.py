"""The rooms of docs/design.md: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room -> rooms it may import; a room is a module or a package of lit_opd
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "streams": set(),
    "server": {"types", "distributed"},
    "masked": {"types"},
    "redaction": set(),
    "parse_errors": {"redaction"},
    "distributed": {"types"},
    "prompts": {"types", "distributed"},  # with its helpers prompt_*.py
    "models": {"types"},
    "lazy": {"types"},
    "sharding": {"types", "models"},
    "checkpoints": {"types", "shard_index"},
    "changed_options": set(),
    "shard_index": {"types"},
    "faults": {"types", "distributed"},
    "checkpoint_files": {"types", "distributed", "shard_index"},
    "tiles": {"types"},
    "scoring": {"types", "tiles"},
    "rollout": {"types", "masked", "models", "distributed", "streams", "server"},
    "teacher": {"types", "models", "lazy", "scoring", "sharding", "server"},
    "advantage": {"types", "masked", "weighting"},
    "weighting": {"types", "masked", "distributed", "streams"},
    "objective": {"types", "masked", "tiles"},
    "metrics": {"masked"},
    "grading": {"types"},  # for an error; its workers import nothing
    "evaluation": {"prompts", "metrics", "grading", "types", "distributed", "faults"},
}
BELOW_MODULE = set(ALLOWED)
ALLOWED["step"] = BELOW_MODULE | {"module"}  # for annotations only, see the test below
ALLOWED["module"] = BELOW_MODULE | {"step"}
ALLOWED["testbed"] = BELOW_MODULE
ALLOWED["logs"] = {"types", "report"}
ALLOWED["wandb_run"] = {"distributed"}
ALLOWED["report"] = {"types"}
ALLOWED["preflight"] = BELOW_MODULE
ALLOWED["compare"] = BELOW_MODULE | {"step", "module", "report"}
ALLOWED["trainer"] = {"preflight", "checkpoint_files", "types"}
ALLOWED["cli"] = (
    {"logs", "wandb_run", "redaction", "parse_errors"}
    | BELOW_MODULE
    | {"step", "module", "testbed", "preflight", "trainer", "report", "compare"}
)
ALLOWED["__init__"] = set()
CALLBACKS = {"types", "distributed", "checkpoint_files", "metrics", "evaluation", "prompts", "report"}


def imports(path: Path) -> set[str]:
    """Dotted names of every import in a file, those for annotations and inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""}
    return found


def room(name: str) -> str:
    return "prompts" if name.startswith("prompt_") else name


def rooms(names: set[str]) -> set[str]:
    return {room(name.split(".")[1]) for name in names if name.startswith("lit_opd.")}


def room_of(path: Path) -> str:
    return room(path.relative_to(ROOT / "lit_opd").parts[0].removesuffix(".py"))


@pytest.mark.parametrize("path", sorted((ROOT / "lit_opd").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_room_imports_only_what_the_table_allows(path):
    own = room_of(path)
    assert own in ALLOWED, f"add the room {own} to the table"
    assert rooms(imports(path)) - {own} <= ALLOWED[own]


def test_lit_opd_never_imports_callbacks():
    for path in (ROOT / "lit_opd").rglob("*.py"):
        assert not any(name.split(".")[0] == "callbacks" for name in imports(path)), path


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=lambda p: p.name)
def test_callbacks_see_records_and_metrics_only(path):
    assert rooms(imports(path)) <= CALLBACKS


def test_only_the_client_of_servers_imports_httpx():
    """So nothing that the table keeps away from it loads it, such as what writes checkpoints."""
    found = {room_of(path) for path in (ROOT / "lit_opd").rglob("*.py") if "httpx" in imports(path)}
    assert found == {"server"} and not any("httpx" in imports(path) for path in (ROOT / "callbacks").glob("*.py"))


def test_the_update_imports_the_module_for_annotations_only():
    tree = ast.parse((ROOT / "lit_opd" / "step.py").read_text())
    top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert "lit_opd.module" not in top
