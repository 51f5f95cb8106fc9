"""Trials in a child process: the whole way with Triton's interpreter, and children that die, hang or fail."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esc_arch.cli import kernel_trials
from esc_arch.cli.kernel_trials import Plan, try_gpus, try_kernels
from esc_arch.ops.autotune import files
from esc_arch.ops.autotune.choice import forget
from esc_arch.ops.autotune.files import file_of, load
from esc_arch.ops.autotune.networks import Network
from esc_arch.ops.autotune.operations import subjects
from esc_arch.ops.autotune.verdicts import Subject

TINY = Plan(
    {"ESC": Network(16, 1, 2, 4, 3, small=(1, 1, 3), image=(1, 2, 2), patches=(1, 2, 2))}, ("float16",), 60.0, rounds=1
)
CPU = torch.device("cpu")
ALL = list(subjects(("ESC",), ("float16",)))

STUB = """
import os, time

def pass_(*subject):
    return {"part": "the result", "error": 1e-6, "plain_error": 2e-6, "other": "sdpa", "milliseconds": {"NCHW": [1, 2]}}

def fail(*subject):
    return {"failure": "it is wrong"}

def raise_(*subject):
    raise RuntimeError("CUDA error: an illegal memory access")

def die(*subject):
    os.abort()

def hang(*subject):
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ESC_ARCH_TRITON", raising=False)
    if importlib.util.find_spec("triton") is None:
        monkeypatch.setattr(files, "_triton", lambda: "3.0")
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what the child does in place of a trial."""
    (tmp_path / "stub_of_trials.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: monkeypatch.setattr(kernel_trials, "EXAMINE", f"stub_of_trials:{name}")


def found() -> dict[Subject, Any]:
    forget()
    known, problem = load("cpu", None)
    assert problem == ""
    return known


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_whole_way_in_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    try_kernels(CPU, "this CPU", TINY, environment={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    known = found()
    assert set(known) == set(ALL)
    assert [verdict.failure for verdict in known.values()] == ["" for _ in ALL]
    for verdict in known.values():
        assert min(verdict.error, verdict.plain_error) > 0 and verdict.slower  # no wonder
    out = capsys.readouterr().out
    for line in ("window attention, triton", "ConvAttn, triton", "ConvAttn, triton_folded"):
        assert f"  {line}, ESC, float16: inference exact (error " in out
    assert "; training exact (error " in out
    assert out.endswith(f"tried. What was found is kept in {file_of(CPU)}\n")


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("die", "the process ended with signal SIGABRT"),
        ("raise_", "RuntimeError: CUDA error: an illegal memory access"),
        ("fail", "it is wrong"),
        ("absent", "AttributeError: module 'stub_of_trials' has no attribute 'absent'"),
    ],
)
def test_a_child_that_fails(child: Any, name: str, failure: str, capsys: pytest.CaptureFixture[str]) -> None:
    child(name)
    try_kernels(CPU, "this CPU", TINY)
    known = found()
    assert set(known) == set(ALL)
    assert all(verdict.failure.startswith(failure) for verdict in known.values())
    assert f"  window attention, triton, ESC, float16: inference FAILED, {failure}" in capsys.readouterr().out


def test_a_child_that_hangs_costs_the_time_once_a_backend(child: Any) -> None:
    child("hang")
    try_kernels(CPU, "this CPU", Plan(TINY.networks, ("float16", "float32"), timeout=0.2))
    failures = [verdict.failure for verdict in found().values()]
    assert failures == 3 * ["not finished after 0.2 s of running", *3 * [kernel_trials._LATE]]


def test_what_was_tried_is_tried_again_when_asked(child: Any, capsys: pytest.CaptureFixture[str]) -> None:
    child("fail")
    try_kernels(CPU, "this CPU", TINY)
    child("pass_")
    try_kernels(CPU, "this CPU", TINY)
    assert {verdict.failure for verdict in found().values()} == {"it is wrong"}
    out = capsys.readouterr().out
    assert f"this CPU: tried before, exact and faster in 0 of 6 cases ({file_of(CPU)}). `basicsr warmup --again`" in out
    try_kernels(CPU, "this CPU", TINY, again=True)
    assert {verdict.failure for verdict in found().values()} == {""}
    assert "inference exact (error 1.0e-06, plain PyTorch 2.0e-06), faster: 1 against 2 ms of sdpa" in (
        capsys.readouterr().out
    )


def test_what_is_left_is_tried(child: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is damaged counts as none, and precisions that are there are not tried again."""
    child("fail")
    try_kernels(CPU, "this CPU", TINY)
    child("pass_")
    try_kernels(CPU, "this CPU", Plan(TINY.networks, ("float16", "tf32")))
    assert {subject.precision: verdict.failure for subject, verdict in found().items()} == {
        "float16": "it is wrong", "tf32": "",
    }  # fmt: skip
    capsys.readouterr()
    file_of(CPU).write_text("{")
    forget()
    try_kernels(CPU, "this CPU", TINY)
    assert f"{file_of(CPU)} is damaged; they are tried again." in capsys.readouterr().out
    assert {verdict.failure for verdict in found().values()} == {""}


def test_a_cache_that_cannot_be_written(cache: Path, child: Any, capsys: pytest.CaptureFixture[str]) -> None:
    child("pass_")
    cache.write_text("a file where a folder is needed")
    try_kernels(CPU, "this CPU", TINY)
    assert "what was found cannot be kept, and auto does without them: " in capsys.readouterr().out


# --- the machine's GPUs ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Three of two kinds and an old one; returns what is tried."""
    names = ["A", "B", "A", "old"]
    tried: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(kernel_trials, "missing", lambda _, index: "it is too old" if names[index] == "old" else "")
    monkeypatch.setattr(kernel_trials, "file_of", lambda device: Path(names[device.index]))
    monkeypatch.setattr(kernel_trials, "try_kernels", lambda device, name, again: tried.append((device, name, again)))
    return tried


def test_a_gpu_of_each_kind_is_tried(gpus: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    try_gpus(again=True)
    assert gpus == [(torch.device("cuda:0"), "A", True), (torch.device("cuda:1"), "B", True)]
    assert "Triton kernels on old: not tried, it is too old\n" in capsys.readouterr().out


def test_none_is_tried_where_auto_is_kept_from_them(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESC_ARCH_TRITON", "0")
    try_gpus(again=False)
    assert gpus == []
    assert "ESC_ARCH_TRITON=0 keeps auto from them" in capsys.readouterr().out


def test_none_is_tried_in_the_interpreter(gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trials, "INTERPRETED", True)
    try_gpus(again=False)
    assert gpus == []


def test_a_broken_triton_is_told(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: torch.device) -> Path:
        raise ImportError("triton cannot be imported: no libcuda")

    monkeypatch.setattr(kernel_trials, "file_of", broken)
    try_gpus(again=False)
    assert gpus == []
    assert "Triton kernels on B: not tried, triton cannot be imported: no libcuda\n" in capsys.readouterr().out
