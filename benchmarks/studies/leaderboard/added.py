"""Runs of a sweep as records on the board: only those that were trained as the condition's own."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from benchmarks.studies.leaderboard.condition import KEEPER, Rows, config_of, reference_jobs
from benchmarks.studies.reproduce.assets import drawn, split_of
from benchmarks.studies.reproduce.outcomes import by_problem, unpacked
from benchmarks.studies.reproduce.plan import Job, Plan
from benchmarks.studies.reproduce.results import Record
from lit_opd.compare import Run, read_run
from lit_opd.errors import InputError
from lit_opd.files import as_lines, read_lines, replace_whole
from lit_opd.run.trained_settings import changes, shown
from lit_opd.sweep.checks import CONFIG, SUMMARY, compared, settings_of
from lit_opd.sweep.record import RECORD
from lit_opd.testbed import ASSETS, read_records

# what makes a variant; all else must be the condition's
MADE_OF = ("model.weighting", "model.advantage", "model.objective", "model.optimizer.init_args.lr")
BY_CONTENT = ("data.train", "data.val", "model.student.path", "model.teacher.init_args.path")  # their paths may differ
WEIGHTS = "model.safetensors"
NEAR = 1e-6  # of an accuracy
ROUNDED = 1e-4  # of an accuracy in a committed record
REMEDY = "train with the config of `python -m benchmarks.studies.leaderboard condition NAME`"
Config = dict[str, Any]


def add_sweeps(plan: Plan, records: Sequence[Record], words: Sequence[str], path: Path, runs: Path) -> list[Record]:
    """Add the finished runs of sweeps to those in ``path``; the new ones.

    Args:
        plan: whose conditions they must match.
        records: of the plan; they say which models were built for it.
        words: ``[NAME=]FOLDER`` each.
        path: JSON lines.
        runs: folder of the study's runs.
    Raises:
        InputError: a run that does not match; nothing is added then.
    """
    found, conditions = [], {}
    for word in words:
        for entry in finished_runs(plan, word):
            config, folder = config_in(entry.folder), entry.folder
            condition = (config.get("vars") or {}).get("condition")
            if not condition:
                raise InputError(
                    f"`vars.condition` must name the condition that {folder} was trained for, got none; {REMEDY}"
                )
            if condition not in conditions:
                conditions[condition] = Matching(reference_jobs(plan, condition), records, runs)
            found.append(conditions[condition].record(entry, config))
    keep(found, path)
    return found


@dataclass(frozen=True)
class Entry:
    """A run of a sweep.

    Args:
        variant, seed, folder: which and where.
        code: the user's own files that it was trained with, by their hashes.
    """

    variant: str
    seed: int
    folder: Path
    code: dict[str, str]


def finished_runs(plan: Plan, word: str) -> list[Entry]:
    """Runs of a sweep; those that are not finished are named and left out.

    Raises:
        InputError: no sweep, nothing finished, a name for several variants, or one that a variant of the plan has.
    """
    given, sign, text = word.partition("=")
    if not sign or "/" in given or Path(word).exists():
        given, text = "", word
    folder = Path(text)
    try:
        runs = json.loads((folder / RECORD).read_text(encoding="utf-8"))["runs"]
        every = [Entry(given or r["variant"], int(r["seed"]), folder / name, r["code"]) for name, r in runs.items()]
        variants = {run["variant"] for run in runs.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"`--add` must be a folder of `lit-opd sweep` with its {RECORD}, got {text}") from error
    if given and len(variants) > 1:
        raise InputError(f"`--add {given}=` must be a sweep of one variant, got several in {text}; leave the name out")
    taken = [run.variant for run in every if run.variant in plan.content["variants"]]
    if taken:
        raise InputError(
            f"`--add` must name new variants, got {taken[0]!r}, which the plan has; give --add NAME={text}"
        )
    finished = [run for run in every if (run.folder / SUMMARY).is_file()]
    if not finished:
        raise InputError(f"`--add` must have finished runs, got {text} without any; give its sweep command again")
    for left in (run for run in every if run not in finished):
        print(f"left out, not finished: {left.folder}")
    return finished


def config_in(folder: Path) -> Config:
    """The settings that a run was begun with."""
    try:
        return dict(yaml.safe_load((folder / CONFIG).read_text()))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(
            f"`--add` must have runs with their settings, got {folder} without a readable {CONFIG}"
        ) from error


@dataclass
class Matching:
    """What a run must be to stand in a condition.

    Args:
        jobs: seed -> a run of the condition.
        records: of the plan.
        runs: folder of the study's runs.
    """

    jobs: dict[int, Job]
    records: Sequence[Record] = field(repr=False)
    runs: Path

    @property
    def job(self) -> Job:
        """Any of them."""
        return next(iter(self.jobs.values()))

    @cached_property
    def problems(self) -> tuple[Rows, Rows]:
        """The pool and the validation problems, drawn once."""
        return drawn(self.job.assets["data"][1])

    @cached_property
    def settings(self) -> Config:
        """Of a run, with every default."""
        with TemporaryDirectory() as place:
            path = Path(place) / CONFIG
            path.write_text(yaml.safe_dump(config_of(self.job, Path(place), self.runs), sort_keys=False))
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # a seed is set; these are not our words
                warnings.simplefilter("ignore")
                return settings_of(["fit", "--config", str(path), "--seed_everything", "0"])

    def record(self, entry: Entry, config: Config) -> Record:
        """The run as a record.

        Raises:
            InputError: it is not of this condition; the setting that differs is named with both values.
        """
        seed, folder = entry.seed, entry.folder
        if seed not in self.jobs or config.get("seed_everything") != seed:
            raise InputError(
                f"`seed_everything` of {folder} must be a seed of {self.job.condition}, {shown(list(self.jobs))}, got "
                f"{config.get('seed_everything')}: no run of the study is paired with another"
            )
        self._require_settings(folder, config)
        self._require_problems(folder, config, seed)
        for role, setting in (("student", BY_CONTENT[2]), ("teacher", BY_CONTENT[3])):
            self._require_model(folder, role, setting, at(config, setting))
        run = read_run(folder, variant=entry.variant)
        if run.mixture:
            raise InputError(f"`model` of {folder} must be the same from the first step to the last, got {run.mixture}")
        return self._measured(entry, run, config)

    def _require_settings(self, folder: Path, config: Config) -> None:
        sides = [blank(compared(side)) for side in (self.settings, config)]
        for side in sides:
            callbacks = side["trainer"].get("callbacks") or []
            side["trainer"]["callbacks"] = [each for each in callbacks if each.get("class_path") != KEEPER] or None
        for setting, want, got in changes(*sides):
            raise InputError(
                f"`{setting}` of {folder} must be that of {self.job.condition}, {shown(want)}, got {shown(got)}; {REMEDY}"
            )

    def _require_problems(self, folder: Path, config: Config, seed: int) -> None:
        pool, val = self.problems
        train = split_of(self.jobs[seed].assets["data"][1], pool)
        for setting, want in (("data.train", train), ("data.val", val)):
            path = at(config, setting)
            got = read_records(Path(path)) if isinstance(path, str) and Path(path).is_file() else None
            if got is None:
                raise InputError(f"`{setting}` of {folder} must be a file that is still there, got {path!r}; {REMEDY}")
            if got != want:
                raise InputError(
                    f"`{setting}` of {folder} must hold the {len(want)} problems of {self.job.condition} with seed {seed}, got "
                    f"{len(got)} others in {path}; {REMEDY}"
                )

    def _require_model(self, folder: Path, role: str, setting: str, path: Any) -> None:
        """A shipped model by its weights; one that the study built by what it says it built."""
        asset = self.job.assets.get(role)
        if asset is None:
            want, got = weights_of(ASSETS / role), weights_of(Path(str(path)))
            if want != got:
                raise InputError(
                    f"`{setting}` of {folder} must be the shipped {role}, got the weights in {path}; {REMEDY}"
                )
            return
        about = Path(str(path)) / "asset.json"
        known = json.loads(about.read_text()) if about.is_file() else {}
        built = [record["models"].get(role) for record in self.records if record["condition"] == self.job.condition]
        same = all(each is None or built_alike(each, known) for each in built)
        if known.get("specification") != asset[1] or not same:
            raise InputError(
                f"`{setting}` of {folder} must be {asset[0]} as the study built it, got {path}; give `condition` "
                "the study's --runs"
            )

    def _measured(self, entry: Entry, run: Run, config: Config) -> Record:
        curve = run.curves.get("greedy")
        every, steps = self.job.settings["trainer"]["val_check_interval"], self.job.steps
        want = tuple(range(0, steps + 1, every))
        if curve is None or curve.steps != want or run.summary["steps"] != steps:
            got = "none" if curve is None else shown(list(curve.steps))
            raise InputError(
                f"{run.folder} must have greedy accuracy at steps {shown(list(want))}, got {got}; finish it"
            )
        outcomes = by_problem(run.folder)
        if outcomes:
            self._require_outcomes(run, outcomes)
        kept = {key: outcomes[key] for key in ("problems", "right") if outcomes}
        return {
            "run": f"added/{self.job.condition}/{entry.variant}/seed-{entry.seed}",
            "condition": self.job.condition,
            "variant": entry.variant,
            "seed": entry.seed,
            "settings": self.jobs[entry.seed].settings_sha,  # of what it is compared with
            "learning_rate": at(config, MADE_OF[3]),
            "tokens": run.summary["tokens"],
            "wall_seconds": round(float(run.summary["seconds"]), 1),
            "made_of": {setting: at(config, setting) for setting in MADE_OF},
            "code": entry.code,
            "curves": {"greedy": [list(point) for point in zip(curve.steps, curve.values, strict=True)]},
        } | kept

    def _require_outcomes(self, run: Run, outcomes: Mapping[str, Any]) -> None:
        """They are of the condition's problems and add up to what was logged."""
        curve, count = run.curves["greedy"], len(self.problems[1])
        steps = tuple(step for step, _ in outcomes["right"])
        fits = outcomes["problems"] == count and steps == curve.steps
        means = [np.mean(unpacked(bits, count)) for _, bits in outcomes["right"]] if fits else []
        if not fits or np.abs(np.subtract(means, curve.values)).max() > NEAR:
            raise InputError(
                f"{run.folder}/problems.jsonl must hold {count} outcomes that add up to metrics.csv; train anew"
            )


def keep(found: Sequence[Record], path: Path) -> None:
    """Write the new records beside those that are there; the same run again takes the place of the old one.

    Raises:
        InputError: a variant that is known with other settings, in whichever condition.
    """
    known = {record["run"]: record for record in read_lines(path)}
    every = [*known.values(), *found]
    first: dict[str, Record] = {}
    for record in every:
        other = first.setdefault(record["variant"], record)
        if [record["made_of"], record["code"]] != [other["made_of"], other["code"]]:
            places = " and ".join(dict.fromkeys([other["condition"], record["condition"]]))
            raise InputError(
                f"`--add` must have one setting a variant, got {record['variant']} in {places} with two; name one "
                f"(--add NAME=FOLDER), or take the old lines out of {path}"
            )
    known |= {record["run"]: record for record in found}
    ordered = sorted(known.values(), key=lambda record: (record["condition"], record["variant"], record["seed"]))
    replace_whole(path, as_lines(ordered))


# -- settings ----------------------------------------------------------------------------------------------------------


def at(config: Mapping[str, Any], name: str) -> Any:
    """A setting by its dotted name, None where it is missing."""
    found: Any = config
    for key in name.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def blank(config: Config) -> Config:
    """A copy without what may differ."""
    copy: Config = json.loads(json.dumps(config))
    for name in ("seed_everything", *MADE_OF, *BY_CONTENT):
        *above, last = name.split(".")
        inside = at(copy, ".".join(above)) if above else copy
        if isinstance(inside, dict) and last in inside:
            inside[last] = None
    return copy


def built_alike(record: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Whether what a record says of a built model is what its ``asset.json`` says; records are rounded."""
    return record["steps"] == about.get("steps") and abs(record["greedy"] - about.get("greedy", -1.0)) < ROUNDED


def weights_of(folder: Path) -> str | None:
    """sha256 of a model's weights, None where there are none."""
    path = folder / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
