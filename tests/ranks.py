"""Processes forked from one in which all is imported, and that has no threads: in place of Python, or of a launcher."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import Run, child_environment, empty_figure

from esc_arch.cli import main
from esc_arch.training import report

__all__ = [
    "SERVER", "enter", "finish", "free_port", "of_torchrun", "run_forked", "run_ranks", "start_forked", "start_ranks"
]  # fmt: skip

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("av", "pytest", "skimage.data", "torch.export"),
        *(f"esc_arch.cli.{verb}" for verb in ("export", "prepare", "publish", "test", "train", "upscale", "warmup")),
        *(f"esc_arch.tools.{name}" for name in ("benchmark.cost", "benchmark.quality", "video.upscaling")),
    ]
)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def of_torchrun(port: str) -> Callable[[int], dict[str, str]]:
    """What torchrun sets for a process of two on one machine."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return lambda rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def enter(process: int, *kinds: str) -> None:
    """Move this process, which has no threads, into namespaces of another."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.getcwd()
    for kind in kinds:
        with open(f"/proc/{process}/ns/{kind}") as file:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns({kind})")
    os.chdir(folder)


def start_forked(
    folder: Path,
    run: Callable[..., Any],
    *arguments: Any,
    number: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """A process that calls `run(*arguments)` in a folder, with its own environment and its own output."""
    given = child_environment() | (environment or {})
    process = SERVER.Process(
        target=_run, name="MainProcess", args=(folder, number, given, run, arguments), daemon=False
    )
    process.start()
    return process


def start_ranks(folder: Path, run: Callable[..., Any], *arguments: Any, environment: Callable[[int], Any]) -> list[Any]:
    """Two such processes, numbered."""
    return [start_forked(folder, run, *arguments, number=rank, environment=environment(rank)) for rank in range(2)]


def finish(folder: Path, processes: list[Any]) -> list[Run]:
    """Wait for their ends."""
    for each in processes:
        each.join(100)
        if each.is_alive():
            each.kill()
            each.join()
    runs = []
    for number, each in enumerate(processes):
        files = [folder / f"{number}.{of}" for of in ("out", "err")]
        runs.append(Run(each.exitcode, *(file.read_text(errors="replace") for file in files), folder))
        for file in files:
            file.unlink()
    return runs


def run_forked(folder: Path, argv: list[str]) -> Run:
    """Run a command of `basicsr`."""
    return finish(folder, [start_forked(folder, main, argv)])[0]


def run_ranks(folder: Path, argv: list[str], environment: Callable[[int], Any]) -> list[Run]:
    """Run a command of `basicsr` in two."""
    return finish(folder, start_ranks(folder, main, argv, environment=environment))


def _run(folder: Path, number: int, environment: Mapping[str, str], run: Callable[..., Any], arguments: Any) -> None:
    status: Any = 1
    try:
        os.chdir(folder)
        for of, descriptor in (("out", 1), ("err", 2)):
            with open(f"{number}.{of}", "w") as file:
                os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.environ.clear()
        os.environ.update(environment)
        multiprocessing.set_start_method(None, force=True)  # which is the server's
        torch.set_num_threads(1)
        report._draw = empty_figure
        status = run(*arguments) or 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
