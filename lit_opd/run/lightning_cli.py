"""What is changed of Lightning's command line behind its public names; apart from ``lightning.py``, which needs no parser."""

from __future__ import annotations

import types
from functools import reduce
from operator import or_
from typing import Any, Union, get_args, get_origin

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


def whole_numbers_first(annotations: dict[str, Any]) -> None:
    """Put int before float in every union, in place: a parser takes the first that fits, and 1 batch is not 1.0, all of them.

    ``typing`` keeps one union for all that are equal, in the order of whoever wrote it first: another package's
    ``Optional[Union[float, int]]`` turned Lightning's ``Optional[Union[int, float]]`` around.
    """
    for name, kind in annotations.items():
        parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
        if int in parts and float in parts:
            annotations[name] = reduce(or_, [int, *(part for part in parts if part is not int)])


def classes_before_words(annotations: dict[str, Any]) -> None:
    """Put str after the classes in every union, in place: ``--trainer.strategy FSDPStrategy`` then names the class, and not
    a word that Lightning's registry does not have."""
    for name, kind in annotations.items():
        parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
        if str in parts and any(isinstance(part, type) and part.__module__.startswith("lightning.") for part in parts):
            annotations[name] = reduce(or_, [*(part for part in parts if part is not str), str])


class PlainCLI(LightningCLI):
    """Lightning's command line; a checkpoint does not change the config, and options can be checked before the seed is set."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        whole_numbers_first(Trainer.__init__.__annotations__)
        classes_before_words(Trainer.__init__.__annotations__)
        super().__init__(*args, **settings)

    def check_options(self) -> None:
        """Called once the command line is parsed, before anything is set or built."""

    def given(self, name: str) -> Any:
        """What the config gives for ``name``: an object for a class, after classes were built."""
        return self._get(self.config_init, name)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """The parser of one subcommand; only named where the command line is another's: each takes a third of a second."""
        if self.typed_command() in {None, subcommand}:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def typed_command(self) -> str | None:
        """The subcommand that the command line begins with; None where it begins with something else."""
        return None

    def command_parser(self) -> LightningArgumentParser:
        """The parser of the chosen subcommand."""
        return self._parser(self.subcommand)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint holds weights and counters; Lightning would let it change the config, class paths included."""

    def _set_seed(self) -> None:
        self.check_options()
        super()._set_seed()
