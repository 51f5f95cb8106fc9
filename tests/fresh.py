"""Python scripts in processes that know neither BasicSR nor esc_arch, forked from one that has imported what both need.

In place of a new interpreter, which would wait for PyTorch for seconds. What is read while PyTorch itself is loaded, as
the variables of OpenMP are, stays as it was there.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

__all__ = ["run_code", "run_script"]

#: What takes long, of that which esc_arch, BasicSR and the tests import.
PRELOADED = (
    "torch.utils.data", "torchvision.transforms.functional", "torchvision.models.vgg", "torchvision.utils",
    "scipy.linalg", "scipy.special", "scipy.stats", "cv2", "requests", "yaml", "pytest",
)  # fmt: skip


def run_script(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, **_: Any
) -> subprocess.CompletedProcess[str]:
    """In place of `subprocess.run`, for this Python with a script or `-m esc_arch`; captures all output, as text."""
    if list(command[1:3]) == ["-m", "esc_arch"]:
        command = [command[0], str(_root() / "esc_arch" / "__main__.py"), *command[3:]]
    assert command[0] == sys.executable and Path(command[1]).is_file()
    with tempfile.TemporaryDirectory() as outputs:
        files = [str(Path(outputs) / name) for name in ("out", "err")]
        environment = dict(os.environ if env is None else env)
        request = json.dumps([command[1:], str(cwd or Path.cwd()), environment, files])
        server = _server()
        server.stdin.write(request + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(file).read_text(encoding="utf-8", errors="replace") for file in files)
    return subprocess.CompletedProcess(list(command), status, out, err)


def run_code(
    code: str, folder: Path, *, path: Sequence[Path] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code as a script in a folder, with folders to be searched first for modules."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    search = os.pathsep.join(map(str, [*path, _root()]))
    return run_script([sys.executable, str(script)], cwd=folder, env=inherited | {"PYTHONPATH": search} | environment)


def _root() -> Path:
    import esc_arch

    return Path(esc_arch.__file__).parents[1]


@cache
def _server() -> Any:
    """Ends with this process, which closes its input. What a script runs of Triton is interpreted."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.Popen(
        [sys.executable, __file__],
        env=clean | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )


def _serve(requests: IO[str], answers: IO[str]) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for request in requests:
        if (process := os.fork()) == 0:
            _run(*json.loads(request))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n")
        answers.flush()


def _run(argv: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    status: Any = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = argv
        asked = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        sys.path[0:1] = [str(Path(argv[0]).parent.absolute()), *asked]
        os.chdir(folder)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in enumerate([nothing, *(os.open(file, os.O_CREAT | os.O_WRONLY) for file in outputs)]):
            os.dup2(source, target)
        runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    # The answers' place is their own: whatever a script prints goes elsewhere
    _serve(sys.stdin, os.fdopen(os.dup(1), "w"))
