"""What a strategy cannot go on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.run.shard_index import read_index

# not the command of the same name in lightning.pytorch, which fails on the shards of FSDP2
STUDENT = "student.model."  # of the module's weights, those of the transformers model
CONSOLIDATE = "python -m lightning.fabric.utilities.consolidate_checkpoint"


def check_checkpoint(path: str | Path, strategy: Strategy, *, training: bool) -> None:
    """Refuse, before weights load, what Lightning's strategies cannot read.

    Args:
        path: a checkpoint, one file or a folder of shards.
        strategy: what would load it.
        training: True where the optimizer goes on too.
    Raises:
        InputError: a folder where one file is read, or written by another kind of strategy; a consolidated file under a sharded
            strategy; an optimizer without state under a sharded strategy.
    """
    sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    if Path(path).is_dir():
        _check_folder(Path(path), strategy, sharded=sharded, training=training)
        return
    if not sharded:
        return
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "optimizer_0" in saved:
        raise InputError(
            f"`--ckpt_path` must be the folder itself under {type(strategy).__name__}, got the consolidated file {path}; give "
            "the folder it was made from"
        )
    if training and any(not state["state"] for state in saved.get("optimizer_states", [])):
        raise _stateless(path, strategy)


def _check_folder(path: Path, strategy: Strategy, *, sharded: bool, training: bool) -> None:
    names = read_index(path).state_dict_metadata  # first: the advised command reads a folder without any check
    if not sharded:
        raise InputError(
            f"`--ckpt_path` must be one file under {type(strategy).__name__}, got the folder of shards {path}; make it one with "
            f"`{CONSOLIDATE} {path}` and give {path}.consolidated"
        )
    fsdp1 = isinstance(strategy, FSDPStrategy)
    if not any(name.startswith("model." if fsdp1 else "state_dict.") for name in names):
        other = "ModelParallelStrategy" if fsdp1 else "FSDPStrategy"
        raise InputError(
            f"`--ckpt_path` must be of the same kind of strategy, but the shards in {path} are {other}'s; go on with that, or "
            f"in one process or ddp after `{CONSOLIDATE} {path}`"
        )
    if fsdp1 and training and not any(name.startswith("optimizer_0.state.") for name in names):
        raise _stateless(path, strategy)


def _stateless(path: str | Path, strategy: Strategy) -> InputError:
    return InputError(
        f"`model.optimizer` must have state to go on under {type(strategy).__name__}, but {path} holds none (SGD without "
        "momentum?), and Lightning cannot load that; go on in one process or with ddp, or start with momentum"
    )


def from_consolidated(checkpoint: dict[str, Any]) -> None:
    """Rename what the consolidation of shards wrote to the names of a plain checkpoint, in place."""
    if "model" in checkpoint:
        checkpoint["state_dict"] = checkpoint.pop("model")
    if "optimizer_0" in checkpoint:
        checkpoint["optimizer_states"] = [checkpoint.pop("optimizer_0")]


def expected_names(of: Iterable[str], found: Iterable[str], trains: Iterable[str] | None) -> set[str]:
    """The names that a checkpoint of a student must have: all of them, or what trains where it has nothing else.

    Args:
        of: the student's weights.
        found: the checkpoint's.
        trains: of a student with adapters those that are trained; None for one without.
    """
    frozen = set(of) - set(of if trains is None else trains)
    return set(of) - frozen if frozen.isdisjoint(found) else set(of)


def student_weights(
    path: Path, like: Mapping[str, Tensor], *, trains: frozenset[str] | None = None
) -> dict[str, Tensor]:
    """The student's weights in a checkpoint of any kind: one file, consolidated shards, or a folder of them.

    Args:
        path: the checkpoint.
        like: weights by name of the model they are for; only names and shapes are read.
        trains: of a student with adapters the names that are trained; a checkpoint may hold those alone.
    Returns:
        by name, each [...] of the shape in ``like``.
    Raises:
        InputError: weights are missing, extra or of another shape.
    """
    found = _of_shards(path, like) if path.is_dir() else _of_file(path)
    differing = [name for name in like.keys() & found.keys() if like[name].shape != found[name].shape]
    wrong = sorted([*(expected_names(like.keys(), found.keys(), trains) ^ found.keys()), *differing])
    if wrong:
        raise InputError(
            f"`--ckpt_path` must be a checkpoint of the config's student, but {len(wrong)} weights of {path} are missing, extra "
            f"or of another shape: {', '.join(wrong[:5])}; give the run folder it was made in"
        )
    return found


def _of_file(path: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    from_consolidated(checkpoint)
    weights = checkpoint.get("state_dict", {})
    return {name.removeprefix(STUDENT): value for name, value in weights.items() if name.startswith(STUDENT)}


def _of_shards(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from torch.distributed import checkpoint as dcp

    saved = read_index(path).state_dict_metadata  # before torch reads the folder, see there
    prefixes = [prefix + STUDENT for prefix in ("state_dict.", "model.")]
    names = {name: prefix for prefix in prefixes for name in saved if name.startswith(prefix)}
    state = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in names}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(names[name]): value for name, value in state.items()}
