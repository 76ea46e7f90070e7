"""Does the position of the signal count on a real model? SmolLM2 healing with five weightings on the same seeds.

    make smollm2 && python -m benchmarks.studies.healing_study [--seeds 0 1 2] [--jobs 2] [--runs DIR] [--out docs/healing]

Run it in the repository. Each run is ``fit`` with configs/smollm2_healing.yaml and one of ``VARIANTS``, in a process of its own
with one thread; seeds pair the runs. A finished run has ``study.json`` (figures and curves) and is not
repeated; one that was stopped goes on from its last checkpoint; weights and checkpoints go when a run has been measured. A folder
whose runs have other settings is refused. Writes study.md, study.json and study.png.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console

from benchmarks.studies.cells import interval, machine, spread
from benchmarks.studies.figures import draw_band, draw_positions, plt, save
from benchmarks.studies.healed_run import measure
from benchmarks.studies.plans import digest
from benchmarks.studies.run_folder import BANDS, curve, summary, write_record
from lit_opd.compare.document import markdown_table
from lit_opd.compare.statistics import paired
from lit_opd.errors import InputError
from lit_opd.sweep.crew import Crew, Report, Task
from lit_opd.sweep.progress import Outcome, locked, run_tasks

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "smollm2_healing.yaml"
RECORD = "study.json"
GRACE = 120.0  # seconds to save what runs when the study is stopped
SHORT = 12  # digits of a hash that are shown
REFERENCE = "uniform"
BY_SEED = "by seed"  # of a record whose seed moved the order of the data too; the first ones have no such word
SEEDS_MOVE = {
    True: "Seeds move the sampling and the order of the data, so the intervals contain both.",
    False: "Seeds moved the sampling alone: all runs saw the prompts in one order, which the intervals leave out.",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "uniform": {"class_path": "lit_opd.weighting.Uniform"},
    "iw-1.5": {"class_path": "lit_opd.weighting.ImportanceWeighting", "init_args": {"w_max": 1.5}},
    "truncated-ratio": {
        "class_path": "lit_opd.weighting.PrefixRatioTilt",
        "init_args": {"alpha": 1.0, "low": float("-inf"), "high": 0.0},
    },
    "first-30": {"class_path": "lit_opd.weighting.FirstFraction", "init_args": {"fraction": 0.3}},
    "windowed-ratio": {"class_path": "lit_opd.weighting.WindowedPrefixRatio", "init_args": {"window": 8, "floor": 0.3}},
}
MEASURES = {
    "reverse_kl": "held-out reverse KL, nats/token",
    "teacher_text_nll": "NLL of teacher-written answers, nats/token",
    "disagreement": "held-out disagreement, nats/token",
    "distinct_2": "distinct-2 of samples",
}
COLORS = ("#202020", "#1f5fa8", "#c4500c", "#2f7d32", "#8e44ad")
Record = dict[str, Any]


# -- settings ------------------------------------------------------------------------------------------------------------


def own_settings(variant: str, seed: int, extra: Sequence[str]) -> Record:
    """A run's configuration over that of ``CONFIG``, with the hash of all that it is trained with."""
    own = {"seed_everything": seed, "num_threads": 1, "model": {"weighting": VARIANTS[variant]}}
    below = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return own | {"vars": {"settings": digest({"config": below, "own": own, "extra": list(extra)})}}


def require_unchanged(runs: Path, jobs: Sequence[tuple[str, int]], extra: Sequence[str]) -> None:
    """Refuse to go on with runs of another configuration.

    Raises:
        InputError: a run was begun with another config file, weighting or extra argument.
    """
    for variant, seed in jobs:
        folder = runs / f"{variant}-{seed}"
        known, wanted = begun_with(folder), own_settings(variant, seed, extra)["vars"]["settings"]
        if folder.is_dir() and known != wanted:
            raise InputError(
                f"`--runs` must hold runs of these settings, got {folder.name} of others ({known[:SHORT]}, not "
                f"{wanted[:SHORT]}): another {CONFIG.name}, weighting or argument; name another folder, or remove it"
            )


def begun_with(folder: Path) -> str:
    """Hash of the settings that a run was finished or begun with; "none" where it was not kept."""
    path, beside = folder / RECORD, beside_run(folder, ".yaml")
    if path.is_file():
        return str(json.loads(path.read_text()).get("settings", "none"))
    own = yaml.safe_load(beside.read_text()) if beside.is_file() else {}
    return str(own.get("vars", {}).get("settings", "none"))


def beside_run(folder: Path, ending: str) -> Path:
    """A file of a run's own outside its folder; not ``with_suffix``, which cuts "iw-1.5-0" to "iw-1"."""
    return folder.with_name(f"{folder.name}{ending}")


# -- one run -------------------------------------------------------------------------------------------------------------


def train(folder: Path, variant: str, seed: int, extra: Sequence[str], report: Report = lambda steps: None) -> None:
    """Train a run, or what is left of it.

    Raises:
        TaskFailed: it ended with an error.
    """
    from callbacks import default_callbacks
    from lit_opd.sweep.train import train

    folder.parent.mkdir(parents=True, exist_ok=True)
    config = beside_run(folder, ".yaml")
    config.write_text(yaml.safe_dump(own_settings(variant, seed, extra)))
    going_on = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else ["--overwrite", "true"]
    words = ["fit", "--config", str(CONFIG), "--config", str(config), "--wandb.mode", "disabled"]
    train(
        [*words, "--run_dir", str(folder), *going_on, *extra],
        folder,
        beside_run(folder, ".log"),
        default_callbacks,
        report,
    )


def study(folder: Path, variant: str, seed: int, extra: Sequence[str], report: Report = lambda steps: None) -> Record:
    """The record of one run: made, or read where it is there."""
    path = folder / RECORD
    if path.is_file():
        drop_weights(folder)
        return dict(json.loads(path.read_text()))
    if not (folder / "summary.json").is_file():  # the last thing a run writes; a stopped one has a student before
        train(folder, variant, seed, extra, report)
    figures, samples = measure(folder, yaml.safe_load((folder / "config.yaml").read_text()))
    ends = summary(folder)
    curves = {name: curve(folder, f"val/{name}") for name in ("reverse_kl", "disagreement")}
    found = [dict(curve(folder, band)) for band in BANDS]  # a tenth without a token has no value
    bands = [[band.get(step) for band in found] for step, _ in curves["disagreement"]]
    settings = own_settings(variant, seed, extra)["vars"]["settings"]
    record = {
        "variant": variant,
        "seed": seed,
        "settings": settings,
        "steps": ends["steps"],
        "tokens": ends["tokens"],
        "data_order": BY_SEED,
        "machine": machine(),
        "finished": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    record |= {"seconds": ends["seconds"], "figures": figures, "curves": curves, "bands": bands, "samples": samples}
    write_record(path, record)
    drop_weights(folder)
    return record


def drop_weights(folder: Path) -> None:
    """A measured run needs them no more."""
    for weights in ("checkpoints", "student"):
        shutil.rmtree(folder / weights, ignore_errors=True)


def run_all(runs: Path, seeds: Sequence[int], jobs: int, extra: Sequence[str]) -> list[Record]:
    """All runs, seed by seed, so that a stopped study has whole comparisons.

    Raises:
        InputError: some were begun with other settings.
        SystemExit: some failed, or the study was stopped.
    """
    todo = [(variant, seed) for seed in seeds for variant in VARIANTS]
    require_unchanged(runs, todo, extra)
    records: list[Record] = []
    outcome, console = Outcome(), Console()

    def ended(task: Task, record: Any) -> str:
        records.append(record)
        outcome.finished.append(task.name)
        return f"reverse KL {record['curves']['reverse_kl'][-1][1]:.3f}"

    steps = int(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["trainer"]["max_steps"])
    tasks = [_task(runs / f"{variant}-{seed}", variant, seed, extra, steps) for variant, seed in todo]
    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs), Crew([{"HF_HUB_OFFLINE": "1"}] * jobs, threads=1, grace=GRACE) as crew:
        run_tasks(tasks, crew=crew, outcome=outcome, console=console, ended=ended)
    outcome.show(console)
    if outcome.status:
        raise SystemExit(outcome.status)
    return sorted(records, key=lambda record: todo.index((record["variant"], record["seed"])))


def _task(folder: Path, variant: str, seed: int, extra: Sequence[str], steps: int) -> Task:
    call = functools.partial(_study, folder, variant, seed, tuple(extra))
    return Task(folder.name, steps, beside_run(folder, ".log"), call, alone=True)


def _study(folder: Path, variant: str, seed: int, extra: Sequence[str], report: Report) -> Record:
    return study(folder, variant, seed, extra, report)


# -- the page ------------------------------------------------------------------------------------------------------------


def value(record: Record, measure_name: str, *, end: bool = True) -> float:
    """A measure at the end (or the start) of a run."""
    if measure_name in record["curves"]:
        return float(record["curves"][measure_name][-1 if end else 0][1])
    return float(record["figures"][f"{measure_name}_{'end' if end else 'start'}"])


def grouped(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Variant -> seed -> record."""
    return {name: {r["seed"]: r for r in records if r["variant"] == name} for name in VARIANTS}


def table(records: Sequence[Record]) -> str:
    """A row a variant: ends, then differences from uniform paired by seed."""
    of = grouped(records)
    titles = [*MEASURES.values(), *(f"{title.split(',')[0]} - {REFERENCE}" for title in MEASURES.values())]
    start = [spread([value(r, name, end=False) for r in records]) for name in MEASURES]
    rows = [["(start)", "", *start]]
    for variant, runs in of.items():
        cells = [spread([value(r, name) for r in runs.values()]) for name in MEASURES]
        for name in MEASURES if variant != REFERENCE else ():
            ours, theirs = ({seed: value(r, name) for seed, r in group.items()} for group in (runs, of[REFERENCE]))
            cells.append(interval(paired(ours, theirs)))
        rows.append([variant, str(len(runs)), *cells])
    width = len(titles) + 2
    return markdown_table(["weighting", "seeds", *titles], [row + [""] * (width - len(row)) for row in rows])


def draw(of: Mapping[str, Mapping[int, Record]], path: Path) -> None:
    """Held-out KL against the step, and disagreement by position at the start and the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    for (variant, runs), color in zip(of.items(), COLORS, strict=False):
        draw_band(left, [r["curves"]["reverse_kl"] for r in runs.values()], color, f"{variant} ({len(runs)})")
        draw_positions(right, [r["bands"][-1] for r in runs.values()], color, "-")
    draw_positions(right, [r["bands"][0] for runs in of.values() for r in runs.values()], "0.55", "--")
    left.set(xlabel="optimizer step", ylabel="held-out KL(student || teacher), nats/token")
    right.set(xlabel="position in the response, %", ylabel="|q - s|, nats/token", title="start (dashes), end")
    right.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(of), frameon=False)
    save(figure, path)


def write_page(records: Sequence[Record], out: Path) -> Path:
    """study.md, study.json and study.png in ``out``; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    first = records[0]
    seconds = median(record["seconds"] for record in records)
    dates = [record["finished"] for record in records]
    seeds = ", ".join(str(seed) for seed in sorted({record["seed"] for record in records}))
    lines = [
        "The long table of healing.md: how far each weighting brings a damaged SmolLM2-135M back to the whole model.",
        "",
        f"{len(records)} runs of {first['steps']} steps, about {first['tokens']:,} sampled tokens each, median {seconds:.0f} s a "
        f"run on one thread; {first['figures']['prompts']:.0f} held-out prompts; +- is one standard deviation over seeds, "
        "brackets are Student's 95 % interval of the difference paired by seed. "
        f"{' and '.join(sorted({r['machine'] for r in records}))}, {min(dates)} to {max(dates)}, seeds {seeds}.",
        "",
        SEEDS_MOVE[all(record.get("data_order") == BY_SEED for record in records)],
        "",
        table(records),
        "",
        "![held-out KL and disagreement by position](study.png)",
    ]
    draw(grouped(records), out / "study.png")
    kept = [{key: v for key, v in record.items() if key != "samples"} for record in records]
    (out / "study.json").write_text(json.dumps(kept, indent=1) + "\n")
    (out / "study.md").write_text(f"# SmolLM2 healing with {len(VARIANTS)} weightings\n\n" + "\n".join(lines) + "\n")
    return out / "study.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; what it does not know goes to ``fit``, and wrong input ends with exit code 2 and one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each needs about 6.5 GB")
    parser.add_argument("--runs", type=Path, default=Path("runs/healing-study"))
    parser.add_argument("--out", type=Path, default=Path("docs/healing"))
    given, extra = parser.parse_known_args(arguments)
    try:
        records = run_all(given.runs.resolve(), given.seeds, given.jobs, extra)
    except InputError as error:
        parser.error(str(error))
    print(write_page(records, given.out).read_text())


if __name__ == "__main__":
    main()
