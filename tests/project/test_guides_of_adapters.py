"""Every command and config of the guides on adapters and loggers is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_opd.cli import chat, export, push
from lit_opd.cli.command import OPDCLI
from lit_opd.shipped import with_config_files

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"
PARSERS = {"export": export.parser, "chat": chat.parser, "push": push.parser}


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (GUIDES / f"{name}.md").read_text(), flags=re.S)


def commands(name: str) -> list[list[str]]:
    lines = [line for block in blocks(name, "bash") for line in block.splitlines()]
    assert lines and all(line.startswith("lit-opd ") for line in lines)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> OPDCLI:
    """The command line of a run with its classes made; a logger's package is not asked for."""
    monkeypatch.chdir(ROOT)
    words = [word for word in with_config_files(words) if "MLFlowLogger" not in word and word != "--trainer.logger"]
    words = [w for w in words if not w.startswith(("--trainer.logger", "sqlite:"))]
    return OPDCLI(args=words, run=False)


def test_every_command_of_the_lora_guide_is_taken(monkeypatch, tmp_path):
    found = set()
    for words in commands("lora"):
        found.add(words[0])
        if words[0] in PARSERS:
            PARSERS[words[0]]().parse_args(words[1:])
        elif "runs/lora/config.yaml" not in words:  # of a run that is made by the first command
            settings = parsed(words[1:], monkeypatch).model.student_settings
            assert settings.lora.rank == 8
    assert found == {"fit", "export", "chat", "push"}


def test_every_command_of_the_loggers_guide_is_taken(monkeypatch):
    seen = [parsed(words[1:], monkeypatch).config for words in commands("wandb")]
    assert [config.wandb.mode for config in seen[:3]] == ["online", "offline", "disabled"]
    assert seen[1].wandb.tags == ["seed-3", "quick"] and seen[3].tensorboard


def test_the_configs_of_the_guides_are_taken(monkeypatch, tmp_path):
    (config,) = blocks("lora", "yaml")
    (tmp_path / "lora.yaml").write_text(config)
    lora = parsed(["--config", "quickstart", "--config", str(tmp_path / "lora.yaml")], monkeypatch).model
    assert lora.student_settings.lora.alpha == 16.0
    logger = yaml.safe_load(blocks("wandb", "yaml")[1])["trainer"]["logger"]
    assert logger["class_path"].endswith("MLFlowLogger")


def test_the_sweeps_agent_writes_a_command_that_is_taken(monkeypatch):
    """As the agent does: ``${args}`` becomes ``--name=value`` for every parameter."""
    sweep: dict[str, Any] = yaml.safe_load(blocks("wandb", "yaml")[0])
    for last in (0, -1):
        chosen = {
            n: part["value"] if "value" in part else part["values"][last] for n, part in sweep["parameters"].items()
        }
        given = [f"--{name}={value}" for name, value in chosen.items()]
        words = [word for part in sweep["command"] for word in (given if part == "${args}" else [part])]
        assert words[:3] == ["${env}", "lit-opd", "fit"]
        cli = parsed([word for word in words[3:] if not word.startswith("--overwrite")], monkeypatch)
        assert cli.config.model.optimizer.init_args.lr == chosen["model.optimizer.lr"]
        assert type(cli.model.weighting).__name__ == chosen["model.weighting"].rsplit(".", 1)[1]
        assert cli.config.seed_everything == chosen["seed_everything"] and cli.config.run_dir == "runs/swept"
