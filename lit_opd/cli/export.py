"""``python train.py export --run_dir RUN [--ckpt_path last|best|FILE] [--out FOLDER]``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_opd.errors import InputError, first_line
from lit_opd.files import whole_folder
from lit_opd.models.base import base_mark, require_base
from lit_opd.models.export import export_folder
from lit_opd.models.export_check import ExportCheck, unsharded
from lit_opd.models.loading import load_generation_config, load_tokenizer
from lit_opd.models.student import StudentSettings, adapter_names, build_student
from lit_opd.models.vocabulary import configured_stops, num_used
from lit_opd.report.model_card import write_card
from lit_opd.rollout.base import engine_options
from lit_opd.run.checkpoint_files import best, counters, intact, newest
from lit_opd.run.checkpoint_kinds import student_weights
from lit_opd.scoring.model import ScoringModel
from lit_opd.shipped import program

CONFIG = "config.yaml"


def parser() -> ArgumentParser:
    """The command's options."""
    own = ArgumentParser(prog=f"{program()} export", description="Writes a checkpoint as a Hugging Face folder.")
    own.add_argument("--run_dir", type=str | None, default=None, help="run folder; default the checkpoint's")
    own.add_argument("--ckpt_path", type=str, default="last", help="last, best (as monitored), or a checkpoint's path")
    own.add_argument("--out", type=str | None, default=None, help="new folder; default student-NAME in the run folder")
    own.add_argument("--adapter", type=bool, default=False, help="of a LoRA student the adapter alone, not merged")
    own.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"] | None, default=None, help="default the student's"
    )
    return own


def run(words: Sequence[str]) -> None:
    """Export, and print where to.

    Raises:
        InputError: wrong input.
    """
    given = parser().parse_args(list(words))
    if given.adapter and given.dtype is not None:
        raise InputError(
            f"`--dtype` must be left out with --adapter, got {given.dtype}: adapters are written as they were trained"
        )
    checkpoint, run_dir = found_checkpoint(given.ckpt_path, given.run_dir)
    name = "best" if given.ckpt_path == "best" else checkpoint.resolve().stem
    out = Path(given.out) if given.out else run_dir / f"student-{name}"
    step = export_checkpoint(checkpoint, run_dir, out, adapter=given.adapter, dtype=given.dtype)
    print(f"{checkpoint}, optimizer step {step}: {out}")


def export_checkpoint(
    checkpoint: Path, run_dir: Path, out: Path, *, adapter: bool = False, dtype: str | None = None
) -> int:
    """Write the student of a checkpoint with its model card; its optimizer step.

    Args:
        checkpoint: of any kind.
        run_dir: the run folder.
        out: a new or empty folder.
        adapter: of a LoRA student the adapter alone, not merged.
        dtype: of the weights; None for the student's.
    Raises:
        InputError: wrong input.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"`--out` must be a new or empty folder, got {out}; give another one")
    settings, stops = run_settings(run_dir / CONFIG)
    if adapter and settings.lora is None:
        raise InputError(f"`--adapter` must be false for {run_dir}, whose student has no `model.student.lora`")
    said = counters(checkpoint)
    student = trained_student(checkpoint, settings, base=said.get("student_base"))
    with whole_folder(out, replace=True) as draft:
        if adapter:
            student.save_pretrained(draft, safe_serialization=True)
            _tokenizer(settings).save_pretrained(draft)
        else:
            _export(student, settings, stops, draft, dtype=dtype)
        write_card(draft, run_dir, title=run_dir.resolve().name, steps=said["global_step"], adapter=adapter)
    return int(said["global_step"])


def found_checkpoint(ckpt_path: str, run_dir: str | None) -> tuple[Path, Path]:
    """The checkpoint and its run folder."""
    if ckpt_path in ("last", "best"):
        if run_dir is None:
            raise InputError(f"`--run_dir` must be the run folder of --ckpt_path {ckpt_path}, got none; give it")
        folder = Path(run_dir)
        return (newest if ckpt_path == "last" else best)(folder), folder
    checkpoint = intact(Path(ckpt_path))
    places = [Path(run_dir)] if run_dir else list(checkpoint.resolve().parents[:2])
    found = next((place for place in places if (place / CONFIG).is_file()), None)
    if found is None:
        raise InputError(f"`--run_dir` must hold the {CONFIG} that {checkpoint} was trained with; give the run folder")
    return checkpoint, found


def run_settings(path: Path) -> tuple[StudentSettings, list[int] | None]:
    """How the run loaded its student, and the end tokens it was given."""
    if not path.is_file():
        raise InputError(f"`--run_dir` must be a run folder, got {path.parent} without {CONFIG}; give another one")
    own = ArgumentParser(exit_on_error=False)
    own.add_argument("--student", type=StudentSettings)
    try:
        model: Any = OmegaConf.to_container(OmegaConf.load(path).model, resolve=True)
        settings = own.instantiate_classes(own.parse_object({"student": model["student"]})).student
    except (ArgumentError, OmegaConfBaseException, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} must be a run's config with `model.student`: {first_line(error)}") from error
    stops = engine_options(model).get("stop_token_ids")
    return replace(settings, compile=False, gradient_checkpointing=False), stops


def trained_student(checkpoint: Path, settings: StudentSettings, *, base: dict[str, str] | None) -> Any:
    """The student with the checkpoint's weights, on the CPU; ``base`` is the mark of what its adapters stand on."""
    if base is not None:
        require_base(base, base_mark(settings.path, "model.student.path"))
    model = build_student(settings)
    found = student_weights(checkpoint, model.state_dict(), trains=adapter_names(model))
    model.load_state_dict(found, strict=False)  # the names are checked
    return model


def _tokenizer(settings: StudentSettings) -> Any:
    trusted = settings.trust_remote_code
    return load_tokenizer(settings.path, "model.student.path", pad_token=settings.pad_token, trust_remote_code=trusted)


def _export(model: Any, settings: StudentSettings, stops: list[int] | None, out: Path, *, dtype: str | None) -> None:
    """Merged and compared with the student, as at the end of a run."""
    tokenizer = _tokenizer(settings)
    student = ScoringModel(model, vocabulary=num_used(tokenizer))
    if dtype is not None and settings.quantization is None:
        model.to(getattr(torch, dtype))
    generation, ends = (
        load_generation_config(settings.path),
        sorted(stops or configured_stops(settings.path, tokenizer)),
    )
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    check = ExportCheck.of(student, tokenizer, settings)
    plain, _ = unsharded(student, settings, None)
    if dtype is not None and settings.quantization is not None:
        plain.to(getattr(torch, dtype))
    export_folder(plain, tokenizer, out, state=None, generation=generation, check=check)
