"""The command line: ``main`` runs it."""

from lit_opd.cli.command import OPDCLI, main

__all__ = ["OPDCLI", "main"]
