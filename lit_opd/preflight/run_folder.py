"""Which folder a run may fill, and what ``--overwrite`` must not delete."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_opd.errors import InputError

MARKS = ("config.yaml", "checkpoints")  # every run that has started has one
OUTPUTS = frozenset({"run_dir", "default_root_dir", "dirpath", "save_dir"})  # settings that name what a run writes


def require_free(folder: Path, settings: Mapping[str, Any]) -> None:
    """A run folder that a new run may fill.

    Args:
        folder: the run folder.
        settings: of the command line; those that name an existing file or folder are inputs.
    Raises:
        InputError: a file, or a folder with something in it, unless the run goes on from a checkpoint or overwrites; and a
            folder that overwriting must not delete.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`--run_dir` must be a folder, got the file {folder}")
    if settings.get("ckpt_path") or not folder.is_dir() or not any(folder.iterdir()):
        return
    reason = _must_stay(folder, settings)
    if not settings.get("overwrite"):
        deleting = "" if reason else ", or replace what is there with --overwrite true on the command line"
        raise InputError(
            f"`--run_dir` must be empty or new, but {folder} has files in it; give another --run_dir, go on with "
            f"--ckpt_path last{deleting}"
        )
    if reason:
        raise InputError(f"`--overwrite` must be false for {folder}, which {reason}; give another --run_dir")


def freed_bytes(run_dir: Path, folders: Iterable[Path], settings: Mapping[str, Any], *, device: int) -> int:
    """Bytes on a disk that the run will delete: former checkpoints and the exported student, or all that it overwrites.

    Args:
        run_dir: the run folder.
        folders: those that hold checkpoints.
        settings: of the command line.
        device: ``st_dev`` of the disk.
    """
    if settings.get("ckpt_path"):
        roots = [run_dir / "student", *(path for folder in folders for path in folder.glob("step-*"))]
    else:
        roots = [run_dir] if settings.get("overwrite") else []
    files = [path for root in roots for path in (root, *root.rglob("*")) if path.is_file() and not path.is_symlink()]
    return sum(status.st_size for status in (path.lstat() for path in set(files)) if status.st_dev == device)


def _must_stay(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Why the content of ``folder`` is not to be deleted, None where it is a former run's alone."""
    whole = folder.resolve()
    if Path.cwd().resolve().is_relative_to(whole):
        return "holds the working directory"
    if not any((folder / mark).exists() for mark in MARKS):
        return f"no run has written (it has no {' and no '.join(MARKS)})"
    for name, path in _paths(settings):
        places = path.resolve(), path.parent.resolve() / path.name  # what a link leads to, and the link
        if any(place.is_relative_to(whole) for place in places):
            return f"holds this run's own input `{name}`, {path}"
    return None


def _paths(value: Any, name: str = "") -> Iterator[tuple[str, Path]]:
    """(setting, path) of everything below ``value`` that names an existing file or folder."""
    if isinstance(value, str | os.PathLike):
        path = os.path.expanduser(os.fspath(value))
        if path and os.path.exists(path):
            yield name, Path(path)
        return
    if isinstance(value, list | tuple):
        parts = [(name, part) for part in value]
    else:
        inner = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        parts = [(f"{name}.{key}".lstrip("."), part) for key, part in inner.items() if key not in OUTPUTS]
    for where, part in parts:
        yield from _paths(part, where)
