"""A model card from what a run left: its config, its summary and its evaluations. It names no license, and of a local path the
last name alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lit_opd import __version__
from lit_opd.errors import InputError, first_line
from lit_opd.evaluation.history import FILE_NAME
from lit_opd.evaluation.rows import EvaluationFile, PastEvaluation, past_evaluations
from lit_opd.evaluation.statistics import bootstrap_interval, paired_difference

CARD = "README.md"
PACKAGES = ("torch", "lightning", "transformers", "peft")
MEASURED = {  # names in summary.json
    "greedy": "greedy accuracy",
    "avg_at_4": "avg@4",
    "reverse_kl": "KL(student || teacher), nats a token",
}
_SHOWN = ("seed_everything", "trainer", "model", "data")  # of a config; the rest is about one machine or account
_TRAINER = ("max_steps", "max_epochs", "precision", "val_check_interval")
_PRIVATE = frozenset({"urls", "url", "host", "api_key_env", "folder", "command"})  # of somebody's machines
# a hub id or a path, which may be relative and gone
_PATHS = frozenset("path paths train val tokenizer tokenizer_path teacher_tokenizer model entries".split())
# a path anywhere in a text: after file: or ~, or absolute with more than one name (a prompt may begin with /no_think)
_NAME = r"[^\s/:;,'\"`|<>()\[\]{}]+"
_LOCAL = re.compile(rf"(?:\bfile:/{{0,2}}|(?<![\w~])~[\w.-]*)(?:/{_NAME})+/?|(?<![\w/.~-])(?:/{_NAME}){{2,}}/?")


def write_card(folder: Path, run_dir: Path, *, title: str, steps: int | None = None, adapter: bool = False) -> None:
    """Write ``README.md`` into an exported folder.

    Args:
        folder: of the model.
        run_dir: of the run that made it.
        title: of the card.
        steps: optimizer steps that the model has seen; None for those of ``summary.json``.
        adapter: the folder is a PEFT adapter.
    Raises:
        InputError: the run has no readable config.
    """
    (folder / CARD).write_text(model_card(run_dir, title=title, steps=steps, adapter=adapter), encoding="utf-8")


def model_card(run_dir: Path, *, title: str, steps: int | None = None, adapter: bool = False) -> str:
    """The text of the card; see ``write_card``."""
    config, summary = _config(run_dir / "config.yaml"), _summary(run_dir / "summary.json")
    ended = summary.get("steps")
    steps = ended if steps is None else steps
    whole = steps is not None and steps == ended  # what the summary measured is this model
    shown = _shown(config)
    return (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            front=yaml.safe_dump(_front(config, adapter=adapter), sort_keys=False, allow_unicode=True),
            title=_one_line(title),
            version=__version__,
            facts=_facts(shown, summary if whole else {}, steps),
            measured=_measured(summary) if whole else [],
            steps=steps,
            evaluations=_evaluations(run_dir, steps),
            config=yaml.safe_dump(shown, sort_keys=False, allow_unicode=True),
            versions=", ".join(f"{name} {found}" for name in PACKAGES if (found := version_of(name))),
        )
    )


def _environment() -> Environment:
    """Markdown: text of values is data, so what would end a cell or begin a tag is written out."""
    own = Environment(
        loader=PackageLoader("lit_opd.report"),
        autoescape=False,  # no HTML: ``cell`` takes the place of escaping
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    own.filters["cell"] = _cell
    return own


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def _cell(value: Any) -> str:
    return _one_line(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def version_of(package: str) -> str | None:
    """The installed version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -- what the run left -------------------------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found["model"]["student"]["path"], str):
            return found
        reason = "no `model.student.path`"
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = first_line(error)
    raise InputError(f"a model card needs the config of the run, got {path}: {reason}; give the run folder")


def _summary(path: Path) -> dict[str, Any]:
    """Empty where the run did not end."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _evaluations(run_dir: Path, steps: int | None) -> list[list[str]]:
    """A line a set: its last evaluation up to ``steps``, against the first one that asked in the same way."""
    by_set: dict[str, list[PastEvaluation]] = {}
    for past in past_evaluations(EvaluationFile(run_dir / FILE_NAME).rows()):
        if steps is None or past.step <= steps:
            by_set.setdefault(past.set, []).append(past)
    return [_row(sorted(pasts, key=lambda past: past.step)) for _, pasts in sorted(by_set.items())]


def _row(pasts: Sequence[PastEvaluation]) -> list[str]:
    last = pasts[-1]
    first = next(past for past in pasts if past.settings == last.settings)
    low, high = bootstrap_interval(torch.tensor(list(last.accuracy.values())))
    paired = paired_difference(last.accuracy, first.accuracy) if last.step > first.step else None
    change = "-" if paired is None else f"{paired[0]:+.3f} [{paired[1]:+.3f}, {paired[2]:+.3f}] since step {first.step}"
    return [last.set, str(len(last.accuracy)), str(last.step), f"{last.mean:.3f} [{low:.3f}, {high:.3f}]", change]


# -- what of it is shown -----------------------------------------------------------------------------------------------


def _measured(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = [(label, summary.get(f"{name}_start"), summary.get(f"{name}_end")) for name, label in MEASURED.items()]
    return [(label, _number(start), _number(end)) for label, start, end in found if end is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _facts(config: Mapping[str, Any], summary: Mapping[str, Any], steps: int | None) -> list[tuple[str, str]]:
    model, data = config["model"], config.get("data") or {}
    found = [
        ("Base model", model["student"]["path"]),
        ("Teacher", _teacher(model.get("teacher"))),
        ("Weighting", _described(model.get("weighting"), "ImportanceWeighting")),
        ("Objective", _described(model.get("objective"), "PolicyLoss")),
        ("Adapters", _adapters(model["student"].get("lora"))),
        ("Training data", _described(data.get("train"), "-")),
        ("Optimizer", _described(model.get("optimizer"), "AdamW")),
        ("Optimizer steps", "unknown" if steps is None else str(steps)),
        ("Sampled tokens", f"{summary['tokens']:,}" if summary.get("tokens") else None),
        ("Seed", config.get("seed_everything")),
    ]
    return [(name, str(value)) for name, value in found if value is not None]


def _teacher(value: Any) -> str:
    path = ((value or {}).get("init_args") or {}).get("path")
    return str(path) if path else _described(value, "-")


def _adapters(lora: Mapping[str, Any] | None) -> str | None:
    return None if not lora else f"LoRA, rank {lora.get('rank', 16)}, alpha {lora.get('alpha', 32.0)}"


def _described(value: Any, default: str) -> str:
    """A class by its name and settings, anything else as text."""
    if value is None:
        return default
    if isinstance(value, Mapping) and "class_path" in value:
        given = {name: part for name, part in (value.get("init_args") or {}).items() if part is not None}
        inner = ", ".join(f"{name}={_argument(part)}" for name, part in given.items())
        return f"{str(value['class_path']).rsplit('.', 1)[-1]}({inner})"
    if isinstance(value, Mapping) and "path" in value:
        return str(value["path"])
    if isinstance(value, list):
        return ", ".join(_described(part, "") for part in value)
    return str(value)


def _argument(value: Any) -> str:
    """As ``_described``, a list in brackets: commas part the arguments."""
    text = _described(value, "")
    return f"[{text}]" if isinstance(value, list) else text


def _shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say what was trained; local paths by their last name, no address, no null."""
    kept = {name: config[name] for name in _SHOWN if name in config}
    trainer = config.get("trainer") or {}
    kept["trainer"] = {name: trainer[name] for name in _TRAINER if trainer.get(name) is not None}
    found: dict[str, Any] = _without_private(kept, "")
    return found


def _without_private(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        items = {str(key): _without_private(part, str(key)) for key, part in value.items() if key not in _PRIVATE}
        return {_without_paths(key): part for key, part in items.items() if part is not None}
    if isinstance(value, list):
        return [_without_private(part, name) for part in value]
    if not isinstance(value, str):
        return value
    is_path = name in _PATHS or os.path.exists(value)
    return _without_paths(public_name(value) if is_path else value)


def _without_paths(text: str) -> str:
    """Any text, every local path in it by its last name.

    >>> _without_paths("cat ~/words/a.txt, file:///data/b.txt and /data/c.txt, or http://host/d/e")
    'cat a.txt, b.txt and c.txt, or http://host/d/e'
    """
    return _LOCAL.sub(lambda found: PurePath(found[0]).name, text)


def public_name(path: str) -> str:
    """A hub id as it is, a local path by its last name."""
    return path if is_hub_id(path) else PurePath(path).name or path


def is_hub_id(path: str) -> bool:
    """Whether a path may be a repository of the hub: "user/name", and nothing is there."""
    user, slash, name = path.partition("/")
    is_id = bool(slash and user and name) and "/" not in name and user[0] not in ".~" and ":" not in user
    return is_id and not os.path.exists(path)


def _front(config: Mapping[str, Any], *, adapter: bool) -> dict[str, Any]:
    """The card's metadata: what the hub lists the model by."""
    base = config["model"]["student"]["path"]
    found: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if _came_from_hub(base):
        found["base_model"] = base
    return found | {"tags": ["on-policy-distillation", "lit-opd", *(["lora"] if adapter else [])]}


def _came_from_hub(path: str) -> bool:
    """A relative folder that is gone looks like a hub id, so only what the local cache has of the hub counts."""
    from huggingface_hub import try_to_load_from_cache

    return is_hub_id(path) and isinstance(try_to_load_from_cache(path, "config.json"), str)
