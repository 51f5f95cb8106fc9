"""What `import basicsr` brings besides BasicSR, once esc_arch has been imported: the patches, and our classes."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import compat

__all__ = ["attach_to_basicsr"]


def attach_to_basicsr() -> None:
    """Patch BasicSR and register our classes: now if it is imported, else when it is.

    So that networks and tools, which need no BasicSR, do not wait for it: it takes longer to import than they do.
    """
    # An earlier import of esc_arch may have left its own
    others = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path[:] = [_Finder(), *others]
    if sys.modules.get("basicsr") is not None:
        compat.prepare_import(imported_before=True)
        _complete()
    else:
        _forget_failed_import()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds BasicSR as the other finders do, and sees to what comes before its import and after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "basicsr":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.loader is not None:
                _wrap(spec.loader)
        finally:
            sys.meta_path.insert(0, self)
        return spec


def _wrap(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        _forget_failed_import()
        compat.prepare_import()
        execute(module)
        _complete()

    loader.exec_module = exec_module


def _forget_failed_import() -> None:
    """Drop the modules that an import that failed half-way left behind: they would be taken without the rest."""
    for name in [name for name in sys.modules if name.startswith("basicsr.")]:
        del sys.modules[name]


def _complete() -> None:
    from .register import register_all

    compat.apply_patches()
    register_all()
