"""The training-pair pool of Real-ESRGAN (arXiv 2107.10833), for batches of any size."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

__all__ = ["PairPool"]


class PairPool:
    """Mixes the pairs of many batches, because all pairs made together have the same degradations.

    While there is room, batches are taken in and handed back as they are; then each is exchanged for pairs drawn from
    the pool. With batches of one size that divides `capacity` this does what BasicSR's queue does, draw for draw; other
    batches, of which BasicSR's queue takes none, leave less than one batch of the capacity unused.

    Args:
        capacity: in pairs; less than a batch makes no pool.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slots: tuple[Tensor, Tensor] | None = None
        #: Which slots hold pairs. Shuffled in place of the pairs, which may be hundreds of megabytes.
        self._order = torch.arange(0)

    def __len__(self) -> int:
        return len(self._order)

    @torch.no_grad()
    def exchange(self, lq: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
        """Take pairs in, and hand as many back: lq (B, C, h, w) and gt (B, C, H, W), of the same sizes each time.

        The result shares no memory with the pool.
        """
        batch = lq.shape[0]
        if self._slots is None:
            self._slots = lq.new_empty(self.capacity, *lq.shape[1:]), gt.new_empty(self.capacity, *gt.shape[1:])
            self._report(batch)
        if len(self) + batch <= self.capacity:
            places = torch.arange(len(self), len(self) + batch)
            self._order = torch.cat([self._order, places])
            self._put(places, lq, gt)
            return lq, gt
        self._order = self._order[torch.randperm(len(self))]
        places = self._order[:batch]  # of a pool with fewer pairs than the batch, all
        count = len(places)
        drawn = tuple(
            torch.cat([slots[places.to(slots.device)], new[count:]])
            for slots, new in zip(self._slots, (lq, gt), strict=True)
        )
        self._put(places, lq[:count], gt[:count])
        return drawn[0], drawn[1]

    def _put(self, places: Tensor, lq: Tensor, gt: Tensor) -> None:
        assert self._slots is not None
        for slots, new in zip(self._slots, (lq, gt), strict=True):
            slots[places.to(slots.device)] = new

    def _report(self, batch: int) -> None:
        used = self.capacity // batch * batch
        if used < self.capacity:
            logging.getLogger("basicsr").info(
                "The training-pair pool holds %d pairs: queue_size %d is no multiple of the batch of %d.",
                used,
                self.capacity,
                batch,
            )
