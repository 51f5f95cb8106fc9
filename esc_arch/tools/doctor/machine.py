"""The processor, memory and limits that training meets."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .context import Context
from .report import OK, PROBLEM, WARNING, Finding
from .sizes import GIB, size_text
from .subprocess_worker import JobFailed

__all__ = ["examine"]

#: Below this, workers of a data loader fail with "bus error": a container's default is 64 MiB.
_SMALL_SHARED_MEMORY = GIB
_FEW_FILES = 1024
_LITTLE_MEMORY = 2 * GIB


def examine(context: Context) -> Iterator[Finding]:
    """CPU, memory, shared memory, open files."""
    yield _cpu()
    yield _torch_threads(context)
    yield _memory(context)
    yield from _shared_memory()
    yield from _open_files()


def _cpu() -> Finding:
    usable, there = _usable_cores(), os.cpu_count() or 0
    limit = f", {usable:g} of them for this process" if usable < there else ""
    text = f"{_cpu_name()}, {there} logical cores{limit}"
    return Finding("cpu", text, data={"name": _cpu_name(), "cores": there, "usable": usable})


def _cpu_name() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if named:
            return named[0]
    return platform.processor() or platform.machine()


def _usable_cores() -> float:
    """Of the process's affinity and of the container's share of time."""
    cores = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def _torch_threads(context: Context) -> Finding:
    try:
        facts = context.worker.call("esc_arch.tools.doctor.probes:cpu")
    except JobFailed as failure:
        return Finding("torch on cpu", str(failure), PROBLEM, "Reinstall torch.")
    text = f"{facts['capability']}, {facts['threads']} threads"
    if facts["threads"] > max(_usable_cores(), 1):
        advice = f"They wait for each other: set OMP_NUM_THREADS={max(int(_usable_cores()), 1)}."
        return Finding("torch on cpu", text, WARNING, advice, facts)
    return Finding("torch on cpu", text, data=facts)


def _memory(context: Context) -> Finding:
    try:
        sizes = context.worker.call("esc_arch.tools.doctor.probes:memory")
    except JobFailed as failure:
        return Finding("memory", f"not known: {failure}", WARNING)
    text = f"{size_text(sizes['available'])} of {size_text(sizes['total'])} available"
    little = sizes["available"] < _LITTLE_MEMORY
    advice = "Training needs more: close other programs, or use smaller batches and fewer workers." if little else ""
    return Finding("memory", text, WARNING if little else OK, advice, sizes)


def _shared_memory() -> Iterator[Finding]:
    if not sys.platform.startswith("linux") or not Path("/dev/shm").is_dir():
        return
    usage = shutil.disk_usage("/dev/shm")
    text = f"{size_text(usage.free)} of {size_text(usage.total)} free"
    small = usage.free < _SMALL_SHARED_MEMORY
    advice = "Workers hand data over there: start the container with --shm-size=8g, or set num_worker_per_gpu: 0."
    data = {"total": usage.total, "free": usage.free}
    yield Finding("/dev/shm", text, WARNING if small else OK, advice if small else "", data)


def _open_files() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < _FEW_FILES
    advice = "Workers that load data may need more: ulimit -n 65536." if few else ""
    text = f"{_limit(soft)}, at most {_limit(hard)}"
    yield Finding("open files", text, WARNING if few else OK, advice, {"soft": soft, "hard": hard})


def _limit(number: int) -> str:
    return "unlimited" if number < 0 or number >= 2**62 else str(number)
