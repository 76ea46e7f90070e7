"""Settings under which a value baseline changes what is learned are told before a run, and the others are not.

That they do, and by how much, is shown by enumeration in ``tests/objective/test_oracles.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_opd.cli.command import main
from tests.helpers import poisoned, tiny
from tests.preflight.test_preflight import preflight, rows_of


@pytest.fixture(autouse=True)
def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table in one line a row."""
    monkeypatch.setenv("COLUMNS", "2000")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a weighting of the prefix."""
    folder = tmp_path_factory.mktemp("world")
    path = poisoned.write_config(folder, tiny.pair(folder), list("abcdefgh"))
    settings = yaml.safe_load(path.read_text())
    settings["model"]["weighting"] = {"class_path": "lit_opd.weighting.WindowedPrefixRatio"}
    path.write_text(yaml.safe_dump(settings))
    return path


def transforms(*names: str | tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """`model.advantage` of these classes."""
    given = [(name, {}) if isinstance(name, str) else name for name in names]
    return [{"class_path": f"lit_opd.advantage.{name}", "init_args": options} for name, options in given]


def said(config: Path, folder: Path, capsys: pytest.CaptureFixture[str], **model: Any) -> str:
    """Preflight's row of the signals."""
    overlay = folder / "overlay.yaml"
    overlay.write_text(
        yaml.safe_dump({"model": {"aggregation": "constant", "advantage": transforms("ValueBaseline")} | model})
    )
    assert preflight(config, "--config", str(overlay), "--run_dir", str(folder / "run")) == 0
    return rows_of(capsys.readouterr().out)["signals"]


SAMPLER = "lit_opd.rollout.TransformersSampler"
REWARD = {"class_path": "lit_opd.evaluation.AnswerReward"}
WARNED = {
    "sequence mean": (
        {"aggregation": "sequence-mean"},
        [
            "`model.aggregation` sequence-mean divides by the row's tokens",
            "use constant or sequence-sum, or no baseline",
        ],
    ),
    "token mean": (
        {"aggregation": "token-mean"},
        ["`model.aggregation` token-mean divides by the tokens of the step", "use constant or sequence-sum"],
    ),
    "masked": (
        {"truncated": "mask"},
        ["`model.truncated` mask leaves out rows by where they ended", "use keep, or no baseline"],
    ),
    "dropped": ({"truncated": "drop"}, ["`model.truncated` drop leaves out rows", "use keep, or no baseline"]),
    "nucleus": (
        {"sampler": {"class_path": SAMPLER, "init_args": {"max_new_tokens": 1, "top_p": 0.95, "top_k": 7}}},
        [
            "`model.sampler` TransformersSampler with `top_p` 0.95 and `top_k` 7 never draws some",
            "use top_p 1 and top_k 0",
        ],
    ),
    "weights": (
        {"weighting": {"class_path": "lit_opd.weighting.ImportanceWeighting"}},
        ["`ImportanceWeighting` weights by the sequence", "use a strategy that reads the prefix only, or no baseline"],
    ),
    "return": (
        {"advantage": transforms("ValueBaseline", ("DiscountedReturn", {"discount": 1.0}))},
        [
            "`DiscountedReturn` after `ValueBaseline` in `model.advantage` reads the advantage",
            "put `ValueBaseline` last",
        ],
    ),
    "two after it": (
        {"advantage": transforms("Clip", "ValueBaseline", "SoftLog", "Identity", "RewardFloor")},
        ["`SoftLog`, `RewardFloor` after `ValueBaseline` in `model.advantage` read the", "put `ValueBaseline` last"],
    ),
    "gate after": (
        {"advantage": transforms("ValueBaseline", "RewardGate"), "reward": REWARD},
        ["`RewardGate.how` keep in `model.advantage` after `ValueBaseline` stops rows by what was drawn", "leave one"],
    ),
    "gate before": (
        {"advantage": transforms("RewardGate", "ValueBaseline"), "reward": REWARD},
        [
            "`RewardGate.how` keep before `ValueBaseline` in `model.advantage` does not keep",
            "at 0",
            "leave one of them out",
        ],
    ),
    "gate that drops": (
        {"advantage": transforms(("RewardGate", {"how": "drop"}), "ValueBaseline"), "reward": REWARD},
        ["`RewardGate` in `model.advantage` drops rows or tokens by what was sampled", "leave one of them out"],
    ),
}


@pytest.mark.parametrize("case", WARNED)
def test_a_biased_baseline_is_one_warning_that_names_field_value_and_remedy(config, tmp_path, capsys, case):
    model, words = WARNED[case]
    row = said(config, tmp_path, capsys, **model)
    assert row.startswith("warning") and all(word in row for word in words)
    assert row.count("averages out") == (case != "gate before")
    assert "ValueBaseline" in row


def test_every_cause_is_told(config, tmp_path, capsys):
    row = said(config, tmp_path, capsys, aggregation="token-mean", truncated="drop")
    assert all(word in row for _, words in (WARNED["token mean"], WARNED["dropped"]) for word in words)


DIVERGENCE = {"class_path": "lit_opd.objective.Divergence", "init_args": {"kind": "reverse_kl"}}
QUIET = {
    "constant": ({}, "ok"),
    "sum": ({"aggregation": "sequence-sum"}, "ok"),
    "last": ({"advantage": transforms("Clip", ("DiscountedReturn", {"discount": 1.0}), "ValueBaseline")}, "ok"),
    "no baseline": ({"aggregation": "sequence-mean", "truncated": "drop", "advantage": transforms("Clip")}, "ok"),
    "no advantage is read": (
        {"aggregation": "sequence-mean", "objective": DIVERGENCE},
        "warning `model.advantage` has no effect",
    ),
    "replaced": (
        {"aggregation": "sequence-mean", "advantage": transforms("ValueBaseline", "NullAdvantage")},
        "warning `ValueBaseline` has no effect",
    ),
}


@pytest.mark.parametrize("case", QUIET)
def test_a_baseline_that_averages_out_or_has_no_effect_is_not_warned_of(config, tmp_path, capsys, case):
    model, begins = QUIET[case]
    row = said(config, tmp_path, capsys, **model)
    assert row.startswith(begins) and "averages out" not in row


def test_a_fit_warns_and_goes_on(config, tmp_path):
    """The default aggregation, from the file that a user has."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"advantage": transforms("ValueBaseline")}}))
    options = ["--config", str(overlay), "--run_dir", str(tmp_path / "run"), "--wandb.mode", "disabled"]
    with pytest.warns(
        UserWarning, match="`model.aggregation` sequence-mean .*`ValueBaseline` no longer averages out .*; use"
    ):
        main(args=["fit", "--config", str(config), *options])
    assert (tmp_path / "run" / "config.yaml").exists()
