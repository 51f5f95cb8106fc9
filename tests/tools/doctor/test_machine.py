"""What the doctor says of processor, limits, GPUs and variables."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctor_context import by_key, context

from esc_arch import system
from esc_arch.tools.doctor import machine
from esc_arch.tools.doctor.report import PROBLEM, WARNING
from esc_arch.tools.doctor.subprocess_worker import JobFailed
from esc_arch.tools.upscale import memory

GIB = 2**30


def test_the_real_machine() -> None:
    found = by_key(machine.examine(context()))
    assert " logical cores, " in found["cpu"].text
    assert found["torch on cpu"].text.endswith(" threads")
    assert 0 < found["memory"].data["available"] <= found["memory"].data["total"]
    (build,) = machine.torch_build()
    assert "git " in build.text


def test_more_threads_than_cores() -> None:
    (threads,) = machine.torch_on_cpu(torch.get_num_threads() - 0.5)
    assert (threads.status == WARNING) == (torch.get_num_threads() > 1)
    (threads,) = machine.torch_on_cpu(torch.get_num_threads())
    assert threads.status == "ok" and threads.advice == ""


def test_little_memory_and_a_torch_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: GIB)
    found = by_key(machine.examine(context(torch_on_cpu=JobFailed("OSError: libtorch.so"))))
    assert found["memory"].status == WARNING and "smaller batches" in found["memory"].advice
    assert found["memory"].text.startswith("1.0 GiB of ")
    assert found["torch on cpu"].status == PROBLEM and found["torch on cpu"].text == "OSError: libtorch.so"


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("this system has none")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage(2**26, 0, 2**26))
    found = by_key(machine.examine(context()))["/dev/shm"]
    assert found.text == "64.0 MiB of 64.0 MiB free" and found.status == WARNING and "--shm-size" in found.advice


@pytest.mark.parametrize(("limit", "status"), [(256, WARNING), (-1, "ok"), (4096, "ok")])
def test_open_files(monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(system.resource, "getrlimit", lambda _: (limit, limit))
    found = by_key(machine.examine(context()))["open files"]
    assert (found.text, found.status) == ("unlimited" if limit < 0 else str(limit), status)
    assert ("ulimit -n" in found.advice) == (status == WARNING)


# --- GPUs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The finding on a GPU with 80 GiB, of which so many are free, or which fails with an error."""

    def examine(free: int = 70, error: Exception | None = None) -> Any:
        def first_kernel(*_: Any, **__: Any) -> Any:
            if error:
                raise error
            return torch.zeros(8)

        properties = SimpleNamespace(name="Big", major=9, minor=0)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "ones", first_kernel)
            for name, value in {
                "is_available": True,
                "device_count": 1,
                "get_device_properties": properties,
                "mem_get_info": (free * GIB, 80 * GIB),
                "get_arch_list": ["sm_80", "compute_80"],
            }.items():
                patched.setattr(torch.cuda, name, lambda *_, value=value: value)
            return by_key(machine.gpus(context()))["gpu 0"]

    return examine


def test_a_gpu(gpu: Any) -> None:
    found = gpu()
    assert found.text == "Big, compute capability 9.0, 70.0 GiB of 80.0 GiB free" and found.status == "ok"
    used = gpu(free=3)
    assert used.status == WARNING and "nvidia-smi" in used.advice


def test_a_gpu_that_this_pytorch_is_not_built_for(gpu: Any) -> None:
    found = gpu(error=RuntimeError("CUDA error: no kernel image is available\nFor debugging"))
    assert found.status == PROBLEM and "pytorch.org" in found.advice
    assert found.text.endswith(
        "PyTorch, built for sm_80 compute_80, cannot use it: CUDA error: no kernel image is available"
    )


@pytest.mark.parametrize(
    ("driver", "status"),
    [
        ("570.1", WARNING),
        ("", "ok"),
    ],
)
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: str, status: str) -> None:
    """Which is a fault only where there is a driver for one."""

    def init() -> None:
        raise RuntimeError("it is too old\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    (found,) = machine.torch_gpus(driver)
    assert (found.text, found.status) == ("none: it is too old", status)
    assert ("Unset CUDA_VISIBLE_DEVICES" in found.advice) == (status == WARNING)


def test_a_driver_that_crashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its version is told all the same."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = by_key(machine.gpus(context(torch_gpus=JobFailed("the process ended with signal SIGSEGV"))))
    assert found["driver"].text == "570.86.15"
    assert found["gpus"].status == PROBLEM and "signal SIGSEGV" in found["gpus"].text


# --- variables ----------------------------------------------------------------------------------------------------


def variables(monkeypatch: pytest.MonkeyPatch, **given: str) -> Any:
    monkeypatch.setattr(machine, "_given", lambda: given)
    return by_key(machine.environment(context()))


def test_variables_that_matter_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets are not."""
    found = variables(
        monkeypatch, OMP_NUM_THREADS="1", ESC_ARCH_TRITON="1", EDITOR="vi", CUDA_VISIBLE_DEVICES="",
        TORCH_API_TOKEN="abc", NCCL_KEY="def", WANDB_API_KEY="ghi",
    )  # fmt: skip
    assert {key: finding.text for key, finding in found.items()} == {
        "OMP_NUM_THREADS": "1", "ESC_ARCH_TRITON": "1", "CUDA_VISIBLE_DEVICES": "(empty)",
        "TORCH_API_TOKEN": "(not shown)", "NCCL_KEY": "(not shown)",
    }  # fmt: skip
    assert {finding.status for finding in found.values()} == {"ok"}
    assert list(variables(monkeypatch)) == ["variables"]


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("TRITON_INTERPRET", "True", "interpreted"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "slow"),
        ("RANK", "0", "waits for the other processes"),
    ],
)
def test_traps(monkeypatch: pytest.MonkeyPatch, name: str, value: str, advice: str) -> None:
    found = variables(monkeypatch, **{name: value})[name]
    assert found.status == WARNING and advice in found.advice


def test_what_libraries_set_is_not_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("this system does not tell")
    monkeypatch.setenv("TORCH_SET_LATER", "1")
    assert "TORCH_SET_LATER" not in machine._given()
    assert machine._given()["PATH"]
