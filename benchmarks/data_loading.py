"""How many pairs one process loads: LR images made while training, against LR images that were prepared.

    python benchmarks/data_loading.py

Both data sets read the same HR sub-images of 480 x 480 from an LMDB, made of photographs that come with scikit-image;
one makes LR patches of them, the other reads a second LMDB. Runs of the two follow each other and are compared in
pairs, so that both see the same machine.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import esc_arch  # isort: skip  makes basicsr importable
import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader, RandomSampler

from esc_arch.data.photographs import photograph_sources
from esc_arch.data.prepare import prepare_train

PHOTOGRAPHS = ("astronaut", "hubble_deep_field", "immunohistochemistry", "stereo_motorcycle")
SCALES = (2, 4)
#: In this order: lmdb refuses to open in a worker what the process that forks it has open.
WORKERS = (1, 0)
BATCH = 16
LQ_SIZE = 64
ROUNDS = 5
SECONDS = 0.7
#: Batches before each run with workers: what one has loaded ahead, and one that it may be at.
DISCARDED = 3
KINDS = ("made", "prepared")

Key = tuple[str, int, int]


def main() -> None:
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        lmdbs = prepare_train(photograph_sources(PHOTOGRAPHS), Path(folder), "photographs", scales=SCALES)
        speeds: dict[Key, list[float]] = defaultdict(list)
        for workers in WORKERS:  # one after the other, for workers go on loading ahead after a run
            loaders = {key: batches(*key, lmdbs) for key in product(KINDS, SCALES, [workers])}
            for _, scale, kind in product(range(ROUNDS), SCALES, KINDS):
                key = kind, scale, workers
                speeds[key].append(images_per_second(loaders[key], DISCARDED if workers else 0))
            del loaders  # ends the workers while their data are there
    names = ("torch", "opencv-python", "opencv-python-headless", "lmdb", "basicsr")
    installed = ", ".join(f"{name} {found}" for name in names if (found := installed_version(name)))
    print(f"Python {platform.python_version()}, {installed}, esc_arch {esc_arch.__version__}; {platform.machine()}")
    print(f"Images/s, medians of {ROUNDS} runs of {SECONDS:g} s; batch {BATCH}, LQ {LQ_SIZE} x {LQ_SIZE}, a thread.\n")
    print("| scale | workers | LR made while training | LR prepared | ratio |")
    print("|---|---|---|---|---|")
    for scale, workers in product(SCALES, WORKERS):
        made, prepared = (speeds[kind, scale, workers] for kind in KINDS)
        ratio = statistics.median(a / b for a, b in zip(made, prepared, strict=True))
        medians = f"{statistics.median(made):.0f} | {statistics.median(prepared):.0f}"
        print(f"| x{scale} | {workers} | {medians} | {ratio:.2f} |")


def batches(kind: str, scale: int, workers: int, lmdbs: dict[int, Path]) -> Iterator[dict[str, Any]]:
    """Batches without end of the data set that makes LR images or of the one that reads them."""
    opt: dict[str, Any] = {
        "name": kind,
        "type": "DownsampleImageDataset" if kind == "made" else "PairedImageDataset",
        "phase": "train",
        "scale": scale,
        "gt_size": LQ_SIZE * scale,
        "use_hflip": True,
        "use_rot": True,
        "io_backend": {"type": "lmdb"},
        "dataroot_gt": str(lmdbs[1]),
    }
    if kind == "prepared":
        opt["dataroot_lq"] = str(lmdbs[scale])
    dataset = build_dataset(opt)
    endless = RandomSampler(dataset, replacement=True, num_samples=10**9)
    return iter(DataLoader(dataset, BATCH, sampler=endless, num_workers=workers))


def images_per_second(loader: Iterator[dict[str, Any]], discarded: int) -> float:
    """Of a run, after `discarded` batches."""
    for _ in range(discarded):
        next(loader)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < SECONDS:
        count += len(next(loader)["lq"])
    return count / elapsed


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:  # PackageNotFoundError is one
        return None


if __name__ == "__main__":
    main()
