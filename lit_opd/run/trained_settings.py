"""Which settings trained which optimizer steps of a run: what a run that goes on may change only when asked, and what it says."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_opd.errors import InputError

Settings = dict[str, Any]
GROUPS: dict[str, tuple[str, ...]] = {  # name for `--allow_change` -> settings
    "weighting": ("model.weighting",),
    "objective": (
        "model.objective",
        "model.warmup",
        "model.advantage",
        "model.reward",
        "model.aggregation",
        "model.mini_batches",
        "model.epochs",
        "model.truncated",
    ),
    "models": ("model.student", "model.teacher", "model.reference", "trainer.precision"),
    "data": ("data", "trainer.limit_train_batches", "trainer.overfit_batches"),
    "sampler": ("model.sampler", "model.length_budget", "model.rollout_stop"),
    "seed": ("seed_everything", "model.seed"),
    "optimizer": ("model.optimizer", "model.lr_scheduler", "model.gradient_clip_norm"),
}
# what earlier versions had and did not write into a checkpoint: there it is unknown, not different
RECORDED_LATER = frozenset(
    {"model.reward", "trainer.precision", "trainer.limit_train_batches", "trainer.overfit_batches"}
)
FREE = frozenset({"optimizer"})  # may change unasked: the run warns of each option, see `changed_options`
Group = Literal["weighting", "objective", "models", "data", "sampler", "seed"]  # what may change by name
# speed, memory, addresses and limits of servers: the same tokens train the same weights whatever they are
WITHOUT_EFFECT = frozenset(
    """gradient_checkpointing compile lazy attn_implementation offload trust_remote_code val_batch
    urls api_key_env folder max_concurrency rows_per_request timeout retry_seconds start_seconds max_response_bytes
    memory_fraction sleep max_logprob_gap max_gib num_workers""".split()
)
GIVEN_OR_NOT = (
    "sync"  # servers that get no weights sample from those they started with; how weights get there changes none
)
WAY_OF_WEIGHTS = "weights"  # the same, where it is a text: how they travel to an engine; numbers are of teachers
DEFAULT_PRECISION = "32-true"
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}  # Lightning's short names
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})  # what a setting that one side does not have counts as


@dataclass(frozen=True)
class Span:
    """Optimizer steps that one set of settings trained.

    Args:
        start: optimizer step it began after, 0 for a new run.
        settings: by group of ``GROUPS``.
    """

    start: int
    settings: Settings


def trained_settings(settings: Mapping[str, Any]) -> Settings:
    """What of a run's settings decides its weights, by group: {group: {setting: value}}.

    Args:
        settings: the whole config as plain values, nested.
    """
    return {group: {name: _read(settings, name) for name in names} for group, names in GROUPS.items()}


def differences(before: Settings, after: Settings) -> dict[str, list[tuple[str, Any, Any]]]:
    """What changed, by group: (setting, value before, value after). Paths are compared as what they lead to. Of
    ``RECORDED_LATER`` what both sides name is compared, unless nothing at all is known of one."""
    found = {}
    for group in GROUPS:
        sides = before.get(group, {}), after.get(group, {})
        unknown = {name for name in RECORDED_LATER if all(sides) and not all(name in side for side in sides)}
        old, new = ({name: value for name, value in side.items() if name not in unknown} for side in sides)
        found[group] = list(_differing(old, new, ""))
    return {group: changes for group, changes in found.items() if changes}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(setting, value before, value after) between two whole configs as plain values, but for what is ``WITHOUT_EFFECT``."""
    return list(_differing(_plain(before), _plain(after), ""))


def require_unchanged(before: Settings, after: Settings, *, allowed: Sequence[str], checkpoint: Path) -> list[str]:
    """The groups that changed, each of which was asked for by name.

    Args:
        before: of the run that wrote the checkpoint.
        after: of this run.
        allowed: groups given to ``--allow_change``.
        checkpoint: what the run goes on from, for the message.
    Raises:
        InputError: another one changed.
    """
    changed = differences(before, after)
    refused = {group: changes for group, changes in changed.items() if group not in {*allowed, *FREE}}
    if refused:
        name, old, new = next(iter(refused.values()))[0]
        more = sum(map(len, refused.values())) - 1
        further = f" (and {more} more settings)" if more else ""
        raise InputError(
            f"`{name}` must be what the checkpoint {checkpoint} was trained with, {shown(old)}, got {shown(new)}{further}: the "
            "run's earlier steps would get a wrong label; go on with its own config, leave out --ckpt_path to train anew, or "
            f"add --allow_change {' '.join(refused)}, which summary.json will say"
        )
    return list(changed)


def settings_of(checkpoint: Path, saved: Mapping[str, Any]) -> Settings | None:
    """What a checkpoint was trained with last; of an older one what ``config.yaml`` of its run folder says; else None.

    Args:
        checkpoint: its path.
        saved: what it says of itself.
    """
    spans = saved.get("trained_settings")
    if spans:
        return dict(spans[-1]["settings"])
    places = (parent / "config.yaml" for parent in checkpoint.resolve().parents[:2])
    found = next((path for path in places if path.is_file()), None)
    return None if found is None else trained_settings(yaml.safe_load(found.read_text()) or {})


class TrainedSettings:
    """The spans of a run over its resumptions, as a checkpoint keeps them.

    Args:
        now: settings of this process; None where no command line gave any.
        before: of the checkpoint that the run goes on from, where it does not say its spans; None where nothing is known.
    """

    def __init__(self, now: Settings | None = None, before: Settings | None = None) -> None:
        self.now, self.before = now, before
        self.spans: list[Span] = []

    def begin(self, step: int) -> None:
        """Training starts at an optimizer step: a new span where the settings are new ones."""
        if self.now is None:
            return
        self.spans = [span for span in self.spans if span.start < step]
        if step and not self.spans:
            self.spans = [Span(0, self.before or {})]
        if not self.spans or differences(self.spans[-1].settings, self.now):
            self.spans.append(Span(step, self.now))
        else:  # what an earlier version did not record is known from here on
            last = self.spans[-1]
            self.spans[-1] = Span(
                last.start, {group: self.now[group] | last.settings.get(group, {}) for group in GROUPS}
            )

    def state(self) -> list[dict[str, Any]]:
        """Plain values for a checkpoint."""
        return [{"start": span.start, "settings": span.settings} for span in self.spans]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Read what ``state`` gave."""
        self.spans = [Span(int(part["start"]), dict(part["settings"])) for part in state]

    def summary(self, last_step: int) -> list[dict[str, Any]]:
        """A line a span: {"steps": [first, last], "changed": groups that changed at its start, "settings": of the groups that
        are not the same in all spans}; empty where nothing is known."""
        if not self.spans:
            return []
        ends = [*(span.start for span in self.spans[1:]), last_step]
        changed = [[], *(list(differences(a.settings, b.settings)) for a, b in pairwise(self.spans))]
        varying = [group for group in GROUPS if any(group in groups for groups in changed)]
        return [
            {
                "steps": [span.start + 1, end],
                "strategy": strategy_name(span.settings),
                "changed": groups,
                "settings": {group: span.settings.get(group) for group in varying},
            }
            for span, end, groups in zip(self.spans, ends, changed, strict=True)
        ]


def strategy_name(settings: Settings) -> str:
    """The class of the weighting; "unknown" of steps that nothing is known of."""
    if not settings:
        return "unknown"
    given = settings.get("weighting", {}).get("model.weighting") or {}
    return str(given.get("class_path", "ImportanceWeighting")).rsplit(".", 1)[-1]


# -- values ------------------------------------------------------------------------------------------------------------


def _at(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _read(settings: Mapping[str, Any], name: str) -> Any:
    """A setting as a plain value; where the trainer takes several spellings for the same, one of them."""
    value = _plain(_at(settings, name))
    if name == "trainer.precision":
        return PRECISIONS.get(str(value), str(value)) if value else DEFAULT_PRECISION
    if name == "trainer.limit_train_batches" and isinstance(value, float) and value == 1.0:
        return None  # all of them; the integer 1 is one batch
    return value


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and dictionaries, which every checkpoint can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _differing(before: Any, after: Any, name: str, owner: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(setting, before, after), the longest common way down; another class is one difference. ``owner`` has them as arguments:
    one that a side does not name, since its version did not have it, is at its default."""
    if isinstance(before, dict) and isinstance(after, dict) and before.get("class_path") == after.get("class_path"):
        for key in dict.fromkeys([*before, *after]):
            of_teachers = isinstance(before.get(key), list) or isinstance(after.get(key), list)
            if key not in WITHOUT_EFFECT and (key != WAY_OF_WEIGHTS or of_teachers):
                inner = f"{name}.{key}".lstrip(".").replace(".init_args", "")
                default = _default(owner, key)
                old, new = before.get(key, default), after.get(key, default)
                if key != GIVEN_OR_NOT or (old is None) != (new is None):
                    yield from _differing(old, new, inner, str(after.get("class_path", "")))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _differing(old, new, f"{name}.{number}".lstrip("."))
    elif not _same(before, after):
        yield name, before, after


def _default(class_path: str, argument: str) -> Any:
    """Of an argument of a class that is loaded; None where there is none, or nothing is known."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    parameter = inspect.signature(found).parameters.get(argument) if inspect.isclass(found) else None
    known = parameter is not None and parameter.default is not inspect.Parameter.empty
    return _plain(parameter.default) if known and parameter is not None else None


def _same(before: Any, after: Any) -> bool:
    if before == after and isinstance(before, bool) == isinstance(after, bool):
        return True
    if isinstance(before, str) and isinstance(after, str):
        return _place(before) == _place(after)
    return (
        any(before == value for value in NOTHING)
        and any(after == value for value in NOTHING)
        and None in (before, after)
    )


def _place(text: str) -> str:
    """What a path leads to; any other text as it is."""
    return os.path.realpath(text) if text and os.path.exists(text) else text


def shown(value: Any) -> str:
    """A class by its name and arguments, as one writes it in Python."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={shown(part)}" for name, part in (value.get("init_args") or {}).items())
        return f"{str(value['class_path']).rsplit('.', 1)[-1]}({arguments})"
    return repr(value)
