"""What a run's page says: the result in one sentence, the facts, where the models disagree, what to look at next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lit_opd.report.profile import ProfileWindow
from lit_opd.report.run_files import CONFIG, RunFiles
from lit_opd.report.run_panels import evaluated, first, first_window, last, span
from lit_opd.report.settings import class_name, in_words, setting
from lit_opd.shipped import program

STILL_FALLING = 0.95  # times the validation before: below it the KL has not settled
WORSE_THAN_BEST = 0.02  # of greedy accuracy, at the end
MOST_TIME = 0.5  # of the time in one phase
PERCENT = 100.0
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Figure:
    """A number with its name, for the row of figures on top.

    Args:
        name: what it is.
        value: the newest.
        before: the first one; empty where there is one only.
        unit: written after the name.
    """

    name: str
    value: str
    before: str = ""
    unit: str = ""


def strategy(run: RunFiles) -> str:
    """The class of the weighting; of a run that changed it every one, in order."""
    spans = (run.summary or {}).get("trained") or []
    names = list(dict.fromkeys(part["strategy"] for part in spans))
    if len(names) > 1:
        return ", then ".join(names)
    return str((run.summary or {}).get("strategy") or class_name(run.config, "model.weighting") or "A run")


def headline(run: RunFiles) -> str:
    """The result first."""
    steps = f"{run.step:,} step{'' if run.step == 1 else 's'}"
    parts = []
    for name, words in (("val/greedy_accuracy", "greedy accuracy"), ("val/reverse_kl", "KL to the teacher")):
        unit = " nats/token" if name == "val/reverse_kl" else ""
        change = _change(run, name)
        if change:
            parts.append(f"{words} {change}{unit}")
    if not parts and (change := _change(run, "train/reverse_kl_k1")):
        parts.append(f"no validation; KL to the teacher on the training samples {change} nats/token")
    return f"{strategy(run)}, {steps}: {', '.join(parts) or 'nothing was measured yet'}"


def _change(run: RunFiles, name: str) -> str:
    found = run.metric(name)
    if not found.values:
        return ""
    start, now = f"{found.values[0]:.3f}", f"{found.values[-1]:.3f}"
    return now if len(found.values) == 1 else f"{start}{NO_BREAK}→{NO_BREAK}{now}"


def state(run: RunFiles) -> str:
    """How far the run is."""
    planned = run.planned
    if planned is not None and run.step >= planned:
        return "Finished."
    of = "" if planned is None else f" of {planned:,}"
    if run.summary is not None:
        return f"Ended at step {run.step:,}{of}."
    return f"At step {run.step:,}{of}: it trains, or was stopped there."


def figures(run: RunFiles) -> list[Figure]:
    """The row on top."""
    k = setting(run.config, "model.validation.samples")
    wanted = [
        ("val/greedy_accuracy", "greedy accuracy", "", 3),
        ("val/avg_at_k", f"avg@{k}" if isinstance(k, int) else "avg@k", "", 3),
        ("val/reverse_kl", "KL(student || teacher)", "nats/token", 3),
        ("val/disagreement", "disagreement", "nats/token", 3),
        ("train/response_length", "response length", "tokens", 1),
    ]
    found = []
    for metric, name, unit, digits in wanted:
        start, now = first(run.metric(metric)), last(run.metric(metric))
        if start is not None and now is not None:
            single = len(run.metric(metric).values) == 1
            found.append(Figure(name, f"{now:.{digits}f}", "" if single else f"{start:.{digits}f}", unit))
    every_step = setting(run.config, "trainer.log_every_n_steps") in (None, 1)  # else a sum of lines would be too small
    logged = sum(run.metric("train/tokens").values) if every_step else 0
    if tokens := (run.summary or {}).get("tokens") or logged:
        found.append(Figure("sampled for training", f"{tokens:,.0f}", unit="tokens"))
    if seconds := (run.summary or {}).get("seconds"):
        found.append(Figure("time", duration(seconds)))
    if (speed := last(run.metric("throughput/sampled_tokens_per_second"))) is not None:
        found.append(Figure("speed", f"{speed:,.0f}", unit="tokens/s"))
    if (memory := last(run.metric("throughput/peak_memory_mib"))) is not None:
        found.append(Figure("peak memory", f"{memory:,.0f}", unit="MiB"))
    return found


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(72), duration(5400), duration(100_000)
    ('72 s', '90 min', '27.8 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


EVERY = None
SAMPLING = (  # of the engine, and of what plays an environment or replays with it
    "max_new_tokens", "temperature", "top_p", "top_k", "urls", "ahead", "sampler", "budget", "waiting", "environment",
    "tools", "max_turns", "max_turn_tokens", "fresh", "paths", "on_policy_fraction",
)  # fmt: skip
FACTS: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (  # name, setting, the arguments that are shown of a class
    ("weighting", "model.weighting", EVERY),
    ("objective", "model.objective", EVERY),
    ("advantage", "model.advantage", EVERY),
    ("student", "model.student.path", ()),
    ("LoRA", "model.student.lora", EVERY),
    ("teacher", "model.teacher", ("path", "model", "urls", "routes")),
    ("sampler", "model.sampler", SAMPLING),
    ("training data", "data.train", ()),
    ("validation data", "data.val", ()),
    ("prompts a step", "data.prompt_batch", ()),
    ("samples a prompt", "data.samples_per_prompt", ()),
    ("optimizer", "model.optimizer", ("lr", "betas", "weight_decay")),
    ("seed", "seed_everything", ()),
)


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """What was run, by name; settings that are not there or null are left out."""
    found = [(name, setting(run.config, key), shown) for name, key, shown in FACTS]
    return [*((name, _brief(value, shown)) for name, value, shown in found if value is not None), *_spans(run)]


def _brief(value: Any, shown: tuple[str, ...] | None) -> str:
    """A class with the arguments that are set and shown."""
    if isinstance(value, dict) and isinstance(value.get("init_args"), dict):
        return in_words(_kept(value, shown))
    return in_words(value)


def _kept(value: Any, shown: tuple[str, ...] | None) -> Any:
    """``value`` with the arguments that are set and shown, also of the classes inside."""
    if isinstance(value, list):
        return [_kept(entry, shown) for entry in value]
    if not isinstance(value, dict) or not isinstance(value.get("init_args"), dict):
        return value
    given = value["init_args"].items()
    kept = {name: inner for name, inner in given if inner is not None and (shown is EVERY or name in shown)}
    return {
        **value,
        "init_args": kept if shown is EVERY else {name: _kept(inner, shown) for name, inner in kept.items()},
    }


def _spans(run: RunFiles) -> Iterable[tuple[str, str]]:
    """Which settings trained which steps, of a run that went on with others."""
    spans = (run.summary or {}).get("trained") or []
    if len(spans) < 2:
        return
    for part in spans:
        begin, end = part["steps"]
        changed = f", changed: {', '.join(part['changed'])}" if part.get("changed") else ""
        yield f"steps {begin} to {end}", f"{part['strategy']}{changed}"


# -- where they disagree -----------------------------------------------------------------------------------------------


def where(run: RunFiles) -> str:
    """Where in the response the models disagree now, and where that changed most; empty without a profile."""
    if not run.windows:
        return ""
    start, now = first_window(run), run.windows[-1]
    values = _relative(now, "disagreement")
    if not values:
        return ""
    top = max(values, key=lambda place: values[place])
    text = f"At {span(now)} they disagree most at {_part(now, top)} of the response ({values[top]:.2f} nats/token)"
    before = _relative(start, "disagreement") if start is not now else {}
    common = [place for place in values if place in before and before[place] > 0]
    if len(before) != len(values) or not common:
        return f"{text}."
    change = {place: values[place] / before[place] - 1 for place in common}
    most, least = min(common, key=lambda p: change[p]), max(common, key=lambda p: change[p])
    return (
        f"{text}. Since {span(start)} disagreement has changed by between {change[most]:+.0%} (at {_part(now, most)}) and "
        f"{change[least]:+.0%} (at {_part(now, least)})."
    )


def _relative(window: ProfileWindow, name: str) -> dict[int, float]:
    values = window.relative.values.get(name, ())
    return {place: value for place, value in enumerate(values) if value is not None}


def _part(window: ProfileWindow, place: int) -> str:
    low, high = window.relative.start[place], window.relative.end[place]
    return f"{PERCENT * low:.0f} to {PERCENT * high:.0f} %"


# -- what next ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """Something to look at or to do.

    Args:
        text: one or two sentences.
        command: to type, empty for none.
    """

    text: str
    command: str = ""


def what_next(run: RunFiles) -> list[Advice]:
    """From what the numbers show."""
    found = []
    if run.hints:
        found.append(Advice("Read the hints above first: something looks wrong."))
    found += _from_validations(run)
    share = {
        name: last(run.metric(f"throughput/share_{name}")) or 0.0
        for name in ("sampling", "scoring", "updating", "other")
    }
    slow = max(share, key=lambda name: share[name])
    if share[slow] > MOST_TIME:
        found.append(Advice(f"{share[slow]:.0%} of the time is {slow}: that is where the run can become faster."))
    if run.config:
        found.append(_other_weighting(run))
    return found


def _from_validations(run: RunFiles) -> Iterable[Advice]:
    kl, greedy = run.metric("val/reverse_kl"), run.metric("val/greedy_accuracy")
    # before its end more steps come anyway
    ended = run.summary is not None or run.planned is None or run.step >= run.planned
    if ended and len(kl.values) > 1 and kl.values[-1] < STILL_FALLING * kl.values[-2]:
        yield Advice(
            f"KL still falls ({kl.values[-2]:.3f} to {kl.values[-1]:.3f} at the last two validations): train longer.",
            f"{_again(run)} --ckpt_path last --trainer.max_steps {2 * run.step}",
        )
    if greedy.values and max(greedy.values) > greedy.values[-1] + WORSE_THAN_BEST:
        best = greedy.steps[greedy.values.index(max(greedy.values))]
        yield Advice(
            f"Greedy accuracy was best at step {best} ({max(greedy.values):.3f}, {greedy.values[-1]:.3f} at the last "
            "validation): export the best checkpoint, or lower the learning rate."
        )
    if not kl.values and not greedy.values and not evaluated(run) and run.step:
        yield Advice("No validation was made: set `data.val` or `data.val_fraction` to see what was learned.")


def _other_weighting(run: RunFiles) -> Advice:
    names = strategy(run)
    other = "ImportanceWeighting" if names == "Uniform" else "Uniform"
    return Advice(
        f"One run shows no effect of the weighting. Train {other} with the same seed, both with at least three seeds, and "
        f"compare them with `{program()} compare runs`.",
        f"{_again(run)} --model.weighting {other} --run_dir {shlex.quote(f'{run.folder}-{other.lower()}')}",
    )


def _again(run: RunFiles) -> str:
    return f"{program()} fit --config {shlex.quote(str(run.folder / CONFIG))}"
