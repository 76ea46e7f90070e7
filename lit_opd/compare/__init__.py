"""Finished runs and saved rollouts against each other: ``python train.py compare``, and the same from Python."""

from lit_opd.compare.differences import RunsComparison, compare_runs
from lit_opd.compare.document import Document, Section, Table, markdown_table, show
from lit_opd.compare.runs import Run, read_run, read_runs
from lit_opd.compare.runs_report import runs_document
from lit_opd.compare.statistics import (
    Estimate,
    mean_height,
    mean_interval,
    paired,
    paired_two_way,
    reached,
    two_way_interval,
)

__all__ = [
    "Document",
    "Estimate",
    "Run",
    "RunsComparison",
    "Section",
    "Table",
    "compare_runs",
    "markdown_table",
    "mean_height",
    "mean_interval",
    "paired",
    "paired_two_way",
    "reached",
    "read_run",
    "read_runs",
    "runs_document",
    "show",
    "two_way_interval",
]
