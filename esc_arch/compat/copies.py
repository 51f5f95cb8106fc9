"""Which BasicSR runs, when there is more than one.

People have BasicSR from pip and as a clone, often both, and a clone's folder ``basicsr/`` in the current
folder is found first under ``python -m``. Training then silently uses code that nobody meant.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

__all__ = ["find_copies", "forget_failed_import", "warn_about_copies"]


def find_copies() -> list[Path]:
    """The folders of all the `basicsr` packages that can be imported, the one that `import` takes first."""
    found: list[Path] = []
    spec = importlib.util.find_spec("basicsr") if "basicsr" not in sys.modules else sys.modules["basicsr"].__spec__
    if spec is not None and spec.origin:
        found.append(Path(spec.origin).resolve().parent)
    for entry in sys.path:
        package = Path(entry or ".") / "basicsr"
        if (package / "__init__.py").is_file() and package.resolve() not in found:
            found.append(package.resolve())
    return found


def warn_about_copies() -> None:
    """Say clearly which copy is used when there are several (a `UserWarning`)."""
    copies = find_copies()
    if len(copies) < 2:
        return
    used, *others = copies
    reason = "imported before esc_arch" if "basicsr" in sys.modules else "first on the path"
    warnings.warn(
        f"There are {1 + len(others)} copies of BasicSR on the path. Used: {used} ({reason}). "
        f"Not used: {', '.join(map(str, others))}. Uninstall one of them, or start `basicsr` from another folder.",
        stacklevel=4,
    )


def forget_failed_import() -> None:
    """Drop what an `import basicsr` that failed half-way left behind.

    Its sub-modules stay in `sys.modules` although the package is gone, with registries filled in part; the
    next attempt would register the same names again, which BasicSR refuses.
    """
    if "basicsr" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("basicsr.")]:
            del sys.modules[name]
