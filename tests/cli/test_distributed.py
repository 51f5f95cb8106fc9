"""Two processes on one machine without GPUs: one experiment, the same network in both, a clean end, or a prompt one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_command

from esc_arch import cli

AGENT = ("-m", "torch.distributed.run")
TORCHRUN = (*AGENT, "--nproc_per_node", "2", "--standalone")

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes would use them"),
]


def only_folder(run: Any) -> None:
    assert [path.name for path in (run.folder / "experiments").iterdir()] == ["trial"]


@pytest.mark.parametrize("way", ["--launcher pytorch", "torchrun alone"])
def test_two_processes_train_one_network(way: str, run_basicsr: Any, train_options: Any) -> None:
    """Faults 17, 5 (workers are spawned) and 20 (nothing said of a launcher)."""
    del train_options["num_gpu"]
    arguments = ["--launcher", "pytorch"]
    if way == "torchrun alone":
        arguments = ["--local-rank=0"]  # as torch.distributed.launch appends it (fault 19)
        # a second epoch begins when the images are used up, and persistent workers live on
        train_options["datasets"]["train"] |= {"num_worker_per_gpu": 1, "persistent_workers": True}
    run = run_basicsr.in_new_process("train", train_options, *arguments, start=TORCHRUN)
    assert run.status == 0, run.err
    assert "Traceback" not in run.err
    only_folder(run)
    log = run.log()
    assert re.search(r"^ *world_size: 2$", log, re.MULTILINE)
    assert re.search(r"Require iter number per epoch: 2$", log, re.MULTILINE)  # 6 images, 2 for each of 2 processes
    assert len(re.findall(r"\[epoch: *\d+, iter: +\d+", log)) == 4
    assert ("using --launcher pytorch" in run.err) == (way == "torchrun alone")
    assert {path.name for path in (run.experiment() / "models").iterdir()} == {
        "net_g_2.pth", "net_g_4.pth", "net_g_latest.pth"
    }  # fmt: skip
    assert not any(name.startswith("module.") for name in run.weights())
    assert not torch.equal(run.weights()["proj.weight"], run.weights(2)["proj.weight"])


def test_a_mistake_among_two_processes(run_basicsr: Any, train_options: Any) -> None:
    """Each says so, neither waits for the other, and the earlier run stays where it is."""
    del train_options["num_gpu"]
    (run_basicsr.folder / "experiments" / "trial").mkdir(parents=True)
    train_options["network_g"]["n_block"] = 1
    run = run_basicsr.in_new_process("train", train_options, start=TORCHRUN)
    assert run.status != 0
    assert "network_g:n_block: ESC has no such argument" in run.err
    only_folder(run)


@pytest.mark.parametrize(
    "place", [lambda flag, rest: [flag, *rest], lambda flag, rest: [*rest, flag]], ids=["before", "after"]
)
@pytest.mark.parametrize("flag", ["--local-rank=1", "--local_rank=1"])
def test_local_rank_is_accepted_wherever_it_is_put(
    flag: str, place: Callable[..., list[str]], run_basicsr: Any, train_options: Any
) -> None:
    """Fault 19: torch.distributed.launch puts it before the verb."""
    arguments = ["train", "-opt", run_basicsr.option_file(train_options)]
    assert cli.main(place(flag, arguments)) == 0
    assert (run_basicsr.folder / "experiments" / "trial" / "models" / "net_g_latest.pth").is_file()


# --- several machines, as far as one can be several -----------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def in_two_processes(run_basicsr: Any, options: Any, launcher: str, of_rank: Callable[[int], dict[str, Any]]) -> list:
    """Two commands at once, each with its own arguments for `in_new_process`."""
    del options["num_gpu"]
    file = run_basicsr.option_file(options)

    def start(rank: int) -> Any:
        return run_basicsr.in_new_process("train", file, "--launcher", launcher, **of_rank(rank))

    with ThreadPoolExecutor() as both:
        return list(both.map(start, range(2)))


def trained_together(runs: list[Any]) -> None:
    assert [run.status for run in runs] == [0, 0], "".join(run.err for run in runs)
    assert not any("Traceback" in run.err for run in runs)
    only_folder(runs[0])
    assert re.search(r"^ *world_size: 2$", runs[0].log(), re.MULTILINE)
    assert len(re.findall(r"\[epoch: *\d+, iter: +\d+", runs[0].log())) == 4
    assert not torch.equal(runs[0].weights()["proj.weight"], runs[0].weights(2)["proj.weight"])


def node(number: int, address: str, port: str) -> tuple[str, ...]:
    return (
        *AGENT, "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number), "--master_addr", address,
        "--master_port", port,
    )  # fmt: skip


def test_two_nodes_that_meet_by_c10d(run_basicsr: Any, train_options: Any) -> None:
    endpoint = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "trial")
    agent = {"start": (*AGENT, "--nnodes", "2", "--nproc_per_node", "1", *endpoint)}
    trained_together(in_two_processes(run_basicsr, train_options, "pytorch", lambda _: agent))


#: Two network namespaces joined by a cable; $1 is the command on the first machine, $2 that on the second.
TWO_MACHINES = """
ip link set lo up
unshare -n sleep 120 & second=$!
trap 'kill $second' EXIT
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
until ip link add cable0 type veth peer name cable1 && ip link set cable1 netns $second; do
    ip link delete cable0 2> /dev/null; [ "$((tries += 1))" -lt 50 ] || exit 1; sleep 0.1
done
there="nsenter -t $second -n"
ip address add 10.77.0.1/24 dev cable0 && ip link set cable0 up
$there ip address add 10.77.0.2/24 dev cable1 && $there ip link set cable1 up && $there ip link set lo up || exit 1
$there $2 & other=$!
$1; first=$?
wait $other && exit $first
"""


def namespaces_can_be_made() -> bool:
    if any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip", "bash")):
        return False
    command = ["unshare", "-rn", "ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_two_nodes_with_a_given_master(run_basicsr: Any, train_options: Any) -> None:
    """In network namespaces, where such can be made: their addresses do not belong to the machine's name, by which
    gloo would choose."""
    port = free_port()
    if not namespaces_can_be_made():
        agents = [{"start": node(number, "127.0.0.1", port)} for number in range(2)]
        trained_together(in_two_processes(run_basicsr, train_options, "pytorch", agents.__getitem__))
        return
    del train_options["num_gpu"]
    file = run_basicsr.option_file(train_options)
    commands = [
        " ".join([sys.executable, *node(number, "10.77.0.1", port), "-m", "esc_arch", "train", "-opt", file])
        for number in range(2)
    ]
    run = run_command(["unshare", "-rn", "bash", "-c", TWO_MACHINES, "bash", *commands], run_basicsr.folder)
    trained_together([run, run])


# --- Slurm, and failures ----------------------------------------------------------------------------------------------

#: Runs `basicsr`, whose process of rank 1 meets the end that the environment names. Begins like `-m esc_arch`.
FAILING = """
import os, signal, sys
from esc_arch.cli import main
from esc_arch.models import ESCModel

optimize_parameters = ESCModel.optimize_parameters

def fail(self, current_iter):
    if current_iter == 3 and self.opt["rank"] == 1:
        if os.environ["END"] == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("one bad disk")
    optimize_parameters(self, current_iter)

if "END" in os.environ:
    ESCModel.optimize_parameters = fail
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def script(work_folder: Path) -> str:
    (work_folder / "failing.py").write_text(FAILING, encoding="utf-8")
    return "failing.py"


@pytest.fixture
def task(work_folder: Path) -> Callable[..., dict[str, Any]]:
    """Start and environment of a process of a Slurm job of two, on two nodes of which scontrol knows."""
    (work_folder / "bin").mkdir()
    scontrol = work_folder / "bin" / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostname n[1-2]" ] && echo 127.0.0.1 && echo n2\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    common = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "PATH": path}
    return lambda rank, **more: common | {"SLURM_PROCID": str(rank)} | more


def test_slurm(run_basicsr: Any, train_options: Any, task: Any) -> None:
    train_options["dist_params"] = {"backend": "nccl", "port": int(free_port())}
    trained_together(in_two_processes(run_basicsr, train_options, "slurm", task))


def test_a_failure_of_one_process_ends_all(run_basicsr: Any, train_options: Any, task: Any, script: str) -> None:
    """Without an agent: rank 0 waits for the gradients of rank 1, which serves nobody any more."""
    train_options["dist_params"] = {"port": int(free_port())}
    first, failing = in_two_processes(
        run_basicsr, train_options, "slurm", lambda rank: task(rank, END="error", start=(script,))
    )
    assert (first.status, failing.status) == (1, 1)
    assert "rank 1 failed: OSError: one bad disk; stopping" in first.err.splitlines()
    assert "Traceback" not in first.err
    assert failing.err.count("OSError: one bad disk") == 1
    assert failing.err.count("Traceback") == 1


def test_a_process_that_is_killed_ends_all(run_basicsr: Any, train_options: Any, script: str) -> None:
    del train_options["num_gpu"]
    run = run_basicsr.in_new_process("train", train_options, start=(*TORCHRUN, script), END="SIGKILL")
    assert run.status not in (0, None)
    assert re.search(r"exitcode *: -9", run.err)
    assert not (run.experiment() / "models" / "net_g_latest.pth").exists()
