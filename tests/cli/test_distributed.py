"""Two processes on one machine without GPUs: one experiment, the same network in both, a clean end."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esc_arch import cli

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def only_folder(run: Any) -> None:
    assert [path.name for path in (run.folder / "experiments").iterdir()] == ["trial"]


@pytest.mark.timeout(120)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes would use them")
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


@pytest.mark.timeout(120)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes would use them")
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
