"""What a user is told: one wording for a setting out of its range, and one line of what another library says."""

from __future__ import annotations

import json

import pytest

from lit_opd.advantage import Power
from lit_opd.cli.command import main
from lit_opd.errors import InputError, first_line, require
from lit_opd.objective import PolicyLoss
from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.rollout import DecodeSampler
from lit_opd.weighting.decay import Geometric


def message(make) -> str:
    with pytest.raises(InputError) as raised:
        make()
    return str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((False, "Class.field", ">= 1", 0), "`Class.field` must be >= 1, got 0"),
        ((False, "Class.field", "a folder", ""), "`Class.field` must be a folder, got ''"),
        (
            (False, "--option", "true or null", False, "leave it out"),
            "`--option` must be true or null, got False; leave it out",
        ),
    ],
)
def test_a_refused_setting_is_named_with_its_range_its_value_and_the_remedy(arguments, expected):
    assert message(lambda: require(*arguments)) == expected


def test_an_allowed_setting_is_not_refused():
    assert require(True, "Class.field", ">= 1", 1, "give more") is None


class MyGeometric(Geometric):
    pass


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Geometric(gamma=1.5), "`Geometric.gamma` must be in [0, 1], got 1.5"),
        (lambda: MyGeometric(gamma=1.5), "`MyGeometric.gamma` must be in [0, 1], got 1.5"),
        (lambda: Power(alpha=0.0), "`Power.alpha` must be a finite number > 0, got 0.0"),
        (lambda: PolicyLoss(clip=2), "`PolicyLoss.clip` must be in (0, 1) or null, got 2"),
        (lambda: DecodeSampler(top_p=0), "`DecodeSampler.top_p` must be in (0, 1], got 0"),
    ],
)
def test_every_kind_of_part_names_its_own_class_and_field(make, expected):
    assert message(make) == expected


def test_a_held_out_share_that_holds_out_no_row_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "one row.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1", "answer": "2"}) + "\n")
    data = PromptDataModule(train=str(path), val_fraction=1e-9)
    assert message(data._split_train) == (
        "`PromptDataModule.val_fraction` must be such that train (each source) and validation have rows, got 1e-09; change it "
        "or `split_seed`, or give a `val` file"
    )


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--num_threads", "0", "`--num_threads` must be >= 1, got 0"),
        ("--seed_everything", "-1", "`--seed_everything` must be in [0, 4294967295], got -1"),
        ("--run_dir", "", "`--run_dir` must be a folder, got an empty text"),
        ("--weights_only", "false", "`--weights_only` must be true or null, got False"),
    ],
)
def test_an_option_out_of_its_range_is_named_as_it_was_typed(capsys, option, value, expected):
    with pytest.raises(SystemExit):
        main([], ["fit", "--config", "configs/quickstart.yaml", f"{option}={value}"])
    assert f"error: {expected}" in capsys.readouterr().err


class SaysNothing(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n \n  late \nmore"), "late "),
        (SaysNothing(), "SaysNothing"),
        (SaysNothing(" \n\t\n"), "SaysNothing"),
        (KeyError("key"), "'key'"),
        (ValueError("one\r\ntwo"), "one"),
    ],
)
def test_the_first_line_is_the_first_that_says_something_else_the_class(error, expected):
    assert first_line(error) == expected
