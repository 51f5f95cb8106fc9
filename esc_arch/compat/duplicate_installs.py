"""Which BasicSR runs, when there is more than one, and whether it is started in a way that esc_arch cannot reach.

People have BasicSR from pip and as a clone, whose folder ``basicsr/`` in the current folder is found first under
``python -m``. Distributions of other names (basicsr-fixed) bring it too; pip puts all into one folder, file over file.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from importlib.metadata import Distribution, distributions
from pathlib import Path

__all__ = ["find_copies", "find_distributions", "warn_about_copies", "warn_about_script"]


def find_copies() -> list[Path]:
    """The folders of all the `basicsr` packages that can be imported, the one that `import` takes first."""
    spec = sys.modules["basicsr"].__spec__ if "basicsr" in sys.modules else importlib.util.find_spec("basicsr")
    found = [Path(spec.origin).resolve().parent] if spec is not None and spec.origin else []
    on_path = ((Path(entry or ".") / "basicsr").resolve() for entry in sys.path)
    return list(dict.fromkeys([*found, *(folder for folder in on_path if (folder / "__init__.py").is_file())]))


def find_distributions() -> dict[str, Distribution]:
    """What pip installed that brings a package `basicsr`, by name, each once."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        packages = distribution.read_text("top_level.txt")
        if packages is None:  # it was not built by setuptools
            files = distribution.read_text("RECORD") or ""
            packages = "basicsr" if re.search("^basicsr/__init__.py,", files, re.MULTILINE) else ""
        if "basicsr" in packages.split():
            found.setdefault(distribution.metadata["Name"], distribution)
    return found


def warn_about_copies(imported_before: bool) -> None:
    """Say clearly which copy is used when there are several (a `UserWarning`)."""
    copies, installed = find_copies(), find_distributions()
    if len(copies) > 1:
        reason = "imported before esc_arch" if imported_before else "first on the path"
        warnings.warn(
            f"There are {len(copies)} copies of BasicSR on the path. Used: {copies[0]} ({reason}). Not used: "
            f"{', '.join(map(str, copies[1:]))}. Uninstall one of them, or start `basicsr` from another folder.",
            stacklevel=4,
        )
    if len(installed) > 1:
        warnings.warn(". ".join(mixed(installed)), stacklevel=4)


def mixed(installed: dict[str, Distribution]) -> tuple[str, str]:
    """That more than one distribution brings BasicSR, and what to do."""
    versions = " and ".join(f"{name} {distribution.version}" for name, distribution in installed.items())
    return (
        f"{versions} are installed, each of which is a BasicSR: in one folder their files replace each other's",
        f"Keep one: pip uninstall {' '.join(installed)}, then basicsr setup-training (or pip install the other).",
    )


def warn_about_script() -> None:
    """Say that `python basicsr/train.py` runs functions of its own, not those of `basicsr.train` (a `UserWarning`)."""
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve()
    if script.parent.name == "basicsr" and script.name in ("train.py", "test.py"):
        warnings.warn(
            f"{script} is run as a script, so esc_arch cannot fix what is defined in it: resuming without a GPU, for "
            f"instance, will fail. Start `basicsr {script.stem} -opt FILE` instead.",
            stacklevel=4,
        )
