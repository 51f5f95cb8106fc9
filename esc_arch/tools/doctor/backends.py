"""The C++ operators; which backends can run, which one `auto` takes, and whether they agree with the reference."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from .report import OK, PROBLEM, WARNING, Context, Finding
from .subprocess_worker import JobFailed

__all__ = ["cpp_operators", "examine", "operators"]

_WITHOUT_CPP = "ESC_ARCH_NATIVE=0 in the environment switches the C++ operators off."
_WITHOUT_TRITON = "ESC_ARCH_TRITON=0 in the environment keeps auto from it."
_INSTEAD = {"cpp": _WITHOUT_CPP, "triton": _WITHOUT_TRITON, "triton_folded": _WITHOUT_TRITON}


def operators(context: Context) -> Iterator[Finding]:
    """The C++ compiler and operators."""
    yield from context.in_child("C++ operators", "backends:cpp_operators", advice=_WITHOUT_CPP)


def cpp_operators() -> list[Finding]:
    """In the child process."""
    from esc_arch.ops import cpu
    from esc_arch.ops.cpu import building

    compiler = "no g++ or clang++ found"
    if command := building.find_compiler():
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10)
        compiler = f"{' '.join(command)}, {(done.stdout or done.stderr).splitlines()[0]}"
    cache, reasons = building.cache_folder(), cpu.unsupported_reasons()
    text = f"not used: {'; '.join(reasons)}; their cache is {cache}" if reasons else f"built, in {cache}"
    status, advice = OK, "CPUs use PyTorch's own operators in their place: slower, with the same results."
    if any("failed" in reason for reason in reasons):
        status, advice = PROBLEM, f"`basicsr warmup` rebuilds them. {_WITHOUT_CPP}"
    elif cpu.NOT_BUILT in reasons:
        status, advice = WARNING, f"`basicsr warmup` builds them. {advice}"
    return [Finding("C++ compiler", compiler), Finding("C++ operators", text, status, advice if reasons else "")]


def examine(context: Context) -> Iterator[Finding]:
    """A line for each operation and each of its backends, on the CPU and on the first GPU."""
    for device in ("cpu", "cuda"):
        try:
            found = context.worker.call(f"{__package__}.self_tests:dispatch", device)
        except JobFailed as failure:
            yield Finding(device, f"not known which backends can run: {failure}", PROBLEM, "Report this.")
            continue
        for target, auto, names in found:
            key, text = "{}, {} {}".format(*target), f"auto takes {auto['inference']}"
            text += "" if auto["training"] == auto["inference"] else f", in training {auto['training']}"
            yield Finding(key, text, data={"auto": auto})
            for name in names:
                # A wrong backend is a problem if auto takes it; nobody meets another one without asking for it
                bad = PROBLEM if name in auto.values() else WARNING
                advice = f"{_INSTEAD.get(name, 'Name another backend.')} Report this."
                arguments = (f"{key}: {name}", name, target, not context.args.no_test, bad, advice)
                yield from context.in_child(arguments[0], "self_tests:examine", *arguments, status=bad, advice=advice)
