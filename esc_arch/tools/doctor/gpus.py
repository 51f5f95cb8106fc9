"""GPUs, and why PyTorch does not use those there are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .context import Context
from .report import OK, PROBLEM, WARNING, Finding
from .sizes import size_text
from .subprocess_worker import JobFailed

__all__ = ["examine"]

_NVIDIA = Path("/proc/driver/nvidia/version")


def examine(context: Context) -> Iterator[Finding]:
    """The driver, and each GPU that PyTorch finds."""
    driver = _driver()
    yield Finding("driver", driver or "no driver of NVIDIA found")
    try:
        found = context.worker.call("esc_arch.tools.doctor.probes:gpus")
    except JobFailed as failure:
        advice = "Look at nvidia-smi; a driver and a PyTorch for each other are at https://pytorch.org/get-started."
        yield Finding("gpus", f"PyTorch cannot use them: {failure}", PROBLEM, advice)
        return
    if not found["devices"]:
        yield _none(found["reason"], driver)
        return
    build = context.worker.call("esc_arch.tools.doctor.probes:torch_build")
    for index, device in enumerate(found["devices"]):
        yield _gpu(index, device, build)


def _driver() -> str:
    with suppress(OSError):
        match = re.search(r"\b(\d{3,}(?:\.\d+)+)\b", _NVIDIA.read_text(encoding="utf-8", errors="replace"))
        if match:
            return match[1]
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.partition("\n")[0].strip()
    return ""


def _none(reason: str, driver: str) -> Finding:
    """No GPU is a fault only where there is a driver for one and nobody has hidden it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return Finding("gpus", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", WARNING if driver else OK)
    if driver:
        advice = "Install a PyTorch for this driver (https://pytorch.org/get-started), or a newer driver."
        return Finding("gpus", f"none can be used: {reason}", WARNING, advice)
    return Finding("gpus", f"none: {reason}")


def _gpu(index: int, device: dict[str, Any], build: dict[str, Any]) -> Finding:
    text = (
        f"{device['name']}, compute capability {device['capability']}, {size_text(device['free'])} of "
        f"{size_text(device['memory'])} free"
    )
    if build["cuda"] and not _is_built_for(device["capability"], build["architectures"]):
        text += f"; this PyTorch is built for {' '.join(build['architectures'])}"
        return Finding(f"gpu {index}", text, PROBLEM, "Install a PyTorch for this GPU.", device)
    if device["free"] < device["memory"] // 2:
        return Finding(f"gpu {index}", text, WARNING, "Another program uses it: see nvidia-smi.", device)
    return Finding(f"gpu {index}", text, data=device)


def _is_built_for(capability: str, architectures: list[str]) -> bool:
    """Machine code runs on its generation from its own number on; intermediate code on all later ones."""
    major, minor = map(int, capability.split("."))
    for kind, digits in (match.groups() for name in architectures if (match := re.match(r"(sm|compute)_(\d+)", name))):
        built = int(digits[:-1]), int(digits[-1])
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return not architectures
