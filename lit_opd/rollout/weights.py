"""What a sampler with weights of its own may ask of the student, and the ways they travel."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from lit_opd.errors import InputError

Unit = list[tuple[str, Tensor]]  # names and whole tensors of a transformer block, or of a weight outside the blocks
Way = Literal["auto", "folder", "ipc", "adapter"]

PACKAGE = "vllm"
TRANSFERS = ((0, 23), (0, 32))  # first and last release whose weight transfer was read
WORKER_NEEDS = {(0, 23): ("ray", "requests"), (0, 27): ()}  # what vLLM's IPC engine imports, from that release on
PACKED_AT_INIT = (0, 27)  # from here on `packed` is said once, before with every update
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 512)  # what every one of them takes as `max_lora_rank`


class StudentWeights(Protocol):
    """The student, seen by an engine. Every method is called on every rank or none."""

    @property
    def adapter_rank(self) -> int | None:
        """Of a student with LoRA, whose weights travel merged or as the adapter alone."""

    @property
    def path(self) -> str:
        """Of the model it was loaded from."""

    def __call__(self, folder: Path) -> Any:
        """Write all of it as a Hugging Face folder, adapters merged."""

    def frame(self, folder: Path) -> Any:
        """Write the folder without weights: configuration and tokenizer."""

    def adapter(self, folder: Path) -> Any:
        """Write its adapter as a PEFT folder."""

    def each_unit(self, take: Callable[[Unit], None]) -> None:
        """Give ``take`` all weights, unit after unit; those of a unit are valid until it returns."""


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as "0.23.0+cu130"; (0, 0) where it has none."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def why_no_transfer(version: str) -> str | None:
    """What keeps a vLLM of ``version`` from taking weights by its transfer API as it is spoken here; None where nothing does."""
    first, last = (".".join(map(str, end)) for end in TRANSFERS)
    if not TRANSFERS[0] <= release(version) <= TRANSFERS[1]:
        return f"vLLM {version} is outside {first} to {last}, whose weight transfer is known"
    return None


def installed_version() -> str:
    """Of vLLM in this environment."""
    return str(importlib.import_module(PACKAGE).__version__)


def why_no_ipc(version: str) -> str | None:
    """The same for CUDA IPC to an engine in this environment, whose worker needs more packages in some releases."""
    unknown = why_no_transfer(version)
    if unknown is not None:
        return unknown
    needed = next(names for start, names in sorted(WORKER_NEEDS.items(), reverse=True) if release(version) >= start)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"vLLM {version} needs {' and '.join(missing)} for it, which is not installed" if missing else None


def require_way(way: Way, adapter_rank: int | None) -> None:
    """Refuse a way that a student's weights cannot go.

    Raises:
        InputError: naming another.
    """
    if adapter_rank is not None and way == "ipc":
        raise InputError(
            "`VLLMEngine.weights` must be auto, adapter or folder (merged) for a student with LoRA, got ipc; correct it"
        )
    if adapter_rank is None and way == "adapter":
        raise InputError(
            "`VLLMEngine.weights` must be auto, ipc or folder for a student without LoRA, got adapter; correct it"
        )
    if way in ("auto", "adapter") and adapter_rank is not None and adapter_rank > ADAPTER_RANKS[-1]:
        raise InputError(
            f"`LoraSettings.rank` must be <= {ADAPTER_RANKS[-1]} for an adapter in vLLM, got {adapter_rank}; lower it, or set "
            "`VLLMEngine.weights` to folder"
        )


def settled_way(way: Way, adapter_rank: int | None, *, on_cuda: bool, version: str) -> tuple[Way, str]:
    """The way that ``way`` comes to here, and why.

    Args:
        way: as configured.
        adapter_rank: of the student's LoRA, None without.
        on_cuda: engine and student share a CUDA device.
        version: of vLLM.
    Raises:
        InputError: a way that cannot be gone here; the message names what stands in it and another.
    """
    require_way(way, adapter_rank)
    if way == "auto" and adapter_rank is not None:
        return "adapter", "the student has LoRA"
    if way not in ("auto", "ipc"):
        return way, "as configured"
    no_ipc = why_no_ipc(version) if on_cuda else "there is no CUDA device"
    if no_ipc is None:
        return "ipc", f"CUDA and vLLM {version}"
    if way == "ipc":
        raise InputError(f"`VLLMEngine.weights` must be folder or auto here, got ipc: {no_ipc}")
    return "folder", no_ipc
