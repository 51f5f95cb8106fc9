"""Where Triton kernels can run, and how they multiply."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fresh import run_code
from triton_testing import INTERPRETED, needs_triton

from esc_arch.ops import triton_support
from esc_arch.ops.triton_support import missing, precision


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose GPU can be set."""
    settings = SimpleNamespace(triton=True, capability=(9, 0))
    monkeypatch.setattr(triton_support, "_installed", lambda: settings.triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: settings.capability)
    return settings


def test_a_recent_gpu_lacks_nothing(machine: SimpleNamespace) -> None:
    assert missing("cuda", 0) == ""


def test_other_devices(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("mps", None) == "it runs on GPUs of NVIDIA"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert missing("cuda", 0) == "it runs on GPUs of NVIDIA"


def test_an_old_gpu(machine: SimpleNamespace) -> None:
    machine.capability = (7, 5)
    assert missing("cuda", 0) == "its kernels need a GPU of compute capability 8.0 or newer, not 7.5"


def test_no_triton(machine: SimpleNamespace) -> None:
    machine.triton = False
    assert missing("cuda", 0) == "triton is not installed"


def test_precision_of_float32_is_as_told() -> None:
    assert [precision(torch.zeros(1), tf32) for tf32 in (True, False)] == ["tf32", "ieee"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_widened_in_the_interpreter(dtype: torch.dtype) -> None:
    assert precision(torch.zeros(1, dtype=dtype), True) == "widened"
    assert precision(SimpleNamespace(dtype=dtype, is_cuda=True), True) == "half"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="is itself in the interpreter")
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    """The tests of kernels whose device is the interpreter, in one process."""
    files = [str(file) for file in Path(__file__).parent.glob("test_triton_*.py")]
    options = ["-k", "interpreter and not kernels_in", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    code = f"import sys, pytest\nsys.exit(pytest.main({[*files, *options]}))"
    run = run_code(code, tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
