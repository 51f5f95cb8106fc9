"""Whether memory grows with what a process has done: pictures enlarged, training steps, option files checked.

    python benchmarks/leaks.py
    python benchmarks/leaks.py --pictures 1000 --steps 10000 --checks 200

Pictures of several sizes and kinds go through what `basicsr upscale` calls; training steps are a whole training by
`basicsr train` with validation, checkpoints and history; option files are checked as before a run. Resident memory is
read after a garbage collection; what the first fifth of the work leaves (caches, pools of the allocator) does not
count. A line is fitted to the rest: its slope is what a picture, a step or a check leaves behind.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import esc_arch  # isort: skip  makes basicsr importable
import numpy as np
import torch
import yaml
from PIL import Image
from skimage.data import astronaut

from esc_arch.cli import main as basicsr
from esc_arch.models import ESCModel
from esc_arch.options import checked_options
from esc_arch.tools.upscale.batch import BatchOptions, BatchReport, find_tasks, upscale_files

#: Readings of each kind of work, besides those at its beginning.
READINGS = 40
#: Share of the work that warms up.
WARM_UP = 0.2
#: Bytes in a page of /proc/self/statm.
PAGE = os.sysconf("SC_PAGE_SIZE")
NETWORK = {
    "type": "ESC",
    "dim": 8,
    "pdim": 4,
    "kernel_size": 3,
    "n_blocks": 1,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
    "upscaling_factor": 2,
}
#: Suffix, mode and size of the pictures, again and again.
KINDS = [(".png", "RGB", (64, 48)), (".jpg", "RGB", (50, 70)), (".webp", "RGBA", (33, 47)), (".tif", "L", (64, 64))]

#: Units of work done -> resident bytes.
Readings = dict[int, int]


def main() -> None:
    """Do all three kinds of work, and print what each leaves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--checks", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {version('torch')}, esc_arch {esc_arch.__version__}; CPU\n")
    print("| work | number | seconds | at its beginning | at the end | grown after the warm-up | slope |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, number, work in (
        ("pictures", args.pictures, pictures),
        ("training steps", args.steps, training_steps),
        ("option checks", args.checks, option_checks),
    ):
        if number:
            with tempfile.TemporaryDirectory() as folder, _within(folder):
                start = time.perf_counter()
                readings = work(number)
                print(line(name, number, time.perf_counter() - start, readings), flush=True)


def line(name: str, number: int, seconds: float, readings: Readings) -> str:
    """A line of the table; memory in MB, the slope in bytes for each unit of work."""
    done, memory = (np.array(values, dtype=float) for values in zip(*readings.items(), strict=True))
    settled = done >= WARM_UP * number
    slope = np.polyfit(done[settled], memory[settled], 1)[0]
    grown = memory[settled][-1] - memory[settled][0]
    first, last, grown = (f"{value / 1e6:.1f} MB" for value in (memory[0], memory[-1], grown))
    return f"| {name} | {number} | {seconds:.0f} | {first} | {last} | {grown} | {slope:+.0f} B each |"


def resident() -> int:
    """Bytes of this process in memory, once what nothing refers to is gone."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def pictures(number: int) -> Readings:
    """Enlarge so many pictures, some of them damaged, as `basicsr upscale` does."""
    torch.save({"params": esc_arch.ESC(**_arguments()).state_dict()}, "net.pth")
    upscaler = esc_arch.load("net.pth", device="cpu")
    Path("in").mkdir()
    for index, (suffix, mode, size) in enumerate(KINDS):
        Image.fromarray(astronaut()).convert(mode).resize(size).save(f"in/{index}{suffix}")
    data = Path("in/0.png").read_bytes()
    Path("in/damaged.png").write_bytes(data[: len(data) // 2])
    readings, done = {0: resident()}, 0
    while done < number:
        tasks = find_tasks(["in"], [], Path("out"), suffix="", ext="auto")
        report = BatchReport()
        upscale_files(upscaler, tasks, BatchOptions(overwrite=True), report)
        done += len(report.done) + len(report.failed)
        if done // (number // READINGS or 1) >= len(readings):
            readings[done] = resident()
    return readings


def training_steps(number: int) -> Readings:
    """Train for so many iterations, with 10 validations and checkpoints."""
    _write_images()
    _write_options(number)
    readings = {0: resident()}
    with _called_after(ESCModel, "optimize_parameters", lambda step: _read_at(step, number, readings)), _silence():
        status = basicsr(["train", "-opt", "trial.yml"])
    assert status == 0
    return readings


def option_checks(number: int) -> Readings:
    """Check an option file so many times."""
    _write_images()
    _write_options(10)
    readings = {0: resident()}
    given = argparse.Namespace(opt="trial.yml", launcher="none", auto_resume=False, debug=False, force_yml=None)
    for done in range(1, number + 1):
        with _silence():
            checked_options(os.getcwd(), True, given)
        _read_at(done, number, readings)
    return readings


def _read_at(done: int, number: int, readings: Readings) -> None:
    if done % (number // READINGS or 1) == 0:
        readings[done] = resident()


@contextlib.contextmanager
def _within(folder: str) -> Iterator[None]:
    """The block with a folder as the current one, which BasicSR writes to."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _called_after(kind: type, name: str, function: Callable[[int], None]) -> Iterator[None]:
    """Within the block, calls of a method are followed by `function(number of the call)`."""
    original, calls = getattr(kind, name), 0

    def method(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal calls
        result = original(self, *args, **more)
        calls += 1
        function(calls)
        return result

    setattr(kind, name, method)
    try:
        yield
    finally:
        setattr(kind, name, original)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _arguments() -> dict[str, Any]:
    return {key: value for key, value in NETWORK.items() if key != "type"}


def _write_images() -> None:
    Path("gt").mkdir()
    for index in range(8):
        part = astronaut()[40 * index : 40 * index + 48, 100:148]
        Image.fromarray(part).save(f"gt/{index}.png")


def _write_options(steps: int) -> None:
    data = {"type": "DownsampleImageDataset", "dataroot_gt": "gt", "io_backend": {"type": "disk"}}
    every = max(steps // 10, 1)
    options = {
        "name": "trial",
        "model_type": "ESCModel",
        "scale": 2,
        "num_gpu": 0,
        "manual_seed": 0,
        "datasets": {
            "train": {"name": "Train", **data, "gt_size": 16, "num_worker_per_gpu": 0, "batch_size_per_gpu": 2},
            "val": {"name": "Val", **data},
        },
        "network_g": NETWORK,
        "path": {"pretrain_network_g": None},
        "train": {
            "ema_decay": 0.999,
            "optim_g": {"type": "Adam", "lr": 1e-4},
            "scheduler": {"type": "MultiStepLR", "milestones": [steps], "gamma": 0.5},
            "total_iter": steps,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {"val_freq": every, "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}}},
        "logger": {"print_freq": max(steps // 100, 1), "save_checkpoint_freq": every, "use_tb_logger": True},
    }
    Path("trial.yml").write_text(yaml.safe_dump(options), encoding="utf-8")


if __name__ == "__main__":
    main()
