"""`basicsr setup-training`: install the published BasicSR 1.4.2, which training needs, on every Python.

Its own installation downloads PyTorch a second time, to build in an environment of its own, and from Python 3.13 on it
ends in KeyError: '__version__': BasicSR's setup.py runs `exec(...)` and looks its version up in `locals()`, and since
then (PEP 667) exec() without namespaces writes to a copy of its caller's variables. Here it is built with the PyTorch
that is there, by processes, and no others, that have an exec() that writes to the variables themselves, as it did
before. What is built and installed is the published package as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

from esc_arch.errors import FAULT, UserError

__all__ = ["run"]

#: BasicSR and what it takes to build it; lmdb as esc_arch wants it.
BUILD_TOOLS = ("setuptools>=77", "wheel", "cython")
REQUIREMENTS = ("basicsr==1.4.2", "lmdb>=1.4")

#: Python imports a module of this name when it starts.
SITECUSTOMIZE = """
import builtins
import sys

exec_to_a_copy = builtins.exec


def exec(source, globals=None, locals=None, /, **closure):
    if globals is None and locals is None:
        caller = sys._getframe(1)
        globals, locals = caller.f_globals, caller.f_locals
    elif globals is None:
        globals = sys._getframe(1).f_globals
    elif locals is None:
        locals = globals
    return exec_to_a_copy(source, globals, locals, **closure)


if sys.version_info >= (3, 13):
    builtins.exec = exec
"""


def run(args: argparse.Namespace) -> int:
    """Install what is missing; returns the exit status: 1 if pip or uv failed, whose own messages say why."""
    for name in packages_distributions().get("basicsr", ()):  # such as basicsr-fixed, whose files it would replace
        print(f"{name} {version(name)} is installed already, which is a BasicSR. `basicsr doctor` says if it is ready.")
        return 0
    install = _installer()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
        search = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        # An isolated build would not see the module, and would download PyTorch a second time
        for packages in (BUILD_TOOLS, ("--no-build-isolation", *REQUIREMENTS)):
            command = [*install, *args.options, *packages]
            print(f"$ {' '.join(command)}", flush=True)
            if subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, check=False).returncode:
                print(f"basicsr setup-training: {command[0]} failed; its messages above say why.", file=sys.stderr)
                return FAULT
    print("BasicSR is installed: basicsr train is ready.")
    return 0


def _installer() -> list[str]:
    """The command that installs into this environment: pip's, or uv's, whose environments have no pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]
    if (uv := shutil.which("uv")) is not None:
        return [uv, "pip", "install", "--python", sys.executable]
    raise UserError(
        "BasicSR is installed by pip or uv, and neither is here: run `python -m ensurepip`, then this again."
    )
