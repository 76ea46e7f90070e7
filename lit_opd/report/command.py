"""``report``: the page of a run, finished or not, made from its folder."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from lit_opd.report.run_page import write_report
from lit_opd.shipped import program


def run(words: Sequence[str]) -> None:
    """Write ``report.html`` into each folder that is named.

    Raises:
        InputError: no run folder, or a broken file in it.
    """
    parser = ArgumentParser(prog=f"{program()} report", description="Write report.html from the files of a run folder.")
    parser.add_argument("folders", nargs="+", metavar="RUN", help="run folder, of a finished run or of one that trains")
    for folder in parser.parse_args(list(words)).folders:
        print(f"written: {write_report(folder)}")
