"""The training-pair pool: BasicSR's draws where BasicSR takes the batch, and any queue size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from basicsr.models.realesrgan_model import RealESRGANModel
from torch import Tensor

from esc_arch.models.real_models import PairPool

Pairs = tuple[Tensor, Tensor]


def pairs(first: int, count: int) -> Pairs:
    """Pairs that carry their numbers first, first + 1, ... in every pixel: (B, 3, 2, 2) and (B, 3, 4, 4)."""
    numbers = torch.arange(first, first + count, dtype=torch.float32).view(-1, 1, 1, 1)
    return numbers.expand(-1, 3, 2, 2).clone(), numbers.expand(-1, 3, 4, 4).clone()


def numbers_in(lq: Tensor, gt: Tensor) -> list[int]:
    """The numbers of pairs that belong together and are whole."""
    assert torch.equal(lq.flatten(1).amin(1), lq.flatten(1).amax(1))
    assert torch.equal(lq[:, :, :1, :1].expand_as(gt), gt)
    return [int(number) for number in lq[:, 0, 0, 0]]


def test_equals_basicsr() -> None:
    pool = PairPool(6)
    # BasicSR makes its queue on CUDA, unless it has one
    theirs = SimpleNamespace(
        queue_size=6, queue_ptr=0, queue_lr=torch.zeros(6, 3, 2, 2), queue_gt=torch.zeros(6, 3, 4, 4)
    )
    for step in range(12):
        lq, gt = pairs(2 * step, 2)
        theirs.lq, theirs.gt = lq.clone(), gt.clone()
        torch.manual_seed(step)
        RealESRGANModel._dequeue_and_enqueue(theirs)
        torch.manual_seed(step)
        ours = pool.exchange(lq, gt)
        assert torch.equal(ours[0], theirs.lq) and torch.equal(ours[1], theirs.gt)


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (7, 3), (3, 3), (5, 1), (4, 8), (0, 2)])
def test_any_queue_size(size: int, batch: int) -> None:
    """Every pair is returned once at most after the pool is full, with its partner, and none is lost."""
    pool, taken = PairPool(size), []
    for step in range(12):
        new = list(range(step * batch, (step + 1) * batch))
        filling = len(pool.pairs) + batch <= size
        back = numbers_in(*pool.exchange(*pairs(new[0], batch)))
        assert len(back) == batch
        if filling:
            assert back == new
        else:
            taken += back
    assert len(pool.pairs) == size // batch * batch
    assert len(set(taken)) == len(taken) == 12 * batch - len(pool.pairs)


def test_mixes_batches() -> None:
    torch.manual_seed(0)
    pool = PairPool(40)
    batches = [numbers_in(*pool.exchange(*pairs(4 * step, 4))) for step in range(60)]
    origins = [{number // 4 for number in batch} for batch in batches[10:]]
    assert sum(map(len, origins)) / len(origins) > 3  # of the four pairs of a batch, hardly two were made together


def test_shares_no_memory() -> None:
    pool = PairPool(2)
    first = pairs(0, 2)
    for image in pool.exchange(*first):
        image.fill_(9)
    back = pool.exchange(*pairs(2, 2))
    assert sorted(numbers_in(*back)) == [0, 1]
    back[0].fill_(9)
    assert sorted(numbers_in(*pool.exchange(*pairs(4, 2)))) == [2, 3]
