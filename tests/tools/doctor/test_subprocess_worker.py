"""Work in a child process: what it returns, raises and prints, and what is said when it crashes or hangs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from esc_arch.tools.doctor import subprocess_worker
from esc_arch.tools.doctor.subprocess_worker import JobFailed, Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """One for all tests, each of which sets its time."""
    with Worker(timeout=60) as started:
        yield started


def test_results_and_errors(worker: Worker) -> None:
    assert worker.call("builtins:sorted", [3, 1, 2]) == [1, 2, 3]
    with pytest.raises(JobFailed, match=r"^ValueError: invalid literal for int") as failed:
        worker.call("builtins:int", "x")
    assert not failed.value.late
    with pytest.raises(JobFailed, match="ModuleNotFoundError: No module named 'there_is_none'"):
        worker.call("there_is_none:f")
    with pytest.raises(JobFailed, match="SystemExit: 3"):
        worker.call("sys:exit", 3)
    with pytest.raises(JobFailed, match=r"^Exception$"):
        worker.call("builtins:exec", "raise Exception")
    assert worker.call("builtins:abs", -3) == 3


def test_what_is_printed_is_no_answer(worker: Worker) -> None:
    assert worker.call("builtins:print", "{}") is None
    assert worker.call("os:system", "echo nonsense") == 0
    assert worker.call("builtins:abs", -3) == 3


def test_a_crash_is_told_with_its_signal_and_the_next_call_works(worker: Worker) -> None:
    first = worker.call("os:getpid")
    with pytest.raises(JobFailed, match="the process ended with signal SIGABRT") as failed:
        worker.call("os:abort")
    with pytest.raises(JobFailed, match="status 7"):
        worker.call("os:_exit", 7)
    assert not failed.value.late
    assert worker.call("os:getpid") != first


def test_a_hang_ends_with_the_time() -> None:
    with Worker(timeout=0.2) as worker:
        with pytest.raises(JobFailed, match=r"not finished after 0.2 s of running") as failed:
            worker.call("time:sleep", 60)
        assert failed.value.late
        assert worker.call("builtins:abs", -3) == 3


def test_a_process_that_ends_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess_worker, "_serve", bool)  # which answers nothing
    with Worker(timeout=60) as worker, pytest.raises(JobFailed, match="the process ended with status 0"):
        worker.call("builtins:abs", -3)


@pytest.mark.usefixtures("native")
def test_esc_arch_is_there_without_what_its_start_imports(worker: Worker) -> None:
    """The C++ operators may be loaded before what calls them."""
    compiler, operators = worker.call("esc_arch.tools.doctor.machine:cpp_operators")
    assert operators[2] == "ok" and operators[1].startswith("built here, "), (compiler, operators)
    for backend in ("sdpa", "cpu"):
        target = ("window attention", "cpu", "float32")
        arguments = ("key", backend, target, True, "problem", "advice")
        ((_, text, status, *_),) = worker.call("esc_arch.tools.doctor.self_tests:examine", *arguments)
        assert status == "ok" and text.startswith("self-test: error forward ")
    code = "import sys; assert 'basicsr' not in sys.modules, 'it is there'"
    assert worker.call("builtins:exec", code) is None
