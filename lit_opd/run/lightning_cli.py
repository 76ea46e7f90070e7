"""What is changed of Lightning's command line behind its public names; apart from ``lightning.py``, which needs no parser."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


class PlainCLI(LightningCLI):
    """Lightning's command line; a checkpoint does not change the config, and options can be checked before the seed is set."""

    def check_options(self) -> None:
        """Called once the command line is parsed, before anything is set or built."""

    def given(self, name: str) -> Any:
        """What the config gives for ``name``: an object for a class, after classes were built."""
        return self._get(self.config_init, name)

    def command_parser(self) -> LightningArgumentParser:
        """The parser of the chosen subcommand."""
        return self._parser(self.subcommand)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint holds weights and counters; Lightning would let it change the config, class paths included."""

    def _set_seed(self) -> None:
        self.check_options()
        super()._set_seed()
