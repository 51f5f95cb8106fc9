"""How an enlarged video is encoded: encoders, their quality, pixel formats."""

from __future__ import annotations

import io
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from esc_arch.errors import UserError

from .frames import (
    FULL,
    LIMITED,
    RGB,
    Coding,
    channels_of,
    depth_of,
    exact,
    guessed_matrix,
    import_av,
    is_rgb,
    named,
    side_data_of,
)
from .segments import Packet

__all__ = ["CONTAINERS", "Encoder", "VideoSpec", "container_format", "scheduling_kept", "video_spec"]

#: The threads of this process, on Linux.
_TASKS = Path("/proc/self/task")
#: Frames per second, where nothing is known of them.
USUAL_RATE = Fraction(25)

#: By the suffix: FFmpeg's name of the container, and encoders for it, the first that is there being taken.
CONTAINERS = {
    ".mp4": ("mp4", ("libx264", "libx265", "libsvtav1")),
    ".m4v": ("mp4", ("libx264", "libx265")),
    ".mov": ("mov", ("libx264", "libx265", "prores_ks")),
    ".mkv": ("matroska", ("libx264", "libx265", "libsvtav1", "ffv1")),
    ".webm": ("webm", ("libvpx-vp9", "libsvtav1")),
}


class Quality(NamedTuple):
    """An encoder's option for quality: its name, its default here, its range, and what has to go with it."""

    option: str
    default: float
    most: float
    others: Mapping[str, str] = {}


#: Encoders that take a quality. The defaults are such that enlarged detail is seen.
QUALITIES = {
    "libx264": Quality("crf", 17, 51),
    "libx264rgb": Quality("crf", 17, 51),
    "libx265": Quality("crf", 19, 51, {"x265-params": "log-level=error"}),
    "libsvtav1": Quality("crf", 23, 63),
    "libvpx-vp9": Quality("crf", 22, 63, {"b": "0", "row-mt": "1"}),
    "h264_nvenc": Quality("cq", 19, 51, {"rc": "vbr", "b": "0"}),
    "hevc_nvenc": Quality("cq", 21, 51, {"rc": "vbr", "b": "0"}),
    "av1_nvenc": Quality("cq", 26, 63, {"rc": "vbr", "b": "0"}),
}
#: Others that are often asked for.
WITHOUT_QUALITY = ("ffv1", "prores_ks")
#: The smallest side of a frame, for encoders that corrupt memory below this size (SVT-AV1 4.2, frames of 8 x 8).
SMALLEST = {"libsvtav1": 16}


@dataclass(frozen=True)
class VideoSpec:
    """What an encoder is told, and what the container says of the video.

    Attributes:
        primaries, transfer: as in ITU-T H.273.
        aspect: width of a pixel by its height, if known.
        display_matrix: how players are to turn it: 9 numbers of FFmpeg's, or None.
    """

    codec: str
    options: dict[str, str]
    pixel_format: str
    height: int
    width: int
    coding: Coding
    primaries: int
    transfer: int
    time_base: Fraction
    rate: Fraction
    aspect: Fraction | None
    display_matrix: tuple[int, ...] | None

    def label(self, target: Any) -> None:
        """Say of a frame, or of an encoder, what its colours mean."""
        target.colorspace, target.color_range = self.coding.matrix, FULL if self.coding.full else LIMITED
        target.color_primaries, target.color_trc = self.primaries, self.transfer

    def apply(self, context: Any) -> None:
        """Set all this on an encoder that is not open."""
        from av.codec.context import Flags

        context.width, context.height, context.pix_fmt = self.width, self.height, self.pixel_format
        context.framerate, context.time_base = self.rate, 1 / self.rate
        if self.aspect is not None:
            context.sample_aspect_ratio = self.aspect
        self.label(context)
        context.options = dict(self.options)
        # Slices, which are PyAV's choice, cost quality
        context.thread_type, context.thread_count = "FRAME", 0
        # All containers here have the encoder's headers at their beginning
        context.flags |= int(Flags.global_header)

    def add_to(self, container: Any) -> Any:
        """A stream like this in a container, with an encoder that only says what stands at the file's beginning."""
        stream = container.add_stream(self.codec, rate=self.rate)
        self.apply(stream.codec_context)
        if self.codec == "libx265" and container.format.name in ("mp4", "mov"):
            stream.codec_context.codec_tag = "hvc1"  # which Apple's players want
        stream.time_base = self.time_base
        if self.display_matrix is not None:
            stream.set_display_matrix(self.display_matrix)
        return stream


def container_format(target: Path) -> str:
    """FFmpeg's name of the container, by the suffix of a file's name. Raises UserError if it is not written."""
    if target.suffix.lower() not in CONTAINERS:
        raise UserError(f"{target}: videos are written as {', '.join(CONTAINERS)}. Use one of these suffixes.")
    return CONTAINERS[target.suffix.lower()][0]


def choose_codec(name: str, target: Path) -> str:
    """The encoder asked for; auto: the first of the container's that this build of FFmpeg has."""
    if name == "auto":
        usual = CONTAINERS[target.suffix.lower()][1]
        found = next(filter(_is_encoder, usual), None)
        if found is None:
            raise UserError(
                f"{target}: this FFmpeg has none of the encoders {', '.join(usual)}. Install PyAV from PyPI, or name "
                "another encoder (codec)."
            )
        return found
    if not _is_encoder(name):
        here = ", ".join(filter(_is_encoder, (*QUALITIES, *WITHOUT_QUALITY)))
        raise UserError(f"codec: {name!r} is no video encoder of this FFmpeg; it has, among others: {here}.")
    return name


def _is_encoder(name: str) -> bool:
    av = import_av()
    with suppress(ValueError, LookupError, av.FFmpegError):
        return bool(av.Codec(name, "w").type == "video")
    return False


def quality_options(codec: str, crf: float | None) -> dict[str, str]:
    """The options of an encoder for a quality, lower being better; None for the default."""
    if codec not in QUALITIES:
        if crf is not None:
            raise UserError(f"crf: {crf:g} given, but the encoder {codec} takes none. Omit it.")
        return {}
    found = QUALITIES[codec]
    if crf is not None and not 0 <= crf <= found.most:
        raise UserError(f"crf: {crf:g} given; for {codec} it must be from 0 (best) to {found.most:g}.")
    return {found.option: f"{found.default if crf is None else crf:g}", **found.others}


def choose_pixel_format(asked: str, codec: str, source: Any) -> str:
    """The pixel format asked for; auto: the encoder's that is nearest to the source's in chroma and depth."""
    encoder = import_av().Codec(codec, "w")
    usable = [each for each in encoder.video_formats or () if _is_usable(each)]
    names = [each.name for each in usable]
    if not names:
        raise UserError(f"codec: {codec} takes no pixel format that can be written here. Choose another encoder.")
    if asked != "auto":
        if asked not in names:
            raise UserError(f"pixel_format: {asked!r} given; with {codec} it must be auto, {', '.join(names)}.")
        return asked
    # RGB is kept where nothing is to be lost; elsewhere hardly a player shows it
    rgb = is_rgb(source) and encoder.lossless and not encoder.lossy
    alike = [each.name for each in usable if is_rgb(each) == rgb]
    # Grey has no chroma, so the least will do; of GIFs, which are bgra, many players show nothing else
    least = source.name == "bgra" or (channels_of(source) == 1 and not is_rgb(source))
    like = named("yuv420p", depth_of(source)) if least and not rgb else source.name
    return str(import_av().codec.codec.find_best_pix_fmt_of_list(alike or names, like)[0].name)


def _is_usable(pixel_format: Any) -> bool:
    """True if it has colours, no alpha, and is one of the formats that players know of those that differ in order."""
    parts = pixel_format.components
    planar = len({part.plane for part in parts}) == 3
    odd = pixel_format.is_big_endian or pixel_format.has_palette or pixel_format.is_bayer
    known = not odd and not pixel_format.name.startswith("yuvj") and (planar or bool(pixel_format.is_rgb))
    return known and len(parts) == 3 and min(part.bits for part in parts) >= 8


def padded_size(size: tuple[int, int], pixel_format: str) -> tuple[int, int]:
    """Height and width made larger, where need be, by the row and the column that subsampled chroma asks for."""
    chosen = import_av().VideoFormat(pixel_format)
    rows, columns = (1, 1) if chosen.is_rgb else (8 // chosen.chroma_height(8), 8 // chosen.chroma_width(8))
    return size[0] + -size[0] % rows, size[1] + -size[1] % columns


def video_spec(
    frame: Any, stream: Any, target: Path, size: tuple[int, int], *, codec: str, crf: float | None, pixel_format: str
) -> VideoSpec:
    """How a video is written whose first frame this is, and whose frames become so large (H, W).

    Raises:
        UserError: an invalid choice of codec, crf or pixel_format, which are those of `upscale_video`; the encoder
            cannot be opened, or the target's container does not hold what it makes.
    """
    encoder = choose_codec(codec, target)
    chosen = choose_pixel_format(pixel_format, encoder, frame.format)
    height, width = padded_size(size, chosen)
    video_format, source = import_av().VideoFormat(chosen), Coding.of(frame)
    matrix = source.matrix if source.matrix != RGB else guessed_matrix(height, width)
    if rgb := is_rgb(video_format):
        matrix = RGB
    time_base, display_matrix = exact(stream.time_base), None
    assert time_base is not None
    for data in side_data_of(frame):
        if data.type.name == "DISPLAYMATRIX":  # without the shift, which depends on the size
            numbers = struct.unpack("=9i", bytes(data))
            display_matrix = (*numbers[:6], 0, 0, numbers[8])
    spec = VideoSpec(
        codec=encoder,
        options=quality_options(encoder, crf),
        pixel_format=chosen,
        height=height,
        width=width,
        coding=Coding(matrix, source.full if (source.matrix == RGB) == rgb else rgb, depth_of(video_format)),
        primaries=int(frame.color_primaries),
        transfer=int(frame.color_trc),
        time_base=time_base,
        rate=exact(stream.average_rate) or exact(stream.guessed_rate) or USUAL_RATE,
        aspect=exact(stream.sample_aspect_ratio),
        display_matrix=display_matrix,
    )
    _check(spec, target)
    return spec


def _check(spec: VideoSpec, target: Path) -> None:
    """Open the encoder once, and write the beginning of a file."""
    av = import_av()
    if spec.codec == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # errors alone: it prints 20 lines for each segment
    try:
        if min(spec.width, spec.height) < SMALLEST.get(spec.codec, 1):
            raise ValueError(f"its smallest side is {SMALLEST[spec.codec]}")
        with av.open(io.BytesIO(), "w", format=container_format(target)) as trial, scheduling_kept():
            spec.add_to(trial)
            trial.start_encoding()
    except (av.FFmpegError, ValueError) as error:
        raise UserError(
            f"{target}: {spec.codec} cannot write {spec.width} x {spec.height} pixels of {spec.pixel_format} here "
            f"({error}). Choose another codec, pixel_format, scale or suffix."
        ) from error


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """Keep the priority of this thread, and give the same to all that begin meanwhile.

    Run by root, SVT-AV1 makes its own threads, and the one that opens it, real-time ones of the highest priority.
    Threads that this one begins would be the same, and those of oneDNN, which wait for each other spinning, would hang.
    """
    if sys.platform != "linux" or not _TASKS.is_dir():
        yield
        return
    policy, parameters, before = os.sched_getscheduler(0), os.sched_getparam(0), set(_TASKS.iterdir())
    try:
        yield
    finally:
        for thread in (0, *(int(task.name) for task in set(_TASKS.iterdir()) - before)):
            with suppress(OSError):  # it may have ended
                if os.sched_getscheduler(thread) != policy:
                    os.sched_setscheduler(thread, policy, parameters)


class Encoder:
    """Encodes one segment.

    The encoder sees an even rate: some take no fine units, and all would spend bits by how long a frame is shown.
    """

    def __init__(self, spec: VideoSpec) -> None:
        self.spec = spec
        self.shown: list[tuple[int, int | None]] = []
        self.packets: list[Any] = []
        self.context = import_av().CodecContext.create(spec.codec, "w")
        spec.apply(self.context)
        with scheduling_kept():
            self.context.open()

    def add(self, frame: Any, time: int, duration: int | None) -> None:
        """Encode a frame that is shown at a time, for a duration, in units of the spec's time base."""
        frame.pts, frame.time_base = len(self.shown), self.context.time_base
        self.spec.label(frame)
        self.shown.append((time, duration))
        self.packets += self.context.encode(frame)

    def finish(self) -> list[Packet]:
        """All that was added, encoded, in the order of decoding."""
        self.packets += self.context.encode(None)
        if sorted(packet.pts for packet in self.packets) != list(range(len(self.shown))):
            raise RuntimeError(f"{self.spec.codec} did not give a packet for each frame")
        return [Packet(*self.shown[int(packet.pts)], packet.is_keyframe, bytes(packet)) for packet in self.packets]
