"""What the losses of images have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from esc_arch.errors import UserError

__all__ = ["ImageLoss"]


class ImageLoss(nn.Module, ABC):
    """A loss that looks at whole images, always computed in float32: differences of squares would not survive less.

    Shapes: (B, C, H, W) and the same, of values in 0 .. 1, to a scalar.

    Args:
        loss_weight: factor of the result.

    Raises:
        UserError: at the call, for images with a side below `smallest_side`.
    """

    #: How the result follows from those of the images; what accumulates gradients or shares batches out needs to know.
    reduction: str = "mean"
    #: Pixels.
    smallest_side: int = 1

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    @classmethod
    def option_problems(cls, **options: Any) -> Iterator[str]:
        """What is wrong with the values of its options, before a run."""
        try:
            cls(**options)
        except (TypeError, ValueError) as error:
            yield str(error)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        side = min(pred.shape[-2:])
        if side < self.smallest_side:
            raise UserError(
                f"{type(self).__name__} needs images of at least {self.smallest_side} pixels on each side; these are "
                f"{pred.shape[-1]} x {pred.shape[-2]}. Raise datasets: train: gt_size."
            )
        with torch.autocast(pred.device.type, enabled=False):
            return self.loss_weight * self.compute(pred.float(), target.float())

    @abstractmethod
    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss without its weight, of float32 images."""
