"""Trying the Triton kernels on this machine's GPUs, in a child process, and keeping what was found for `auto`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from esc_arch.atomic_io import write_atomically
from esc_arch.ops.autotune.choice import forget
from esc_arch.ops.autotune.files import encode, file_of, load
from esc_arch.ops.autotune.networks import NETWORKS, Network
from esc_arch.ops.autotune.operations import subjects
from esc_arch.ops.autotune.trial import ROUNDS
from esc_arch.ops.autotune.verdicts import MODES, PRECISIONS, Subject, Verdict
from esc_arch.ops.triton_support import missing
from esc_arch.ops.window_attention.triton import INTERPRETED
from esc_arch.tools.doctor.subprocess_worker import JobFailed, Worker

__all__ = ["Plan", "try_gpus", "try_kernels"]

#: What the child process calls for each subject.
EXAMINE = "esc_arch.ops.autotune.trial:examine"
_LATE = "an earlier trial of it was not finished in time"


@dataclass(frozen=True)
class Plan:
    """What is tried.

    Attributes:
        networks: by name; names other than those of `NETWORKS` are of no use to `auto`.
        precisions: keys of `PRECISIONS`.
        timeout: seconds for each backend, network, precision and mode; most of it is compiling.
        rounds: of timing.
    """

    networks: Mapping[str, Network]
    precisions: tuple[str, ...]
    timeout: float = 300.0
    rounds: int = ROUNDS


EVERYTHING = Plan(NETWORKS, tuple(PRECISIONS))


def try_gpus(*, again: bool) -> None:
    """`try_kernels` on a GPU of each kind, unless the environment keeps auto from them, or has them interpreted."""
    if os.environ.get("ESC_ARCH_TRITON") == "0":
        print("Triton kernels: ESC_ARCH_TRITON=0 keeps auto from them; they are not tried.")
        return
    if INTERPRETED:  # a verdict on that would stay
        print("Triton kernels: TRITON_INTERPRET is set; they are not tried.")
        return
    files = set()
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        lacking = missing("cuda", index)
        if lacking:
            print(f"Triton kernels on {name}: not tried, {lacking}")
            continue
        device = torch.device("cuda", index)
        try:
            file = file_of(device)
        except ImportError as error:
            print(f"Triton kernels on {name}: not tried, {error}")
            continue
        if file not in files:
            files.add(file)
            try_kernels(device, name, again=again)


def try_kernels(
    device: torch.device,
    name: str,
    plan: Plan = EVERYTHING,
    *,
    again: bool = False,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Try what has not been tried on a device, say what was found, and keep it, each verdict at once.

    Whatever goes wrong is said and ends nothing.

    Args:
        device: where to.
        name: of the device, for messages.
        again: try everything again.
        environment: what the child process has beside this one's.
    """
    file, (known, problem) = file_of(device), load(device.type, device.index)
    wanted = list(subjects(tuple(plan.networks), plan.precisions))
    verdicts = {} if again else dict(known)
    if problem:
        print(f"Triton kernels on {name}: {problem}; they are tried again.")
    if all(subject in verdicts for subject in wanted):
        better = sum(not verdict.failure and not verdict.slower for verdict in map(verdicts.__getitem__, wanted))
        print(
            f"Triton kernels on {name}: tried before, exact and faster in {better} of {len(wanted)} cases ({file}). "
            "`basicsr warmup --again` repeats it."
        )
        return
    print(f"Triton kernels on {name}: trying them beside PyTorch's; it takes some minutes, once ...", flush=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        left = [subject for subject in wanted if subject not in verdicts]
        for subject, verdict in _tried(left, device, plan, environment or {}):
            verdicts[subject] = verdict
            write_atomically(file, encode(device, verdicts))
            if subject.mode == MODES[-1]:
                print(f"  {_line(subject, verdicts)}", flush=True)
    except OSError as error:
        print(f"Triton kernels on {name}: what was found cannot be kept, and auto does without them: {error}")
        return
    finally:
        forget()
    print(f"Triton kernels on {name}: tried. What was found is kept in {file}")


def _tried(
    wanted: list[Subject], device: torch.device, plan: Plan, environment: Mapping[str, str]
) -> Iterator[tuple[Subject, Verdict]]:
    late: set[tuple[str, str]] = set()
    with Worker(plan.timeout, **environment) as worker:
        for subject in wanted:
            backend = subject.operation, subject.backend
            if backend in late:
                yield subject, Verdict(failure=_LATE)
                continue
            shapes = asdict(plan.networks[subject.network])
            try:
                yield subject, Verdict(**worker.call(EXAMINE, subject, shapes, str(device), plan.rounds))
            except JobFailed as failure:
                # (After an error in a kernel a process computes nothing more on that GPU)
                worker.stop()
                if failure.late:
                    late.add(backend)
                yield subject, Verdict(failure=str(failure))


def _line(subject: Subject, verdicts: Mapping[Subject, Verdict]) -> str:
    """What was found in all modes."""
    found = ((mode, verdicts.get(subject._replace(mode=mode))) for mode in MODES)
    told = "; ".join(f"{mode} {verdict}" for mode, verdict in found if verdict is not None)
    return f"{', '.join(subject[:-1])}: {told}"
