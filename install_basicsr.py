"""Install BasicSR 1.4.2 on Python 3.13 and newer, where `pip install basicsr` ends in KeyError: '__version__'.

    python install_basicsr.py [OPTION_OF_PIP_INSTALL ...]

Needs `setuptools>=77 wheel cython` and PyTorch in the environment, as the README's lines install them.

BasicSR's setup.py runs `exec(...)` and looks its version up in `locals()`. Since Python 3.13 (PEP 667), exec() without
namespaces writes to a copy of its caller's variables, and nothing is found. The processes that pip starts here, and no
others, have an exec() that writes to the variables themselves, as it did before. What is built and installed is the
published package as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENT = "basicsr==1.4.2"

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


builtins.exec = exec
"""


def main(arguments: list[str]) -> int:
    """Run pip; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
        search = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        # An isolated build would not see the module, and would download PyTorch a second time
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", REQUIREMENT, *arguments]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
