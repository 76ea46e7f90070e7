"""What commands write into pages stays between their markers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.gpu import page
from benchmarks.gpu.bench import read_rows
from benchmarks.gpu.sizes import FULL
from benchmarks.pages import Part, part
from benchmarks.speed import curves, scaling
from benchmarks.speed.peers import __main__ as peers
from benchmarks.speed.sides import publish
from benchmarks.studies import healing_study
from lit_opd.errors import InputError

DOCS = Path(__file__).resolve().parents[2] / "docs"
WRITTEN = [("benchmarks.md", name) for name in ("peers", "curves", "time-to-accuracy")] + [("scale-out.md", "scaling")]
WRITTEN += [("healing/healing.md", "healing"), ("healing/models.md", "healing-models")]
WRITTEN += [(f"{page}.md", "results") for page in ("findings", "search", "confirm", "controls")]


def test_words_by_hand_stay_to_the_letter(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- a -->\nold\nold\n<!-- /a -->\n\n  words \n<!-- b -->\nother\n<!-- /b -->")
    part("a").write(page, "new\n")
    part("a").write(page, "newer\n\n")
    assert page.read_text() == "# Title\n\n<!-- a -->\nnewer\n\n<!-- /a -->\n\n  words \n<!-- b -->\nother\n<!-- /b -->"


@pytest.mark.parametrize("text", [None, "", "# <x>\n", "# <x>\n# </x>\n# <x>\n# </x>\n"])
def test_a_file_without_the_part_is_refused_and_left_alone(tmp_path, text):
    own, path = Part("# <x>", "# </x>", option="--plan"), tmp_path / "plan.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="`--plan` must lead to a file with the lines # <x> and # </x> once each, got"):
        own.write(path, "new\n")
    assert (path.read_text() if path.exists() else None) == text


@pytest.mark.parametrize(("page", "name"), WRITTEN)
def test_every_page_that_a_command_writes_has_its_part(page, name):
    part(name).require(DOCS / page)


def test_a_report_is_json_and_replaces_the_part_of_its_name(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- time-to-accuracy -->\nold\n<!-- /time-to-accuracy -->\nafter")
    publish(tmp_path, "time-to-accuracy", {"cpu": math.inf}, "new\n")
    assert page.read_text() == "before\n<!-- time-to-accuracy -->\nnew\n<!-- /time-to-accuracy -->\nafter"
    assert json.loads((tmp_path / "benchmarks" / "time_to_accuracy.json").read_text()) == {"cpu": None}


@pytest.mark.parametrize(("name", "body_of"), [("peers", peers.body_of), ("curves", curves.body_of)])
def test_the_page_is_what_the_command_writes_of_the_numbers_beside_it(tmp_path, name, body_of):
    committed = DOCS / "benchmarks.md"
    (tmp_path / "benchmarks.md").write_text(committed.read_text())
    report = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
    publish(tmp_path, name, report, body_of(report))
    assert (tmp_path / "benchmarks.md").read_text() == committed.read_text()
    assert json.loads((tmp_path / "benchmarks" / f"{name}.json").read_text()) == report


def test_the_page_of_the_study_is_what_its_command_writes_of_the_records_beside_it(tmp_path):
    folder = DOCS / "healing"
    healing_study.write_page(json.loads((folder / "study.json").read_text()), tmp_path)
    for name in ("study.md", "study.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_the_expected_steps_are_what_the_measured_rows_give():
    rows = read_rows(DOCS / page.ROWS)
    text = scaling.table(rows)
    assert f"<!-- scaling -->\n{text}<!-- /scaling -->" in (DOCS / "scale-out.md").read_text()
    assert scaling.parameters(FULL.student, FULL.vocabulary) == pytest.approx(0.596e9, rel=1e-3)
    found = scaling.factors(rows, scaling.Device())
    assert found["update"] == pytest.approx(0.775 / (8 * 0.596e9 * 16256 / 989e12), rel=1e-2)
    least = (2 * 0.596e9 + 32 * (28 + 128) * 2 * 2 * 28 * 8 * 128) / 3.35e12
    assert found["decode"] == pytest.approx((7.669 / 256 - least) / 28, rel=1e-3)
