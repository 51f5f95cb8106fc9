"""What can run here: processor, memory and limits, GPUs, C++ operators, backends; variables that change it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from esc_arch.errors import first_line
from esc_arch.system import memory_sizes, soft_limit

from .report import OK, PROBLEM, WARNING, Context, Finding, size_text, warn_if
from .subprocess_worker import JobFailed

__all__ = ["backends", "environment", "examine", "gpus", "operators"]

#: Below this, workers of a data loader fail with "bus error": a container's default is 64 MiB.
_SMALL_SHARED_MEMORY = 2**30
_LITTLE_MEMORY = 2 * 2**30
_FEW_FILES = 1024
_GET_PYTORCH = "Install a PyTorch for this GPU and its driver: https://pytorch.org/get-started."
_WITHOUT_CPU = "ESC_ARCH_NATIVE=0 in the environment switches the C++ operators off."
_WITHOUT_TRITON = "ESC_ARCH_TRITON=0 in the environment keeps auto from it."
_INSTEAD = {"cpu": _WITHOUT_CPU, "triton": _WITHOUT_TRITON}

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
    soft = soft_limit("RLIMIT_NOFILE")
    text, few = ("unlimited", False) if soft is None else (str(soft), soft < _FEW_FILES)
    yield warn_if(few, "open files", text, "Workers that load data may need more: ulimit -n 65536.")


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

    total, free = memory_sizes()[0], available()
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
    text = "none"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        text += f": {first_line(error)}"
    return [warn_if(driver, "gpus", text, f"Unset CUDA_VISIBLE_DEVICES if it hides them. {_GET_PYTORCH}")]


def _gpu(index: int) -> Finding:
    import torch

    key, properties = f"gpu {index}", torch.cuda.get_device_properties(index)
    text = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    try:  # a PyTorch that was not built for it fails at its first kernel
        torch.ones(8, device=f"cuda:{index}").sum().item()
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        text += f"; PyTorch, built for {' '.join(torch.cuda.get_arch_list())}, cannot use it: {first_line(error)}"
        return Finding(key, text, PROBLEM, f"Look at nvidia-smi. {_GET_PYTORCH}")
    text += f", {size_text(free)} of {size_text(total)} free"
    advice = "Another program uses it: see nvidia-smi."
    return warn_if(free < total // 2, key, text, advice, {"memory": total, "free": free})


def operators(context: Context) -> Iterator[Finding]:
    """The C++ compiler and operators."""
    return context.in_child("C++ operators", "machine:cpp_operators", advice=_WITHOUT_CPU)


def cpp_operators() -> list[Finding]:
    """In the child process."""
    from esc_arch.ops import cpu
    from esc_arch.ops.cpu import building

    compiler = "no g++ or clang++ found"
    if command := building.find_compiler():
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10)
        compiler = f"{' '.join(command)}, {(done.stdout or done.stderr).splitlines()[0]}"
    cache, reasons = building.cache_folder(), cpu.unsupported_reasons()
    text = f"not used: {'; '.join(reasons)}; their cache is {cache}" if reasons else cpu.origin()
    status, advice = OK, "CPUs use PyTorch's own operators in their place: slower, with the same results."
    if any("failed" in reason for reason in reasons):
        status, advice = PROBLEM, f"`basicsr warmup` rebuilds them. {_WITHOUT_CPU}"
    elif cpu.NOT_BUILT in reasons:
        status, advice = WARNING, f"`basicsr warmup` builds them. {advice}"
    return [Finding("C++ compiler", compiler), Finding("C++ operators", text, status, advice if reasons else "")]


def backends(context: Context) -> Iterator[Finding]:
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


def environment(context: Context) -> Iterator[Finding]:
    """Variables that change what runs, or how fast."""
    variables = _given()
    shown = sorted(name for name in variables if name.startswith(_SHOWN))
    for name in shown:
        value, (pattern, why) = variables[name], _TRAPS.get(name, ("", ""))
        text = "(not shown)" if _SECRET.search(name.upper()) else value[:_LONGEST] or "(empty)"
        yield warn_if(why and re.fullmatch(pattern, value, re.IGNORECASE), name, text, why)
    if not shown:
        yield Finding("variables", "none that matter is set")


def _given() -> dict[str, str]:
    """What the process was started with, if the system tells: libraries add variables."""
    file = Path("/proc/self/environ")
    if not file.exists():
        return dict(os.environ)
    entries = file.read_bytes().split(b"\0")
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)
