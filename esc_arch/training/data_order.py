"""The order, crops and flips of training images: they depend on the seed, the epoch and the place in it alone.

So a run sees the same batches however often it is interrupted, however many workers load them, and when 2 processes
share the batches of one. BasicSR restarts an epoch when it resumes (fault 30), and its workers' random numbers
depend on the number of workers and on what they loaded before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from basicsr.data.data_sampler import EnlargedSampler
from torch.utils.data import Dataset, get_worker_info

__all__ = ["Draw", "EpochSampler", "SeededDataset"]


class Draw(int):
    """An index of a data set, with the seed of the sample's random numbers."""

    entropy: tuple[int, ...]

    def __new__(cls, index: int, entropy: tuple[int, ...] = ()) -> Draw:
        draw = super().__new__(cls, index)
        draw.entropy = entropy
        return draw


class EpochSampler(EnlargedSampler):
    """BasicSR's sampler, in BasicSR's order, that can begin an epoch in the middle."""

    #: Of the run.
    seed = 0
    #: Samples of this process to skip in the current epoch, because they came before the resumption.
    start = 0
    _resumed_epoch = -1

    def resume(self, epoch: int, samples: int) -> None:
        """Begin `epoch` after `samples` of it, counted over all processes."""
        self._resumed_epoch = epoch
        self.epoch = epoch
        self.start = min(samples // self.num_replicas, self.num_samples)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if epoch != self._resumed_epoch:
            self.start = 0

    def __iter__(self) -> Iterator[Draw]:
        for place, index in enumerate(super().__iter__()):
            if place >= self.start:
                yield Draw(index, (self.seed, self.epoch, place * self.num_replicas + self.rank))


class SeededDataset(Dataset[Any]):
    """A data set whose random numbers are seeded for each `Draw`; other indices are passed on as they are."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, Draw):
            return self.dataset[index]
        seeds = np.random.SeedSequence(index.entropy).generate_state(3)
        # A worker has random numbers for nothing else, and restoring takes time; the model may draw some, too
        before = (
            (random.getstate(), np.random.get_state(), torch.get_rng_state()) if get_worker_info() is None else None
        )
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.random.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would seed the GPUs as well
        try:
            return self.dataset[int(index)]
        finally:
            if before is not None:
                random.setstate(before[0])
                np.random.set_state(before[1])
                torch.set_rng_state(before[2])

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet while a worker unpickles this
            raise AttributeError(name)
        return getattr(self.dataset, name)
