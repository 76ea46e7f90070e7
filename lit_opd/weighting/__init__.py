"""Weighting strategies: one class a file, found by being there.

Every module of this folder is imported and every public ``WeightingStrategy`` in it is re-exported, so a new strategy
is a new file and nothing else. A class in a file of your own needs no registration at all: give its class path.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from lit_opd.weighting.base import WeightingStrategy

__all__ = ["WeightingStrategy"]


def _export_strategies() -> None:
    for info in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        module = importlib.import_module(info.name)
        for name, value in inspect.getmembers(module, inspect.isclass):
            own = value.__module__ == module.__name__ and not name.startswith("_")
            if own and issubclass(value, WeightingStrategy):
                globals()[name] = value
                __all__.append(name)


_export_strategies()


def __getattr__(name: str) -> Any:
    raise AttributeError(f"lit_opd.weighting has no strategy {name!r}; it has {', '.join(sorted(set(__all__)))}")
