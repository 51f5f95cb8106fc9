"""Averaging what a network makes of an image and of its flipped and transposed versions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["self_ensemble"]

_FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def self_ensemble(enlarge: Callable[[Tensor], Tensor], image: Tensor, *, transpose: bool = True) -> Tensor:
    """The mean of eight results: of the image, of its mirror images, and of the transposed ones of these.

    Each result is turned back before, and none is clipped or rounded (Timofte et al., CVPR 2016; "+" in tables).

    Args:
        enlarge: makes (B, C, H', W') of (B, C, H, W), for any H and W.
        image: (B, C, H, W).
        transpose: without, the mean is of four: where height and width are enlarged differently.
    """
    total: Tensor | None = None
    orientations = [(flips, turned) for flips in _FLIPS for turned in ((False, True) if transpose else (False,))]
    for flips, turned in orientations:
        version = image.flip(flips)
        result = enlarge(version.transpose(-2, -1).contiguous() if turned else version)
        result = (result.transpose(-2, -1) if turned else result).flip(flips)
        total = result if total is None else total + result
    assert total is not None
    return total / len(orientations)
