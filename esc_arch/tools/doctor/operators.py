"""What is compiled on this machine: the C++ operators and Triton's kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from .context import Context
from .report import PROBLEM, WARNING, Finding
from .subprocess_worker import JobFailed

__all__ = ["examine"]

_SWITCHED_OFF = "ESC_ARCH_NATIVE=0 in the environment switches them off."


def examine(context: Context) -> Iterator[Finding]:
    """The compiler, the C++ operators with their cache, Triton."""
    try:
        found = context.worker.call("esc_arch.tools.doctor.probes:native_operators")
    except JobFailed as failure:
        yield Finding("C++ operators", str(failure), PROBLEM, _SWITCHED_OFF)
    else:
        compiler = found["compiler"]
        yield Finding("C++ compiler", f"{compiler}, {found['version']}" if compiler else "no g++ or clang++ found")
        yield _operators(found)
    yield _triton(context)


def _operators(found: dict[str, object]) -> Finding:
    if found["ready"]:
        return Finding("C++ operators", f"built, in {found['cache']}", data=found)
    reasons = found["reasons"]
    assert isinstance(reasons, list)
    text = f"not used: {'; '.join(reasons)}; their cache is {found['cache']}"
    if any("failed" in reason for reason in reasons):
        return Finding("C++ operators", text, PROBLEM, "`basicsr warmup` rebuilds them. " + _SWITCHED_OFF, found)
    slower = "CPUs use PyTorch's own operators in their place: slower, with the same results."
    if found["switched_off"] or found["compiler"] is None:
        return Finding("C++ operators", text, advice=slower, data=found)
    return Finding("C++ operators", text, WARNING, f"`basicsr warmup` builds them. {slower}", found)


def _triton(context: Context) -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("triton", "not installed")
    try:
        context.worker.call("esc_arch.tools.doctor.probes:import_module", "triton")
    except JobFailed as failure:
        return Finding("triton", f"cannot be imported: {failure}", WARNING, "Reinstall torch, which brings it.")
    return Finding("triton", "can be imported")
