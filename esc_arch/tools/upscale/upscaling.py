"""Pixels of every kind through a network: grey, alpha, 8 and 16 bits, any scale; rows as they become ready.

A network of the family takes three channels in 0 .. 1. Grey passes as three equal channels, of whose results the mean
is taken; so does alpha. Colours below full transparency, which nobody sees, become those of the nearest visible pixel
before, so that no fringe of them enters the result.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.ops.resize import scaled_size

from . import large_images
from .image_reader import Pixels, decoded
from .memory import is_out_of_memory, parse_memory
from .metadata import Metadata
from .network import Upscaler, load

__all__ = ["ALPHAS", "Settings", "enlarge_many", "enlarge_pixels", "enlarged_size", "finite", "upscale"]

#: How alpha may be enlarged.
ALPHAS = ("network", "bicubic")
#: Networks that `upscale` keeps by the names of their files.
KEPT_NETWORKS = 4
#: Rows of a result that are rounded, put together and written at a time.
ROWS = 256
#: How far floating-point images may be outside of 0 .. 1 by rounding: less than half a step of 8 bits.
TOLERANCE = 1e-3

ImageT = TypeVar("ImageT", Pixels, Tensor, Image.Image)


@dataclass(frozen=True)
class Settings:
    """How to enlarge.

    Attributes:
        scale: by how much; None for the network's own. Of a network that has one scale alone, the result is resized.
        tile: the largest side of parts in pixels of the input; 0 for the whole image, or parts where memory is short.
        pre_pad: pixels of reflection added at every side, and cropped afterwards.
        max_memory: bytes that may be used, of the device; None for what is there.
        alpha: of `ALPHAS`.

    Raises:
        UserError: an invalid value.
    """

    scale: float | None = None
    tile: int = 0
    pre_pad: int = 0
    max_memory: int | None = None
    alpha: str = "network"

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise UserError(f"The scale is {self.scale:g}; it must be a number above 0.")
        for name, number in (("tile", self.tile), ("pre_pad", self.pre_pad)):
            if number < 0:
                raise UserError(f"{name} is {number}; it must be a number of pixels, 0 or more.")
        if self.alpha not in ALPHAS:
            raise UserError(f"alpha is {self.alpha!r}; allowed: {', '.join(ALPHAS)}.")

    def asked(self, upscaler: Upscaler) -> float | None:
        """The scale to ask the network for; None for its own."""
        direct = upscaler.any_scale and self.scale is not None and self.scale >= 1
        scale = self.scale if direct else None
        if self.pre_pad and not float(upscaler.scale if scale is None else scale).is_integer():
            raise UserError(f"pre_pad goes with whole scales, not with {scale or upscaler.scale:g}. Omit it.")
        return scale


def enlarged_size(upscaler: Upscaler, size: tuple[int, ...], settings: Settings) -> tuple[int, int]:
    """Height and width of what an image of size (H, W, ...) becomes, rounded to whole pixels."""
    return scaled_size((size[0], size[1]), upscaler.scale if settings.scale is None else settings.scale)


def enlarge_pixels(
    upscaler: Upscaler,
    pixels: Pixels,
    settings: Settings,
    *,
    dtype: Any = None,
    scratch: Path | None = None,
    progress: Callable[[float], Any] | None = None,
) -> Iterator[Pixels]:
    """Enlarge one image, in parts where memory is short.

    Args:
        pixels: (H, W, C), uint8, uint16 or floating in 0 .. 1; C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        dtype: of the result; that of `pixels` when None. Values are clipped, and rounded half to even.
        scratch: a folder for intermediate results when max_memory is set.
        progress: gets the part that is done, 0 .. 1.

    Yields:
        Rows of the result from the top to the bottom, (h, W', C).

    Raises:
        UserError: the network does not have the scale or gives NaN; parts do not fit; `pixels` are not in 0 .. 1.
    """
    inputs = _inputs(pixels, settings)

    def rows(image: Pixels, done: int) -> Iterator[Tensor]:
        blocks = large_images.enlarge(
            upscaler,
            image,
            scale=settings.asked(upscaler),
            max_memory=settings.max_memory,
            tile=settings.tile,
            scratch=scratch,
            progress=progress and (lambda part: progress((done + part) / len(inputs))),
        )
        return _fitted(blocks, upscaler, pixels, settings)

    # Alpha, the last of the inputs, is computed first: it is joined to the rows of the colours
    outputs = [rows(image, len(inputs) - 1 - index) for index, image in enumerate(inputs)]
    size, folder = enlarged_size(upscaler, pixels.shape, settings), scratch if settings.max_memory is not None else None
    return _assembled(pixels, size, outputs, dtype, folder)


def enlarge_many(
    upscaler: Upscaler, images: Sequence[Pixels], settings: Settings, dtypes: Sequence[Any] | None = None
) -> list[Pixels]:
    """Enlarge images of one size (H, W) together, whole, in the channels that they have.

    Where memory is too short for that, one after the other.

    Args:
        dtypes: of the results; those of the images when None.
    """
    inputs = [_inputs(pixels, settings) for pixels in images]
    batch = [torch.from_numpy(_floating(each)).permute(2, 0, 1) for group in inputs for each in group]
    enlarged: Iterator[Tensor] | None = None
    try:
        enlarged = iter(upscaler(torch.stack(batch), settings.asked(upscaler)).cpu())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    results = []
    for pixels, group, dtype in zip(images, inputs, dtypes or [None] * len(images), strict=True):
        if enlarged is None:
            rows = enlarge_pixels(upscaler, pixels, settings, dtype=dtype)
        else:
            outputs = [_fitted([next(enlarged)], upscaler, pixels, settings) for _ in group]
            rows = _assembled(pixels, enlarged_size(upscaler, pixels.shape, settings), outputs, dtype)
        results.append(np.concatenate(list(rows)))
    return results


def _fitted(blocks: Iterable[Tensor], upscaler: Upscaler, pixels: Pixels, settings: Settings) -> Iterator[Tensor]:
    """What the network made of an image, without the padding and resized to what was asked for."""
    scale = settings.asked(upscaler)
    source = upscaler.output_size(pixels.shape[0], pixels.shape[1], scale)
    margin = round(settings.pre_pad * (upscaler.scale if scale is None else scale))
    rows = _cropped((finite(upscaler, block) for block in blocks), margin, source)
    return _resized(rows, source, enlarged_size(upscaler, pixels.shape, settings))


def finite(upscaler: Upscaler, result: Tensor) -> Tensor:
    """What a network returned, of any shape; UserError if there are values in it that are no numbers."""
    if not all(map(math.isfinite, result.aminmax())):
        half = "Half precision is too narrow (use --fp32, in Python precision='fp32'), or its weights are broken."
        cure = "Its weights are broken: use others." if upscaler.precision == torch.float32 else half
        raise UserError(f"{upscaler.source.name} gave values that are not finite (NaN or infinite). {cure}")
    return result


def _assembled(
    pixels: Pixels, size: tuple[int, int], outputs: Sequence[Iterator[Tensor]], dtype: Any, folder: Path | None = None
) -> Iterator[Pixels]:
    """Rows (h, W', C) of the channels that `pixels` have.

    Args:
        size: (H', W') of the result.
        outputs: rows (3, h, W') of the colours and, if it went through the network, of alpha.
        folder: where a file keeps alpha; None for memory.
    """
    dtype = np.dtype(dtype or pixels.dtype)
    grey, alpha, top = pixels.shape[2] < 3, None, 0
    if len(outputs) == 2:
        alpha = _collected((_quantised(rows.mean(0, keepdim=True), dtype) for rows in outputs[1]), size, dtype, folder)
    elif pixels.shape[2] in (2, 4):  # bicubic; what is the same everywhere stays so
        plane = Image.fromarray(_floating(pixels[..., -1])).resize(size[::-1], Image.Resampling.BICUBIC)
        alpha = _quantised(torch.from_numpy(np.array(plane))[None], dtype)
    for block in outputs[0]:
        for rows in block.split(ROWS, dim=1):  # what follows makes copies
            joined = _quantised(rows.mean(0, keepdim=True) if grey else rows, dtype)
            if alpha is not None:
                joined = np.concatenate([joined, alpha[top : top + len(joined)]], axis=2)
            top += len(joined)
            yield joined


def _collected(rows: Iterable[Pixels], size: tuple[int, int], dtype: Any, folder: Path | None = None) -> Pixels:
    """Rows (h, W', C) as one array, in memory or in a file without a name in `folder`."""
    result: Pixels | None = None
    top = 0
    for each in rows:
        if result is None:
            shape = (*size, each.shape[2])
            file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  the map keeps it
            result = np.empty(shape, dtype) if file is None else np.memmap(file, dtype, "w+", shape=shape)
        result[top : top + len(each)] = each
        top += len(each)
    assert result is not None
    return result


def _floating(image: Pixels) -> Pixels:
    """float32 in 0 .. 1."""
    peak = 1 if np.issubdtype(image.dtype, np.floating) else np.iinfo(image.dtype).max
    return image.astype(np.float32) / np.float32(peak)


def _inputs(pixels: Pixels, settings: Settings) -> list[Pixels]:
    """What goes through the network, (H, W, 3): the colours, and alpha if it is needed; padded."""
    # Floating types other than float32 are no gain inside a network
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = pixels.astype(np.float32, copy=False)
        low, high = pixels.min(), pixels.max()
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN, too
            raise UserError(
                f"The image has values from {low:g} to {high:g}; floating-point images must be in 0 .. 1: divide it by "
                "its largest possible value, such as 255, or clip it."
            )
    planes = [pixels]
    if pixels.shape[2] in (2, 4):
        colour, alpha = pixels[..., :-1], pixels[..., -1]
        hidden = alpha <= 0
        if hidden.any() and not hidden.all():  # they become the nearest that are seen
            from scipy.ndimage import distance_transform_edt

            rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
            colour = colour[rows, columns]
        through = settings.alpha == "network" and alpha.min() != alpha.max()
        planes = [colour, alpha[..., None]] if through else [colour]
    pad, shape = settings.pre_pad, (*pixels.shape[:2], 3)
    planes = [np.broadcast_to(each, shape) for each in planes]
    if pad:
        planes = [np.pad(each, ((pad, pad), (pad, pad), (0, 0)), mode="reflect") for each in planes]
    return [np.require(each, requirements=["C", "W"]) for each in planes]


def _quantised(block: Tensor, dtype: np.dtype[Any]) -> Pixels:
    """Values (C, h, w) as pixels (h, w, C) of a type: clipped to 0 .. 1, whole numbers rounded half to even."""
    values = block.float().clamp(0, 1)
    if not np.issubdtype(dtype, np.floating):
        values = values.mul_(np.iinfo(dtype).max).round_()
    return np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy().astype(dtype))


def _cropped(blocks: Iterable[Tensor], margin: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Blocks of rows without a margin on all sides; (H', W') is the size of the rest."""
    top = -margin
    for block in blocks:
        rows = block[:, max(-top, 0) : max(size[0] - top, 0), margin : margin + size[1]]
        top += block.shape[1]
        if rows.shape[1]:
            yield rows


def _resized(blocks: Iterable[Tensor], source: tuple[int, int], target: tuple[int, int]) -> Iterator[Tensor]:
    """Rows (3, h, W) as they come, resized by Lanczos' filter of three lobes, wide enough not to alias.

    The result is the same as of the whole image: rows wait until those that their filter reads are there.

    Args:
        source, target: (H, W) of the image before and after.
    """
    if source == target:
        yield from blocks
        return
    step = source[0] / target[0]
    reach = math.ceil(3 * max(1.0, step)) + 2
    waiting, first, done = torch.empty(3, 0, source[1]), 0, 0  # the first row that waits, and rows of the result
    for block in blocks:
        waiting = torch.cat([waiting, block.float()], dim=1)
        there = first + waiting.shape[1]
        ready = target[0] if there == source[0] else math.floor((there - reach) / step)
        if ready <= done:
            continue
        size = (target[1], ready - done)
        box = (0, max(done * step - first, 0), source[1], min(ready * step - first, waiting.shape[1]))
        planes = [Image.fromarray(plane.contiguous().numpy()) for plane in waiting]
        yield torch.from_numpy(np.stack([np.asarray(p.resize(size, Image.Resampling.LANCZOS, box)) for p in planes]))
        done = ready
        unneeded = max(math.floor(ready * step) - reach - first, 0)
        waiting = waiting[:, unneeded:].clone()
        first += unneeded


def upscale(
    image: ImageT,
    model: Upscaler | str | Path,
    *,
    scale: float | None = None,
    tile: int = 0,
    max_memory: int | str | None = None,
) -> ImageT:
    """Enlarge an image; the result is of the same kind, type and range of values.

    Args:
        image: a NumPy array (H, W), (H, W, 1), (H, W, 2), (H, W, 3) or (H, W, 4): grey, grey and alpha, RGB, RGBA, of
            uint8, uint16 or a floating type in 0 .. 1; a tensor (3, H, W) or (B, 3, H, W) of uint8 or a floating
            type in 0 .. 1, on any device; or a Pillow image.
        model: what `esc_arch.load` returns, or the path of a checkpoint. The last few loaded by path are kept.
        scale: by how much; the network's own by default. A network that has one scale alone has its result resized.
        tile: the largest side of parts in pixels of `image`, with the same result; 0 for the whole where it fits.
        max_memory: bytes, or text such as "2G": parts that fit, with the same result.

    Returns:
        An image with the channels of `image`, (H', W') large. A Pillow image keeps its colour profile, and one with a
        palette becomes RGB or RGBA.

    Raises:
        UserError: an image of another kind or range, an invalid checkpoint or option, or a result that is not finite.

    Examples:
        >>> import esc_arch, numpy as np
        >>> model = esc_arch.load(weights)
        >>> esc_arch.upscale(np.zeros((8, 12, 3), np.uint8), model).shape
        (16, 24, 3)
    """
    path = Path() if isinstance(model, Upscaler) else Path(model).absolute()
    upscaler = model if isinstance(model, Upscaler) else _kept(path, path.stat().st_mtime_ns if path.exists() else 0)
    max_memory = parse_memory(max_memory) if isinstance(max_memory, str) else max_memory
    settings = Settings(scale=scale, tile=tile, max_memory=max_memory)
    if isinstance(image, Tensor):
        return _upscale_tensor(image, upscaler, settings)
    if isinstance(image, Image.Image):
        found = decoded(image, Metadata(image.info.get("icc_profile")))
        enlarged = _enlarge(upscaler, found.pixels, settings)
        result = Image.fromarray(enlarged[..., 0] if enlarged.shape[2] == 1 else enlarged)
        if found.metadata.icc is not None:
            result.info["icc_profile"] = found.metadata.icc
        return result
    if not isinstance(image, np.ndarray):
        raise UserError(
            f"The image is of type {type(image).__name__}; allowed: numpy.ndarray, torch.Tensor, PIL.Image."
        )
    pixels = image[..., None] if image.ndim == 2 else image
    kind = pixels.dtype in (np.uint8, np.uint16) or np.issubdtype(pixels.dtype, np.floating)
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or not kind or 0 in pixels.shape:
        raise UserError(
            f"The array is {image.shape} of {image.dtype}; it must be (H, W) or (H, W, C) with 1 to 4 channels, of "
            "uint8, uint16, or a floating type in 0 .. 1."
        )
    enlarged = _enlarge(upscaler, pixels, settings)
    return enlarged[..., 0] if image.ndim == 2 else enlarged


def _enlarge(upscaler: Upscaler, pixels: Pixels, settings: Settings) -> Pixels:
    rows = enlarge_pixels(upscaler, pixels, settings)
    return _collected(rows, enlarged_size(upscaler, pixels.shape, settings), pixels.dtype)


def _upscale_tensor(image: Tensor, upscaler: Upscaler, settings: Settings) -> Tensor:
    batch = image[None] if image.dim() == 3 else image
    kind = image.dtype == torch.uint8 or image.is_floating_point()
    if batch.dim() != 4 or batch.shape[1] != 3 or not kind or 0 in batch.shape:
        raise UserError(
            f"The tensor is {tuple(image.shape)} of {image.dtype}; it must be (3, H, W) or (B, 3, H, W), of uint8, or "
            "of a floating type in 0 .. 1."
        )
    arrays = batch.detach().cpu()
    arrays = (arrays if image.dtype == torch.uint8 else arrays.float()).permute(0, 2, 3, 1)
    images = [np.ascontiguousarray(each.numpy()) for each in arrays]
    if len(images) > 1 and not settings.tile and settings.max_memory is None:
        results = enlarge_many(upscaler, images, settings)
    else:
        results = [_enlarge(upscaler, each, settings) for each in images]
    enlarged = torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).contiguous().to(image.device, image.dtype)
    return enlarged[0] if image.dim() == 3 else enlarged


@lru_cache(maxsize=KEPT_NETWORKS)
def _kept(path: Path, _changed: int) -> Upscaler:
    return load(path)
