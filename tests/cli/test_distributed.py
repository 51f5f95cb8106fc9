"""Two processes on one machine without GPUs: one experiment, the same network in both, a clean end, or a prompt one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import enter, finish, free_port, of_torchrun, run_ranks, start_ranks

from esc_arch import ESCModel, cli

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes would use them"),
]


def only_folder(run: Any) -> None:
    assert {path.name for path in (run.folder / "experiments").iterdir()} - {".trial.lock"} == {"trial"}


def test_torchrun_alone_trains_one_network(run_basicsr: Any, train_options: Any) -> None:
    """Faults 17, 5 (workers are spawned), 19 (as torch.distributed.launch appends it) and 20 (nothing of a launcher).

    A second epoch begins when the images are used up, and persistent workers live on.
    """
    del train_options["num_gpu"]
    train_options["datasets"]["train"] |= {"num_worker_per_gpu": 1, "persistent_workers": True}
    run = run_basicsr.in_new_process("train", train_options, "--local-rank=0", start=TORCHRUN)
    trained_together([run])
    log = run.log()
    assert re.search(r"Require iter number per epoch: 2$", log, re.MULTILINE)  # 6 images, 2 for each of 2 processes
    assert "using --launcher pytorch" in run.err
    assert {path.name for path in (run.experiment() / "models").iterdir()} == {
        "net_g_2.pth", "net_g_4.pth", "net_g_latest.pth"
    }  # fmt: skip
    assert not any(name.startswith("module.") for name in run.weights())


def test_a_mistake_among_two_processes(run_basicsr: Any, train_options: Any) -> None:
    """Each says so, neither waits for the other, and the earlier run stays where it is."""
    del train_options["num_gpu"]
    (run_basicsr.folder / "experiments" / "trial").mkdir(parents=True)
    train_options["network_g"]["n_block"] = 1
    argv = ["train", "-opt", run_basicsr.option_file(train_options)]
    for run in run_ranks(run_basicsr.folder, argv, of_torchrun(free_port())):
        assert run.status == 2
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


def trained_together(runs: list[Any]) -> None:
    assert not any(run.status for run in runs), "".join(run.err for run in runs)
    assert not any("Traceback" in run.err for run in runs)
    only_folder(runs[0])
    assert re.search(r"^ *world_size: 2$", runs[0].log(), re.MULTILINE)
    assert len(re.findall(r"\[epoch: *\d+, iter: +\d+", runs[0].log())) == 4
    assert not torch.equal(runs[0].weights()["proj.weight"], runs[0].weights(2)["proj.weight"])


def of_node(address: str, port: str) -> Callable[[int], dict[str, str]]:
    """What torchrun sets for the process of one of two machines."""
    return lambda rank: of_torchrun(port)(rank) | {
        "MASTER_ADDR": address, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank),
        "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "trial",
    }  # fmt: skip


def test_two_nodes_on_one_machine(run_basicsr: Any, train_options: Any) -> None:
    del train_options["num_gpu"]
    argv = ["train", "-opt", run_basicsr.option_file(train_options), "--launcher", "pytorch"]
    trained_together(run_ranks(run_basicsr.folder, argv, of_node("127.0.0.1", free_port())))


#: Two network namespaces joined by a cable; prints a process of each, and keeps them until its input ends.
TWO_MACHINES = """
ip link set lo up
unshare -n sleep 120 > /dev/null & second=$!
trap 'kill $second' EXIT
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
until ip link add cable0 type veth peer name cable1 && ip link set cable1 netns $second; do
    ip link delete cable0 2> /dev/null; [ "$((tries += 1))" -lt 50 ] || exit 1; sleep 0.1
done
there="nsenter -t $second -n"
ip address add 10.77.0.1/24 dev cable0 && ip link set cable0 up
$there ip address add 10.77.0.2/24 dev cable1 && $there ip link set cable1 up && $there ip link set lo up || exit 1
echo $$ $second
read _
"""


def namespaces_can_be_made() -> bool:
    if any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip", "bash")):
        return False
    command = ["unshare", "-rn", "ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main_within(processes: list[int], argv: list[str]) -> int:
    """`basicsr` in the namespaces of one of these processes."""
    enter(processes[int(os.environ["RANK"])], "user", "net")
    return cli.main(argv)


def test_two_nodes_with_a_given_master(run_basicsr: Any, train_options: Any) -> None:
    """In network namespaces, where such can be made: their addresses do not belong to the machine's name, by which
    gloo would choose."""
    del train_options["num_gpu"]
    folder = run_basicsr.folder
    argv = ["train", "-opt", run_basicsr.option_file(train_options), "--launcher", "pytorch"]
    if not namespaces_can_be_made():
        pytest.skip("no network namespaces can be made here")
    keeper = ["unshare", "-rn", "bash", "-c", TWO_MACHINES]
    with subprocess.Popen(keeper, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as machines:
        assert machines.stdout is not None
        processes = [int(word) for word in machines.stdout.readline().split()]
        environment = of_node("10.77.0.1", free_port())
        trained_together(finish(folder, start_ranks(folder, main_within, processes, argv, environment=environment)))


# --- Slurm, and failures ----------------------------------------------------------------------------------------------


def main_with_an_end(end: str, argv: list[str]) -> int:
    """`basicsr`, whose process of rank 1 meets an end in its third iteration."""
    optimize_parameters = ESCModel.optimize_parameters

    def fail(self: Any, current_iter: int) -> None:
        if current_iter == 3 and self.opt["rank"] == 1:
            if end == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("one bad disk")
        optimize_parameters(self, current_iter)

    ESCModel.optimize_parameters = fail  # type: ignore[method-assign]
    return cli.main(argv)


@pytest.fixture
def task(work_folder: Path) -> Callable[[int], dict[str, str]]:
    """The environment of a process of a Slurm job of two, on two nodes of which scontrol knows."""
    (work_folder / "bin").mkdir()
    scontrol = work_folder / "bin" / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostname n[1-2]" ] && echo 127.0.0.1 && echo n2\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    common = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "PATH": path}
    return lambda rank: common | {"SLURM_PROCID": str(rank)}


@pytest.fixture
def slurm_argv(run_basicsr: Any, train_options: Any) -> list[str]:
    del train_options["num_gpu"]
    train_options["dist_params"] = {"backend": "nccl", "port": int(free_port())}
    return ["train", "-opt", run_basicsr.option_file(train_options), "--launcher", "slurm"]


def test_slurm(slurm_argv: list[str], task: Any, work_folder: Path) -> None:
    trained_together(run_ranks(work_folder, slurm_argv, task))


def test_a_failure_of_one_process_ends_all(slurm_argv: list[str], task: Any, work_folder: Path) -> None:
    """Without an agent: rank 0 waits for the gradients of rank 1, which serves nobody any more."""
    ranks = start_ranks(work_folder, main_with_an_end, "error", slurm_argv, environment=task)
    first, failing = finish(work_folder, ranks)
    assert (first.status, failing.status) == (1, 1)
    assert "rank 1 failed: OSError: one bad disk; stopping" in first.err.splitlines()
    assert "Traceback" not in first.err
    assert failing.err.count("OSError: one bad disk") == 1
    assert failing.err.count("Traceback") == 1


def test_a_process_that_is_killed_ends_all(run_basicsr: Any, train_options: Any) -> None:
    """With an agent, which tells the others of it by SIGTERM, wherever they wait."""
    del train_options["num_gpu"]
    argv = ["train", "-opt", run_basicsr.option_file(train_options), "--launcher", "pytorch"]
    folder, common = run_basicsr.folder, of_torchrun(free_port())
    ranks = start_ranks(
        folder, main_with_an_end, "SIGKILL", argv, environment=lambda rank: common(rank) | {"TORCHELASTIC_RUN_ID": "a"}
    )
    ranks[1].join(100)
    ranks[0].terminate()
    first, killed = finish(folder, ranks)
    assert killed.status == -signal.SIGKILL
    assert first.status not in (0, None, -signal.SIGKILL)  # by which `finish` ends what has not ended
    assert not (first.experiment() / "models" / "net_g_latest.pth").exists()
