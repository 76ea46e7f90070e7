"""Callbacks: observers of ``outputs["step"]`` and phases, and users of ``generate`` and ``export_student``.

Their name is ``lit_opd.callbacks``. In a checkout, where the folder stands beside the package, ``callbacks`` is another name
of the same modules.
"""

from __future__ import annotations

from lightning.pytorch import Callback
from lit_opd.callbacks.checkpoint import RunCheckpoint
from lit_opd.callbacks.early_aime import EarlyAIMEEvaluation
from lit_opd.callbacks.export import ExportStudent
from lit_opd.callbacks.hints import RunHints
from lit_opd.callbacks.position_profile import PositionProfile
from lit_opd.callbacks.predictions import PredictionFiles
from lit_opd.callbacks.progress import Progress
from lit_opd.callbacks.report import RunReport
from lit_opd.callbacks.rng import RngState
from lit_opd.callbacks.rollout_samples import RolloutSamples
from lit_opd.callbacks.stopping import StopOnSignal
from lit_opd.callbacks.summary import Summary
from lit_opd.callbacks.throughput import Throughput

from lit_opd.one_name import same_modules

same_modules(__name__, "lit_opd.callbacks")

__all__ = [
    "EarlyAIMEEvaluation",
    "ExportStudent",
    "PositionProfile",
    "PredictionFiles",
    "Progress",
    "RngState",
    "RolloutSamples",
    "RunCheckpoint",
    "RunHints",
    "RunReport",
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
        RunHints(),
        ExportStudent(),
        PredictionFiles(),
        Summary(),
        RunReport(),
        StopOnSignal(),
        RunCheckpoint(),
    ]
