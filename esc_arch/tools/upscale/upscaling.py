"""Pixels of every kind through a network: grey, alpha, 8 and 16 bits, any scale; rows as they become ready.

A network of the family takes three channels in 0 .. 1. Grey passes as three equal channels, of whose results the mean
is taken; so does alpha. Colours below full transparency, which nobody sees, become those of the nearest visible pixel
before, so that no fringe of them enters the result.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.ops.resize import scaled_size

from . import large_images
from .image_reader import Pixels, pixels_of
from .memory import is_out_of_memory, parse_memory
from .network import Upscaler, load

__all__ = ["ALPHAS", "Rows", "Settings", "enlarge_many", "enlarge_pixels", "enlarged_size", "quantise", "upscale"]

#: How alpha may be enlarged.
ALPHAS = ("network", "bicubic")
#: Networks that `upscale` keeps by the names of their files.
KEPT_NETWORKS = 4
#: Rows of a result that are rounded, put together and written at a time.
ROWS = 256

Rows = Callable[[Pixels], None]
#: Called with the first row of the result and rows of it, (3, h, W'), as the network gives them.
Emit = Callable[[int, Tensor], None]
Progress = Callable[[float], Any]
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


def enlarged_size(upscaler: Upscaler, image: Pixels, settings: Settings) -> tuple[int, int]:
    """Height and width of what an image (H, W, ...) becomes, rounded to whole pixels."""
    return scaled_size(image.shape[:2], upscaler.scale if settings.scale is None else settings.scale)


def enlarge_pixels(
    upscaler: Upscaler,
    pixels: Pixels,
    write: Rows,
    settings: Settings | None = None,
    *,
    dtype: Any = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Enlarge one image, in parts where memory is short.

    Args:
        pixels: (H, W, C), uint8, uint16 or floating in 0 .. 1; C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        write: gets the result from the top to the bottom, rows (h, W', C) of `dtype`.
        dtype: of the result; that of `pixels` when None. Values are clipped, and rounded half to even.
        scratch: a folder for intermediate results when max_memory is set.
        progress: gets the part that is done, 0 .. 1.

    Raises:
        UserError: the network does not have the scale; parts do not fit.
    """
    settings = settings or Settings()
    inputs = _inputs(pixels, settings)
    done = 0

    def through_network(image: Pixels, emit: Emit) -> None:
        nonlocal done
        _through_network(
            upscaler, image, emit, settings, scratch, lambda part: progress and progress((done + part) / len(inputs))
        )
        done += 1

    _assemble(
        pixels,
        enlarged_size(upscaler, pixels, settings),
        [partial(through_network, image) for image in inputs],
        write,
        np.dtype(dtype or pixels.dtype),
        scratch if settings.max_memory is not None else None,
    )


def enlarge_many(upscaler: Upscaler, images: Sequence[Pixels], settings: Settings | None = None) -> list[Pixels]:
    """Enlarge images of one size (H, W) together, whole, in the types and channels that they have.

    Where memory is too short for that, one after the other.
    """
    settings = settings or Settings()
    inputs = [_inputs(pixels, settings) for pixels in images]
    outputs = _batch(upscaler, [each for group in inputs for each in group], settings)
    results: list[Pixels] = []
    for pixels, group in zip(images, inputs, strict=True):
        rows: list[Pixels] = []
        if outputs is None:
            enlarge_pixels(upscaler, pixels, rows.append, settings)
        else:
            size = enlarged_size(upscaler, pixels, settings)
            sources = [partial(_resize, outputs.pop(0), size) for _ in group]
            _assemble(pixels, size, sources, rows.append, pixels.dtype)
        results.append(np.concatenate(rows))
    return results


def _batch(upscaler: Upscaler, images: list[Pixels], settings: Settings) -> list[Tensor] | None:
    """(3, H', W') for each image (H, W, 3), as the network gives them; None when memory is too short for all."""
    scale = settings.asked(upscaler)
    pad, factor = settings.pre_pad, upscaler.scale if scale is None else scale
    height, width = images[0].shape[:2]
    try:
        batch = [torch.from_numpy(_floating(_padded(image, pad))).permute(2, 0, 1) for image in images]
        found = upscaler(torch.stack(batch), scale)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    top, (rows, columns) = round(pad * factor), upscaler.output_size(height, width, scale)
    return list(found[..., top : top + rows, top : top + columns].cpu())


def _assemble(
    pixels: Pixels,
    size: tuple[int, int],
    sources: Sequence[Callable[[Emit], None]],
    write: Rows,
    dtype: np.dtype[Any],
    folder: Path | None = None,
) -> None:
    """Write rows of the channels that `pixels` have.

    Args:
        size: (H', W') of the result.
        sources: emit the rows of the colours and, if it goes through the network, of alpha.
        folder: where a file keeps alpha; None for memory.
    """
    grey, has_alpha = pixels.shape[2] < 3, pixels.shape[2] in (2, 4)
    with _plane(size if has_alpha else (0, 0), dtype, folder) as alpha:

        def fill(top: int, rows: Tensor) -> None:
            alpha[top : top + rows.shape[1]] = quantise(rows.mean(0, keepdim=True), dtype)[..., 0]

        def join(top: int, rows: Tensor) -> None:
            joined = quantise(rows.mean(0, keepdim=True) if grey else rows, dtype)
            if has_alpha:
                joined = np.concatenate([joined, alpha[top : top + len(joined), :, None]], axis=2)
            write(joined)

        if len(sources) == 2:
            sources[1](fill)
        elif has_alpha:
            alpha[...] = _simple_alpha(pixels[..., -1], size, dtype)
        sources[0](join)


def _floating(image: Pixels) -> Pixels:
    """float32 in 0 .. 1."""
    if np.issubdtype(image.dtype, np.floating):
        return image.astype(np.float32, copy=False)
    return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)


def _padded(image: Pixels, pad: int) -> Pixels:
    return np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect") if pad else image


def _inputs(pixels: Pixels, settings: Settings) -> list[Pixels]:
    """What goes through the network: colours (H, W, 3), and alpha as such if it is needed."""
    channels = pixels.shape[2]
    colour = pixels[..., : channels - 1] if channels in (2, 4) else pixels
    alpha = pixels[..., -1] if channels in (2, 4) else None
    if alpha is not None:
        colour = _without_hidden(colour, alpha)
    images = [_three(colour)]
    if alpha is not None and settings.alpha == "network" and alpha.min() != alpha.max():
        images.append(_three(alpha[..., None]))
    return images


def _three(image: Pixels) -> Pixels:
    # Floating types other than float32 are no gain inside a network
    image = image.astype(np.float32, copy=False) if np.issubdtype(image.dtype, np.floating) else image
    return np.require(np.broadcast_to(image, (*image.shape[:2], 3)), requirements=["C", "W"])


def _without_hidden(colour: Pixels, alpha: Pixels) -> Pixels:
    """Colours with those below full transparency replaced by the nearest that are seen."""
    hidden = alpha <= 0
    if not hidden.any() or hidden.all():
        return colour
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return colour[rows, columns]


def _simple_alpha(alpha: Pixels, size: tuple[int, int], dtype: np.dtype[Any]) -> Pixels:
    """Alpha (H, W) enlarged by bicubic interpolation; what is the same everywhere stays so."""
    image = Image.fromarray(_floating(alpha))
    enlarged = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return quantise(torch.from_numpy(enlarged.copy())[None], dtype)[..., 0]


@contextmanager
def _plane(size: tuple[int, int], dtype: np.dtype[Any], folder: Path | None) -> Iterator[Pixels]:
    """Room for one channel, in memory or in a file without a name."""
    if folder is None or not size[0]:
        yield np.empty(size, dtype)
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        yield cast(Pixels, np.memmap(file, dtype, "w+", shape=size))


def quantise(block: Tensor, dtype: Any) -> Pixels:
    """Values (C, h, w) as pixels (h, w, C) of a type: clipped to 0 .. 1, whole numbers rounded half to even."""
    dtype = np.dtype(dtype)
    values = block.float().clamp(0, 1)
    if not np.issubdtype(dtype, np.floating):
        values = values.mul_(np.iinfo(dtype).max).round_()
    return np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy().astype(dtype))


def _through_network(
    upscaler: Upscaler,
    image: Pixels,
    emit: Emit,
    settings: Settings,
    scratch: Path | None,
    progress: Progress,
) -> None:
    """Emit the rows of an image (H, W, 3) enlarged and brought to the size wanted."""
    scale = settings.asked(upscaler)
    source = height, width = upscaler.output_size(image.shape[0], image.shape[1], scale)
    margin = round(settings.pre_pad * (upscaler.scale if scale is None else scale))
    resizer = _Resizer(source, enlarged_size(upscaler, image, settings), emit)

    def crop(top: int, left: int, block: Tensor) -> None:
        first, last = max(margin - top, 0), max(margin + height - top, 0)
        for rows in block[:, first:last, margin : margin + width].split(ROWS, dim=1):  # what follows makes copies
            if rows.shape[1]:
                resizer.add(rows)

    large_images.enlarge(
        upscaler,
        _padded(image, settings.pre_pad),
        crop,
        scale=scale,
        max_memory=settings.max_memory,
        tile=settings.tile,
        scratch=scratch,
        progress=progress,
    )


def _resize(block: Tensor, size: tuple[int, int], emit: Emit) -> None:
    _Resizer((block.shape[1], block.shape[2]), size, emit).add(block)


class _Resizer:
    """Resizes rows as they come, by Lanczos' filter of three lobes, wide enough not to alias where it makes smaller.

    The result is the same as of the whole image: rows wait until those that their filter reads are there.
    """

    def __init__(self, source: tuple[int, int], target: tuple[int, int], emit: Emit) -> None:
        self.source, self.target, self.emit = source, target, emit
        self.step = source[0] / target[0]
        self.reach = math.ceil(3 * max(1.0, self.step)) + 2
        self.rows = torch.empty(3, 0, source[1])
        self.first, self.done = 0, 0

    def add(self, rows: Tensor) -> None:
        if self.source == self.target:
            self.emit(self.done, rows)
            self.done += rows.shape[1]
            return
        self.rows = torch.cat([self.rows, rows.float()], dim=1)
        there = self.first + self.rows.shape[1]
        ready = self.target[0] if there == self.source[0] else math.floor((there - self.reach) / self.step)
        if ready <= self.done:
            return
        self.emit(self.done, self._resized(ready))
        self.done = ready
        unneeded = max(math.floor(ready * self.step) - self.reach - self.first, 0)
        self.rows = self.rows[:, unneeded:].clone()
        self.first += unneeded

    def _resized(self, ready: int) -> Tensor:
        """Rows of the result from those that are done to `ready`."""
        top, bottom = (row * self.step - self.first for row in (self.done, ready))
        box = (0, max(top, 0), self.source[1], min(bottom, self.rows.shape[1]))
        size = (self.target[1], ready - self.done)
        planes = [Image.fromarray(plane.contiguous().numpy()) for plane in self.rows]
        return torch.from_numpy(np.stack([np.asarray(p.resize(size, Image.Resampling.LANCZOS, box)) for p in planes]))


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
        UserError: an image of another kind, or an invalid checkpoint or option.

    Example:
        >>> import esc_arch, numpy as np
        >>> model = esc_arch.load(weights)
        >>> esc_arch.upscale(np.zeros((8, 12, 3), np.uint8), model).shape
        (16, 24, 3)
    """
    upscaler = model if isinstance(model, Upscaler) else _kept(Path(model))
    max_memory = parse_memory(max_memory) if isinstance(max_memory, str) else max_memory
    settings = Settings(scale=scale, tile=tile, max_memory=max_memory)
    if isinstance(image, Tensor):
        return _upscale_tensor(image, upscaler, settings)
    if isinstance(image, Image.Image):
        pixels, icc, _ = pixels_of(image, image.info.get("icc_profile"))
        enlarged = _enlarge(upscaler, pixels, settings)
        result = Image.fromarray(enlarged[..., 0] if enlarged.shape[2] == 1 else enlarged)
        if icc is not None:
            result.info["icc_profile"] = icc
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
    size = enlarged_size(upscaler, pixels, settings)
    result = np.empty((*size, pixels.shape[2]), pixels.dtype)
    row = 0

    def write(rows: Pixels) -> None:
        nonlocal row
        result[row : row + len(rows)] = rows
        row += len(rows)

    enlarge_pixels(upscaler, pixels, write, settings)
    return result


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
    enlarged = torch.stack([torch.from_numpy(each) for each in results]).permute(0, 3, 1, 2).contiguous()
    enlarged = enlarged.to(image.device, image.dtype)
    return enlarged[0] if image.dim() == 3 else enlarged


def _kept(path: Path) -> Upscaler:
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = 0
    return _loaded(path.absolute(), changed)


@lru_cache(maxsize=KEPT_NETWORKS)
def _loaded(path: Path, _changed: int) -> Upscaler:
    return load(path)
