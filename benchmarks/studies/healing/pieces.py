"""Carries the models to a machine without a network: their GGUF files cut into pieces, joined and converted there.

A GGUF file is the smallest exact form of these models (98 and 253 MB), and its conversion gives the same weights everywhere.
Prompts need not be carried: the plan's code makes them. The pieces' list has their hash, and ``assemble`` compares it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.healing.plan import Plan
from benchmarks.studies.plans import digest
from lit_opd.errors import InputError
from lit_opd.files import replace_whole
from lit_opd.testbed import gemma3, smollm2

MEGABYTE = 10**6
LARGEST = 60  # megabytes a piece
USUAL = 45  # with this repository (16 MB) below the 64 MiB that some machines take at once
BLOCK = 1 << 20


@contextmanager
def _smollm2_file() -> Iterator[Path]:
    yield smollm2.find_gguf()


@dataclass(frozen=True)
class Source:
    """Where a model's file comes from and what is made of it.

    Args:
        file: the GGUF file of the installed package.
        convert: from the folder to write and, by name, the file.
    """

    file: Callable[[], AbstractContextManager[Path]]
    convert: Callable[..., Any]


SOURCES = {
    "smollm2": Source(_smollm2_file, smollm2.convert),
    "gemma3": Source(gemma3.gguf_file, gemma3.convert),
}


def prompts_sha(plan: Plan, model: str) -> str:
    """sha256 of all problems that a model is asked."""
    return digest([plan.prompts_sha(model, seed) for seed in plan.content["seeds"]])


def cut(model: str, file: Path, out: Path, plan: Plan, *, megabytes: int = USUAL) -> list[Path]:
    """Write the pieces of a file and, last, the list of them.

    Args:
        model: of the plan.
        file: its GGUF file.
        out: folder.
        plan: whose prompts are asked.
        megabytes: of a piece, at most ``LARGEST``.
    Returns:
        the files written.
    Raises:
        InputError: a size outside its range.
    """
    if not 1 <= megabytes <= LARGEST:
        raise InputError(f"`--megabytes` must be 1 to {LARGEST}, got {megabytes}")
    out.mkdir(parents=True, exist_ok=True)
    pieces: list[dict[str, str]] = []
    whole = hashlib.sha256()
    with file.open("rb") as source:
        while content := source.read(megabytes * MEGABYTE):
            whole.update(content)
            path = out / f"{model}.gguf.{len(pieces):02d}"
            replace_whole(path, content)
            pieces.append({"name": path.name, "sha256": hashlib.sha256(content).hexdigest()})
    about = {"model": model, "sha256": whole.hexdigest(), "prompts": prompts_sha(plan, model), "pieces": pieces}
    listed = out / f"{model}.pieces.json"
    replace_whole(listed, (json.dumps(about, indent=1) + "\n").encode())
    return [listed, *(out / piece["name"] for piece in pieces)]


def assemble(model: str, source: Path, weights: Path, plan: Plan) -> Path:
    """Join the pieces and convert them; nothing to do where the model is there.

    Args:
        model: of the plan.
        source: folder with the pieces, which may lie in folders of their own below it.
        weights: folder of the models' folders.
        plan: whose prompts are asked.
    Returns:
        the model's folder.
    Raises:
        InputError: pieces are missing or damaged, or this code makes other prompts.
    """
    folder = weights / plan.content["models"][model]["folder"]
    if (folder / "student" / "config.json").is_file():
        return folder
    about = _listed(model, source)
    if about["prompts"] != prompts_sha(plan, model):
        raise InputError(f"`{model}.pieces.json` must be of this plan's prompts, got others; cut the pieces again")
    found = {path.name: path for path in source.rglob(f"{model}.gguf.*")}
    missing = [piece["name"] for piece in about["pieces"] if piece["name"] not in found]
    if missing:
        raise InputError(f"`--from` must hold all pieces of {model}, got {source} without {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as scratch:
        joined = Path(scratch) / f"{model}.gguf"
        _join([(found[piece["name"]], piece["sha256"]) for piece in about["pieces"]], joined, about["sha256"])
        SOURCES[model].convert(folder, gguf=joined)
    return folder


def _listed(model: str, source: Path) -> dict[str, Any]:
    lists = sorted(source.rglob(f"{model}.pieces.json"))
    if not lists:
        raise InputError(f"`--from` must hold {model}.pieces.json, got {source} without it; carry it with a piece")
    return dict(json.loads(lists[0].read_text()))


def _join(pieces: list[tuple[Path, str]], out: Path, sha256: str) -> None:
    whole = hashlib.sha256()
    with out.open("wb") as file:
        for path, wanted in pieces:
            own = hashlib.sha256()
            with path.open("rb") as piece:
                while block := piece.read(BLOCK):
                    for either in (own, whole):
                        either.update(block)
                    file.write(block)
            if own.hexdigest() != wanted:
                raise InputError(f"`--from` must hold whole pieces, got {path} of another sha256; carry it again")
    if whole.hexdigest() != sha256:
        raise InputError(f"the pieces must give a file of sha256 {sha256}, got {whole.hexdigest()}; cut them again")
