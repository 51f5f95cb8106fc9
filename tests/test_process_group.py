"""Processes that agree, fail together and end in order; the command line's side is in cli/test_distributed.py."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing
from ranks import finish, free_port, of_torchrun, start_ranks

from esc_arch.errors import UserError, describe
from esc_arch.training import distributed
from esc_arch.training.distributed import failure_monitor, launch
from esc_arch.training.distributed.failure_monitor import FailureMonitor

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # see Exits

ENOUGH = 20.0  # seconds for what takes a moment


def wait_until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + ENOUGH
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- a process alone ----------------------------------------------------------------------------------------------


def test_a_process_alone_agrees_with_itself() -> None:
    agreement = distributed.Agreement()
    assert [agreement.any_rank(flag) for flag in (False, True, False)] == [False, True, False]
    assert distributed.gather_objects("mine") == ["mine"]
    distributed.wait_for_all()


@pytest.mark.parametrize("error", [ValueError("one bad image"), KeyboardInterrupt(), SystemExit(143)])
def test_a_process_alone_fails_as_ever(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, distributed.abort_all_ranks(lambda _: (1, "")):
        raise error
    assert raised.value is error


# --- two processes ------------------------------------------------------------------------------------------------


def together(second_port: str) -> None:
    def run() -> None:
        distributed.init_dist("pytorch")
        rank = dist.get_rank()
        agreement = distributed.Agreement()
        print([agreement.any_rank(rank == 1 and call == 2) for call in range(5)])
        print(distributed.gather_objects({"rank": rank}))
        if rank == 0:  # a validation that only one process does
            time.sleep(0.5)
            Path("validated").touch()
        distributed.wait_for_all()
        print(os.path.exists("validated"))
        dist.all_reduce(torch.zeros(1))
        sys.exit(143)

    try:
        with distributed.abort_all_ranks(describe):
            run()
    except SystemExit as end:
        print(end.code, flush=True)
    os.environ["MASTER_PORT"] = second_port
    with distributed.abort_all_ranks(describe):
        distributed.init_dist("pytorch")
        if dist.get_rank() == 1:
            raise ValueError("one bad image")
        dist.all_reduce(torch.zeros(1))


@pytest.mark.timeout(120)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes would use them")
def test_two_processes(tmp_path: Path) -> None:
    """They agree and end together, join again, and one fails."""
    runs = finish(tmp_path, start_ranks(tmp_path, together, free_port(), environment=of_torchrun(free_port())))
    for done in runs:
        agreed, gathered, validated, status = done.out.splitlines()
        assert agreed == "[False, False, False, True, False]"  # of the third call, known at the fourth, to both
        assert gathered == "[{'rank': 0}, {'rank': 1}]"
        assert (validated, status) == ("True", "143")
        assert done.status == 1
    # Rank 0 waits in a collective
    assert runs[0].err.splitlines()[-1:] == ["rank 1 failed: ValueError: one bad image; stopping"]
    assert "Traceback" not in runs[0].err
    assert runs[1].err.count("Traceback") == 1 and runs[1].err.rstrip().endswith("ValueError: one bad image")


# --- joining --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "advice"), [("pytorch", "torchrun --master_port"), ("slurm", "dist_params: port")]
)
def test_a_port_that_is_taken(launcher: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda allow_none: "spawn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "_set_slurm_environment", lambda port: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        joining = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in joining.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        message = rf"The 2 processes could not join at 127\.0\.0\.1:{port}: .* choose another with {advice}\. Otherwise"
        with pytest.raises(UserError, match=message):
            distributed.init_dist(launcher)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere gloo chooses by itself")
@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "lo"),
        ({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth7"}, "eth7"),
        ({"MASTER_ADDR": "no such host"}, None),
        ({}, None),
    ],
)
def test_gloo_uses_the_interface_that_reaches_rank_0(
    environment: dict[str, str], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", environment)
    launch._choose_gloo_interface()
    assert environment.get("GLOO_SOCKET_IFNAME") == chosen


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({"MASTER_ADDR": "n1", "GROUP_WORLD_SIZE": "2"}, "eth0"),
        ({"MASTER_ADDR": "n1", "SLURM_NNODES": "2"}, "eth0"),
        ({"MASTER_ADDR": "n1", "GROUP_WORLD_SIZE": "1"}, "lo"),
        ({"MASTER_ADDR": "127.0.1.1", "GROUP_WORLD_SIZE": "2"}, "lo"),
    ],
)
def test_gloo_avoids_loopback_among_machines(
    environment: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Debian a machine's own name stands for 127.0.1.1."""
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(socket, "gethostbyname", {"n1": "127.0.1.1", "127.0.1.1": "127.0.1.1"}.__getitem__)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    towards = {"127.0.1.1": "127.0.0.1", launch._ELSEWHERE: "10.0.0.5"}
    monkeypatch.setattr(launch, "_address_towards", towards.__getitem__)
    monkeypatch.setattr(launch, "_address_of", lambda name: {"lo": "127.0.0.1", "eth0": "10.0.0.5"}[name])
    launch._choose_gloo_interface()
    assert environment["GLOO_SOCKET_IFNAME"] == chosen


# --- the monitor ----------------------------------------------------------------------------------------------------


class Exits(list[int]):
    """The exit statuses that monitors would have ended this process with; their threads end instead."""

    def __call__(self, status: int) -> None:
        self.append(status)
        sys.exit()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Exits:
    recorded = Exits()
    monkeypatch.setattr(failure_monitor, "_exit", recorded)
    monkeypatch.setattr(failure_monitor, "_PRECEDENCE", 0.0)
    monkeypatch.setattr(failure_monitor.atexit, "register", lambda function, status: recorded.append(-status))
    return recorded


@pytest.fixture
def monitors(exits: Exits) -> Iterator[list[FailureMonitor]]:
    """Of two processes, here in one."""
    store = dist.HashStore()
    both = [FailureMonitor(store, rank, 2, poll=0.01) for rank in range(2)]
    for each in both:
        each.start()
    yield both
    for each in reversed(both):  # as each puts back what it found
        each.stop()


def test_a_failure_ends_the_others(monitors: list[FailureMonitor], exits: Exits, capsys: pytest.CaptureFixture) -> None:
    monitors[1].fail(2, "lq.png is no image")
    assert sorted(exits) == [-2, 2]  # this one when Python exits, the other one now
    monitors[0].fail(1, "RuntimeError: connection closed by peer")  # a consequence; would not return but in this test
    assert capsys.readouterr().err == "rank 1 failed: lq.png is no image; stopping\n"
    assert sorted(exits) == [-2, -1, 2]


def test_cleaning_up_after_a_failure_has_an_end(
    monitors: list[FailureMonitor], exits: Exits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(failure_monitor, "_READING", 0.1)
    monkeypatch.setattr(failure_monitor, "_CLEANING", 0.1)
    monitors[0].fail(2, "message")
    wait_until(lambda: exits.count(2) == 2)
    assert "rank 0 hangs after its failure; stopping\n" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [False, True])
def test_a_process_that_falls_silent(finished: bool, exits: Exits, capsys: pytest.CaptureFixture) -> None:
    """One of three is killed or stopped, or has ended as it should: the two others end, or go on."""
    store = dist.HashStore()
    monitors = [FailureMonitor(store, rank, 3, poll=0.01, silence=0.3) for rank in range(3)]
    for each in monitors:
        each.start()
    if finished:
        monitors[1].stop()
        time.sleep(0.6)
        assert exits == []
    else:
        monitors[1]._stopping.set()
        wait_until(lambda: len(exits) == 2)
        message = (
            "rank 1 failed: no sign of life for 0.3 s (ESC_ARCH_RANK_TIMEOUT): it was killed or stopped, or its "
            "machine cannot be reached"
        )
        assert capsys.readouterr().err.count(f"{message}; stopping\n") == 2
    for each in monitors:
        each.stop()


@pytest.mark.parametrize("text", ["", "a minute", "0", "4.9", "-60", "nan", "inf"])
def test_a_time_of_silence_that_cannot_be(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure_monitor.longest_silence() == 60
    monkeypatch.setenv("ESC_ARCH_RANK_TIMEOUT", "1e3")
    assert failure_monitor.longest_silence() == 1000
    monkeypatch.setenv("ESC_ARCH_RANK_TIMEOUT", text)
    with pytest.raises(UserError, match=rf"ESC_ARCH_RANK_TIMEOUT={text} .* must be seconds .* 5 or more"):
        distributed.init_dist("pytorch")


def test_a_rendezvous_that_is_lost(exits: Exits, capsys: pytest.CaptureFixture) -> None:
    class Lost(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    lonely = FailureMonitor(Lost(), 1, 2, poll=0.01)
    lonely.start()
    wait_until(lambda: exits)
    lonely.stop()
    assert exits == [1]
    assert capsys.readouterr().err.startswith("the rendezvous is lost: rank 0, or the torchrun that served it")


def test_a_monitor_leaves_nothing_behind(exits: Exits) -> None:
    threads = threading.active_count()
    one = FailureMonitor(dist.HashStore(), 0, 1, poll=ENOUGH)
    one.start()
    assert threading.active_count() == threads + 1
    one.stop()
    assert threading.active_count() == threads


def test_a_monitor_has_a_connection_of_its_own() -> None:
    """The process group's is occupied while the main thread waits for a key on it."""
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = failure_monitor.own_connection(dist.PrefixStore("default_pg", served))
    waiting = threading.Thread(target=served.wait, args=(["the end"], timedelta(seconds=ENOUGH)))
    waiting.start()
    assert not own.check(["failure"])
    own.set("the end", "")
    waiting.join()
