"""Which BasicSR runs, when there is more than one, and whether it is started in a way that esc_arch cannot reach.

People have BasicSR from pip and as a clone, often both, and a clone's folder ``basicsr/`` in the current
folder is found first under ``python -m``. Training then silently uses code that nobody meant. Distributions of other
names (basicsr-fixed) bring a package ``basicsr`` too; pip puts all of them into one folder, file over file.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from importlib.metadata import Distribution, distributions
from pathlib import Path

__all__ = ["find_copies", "find_distributions", "forget_failed_import", "warn_about_copies", "warn_about_script"]


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


def find_distributions() -> dict[str, Distribution]:
    """What pip installed that brings a package `basicsr`, by name, each once."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        names, files = distribution.read_text("top_level.txt"), ""
        if names is None:  # it was not built by setuptools
            files = distribution.read_text("RECORD") or ""
        if "basicsr" in (names or "").split() or re.search("^basicsr/__init__.py,", files, re.MULTILINE):
            found.setdefault(distribution.metadata["Name"], distribution)
    return found


def warn_about_copies() -> None:
    """Say clearly which copy is used when there are several (a `UserWarning`)."""
    copies, installed = find_copies(), find_distributions()
    if len(copies) > 1:
        used, *others = copies
        reason = "imported before esc_arch" if "basicsr" in sys.modules else "first on the path"
        warnings.warn(
            f"There are {1 + len(others)} copies of BasicSR on the path. Used: {used} ({reason}). "
            f"Not used: {', '.join(map(str, others))}. Uninstall one of them, or start `basicsr` from another folder.",
            stacklevel=4,
        )
    if len(installed) > 1:
        warnings.warn(f"{mixed(installed)}. {how_to_separate(installed)}", stacklevel=4)


def mixed(installed: dict[str, Distribution]) -> str:
    """That more than one distribution brings BasicSR."""
    names = " and ".join(f"{name} {distribution.version}" for name, distribution in installed.items())
    return f"{names} are installed, each of which is a BasicSR: in one folder their files replace each other's"


def how_to_separate(installed: dict[str, Distribution]) -> str:
    return (
        f"Keep one: pip uninstall {' '.join(installed)}, then pip install --no-build-isolation basicsr==1.4.2 (or the "
        "other)."
    )


def warn_about_script() -> None:
    """Say that `python basicsr/train.py` runs functions of its own (a `UserWarning`).

    What is defined in the main module is not what `import basicsr.train` gives, and is made after esc_arch is imported.
    """
    file = getattr(sys.modules["__main__"], "__file__", None)
    script = Path(file).resolve() if file else Path()
    if script.parent.name == "basicsr" and script.name in ("train.py", "test.py"):
        warnings.warn(
            f"{script} is run as a script, so esc_arch cannot fix what is defined in it: resuming without a GPU, for "
            f"instance, will fail. Start `basicsr {script.stem} -opt FILE` instead.",
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
