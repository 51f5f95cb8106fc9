"""Processes of a distributed run, forked from one in which all is imported: in place of a launcher and Python twice."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import Run

from esc_arch.cli import main

__all__ = ["finish", "free_port", "of_torchrun", "run_ranks", "start_ranks"]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["esc_arch.cli.train", "esc_arch.cli.test", "pytest", "conftest"])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def of_torchrun(port: str) -> Callable[[int], dict[str, str]]:
    """What torchrun sets for a process of two on one machine."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return lambda rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def start_ranks(folder: Path, run: Callable[..., Any], *arguments: Any, environment: Callable[[int], Any]) -> list[Any]:
    """Two processes that call `run(*arguments)` in a folder, each with its own environment and its own output."""
    ranks = [
        SERVER.Process(target=_run, args=(folder, rank, environment(rank), run, arguments), daemon=False)
        for rank in range(2)
    ]
    for each in ranks:
        each.start()
    return ranks


def finish(folder: Path, ranks: list[Any]) -> list[Run]:
    """Wait for their ends."""
    for each in ranks:
        each.join(100)
        if each.is_alive():
            each.kill()
    out, err = ([(folder / f"{rank}.{of}").read_text(errors="replace") for rank in range(2)] for of in ("out", "err"))
    return [Run(each.exitcode, out[rank], err[rank], folder) for rank, each in enumerate(ranks)]


def run_ranks(folder: Path, argv: list[str], environment: Callable[[int], Any]) -> list[Run]:
    """Run a command of `basicsr` in both."""
    return finish(folder, start_ranks(folder, main, argv, environment=environment))


def _run(folder: Path, rank: int, environment: Mapping[str, str], run: Callable[..., Any], arguments: Any) -> None:
    status = 1
    try:
        os.chdir(folder)
        for of, descriptor in (("out", 1), ("err", 2)):
            with open(f"{rank}.{of}", "w") as file:
                os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.environ.update(environment, OMP_NUM_THREADS="1")
        torch.set_num_threads(1)
        status = run(*arguments) or 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
