"""Two names for the same modules: a class is one class, whichever name it was imported by."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any


class _OtherName:
    """Finds and loads ``other`` and what is in it as the modules of ``name``."""

    def __init__(self, other: str, name: str) -> None:
        self.other, self.name = other, name

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """For the import system."""
        return spec_from_loader(name, self) if name.startswith(f"{self.other}.") else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module that is meant."""
        module = importlib.import_module(self.name + spec.name.removeprefix(self.other))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run a second time; the module keeps its own name."""
        module.__spec__ = self._own


def same_modules(other: str, name: str) -> None:
    """Make ``other`` another name of the package ``name``; called by the package itself, nothing happens under its own name."""
    if other != name:
        sys.meta_path.insert(0, _OtherName(other, name))  # type: ignore[arg-type]
        sys.modules[other] = importlib.import_module(name)
