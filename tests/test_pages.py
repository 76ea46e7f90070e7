"""What commands write into pages stays between their markers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pages import Part, part
from lit_opd.errors import InputError

DOCS = Path(__file__).resolve().parent.parent / "docs"
WRITTEN = [("benchmarks.md", "curves"), ("benchmarks.md", "time-to-accuracy"), ("scale-out.md", "scaling")]
WRITTEN += [("healing/healing.md", "healing")]
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
