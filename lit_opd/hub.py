"""Whether the Hugging Face hub answers: asked once a process, and where it does not, only the local cache is read.

Its client tries again for minutes, for every file of every model. A run without a network should end at once, with one line.
"""

from __future__ import annotations

import os
import sys
from functools import cache

from lit_opd.errors import first_line

SECONDS = 10.0  # for an answer of any kind


@cache
def silence() -> str:
    """Why the hub cannot be reached, as a sentence without a full stop; empty where it answers, or where it is not to be asked.

    From a silence on this process, and those that it starts, read the cache only.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # what the client of the installed version raises
        _read_the_cache_only()
        return f"the hub {constants.ENDPOINT} does not answer ({first_line(error)})"
    return ""


def _read_the_cache_only() -> None:
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # for ranks and workers, and for packages that are imported later
    constants.HF_HUB_OFFLINE = True
    settings = sys.modules.get("datasets.config")
    if settings is not None:
        settings.HF_HUB_OFFLINE = settings.HF_DATASETS_OFFLINE = True  # type: ignore[attr-defined]


def failure(said: str, what: str) -> tuple[str, str]:
    """Reason and remedy of something on the hub that could not be loaded.

    Args:
        said: by the library that tried.
        what: "model" or "data set".
    """
    from huggingface_hub import constants

    why = silence()
    if why:
        reason = f"{why}, and the local cache has no such {what}"
        return (
            reason,
            f"set HF_HUB_OFFLINE=1 with a filled cache, or HF_ENDPOINT to a mirror, or give a local {_form(what)}",
        )
    if constants.HF_HUB_OFFLINE:
        return said, f"unset HF_HUB_OFFLINE, fill the cache, or give a local {_form(what)}"
    return said, f"check the id, set HF_TOKEN where it is gated or private, or give a local {_form(what)}"


def _form(what: str) -> str:
    return "folder" if what == "model" else ".jsonl, .parquet or folder"
