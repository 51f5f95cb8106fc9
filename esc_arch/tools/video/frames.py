"""Frames of a video as numbers that a network sees, and back: every pixel format, matrix, range and depth.

FFmpeg's scaler is used for layouts alone: from packed or semi-planar to planar samples, from subsampled to full chroma,
and back. Matrix and range are applied here, in float32: the scaler's RGB is off by up to a step of 8 bits, and it takes
all grey for full range.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_arch.errors import UserError

__all__ = ["Coding", "Planes", "exact", "frame_of", "import_av", "open_to_read", "planes_of", "side_data_of"]

Planes = npt.NDArray[Any]

#: AV_TIME_BASE: the unit of a container's times, in a second.
MICROSECONDS = 1_000_000
#: Of FFmpeg's AVColorSpace, which are the numbers of ITU-T H.273, table 4.
RGB, BT709, FCC, BT470BG, SMPTE170M, SMPTE240M, YCGCO, BT2020 = 0, 1, 4, 5, 6, 7, 8, 9
UNKNOWN = (2, 3)
#: The weights of red and blue in luma.
LUMA_WEIGHTS = {
    BT709: (0.2126, 0.0722),
    FCC: (0.30, 0.11),
    BT470BG: (0.299, 0.114),
    SMPTE170M: (0.299, 0.114),
    SMPTE240M: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}
#: Of AVColorRange.
LIMITED, FULL = 1, 2
#: Bits that FFmpeg's planar formats have.
DEPTHS = (8, 9, 10, 12, 14, 16)
#: SWS_BICUBIC, SWS_ACCURATE_RND and SWS_BITEXACT, by number since PyAV 17 has no names for the last two: the same on
#: every machine.
SCALER = 0x4 | 0x40000 | 0x80000


def import_av() -> ModuleType:
    """PyAV, which brings FFmpeg; raises UserError if it is not installed, or too old."""
    try:
        import av
        from av.video.stream import VideoStream

        if not hasattr(VideoStream, "set_display_matrix"):
            raise ImportError(f"PyAV {av.__version__} is too old")
    except ImportError as error:
        raise UserError(f'Video needs PyAV 17.1 or newer ({error}): pip install "esc-arch[video]"') from error
    return av


@contextmanager
def open_to_read(path: Path) -> Iterator[Any]:
    """A container of PyAV's.

    FFmpeg gets the open file, without its name, and may open nothing else: names, and what playlists contain, can be
    addresses to it.
    """
    av = import_av()
    # PyAV before 19 stops at metadata that are no UTF-8
    strict = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    with io.FileIO(path) as file:
        file.name = f"video{path.suffix}"  # by which FFmpeg recognises some formats
        with av.open(file, container_options={"protocol_whitelist": "none"}, **strict) as container:
            yield container


def exact(number: Any) -> Fraction | None:
    """A number of PyAV's, since 19 of a type of its own that rounds; None where it says nothing."""
    return Fraction(number.numerator, number.denominator) if number else None


def side_data_of(frame: Any) -> list[Any]:
    """What a frame of PyAV's carries beside pixels: since 19 it is a mapping by kind."""
    found = frame.side_data
    return [part if hasattr(part, "type") else found[part] for part in found]


@dataclass(frozen=True)
class Coding:
    """What the samples of a frame mean.

    Attributes:
        matrix: of AVColorSpace: `RGB`, `YCGCO` or a key of `LUMA_WEIGHTS`.
        full: True if they use all numbers; otherwise those of 8 bits are 16 .. 235, of chroma 16 .. 240.
        depth: bits, of `DEPTHS`.
    """

    matrix: int
    full: bool
    depth: int

    @classmethod
    def of(cls, frame: Any) -> Coding:
        """Of a frame of PyAV's; raises UserError for an unknown matrix.

        What the frame does not say is taken as players take it: from its size, limited range.
        """
        depth = depth_of(frame.format)
        if is_rgb(frame.format):
            return cls(RGB, frame.color_range != LIMITED, depth)
        matrix = int(frame.colorspace)
        if matrix in UNKNOWN or matrix == RGB:
            matrix = guessed_matrix(frame.height, frame.width)
        if matrix != YCGCO and matrix not in LUMA_WEIGHTS:
            raise UserError(
                f"its colours are coded with matrix {matrix} of ITU-T H.273, which is not known here. Convert them to "
                "BT.709 or BT.2020 (non-constant luminance) first, for instance with ffmpeg's filter zscale."
            )
        full = frame.color_range == FULL or frame.format.name.startswith(("yuvj", "mono"))
        return cls(matrix, full, depth)

    @property
    def layout(self) -> tuple[str, tuple[int, int, int]]:
        """The pixel format, with full chroma, that frames have here, and which planes its own are."""
        if self.matrix == RGB:
            return named("gbrp", self.depth), (1, 2, 0)
        return named("yuv444p", self.depth), (0, 1, 2)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What samples are kept in."""
        return np.dtype(np.uint8 if self.depth == 8 else np.uint16)

    def to_rgb(self, planes: Tensor) -> Tensor:
        """Samples (..., 3, H, W), whole numbers of any type, as RGB in 0 .. 1, float32, clipped, on their device."""
        matrix, zero, gain = (x.to(planes.device) for x in _arithmetic(self))
        components = (planes.float() - zero) / gain
        return torch.einsum("ij,...jhw->...ihw", torch.linalg.inv(matrix), components).clamp_(0, 1)

    def from_rgb(self, rgb: Tensor) -> Tensor:
        """RGB (..., 3, H, W), clipped to 0 .. 1, as samples: uint8 for 8 bits, else int32."""
        matrix, zero, gain = (x.to(rgb.device) for x in _arithmetic(self))
        components = torch.einsum("ij,...jhw->...ihw", matrix, rgb.float().clamp(0, 1))
        samples = (components * gain + zero).round_().clamp_(0, 2**self.depth - 1)
        return samples.to(torch.uint8 if self.depth == 8 else torch.int32)


@lru_cache(maxsize=8)
def _arithmetic(coding: Coding) -> tuple[Tensor, Tensor, Tensor]:
    """RGB to components (luma in 0 .. 1, chroma in -0.5 .. 0.5), and what these are shifted and multiplied by.

    ITU-T H.273, equations 20 to 34 for limited and full range, 38 to 40 and 47 to 49 for matrices.
    """
    if coding.matrix == RGB:
        matrix = np.eye(3)
    elif coding.matrix == YCGCO:
        matrix = np.array([[0.25, 0.5, 0.25], [-0.25, 0.5, -0.25], [0.5, 0.0, -0.5]])
    else:
        red, blue = LUMA_WEIGHTS[coding.matrix]
        y = np.array([red, 1 - red - blue, blue])
        matrix = np.stack([y, ([0, 0, 1] - y) / (2 - 2 * blue), ([1, 0, 0] - y) / (2 - 2 * red)])
    step, largest = 2 ** (coding.depth - 8), 2**coding.depth - 1
    luma = (0, largest) if coding.full else (16 * step, 219 * step)
    chroma = luma if coding.matrix == RGB else (128 * step, largest if coding.full else 224 * step)
    zero, gain = torch.tensor([luma, chroma, chroma], dtype=torch.float32).T[..., None, None]
    return torch.from_numpy(matrix.astype(np.float32)), zero, gain


def guessed_matrix(height: int, width: int) -> int:
    """What players take for the matrix of a video that does not say it."""
    return BT709 if width >= 1280 or height > 576 else SMPTE170M


def is_rgb(pixel_format: Any) -> bool:
    """True if its samples are RGB, or become RGB in FFmpeg: palettes, CIE XYZ and sensors' patterns."""
    others = pixel_format.has_palette or pixel_format.is_bayer
    return bool(pixel_format.is_rgb or others or pixel_format.name.startswith("xyz"))


def depth_of(pixel_format: Any) -> int:
    """The least of `DEPTHS` that holds its samples."""
    bits = max(component.bits for component in pixel_format.components)
    return next((depth for depth in DEPTHS if depth >= bits), DEPTHS[-1])


def channels_of(pixel_format: Any) -> int:
    """Components without alpha."""
    return sum(not part.is_alpha for part in pixel_format.components)


def planes_of(frame: Any, coding: Coding, height: int, width: int) -> Planes:
    """A frame's samples with full chroma, (3, H, W), uint8 or uint16: luma and chroma, or red, green and blue.

    A frame of another size than this one, which some streams have, is resized.
    """
    layout, order = coding.layout
    planes = np.full((3, height, width), 128 * 2 ** (coding.depth - 8), coding.dtype)
    if channels_of(frame.format) == 1 and coding.matrix != RGB:
        layout, order = named("gray", coding.depth), (0, 1, 2)
    for index, plane in zip(order, _relaid(frame, layout, coding, height, width).planes, strict=False):
        planes[index] = _samples(plane, coding)
    return planes


def frame_of(planes: Planes, coding: Coding, pixel_format: str, height: int, width: int) -> Any:
    """Samples as of `planes_of`, (3, H, W), as a frame of PyAV's in a pixel format and of a size.

    To a size that is larger by a row or a column the last one is repeated; to any other the frame is resized.
    """
    rows, columns = height - planes.shape[1], width - planes.shape[2]
    if (rows, columns) in ((0, 1), (1, 0), (1, 1)):
        planes = np.pad(planes, ((0, 0), (0, rows), (0, columns)), mode="edge")
    layout, order = coding.layout
    frame = import_av().VideoFrame(planes.shape[2], planes.shape[1], layout)
    for index, plane in zip(order, frame.planes, strict=True):
        _samples(plane, coding)[...] = planes[index]
    return _relaid(frame, pixel_format, coding, height, width)


def _samples(plane: Any, coding: Coding) -> Planes:
    """The samples of a plane, as part of the memory that they are in."""
    rows = np.frombuffer(plane, coding.dtype).reshape(-1, plane.line_size // coding.dtype.itemsize)
    return rows[: plane.height, : plane.width]


def _relaid(frame: Any, pixel_format: str, coding: Coding, height: int, width: int) -> Any:
    # One and the same matrix and range on both sides, whichever it is: no colour is to be changed
    space, full = 5, FULL if coding.full else LIMITED  # SWS_CS_ITU601
    ranges = {"src_color_range": full, "dst_color_range": full}
    spaces = {"src_colorspace": space, "dst_colorspace": space}
    return frame.reformat(width, height, pixel_format, interpolation=SCALER, **spaces, **ranges)


def named(layout: str, depth: int) -> str:
    return layout if depth == 8 else f"{layout}{depth}le"
