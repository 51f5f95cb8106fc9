"""Small questions to libraries that may crash or hang; asked in the child process."""

from __future__ import annotations

import importlib
import os
import subprocess
import warnings
from typing import Any

__all__ = ["cpu", "gpus", "import_module", "memory", "native_operators", "torch_build"]


def import_module(name: str) -> None:
    """Import a module; raises what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(name)


def torch_build() -> dict[str, Any]:
    """What PyTorch was built with."""
    import torch

    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    if torch.version.hip:
        kind = f"ROCm {torch.version.hip}"
    else:
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": cudnn,
        "architectures": torch.cuda.get_arch_list(),
        "text": f"{kind}{f', cuDNN {cudnn}' if cudnn else ''}, git {str(torch.version.git_version)[:8]}",
    }


def cpu() -> dict[str, Any]:
    """What PyTorch makes of the CPU."""
    import torch

    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "mkldnn": torch.backends.mkldnn.is_available(),
    }


def memory() -> dict[str, int]:
    """The bytes of memory there are, and those that programs may still take."""
    from esc_arch.tools.upscale.memory import available

    return {"total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "available": available()}


def gpus() -> dict[str, Any]:
    """The GPUs that PyTorch finds, and why it finds none although it was built for them."""
    import torch

    if not torch.cuda.is_available():
        return {"devices": [], "reason": _why_no_gpu()}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": total,
                "free": free,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    torch.ones(8, device="cuda").sum().item()  # a PyTorch built for other GPUs fails at its first kernel
    return {"devices": devices, "reason": ""}


def _why_no_gpu() -> str:
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return "this PyTorch is built for CPUs only"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except Exception as error:
            return " ".join(str(error).split()).partition(". ")[0]
    return " ".join(str(caught[0].message).split()).partition(". ")[0] if caught else "PyTorch finds none"


def native_operators() -> dict[str, Any]:
    """The C++ compiler and the C++ operators."""
    from esc_arch.ops import cpu as operators
    from esc_arch.ops.cpu import building

    compiler = building.find_compiler()
    ready = operators.ready()
    library = building.built_library(building.recipe(compiler)) if compiler and ready else None
    return {
        "compiler": " ".join(compiler) if compiler else None,
        "version": _first_line_of(*compiler, "--version") if compiler else None,
        "ready": ready,
        "reasons": operators.unsupported_reasons(),
        "cache": str(library.parent if library else building.cache_folder()),
        "switched_off": os.environ.get("ESC_ARCH_NATIVE") == "0",
    }


def _first_line_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    return (done.stdout or done.stderr).partition("\n")[0]
