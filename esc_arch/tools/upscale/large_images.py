"""Images of any size in bounded memory: the whole-image result, computed in parts.

ConvAttn makes kernels from means over the whole image, so a network that is run over tiles gives another picture in
each. Here the network is run a step at a time instead, each step over the whole image in tiles: features lie in host
memory or in temporary files, a tile is read with as much around it as the step sees, and the means that the next step
needs are summed on the way. At the borders of the image the layers' own padding acts, as ever.

`enlarge_exactly` gives what `Upscaler` gives, up to the rounding of float32; `enlarge` takes the whole image at once
where it fits.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from .memory import is_out_of_memory, parse_memory, release
from .network import Upscaler
from .planning import Plan, fits, plan_for, whole
from .regions import Picture
from .tails import folding_of, tail_for
from .tiled_executor import Progress, TiledExecutor, Write

__all__ = ["Progress", "Write", "enlarge", "enlarge_exactly", "parse_memory"]

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
    """Enlarge an image of any size: the whole at once where that fits into memory, else exactly in parts.

    Memory that runs out in spite of the estimate is answered by parts, with a warning.

    Args:
        tile: above 0, larger images are computed in parts, see `enlarge_exactly`.
        others: see `enlarge_exactly`.

    Raises:
        UserError: as of `enlarge_exactly`.
    """
    options: Any = {"scale": scale, "max_memory": max_memory, "scratch": scratch, "progress": progress}
    if 0 < tile < max(image.shape[:2]) or not _enlarged_at_once(upscaler, image, write, scale, max_memory):
        enlarge_exactly(upscaler, image, write, tile=tile, **options)
    elif progress is not None:
        progress(1)


def _enlarged_at_once(
    upscaler: Upscaler, image: npt.NDArray[Any], write: Write, scale: float | None, max_memory: int | None
) -> bool:
    upscaler.output_size(image.shape[0], image.shape[1], scale)
    if not fits(upscaler, _seen(upscaler, image), scale, max_memory):
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


@torch.no_grad()
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
        write: gets every pixel of the result once, in rows of blocks from the top to the bottom.
        scale: of ESCLTE, any; others have their own.
        max_memory: bytes of the host's memory that the process may take in all, which it has a part of already; None
            for most of what is free. What `write` keeps comes on top. Features for which there is no room go to
            temporary files.
        tile: above 0, the largest side of the parts in pixels of the image, rounded up to whole windows.
        scratch: the folder of these; None for the system's.
        progress: told the part of the work that is done.

    Raises:
        UserError: a scale that the network has not; too little memory or room for files, with what is needed; an
            array that is no picture.
    """
    picture = _seen(upscaler, image)
    size = upscaler.output_size(image.shape[0], image.shape[1], scale)
    plan = plan_for(upscaler, picture, size, scale, max_memory)
    if tile:
        largest = -(-tile // (upscaler.window * folding_of(upscaler.net))) * upscaler.window
        plan = replace(plan, tile=min(plan.tile, largest), tail_tile=min(plan.tail_tile, largest))
    run(upscaler, picture, size, write, plan, scratch, progress)


@torch.no_grad()
def run(
    upscaler: Upscaler,
    picture: Picture,
    size: tuple[int, int],
    write: Write,
    plan: Plan,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """`enlarge_exactly` by a plan."""
    with TiledExecutor(upscaler, picture, plan, scratch, progress) as passes:
        tail = tail_for(upscaler, picture, size)
        passes.count = 2 + tail.passes + sum(2 + len(block.pconvs) for block in passes.blocks)
        passes.write_blocks(tail, tail.prepare(passes, passes.features()), write)


def _seen(upscaler: Upscaler, image: npt.NDArray[Any]) -> Picture:
    """The picture as the network sees it, with the padding of the protocol and of its own."""
    return Picture(image, upscaler.window, folding_of(upscaler.net))
