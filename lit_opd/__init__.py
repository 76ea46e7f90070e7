"""Position-aware on-policy distillation of language models on PyTorch Lightning.

The public names below are imported when they are first used: ``from lit_opd import OPDModule``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "lit_opd.module": ("OPDModule",),
    "lit_opd.models.student": ("LoraSettings", "StudentSettings"),
    "lit_opd.prompts": ("PromptDataModule",),
    "lit_opd.teacher": (
        "AlignedTeacher", "CachedTeacher", "LocalTeacher", "MixedTeacher", "RemoteTeacher", "RoutedTeacher", "Teacher",
    ),
    "lit_opd.rollout": (
        "DecodeSampler", "LengthBudget", "PartialSampler", "RatioStop", "ReplaySampler", "Sampler", "SamplingSettings",
        "TransformersSampler", "VLLMEngine", "VLLMSampler",
    ),
    "lit_opd.turns": ("Answer", "Environment", "Episode", "PythonTool", "Response", "Tool", "ToolEnvironment", "TurnsSampler"),
    "lit_opd.advantage": ("AdvantageTransform",),
    "lit_opd.weighting": ("ImportanceWeighting", "Uniform", "WeightingStrategy"),
    "lit_opd.objective": ("Divergence", "Likelihood", "Objective", "PolicyLoss"),
    "lit_opd.evaluation": ("ValidationSettings",),
    "lit_opd.types": ("PromptBatch", "Rollout", "StepRecord", "TokenScores", "TokenSignal"),
    "lit_opd.errors": ("InputError",),
}  # fmt: skip
_PUBLIC = {name: place for place, names in _PLACES.items() for name in names}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC and not _names_a_class():
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"lit_opd has no {name!r}; it has {', '.join(sorted(_PUBLIC))}")


def _names_a_class() -> bool:
    """True where jsonargparse looks for the shortest path of a class: configs and checkpoints keep the paths they always had."""
    asks = sys._getframe(2)
    return asks.f_code.co_name == "get_import_path" and str(asks.f_globals.get("__name__")).startswith("jsonargparse")


def __dir__() -> list[str]:
    return __all__


class _Checkout:
    """Finds ``lit_opd.callbacks`` in a checkout, where the folder stands beside the package; an installation has it inside."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = f"{__name__}.{folder.name}", folder

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """For the import system."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(
            name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )


_INSIDE = Path(__file__).resolve().parent / "callbacks"
_BESIDE = _INSIDE.parents[1] / "callbacks"
if not _INSIDE.is_dir() and (_BESIDE / "__init__.py").is_file():
    sys.meta_path.insert(0, _Checkout(_BESIDE))  # type: ignore[arg-type]
