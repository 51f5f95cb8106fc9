"""Operators in C++ for the CPU, float32: compiled once by the machine's own compiler, never required.

`auto` uses them if they are built already, and never waits for a compiler. Requested by name, or by `build`, they are
compiled on demand (about a minute) and kept in the user's cache. ESC_ARCH_NATIVE=0 switches them off.

A file that offers operators to Python registers what PyTorch needs besides the kernels, for tracing and for
gradients, in a function under `when_loaded`.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import building

__all__ = ["NOT_BUILT", "build", "build_by_name", "ready", "reusing_memory", "unsupported_reasons", "when_loaded"]

logger = logging.getLogger(__name__)

#: The one reason that goes away when the operators are requested by name.
NOT_BUILT = "the C++ operators are not built yet"


class _State:
    """Per-process build state."""

    #: Why the operators cannot be called; None until the first layer asks.
    reasons: list[str] | None = None
    registrations: list[Callable[[], None]] = []  # noqa: RUF012  (one per process is what is wanted)


def when_loaded(register: Callable[[], None]) -> Callable[[], None]:
    """A decorator: call `register` once the operators are loaded, at once where they are."""
    _State.registrations.append(register)
    if _State.reasons == []:
        register()
    return register


@torch.compiler.assume_constant_result
def ready() -> bool:
    """True if the operators are loaded, or were built before and can be loaded now."""
    return not unsupported_reasons()


@torch.compiler.assume_constant_result
def unsupported_reasons() -> list[str]:
    """Why the operators cannot be called now; empty when they can. Looked up once: every layer asks."""
    if _State.reasons is None:
        _State.reasons = _obstacles() or [NOT_BUILT]
        if _State.reasons == [NOT_BUILT] and (library := building.built_library(building.recipe())):
            try:
                _load(library)
            except OSError as error:
                _State.reasons = [f"compiling the C++ operators failed: {error}"]
    return list(_State.reasons)


def build() -> float:
    """Compile and load the operators, unless that is done.

    Returns:
        The seconds it took; next to nothing where they were built before.

    Raises:
        RuntimeError: they cannot be compiled or loaded here; the message lists why.
    """
    start = time.perf_counter()
    if not ready():
        obstacles = _obstacles()
        if obstacles:
            raise RuntimeError(f"The C++ operators cannot be built: {'; '.join(obstacles)}.")
        try:
            _load(building.compile_library(building.recipe()))
        except (RuntimeError, OSError) as error:
            _State.reasons = [f"compiling the C++ operators failed: {error}"]
            raise RuntimeError(f"The C++ operators cannot be built: {error}") from error
    return time.perf_counter() - start


@contextmanager
def reusing_memory(x: Tensor) -> Iterator[None]:
    """The block runs a network on `x`: large maps that operators free are kept for its next ones.

    Otherwise the C library gives them back to the system, which clears them again for each operator.
    """
    # (ESC_ARCH_NATIVE_SOURCES may leave it out)
    if x.device.type != "cpu" or not ready() or not hasattr(torch.ops.esc_arch, "reuse_memory"):
        yield
        return
    torch.ops.esc_arch.reuse_memory(True)
    try:
        yield
    finally:
        torch.ops.esc_arch.reuse_memory(False)


@torch.compiler.assume_constant_result
def build_by_name() -> None:
    """Build the operators that were requested by name; on failure `unsupported_reasons` says why."""
    if unsupported_reasons() != [NOT_BUILT]:
        return
    logger.warning("Building the C++ operators (1 to 3 minutes, once) ...")
    try:
        logger.warning("The C++ operators are ready after %.0f s.", build())
    except RuntimeError as error:
        logger.warning("%s", error)


def _obstacles() -> list[str]:
    """Problems that a rebuild cannot fix."""
    reasons = []
    if os.environ.get("ESC_ARCH_NATIVE") == "0":
        reasons.append("the C++ operators are switched off by ESC_ARCH_NATIVE=0")
    machine = platform.machine()
    if not sys.platform.startswith(("linux", "darwin")) or machine not in ("x86_64", "aarch64", "arm64"):
        reasons.append(
            f"the C++ operators are for Linux and macOS on x86-64 and arm64, not {sys.platform} on {machine}"
        )
    if building.find_compiler() is None:
        reasons.append("compiling the C++ operators needs g++ or clang++ on the PATH, or CXX naming a compiler")
    return reasons


def _load(library: Path) -> None:
    torch.ops.load_library(str(library))
    _State.reasons = []
    for register in _State.registrations:
        register()
