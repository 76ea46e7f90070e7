"""The charts of a run's page; what was not measured gives none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_opd.report.charts import Chart, Drawing, HeatMap, Series, measured, spread
from lit_opd.report.profile import FEW_ALIVE, TURN_AXES, BinnedProfile, ProfileWindow, last_said, with_shares
from lit_opd.report.run_files import Measured, RunFiles, finite
from lit_opd.report.settings import class_name, setting

STEP = "optimizer step"
PERCENT = 100.0
EVEN = 1e-6  # weights that differ by less are one weight
HEAT_COLUMNS = 120
ALIVE = {"absolute": "responses", "in_turn": "turns"}  # what may have ended before a position
WITHOUT_ADVANTAGE = ("Divergence",)  # objectives that do not read it
BLUE, ORANGE, GREEN, PURPLE, GREY = 0, 1, 2, 3, 7
POSITION = {
    "relative": "position in the response, % of its length", "absolute": "position in the response, tokens",
    "in_turn": "position in the turn, tokens", "by_turn": "turn",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A logged quantity as a line of a chart."""

    metric: str
    name: str
    color: int
    scale: float = 1.0
    dashed: bool = False
    points: bool = False


def over_training(run: RunFiles) -> list[Drawing]:
    """Accuracy, divergence, lengths and sizes over the steps."""
    k = setting(run.config, "model.validation.samples")
    average = f"avg@{k}" if isinstance(k, int) else "avg@k"
    alike = weights_alike(run)
    charts = [
        _chart(
            run,
            "Accuracy, validation prompts",
            "fraction right",
            Line("val/greedy_accuracy", "greedy", BLUE, points=True),
            Line("val/avg_at_k", average, ORANGE, points=True),
        ),
        _chart(
            run,
            "KL(student || teacher)",
            "nats/token",
            Line("val/reverse_kl", "validation, full vocabulary", BLUE, points=True),
            Line("train/reverse_kl_k1", "training samples, k1 estimate", GREY, dashed=True),
        ),
        _chart(
            run,
            "Disagreement |q - s| by part",
            "nats/token",
            Line("profile/first_30/disagreement", "first 30 %", BLUE),
            Line("profile/last_30/disagreement", "last 30 %", ORANGE),
        ),
        _chart(run, "Response length", "tokens", Line("train/response_length", "mean of the batch", BLUE)),
        _chart(
            run,
            "Responses cut short",
            "% of responses",
            Line("train/truncated_fraction", _token_limit(run), BLUE, PERCENT),
            Line("train/budget_fraction", "by a length budget", ORANGE, PERCENT),
            Line("train/stopped_fraction", "by a stop", GREEN, PERCENT),
            Line("train/turns_cut_fraction", "by max_turns", PURPLE, PERCENT),
            Line("train/environment_failed_fraction", "by a failure of the environment", GREY, PERCENT),
            zero=False,
        ),
        _chart(run, "Turns of a response", "turns", Line("train/turns", "mean of the batch", BLUE)),
        _chart(run, "Reward", "as given", Line("train/reward", "mean of the rows that have one", BLUE)),
        _chart(
            run,
            "Tokens that effectively count",
            "% of tokens",
            *([] if alike else [Line("train/weight_ess", "effective sample size of the weights", BLUE, PERCENT)]),
        ),
        _chart(
            run, "Gradient norm, before clipping", "norm", Line("train/grad_norm", "last update of each batch", BLUE)
        ),
        *_evaluations(run),
    ]
    return measured(charts)


def _token_limit(run: RunFiles) -> str:
    """What cuts a response: its own limit, or that of a turn."""
    of_turn = setting(run.config, "model.sampler.init_args.max_turn_tokens") is not None
    return "by max_new_tokens or max_turn_tokens" if of_turn else "by max_new_tokens"


def _chart(run: RunFiles, title: str, unit: str, *lines: Line, zero: bool = True) -> Chart:
    """Lines that were logged; with ``zero`` False those that are 0 throughout are left out."""
    series = []
    for line in lines:
        found = run.metric(line.metric)
        if zero or any(found.values):
            values = [line.scale * value for value in found.values]
            series.append(Series(line.name, found.steps, values, (), (), line.color, line.dashed, line.points))
    return Chart(title, STEP, unit, series)


def _evaluations(run: RunFiles) -> list[Chart]:
    """avg@k of every evaluation set with its interval over problems."""
    charts = []
    for name in evaluated(run):
        mean, low, high = (run.metric(f"eval/{name}/avg_at_k{end}") for end in ("", "_low", "_high"))
        ends = (low.values, high.values) if low.steps == high.steps == mean.steps else ((), ())
        series = Series("avg@k, 95 % interval over problems", mean.steps, mean.values, *ends, BLUE, points=True)
        charts.append(Chart(f"Evaluation: {name}", STEP, "fraction right", [series]))
    return charts


def evaluated(run: RunFiles) -> list[str]:
    """Names of the evaluation sets."""
    return sorted(
        name.removeprefix("eval/").removesuffix("/avg_at_k")
        for name in run.metrics
        if name.endswith("/avg_at_k") and name.startswith("eval/")
    )


def throughput(run: RunFiles) -> list[Drawing]:
    """Tokens a second, and where the time goes."""
    shares = [
        Line(f"throughput/share_{name}", name, color, PERCENT)
        for color, name in enumerate(("sampling", "scoring", "updating", "other"))
    ]
    sampled = Line("throughput/sampled_tokens_per_second", "sampled", BLUE)
    return measured(
        [
            _chart(run, "Tokens a second", "tokens/s", sampled),
            _chart(run, "Where the time goes", "% of the time", *shares),
        ]
    )


# -- by position -------------------------------------------------------------------------------------------------------


def first_window(run: RunFiles) -> ProfileWindow:
    """The first window that has a token, as where not every response is cut; the first one where none has."""
    return next((window for window in run.windows if window.tokens), run.windows[0])


def weights_alike(run: RunFiles) -> bool:
    """Whether every weight is the same as far as the profile shows it, as with uniform weights."""
    values = [v for window in run.windows for v in finite(window.relative.values.get("weight", ()))]
    return not values or max(values) - min(values) < EVEN


def by_position(run: RunFiles) -> list[Drawing]:
    """The last window against the first one, by relative and by absolute position."""
    if not run.windows:
        return []
    weighted = not weights_alike(run)
    charts = [_against(run, "relative", "Disagreement |q - s|", "nats/token", "disagreement")]
    if weighted:
        weights = _against(run, "relative", "Weight (0 where dropped)", "1 is uniform", "weight", reference=1.0)
        charts.append(weights)
    if class_name(run.config, "model.objective") not in WITHOUT_ADVANTAGE:
        share = _against(run, "relative", "Share of the gradient", "% of the sum of |w A|", "gradient_share", PERCENT)
        charts.append(share)
    charts += [
        _against(run, "relative", "Likely tokens in both lists", "% of a list", "list_overlap", PERCENT),
        _against(run, "relative", "Teacher's mass on the student's likely tokens", "%", "list_teacher_mass", PERCENT),
        _against(run, "relative", "A on tokens in both lists", "nats", "list_advantage"),
        _against(run, "absolute", "Disagreement by token", "nats/token", "disagreement"),
        _against(run, "absolute", "Drift: |q - s| summed before", "nats", "drift"),
        _against(run, "absolute", "Who is still writing", "% of responses", "survivor_fraction", PERCENT),
        *_by_turn(run, weighted=weighted),
    ]
    return measured(charts)


def _by_turn(run: RunFiles, *, weighted: bool) -> list[Chart]:
    """What conversations show beside; nothing where responses are one turn."""
    if any(window.by_turn is None or window.in_turn is None for window in (first_window(run), run.windows[-1])):
        return []
    charts = [
        _against(run, "by_turn", "Disagreement by turn", "nats/token", "disagreement"),
        _against(run, "in_turn", "Disagreement inside a turn", "nats/token", "disagreement"),
    ]
    if weighted:
        charts.append(_against(run, "by_turn", "Weight by turn", "1 is uniform", "weight", reference=1.0))
    return charts


def _against(
    run: RunFiles, axis: str, title: str, unit: str, name: str, scale: float = 1.0, reference: float | None = None
) -> Chart:
    """One quantity now against the start."""
    start, now = (with_shares(window) for window in (first_window(run), run.windows[-1]))
    shown = last_said((start, now), axis) + 1 if axis in TURN_AXES else None
    series = [] if start.step == now.step else [_profile(start, axis, name, scale, shown, dashed=True)]
    series = [_profile(now, axis, name, scale, shown), *series]
    logarithmic = axis == "absolute" and now.scale == "log"
    few = few_alive_from(now, axis) if axis in ALIVE and name != "survivor_fraction" else None
    note = f"Grey: fewer than {FEW_ALIVE:.0%} of the {ALIVE[axis]} get there." if few is not None else ""
    return Chart(
        title, POSITION[axis], unit, series, note, reference, reference is None, shaded_from=few, log_x=logarithmic
    )


def _profile(
    window: ProfileWindow, axis: str, name: str, scale: float, shown: int | None, *, dashed: bool = False
) -> Series:
    """The first ``shown`` bins of a window, None for all; where few responses, or turns, are alive there is no value, as it would
    be of few tokens."""
    binned: BinnedProfile = getattr(window, axis)
    values = binned.values.get(name, (None,) * len(binned.start))
    alive = binned.values.get("survivor_fraction", (1.0,) * len(binned.start))
    if axis in ALIVE and name != "survivor_fraction":
        pairs = zip(values, alive, strict=True)
        values = tuple(value if share is not None and share >= FEW_ALIVE else None for value, share in pairs)
    centres = [(PERCENT if axis == "relative" else 1.0) * centre for centre in binned.centres]
    heights = [None if value is None else scale * value for value in values]
    return Series(span(window), centres[:shown], heights[:shown], (), (), GREY if dashed else BLUE, dashed)


def few_alive_from(window: ProfileWindow, axis: str = "absolute") -> float | None:
    """The position after which fewer than a tenth of the responses, or turns, go on; None where all get to the end."""
    bins: BinnedProfile = getattr(window, axis)
    alive = bins.values.get("survivor_fraction", ())
    few = [place for place, share in enumerate(alive) if share is None or share < FEW_ALIVE]
    return bins.start[few[0]] - 0.5 if few and few[0] > 0 else None


def span(window: ProfileWindow) -> str:
    """The optimizer steps of a window in words."""
    first = window.previous_step + 1
    return f"step {window.step}" if first >= window.step else f"steps {first} to {window.step}"


# -- heat maps ---------------------------------------------------------------------------------------------------------


def heat_maps(run: RunFiles) -> list[Drawing]:
    """Disagreement, and weights that are not all one, by step and relative position; two windows are the least."""
    windows = alike_windows(run.windows)
    if len(windows) < 2:
        return []
    maps = [_heat(run, windows, "Disagreement |q - s|", "nats/token", "disagreement")]
    if not weights_alike(run):
        maps.append(_heat(run, windows, "Weight (0 where dropped)", "weight", "weight", from_zero=False))
    return measured(maps)


def alike_windows(windows: Sequence[ProfileWindow]) -> list[ProfileWindow]:
    """The newest windows that have the last one's bins."""
    last = windows[-1].relative if windows else None
    found: list[ProfileWindow] = []
    for window in reversed(windows):
        if last is None or (window.relative.start, window.relative.end) != (last.start, last.end):
            break
        found.append(window)
    return found[::-1]


def _heat(
    run: RunFiles, windows: Sequence[ProfileWindow], title: str, unit: str, name: str, *, from_zero: bool = True
) -> HeatMap:
    shown = [windows[place] for place in spread(len(windows), HEAT_COLUMNS)]
    steps = [float(shown[0].previous_step), *(float(window.step) for window in shown)]
    bins = shown[0].relative
    edges = [PERCENT * edge for edge in (*bins.start, bins.end[-1])]
    columns = [list(window.relative.values.get(name, (None,) * len(bins.start))) for window in shown]
    note = "" if len(shown) == run.num_windows else f"{len(shown)} of {run.num_windows} windows, evenly spread."
    return HeatMap(title, STEP, "% of the response", unit, steps, edges, columns, from_zero, note)


def last(found: Measured) -> float | None:
    """The newest value, None where there is none."""
    return found.values[-1] if found.values else None


def first(found: Measured) -> float | None:
    """The oldest value."""
    return found.values[0] if found.values else None
