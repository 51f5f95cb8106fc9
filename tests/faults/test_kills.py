"""Kill -9 at any moment of a training: what was saved last loads, and --auto_resume ends where an unharmed run ends."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import empty_figure
from ranks import SERVER

from esc_arch.checkpoints import read_checkpoint
from esc_arch.cli import main
from esc_arch.training import report

LONG = "ESC_ARCH_LONG" in os.environ
KILLS = 100 if LONG else 3

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.timeout(3000 if LONG else 300),
]


@pytest.fixture
def options(train_options: Any) -> Any:
    train_options["train"] |= {"total_iter": 60, "warmup_iter": 3, "optim_g": {"type": "AdamW", "lr": 1e-3}}
    train_options["logger"] |= {"save_checkpoint_freq": 2, "keep_last": 3}
    train_options["val"]["val_freq"] = 7
    return train_options


def train(folder: Path, argv: list[str], before: Callable[[], None] | None) -> None:
    """In a process of its own."""
    status = 9
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        with open("out.txt", "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        torch.set_num_threads(1)
        report._draw = empty_figure
        if before is not None:
            before()
        status = main(["train", *argv])
    except BaseException as error:
        os.write(2, f"Traceback: {error!r}\n".encode())
    finally:
        os._exit(status)


@pytest.fixture
def start(run_basicsr: Any, options: Any) -> Callable[..., Any]:
    """Starts a training in a process of its own."""
    file = run_basicsr.option_file(options)

    def start(*arguments: str, before: Callable[[], None] | None = None) -> Any:
        process = SERVER.Process(target=train, args=(run_basicsr.folder, ["-opt", file, *arguments], before))
        process.start()
        return process

    return start


def end_of(process: Any) -> int:
    """The exit status, negative for a signal."""
    process.join()
    return int(process.exitcode)


def experiment() -> Path:
    return Path("experiments", "trial")


def newest_state() -> int:
    """Its iteration, 0 when there is none; all that is there under its final name is whole."""
    iterations = [0]
    for path in experiment().glob("training_states/*.state"):
        assert read_checkpoint(path)["iter"] == int(path.stem)
        assert read_checkpoint(experiment() / "models" / f"net_g_{path.stem}.pth")["params"]
        iterations.append(int(path.stem))
    for path in experiment().glob("models/*.pth"):
        read_checkpoint(path)
    return max(iterations)


def result() -> dict[str, torch.Tensor]:
    saved = torch.load(experiment() / "models" / "net_g_latest.pth", weights_only=True)
    return {f"{key}:{name}": value for key in ("params", "params_ema") for name, value in saved[key].items()}


def the_same(expected: dict[str, torch.Tensor]) -> None:
    assert result().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in result().items())
    assert not list(experiment().rglob(".*.partial"))


def whole(start: Any) -> dict[str, torch.Tensor]:
    assert end_of(start()) == 0, Path("out.txt").read_text()
    expected = result()
    experiment().rename("whole")
    return expected


@pytest.mark.parametrize("workers", [0, 2] if LONG else [0])
def test_kills_at_random_moments(workers: int, start: Any, options: Any, run_basicsr: Any) -> None:
    """Until so many were killed; then the run is let end. Every resumption gets further or begins where it did."""
    options["datasets"]["train"]["num_worker_per_gpu"] = workers
    options["train"]["total_iter"] = 60 * KILLS if LONG else 100
    run_basicsr.option_file(options)
    expected = whole(start)
    drawn = random.Random(0)
    iteration, kills = 0, 0
    while kills < KILLS:
        child = start("--auto_resume")
        # Now and then before anything is saved; most often while it trains
        time.sleep(drawn.uniform(0.0, 1.5))
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group yet, or has ended
            child.kill()
        status = end_of(child)
        if status == 0:  # it was done before
            break
        assert status == -signal.SIGKILL, Path("out.txt").read_text()[-3000:]
        kills += 1
        now = newest_state()
        assert now >= iteration
        iteration = now
    assert end_of(start("--auto_resume")) == 0
    print(f"{kills} kills, the last at iteration {iteration}")
    assert kills >= (KILLS if LONG else 1)
    the_same(expected)
    assert "Traceback" not in Path("out.txt").read_text()


def kill_at(call: int, names: tuple[str, ...]) -> None:
    """Kill this process at one of its calls that write checkpoints: before the call, numbered from the second save."""
    count = iter(range(10**9))

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            if newest_number() >= 2 and next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return function

    for name in names:
        owner: Any = torch if name == "save" else Path if name == "unlink" else os
        setattr(owner, name, counted(getattr(owner, name)))


def kill_within_a_save() -> None:
    """Kill this process when half of its second checkpoint is written."""
    save = torch.save

    def write_half(content: Any, file: Any) -> None:
        if newest_number() >= 2:
            file.write(b"PK half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    torch.save = write_half


def newest_number() -> int:
    return max((int(path.stem) for path in experiment().glob("training_states/*.state")), default=0)


def test_kills_between_all_calls_of_a_save(start: Any, options: Any, run_basicsr: Any) -> None:
    """Network and state: each written, flushed to the disk, renamed, the folder flushed; then old ones removed."""
    options["train"]["total_iter"] = 6
    options["val"]["val_freq"] = 100
    options["logger"]["keep_last"] = 1
    run_basicsr.option_file(options)
    expected = whole(start)
    killed = 0
    calls = (
        range(14) if LONG else (0, 2, 4, 5, 7)
    )  # of two saves; short: of the network, the state, and the first after
    for call in calls:
        child = start(before=partial(kill_at, call, ("save", "fsync", "replace", "unlink")))
        status = end_of(child)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        assert newest_state() >= 2
        assert end_of(start("--auto_resume")) == 0, Path("out.txt").read_text()[-3000:]
        the_same(expected)
        experiment().rename(f"done{call}")
    assert killed == len(calls)


def test_a_kill_in_the_middle_of_a_file(start: Any, options: Any, run_basicsr: Any) -> None:
    """What is half written is under another name, and is gone after the resumption."""
    options["train"]["total_iter"] = 6
    run_basicsr.option_file(options)
    expected = whole(start)

    assert end_of(start(before=kill_within_a_save)) == -signal.SIGKILL
    assert [path.name for path in experiment().rglob(".*")] == [".net_g_4.pth.partial"]
    assert newest_state() == 2
    assert end_of(start("--auto_resume")) == 0
    the_same(expected)
