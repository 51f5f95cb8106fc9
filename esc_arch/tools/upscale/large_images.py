"""Images of any size in bounded memory: the whole-image result, computed in parts.

ConvAttn makes kernels from means over the whole image, so a network that is run over tiles gives another picture in
each. Here the network is run a step at a time instead, each step over the whole image in tiles: features lie in host
memory or in temporary files, a tile is read with as much around it as the step sees, and the means that the next step
needs are summed on the way. At the borders of the image the layers' own padding acts, as ever.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .memory import is_out_of_memory, release
from .network import Upscaler
from .planning import fits, plan_for, whole
from .regions import PaddedImage
from .tiled_executor import Progress, TiledExecutor, Write

__all__ = ["enlarge", "enlarge_exactly"]

logger = logging.getLogger("esc_arch")


def enlarge(
    upscaler: Upscaler,
    image: npt.NDArray[Any],
    write: Write,
    *,
    scale: float | None = None,
    max_memory: int | None = None,
    tile: int = 0,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Enlarge an image of any size: at once where that fits into memory and `tile`, else in parts.

    Memory that runs out in spite of the estimate is answered by parts, with a warning. Arguments and errors as of
    `enlarge_exactly`.
    """
    if not 0 < tile < max(image.shape[:2]) and _enlarged_at_once(upscaler, image, write, scale, max_memory):
        if progress is not None:
            progress(1)
        return
    enlarge_exactly(
        upscaler, image, write, scale=scale, max_memory=max_memory, tile=tile, scratch=scratch, progress=progress
    )


def _enlarged_at_once(
    upscaler: Upscaler, image: npt.NDArray[Any], write: Write, scale: float | None, max_memory: int | None
) -> bool:
    upscaler.output_size(image.shape[0], image.shape[1], scale)
    if not fits(upscaler, _padded(upscaler, image), scale, max_memory):
        return False
    try:
        enlarged = whole(upscaler, image, scale)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        logger.warning(
            "Memory ran out for the image of %d x %d pixels as a whole: it is computed in parts, with the same result.",
            image.shape[1],
            image.shape[0],
        )
    else:
        write(0, 0, enlarged)
        return True
    release(upscaler.device)  # after the exception, whose frames hold tensors
    return False


def enlarge_exactly(
    upscaler: Upscaler,
    image: npt.NDArray[Any],
    write: Write,
    *,
    scale: float | None = None,
    max_memory: int | None = None,
    tile: int = 0,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Enlarge an image in parts, in bounded memory: in float32 within 1e-5 of what `upscaler` makes of it at once.

    Args:
        image: (H, W, 3), RGB; uint8, uint16, or float32 in 0 .. 1. It may be a mapped file.
        write: gets the result from the top to the bottom, in blocks as wide as it.
        scale: of ESCLTE, any; others have their own.
        max_memory: bytes of the host's memory that the process may take in all, which it has a part of already; None
            for most of what is free. What `write` keeps comes on top. Features for which there is no room go to
            temporary files.
        tile: above 0, the largest side of parts in pixels of the image, rounded up to whole windows.
        scratch: the folder of temporary files; None for the system's.
        progress: told the part of the work that is done.

    Raises:
        UserError: a scale that the network has not; too little memory or room for files, with what is needed; an
            array that is no image.
    """
    padded = _padded(upscaler, image)
    out_size = upscaler.output_size(image.shape[0], image.shape[1], scale)
    plan = plan_for(upscaler, padded, out_size, scale, max_memory, tile)
    TiledExecutor(upscaler, padded, out_size, plan, scratch, progress).run(write)


def _padded(upscaler: Upscaler, image: npt.NDArray[Any]) -> PaddedImage:
    """The image as the network sees it, with the padding of the protocol and of its own."""
    return PaddedImage(image, upscaler.window, upscaler.net.unshuffle_factor)
