"""`python FOLDER/esc_arch/tools/doctor`: the doctor where even trying to import esc_arch ends the process.

With `jobs` it is the doctor's child process.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[3]


def _load(name: str) -> Any:
    """A module of this folder, without the package that it is in."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve() -> int:
    _load("bootstrap").replace_failed_packages()
    from esc_arch.tools.doctor.worker_main import serve

    serve()
    return 0


def _examine() -> int:
    sys.path.append(str(_ROOT))
    failure = _load("subprocess_worker").import_failure("esc_arch")
    if failure:
        _load("bootstrap").replace_failed_packages()
    from esc_arch.tools.doctor.command import main

    return main(sys.argv[1:], failure)


if __name__ == "__main__":
    # This folder is first on the path, and its files are not to be taken for others' modules
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(_serve() if sys.argv[1:] == ["jobs"] else _examine())
