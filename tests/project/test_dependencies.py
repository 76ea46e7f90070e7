"""Every package that is imported is declared in setup.cfg, and every promise there can be proven."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools.config.setupcfg import read_configuration

from benchmarks.versions.sets import CORE, declared, lower_bound, lowest_python

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = [ROOT / "train.py", *(ROOT / "lit_opd").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
OURS = {"lit_opd", "callbacks", "__main__"}
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the import has another name than the package
UPPER_BOUNDS = ("lightning", "jsonargparse", "transformers", "wandb")  # private names or the words of messages are read
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}
ONLY_WITH = {  # loaded where the extra is there alone: by the grading worker, and by a head on CUDA
    "lit_opd/answers/mathematics.py": "eval",
    "lit_opd/scoring/kernels/rows.py": "cuda",
}
REQUIREMENTS = declared(ROOT / "setup.cfg")


def names(node: ast.AST) -> list[str]:
    """Modules that a statement or a call imports, or looks for, by a name that stands in it."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "find_spec", "__import__")):
        return [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
    return []


def imported(source: str, *, when_loaded: bool) -> set[str]:
    """Packages outside the standard library and the project that a file imports.

    Args:
        source: of the file.
        when_loaded: only those without which it cannot be imported: none inside a function or a type-checking block.
    """

    def inner(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            waits = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checks = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (when_loaded and (waits or checks)):
                yield from inner(child)

    found = {name.split(".")[0] for node in inner(ast.parse(source)) for name in names(node)}
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in found - OURS - set(sys.stdlib_module_names)}


def required(extras: set[str]) -> set[str]:
    """Canonical names of what some extras declare."""
    return {canonicalize_name(part.name) for extra in extras for part in REQUIREMENTS[extra]}


def test_imports_are_seen_wherever_they_stand():
    source = (
        "import os, numpy.linalg\nfrom yaml import safe_load\nclass A:\n    import rich\n    def f(self):\n"
        "        from math_verify import parse\n        importlib.util.find_spec('gguf')\n"
        "if TYPE_CHECKING:\n    import jinja2\nfrom lit_opd import types\n"
    )
    assert imported(source, when_loaded=True) == {"numpy", "pyyaml", "rich"}
    assert imported(source, when_loaded=False) == {"numpy", "pyyaml", "rich", "math-verify", "gguf", "jinja2"}


def test_what_is_needed_to_load_the_product_comes_with_every_installation():
    always = [path for path in PRODUCT if path.relative_to(ROOT).as_posix() not in ONLY_WITH]
    needed = {name for path in always for name in imported(path.read_text(), when_loaded=True)}
    assert {"torch", "numpy", "pyyaml", "safetensors", "tokenizers"} <= needed
    assert needed - required({CORE}) == set()


def test_what_is_imported_on_the_way_is_declared_too():
    needed = {name for path in PRODUCT for name in imported(path.read_text(), when_loaded=False)}
    assert needed - required(set(REQUIREMENTS) - {"dev"}) == set()


def test_nothing_is_declared_for_every_installation_that_nothing_imports():
    needed = {name for path in PRODUCT for name in imported(path.read_text(), when_loaded=False)}
    assert required({CORE}) - needed == set()


@pytest.mark.parametrize(
    "requirement", [part for extra, parts in REQUIREMENTS.items() if extra != "smollm2" for part in parts], ids=str
)
def test_a_requirement_has_a_lower_bound_that_it_admits(requirement):
    assert Version(lower_bound(requirement)) in requirement.specifier


@pytest.mark.parametrize("name", UPPER_BOUNDS)
def test_a_package_whose_private_names_or_words_are_read_has_an_upper_bound(name):
    (requirement,) = (part for part in REQUIREMENTS[CORE] if part.name == name)
    assert not requirement.specifier.contains("999")


def test_malicious_releases_are_excluded():
    for name, versions in MALICIOUS.items():
        (requirement,) = (part for part in REQUIREMENTS[CORE] if part.name == name)
        assert not any(requirement.specifier.contains(version) for version in versions)


def test_the_lock_is_inside_the_bounds_and_pins_the_cpu_build_of_torch():
    lines = (ROOT / "requirements.lock").read_text().split()
    locked = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    assert locked["torch"] == "2.13.0"
    for part in (part for extra in (CORE, "eval", "data", "lora", "dev") for part in REQUIREMENTS[extra]):
        assert Requirement(str(part)).specifier.contains(locked[canonicalize_name(part.name)]), part
    assert lowest_python(ROOT / "setup.cfg") == "3.11"


def test_the_lock_of_the_tests_pins_what_its_extras_declare_inside_their_bounds_and_nothing_of_the_other_lock():
    lines = [Requirement(line) for line in (ROOT / "requirements-test.lock").read_text().splitlines()]
    locked = {canonicalize_name(line.name): line for line in lines}
    assert len(locked) == len(lines)
    for line in lines:
        (exact,) = line.specifier
        assert exact.operator == "=="
    for part in (part for extra in ("cuda", "docs", "notebook") for part in REQUIREMENTS[extra]):
        line = locked[canonicalize_name(part.name)]
        assert all(part.specifier.contains(exact.version) for exact in line.specifier) and part.marker == line.marker
    others = (ROOT / "requirements.lock").read_text().split()
    assert not locked.keys() & {canonicalize_name(other.split("==")[0]) for other in others if "==" in other}


def test_setuptools_reads_every_requirement_as_it_is_written():
    """A single line with a semicolon is cut there: the installation would end with an error."""
    options = read_configuration(ROOT / "setup.cfg")["options"]
    found = {CORE: options["install_requires"], **options["extras_require"]}
    assert {name: sorted(map(str, map(Requirement, lines))) for name, lines in found.items()} == {
        name: sorted(map(str, parts)) for name, parts in REQUIREMENTS.items()
    }
