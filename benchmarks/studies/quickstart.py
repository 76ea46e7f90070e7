"""The quickstart over several seeds: the table of docs/reproduce.md and its picture.

    python -m benchmarks.studies.quickstart --seeds 0 1 2 3 4 --runs runs/seeds --out docs

One process and one thread a run. A finished run folder is not run again, and refused where it has other settings.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.studies.cells import spread
from benchmarks.studies.figures import plt, save
from benchmarks.studies.run_folder import BANDS, curve, summary
from lit_opd.compare.document import markdown_table
from lit_opd.errors import InputError
from lit_opd.sweep.crew import Crew, Report, Task
from lit_opd.sweep.progress import Outcome, locked, run_tasks

CONFIG = "configs/quickstart.yaml"
MUST_GREEDY, MUST_RATIO = 0.75, 0.5


def run_all(runs: Path, seeds: Sequence[int], overrides: Sequence[str]) -> list[dict[str, float]]:
    """One fit a seed, one after the other; their summaries.

    Raises:
        InputError: a finished one has other settings.
        SystemExit: some failed, or it was stopped.
    """
    folders = {seed: runs / f"seed-{seed}" for seed in seeds}
    kept = [folder.name for folder in folders.values() if (folder / "summary.json").exists()]
    for seed, folder in folders.items():
        if folder.name in kept:
            _require_unchanged(folder, words_of(seed, folder, overrides))
    tasks = [_task(seed, folder, overrides) for seed, folder in folders.items() if folder.name not in kept]
    outcome, console = Outcome(kept=kept), Console(stderr=True)

    def ended(task: Task, summary: Any) -> str:
        outcome.finished.append(task.name)
        return f"{summary['seconds']:.0f} s"

    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs), Crew([{}], threads=1) as crew:
        run_tasks(tasks, crew=crew, outcome=outcome, console=console, ended=ended)
    outcome.show(console)
    if outcome.status:
        raise SystemExit(outcome.status)
    return [summary(folder) for folder in folders.values()]


def words_of(seed: int, folder: Path, overrides: Sequence[str]) -> list[str]:
    """The command line of a run."""
    words = ["fit", "--config", CONFIG, "--seed_everything", str(seed), "--run_dir", str(folder), "--overwrite", "true"]
    return [*words, "--wandb.mode", "disabled", *overrides]


def _require_unchanged(folder: Path, words: Sequence[str]) -> None:
    from lit_opd.run.trained_settings import changes, shown
    from lit_opd.sweep.checks import compared, settings_of

    saved = yaml.safe_load((folder / "config.yaml").read_text()) if (folder / "config.yaml").is_file() else {}
    for name, before, after in changes(compared(saved), compared(settings_of(words))):
        raise InputError(
            f"`{name}` must be what {folder} was trained with, {shown(before)}, got {shown(after)}; give another --runs, or "
            "remove the folder"
        )


def _task(seed: int, folder: Path, overrides: Sequence[str]) -> Task:
    log = folder.with_name(f"{folder.name}.log")
    return Task(folder.name, 1, log, functools.partial(_fit, seed, folder, log, tuple(overrides)), alone=True)


def _fit(seed: int, folder: Path, log: Path, overrides: Sequence[str], report: Report) -> dict[str, Any]:
    """One fit as ``train.py`` does it; its times are of a process of its own."""
    from callbacks import default_callbacks
    from lit_opd.sweep.train import train

    return train(words_of(seed, folder, overrides), folder, log, default_callbacks, lambda steps: None)


def table(summaries: list[dict[str, float]]) -> str:
    """Markdown: a row a seed, then mean and standard deviation."""
    names, rows = ("greedy", "avg_at_4", "reverse_kl"), []
    for s in summaries:
        ways = [f"{s[f'{name}_start']:.3f} -> {s[f'{name}_end']:.3f}" for name in names]
        ratio = s["reverse_kl_end"] / s["reverse_kl_start"]
        rows.append([str(s["seed"]), *ways, f"{ratio:.2f}", f"{s['seconds']:.0f}"])
    if len(summaries) > 1:
        rows.append(["mean, sd", *(spread([s[f"{name}_end"] for s in summaries]) for name in names), "", ""])
    return markdown_table(["seed", "greedy", "avg@4", "reverse KL", "KL ratio", "seconds"], rows)


def draw(folders: list[Path], path: Path) -> None:
    """Accuracy and KL against the step, and disagreement by position at start and end; a thin line a seed."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.1), layout="constrained")
    curves = [
        ("val/greedy_accuracy", "greedy accuracy", "exact match, 256 held-out problems", (0, 1)),
        ("val/reverse_kl", "KL(student || teacher)", "nats/token, held-out problems", (0, None)),
    ]
    for axis, (name, title, label, limits) in zip(axes, curves, strict=False):
        found = [tuple(zip(*curve(folder, name), strict=True)) for folder in folders]
        for steps, values in found:
            axis.plot(steps, values, color="0.75", lw=1)
        mean = [statistics.mean(values) for values in zip(*(values for _, values in found), strict=True)]
        axis.plot(found[0][0], mean, "o-", color="C0", lw=2, label=f"mean of {len(folders)} seeds")
        axis.set(title=title, xlabel="optimizer step", ylabel=label, ylim=limits)
        axis.legend(frameon=False)
    centres = [5 + 10 * band for band in range(10)]
    for index, (when, color) in enumerate((("start", "C3"), ("end", "C0"))):
        values = [[curve(folder, band)[-index][1] for band in BANDS] for folder in folders]
        mean = [statistics.mean(band) for band in zip(*values, strict=True)]
        axes[2].plot(centres, mean, "o-", color=color, lw=2, label=when)
    axes[2].set(
        title="where they disagree", xlabel="position in the response, %", ylabel="|q - s|, nats/token", ylim=(0, None)
    )
    axes[2].legend(frameon=False)
    save(figure, path, dpi=130)


def main() -> None:
    """Command line; what stands after ``--`` is passed to the fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, default=None, help="folder for the picture; default none")
    given, overrides = parser.parse_known_args()
    folders = [given.runs / f"seed-{seed}" for seed in given.seeds]
    overrides = [word for word in overrides if word != "--"]
    try:
        summaries = run_all(given.runs, given.seeds, overrides)
    except InputError as error:
        parser.error(str(error))
    print(table(summaries))
    met = sum(
        s["greedy_end"] > MUST_GREEDY and s["reverse_kl_end"] <= MUST_RATIO * s["reverse_kl_start"] for s in summaries
    )
    print(f"{met} of {len(summaries)} seeds: greedy above {MUST_GREEDY} and reverse KL at least halved")
    if given.out is not None:
        draw(folders, given.out / "pictures" / "quickstart.png")


if __name__ == "__main__":
    main()
