"""Images of any size in bounded memory: the whole-image result, computed in parts.

ConvAttn makes kernels from means over the whole image, so a network that is run over tiles gives another image in
each. Here the network is run a step at a time instead, each step over the whole image in tiles: features lie in host
memory or in temporary files, a tile is read with as much around it as the step sees, and the means that the next step
needs are summed on the way. At the borders of the image the layers' own padding acts, as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch import Tensor

from .memory import is_out_of_memory, release
from .network import Upscaler
from .planning import fits, plan_for, whole
from .regions import PaddedImage
from .tiled_executor import TiledExecutor

__all__ = ["enlarge"]

logger = logging.getLogger("esc_arch")


def enlarge(
    upscaler: Upscaler,
    image: npt.NDArray[Any],
    *,
    scale: float | None = None,
    max_memory: int | None = None,
    tile: int = 0,
    scratch: Path | None = None,
    progress: Callable[[float], Any] | None = None,
    at_once: bool = True,
) -> Iterator[Tensor]:
    """Enlarge an image of any size: at once where that fits into memory and `tile`, else in parts.

    In float32, parts are within 1e-5 of the whole. Memory that runs out in spite of the estimate is answered by parts,
    with a warning.

    Args:
        image: (H, W, 3), RGB; uint8, uint16, or float32 in 0 .. 1. It may be a mapped file.
        scale: of ESCLTE, any; others have their own.
        max_memory: bytes of the host's memory that the process may take in all, which it has a part of already; None
            for most of what is free. What the caller keeps comes on top. Features for which there is no room go to
            temporary files.
        tile: above 0, the largest side of parts in pixels of the image, rounded up to whole windows.
        scratch: the folder of temporary files; None for the system's.
        progress: told the part of the work that is done, 0 .. 1.
        at_once: False for parts in any case.

    Yields:
        Rows of the result from the top to the bottom, (3, h, W'), float32 on the CPU.

    Raises:
        UserError: a scale that the network has not; too little memory or room for files, with what is needed; an
            array that is no image.
    """
    # The padding of the protocol, and of the network itself
    padded = PaddedImage(image, upscaler.net.window_size, upscaler.net.unshuffle_factor)
    height, width = image.shape[:2]
    out_size = upscaler.output_size(height, width, scale)
    if at_once and not 0 < tile < max(height, width) and fits(upscaler, padded, scale, max_memory):
        try:
            enlarged = whole(upscaler, image, scale)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "Memory ran out for the image of %d x %d pixels as a whole: it is computed in parts, with the same "
                "result.",
                *(width, height),
            )
        else:
            if progress is not None:
                progress(1)
            yield enlarged
            return
        release(upscaler.device)  # after the exception, whose frames hold tensors
    plan = plan_for(upscaler, padded, out_size, scale, max_memory, tile)
    yield from TiledExecutor(upscaler, padded, out_size, plan, scratch, progress).run()
