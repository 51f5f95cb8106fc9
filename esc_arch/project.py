"""The user's own package, whose modules register networks, models, data sets and losses when they are imported.

Only modules that the user names are looked for in the current folder, and what is in their packages: whatever else
lies there, which may be a download, is not imported, nor by child processes (`leave_current_folder`). Those look there
for the same names.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import sys
import traceback
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from .errors import UserError

__all__ = ["find_as_parent_process", "import_modules", "leave_current_folder"]

#: Tells child processes what `_FOLDERS` is, as JSON.
_VARIABLE = "ESC_ARCH_PROJECT"
#: By top-level module, the folder in which it is looked for first.
_FOLDERS: dict[str, str] = {}


def leave_current_folder() -> None:
    """Let processes that are started from now on import nothing from the current folder, unless PYTHONPATH names it.

    Python has it first on the path with `-c`, by which worker processes start.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.version_info < (3, 11):  # which does not know it
        import multiprocessing.util
        import subprocess

        flags = subprocess._args_from_interpreter_flags  # type: ignore[attr-defined]
        multiprocessing.util._args_from_interpreter_flags = lambda: ["-I", *flags()]  # type: ignore[attr-defined]


def import_modules(names: object, where: str) -> None:
    """Import modules of the user's own package, in this order; prints a note for each that was not imported before.

    Args:
        names: a module's name, a list of them, or None.
        where: what named them; messages begin with it.

    Raises:
        UserError: a name is invalid, or a module cannot be imported.
    """
    listed: list[Any] = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and all(map(str.isidentifier, name.split("."))) for name in listed):
        raise UserError(f"{where}: {names!r} given; must be a module, such as hat.archs, or a list of modules")
    if listed:
        os.environ[_VARIABLE] = json.dumps({name.partition(".")[0]: os.getcwd() for name in listed} | _FOLDERS)
        find_as_parent_process()
    for name in listed:
        if name not in sys.modules:
            _import(name, where)


def find_as_parent_process() -> None:
    """Find the modules that the parent process finds: what it sends, such as a data set, may be of them."""
    _FOLDERS.update(json.loads(os.environ.get(_VARIABLE, "{}")))
    if _FOLDERS and _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder(importlib.abc.MetaPathFinder):
    """Looks for top-level modules in the folders of `_FOLDERS`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _FOLDERS:
            return None
        spec = PathFinder.find_spec(name, [_FOLDERS[name]])
        # A folder without __init__.py gives way to a package elsewhere, as everywhere in Python
        return PathFinder.find_spec(name) or spec if spec is not None and spec.loader is None else spec


_FINDER = _Finder()


def _import(name: str, where: str) -> None:
    from esc_arch.training.distributed import print_note

    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever code of others raises
        raise UserError(f"{where}: {name} cannot be imported: {_reason(error)}") from error
    print_note(f"imported {name}, which ran the code of {module.__file__ or next(iter(module.__path__))}.")


def _reason(error: BaseException) -> str:
    """One line: what went wrong, and where in the user's code."""
    folder = os.getcwd()
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<frozen")
    ]
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name and not frames:
        return f"there is no module {name}, neither in the current folder, {folder}, nor among installed packages"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if frames:
        frame = ([frame for frame in frames if frame.filename.startswith(folder)] or frames)[-1]
        text += f" ({frame.filename}, line {frame.lineno})"
    if name and PathFinder.find_spec(name.partition(".")[0], [folder]) is not None:
        text += f". It is in the current folder, of which only named modules are imported: name {name}, too"
    return text
