"""Reads ``plan.yaml`` and cuts it into jobs: one run of one variant in one condition with one seed.

Keys of the plan:

    seeds           lists of seeds by purpose: main, tuning, development, held_out
    settings        the configuration of every run; condition, variant and tuning are merged over it, in this order
    variants        name -> weighting, number of main seeds in base; ``like`` names the variant whose learning rate it takes
    conditions      name -> part, about, variants and seeds (left out: every variant that has ``seeds``), settings, models,
                    ``rate``: one learning rate for all in place of the tuned ones,
                    ``turn``: conditions of one turn are trained side by side, seed by seed (left out: one after the other)
    models, data    what a condition's ``models`` may name in place of the shipped teacher, student and prompts; data with a
                    ``pool``: each seed trains on its own draw from as many problems
    hypotheses      may be left out, like their ``margin``; hypotheses.py says what they hold. Where the key is there, if empty,
                    the report is that of referee.py, with intervals over seeds and problems
    tuning          condition, learning rates, settings of the tuning runs; learning_rates is what they gave
    search          conditions for the search of a weighting and for its confirmation, and what counts as a win; in a plan
                    that extends this one ``references``: variants that all others are compared with in one table, and
                    ``choose``: group -> candidates, of which the report names the best
    extends         another plan's file beside this one: this plan's keys are merged over its, but it has those variants,
                    conditions and hypotheses only that it names itself (``uniform: {}`` takes over the other plan's), and the
                    other plan's learning rates unless it has the key, empty before it is tuned
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.studies.plans import digest, merged, read_content, require_known
from lit_opd.errors import InputError

PLAN = Path(__file__).parent / "plan.yaml"
ROLES = ("teacher", "student", "data")
KEYS = {"question", "seeds", "search", "target", "settings", "tuning", "learning_rates", "variants"} | {
    "conditions",
    "models",
    "data",
}
OPTIONAL = {"hypotheses", "margin"}
REFERENCE = "uniform"
Asset = tuple[str, dict[str, Any]]  # name and specification of a model or of prompts


@dataclass(frozen=True)
class Job:
    """One run of the plan.

    Args:
        condition, variant, seed: which one.
        label: what tells it from another job of these three: the learning rate in tuning, else empty.
        settings: its configuration, without paths.
        assets: role (teacher, student, data) -> (name, specification) of what is not the shipped one.
        plan: sha256 of the plan it is of.
    """

    condition: str
    variant: str
    seed: int
    label: str
    settings: dict[str, Any]
    assets: dict[str, Asset]
    plan: str

    @property
    def name(self) -> str:
        """Its folder below the runs."""
        return "/".join(filter(None, (self.condition, self.variant, self.label, f"seed-{self.seed}")))

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.settings["trainer"]["max_steps"])

    @cached_property
    def settings_sha(self) -> str:
        """sha256 of all that the run depends on in the plan: a plan may change without changing this run."""
        return digest([self.settings, {role: spec for role, (_, spec) in self.assets.items()}])


def folder_of(asset: Asset, root: Path) -> Path:
    """Where an asset is, or will be: named after what it is made of."""
    name, spec = asset
    return root / "assets" / f"{name}-{digest(spec)[:8]}"


def missing(jobs: Iterable[Job], root: Path) -> list[Asset]:
    """Assets that ``jobs`` need and that are not built yet, each once."""
    needed = {folder_of(asset, root): asset for job in jobs for asset in job.assets.values()}
    return [asset for folder, asset in needed.items() if not (folder / "asset.json").exists()]


@dataclass(frozen=True)
class Plan:
    """The content of a plan file, checked.

    Args:
        content: as in the file.
        path: the file.
        below: the plan that it extends; None before a plan with rates of its own is tuned.
    """

    content: dict[str, Any]
    path: Path
    below: Plan | None = None

    def __post_init__(self) -> None:
        self._require_keys()
        for name, variant in self.content["variants"].items():
            self._require("weighting" in variant, f"variants.{name}", "have a `weighting`", f"keys {sorted(variant)}")
            self._require_seeds(f"variants.{name}.seeds", variant.get("seeds", 1))
        for name, condition in self.content["conditions"].items():
            needed = {"part", "about"} | ({"seeds"} if "variants" in condition else set())
            keys = f"keys {sorted(condition)}"
            self._require(needed <= set(condition), f"conditions.{name}", f"have {', '.join(sorted(needed))}", keys)
            self._require_seeds(f"conditions.{name}.seeds", condition.get("seeds", 1))
            self._require_known(f"conditions.{name}.variants", condition.get("variants", ()), self.content["variants"])
            for role, asset in condition.get("models", {}).items():
                known = self.content["data" if role == "data" else "models"]
                self._require_known(f"conditions.{name}.models", [role], ROLES)
                self._require_known(f"conditions.{name}.models.{role}", [asset], known)
        kept = self.below.content["learning_rates"] if self.below else {}  # which its variants may be ``like``
        self._require_known("learning_rates", self.content["learning_rates"], {**self.content["variants"], **kept})

    def _require_keys(self) -> None:
        if set(self.content) - OPTIONAL != KEYS:
            differing = ", ".join(sorted((set(self.content) - OPTIONAL) ^ KEYS))
            raise InputError(f"`{self.path}` must have the keys {', '.join(sorted(KEYS))}, got others in: {differing}")

    def _require(self, holds: bool, field: str, wanted: str, got: str) -> None:
        if not holds:
            raise InputError(f"`{self.path}: {field}` must {wanted}, got {got}")

    def _require_seeds(self, field: str, count: Any) -> None:
        known = len(self.content["seeds"]["main"])
        wanted = f"be 1 to {known}, the number of `seeds.main`"
        self._require(isinstance(count, int) and 1 <= count <= known, field, wanted, repr(count))

    def _require_rate(self, variant: str, rate: float | None) -> None:
        """Beside tuned variants one that trained at the rate of ``settings`` would be compared with none of them."""
        tuned = self.content["learning_rates"] or (self.below.content["learning_rates"] if self.below else {})
        like = self.content["variants"][variant].get("like")
        field, wanted = f"learning_rates.{variant}", "be set (make tune), or the variant have a `like`"
        if like is not None:
            field, wanted = f"variants.{variant}.like", f"name one of {', '.join(tuned)}"
        self._require(rate is not None or not tuned, field, wanted, str(like or "nothing"))

    def _require_known(self, field: str, names: Iterable[str], known: Collection[str]) -> None:
        require_known(f"{self.path}: {field}", names, known)

    @cached_property
    def sha(self) -> str:
        """sha256 of the content."""
        return digest(self.content)

    @cached_property
    def untuned_sha(self) -> str:
        """sha256 of the content without the learning rates: what tuning depends on."""
        return digest({key: value for key, value in self.content.items() if key != "learning_rates"})

    @property
    def page(self) -> str:
        """The report's page: findings.md for the committed plan, else named after the plan's file."""
        return "findings.md" if self.path.stem == PLAN.stem else f"{self.path.stem}.md"

    @property
    def kept(self) -> Path:
        """Where the report keeps what finished runs gave, below the pages."""
        return Path("benchmarks") / self.path.stem / "runs.jsonl"

    @property
    def pictures(self) -> str:
        """What the names of its pictures begin with."""
        return "reproduce" if self.path.stem == PLAN.stem else self.path.stem

    @property
    def tuned(self) -> bool:
        """Whether every variant has a learning rate of its own."""
        return all(self.rate_of(variant) is not None for variant in self.content["variants"])

    def rate_of(self, variant: str) -> float | None:
        """The tuned learning rate, None before tuning."""
        like = self.content["variants"][variant].get("like", variant)
        rate = self.content["learning_rates"].get(like)
        return None if rate is None else float(rate)

    @property
    def tunable(self) -> list[str]:
        """Variants with a learning rate of their own."""
        return [name for name, variant in self.content["variants"].items() if "like" not in variant]

    def variants_of(self, condition: str) -> dict[str, list[int]]:
        """Variant -> its main seeds in a condition."""
        spec, main = self.content["conditions"][condition], self.content["seeds"]["main"]
        if "variants" in spec:
            return dict.fromkeys(spec["variants"], main[: spec["seeds"]])
        return {name: main[: v["seeds"]] for name, v in self.content["variants"].items() if "seeds" in v}

    def jobs(self, parts: tuple[str, ...] = ("base",)) -> list[Job]:
        """The runs of these parts, a turn of conditions by seed first, so that a stopped reproduction has whole comparisons."""
        found = []
        for name, condition in self.content["conditions"].items():
            if condition["part"] in parts:
                found += [self._job(name, v, seed) for v, seeds in self.variants_of(name).items() for seed in seeds]
        turn = {name: spec.get("turn", place) for place, (name, spec) in enumerate(self.content["conditions"].items())}
        return sorted(found, key=lambda job: (turn[job.condition], job.seed))

    def tuning_jobs(self) -> Iterator[Job]:
        """One run for each variant, learning rate and tuning seed."""
        tuning = self.content["tuning"]
        for variant in self.tunable:
            for rate in tuning["learning_rates"]:
                for seed in self.content["seeds"]["tuning"]:
                    yield self._job(tuning["condition"], variant, seed, rate=rate, above=tuning["settings"])

    def _job(
        self, condition: str, variant: str, seed: int, *, rate: float | None = None, above: dict[str, Any] | None = None
    ) -> Job:
        spec, shaped = self.content["conditions"][condition], self.content["variants"][variant]
        settings = merged(self.content["settings"], spec.get("settings", {}))
        settings = merged(settings, shaped.get("settings", {}))
        settings = merged(settings, {"model": {"weighting": shaped["weighting"]}, "seed_everything": seed})
        settings, lr = merged(settings, above or {}), rate or spec.get("rate") or self.rate_of(variant)
        self._require_rate(variant, lr)
        if lr is not None:
            settings = merged(settings, {"model": {"optimizer": {"init_args": {"lr": lr}}}})
        named = spec.get("models", {}).items()
        assets = {role: (name, self._specification(role, name, seed)) for role, name in named}
        label, plan = (f"lr-{rate:g}", self.untuned_sha) if rate else ("", self.sha)
        return Job(condition, variant, seed, label, settings, assets, plan)

    def _specification(self, role: str, name: str, seed: int) -> dict[str, Any]:
        """What a model or prompts are made of; prompts drawn from a pool are the seed's own."""
        spec: dict[str, Any] = self.content["data" if role == "data" else "models"][name]
        return spec | {"split": seed} if "pool" in spec else spec


def extended(below: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a plan that extends another one, see the module's ``extends``."""
    content = {key: value for key, value in merged(below, own).items() if key != "hypotheses"}
    if "hypotheses" in own:
        content["hypotheses"] = own["hypotheses"]
    for key in ("variants", "conditions"):
        named = own.get(key, below[key])
        content[key] = {name: merged(below[key].get(name, {}), spec) for name, spec in named.items()}
    rates = content["learning_rates"]
    if "learning_rates" in own:
        return content | {"learning_rates": own["learning_rates"]}
    taken = {spec.get("like", name) for name, spec in content["variants"].items()} | set(content["variants"])
    content["learning_rates"] = {name: rate for name, rate in rates.items() if name in taken}
    return content


def read_plan(path: Path = PLAN) -> Plan:
    """The plan in a file.

    Raises:
        InputError: a missing file, one that is no plan, or names that the plan does not have.
    """
    content = read_content(path, KEYS, PLAN)
    name = content.pop("extends", None)
    if name is None:
        return Plan(content, path)
    below = read_plan(path.parent / name)
    untuned = content.get("learning_rates") == {}  # without a rate yet it has no run in common with the other
    return Plan(extended(below.content, content), path, None if untuned else below)
