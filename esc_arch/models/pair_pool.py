"""The training-pair pool of Real-ESRGAN (arXiv 2107.10833), for any queue size."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

__all__ = ["PairPool"]


class PairPool:
    """Mixes the pairs of many batches, because all pairs made together have the same degradations.

    While there is room, batches are stored and returned as they are; then each is exchanged for pairs drawn from the
    pool. This does what BasicSR's queue does, draw for draw, without its condition that the batch divides the size:
    what is over stays unused.

    Args:
        size: in pairs; less than a batch makes no pool.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        #: How many pairs are in the pool.
        self.filled = 0
        self._slots: list[Tensor] = []
        #: Shuffled in place of the pairs, which may be hundreds of megabytes.
        self._order = torch.arange(0)

    @torch.no_grad()
    def exchange(self, lq: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
        """Take a batch in, and return as many pairs: lq (B, C, h, w) and gt (B, C, H, W), of the same sizes each time.

        The result shares no memory with the pool.
        """
        batch = len(lq)
        if not self._slots:
            capacity = self.size // batch * batch
            self._order = torch.arange(capacity)
            self._slots = [new.new_empty(capacity, *new.shape[1:]) for new in (lq, gt)]
            if capacity < self.size:
                logging.getLogger("basicsr").info(
                    "The training-pair pool holds %d pairs: queue_size %d is no multiple of the batch of %d.",
                    capacity,
                    self.size,
                    batch,
                )
        if not len(self._order):
            return lq, gt
        if self.filled < len(self._order):
            places, out = self._order[self.filled : self.filled + batch], (lq, gt)
            self.filled += batch
        else:
            self._order = self._order[torch.randperm(len(self._order))]
            places = self._order[:batch]
            out = self._slots[0][places], self._slots[1][places]
        for slots, new in zip(self._slots, (lq, gt), strict=True):
            slots[places] = new
        return out
