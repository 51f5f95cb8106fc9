"""How much memory there is, how much a computation takes, and what running out of it looks like."""

from __future__ import annotations

import ctypes
import mmap
import re
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esc_arch.errors import UserError
from esc_arch.system import memory_sizes, peak_memory, soft_limit

__all__ = [
    "available",
    "format_memory",
    "is_out_of_memory",
    "parse_memory",
    "peak_of",
    "release",
    "resident",
    "trim_heap",
]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(text: str) -> int:
    """A number of bytes, such as 2G, 512M, 1.5 GiB or 1000000; K, M, G and T are powers of 1024.

    Raises:
        UserError: it is not one.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"The memory {text!r} is not known; give a number with K, M, G or T, such as 2G or 512M.")
    return size


def format_memory(size: float) -> str:
    """As `parse_memory` reads it, and rounded up to what is shown."""
    unit = next((unit for unit in "TGM" if size >= _UNITS[unit]), "K")
    tenths = -(-size * 10 // _UNITS[unit])
    return f"{tenths / 10:.1f}{unit}" if tenths < 100 else f"{-(-size // _UNITS[unit]):.0f}{unit}"


def resident() -> int:
    """The bytes of this process that are in memory; where the system does not say, the most there have been."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return peak_memory()


def available() -> int:
    """The bytes that programs may still take without swapping, here and within the limit of the container."""
    sizes, limit = [_of_container()], soft_limit("RLIMIT_AS")
    try:
        if limit is not None:  # of addresses (ulimit -v)
            sizes.append(limit - int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE)
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        sizes.append(memory_sizes()[1])
    return min(size for size in sizes if size is not None)


def _of_container() -> int | None:
    """What is left of the memory of a control group (version 2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(int(limit) - int(used) + int(statistics["inactive_file"]), 0)  # the system drops what files left
    except (OSError, ValueError, KeyError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """True if an exception says that a device or the machine has not enough memory."""
    signs = (
        *("not enough memory", "DefaultCPUAllocator", "can't allocate memory", "out of memory", "bad_alloc"),
        *("could not create a primitive", "could not create a memory", "Cannot allocate memory"),  # oneDNN, mmap
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def peak_of(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that a call has at a time; on a CPU without what operators take inside."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _Tensors() as tensors:
        call()
    return tensors.peak


class _Tensors(TorchDispatchMode):
    """Counts the bytes of what operators return for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self.seen: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks this. Nothing in here is compiled, and the guard would import its compiler: a second or more."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def freed(_: Any) -> None:
            self.seen.pop(key, None)
            self.now -= size

        self.seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def release(device: torch.device) -> None:
    """Give back what PyTorch keeps of a device's memory, and the heap of the machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give free memory back to the system, where the C library can.

    Glibc keeps freed blocks of up to 32 MiB, and tensors of many sizes that come and go leave holes between them: from
    tile to tile a process would grow by far more than a tile takes.
    """
    with suppress(OSError, TypeError, AttributeError):  # another C library, another system
        ctypes.CDLL(None).malloc_trim(0)
