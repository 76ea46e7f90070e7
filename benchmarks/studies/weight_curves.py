"""Every strategy's weights on one and the same real rollout: the picture of docs/strategies.md.

    python -m benchmarks.studies.weight_curves --out docs/pictures/weight_curves.png

The student of the quickstart samples one batch of validation prompts at temperature 1 with a fixed seed, its teacher
scores it, and each overlay of configs/weighting weighs that batch half-way through training. A panel shows one response (the
one whose total disagreement is the median of the batch) as a line, and the batch's mean at each position as dashes. Strategies
that know turns see each response as three, of a sixth, a third and a half of its tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.studies.figures import plt, save
from benchmarks.studies.policies import held_out, load_policy, sample
from lit_opd.masked import lengths, positions
from lit_opd.models.loading import load_tokenizer
from lit_opd.types import TokenSignal
from lit_opd.weighting import WeightingStrategy

REPO = Path(__file__).resolve().parents[2]
CONFIG = REPO / "configs" / "quickstart.yaml"
OVERLAYS = REPO / "configs" / "weighting"
ROWS, SEED, PROGRESS = 128, 0, 0.5
COLUMNS = 4
WIDTH, PANEL_HEIGHT, DPI = 13.0, 1.85, 110  # inches, dots an inch
TURNED = ("AfterObservation", "PerTurn", "TurnBalanced")  # know turns, and would show nothing on responses of one
TURN_ENDS = (1 / 6, 1 / 2)  # of a response, between three turns
STRONG = 3.0  # nats; the response's first disagreement above it is marked
LOWEST_TOP = 1.75  # panels share this upper end of the axis unless a weight is above it
INK, PALE, DROPPED = "#202020", "#9a9a9a", "#ececec"
# what is read -> panels and their colour, in reading order
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "position and turns alone": (
        "#1f5fa8",
        ("Uniform", "Constant", "FirstFraction", "LastFraction", "RandomFraction", "FirstTokens", "LinearDecay")
        + ("Geometric", "AnnealedPrefixWeight", "AnnealedPrefixMask", "LateRising", "AfterObservation"),
    ),
    "log-probs of student and teacher": (
        "#b8500c",
        ("ImportanceWeighting", "PrefixRatioTilt", "WindowedPrefixRatio", "TeacherConfidence", "TrustRegion", "DASH")
        + ("DIALOPD", "SparseTokens", "LeastLikely", "FiReRows"),
    ),
    "entropies": ("#2f7d32", ("FiRe", "TIP", "EntropyGate", "REOPOLD")),
    "lists of likely tokens": ("#8c1d40", ("CDD", "PruneOPD", "SelecTKD", "TAOPD", "PGT", "IEROPD")),
    "other strategies (combinators)": (
        "#7a3b9a",
        (
            "Product",
            "SequenceMeanOne",
            "BatchMeanOne",
            "PerTurn",
            "TurnBalanced",
            "Reversed",
            "Shuffled",
            "MatchedCurve",
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class Panel:
    """One strategy on the batch.

    Args:
        name: class name.
        settings: its parameters in words.
        weights: [B, T], 0 where a token does not count.
        kept: bool [B, T], tokens in the denominator.
        turn: int64 [B, T], as the strategy saw them; None for one turn.
    """

    name: str
    settings: str
    weights: Tensor
    kept: Tensor
    turn: Tensor | None = None


# -- the rollout -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def real_signal(config: dict[str, Any], *, rows: int, seed: int) -> TokenSignal:
    """Log-probs, entropies and lists of student and teacher on the student's own responses, [B, T] nats."""
    path, new_tokens = config["model"]["student"]["path"], config["model"]["sampler"]["init_args"]["max_new_tokens"]
    tokenizer = load_tokenizer(path, "model.student.path")
    student, teacher = load_policy(path), load_policy(config["model"]["teacher"]["init_args"]["path"])
    prompts = held_out(config["data"] | {"val_batch": rows, "val_limit": rows}, tokenizer)
    rollout = sample(student, prompts, tokenizer, path, new_tokens=new_tokens, seed=seed)
    wants = frozenset({"entropy", "topk"})
    theirs = teacher(rollout, wants=wants)
    assert theirs.topk is not None  # wanted
    ours = student(rollout, wants=wants, listed=theirs.topk.ids)
    return TokenSignal(
        student_logprobs=ours.logprobs,
        teacher_logprobs=theirs.logprobs,
        student_entropy=ours.entropy,
        teacher_entropy=theirs.entropy,
        student_topk=ours.topk,
        teacher_topk=theirs.topk,
        student_at_teacher_topk=ours.listed,
        token_ids=rollout.response_ids,
        mask=rollout.mask,
        row_keys=rollout.prompts.row_keys,
    )


def typical_row(signal: TokenSignal) -> int:
    """The row whose total disagreement is the (lower) median of the batch."""
    return int(signal.disagreement.sum(-1).median(0).indices)


def as_turns(mask: Tensor) -> Tensor:
    """int64 [B, T]: each response as if it were three turns, 0 where masked."""
    place = (positions(mask) - 0.5) / lengths(mask).clamp(min=1).unsqueeze(-1)
    return torch.where(mask, sum((place >= end).long() for end in TURN_ENDS), 0)


# -- the strategies ----------------------------------------------------------------------------------------------------


def settings_in_words(section: dict[str, Any]) -> str:
    """The parameters of an overlay: "w_max 1.5", inner strategies by name."""
    words = []
    for name, value in section.get("init_args", {}).items():
        inner = value if isinstance(value, list) else [value]
        if all(isinstance(entry, dict) for entry in inner):
            words.append(" × ".join(entry["class_path"].rpartition(".")[2] for entry in inner))
        elif value is not False:
            words.append(name if value is True else f"{name} {value}")
    return ", ".join(words)


def panels(signal: TokenSignal, progress: float = PROGRESS) -> dict[str, Panel]:
    """Every overlay of configs/weighting on the signal, by class name."""
    found = {}
    for path in sorted(OVERLAYS.glob("*.yaml")):
        section = yaml.safe_load(path.read_text())["model"]["weighting"]
        words = settings_in_words(section)  # before the parser turns inner strategies into objects
        parser = jsonargparse.ArgumentParser()
        parser.add_argument("--weighting", type=WeightingStrategy)
        parsed = parser.parse_object({"weighting": section})
        strategy = getattr(parser, "instantiate", parser.instantiate_classes)(parsed).weighting  # renamed in 4.49
        name = type(strategy).__name__
        turn = as_turns(signal.mask) if name in TURNED else None
        seen = replace(signal, turn=turn)
        found[name] = Panel(name, words, strategy(seen, progress), strategy.kept(seen, progress), turn)
    return found


# -- the picture -------------------------------------------------------------------------------------------------------


def draw(signal: TokenSignal, path: Path) -> None:
    """Small multiples, coloured by what a strategy reads; the response's disagreement in what is left of the last row."""
    drawn, row = panels(signal), typical_row(signal)
    order = [(name, colour) for colour, names in FAMILIES.values() for name in names]
    num_rows = len(order) // COLUMNS + 1  # what is left of the last row is the disagreement's
    height = num_rows * PANEL_HEIGHT + 1.4
    figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.add_gridspec(num_rows, COLUMNS)
    axes = [figure.add_subplot(grid[place // COLUMNS, place % COLUMNS]) for place in range(len(order))]
    beneath = figure.add_subplot(grid[-1, len(order) % COLUMNS :])
    strong = (signal.disagreement[row] > STRONG).nonzero()
    for axis in (*axes, beneath):
        if len(strong):
            axis.axvline(int(strong[0]) + 1, color=INK, linewidth=0.9, linestyle=":", zorder=1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.set_xlim(0.5, int(signal.mask[row].sum()) + 0.5)
    for axis, (name, colour) in zip(axes, order, strict=True):
        _weights(axis, drawn[name], signal.mask, row, colour)
    _disagreement(beneath, signal, row)
    for place, axis in enumerate(axes):
        if place % COLUMNS == 0:
            axis.set_ylabel("weight", fontsize=10)
        if place + COLUMNS < len(order):
            axis.set_xticklabels([])
        else:
            axis.set_xlabel("position in the response", fontsize=10)
    beneath.set_ylabel("|A|, nats", fontsize=10)
    _legend(figure)
    save(figure, path, dpi=DPI, metadata={"Software": None})


def _weights(axis: Axes, panel: Panel, mask: Tensor, row: int, colour: str) -> None:
    """One strategy: the response, the batch mean, and grey where tokens leave the denominator."""
    length = int(mask[row].sum())
    position = range(1, length + 1)
    kept = panel.kept[row, :length].tolist()
    mean = panel.weights.sum(0) / mask.sum(0).clamp(min=1)
    axis.step(position, panel.weights[row, :length], where="mid", color=colour, linewidth=1.8)
    axis.plot(position, mean[:length], color=PALE, linewidth=1.2, linestyle=(0, (4, 2)))
    if panel.turn is not None:
        for start in panel.turn[row, :length].diff().nonzero().flatten().tolist():
            axis.axvline(start + 1.5, color=PALE, linewidth=0.9, zorder=0)
    for place, counts in zip(position, kept, strict=True):
        if not counts:
            axis.axvspan(place - 0.5, place + 0.5, color=DROPPED, linewidth=0, zorder=0)
    top = max(LOWEST_TOP, 1.12 * float(panel.weights[row].max()), 1.12 * float(mean[:length].max()))
    axis.set_ylim(0, top)
    _title(axis, panel.name, panel.settings, colour)


def _title(axis: Axes, name: str, settings: str, colour: str) -> None:
    axis.set_title(settings or " ", fontsize=9, color=INK, loc="left", pad=4)
    place = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 17), "textcoords": "offset points"}
    axis.annotate(name, **place, fontsize=12, fontweight="bold", color=colour)


def _disagreement(axis: Axes, signal: TokenSignal, row: int) -> None:
    length = int(signal.mask[row].sum())
    mean = signal.disagreement.sum(0) / signal.mask.sum(0).clamp(min=1)
    position = range(1, length + 1)
    axis.bar(position, signal.disagreement[row, :length], color=INK, width=0.9)
    axis.plot(position, mean[:length], color=PALE, linewidth=1.2, linestyle=(0, (4, 2)))
    axis.set_ylim(bottom=0)
    _title(axis, "Disagreement", "|A| = |q - s|, log-probs of teacher and student", INK)
    axis.set_xlabel("position in the response", fontsize=10)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=colour, linewidth=3, label=f"reads {family}") for family, (colour, _) in FAMILIES.items()
    ]
    handles += [
        Line2D([], [], color=PALE, linestyle=(0, (4, 2)), label="mean of the batch"),
        Line2D([], [], color=PALE, linewidth=0.9, label="a turn begins (made up)"),
        Line2D([], [], color=INK, linewidth=0.9, linestyle=":", label=f"first |A| above {STRONG:g} nats"),
        Patch(color=DROPPED, label="out of the denominator"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, weigh, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/weight_curves.png"), help="PNG to write")
    parser.add_argument("--rows", type=int, default=ROWS, help="responses in the batch")
    parser.add_argument("--seed", type=int, default=SEED, help="of the sampling streams")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = yaml.safe_load(CONFIG.read_text())
    signal = real_signal(config, rows=args.rows, seed=args.seed)
    draw(signal, args.out)
    print(f"wrote {args.out}: {args.rows} responses, {int(signal.mask.sum())} tokens, row {typical_row(signal)} shown")


if __name__ == "__main__":
    main()
