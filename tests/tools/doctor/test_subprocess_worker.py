"""Work in a child process: what it returns, raises and prints, and what is said when it crashes or hangs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from esc_arch.tools.doctor.subprocess_worker import JobFailed, Worker, import_failure


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(timeout=0.5) as started:
        yield started


def test_results_and_errors(worker: Worker) -> None:
    assert worker.call("builtins:sorted", [3, 1, 2]) == [1, 2, 3]
    with pytest.raises(JobFailed, match=r"^ValueError: invalid literal for int") as failed:
        worker.call("builtins:int", "x")
    assert not failed.value.crashed and not failed.value.late
    with pytest.raises(JobFailed, match="ModuleNotFoundError: No module named 'there_is_none'"):
        worker.call("there_is_none:f")


def test_what_is_printed_is_no_answer(worker: Worker) -> None:
    assert worker.call("builtins:print", "{}") is None
    assert worker.call("os:system", "echo nonsense") == 0
    assert worker.call("builtins:abs", -3) == 3


def test_an_exit_is_an_error(worker: Worker) -> None:
    with pytest.raises(JobFailed, match="SystemExit: 3"):
        worker.call("sys:exit", 3)
    assert worker.call("builtins:abs", -3) == 3


def test_a_crash_is_told_with_its_signal_and_the_next_call_works(worker: Worker) -> None:
    first = worker.call("os:getpid")
    with pytest.raises(JobFailed, match="the process ended with signal SIGABRT") as failed:
        worker.call("os:abort")
    assert failed.value.crashed
    assert worker.call("os:getpid") != first


def test_the_last_line_of_a_crash_is_told(worker: Worker) -> None:
    worker.call("os:system", "echo the driver is gone >&2")
    with pytest.raises(JobFailed, match=r"status 7 \(the driver is gone\)"):
        worker.call("os:_exit", 7)


def test_a_hang_ends_with_the_time(worker: Worker) -> None:
    with pytest.raises(JobFailed, match=r"not finished after 0.5 s of running") as failed:
        worker.call("time:sleep", 60)
    assert failed.value.late
    assert worker.call("builtins:abs", -3) == 3


def test_esc_arch_is_there_without_what_its_start_imports(worker: Worker) -> None:
    worker.timeout = 60
    result = worker.call("esc_arch.tools.doctor.self_tests:compare", "window attention", "sdpa", "cpu", "float32", True)
    assert max(result["forward"], result["gradients"]) < result["tolerance"]
    code = "import sys; assert 'basicsr' not in sys.modules, 'it is there'"
    assert worker.call("builtins:exec", code) is None


@pytest.mark.usefixtures("native")
def test_operators_may_be_loaded_before_what_calls_them(worker: Worker) -> None:
    worker.timeout = 60
    assert worker.call("esc_arch.tools.doctor.probes:native_operators")["ready"]
    result = worker.call("esc_arch.tools.doctor.self_tests:compare", "window attention", "cpu", "cpu", "float32", True)
    assert max(result["forward"], result["gradients"]) < result["tolerance"]


def test_why_a_process_cannot_import() -> None:
    assert import_failure("json") == ""
    assert "No module named 'there_is_none'" in import_failure("there_is_none")
