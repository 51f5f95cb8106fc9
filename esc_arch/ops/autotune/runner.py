"""Autotune on this machine's GPUs, in a child process, and keep what was found for `auto`."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from esc_arch.ops.triton_support import INTERPRETED, missing

from . import trial
from .results import MODES, NETWORKS, Case, Network, TrialResult, file_of, load, save

__all__ = ["autotune", "autotune_gpus"]

#: Seconds for each backend, network, precision and mode; most of it is compiling.
TIMEOUT = 300.0
_LATE = "an earlier trial of it was not finished in time"


def autotune_gpus(*, again: bool) -> None:
    """`autotune` on a GPU of each kind, unless the environment keeps auto from Triton or has it interpreted."""
    if os.environ.get("ESC_ARCH_TRITON") == "0":
        print("Triton kernels: ESC_ARCH_TRITON=0 keeps auto from them; they are not tried.")
        return
    if INTERPRETED:  # a result of that would stay
        print("Triton kernels: TRITON_INTERPRET is set; they are not tried.")
        return
    files = set()
    for index in range(torch.cuda.device_count()):
        name, device = torch.cuda.get_device_name(index), torch.device("cuda", index)
        lacking = missing("cuda", index)
        try:
            file = None if lacking else file_of(device)
        except ImportError as error:
            file, lacking = None, str(error)
        if lacking:
            print(f"Triton kernels on {name}: not tried, {lacking}")
        elif file not in files:
            files.add(file)
            autotune(device, name, again=again)


def autotune(device: torch.device, name: str, *, again: bool = False) -> None:
    """Try what has not been tried on a device, say what was found, and keep it, each result at once.

    Whatever goes wrong is said and ends nothing.

    Args:
        name: of the device, for messages.
        again: try everything again.
    """
    file, wanted = file_of(device), list(trial.cases())
    results = {} if again else dict(load(device.type, device.index))
    left = [case for case in wanted if case not in results]
    if not left:
        better = sum(not results[case].failure and not results[case].slower for case in wanted)
        print(
            f"Triton kernels on {name}: tried before, exact and faster in {better} of {len(wanted)} cases ({file}). "
            "`basicsr warmup --again` repeats it."
        )
        return
    print(f"Triton kernels on {name}: comparing them with PyTorch's; it takes some minutes, once ...", flush=True)
    child, late = _Child(), set()
    try:
        for case in left:
            if case[:2] in late:
                result = TrialResult(failure=_LATE)
            elif (found := child.run(case, NETWORKS[case.network], device)) is not None:
                result = found
            else:
                late.add(case[:2])
                result = TrialResult(failure=f"not finished after {TIMEOUT:g} s")
            results[case] = result
            save(device, results)
            if case.mode == MODES[-1]:
                modes = ((mode, results.get(case._replace(mode=mode))) for mode in MODES)
                line = "; ".join(f"{mode} {result}" for mode, result in modes if result is not None)
                print(f"  {', '.join(case[:-1])}: {line}", flush=True)
    except OSError as error:
        print(f"Triton kernels on {name}: the results cannot be saved, so auto does not use them: {error}")
        return
    finally:
        child.stop()
    print(f"Triton kernels on {name}: done. The results are in {file}")


class _Child:
    """A process that tries backends, started when needed: a kernel that fails may end its process or hang."""

    process: multiprocessing.process.BaseProcess | None = None
    connection: Any

    def run(self, case: Case, network: Network, device: torch.device) -> TrialResult | None:
        """What the trial found, or how it ended the process; None when it was not finished in time."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        result = None
        try:
            self.connection.send((case, network, device, trial.ROUNDS))
            if self.connection.poll(TIMEOUT):
                result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            result = TrialResult(failure=f"the process ended with {ending}")
        if result is None or result.failure:  # after an error in a kernel nothing more is computed on that GPU
            self.stop()
        return result

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(connection: Connection) -> None:
    with suppress(EOFError):  # once nothing more is asked
        while True:
            arguments = connection.recv()
            try:
                result = trial.run(*arguments)
            except Exception as error:
                result = TrialResult(failure=f"{type(error).__name__}: {error}")
            connection.send(result)
