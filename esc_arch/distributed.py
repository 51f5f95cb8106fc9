"""Several processes that train one network: who started them, and joining them, with or without CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from .errors import UserError

__all__ = ["init_dist", "print_note", "resolve_launcher"]

_TORCHRUN = "torchrun --nproc_per_node=N --no-python basicsr train -opt FILE --launcher pytorch"
_NEEDED_VARIABLES = {
    "none": (),
    "pytorch": ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"),
}
_HOW_TO_START = {
    "pytorch": f"start it with: {_TORCHRUN}",
    "slurm": "start it inside a Slurm job with: srun basicsr train -opt FILE --launcher slurm",
}


def print_note(text: str) -> None:
    """Print `Note: text` to stderr, once among all processes.

    Before the log file is open nothing may go through BasicSR's logger, or it would stay without one.
    """
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"Note: {text}", file=sys.stderr, flush=True)


def resolve_launcher(launcher: str, environ: Mapping[str, str]) -> str:
    """The launcher that is really at work: `none`, `pytorch` or `slurm`.

    `none` among processes started by torchrun means `pytorch`: BasicSR would train as rank 0 in each
    of them, and each would archive the others' folder (fault 20).

    Raises:
        UserError: the environment lacks what the launcher sets; the message has the command to use.
    """
    if launcher == "none" and {"RANK", "LOCAL_RANK"} <= environ.keys() and int(environ.get("WORLD_SIZE", 1)) > 1:
        print_note(f"started by torchrun with {environ['WORLD_SIZE']} processes: using --launcher pytorch.")
        launcher = "pytorch"
    missing = [name for name in _NEEDED_VARIABLES[launcher] if name not in environ]
    if missing:
        raise UserError(
            f"--launcher {launcher} needs the environment variables {', '.join(missing)}, which are not set; "
            f"{_HOW_TO_START[launcher]}"
        )
    return launcher


def init_dist(launcher: str, backend: str = "nccl", port: int | None = None, **process_group: Any) -> None:
    """Join the processes started by `launcher` (`pytorch` or `slurm`) and choose this one's GPU.

    Without CUDA the processes talk through gloo whatever `backend` says (fault 17). `port` is Slurm's
    only; torchrun chooses its own. Further arguments go to `torch.distributed.init_process_group`.

    Raises:
        UserError: more processes on this machine than GPUs; Slurm's `scontrol` cannot name the nodes.
    """
    if torch.multiprocessing.get_start_method(allow_none=True) is None:
        torch.multiprocessing.set_start_method("spawn")  # CUDA does not survive a fork
    if launcher == "slurm":
        _set_slurm_environment(port)
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_device(launcher))
    else:
        backend = "gloo"
    torch.distributed.init_process_group(backend=backend, **process_group)


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
    """Say in torchrun's variables what Slurm says in its own."""
    rank = os.environ["SLURM_PROCID"]
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    os.environ.setdefault("MASTER_PORT", "29500")  # torch.distributed's own default
    os.environ["MASTER_ADDR"] = _first_host(os.environ["SLURM_NODELIST"])
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["RANK"] = rank
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", rank)


def _first_host(node_list: str) -> str:
    command = ["scontrol", "show", "hostname", node_list]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"--launcher slurm: {' '.join(command)} does not name a host ({error}).") from None
