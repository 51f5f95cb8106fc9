"""Variables of the environment that change what runs, or how fast."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from .context import Context
from .report import OK, WARNING, Finding

__all__ = ["examine"]

_PREFIXES = (
    "ATEN_", "BASICSR_", "CUDA_", "CUDNN_", "ESC_ARCH_", "GLOO_", "GOMP_", "HIP_", "KMP_", "MALLOC_", "MKL_", "NCCL_",
    "NVIDIA_", "OMP_", "OPENBLAS_", "OPENCV_", "PYTORCH_", "TORCH", "TRITON_",
)  # fmt: skip
_NAMES = (
    "CC", "CXX", "DYLD_LIBRARY_PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "PYTHONDEVMODE", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONOPTIMIZE", "PYTHONPATH", "RANK",
    "SLURM_NTASKS", "SLURM_PROCID", "TMPDIR", "WORLD_SIZE", "XDG_CACHE_HOME",
)  # fmt: skip
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL")

#: Name, the values that are worth a warning, and why.
_TRAPS = (
    ("CUDA_LAUNCH_BLOCKING", "1", "GPUs wait after every kernel: for searching errors only."),
    ("ESC_ARCH_NATIVE_SOURCES", ".+", "Only some C++ operators are built: for development only."),
    ("PYTORCH_JIT", "0", "Scripted functions are slow without it."),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "Every tensor on a GPU is allocated again: slow."),
    ("TORCH_COMPILE_DISABLE", "1", "train: compile and attn_type flex do nothing with it."),
    ("TORCHDYNAMO_DISABLE", "1", "train: compile and attn_type flex do nothing with it."),
    ("TRITON_INTERPRET", "1|true|yes|on", "Triton's kernels are interpreted: for tests only."),
)
_LONGEST = 200


def examine(context: Context) -> Iterator[Finding]:
    """The variables that are set, by name."""
    environ = _given()
    traps = {name: why for name, values, why in _TRAPS if re.fullmatch(values, environ.get(name, ""), re.IGNORECASE)}
    traps |= _threads(environ) | _launched(environ)
    names = [name for name in sorted(environ) if name.startswith(_PREFIXES) or name in _NAMES]
    for name in names:
        value = "(not shown)" if _SECRET.search(name.upper()) else environ[name][:_LONGEST]
        yield Finding(name, value or "(empty)", WARNING if name in traps else OK, traps.get(name, ""))
    if not names:
        yield Finding("variables", "none that matter is set")


def _given() -> dict[str, str]:
    """The environment that the process was started with, where the system tells it: libraries add to it."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)


def _threads(environ: Mapping[str, str]) -> dict[str, str]:
    cores = os.cpu_count() or 1
    given = environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > cores:
        return {"OMP_NUM_THREADS": f"More than the {cores} cores: threads wait for each other."}
    return {}


def _launched(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun sets makes a process one of several."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return {"WORLD_SIZE": "`basicsr train` waits for the other processes. Without torchrun, unset it and RANK."}
    return {}
