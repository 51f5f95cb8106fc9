"""The batches of a run follow from the seed alone: not from workers, processes and interruptions (faults 30 and 31)."""

from __future__ import annotations

import pickle
import random
from typing import Any

import basicsr.data
import numpy as np
import pytest
import torch
from basicsr.data.data_sampler import EnlargedSampler
from torch.utils.data import Dataset

from esc_arch.training.data_order import Draw, EpochSampler, SeededDataset

IMAGES, BATCH = 12, 2


class Draws(Dataset[Any]):
    """Samples that show which image they are of, and the random numbers that they were made with."""

    opt = {"name": "draws"}  # noqa: RUF012

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> list[float]:
        return [float(index), random.random(), float(np.random.rand()), float(torch.rand(()))]


def batches(
    *, workers: int = 0, world: int = 1, rank: int = 0, batch: int = BATCH, seed: int = 3, epoch: int = 1, skip: int = 0
) -> list[list[list[float]]]:
    """Of one epoch of one process, through BasicSR's own loader."""
    dataset = Draws()
    sampler = EnlargedSampler(dataset, world, rank)
    assert isinstance(sampler, EpochSampler)
    sampler.seed = seed
    if skip:
        sampler.resume(epoch, skip)
    sampler.set_epoch(epoch)
    options = {"phase": "train", "batch_size_per_gpu": batch, "num_worker_per_gpu": workers}
    loader = basicsr.data.build_dataloader(dataset, options, num_gpu=0, dist=world > 1, sampler=sampler, seed=seed)
    return [torch.stack(columns, dim=1).tolist() for columns in loader]


def test_the_order_is_basicsr_s() -> None:
    original = EpochSampler.__mro__[1](Draws(), 2, 1)
    sampler = EpochSampler(Draws(), 2, 1)
    for epoch in (0, 1):
        original.set_epoch(epoch)
        sampler.set_epoch(epoch)
        assert list(original) == [int(draw) for draw in sampler]


def test_workers_change_nothing() -> None:
    alone = batches()
    assert len(alone) == IMAGES // BATCH
    assert len({tuple(sample[1:]) for batch in alone for sample in batch}) == IMAGES
    assert batches(workers=2) == alone


def test_two_processes_share_the_batches_of_one() -> None:
    one = batches(batch=2 * BATCH)
    two = zip(batches(world=2, rank=0), batches(world=2, rank=1), strict=True)
    assert [sorted(first + second) for first, second in two] == [sorted(batch) for batch in one]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_begun_in_the_middle_goes_on_as_it_would_have(workers: int) -> None:
    whole = batches()
    assert batches(skip=3 * BATCH, workers=workers) == whole[3:]
    assert batches(skip=IMAGES, workers=workers) == []


def test_only_the_resumed_epoch_begins_in_the_middle() -> None:
    sampler = EpochSampler(Draws(), 1, 0)
    sampler.resume(4, 6)
    lengths = []
    for epoch in (4, 4, 5):  # BasicSR asks twice
        sampler.set_epoch(epoch)
        lengths.append(len(list(sampler)))
    assert lengths == [IMAGES - 6, IMAGES - 6, IMAGES]


def test_seeds_and_epochs_differ() -> None:
    everything = [batches(), batches(seed=4), batches(epoch=2)]
    draws = [{tuple(sample[1:]) for batch in epoch for sample in batch} for epoch in everything]
    assert not draws[0] & draws[1] and not draws[0] & draws[2]


def test_the_random_numbers_of_the_process_are_left_alone() -> None:
    def next_numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = next_numbers()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    dataset = SeededDataset(Draws())
    first = dataset[Draw(5, (0, 0, 0))]
    assert dataset[Draw(5, (0, 0, 0))] == first != dataset[Draw(5, (0, 0, 1))]
    assert next_numbers() == expected


def test_other_indices_are_passed_on() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    dataset = SeededDataset(Draws())
    assert dataset[5][:2] == [5, expected]
    assert (len(dataset), dataset.opt) == (IMAGES, Draws.opt)


def test_draws_and_data_sets_travel_to_spawned_workers() -> None:
    draw = pickle.loads(pickle.dumps(Draw(5, (1, 2, 3))))
    assert (int(draw), draw.entropy) == (5, (1, 2, 3))
    assert pickle.loads(pickle.dumps(SeededDataset(Draws())))[draw] == SeededDataset(Draws())[draw]
