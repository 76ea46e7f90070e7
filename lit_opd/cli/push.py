"""``push RUN_OR_FOLDER --repo USER/NAME``: an exported student with its model card to the Hugging Face hub.

The token is the hub client's own affair (``hf auth login`` or HF_TOKEN): no option takes it and nothing here prints it.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lit_opd.cli.export import CONFIG, export_checkpoint, found_checkpoint
from lit_opd.cli.redaction import one_line
from lit_opd.errors import InputError, first_line
from lit_opd.report.model_card import CARD, write_card
from lit_opd.shipped import program

MODEL_FILES = ("config.json", "adapter_config.json")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def parser() -> ArgumentParser:
    """The command's options."""
    own = ArgumentParser(
        prog=f"{program()} push", description="Upload an exported student with its model card to the Hugging Face hub."
    )
    own.add_argument("folder", help="a run folder, or an exported one")
    own.add_argument("--repo", required=True, help="USER/NAME; made where it is not there")
    own.add_argument("--checkpoint", help="last, best or a path; default student/ in the run folder")
    flag: dict[str, Any] = {"nargs": "?", "const": True, "type": _truth, "metavar": "true|false"}
    own.add_argument("--private", **flag, default=None, help="a new repository is; default as your account has it")
    own.add_argument("--adapter", **flag, default=False, help="of a LoRA student the adapter alone, not merged")
    own.add_argument("--dry_run", **flag, default=False, help="list the files and show the card; nothing is sent")
    return own


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"must be true or false, got {word!r}")
    return word.lower() == "true"


def run(words: Sequence[str]) -> None:
    """Upload, and print the address.

    Raises:
        InputError: wrong input, or the hub refused it.
    """
    given = parser().parse_args(list(words))
    if not _REPO.fullmatch(given.repo):
        raise InputError(f"`--repo` must be USER/NAME, got {given.repo!r}")
    place = Path(given.folder)
    if not place.is_dir():
        raise InputError(f"`push` must be given a run folder or an exported one, got {given.folder!r}")
    is_run = (place / CONFIG).is_file() and not _is_model(place)
    if not is_run:
        if given.checkpoint is not None or given.adapter:
            raise InputError(f"`--checkpoint` and `--adapter` go with a run folder, got {place}, which holds a model")
        _push(_own_folder(place), given)
    elif given.checkpoint is None and not given.adapter:
        _push(_own_folder(place / "student"), given)
    else:
        _push_checkpoint(place, given)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MODEL_FILES)


def _own_folder(folder: Path) -> Path:
    """An exported folder, with a card where its run is the folder above."""
    if not _is_model(folder):
        raise InputError(
            f"`push` must find an exported student, got {folder} without {' or '.join(MODEL_FILES)}; give --checkpoint last, "
            f"or export it first: {program()} export --help"
        )
    run_dir = folder.resolve().parent
    if not (folder / CARD).is_file() and (run_dir / CONFIG).is_file():
        write_card(folder, run_dir, title=run_dir.name, steps=_step_of(folder))
    return folder


def _step_of(folder: Path) -> int | None:
    """Of ``student-step-N``; None for the run's end."""
    found = re.fullmatch(r".*-step-(\d+)", folder.name)
    return int(found[1]) if found else None


def _push_checkpoint(run_dir: Path, given: Any) -> None:
    """Export beside the run, upload, and leave nothing."""
    word = given.checkpoint or "last"
    checkpoint, _ = found_checkpoint(word, str(run_dir))
    with TemporaryDirectory(prefix=".push-", dir=run_dir) as beside:
        folder = Path(beside) / "student"
        export_checkpoint(checkpoint, run_dir, folder, adapter=given.adapter)
        _push(folder, given)


def _push(folder: Path, given: Any) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if given.dry_run:
        print("\n".join(f"{path.stat().st_size:>12,}  {path.name}" for path in files))
        print((folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else "no model card")
        return
    print(_uploaded(folder, [path.name for path in files], repo=given.repo, private=given.private))


def _uploaded(folder: Path, names: list[str], *, repo: str, private: bool | None) -> str:
    """The address of the repository.

    Raises:
        InputError: the hub, or the way to it, refused it.
    """
    from huggingface_hub import HfApi, get_token

    client = HfApi()
    try:
        address = str(client.create_repo(repo, private=private, exist_ok=True))
        message = "Upload the student and its card"
        client.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names, commit_message=message)
    except Exception as error:  # the client raises its own classes, those of its HTTP library, and OSError
        said = one_line(_said(error))
        held = get_token()
        said = said.replace(held, "***") if held else said
        raise InputError(
            f"`--repo` {repo} at {client.endpoint} took nothing: {said}; log in with `hf auth login` or set HF_TOKEN to a token "
            "that may write there, and look at HF_HUB_OFFLINE"
        ) from None
    return address


def _said(error: BaseException) -> str:
    """What the hub's client says, with its class: some say nothing, others a page."""
    return f"{type(error).__name__}: {first_line(error)}"
