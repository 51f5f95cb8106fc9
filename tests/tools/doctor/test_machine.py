"""What the doctor says of processor, limits, GPUs, operators and variables."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from doctor_context import by_key, context

from esc_arch.tools.doctor import environment, gpus, machine, operators
from esc_arch.tools.doctor.report import PROBLEM, WARNING
from esc_arch.tools.doctor.sizes import GIB, size_text
from esc_arch.tools.doctor.subprocess_worker import JobFailed

BUILD = {"cuda": "13.2", "architectures": ["sm_80", "sm_90", "compute_90"]}
CPU = {"capability": "AVX2", "threads": 1, "interop_threads": 1, "mkldnn": True}
MEMORY = {"total": 16 * GIB, "available": 8 * GIB}


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 bytes"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text


# --- the machine --------------------------------------------------------------------------------------------------


def examined(**answers: Any) -> Any:
    return by_key(machine.examine(context(**({"cpu": CPU, "memory": MEMORY} | answers))))


def test_a_machine_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_usable_cores", lambda: 1.5)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 8)
    found = examined()
    assert "8 logical cores, 1.5 of them for this process" in found["cpu"].text
    assert found["torch on cpu"].text == "AVX2, 1 threads" and found["torch on cpu"].status == "ok"
    assert found["memory"].text == "8.0 GiB of 16.0 GiB available" and found["memory"].status == "ok"


def test_the_real_machine() -> None:
    found = by_key(machine.examine(context()))
    assert found["cpu"].data["usable"] >= 0.01
    assert 0 < found["memory"].data["available"] <= found["memory"].data["total"]


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_usable_cores", lambda: 2.0)
    threads = examined(cpu=CPU | {"threads": 64})["torch on cpu"]
    assert threads.status == WARNING and "set OMP_NUM_THREADS=2" in threads.advice


def test_little_memory_and_a_torch_that_fails() -> None:
    found = examined(memory=MEMORY | {"available": GIB}, cpu=JobFailed("OSError: libtorch.so"))
    assert found["memory"].status == WARNING and "smaller batches" in found["memory"].advice
    assert found["torch on cpu"].status == PROBLEM and found["torch on cpu"].text == "OSError: libtorch.so"


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("this system has none")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage(2**26, 0, 2**26))
    found = examined()["/dev/shm"]
    assert found.text == "64.0 MiB of 64.0 MiB free" and found.status == WARNING and "--shm-size" in found.advice


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    found = examined()["open files"]
    assert found.text == "256, at most unlimited" and found.status == WARNING and "ulimit -n" in found.advice


# --- GPUs ---------------------------------------------------------------------------------------------------------


def gpu(capability: str = "9.0", free: int = 70) -> Any:
    device = {"name": "Big", "capability": capability, "memory": 80 * GIB, "free": free * GIB}
    return {"devices": [device], "reason": ""}


@pytest.mark.parametrize(
    ("capability", "works"), [("8.0", True), ("8.6", True), ("9.0", True), ("12.0", True), ("7.5", False)]
)
def test_what_a_build_runs_on(capability: str, works: bool) -> None:
    found = by_key(gpus.examine(context(gpus=gpu(capability), torch_build=BUILD)))["gpu 0"]
    assert f"Big, compute capability {capability}, 70.0 GiB of 80.0 GiB free" in found.text
    assert found.status == ("ok" if works else PROBLEM)
    assert ("built for sm_80 sm_90 compute_90" in found.text) is not works


def test_machine_code_of_a_generation_does_not_run_on_the_next() -> None:
    assert not gpus._is_built_for("9.0", ["sm_80", "sm_86"])
    assert gpus._is_built_for("12.1", ["sm_100", "compute_100"])


def test_a_gpu_in_use() -> None:
    found = by_key(gpus.examine(context(gpus=gpu(free=3), torch_build=BUILD)))["gpu 0"]
    assert found.status == WARNING and "nvidia-smi" in found.advice


@pytest.mark.parametrize(
    ("driver", "hidden", "status", "text"),
    [
        ("570.1", None, WARNING, "none can be used: this PyTorch is built for CPUs only"),
        ("570.1", "-1", WARNING, "hidden by CUDA_VISIBLE_DEVICES='-1'"),
        ("", "", "ok", "hidden by CUDA_VISIBLE_DEVICES=''"),
        ("", None, "ok", "none: this PyTorch is built for CPUs only"),
    ],
)
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: str, hidden: str | None, status: str, text: str) -> None:
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    answer = {"devices": [], "reason": "this PyTorch is built for CPUs only"}
    found = by_key(gpus.examine(context(gpus=answer)))["gpus"]
    assert (found.text, found.status) == (text, status)


def test_a_driver_that_crashes() -> None:
    found = by_key(gpus.examine(context(gpus=JobFailed("the process ended with signal SIGSEGV"))))["gpus"]
    assert found.status == PROBLEM and "signal SIGSEGV" in found.text


def test_the_version_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    note = tmp_path / "version"
    note.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    monkeypatch.setattr(gpus, "_NVIDIA", note)
    assert gpus._driver() == "570.86.15"


# --- operators ----------------------------------------------------------------------------------------------------

OPERATORS = {
    "compiler": "/usr/bin/g++", "version": "g++ 12", "ready": True, "reasons": [], "cache": "/cache/esc_arch",
    "switched_off": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "status", "text", "advice"),
    [
        ({}, "ok", "built, in /cache/esc_arch", ""),
        ({"reasons": ["the C++ operators are not built yet"]}, WARNING, "not built yet", "`basicsr warmup` builds"),
        ({"reasons": ["compiling the C++ operators failed: no space"]}, PROBLEM, "no space", "ESC_ARCH_NATIVE=0"),
        ({"reasons": ["switched off"], "switched_off": True}, "ok", "switched off", "PyTorch's own operators"),
        ({"reasons": ["needs g++"], "compiler": None}, "ok", "needs g++; their cache is /cache", "PyTorch's own"),
    ],
)
def test_operators(change: dict[str, Any], status: str, text: str, advice: str) -> None:
    answer = OPERATORS | change | {"ready": not change}
    found = by_key(operators.examine(context(native_operators=answer)))
    assert found["C++ operators"].status == status
    assert text in found["C++ operators"].text and advice in found["C++ operators"].advice
    assert found["C++ compiler"].text == ("/usr/bin/g++, g++ 12" if answer["compiler"] else "no g++ or clang++ found")


def test_the_real_operators() -> None:
    found = by_key(operators.examine(context()))
    assert "esc_arch" in found["C++ operators"].text


def test_libraries_that_crash() -> None:
    crash = JobFailed("the process ended with signal SIGILL", crashed=True)
    found = by_key(operators.examine(context(native_operators=crash, import_module=crash)))
    assert found["C++ operators"].status == PROBLEM and "ESC_ARCH_NATIVE=0" in found["C++ operators"].advice
    assert found["triton"].text in ("cannot be imported: the process ended with signal SIGILL", "not installed")


# --- variables ----------------------------------------------------------------------------------------------------


def variables(monkeypatch: pytest.MonkeyPatch, **given: str) -> Any:
    monkeypatch.setattr(environment, "_given", lambda: given)
    return by_key(environment.examine(context()))


def test_variables_that_matter_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = variables(monkeypatch, OMP_NUM_THREADS="1", ESC_ARCH_TRITON="1", EDITOR="vi", CUDA_VISIBLE_DEVICES="")
    assert {key: finding.text for key, finding in found.items()} == {
        "OMP_NUM_THREADS": "1", "ESC_ARCH_TRITON": "1", "CUDA_VISIBLE_DEVICES": "(empty)",
    }  # fmt: skip
    assert {finding.status for finding in found.values()} == {"ok"}
    assert list(variables(monkeypatch)) == ["variables"]


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"TRITON_INTERPRET": "True"}, "interpreted"),
        ({"OMP_NUM_THREADS": "100000"}, "threads wait for each other"),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "slow"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "waits for the other processes"),
    ],
)
def test_traps(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], advice: str) -> None:
    found = variables(monkeypatch, **given)[next(iter(given))]
    assert found.status == WARNING and advice in found.advice


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = variables(monkeypatch, TORCH_API_TOKEN="abc", NCCL_KEY="def", WANDB_API_KEY="ghi")
    assert {key: finding.text for key, finding in found.items()} == {
        "TORCH_API_TOKEN": "(not shown)", "NCCL_KEY": "(not shown)",
    }  # fmt: skip


def test_what_libraries_set_is_not_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("this system does not tell")
    monkeypatch.setenv("TORCH_SET_LATER", "1")
    assert "TORCH_SET_LATER" not in environment._given()
    assert "PATH" in environment._given()
