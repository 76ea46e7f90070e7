"""Checkpoint files that are whole or not there: written aside, forced to the disk, read back, renamed; and which is the newest.

Beside ``step-8.ckpt`` stands ``step-8.ckpt.sha256``, which ``sha256sum -c`` reads too; of a folder of shards it names each file.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_opd.distributed import shared_failure
from lit_opd.errors import InputError, first_line
from lit_opd.run.lightning import dump_checkpoint, saves_shards
from lit_opd.run.shard_index import refused

LAST = "last.ckpt"
FOLDER = "checkpoints"
TEMPORARY = ".tmp"
CHECKSUM = ".sha256"
REQUEUE = "hpc_ckpt_"  # Lightning's name for what a SLURM job saves before it is queued again
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# -- writing -----------------------------------------------------------------------------------------------------------


def save(trainer: Trainer, path: str | Path, weights_only: bool | None = None, link: str | None = None) -> None:
    """Save the trainer's state so that ``path`` is the old checkpoint or the new one, never a part; called on every rank.

    Args:
        trainer: whose state.
        path: one file, or the folder of a strategy that saves shards.
        weights_only: as for ``Trainer.save_checkpoint``.
        link: a name in the same folder that points to the new checkpoint afterwards.
    Raises:
        InputError: it could not be written, reads back differently or could not be loaded, on every rank; nothing of it is left.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}{TEMPORARY}")
    checkpoint = dump_checkpoint(trainer, weights_only=bool(weights_only))  # None is False with a line in the log
    with shared_failure(), _explained(path, aside, first=trainer.is_global_zero):
        written = _write(trainer, checkpoint, aside)
        if trainer.is_global_zero:
            _require_loadable(aside, checkpoint)
            _publish(aside, path, written)
            if link is not None:
                point(path.with_name(link), path.name)
    trainer.strategy.barrier("checkpoint")


def _write(trainer: Trainer, checkpoint: dict[str, Any], path: Path) -> dict[str, str] | None:
    """Write the state; the digest of what was handed to the disk where this process wrote it, else None."""
    strategy = trainer.strategy
    if saves_shards(strategy) or type(strategy.checkpoint_io) is not TorchCheckpointIO:
        strategy.save_checkpoint(checkpoint, path)
        return None
    if not trainer.is_global_zero:
        return None
    # Lightning would build the whole file in memory, write it to the system's temporary folder and move it from there
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        hashed = _Hashed(file)
        torch.save(checkpoint, hashed)  # type: ignore[arg-type]
    return {"": hashed.digest.hexdigest()}


def _require_loadable(aside: Path, checkpoint: dict[str, Any]) -> None:
    """A state that only running code could restore would be refused when the run goes on: say so while it can be mended.

    Raises:
        InputError: it names the callback whose state it is.
    """
    try:
        counters(aside)
    except InputError as error:
        owners = [name for name, state in checkpoint.get("callbacks", {}).items() if _refusal(state) is not None]
        raise InputError(
            f"`{' and '.join(owners) or 'state_dict'}` must save plain values (tensors, numbers, text, lists, dicts), or no run "
            f"can go on from them, got a state that cannot be read without executing code ({refused(error.__cause__ or error)}); "
            "convert it in its state_dict, as with .item(), .tolist() or str()"
        ) from error


def _refusal(state: Any) -> Exception | None:
    """Why a part of a checkpoint could not be loaded, None where it can."""
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    try:
        torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # as in counters
        return error
    return None


class _Hashed:
    """A file whose content is hashed on its way."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Hash and write."""
        self.digest.update(data)
        return int(self.file.write(data))

    def flush(self) -> None:
        """To the operating system."""
        self.file.flush()


def _publish(aside: Path, path: Path, written: dict[str, str] | None) -> None:
    """Force to the disk, read back, give the public name, add the checksums."""
    expected = written or _digests(aside)
    for file in _files(aside):
        _to_disk(file)
    if _digests(aside) != expected:
        raise OSError(errno.EIO, "it reads back differently from what was written")
    checksum = _checksum(path)
    # of an older file of this name: a checkpoint without one is still good, with a wrong one it is not
    checksum.unlink(missing_ok=True)
    if path.is_dir():
        remove(path)
    os.replace(aside, path)
    if not path.name.startswith(REQUEUE):  # Lightning takes the digits of every such name for a version
        text = "".join(f"{digest}  {path.name}{name}\n" for name, digest in expected.items())
        temporary = checksum.with_name(f".{checksum.name}{TEMPORARY}")
        temporary.write_text(text)
        _to_disk(temporary)
        os.replace(temporary, checksum)
    _to_disk(path.parent)


def point(link: Path, target: str) -> None:
    """Make ``link`` a relative link to ``target`` in one step, whatever it was; a copy where there are no links."""
    aside = link.with_name(f".{link.name}{TEMPORARY}")
    _delete(aside)
    if link.is_dir() and not link.is_symlink():
        remove(link)
    try:
        os.symlink(target, aside)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        shutil.copyfile(link.with_name(target), aside)
    os.replace(aside, link)
    _to_disk(link.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint and its checksums; of a folder no part stays under its name."""
    _checksum(path).unlink(missing_ok=True)
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(f".{path.name}-old{TEMPORARY}")
        _delete(aside)
        os.replace(path, aside)
        path = aside
    _delete(path)


def sweep(folder: Path) -> None:
    """Delete what a kill left half written."""
    for path in folder.glob(f".*{TEMPORARY}"):
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path, aside: Path, *, first: bool) -> Iterator[None]:
    """An error of the disk becomes an InputError that names path and remedy; the half file goes."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, RuntimeError, CheckpointException, InputError) as error:
        if first:
            shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else _try_unlink(aside)
        if isinstance(error, InputError):
            raise
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(
            f"`RunCheckpoint.dirpath` must be a writable folder on a disk with room, but {path} could not be written: "
            f"{first_line(cause)}; free space or mend {path.parent}, and go on with --ckpt_path last"
        ) from error


def _try_unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        pass  # nothing was begun
    except OSError:
        rank_zero_warn(f"{path} is half written and could not be deleted")


def _to_disk(path: Path) -> None:
    """Force a file or a folder to the disk, and the file out of memory, so that reading it reads the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise") and path.is_file():
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


# -- checking ----------------------------------------------------------------------------------------------------------


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of the file ("") or of every file below the folder ("/name")."""
    found = {}
    for part in _files(path):
        name = "" if part == path else f"/{part.relative_to(path).as_posix()}"
        with part.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, None where it is whole.

    Without checksums (a kill came before them, or another program wrote it) the check sums inside the file itself decide.
    """
    if not path.exists():
        return "it is not there"
    path = path.resolve()
    checksum = _checksum(path)
    try:
        if checksum.is_file():
            lines = (line.split("  ", 1) for line in checksum.read_text().splitlines())
            expected = {name.removeprefix(path.name): digest for digest, name in lines}
            return None if _digests(path) == expected else f"it is not what {checksum.name} says"
        if path.is_dir():
            return None if (path / "meta.pt").is_file() else "it is not complete"
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return None if broken is None else f"its part {broken} is damaged"
    except Exception as error:  # zipfile raises many types about a damaged header, such as zlib.error
        return str(error) or type(error).__name__


def numbered(folder: Path) -> dict[int, Path]:
    """``step-N.ckpt`` by N, rising."""
    found = {path.stem.removeprefix("step-"): path for path in folder.glob("step-*.ckpt")}
    return {int(step): found[step] for step in sorted((name for name in found if name.isdigit()), key=int)}


def newest_step(run_dir: Path) -> int | None:
    """The step that ``last.ckpt`` points to, without a look into the file; None where nothing says it."""
    last = run_dir / FOLDER / LAST
    name = Path(os.readlink(last)).stem.removeprefix("step-") if last.is_symlink() else ""
    return int(name) if name.isdigit() else None


def counters(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without its weights being read: global_step, validation_due and more.

    Raises:
        InputError: another program's file, or a damaged one.
    """
    file = path / "meta.pt" if path.is_dir() else path  # a sharded checkpoint keeps its counters beside the shards
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return found | {"global_step": int(found["global_step"])}
    except Exception as error:  # what torch, zipfile and pickle raise about a file that is none of theirs
        raise InputError(
            f"`--ckpt_path` must be a checkpoint of this project, got {path}, which cannot be read without executing "
            f"code or is damaged ({type(error).__name__}); give another one"
        ) from error


def requeued(run_dir: Path, *, overwrites: bool = False) -> bool:
    """True in a SLURM job that was queued again and has a checkpoint to go on from.

    Args:
        run_dir: the run folder.
        overwrites: the command line replaces the folder, which a job does at its first start only.
    """
    restarted = _restarted()
    if overwrites and not restarted:
        return False
    saved = any(run_dir.glob(f"{REQUEUE}*.ckpt"))
    return SLURMEnvironment.detect() and (saved or (restarted and bool(numbered(run_dir / FOLDER))))


def _restarted() -> bool:
    """SLURM counts how often it has queued this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0) > 0


def slurm_job() -> str | None:
    """The id of the SLURM job that this process runs in, which stays when it is queued again; None elsewhere."""
    return os.environ.get("SLURM_JOB_ID") if SLURMEnvironment.detect() else None


def saved_by_this_job(run_dir: Path) -> Path | None:
    """The newest whole checkpoint that this SLURM job has saved before it was queued again; says loudly which newer ones are
    damaged. None where there is none, or nothing was queued again."""
    job = slurm_job()
    if job is None or not _restarted():
        return None
    return _first_whole(path for path in _by_age(run_dir) if _is_of(path, job))[0]


def _is_of(path: Path, job: str) -> bool:
    try:
        return bool(counters(path).get("slurm_job") == job)
    except InputError:  # it is looked at first and then refused with the reason
        return True


def newest(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run; says loudly which newer ones are damaged.

    Raises:
        InputError: there is none.
    """
    found, refused = _first_whole(_by_age(run_dir))
    if found is not None:
        return found
    last = run_dir / FOLDER / LAST
    if not refused:
        raise InputError(f"`--ckpt_path` must be a checkpoint, got 'last', but there is no {last}")
    damage = "; ".join(f"{path}: {why}" for path, why in refused.items())
    raise InputError(
        f"`--ckpt_path last` must find a whole checkpoint, but none is ({damage}); start anew with --overwrite"
    )


def _first_whole(paths: Iterable[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The first one that is whole, and what is wrong with those before it, which a warning says; None where none is."""
    refused: dict[Path, str] = {}
    for path in paths:
        reason = problem(path)
        if reason is None:
            for bad, why in refused.items():
                rank_zero_warn(f"THE CHECKPOINT {bad} CANNOT BE USED: {why}; the run goes on from {path} instead")
            return path, refused
        refused[path] = reason
    return None, refused


def best(run_dir: Path) -> Path:
    """The checkpoint of a run where the metric that a checkpoint callback monitors was best, as its newest checkpoint says.

    Raises:
        InputError: no callback monitors one, or the file is gone.
    """
    last = newest(run_dir)
    folders, states = (run_dir / FOLDER, run_dir), counters(last).get("callbacks", {})
    found = [path for state in states.values() if isinstance(state, dict) for path in _best_of(state, folders)]
    whole = [path for path in found if problem(path) is None]
    if not whole:
        gone = f"; {found[0]} is not whole or not there" if found else ""
        raise InputError(
            f"`--ckpt_path best` must find a best checkpoint, but {last} names none{gone}; train with "
            "`RunCheckpoint.monitor` (or a ModelCheckpoint with `monitor`), or give a checkpoint's path"
        )
    return whole[0]


def _best_of(state: dict[str, Any], folders: Sequence[Path]) -> Iterator[Path]:
    """Of RunCheckpoint's state (value and name) or Lightning's ModelCheckpoint's (a path, where it monitors something)."""
    own, theirs = state.get("best"), state.get("best_model_path")
    if isinstance(own, list | tuple) and len(own) == 2:
        yield from (folder / str(own[1]) for folder in folders if (folder / str(own[1])).exists())
    if theirs and state.get("monitor"):
        yield Path(str(theirs))


def _by_age(run_dir: Path) -> list[Path]:
    """What ``last`` may mean, newest first: a requeued job's, what last.ckpt points to, then smaller steps.

    Larger steps than last.ckpt's are of a past that the run has gone back before.
    """
    last, steps = run_dir / FOLDER / LAST, numbered(run_dir / FOLDER)
    found = list(reversed(steps.values()))
    target = last.parent / os.readlink(last) if last.is_symlink() else last
    if last.is_symlink() or last.exists():
        name = target.stem.removeprefix("step-")
        below = [path for step, path in steps.items() if not name.isdigit() or step < int(name)]
        found = [target, *reversed(below)]
    saved = sorted(run_dir.glob(f"{REQUEUE}*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    newer = [path for path in saved if not found or problem(found[0]) or _step(path) >= _step(found[0])]
    return [*newer, *found]


def _step(path: Path) -> int:
    try:
        return int(counters(path)["global_step"])
    except InputError:  # it is looked at first and then refused with the reason
        return 1 << 62


def intact(path: Path) -> Path:
    """``path`` itself.

    Raises:
        InputError: it is not there, or damaged: what was asked for by name is not replaced.
    """
    if not path.exists():
        raise InputError(f"`--ckpt_path` must be a checkpoint, got {str(path)!r}, but there is no {path}")
    reason = problem(path)
    if reason is not None:
        raise InputError(
            f"`--ckpt_path` must be a whole checkpoint, got {path}: {reason}; give an older one, or --ckpt_path last"
        )
    return path
