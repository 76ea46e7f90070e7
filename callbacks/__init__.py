"""Callbacks: observers of ``outputs["step"]`` and phases, and users of ``generate`` and ``export_student``."""

from __future__ import annotations

from lightning.pytorch import Callback

from callbacks.checkpoint import RunCheckpoint
from callbacks.export import ExportStudent
from callbacks.progress import Progress
from callbacks.rng import RngState
from callbacks.summary import Summary

__all__ = ["ExportStudent", "Progress", "RngState", "RunCheckpoint", "Summary", "default_callbacks"]


def default_callbacks() -> list[Callback]:
    """What every run gets unless its config names a callback of the same class."""
    return [Progress(), RngState(), ExportStudent(), Summary(), RunCheckpoint()]
