"""The templates of the HTML pages: everything is escaped, nothing is left out in silence, and a wheel has them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import Environment, UndefinedError, nodes
from setuptools import Distribution

from lit_opd.report import html

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lit_opd" / "report" / "templates"
TEMPLATES = sorted(FOLDER.glob("*.html.j2"))  # the others are Markdown, whose own escaping has its tests
ALL = sorted(path for path in FOLDER.rglob("*") if path.is_file())
PLAIN_FILTERS = {"format", "length"}  # of text they make text; "safe" and its like make markup


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_no_template_goes_round_the_escaping(path):
    tree = Environment().parse(path.read_text(encoding="utf-8"))
    assert {node.name for node in tree.find_all(nodes.Filter)} <= PLAIN_FILTERS
    assert not list(tree.find_all((nodes.EvalContextModifier, nodes.FilterBlock)))


def test_a_name_without_a_value_is_an_error():
    with pytest.raises(UndefinedError, match="'strategy' is undefined"):
        html.render("tokens_page.html.j2", responses=[])


def test_a_wheel_holds_every_template_style_script_and_licence(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["setup.cfg"])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    files = {ROOT / folder / name for _, folder, _, names in build.data_files for name in names}
    assert set(TEMPLATES) < set(ALL) <= files
