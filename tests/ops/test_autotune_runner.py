"""Autotuning in a child process: the whole way with Triton's interpreter, and children that die, hang or fail."""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import SERVER

from esc_arch.ops.autotune import results, runner, trial
from esc_arch.ops.autotune.results import Case, Network, TrialResult, file_of, load
from esc_arch.ops.autotune.runner import autotune, autotune_gpus
from esc_arch.ops.autotune.trial import cases

NETWORK = {"ESC": Network(16, 1, 2, 4, 3, 8, small=(1, 1, 3), image=(1, 2, 2), patches=(1, 2, 2))}
CPU = torch.device("cpu")
ALL = [case for case in cases() if case[2:4] == ("ESC", "float16")]

PASSED = TrialResult("", "the result", 1e-6, 2e-6, "sdpa", {"NCHW": (1, 2)})


# What the child does in place of a trial


def pass_(*_: Any) -> TrialResult:
    return PASSED


def fail(*_: Any) -> TrialResult:
    return TrialResult("it is wrong")


def raise_(*_: Any) -> TrialResult:
    raise RuntimeError("CUDA error: an illegal memory access")


def die(*_: Any) -> TrialResult:
    os.abort()


def hang(*_: Any) -> TrialResult:
    time.sleep(60)
    return PASSED


def serve(function: Any, connection: Any) -> None:
    trial.run = function
    runner._serve(connection)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ESC_ARCH_TRITON", raising=False)
    monkeypatch.setattr(runner, "NETWORKS", NETWORK)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    monkeypatch.setattr(trial, "cases", lambda: ALL)
    if importlib.util.find_spec("triton") is None:
        monkeypatch.setattr(results, "_triton", lambda: "3.0")
    load.cache_clear()
    yield tmp_path / "cache"
    load.cache_clear()


@pytest.fixture
def trial_finds(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets what is done in place of a trial, in this process."""

    def replace(function: Any) -> None:
        made = SimpleNamespace(run=function, stop=lambda: None)
        monkeypatch.setattr(runner, "_Child", lambda: made)

    return replace


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets what the child does in place of a trial; it is forked from one that has imported all."""
    monkeypatch.setattr(runner, "multiprocessing", SimpleNamespace(get_context=lambda _: SERVER))
    return lambda function: monkeypatch.setattr(runner, "_serve", functools.partial(serve, function))


def found() -> dict[Case, Any]:
    load.cache_clear()
    return load("cpu", None)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_whole_way_in_the_interpreter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    autotune(CPU, "this CPU")
    known = found()
    assert set(known) == set(ALL)
    assert [result.failure for result in known.values()] == ["" for _ in ALL]
    for result in known.values():
        assert min(result.error, result.plain_error) > 0 and result.slower  # no wonder
    out = capsys.readouterr().out
    for line in ("window attention, triton", "ConvAttn, triton"):
        assert f"  {line}, ESC, float16: inference exact (error " in out
    assert "; training exact (error " in out
    assert out.endswith(f"done. The results are in {file_of(CPU)}\n")


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        (die, "the process ended with signal SIGABRT"),
        (raise_, "RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_a_child_that_fails(
    child: Any, function: Any, failure: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    child(function)
    monkeypatch.setattr(trial, "cases", lambda: ALL[1:2])
    autotune(CPU, "this CPU")
    (result,) = found().values()
    assert result.failure.startswith(failure)
    assert f"  window attention, triton, ESC, float16: training FAILED, {failure}" in capsys.readouterr().out


def test_a_child_that_hangs_costs_the_time_once_a_backend(child: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    child(hang)
    monkeypatch.setattr(trial, "cases", lambda: ALL[:2])
    monkeypatch.setattr(runner, "TIMEOUT", 0.2)
    autotune(CPU, "this CPU")
    assert [result.failure for result in found().values()] == ["not finished after 0.2 s", runner._LATE]


def test_what_was_tried_is_tried_again_when_asked(trial_finds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trial_finds(fail)
    autotune(CPU, "this CPU")
    trial_finds(pass_)
    autotune(CPU, "this CPU")
    assert {result.failure for result in found().values()} == {"it is wrong"}
    out = capsys.readouterr().out
    assert f"this CPU: tried before, exact and faster in 0 of 4 cases ({file_of(CPU)}). `basicsr warmup --again`" in out
    autotune(CPU, "this CPU", again=True)
    assert {result.failure for result in found().values()} == {""}
    assert "inference exact (error 1.0e-06, plain PyTorch 2.0e-06), faster: 1 against 2 ms of sdpa" in (
        capsys.readouterr().out
    )


def test_what_is_left_is_tried(
    trial_finds: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is damaged counts as none, and precisions that are there are not tried again."""
    trial_finds(fail)
    autotune(CPU, "this CPU")
    trial_finds(pass_)
    monkeypatch.setattr(trial, "cases", lambda: ALL + [case._replace(precision="tf32") for case in ALL])
    autotune(CPU, "this CPU")
    assert {case.precision: result.failure for case, result in found().items()} == {
        "float16": "it is wrong", "tf32": "",
    }  # fmt: skip
    file_of(CPU).write_text("{")
    load.cache_clear()
    autotune(CPU, "this CPU")
    assert f"{file_of(CPU)} is damaged. `basicsr warmup` tries them again." in caplog.text
    assert {result.failure for result in found().values()} == {""}


def test_a_cache_that_cannot_be_written(cache: Path, trial_finds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trial_finds(pass_)
    cache.write_text("a file where a folder is needed")
    autotune(CPU, "this CPU")
    assert "the results cannot be saved, so auto does not use them: " in capsys.readouterr().out


# --- the machine's GPUs ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Three of two kinds and an old one; returns what is tried."""
    names = ["A", "B", "A", "old"]
    tried: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(runner, "missing", lambda _, index: "it is too old" if names[index] == "old" else "")
    monkeypatch.setattr(runner, "file_of", lambda device: Path(names[device.index]))
    monkeypatch.setattr(runner, "autotune", lambda device, name, again: tried.append((device, name, again)))
    return tried


def test_a_gpu_of_each_kind_is_tried(gpus: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    autotune_gpus(again=True)
    assert gpus == [(torch.device("cuda:0"), "A", True), (torch.device("cuda:1"), "B", True)]
    assert "Triton kernels on old: not tried, it is too old\n" in capsys.readouterr().out


def test_none_is_tried_where_auto_is_kept_from_them(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESC_ARCH_TRITON", "0")
    autotune_gpus(again=False)
    assert gpus == []
    assert "ESC_ARCH_TRITON=0 keeps auto from them" in capsys.readouterr().out


def test_none_is_tried_in_the_interpreter(gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "INTERPRETED", True)
    autotune_gpus(again=False)
    assert gpus == []


def test_a_broken_triton_is_told(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: torch.device) -> Path:
        raise ImportError("triton cannot be imported: no libcuda")

    monkeypatch.setattr(runner, "file_of", broken)
    autotune_gpus(again=False)
    assert gpus == []
    assert "Triton kernels on B: not tried, triton cannot be imported: no libcuda\n" in capsys.readouterr().out
