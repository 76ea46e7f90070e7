"""Callbacks: observers of ``outputs["step"]`` and phases, and users of ``generate`` and ``export_student``."""

from __future__ import annotations

from lightning.pytorch import Callback

from callbacks.checkpoint import RunCheckpoint
from callbacks.early_aime import EarlyAIMEEvaluation
from callbacks.export import ExportStudent
from callbacks.position_profile import PositionProfile
from callbacks.predictions import PredictionFiles
from callbacks.progress import Progress
from callbacks.rng import RngState
from callbacks.rollout_samples import RolloutSamples
from callbacks.stopping import StopOnSignal
from callbacks.summary import Summary
from callbacks.throughput import Throughput

__all__ = [
    "EarlyAIMEEvaluation",
    "ExportStudent",
    "PositionProfile",
    "PredictionFiles",
    "Progress",
    "RngState",
    "RolloutSamples",
    "RunCheckpoint",
    "StopOnSignal",
    "Summary",
    "Throughput",
    "default_callbacks",
]


def default_callbacks() -> list[Callback]:
    """What every run gets unless its config names a callback of the same class."""
    return [
        Progress(),
        RngState(),
        PositionProfile(),
        RolloutSamples(),
        Throughput(),
        ExportStudent(),
        PredictionFiles(),
        Summary(),
        StopOnSignal(),
        RunCheckpoint(),
    ]
