"""Operators in C++ for the CPU, float32: prebuilt, or compiled once by the machine's own compiler; never required.

`auto` uses them if they are built already, and never waits for a compiler. Requested by name, or by `build`, they are
compiled on demand (about a minute) and kept in the user's cache; `background` does so for who did not ask.
ESC_ARCH_NATIVE=0 switches them off; with ESC_ARCH_NATIVE=built they are used, but nothing is built unasked.

A file that offers operators to Python tells PyTorch by `register` what it needs besides the kernels, for tracing and
for gradients.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esc_arch.atomic_io import system_fault
from esc_arch.ops.compiling import constant_when_compiled

from . import building

__all__ = [
    "NOT_BUILT",
    "build",
    "build_aloud",
    "build_by_name",
    "input_reasons",
    "look_again",
    "origin",
    "ready",
    "register",
    "reusing_memory",
    "unsupported_reasons",
]

logger = logging.getLogger(__name__)

#: The one reason that goes away when the operators are requested by name.
NOT_BUILT = "the C++ operators are not built yet"


class _State:
    """Per-process build state."""

    #: Why the operators cannot be called; None until the first layer asks.
    reasons: list[str] | None = None
    library: Path | None = None
    registrations: list[Callable[[], None]] = []  # noqa: RUF012  (one per process is what is wanted)


@constant_when_compiled
def ready() -> bool:
    """True if the operators are loaded, or were built before and can be loaded now."""
    return not unsupported_reasons()


@constant_when_compiled
def unsupported_reasons() -> list[str]:
    """Why the operators cannot be called now; empty when they can. Looked up once: every layer asks."""
    if _State.reasons is None:
        _State.reasons = _obstacles()
        if not _State.reasons:
            try:
                if library := building.library_at_hand():
                    _load(library)
                else:
                    _State.reasons = _no_compiler() or [NOT_BUILT]
            except Exception as error:  # whatever is wrong with them, networks run without them
                _State.reasons = [f"loading the C++ operators failed: {_describe(error)}"]
                logger.warning("%s. PyTorch's own operators are used instead.", _State.reasons[0])
    return list(_State.reasons)


def origin() -> str:
    """Where the operators that are `ready` come from, for people."""
    library = _State.library
    if library is not None and library.parent == building.PREBUILT:
        return f"prebuilt, {library.stem}"
    return f"built here, kept in {building.cache_folder()}"


def look_again() -> None:
    """Load the operators if another process has built them since. Between images: last digits may change."""
    if _State.reasons == [NOT_BUILT]:
        _State.reasons = None


def input_reasons(*tensors: Tensor | None, maps: Sequence[Tensor | None] = ()) -> list[str]:
    """Why a float32 operator cannot take these tensors; `maps` are to have their channels innermost, too."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return ["an exported network keeps the plain formula"]
    given = [tensor for tensor in (*maps, *tensors) if tensor is not None]
    reasons = []
    if others := {tensor.device.type for tensor in given} - {"cpu"}:
        reasons.append(f"it runs on cpu, not on {', '.join(sorted(others))}")
    if others := {str(tensor.dtype) for tensor in given} - {"torch.float32"}:
        reasons.append(f"it takes float32, not {', '.join(sorted(others))}")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast asks for half precision, and it computes in float32")
    if any(each is not None and each.stride(1) != 1 for each in maps):
        reasons.append("it takes maps with the channels innermost")
    return reasons or unsupported_reasons()


def build(progress: Callable[[int, int], Any] = lambda done, total: None) -> float:
    """Compile and load the operators, unless that is done.

    Args:
        progress: is told how many parts of how many are compiled.

    Returns:
        The seconds it took; next to nothing where they were built before.

    Raises:
        RuntimeError: they cannot be compiled or loaded here; the message lists why.
    """
    start = time.perf_counter()
    if not ready():
        if obstacles := _obstacles() + _no_compiler():
            raise RuntimeError(f"The C++ operators cannot be built: {'; '.join(obstacles)}.")
        try:
            wanted = building.recipe()
            # (Loading operators twice, from two files, would end the process)
            again = _State.reasons != [NOT_BUILT] and str(wanted.library) not in torch.ops.loaded_libraries
            _load(building.compile_library(wanted, again=again, progress=progress))
        except Exception as error:
            _State.reasons = [f"compiling the C++ operators failed: {_describe(error)}"]
            raise RuntimeError(f"The C++ operators cannot be built: {_describe(error)}.") from error
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


def _keep_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def register(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    keep: Callable[..., None] = _keep_inputs,
    *,
    second_derivatives: bool = False,
) -> None:
    """Tell PyTorch about an operator, once it is loaded.

    Args:
        fake: empty tensors like its results.
        backward, keep: see `torch.library.register_autograd`; gradients that are not wanted are dropped.
        second_derivatives: `backward` can be differentiated.
    """

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not second_derivatives:
            raise RuntimeError(
                f"the C++ {name} has no second derivatives: set ESC_ARCH_NATIVE=0 for create_graph=True."
            )
        assert backward is not None  # or this is not registered
        found = zip(backward(ctx, *gradients), ctx.needs_input_grad, strict=True)
        return tuple(gradient if wanted else None for gradient, wanted in found)

    def tell() -> None:
        if not hasattr(torch.ops.esc_arch, name):  # ESC_ARCH_NATIVE_SOURCES may leave it out
            return
        torch.library.register_fake(f"esc_arch::{name}", fake)
        if backward is not None:
            torch.library.register_autograd(f"esc_arch::{name}", differentiate, setup_context=keep)

    _State.registrations.append(tell)
    if _State.reasons == []:
        tell()


@constant_when_compiled
def build_by_name() -> None:
    """Build the operators that were requested by name; on failure `unsupported_reasons` says why."""
    if unsupported_reasons() != [NOT_BUILT]:
        return
    try:
        build_aloud(logger.warning)
    except RuntimeError as error:
        logger.warning("%s", error)


def build_aloud(say: Callable[[str], Any]) -> None:
    """`build`, with what it says of it: that it takes a while, how far it is, and how long it took."""
    say("Building the C++ operators (1 to 3 minutes, once) ...")
    seconds = build(lambda done, total: say(f"  {done} of {total} parts are compiled"))
    say(f"The C++ operators are ready after {seconds:.0f} s.")


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
    return reasons


def _no_compiler() -> list[str]:
    if building.find_compiler() is not None:
        return []
    named = os.environ.get("CXX")
    which = f", which CXX={named!r} does not" if named else ""
    return [f"compiling the C++ operators needs g++ or clang++ on the PATH, or CXX naming a compiler{which}"]


def _describe(error: Exception) -> str:
    return ((system_fault(error) if isinstance(error, OSError) else None) or str(error)).rstrip(".")


def _load(library: Path) -> None:
    torch.ops.load_library(str(library))
    _State.reasons, _State.library = [], library
    for register in _State.registrations:
        register()
