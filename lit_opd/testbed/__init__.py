"""The embedded default: a task, a tokenizer, a tiny teacher and a tiny student that train on one CPU core.

``ASSETS`` holds ``teacher/``, ``student/`` and ``reader/`` (Hugging Face folders), ``train.jsonl`` and ``val.jsonl``;
``python -m lit_opd.testbed build`` makes them anew.
"""

from pathlib import Path

from lit_opd.testbed.task import (
    Automaton,
    Problem,
    make_automaton,
    read_records,
    records,
    sample_problem,
    sample_problems,
    write_records,
)
from lit_opd.testbed.tokenizer import make_tokenizer

ASSETS = Path(__file__).parent / "assets"
TOOLS_ASSETS = Path(__file__).parent / "tools_assets"  # of the task with tools, see ``tool_task.py``

__all__ = [
    "ASSETS",
    "TOOLS_ASSETS",
    "Automaton",
    "Problem",
    "make_automaton",
    "make_tokenizer",
    "read_records",
    "records",
    "sample_problem",
    "sample_problems",
    "write_records",
]
