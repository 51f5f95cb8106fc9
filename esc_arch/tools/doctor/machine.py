"""Processor, memory and limits, GPUs, and variables of the environment."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .report import PROBLEM, WARNING, Context, Finding, size_text, warn_if

__all__ = ["environment", "examine", "gpus"]

#: Below this, workers of a data loader fail with "bus error": a container's default is 64 MiB.
_SMALL_SHARED_MEMORY = 2**30
_LITTLE_MEMORY = 2 * 2**30
_FEW_FILES = 1024
_GET_PYTORCH = "Install a PyTorch for this GPU and its driver: https://pytorch.org/get-started."

#: Variables that are shown begin so.
_SHOWN = (
    "ATEN_", "BASICSR_", "CC", "CUDA_", "CUDNN_", "CXX", "DYLD_", "ESC_ARCH_", "GLOO_", "GOMP_", "HIP_", "KMP_", "LD_",
    "LOCAL_RANK", "MALLOC_", "MASTER_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "OPENBLAS_", "OPENCV_", "PYTHON",
    "PYTORCH_", "RANK", "SLURM_NTASKS", "SLURM_PROCID", "TMPDIR", "TORCH", "TRITON_", "WORLD_SIZE", "XDG_CACHE_HOME",
)  # fmt: skip
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL")
#: Variables, the values that deserve a warning, and why.
_TRAPS = {
    "CUDA_LAUNCH_BLOCKING": ("1", "GPUs wait after every kernel: for debugging only."),
    "ESC_ARCH_NATIVE_SOURCES": (".+", "Only some C++ operators are built: for development only."),
    "PYTORCH_JIT": ("0", "Scripted functions are slow without it."),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "Every tensor on a GPU is allocated again: slow."),
    "TORCH_COMPILE_DISABLE": ("1", "train: compile and attn_type flex do nothing with it."),
    "TORCHDYNAMO_DISABLE": ("1", "train: compile and attn_type flex do nothing with it."),
    "RANK": (".+", "`basicsr train` waits for the other processes of WORLD_SIZE. Without torchrun, unset both."),
    "TRITON_INTERPRET": ("1|true|yes|on", "Triton's kernels are interpreted: for tests only."),
}
_LONGEST = 200


def examine(context: Context) -> Iterator[Finding]:
    """CPU, memory, shared memory, open files."""
    usable = _usable_cores()
    yield Finding("cpu", f"{_cpu_name()}, {os.cpu_count()} logical cores, {usable:g} of them for this process")
    yield from context.in_child("torch on cpu", "machine:torch_on_cpu", usable, advice="Reinstall torch.")
    yield from context.in_child("memory", "machine:memory", status=WARNING, advice="")
    if Path("/dev/shm").is_dir():
        usage = shutil.disk_usage("/dev/shm")
        text = f"{size_text(usage.free)} of {size_text(usage.total)} free"
        advice = "Workers hand data over there: start the container with --shm-size=8g, or set num_worker_per_gpu: 0."
        yield warn_if(usage.free < _SMALL_SHARED_MEMORY, "/dev/shm", text, advice, usage._asdict())
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text, advice = str(soft if soft > 0 else "unlimited"), "Workers that load data may need more: ulimit -n 65536."
    yield warn_if(0 <= soft < _FEW_FILES, "open files", text, advice)


def _cpu_name() -> str:
    with suppress(OSError):
        if match := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _usable_cores() -> float:
    """As the process's affinity and the container's share of CPU time allow."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def torch_build() -> list[Finding]:
    """What PyTorch was built with; in the child process, as the next two."""
    import torch

    cuda, hip, cudnn = torch.version.cuda, torch.version.hip, torch.backends.cudnn.version()
    kind = f"ROCm {hip}" if hip else f"CUDA {cuda}, cuDNN {cudnn}" if cuda else "CPU only"
    text = f"{kind}, git {str(torch.version.git_version)[:8]}"
    return [Finding("torch build", text, data={"architectures": torch.cuda.get_arch_list()})]


def torch_on_cpu(usable: float) -> list[Finding]:
    """Vector instructions, and threads compared with usable cores."""
    import torch

    threads = torch.get_num_threads()
    text = f"{torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    advice = f"They wait for each other: set OMP_NUM_THREADS={max(int(usable), 1)}."
    return [warn_if(threads > max(usable, 1), "torch on cpu", text, advice)]


def memory() -> list[Finding]:
    """The memory there is, and what programs may still take of it."""
    from esc_arch.tools.upscale.memory import available

    total, free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), available()
    text = f"{size_text(free)} of {size_text(total)} available"
    advice = "Training needs more: close other programs, or use smaller batches and fewer workers."
    return [warn_if(free < _LITTLE_MEMORY, "memory", text, advice, {"total": total, "available": free})]


def gpus(context: Context) -> Iterator[Finding]:
    """The driver, and each GPU that PyTorch finds."""
    driver = ""
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.partition("\n")[0]
    yield Finding("driver", driver or "no driver of NVIDIA found")
    yield from context.in_child("gpus", "machine:torch_gpus", driver, advice=f"Look at nvidia-smi. {_GET_PYTORCH}")


def torch_gpus(driver: str) -> list[Finding]:
    """Each GPU, or why there is none, which is a fault only with a driver; in the child process."""
    import torch

    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return [warn_if(driver, "gpus", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "Unset it to use them.")]
    try:
        torch.cuda.init()
        reason = "PyTorch finds none"
    except (AssertionError, RuntimeError) as error:
        reason = _first_sentence(error)
    return [warn_if(driver, "gpus", f"none: {reason}", _GET_PYTORCH)]


def _gpu(index: int) -> Finding:
    import torch

    key, properties = f"gpu {index}", torch.cuda.get_device_properties(index)
    text = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    try:  # a PyTorch that was not built for it fails at its first kernel
        torch.ones(8, device=f"cuda:{index}").sum().item()
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        text += f"; PyTorch, built for {' '.join(torch.cuda.get_arch_list())}, cannot use it: {_first_sentence(error)}"
        return Finding(key, text, PROBLEM, f"Look at nvidia-smi. {_GET_PYTORCH}")
    text += f", {size_text(free)} of {size_text(total)} free"
    advice = "Another program uses it: see nvidia-smi."
    return warn_if(free < total // 2, key, text, advice, {"memory": total, "free": free})


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]


def environment(context: Context) -> Iterator[Finding]:
    """Variables that change what runs, or how fast."""
    shown = sorted(name for name in os.environ if name.startswith(_SHOWN))
    for name in shown:
        value, (pattern, why) = os.environ[name], _TRAPS.get(name, ("", ""))
        text = "(not shown)" if _SECRET.search(name.upper()) else value[:_LONGEST] or "(empty)"
        yield warn_if(why and re.fullmatch(pattern, value, re.IGNORECASE), name, text, why)
    if not shown:
        yield Finding("variables", "none that matter is set")
