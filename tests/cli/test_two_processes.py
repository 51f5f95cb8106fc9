"""What two processes compute is what one does: losses, weights, validation, stopping and resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import finish, free_port, of_torchrun, run_ranks, start_ranks

from esc_arch.cli import main

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes would use them"),
]


def in_two_processes(run_basicsr: Any, verb: str, options: Any, *arguments: str) -> Any:
    """What the first of them left, which has the log."""
    argv = [verb, "-opt", run_basicsr.option_file(options), "--launcher", "pytorch", *arguments]
    runs = run_ranks(run_basicsr.folder, argv, of_torchrun(free_port()))
    assert [run.status for run in runs] == [0, 0], "".join(run.err for run in runs)
    return runs[0]


def records(run: Any, name: str = "trial") -> list[dict[str, Any]]:
    lines = (run.experiment(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def options(train_options: Any, photographs: Any, tmp_path: Path) -> Any:
    """Three images to be validated, which two processes cannot share evenly."""
    folders = {"gt": tmp_path / "gt", "lq": tmp_path / "lq"}
    for kind, source in (("gt", photographs.gt), ("lq", photographs.lq)):
        folders[kind].mkdir()
        for path in sorted(source.iterdir())[:3]:
            shutil.copy(path, folders[kind])
    train_options["datasets"]["val"] |= {f"dataroot_{kind}": str(folder) for kind, folder in folders.items()}
    train_options["datasets"]["train"]["dataset_enlarge_ratio"] = 2
    train_options["val"]["comparison"] = True
    return train_options


def test_two_processes_do_what_one_does_with_twice_the_batch(run_basicsr: Any, options: Any) -> None:
    train = options["datasets"]["train"]
    options["train"] |= {"optim_g": {"type": "SGD", "lr": 0.1}, "accumulate_grad": 2}
    two = in_two_processes(run_basicsr, "train", options)
    options["name"] = "alone"
    train["batch_size_per_gpu"] *= 2
    one = run_basicsr("train", options)
    assert one.status == 0, one.err
    for key in ("params", "params_ema"):
        for name, value in one.weights(name="alone", key=key).items():
            torch.testing.assert_close(two.weights(key=key)[name], value, rtol=1e-5, atol=1e-6)
    expected, found = records(one, "alone"), records(two)
    for key, tolerance, count in (("l_pix", 1e-6, 4), ("psnr", 1e-3, 2)):
        figures = [[record[key] for record in of_run if key in record] for of_run in (expected, found)]
        assert len(figures[0]) == count
        assert figures[1] == pytest.approx(figures[0], abs=tolerance)
    logs = two.log(), one.log(name="alone")
    comparisons = [log.split("PSNR (Y) on Cuts")[1].splitlines() for log in logs]
    assert [line.split()[0] for line in comparisons[0][1:5]] == [line.split()[0] for line in comparisons[1][1:5]]


def test_18_a_shared_validation_has_the_mean_of_one_process(run_basicsr: Any, options: Any, test_options: Any) -> None:
    """To the last bit, of three images; SRModel, of which one process validates all, does not hang either."""
    trained = run_basicsr("train", options)
    test_options["datasets"]["test_1"] |= {
        key: options["datasets"]["val"][key] for key in ("dataroot_gt", "dataroot_lq")
    }
    test_options["path"]["pretrain_network_g"] = str(trained.experiment() / "models" / "net_g_latest.pth")
    logs = {}
    for model in ("ESCModel", "SRModel"):
        test_options |= {"model_type": model, "name": model}
        logs[model, 1] = run_basicsr("test", test_options).log(of="results", name=model)
        run = in_two_processes(run_basicsr, "test", test_options)
        logs[model, 2] = run.log(of="results", name=model)
        figures = [[line for line in logs[model, count].splitlines() if "# " in line] for count in (1, 2)]
        assert figures[0] == figures[1] != []
        pictures = sorted(os.listdir(run.folder / "results" / model / "visualization" / "Cuts"))
        assert len(pictures) == 3


def test_sigterm_to_one_process_stops_both_after_the_same_iteration(run_basicsr: Any, options: Any) -> None:
    """Then a resumed run goes on with each process's own random numbers."""
    options["train"]["total_iter"] = 100_000
    options["logger"] |= {"print_freq": 1, "save_checkpoint_freq": 100_000}
    options["val"]["val_freq"] = 100_000
    file, folder = run_basicsr.option_file(options), run_basicsr.folder
    environment = of_torchrun(free_port())
    argv = ["train", "-opt", file, "--launcher", "pytorch"]
    ranks = start_ranks(folder, main, argv, environment=environment)
    history = folder / "experiments" / "trial" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (history.is_file() and history.stat().st_size > 500) and time.monotonic() < deadline:
        assert all(each.is_alive() for each in ranks), (folder / "0.err").read_text(errors="replace")
        time.sleep(0.1)
    os.kill(ranks[1].pid, signal.SIGTERM)
    runs = finish(folder, ranks)
    assert [run.status for run in runs] == [143, 143]
    err_text = runs[0].err
    states = list((history.parent / "training_states").iterdir())
    assert len(states) == 1, err_text
    state = torch.load(states[0], weights_only=True)
    assert f"Stopped on request after iteration {state['iter']}; saved." in err_text
    assert len(state["random"]) == 2
    assert state["random"][0]["torch"] != state["random"][1]["torch"]
    options["train"]["total_iter"] = state["iter"] + 2
    resumed = in_two_processes(run_basicsr, "train", options, "--auto_resume")
    assert [record["iter"] for record in records(resumed) if "l_pix" in record] == list(range(1, state["iter"] + 3))
