"""What is changed of Lightning's command line."""

from __future__ import annotations

from typing import Any, Optional, Union, get_type_hints

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, Strategy

from lit_opd.run.lightning_cli import PlainCLI, classes_before_words, whole_numbers_first

FLOAT_FIRST = Optional[Union[float, int]]  # noqa: UP007, UP045


def parsed(annotation: Any, text: str) -> Any:
    """What a parser makes of ``text``."""

    def function(value=None): ...

    function.__annotations__ = {"value": annotation}
    whole_numbers_first(function.__annotations__)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function)
    return parser.parse_args([f"--value={text}"]).value


@pytest.mark.parametrize(
    "annotation",
    [FLOAT_FIRST, float | int | None, float | int | str],
    ids=str,
)
@pytest.mark.parametrize(("text", "value"), [("1", 1), ("10", 10), ("1.0", 1.0), ("0.25", 0.25)])
def test_a_whole_number_stays_whole_whatever_the_order_of_a_union(annotation, text, value):
    found = parsed(annotation, text)
    assert found == value and type(found) is type(value)


def test_other_annotations_are_left_alone():
    annotations = {"a": int | None, "b": "int | float", "c": list[float | int], "d": float}
    before = dict(annotations)
    whole_numbers_first(annotations)
    assert annotations == before


def test_the_command_line_reads_the_trainers_batches_as_whole_numbers(monkeypatch):
    name = "limit_val_batches"
    monkeypatch.setitem(Trainer.__init__.__annotations__, name, float | int | None)
    monkeypatch.setattr(PlainCLI.__bases__[0], "__init__", lambda self, *args, **settings: None)
    PlainCLI()
    assert get_type_hints(Trainer.__init__)[name].__args__[0] is int


@pytest.mark.parametrize("word", ["auto", "ddp", "fsdp"])
def test_a_class_of_a_strategy_is_a_class_and_a_word_of_the_registry_a_word(word):
    def function(strategy="auto"): ...

    function.__annotations__ = {"strategy": str | Strategy}
    classes_before_words(function.__annotations__)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function)
    read = parser.parse_args(["--strategy=FSDPStrategy", "--strategy.cpu_offload=true"])
    assert type(parser.instantiate_classes(read).strategy) is FSDPStrategy
    assert parser.parse_args([f"--strategy={word}"]).strategy == word


def test_unions_without_a_class_of_lightning_keep_their_order():
    annotations = {"a": str | int, "b": str | None, "c": "str | Strategy"}
    before = dict(annotations)
    classes_before_words(annotations)
    assert annotations == before
