"""examples/quickstart.ipynb runs from top to bottom, and its pictures show what the run wrote."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: make test installs it")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: make test installs it")
NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"
SMALL = {"STEPS": "2", "PROMPTS": "4", "PROBLEMS": "2"}


def smaller(source: str) -> str:
    """The cell of settings with less to do."""
    for name, value in SMALL.items():
        source, changed = re.subn(rf"^{name} = \d+", f"{name} = {value}", source, flags=re.M)
        assert changed == 1
    return source


def kinds(cell: Any) -> list[str]:
    """What a cell shows, as MIME types."""
    return [kind for output in cell.outputs for kind in output.get("data", {})]


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source = smaller(code[0].source)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, _, curve, profile, tokens = code
    assert "image/png" in kinds(curve) and "image/png" in kinds(profile) and "text/html" in kinds(tokens)
    (shown,) = (output["data"]["text/html"] for output in tokens.outputs if "text/html" in output.get("data", {}))
    assert len(re.findall(r'title="weight \d', shown)) >= 4 and shown.count("right answer: ") == 4
    with (tmp_path / "runs" / "notebook" / "metrics.csv").open(newline="") as file:
        assert max(int(row["step"]) for row in csv.DictReader(file)) >= 1
