"""The documentation site: links, navigation, and a reference in which no public name is missing."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import lit_opd
from lit_opd import callbacks, weighting
from lit_opd.advantage import AdvantageTransform

pytest.importorskip("mkdocs", reason="mkdocs is not installed: make test installs it from requirements-test.lock")
ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def loaded(name: str) -> ModuleType:
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = loaded("site_pages")


def build(folder: Path, **settings: object) -> None:
    """The site as ``make docs`` builds it: strict, so a warning is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), **settings))


def test_every_page_is_in_the_navigation_and_every_link_and_anchor_of_the_site_leads_somewhere(tmp_path, monkeypatch):
    """All of the site but what the docstrings say."""
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(tmp_path, plugins=[])
    home = (tmp_path / "index.html").read_text()
    assert 'href="strategies.html"' in home and 'href="pages.html"' in home
    assert (tmp_path / "project" / "examples" / "one_step.py").is_file()


def every_kind(base: type) -> list[type]:
    """Public classes below ``base``, in the order they were written."""
    found = [kind for below in base.__subclasses__() for kind in (below, *every_kind(below))]
    return [kind for kind in found if not kind.__name__.startswith("_")]


def test_the_reference_shows_every_public_name_strategy_transform_and_callback():
    blocks = re.findall(r"^::: (\S+)$", "\n".join(PAGES.reference().values()), flags=re.M)
    assert len(set(blocks)) == len(blocks)
    shown = []
    for name in blocks:
        module, _, attribute = name.rpartition(".")
        shown.append(getattr(importlib.import_module(module), attribute))
    transforms = [kind for kind in every_kind(AdvantageTransform) if kind.__module__ == "lit_opd.advantage"]
    wanted = [getattr(lit_opd, name) for name in lit_opd.__all__ if name != "__version__"]
    wanted += [getattr(weighting, name) for name in weighting.__all__]
    wanted += [getattr(callbacks, name) for name in callbacks.__all__ if name != "default_callbacks"]
    assert len(transforms) >= 8
    assert [kind for kind in [*wanted, *transforms] if kind not in shown] == []


@pytest.mark.parametrize(
    ("page", "text", "moved"),
    [
        ("README.md", "[a](docs/data.md#columns)", "[a](data.md#columns)"),
        ("README.md", "![a](docs/pictures/a.png)", "![a](pictures/a.png)"),
        ("docs/index.md", "[a](../README.md), [b](data.md)", "[a](index.md), [b](data.md)"),
        ("docs/healing/healing.md", "[a](../evidence.md) [b](../index.md)", "[a](../evidence.md) [b](../pages.md)"),
        ("docs/design.md", "[a](../examples/one_step.py)", "[a](project/examples/one_step.py)"),
        ("SECURITY.md", "[a](docs/data.md) [b](https://x.y/z)", "[a](../data.md) [b](https://x.y/z)"),
        ("README.md", "[a](#use)\n```\n[a](docs/data.md)\n```\n", "[a](#use)\n```\n[a](docs/data.md)\n```\n"),
    ],
)
def test_a_link_of_the_repository_leads_to_the_same_page_of_the_site(page, text, moved):
    assert PAGES.with_site_links(text, page) == moved


def test_a_docstring_reaches_the_parser_with_its_sections_apart_and_its_doctest_as_code():
    readable = loaded("site_docstrings").readable
    text = "Adds.\n\n>>> 1 + 1\n2\n\nArgs:\n    a: one.\nRaises:\n    ValueError: never.\n"
    code = "```pycon\n>>> 1 + 1\n2\n```"
    assert readable(text).replace("\n\n\n", "\n\n") == (
        f"Adds.\n\n{code}\n\nArgs:\n    a: one.\n\nRaises:\n    ValueError: never.\n"
    )


@pytest.mark.slow
def test_the_whole_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(tmp_path)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30 and not [page for page in pages if ELSEWHERE.search(page.read_text())]
    assert "Uniform" in (tmp_path / "api" / "weighting.html").read_text()
