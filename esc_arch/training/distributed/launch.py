"""Joining the processes of a run, with or without CUDA, and leaving: together when one fails, else in order."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.distributed_c10d import _get_default_store

from esc_arch.errors import UserError
from esc_arch.printing import shown

from .collectives import close_control_group, gather_objects, open_control_group, wait_for_all
from .failure_monitor import FailureMonitor, longest_silence, own_connection

__all__ = ["abort_all_ranks", "init_dist", "print_note", "resolve_launcher", "take_notes"]

#: launcher: the environment variables that it sets, and how to use it
_LAUNCHERS: dict[str, tuple[tuple[str, ...], str]] = {
    "none": ((), ""),
    "pytorch": (
        ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        "start it with: torchrun --nproc_per_node=N --no-python basicsr train -opt FILE --launcher pytorch",
    ),
    "slurm": (
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"),
        "start it inside a Slurm job with: srun basicsr train -opt FILE --launcher slurm",
    ),
}
#: torch.distributed's own.
_DEFAULT_PORT = "29500"
#: An address of no machine (RFC 5737), which the default route leads to.
_ELSEWHERE = "192.0.2.1"
#: Linux's request for the address of a network interface (linux/sockios.h).
_SIOCGIFADDR = 0x8915

#: Notes since the last run began; see `take_notes`.
_notes: list[str] = []
#: Of this process, while it is one of several that joined.
_monitor: FailureMonitor | None = None


def take_notes() -> list[str]:
    """The notes that no log has yet."""
    notes = list(_notes)
    _notes.clear()
    return notes


def print_note(text: str) -> None:
    """Print `Note: text` to stderr, once among all processes, and keep it for the log, which is not open yet."""
    text = shown(text)
    _notes.append(text)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"Note: {text}", file=sys.stderr, flush=True)


def resolve_launcher(launcher: str, environ: Mapping[str, str]) -> str:
    """The launcher in use: `none`, `pytorch` or `slurm`.

    `none` among processes started by torchrun means `pytorch`: BasicSR would train as rank 0 in each
    of them, and each would archive the others' folder (fault 20). UserError if the environment lacks what the launcher
    sets; the message has the command to use.
    """
    if launcher == "none" and {"RANK", "LOCAL_RANK"} <= environ.keys() and int(environ.get("WORLD_SIZE", 1)) > 1:
        print_note(f"started by torchrun with {environ['WORLD_SIZE']} processes: using --launcher pytorch.")
        launcher = "pytorch"
    variables, usage = _LAUNCHERS[launcher]
    if missing := [name for name in variables if name not in environ]:
        raise UserError(
            f"--launcher {launcher} needs the environment variables {', '.join(missing)}, which are not set; {usage}"
        )
    return launcher


def init_dist(launcher: str, backend: str = "nccl", port: int | None = None, **process_group: Any) -> None:
    """Join the processes started by `launcher` (`pytorch` or `slurm`) and choose this one's GPU.

    Without CUDA the processes use gloo whatever `backend` says (fault 17). `port` is for Slurm
    only; torchrun chooses its own. Further arguments go to `torch.distributed.init_process_group`.

    To be called within `abort_all_ranks`, which undoes it: from now on a thread watches the other processes. UserError
    if there are fewer GPUs than processes, Slurm's `scontrol` names no nodes, the processes do not find each other, or
    ESC_ARCH_RANK_TIMEOUT is invalid.
    """
    global _monitor
    silence = longest_silence()
    if torch.multiprocessing.get_start_method(allow_none=True) is None:
        torch.multiprocessing.set_start_method("spawn")  # CUDA does not survive a fork
    if launcher == "slurm":
        _set_slurm_environment(port)
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_device(launcher))
    else:
        backend = "gloo"
    _choose_gloo_interface()
    try:
        dist.init_process_group(backend=backend, **process_group)
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        choice = "dist_params: port" if launcher == "slurm" else "torchrun --master_port"
        raise UserError(
            f"The {os.environ.get('WORLD_SIZE')} processes could not join at {place}: {reason} If the port is taken, "
            f"choose another with {choice}. Otherwise check that all are started, and that the machines reach each "
            f"other there."
        ) from error
    open_control_group()
    run = gather_objects(uuid.uuid4().hex)[0]  # torchrun's store outlives a restart
    keys = dist.PrefixStore(f"esc_arch/{run}", own_connection(_get_default_store()))
    _monitor = FailureMonitor(keys, dist.get_rank(), dist.get_world_size(), silence=silence)
    _monitor.start()


@contextmanager
def abort_all_ranks(describe: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
    """Around everything that a process does in a run; `init_dist` is called inside.

    Left normally or by SystemExit, which all processes have to do, it waits for the others, then ends the monitor and
    the process group. Another exception, with the exit status and message that `describe` gives for it, is told to the
    others, which end within about two seconds, and raised, to be printed before the process exits. If another process
    failed before, it is taken for a consequence, and the process ends with the other's message.
    """
    global _monitor
    ended: SystemExit | None = None
    try:
        try:
            yield
        except SystemExit as end:
            ended = end
        wait_for_all()  # until then the others need the store, which may end with this process
        if _monitor is not None:
            _monitor.stop()
            _monitor = None
        close_control_group()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        if _monitor is not None:
            _monitor.fail(*describe(error))
        raise
    if ended is not None:
        raise ended


def _choose_gloo_interface() -> None:
    """Let gloo use the network interface by which rank 0 is reached, if the user has not chosen one.

    By itself it takes the address of the machine's name, on many systems a loopback address, to which other machines
    could not connect. Where rank 0's name is such a one on its own machine, the default route counts.
    """
    host = os.environ.get("MASTER_ADDR")
    if host is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    machines = int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_NNODES", "1")))
    with suppress(OSError):
        master = socket.gethostbyname(host)
        address = _address_towards(master)
        if machines > 1 and address.startswith("127.") and master != host:
            address = _address_towards(_ELSEWHERE)
        for _, name in socket.if_nameindex():
            if _address_of(name) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _address_towards(host: str) -> str:
    """This machine's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(_DEFAULT_PORT)))
        return str(probe.getsockname()[0])


def _address_of(interface: str) -> str | None:
    """The IPv4 address of an interface; None if it has none, or elsewhere than on Linux, which has this request."""
    if sys.platform != "linux":
        return None
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None


def _local_device(launcher: str) -> int:
    rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    gpus = torch.cuda.device_count()
    # Slurm may show each task its own GPU only, always as number 0; torchrun shows all to each process.
    if launcher == "pytorch" and "LOCAL_RANK" in os.environ and rank >= gpus:
        raise UserError(
            f"process {rank} of this machine has no GPU: there are {gpus}. Use torchrun --nproc_per_node={gpus}"
        )
    return rank % gpus


def _set_slurm_environment(port: int | None) -> None:
    """Set torchrun's variables from Slurm's."""
    rank = os.environ["SLURM_PROCID"]
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    os.environ.setdefault("MASTER_PORT", _DEFAULT_PORT)
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["RANK"] = rank
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", rank)
    command = ["scontrol", "show", "hostname", os.environ["SLURM_NODELIST"]]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        os.environ["MASTER_ADDR"] = names[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"--launcher slurm: {' '.join(command)} does not name a host ({error}).") from None
