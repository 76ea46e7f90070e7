"""The JSON files of the study: one a run, one of each model before training; whole or not there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.healing.plan import Job, Plan
from benchmarks.studies.plans import digest
from lit_opd.errors import InputError
from lit_opd.files import replace_whole

PARTS = ("teacher", "student")
SHORT = 12  # digits of a hash that are shown
Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a call works.

    Args:
        plan: of the runs.
        runs: folder of run folders, logs and caches, which may be large.
        weights: folder of the models' folders.
        records: folder of the records.
    """

    plan: Plan
    runs: Path
    weights: Path
    records: Path

    def record(self, job: Job) -> Path:
        """Of a run that is finished."""
        return self.records / job.device / f"{job.name}.json"

    def start(self, device: str, model: str) -> Path:
        """Of a model before training."""
        return self.records / device / f"{model}-start.json"

    def start_sha(self, model: str) -> str:
        """sha256 of what a measurement before training depends on."""
        content = self.plan.content
        rows = self.plan.rows(model, self.plan.held_out)
        return digest([rows, content["models"][model]["data"], content["settings"]["data"], content["new_tokens"]])

    def weights_sha(self, model: str) -> str:
        """sha256 of what is seen of both models' weights without reading all of them."""
        from lit_opd.models.base import weights_revision  # loads torch

        folder = self.pair(model)
        return digest([weights_revision(str(folder / part), "--weights") for part in PARTS])

    def pair(self, model: str) -> Path:
        """Folder with teacher/ and student/.

        Raises:
            InputError: it is not there.
        """
        about = self.plan.content["models"][model]
        folder = self.weights / about["folder"]
        for part in PARTS:
            if not (folder / part / "config.json").is_file():
                raise InputError(
                    f"`--weights` must hold {about['folder']}/{part}, got {self.weights} without it; run `{about['make']}`, or "
                    "`python -m benchmarks.studies.healing assemble` where pieces were carried"
                )
        return folder


def read(path: Path) -> Record | None:
    """A record, None where there is none.

    Raises:
        InputError: a file that is no record.
    """
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"`--records` must hold records in JSON, got {path}: {error}; remove it") from error


def write(path: Path, record: Mapping[str, Any]) -> None:
    """A record as JSON, a field a line, whole or not at all: the file is what says that a run is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items()]
    replace_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def is_started(model: str, device: str, place: Place) -> bool:
    """Whether the model was measured before training.

    Raises:
        InputError: by another plan.
    """
    path = place.start(device, model)
    record = read(path)
    if record is not None and record.get("settings") != place.start_sha(model):
        raise InputError(f"`--records` must hold starts of this plan, got {path} of another; remove it")
    return record is not None


def require_weights(model: str, records: Iterable[Record | None], place: Place) -> None:
    """
    Raises:
        InputError: a record of the model is of other weights than those that are there.
    """
    own = place.weights_sha(model)
    for record in records:
        if record is not None and record.get("weights") != own:
            which = f"{model}-{record.get('variant', 'start')}"
            raise InputError(
                f"`--records` must hold runs of the weights in {place.pair(model)} ({own[:SHORT]}), got {which} of others "
                f"({str(record.get('weights'))[:SHORT]}); name another folder, or remove it"
            )


def is_finished(job: Job, place: Place) -> bool:
    """Whether the run has a record.

    Raises:
        InputError: it is of other settings.
    """
    record = read(place.record(job))
    if record is not None and record.get("settings") != job.settings_sha:
        raise InputError(
            f"`--records` must hold runs of these settings, got {place.record(job)} of others "
            f"({str(record.get('settings'))[:SHORT]}, not {job.settings_sha[:SHORT]}): the plan has changed; name another "
            "folder, or remove it"
        )
    return record is not None
