"""Reads ``plan.yaml`` and cuts it into jobs: one run of one variant of one model with one seed, on one kind of device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.studies.healing.problems import Problem, problems
from benchmarks.studies.plans import digest, merged, read_content, require_known
from lit_opd.errors import InputError

PLAN = Path(__file__).with_name("plan.yaml")
SAMPLER = "lit_opd.rollout.DecodeSampler"  # Gemma's windows hold the longest row
START = "start"  # of a contrast: the student before training
KEYS = {
    "question", "hypotheses", "seeds", "held_out", "train", "new_tokens", "shown", "reference", "contrasts", "variants", "first",
    "models", "settings", "devices",
}  # fmt: skip
MODEL_KEYS = {"title", "folder", "make", "frame", "data"}
DEVICE_KEYS = {"steps", "batch", "settings"}


@dataclass(frozen=True)
class Job:
    """One run of the plan.

    Args:
        model, variant, seed, device: which one.
        settings: its configuration, without paths.
        prompts: sha256 of the problems that it is trained and measured on.
        plan: sha256 of the plan it is of.
    """

    model: str
    variant: str
    seed: int
    device: str
    settings: dict[str, Any]
    prompts: str
    plan: str

    @property
    def name(self) -> str:
        """Of its folder and its record."""
        return f"{self.model}-{self.variant}-{self.seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.settings["trainer"]["max_steps"])

    @property
    def batch(self) -> int:
        """Prompts a step."""
        return int(self.settings["data"]["prompt_batch"])

    @cached_property
    def settings_sha(self) -> str:
        """sha256 of all that the run depends on in the plan: a plan may change without changing this run."""
        return digest([self.settings, self.prompts])


@dataclass(frozen=True)
class Plan:
    """The content of a plan file, checked.

    Args:
        content: as in the file.
        path: the file.
    """

    content: dict[str, Any]
    path: Path

    def __post_init__(self) -> None:
        self._require_same(set(self.content), KEYS, "")
        for name, model in self.content["models"].items():
            self._require_same(set(model), MODEL_KEYS, f"models.{name}.")
        for name, device in self.content["devices"].items():
            self._require_same(set(device), DEVICE_KEYS, f"devices.{name}.")
        pairs = [name for pair in self.content["contrasts"] for name in pair]
        require_known(f"{self.path}: contrasts", pairs, [*self.content["variants"], START])
        for field in ("first", "reference"):
            named = self.content[field] if field == "first" else [self.content[field]]
            require_known(f"{self.path}: {field}", named, self.content["variants"])

    def _require_same(self, found: set[str], wanted: set[str], where: str) -> None:
        if found != wanted:
            differing = ", ".join(f"{where}{key}" for key in sorted(found ^ wanted))
            raise InputError(
                f"`{self.path}` must have the keys {', '.join(sorted(wanted))}, got others in: {differing}"
            )

    @cached_property
    def sha(self) -> str:
        """sha256 of the content."""
        return digest(self.content)

    @property
    def reference(self) -> str:
        """The variant that the others are compared with."""
        return str(self.content["reference"])

    # -- problems ----------------------------------------------------------------------------------------------------

    @cached_property
    def held_out(self) -> list[Problem]:
        """What every run is measured on."""
        settings = self.content["held_out"]
        return problems("held-out", settings["count"], seed=settings["seed"])

    def training(self, seed: int) -> list[Problem]:
        """What the runs of a seed are trained on: none of the held-out ones."""
        if seed not in self._training:
            questions = frozenset(problem.question for problem in self.held_out)
            count = self.content["train"]["count"]
            self._training[seed] = problems("train", count, seed=seed, without=questions)
        return self._training[seed]

    @cached_property
    def _training(self) -> dict[int, list[Problem]]:
        """Made once."""
        return {}

    def prompts_sha(self, model: str, seed: int) -> str:
        """sha256 of the problems that the runs of a seed are trained and measured on, as a model is asked."""
        return digest([self.rows(model, found) for found in (self.held_out, self.training(seed))])

    def rows(self, model: str, found: Sequence[Problem]) -> list[dict[str, str]]:
        """Lines of a prompt file, as a model is asked."""
        frame = self.content["models"][model]["frame"]
        return [
            {"id": one.id, "prompt": frame.format(question=one.question), "answer": str(one.answer)} for one in found
        ]

    # -- jobs --------------------------------------------------------------------------------------------------------

    def jobs(
        self,
        device: str,
        *,
        models: Sequence[str] | None = None,
        variants: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Job]:
        """All runs on a device, those of ``first`` before the others, model by model and seed by seed.

        Args:
            device: of the plan's devices.
            models, variants, seeds: only these; None for all.
        Raises:
            InputError: one that the plan does not have.
        """
        content = self.content
        require_known("--device", [device], content["devices"])
        for field, names, known in (
            ("--models", models, content["models"]),
            ("--variants", variants, content["variants"]),
            ("--seeds", seeds, content["seeds"]),
        ):
            require_known(field, names or (), known)
        rest = [name for name in content["variants"] if name not in content["first"]]
        return [
            self.job(model, variant, seed, device)
            for group in (content["first"], rest)
            for model in content["models"]
            for seed in content["seeds"]
            for variant in group
            if (models is None or model in models)
            and (variants is None or variant in variants)
            and (seeds is None or seed in seeds)
        ]

    def job(self, model: str, variant: str, seed: int, device: str) -> Job:
        """One run."""
        content = self.content
        of_model, on = content["models"][model], content["devices"][device]
        settings = merged(content["settings"], on["settings"])
        own: Mapping[str, Any] = {
            "seed_everything": seed,
            "trainer": {"max_steps": on["steps"]},
            "model": {
                **content["variants"][variant],
                "sampler": {"class_path": SAMPLER, "init_args": {"max_new_tokens": content["new_tokens"]}},
            },
            "data": {**of_model["data"], "prompt_batch": on["batch"]},
        }
        prompts = self.prompts_sha(model, seed)
        return Job(model, variant, seed, device, merged(settings, own), prompts, self.sha)


def read_plan(path: Path = PLAN) -> Plan:
    """The plan in ``path``.

    Raises:
        InputError: no such file, or a content that is no plan.
    """
    return Plan(read_content(path, KEYS, PLAN), path)
