"""Building the C++ operators for who did not ask: beside a run that does without them, or before one that is long."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esc_arch.ops import cache, cpu

from . import building

__all__ = ["build_first", "start_build", "wanted"]

#: Its arguments are where this process finds modules: another esc_arch may be installed.
_PROGRAM = (
    "import os, sys; sys.path[:] = sys.argv[1:]; os.nice(10); "
    "from esc_arch.ops.cpu import background; background.build_and_note()"
)


def wanted() -> bool:
    """True if the operators could be built here and are not, and neither the user nor a failed try is against it."""
    if os.environ.get("ESC_ARCH_NATIVE") == "built" or cpu.unsupported_reasons() != [cpu.NOT_BUILT]:
        return False
    return not _failure().exists()


def start_build(say: Callable[[str], Any]) -> None:
    """Build in a process that goes on when this one ends, if it is `wanted`; `cpu.look_again` finds the result."""
    if not wanted() or not building.possible_now():
        return
    # What it prints nobody would read; why it failed is in a file of the cache
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    command = [sys.executable, "-c", _PROGRAM, *map(os.path.abspath, sys.path)]
    subprocess.Popen(command, cwd="/", start_new_session=True, **quiet)
    say(
        "The C++ operators for this processor are being built in the background, once (1 to 3 minutes). Pictures take "
        "half the time or less when they are ready; --no-build switches this off."
    )


def build_and_note() -> None:
    """What the process does. A failure is noted, so that not every run tries again; `basicsr warmup` does."""
    try:
        cpu.build()
    except RuntimeError as error:
        cache.write(_failure(), str(error).encode())


def build_first(say: Callable[[str], Any]) -> None:
    """Build now, if it is `wanted`, and say how it went; a failure is noted as well."""
    if not wanted():
        return
    try:
        cpu.build_aloud(say)
    except RuntimeError as error:
        say(f"{error} PyTorch's own operators are used instead: slower, with the same results.")
        cache.write(_failure(), str(error).encode())


def _failure() -> Path:
    return building.note_of_failure(building.recipe())
