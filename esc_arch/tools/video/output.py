"""How an enlarged video is written: encoders, pixel formats, and the joining of what is encoded with all else."""

from __future__ import annotations

import heapq
import io
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from esc_arch.atomic_io import fsync_folder
from esc_arch.errors import UserError

from .frames import (
    FULL,
    LIMITED,
    RGB,
    Coding,
    depth_of,
    exact,
    guessed_matrix,
    import_av,
    is_rgb,
    open_to_read,
    side_data_of,
)
from .segments import Packet, Segment, WorkFolder, decoding_times

__all__ = [
    "CONTAINERS",
    "Encoder",
    "Form",
    "check_form",
    "choose_codec",
    "choose_pixel_format",
    "container_of",
    "form_of",
    "join",
]

logger = logging.getLogger("esc_arch")

#: AV_TIME_BASE: the unit of a container's times, in a second.
MICROSECONDS = 1_000_000
#: The threads of this process, on Linux.
_TASKS = Path("/proc/self/task")
#: Frames per second, where nothing is known of them.
USUAL_RATE = Fraction(25)


class Container(NamedTuple):
    """A file format: FFmpeg's name for it, and encoders for it, the first that is there being taken."""

    format: str
    codecs: tuple[str, ...]


CONTAINERS = {
    ".mp4": Container("mp4", ("libx264", "libx265", "libsvtav1")),
    ".m4v": Container("mp4", ("libx264", "libx265")),
    ".mov": Container("mov", ("libx264", "libx265", "prores_ks")),
    ".mkv": Container("matroska", ("libx264", "libx265", "libsvtav1", "ffv1")),
    ".webm": Container("webm", ("libvpx-vp9", "libsvtav1")),
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
#: The least side of a frame, for encoders that corrupt memory below this size (SVT-AV1 4.2, frames of 8 x 8).
SMALLEST = {"libsvtav1": 16}
#: Others that are often asked for.
WITHOUT_QUALITY = ("ffv1", "prores_ks")


@dataclass(frozen=True)
class Form:
    """What an encoder is told, and what the container says of the video.

    Attributes:
        options: the encoder's.
        matrix, full, primaries, transfer: as in ITU-T H.273; primaries and transfer as the source has them.
        time_base, rate, aspect: numerator and denominator: the unit of times in the source (s), frames per second on
            average, and the shape of a pixel, None where it is not known.
        display_matrix: how players are to turn it: 9 numbers of FFmpeg's, or None.
        headers_apart: whether the container has the encoder's headers at its beginning.
    """

    codec: str
    options: dict[str, str]
    pixel_format: str
    height: int
    width: int
    matrix: int
    full: bool
    primaries: int
    transfer: int
    time_base: tuple[int, int]
    rate: tuple[int, int]
    aspect: tuple[int, int] | None
    display_matrix: tuple[int, ...] | None
    headers_apart: bool
    tag: str | None = None

    @property
    def coding(self) -> Coding:
        """What samples of the network's output are to mean."""
        return Coding(self.matrix, self.full, depth_of(import_av().VideoFormat(self.pixel_format)))

    def apply(self, context: Any) -> None:
        """Set all this on an encoder that is not open."""
        context.width, context.height, context.pix_fmt = self.width, self.height, self.pixel_format
        context.framerate = Fraction(*self.rate)
        context.time_base = 1 / context.framerate
        if self.aspect is not None:
            context.sample_aspect_ratio = Fraction(*self.aspect)
        context.colorspace = self.matrix
        context.color_range = FULL if self.full else LIMITED
        context.color_primaries, context.color_trc = self.primaries, self.transfer
        context.options = dict(self.options)
        # Slices, which are PyAV's choice, cost quality
        context.thread_type = "FRAME"
        context.thread_count = 0
        if self.headers_apart:
            from av.codec.context import Flags

            context.flags |= int(Flags.global_header)

    def settings(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def container_of(target: Path) -> Container:
    """By the suffix of its name.

    Raises:
        UserError: no container that is written.
    """
    try:
        return CONTAINERS[target.suffix.lower()]
    except KeyError:
        raise UserError(f"{target}: videos are written as {', '.join(CONTAINERS)}. Let its name end in one.") from None


def choose_codec(name: str, target: Path) -> str:
    """The encoder asked for; auto: the first of the container's that this build of FFmpeg has.

    Raises:
        UserError: it is not there.
    """
    container = container_of(target)
    if name != "auto":
        if not _is_encoder(name):
            here = [each for each in (*QUALITIES, *WITHOUT_QUALITY) if _is_encoder(each)]
            raise UserError(
                f"codec: {name!r} is no video encoder of this FFmpeg; it has, among others: {', '.join(here)}."
            )
        return name
    for each in container.codecs:
        if _is_encoder(each):
            return each
    raise UserError(
        f"{target}: this FFmpeg has none of the encoders {', '.join(container.codecs)}. Install PyAV from PyPI, or "
        "name another encoder (codec)."
    )


def _is_encoder(name: str) -> bool:
    av = import_av()
    with suppress(ValueError, LookupError, av.FFmpegError):
        return bool(av.Codec(name, "w").type == "video")
    return False


def quality_of(codec: str, crf: float | None) -> dict[str, str]:
    """The options of an encoder for a quality, lower being better; None for the default.

    Raises:
        UserError: the encoder has no such thing, or not this value.
    """
    if codec not in QUALITIES:
        if crf is not None:
            raise UserError(f"crf: {crf:g} given, but the encoder {codec} takes none. Omit it.")
        return {}
    found = QUALITIES[codec]
    if crf is not None and not 0 <= crf <= found.most:
        raise UserError(f"crf: {crf:g} given; for {codec} it must be from 0, the best, to {found.most:g}.")
    return {found.option: f"{found.default if crf is None else crf:g}", **found.others}


def choose_pixel_format(asked: str, codec: str, source: Any) -> str:
    """The pixel format to encode.

    Args:
        asked: a name of FFmpeg's; auto: the source's chroma and depth, or the nearest to them that the encoder has.
        source: the source's, of PyAV.

    Raises:
        UserError: the encoder does not take the one that is asked for.
    """
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
    chroma, depth = _chroma_share(source), depth_of(source)

    def losses(each: Any) -> tuple[Any, ...]:
        more_chroma, more_depth = _chroma_share(each) - chroma, depth_of(each) - depth
        return is_rgb(each) != rgb, max(-more_depth, 0), max(-more_chroma, 0), more_depth, more_chroma

    return str(min(usable, key=losses).name)


def _is_usable(pixel_format: Any) -> bool:
    """Whether it has colours, no alpha, and is one of the formats that players know of those that differ in order."""
    parts = pixel_format.components
    if (
        len(parts) != 3
        or min(part.bits for part in parts) < 8
        or pixel_format.is_big_endian
        or pixel_format.has_palette
        or pixel_format.is_bayer
    ):
        return False
    planar = len({part.plane for part in parts}) == 3
    return not pixel_format.name.startswith("yuvj") and (planar or bool(pixel_format.is_rgb))


def _chroma_share(pixel_format: Any) -> float:
    """Samples of chroma for each one of luma; grey counts as having the least."""
    if is_rgb(pixel_format):
        return 1.0
    if len([part for part in pixel_format.components if not part.is_alpha]) == 1:
        return 0.25
    return pixel_format.chroma_width(8) * pixel_format.chroma_height(8) / 64


def padded_size(size: tuple[int, int], pixel_format: str) -> tuple[int, int]:
    """Height and width made larger, where need be, by the row and the column that subsampled chroma asks for."""
    found = import_av().VideoFormat(pixel_format)
    if is_rgb(found):
        return size
    rows, columns = 8 // found.chroma_height(8), 8 // found.chroma_width(8)
    return size[0] + -size[0] % rows, size[1] + -size[1] % columns


def form_of(
    frame: Any, stream: Any, target: Path, size: tuple[int, int], *, codec: str, crf: float | None, pixel_format: str
) -> Form:
    """How a video is written whose first frame this is.

    Args:
        size: height and width of what the network makes of its frames.
        codec, crf, pixel_format: as of `esc_arch.tools.video.upscaling.upscale_video`.

    Raises:
        UserError: one of these cannot be had.
    """
    container, encoder = container_of(target), choose_codec(codec, target)
    chosen = choose_pixel_format(pixel_format, encoder, frame.format)
    source, rgb = Coding.of(frame), is_rgb(import_av().VideoFormat(chosen))
    height, width = padded_size(size, chosen)
    matrix = RGB if rgb else source.matrix if source.matrix != RGB else guessed_matrix(height, width)
    rate = exact(stream.average_rate) or exact(stream.guessed_rate) or USUAL_RATE
    aspect, unit = exact(stream.sample_aspect_ratio), exact(stream.time_base)
    assert unit is not None
    return Form(
        codec=encoder,
        options=quality_of(encoder, crf),
        pixel_format=chosen,
        height=height,
        width=width,
        matrix=matrix,
        full=source.full if (source.matrix == RGB) == rgb else rgb,
        primaries=int(frame.color_primaries),
        transfer=int(frame.color_trc),
        time_base=unit.as_integer_ratio(),
        rate=rate.as_integer_ratio(),
        aspect=aspect.as_integer_ratio() if aspect else None,
        display_matrix=_display_matrix(frame),
        headers_apart=container.format in ("mp4", "mov", "matroska", "webm"),
        tag="hvc1" if encoder == "libx265" and container.format in ("mp4", "mov") else None,
    )


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    """How the frame is to be turned and mirrored, without by how much it is shifted, which depends on its size."""
    from av.sidedata.sidedata import Type

    for data in side_data_of(frame):
        if data.type == Type.DISPLAYMATRIX:
            numbers = struct.unpack("=9i", bytes(data))
            return (*numbers[:6], 0, 0, numbers[8])
    return None


def check_form(form: Form, target: Path) -> None:
    """See that the encoder can be opened, and that the target's container holds what it makes.

    Raises:
        UserError: one of both is not so.
    """
    av = import_av()
    if form.codec == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # errors alone: it prints 20 lines for each segment
    try:
        if min(form.width, form.height) < SMALLEST.get(form.codec, 1):
            raise ValueError(f"its least side is {SMALLEST[form.codec]}")
        with av.open(io.BytesIO(), "w", format=container_of(target).format) as trial:
            _stream_of(trial, form)
            with scheduling_kept():
                trial.start_encoding()
    except (av.FFmpegError, ValueError) as error:
        raise UserError(
            f"{target}: {form.codec} cannot write {form.width} x {form.height} pixels of {form.pixel_format} here "
            f"({error}). Choose another codec, pixel_format, scale or suffix."
        ) from error


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """Keep the priority of this thread, and give the same to all that begin meanwhile.

    Run by root, SVT-AV1 makes the thread that opens it and its own real-time threads, of the highest priority. Threads
    that this one begins would be the same: of such ones, those of oneDNN that wait for each other, spinning, keep all
    processors from those that they wait for, for ever.
    """
    if not hasattr(os, "sched_setscheduler") or not _TASKS.is_dir():
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
    """Encodes one segment in a form that `check_form` has seen.

    The encoder sees an even rate. Times need not go through it: some encoders take no fine units, and all would spend
    bits by how long each frame is shown.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self.times: list[int] = []
        self.packets: list[Packet] = []
        self.last_duration: int | None = None
        self.context = import_av().CodecContext.create(form.codec, "w")
        form.apply(self.context)
        with scheduling_kept():
            self.context.open()

    def add(self, frame: Any, time: int, duration: int | None) -> None:
        """Encode a frame that is shown at a time, in units of the form's time base."""
        frame.pts, frame.time_base = len(self.times), self.context.time_base
        frame.colorspace, frame.color_range = self.form.matrix, FULL if self.form.full else LIMITED
        frame.color_primaries, frame.color_trc = self.form.primaries, self.form.transfer
        self.times.append(time)
        self.last_duration = duration
        self._keep(self.context.encode(frame))

    def finish(self) -> Segment:
        """All that was added, encoded."""
        self._keep(self.context.encode(None))
        if sorted(packet.pts for packet in self.packets) != list(range(len(self.times))):
            raise RuntimeError(f"{self.form.codec} did not give a packet for each frame")
        shown = [packet._replace(pts=self.times[packet.pts]) for packet in self.packets]
        return Segment(self.times, shown, self.last_duration)

    def _keep(self, packets: Iterable[Any]) -> None:
        self.packets += [Packet(packet.pts, packet.is_keyframe, bytes(packet)) for packet in packets]


def join(folder: WorkFolder, form: Form, source: Path, video: int, start: int, target: Path) -> None:
    """Write a video file from segments, and with it all else of the source, copied: nothing is encoded again.

    What the target's container cannot hold is left out, with a warning.

    Args:
        video: the index of the source's stream that the segments are of.
        start: what was taken from the source's times, in AV_TIME_BASE (microseconds); other streams follow.
    """
    av = import_av()
    container = container_of(target)
    path = folder.path / f"joined{target.suffix.lower()}"
    if container.format in ("mp4", "mov"):
        # Where the video begins is stored in this unit, by default milliseconds
        options = {"movflags": "+faststart", "movie_timescale": str(max(form.time_base[1], 1000))}
    else:
        options = {"avoid_negative_ts": "disabled"}  # which moves all, where sound begins before 0
    with (
        open_to_read(str(source)) as old,
        av.open(str(path), "w", format=container.format, container_options=options) as new,
    ):
        new.metadata.update(_kept_metadata(old.metadata))
        new.set_chapters(_moved_chapters(old.chapters(), start))
        stream = _stream_of(new, form)
        stream.metadata.update(_kept_metadata(old.streams[video].metadata))
        stream.disposition = int(old.streams[video].disposition)
        copies = {}
        for other in old.streams:
            if other.index != video and (copy := _add_copy(new, other, container.format, target)) is not None:
                copies[other.index] = copy
        with scheduling_kept():
            new.start_encoding()
        ours = _video_packets(folder, form, stream)
        theirs = _copied_packets(old, copies, start) if copies else iter(())
        for packet in _by_time(ours, theirs):
            new.mux(packet)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(path, target)
    fsync_folder(target.parent)


def _stream_of(container: Any, form: Form) -> Any:
    """A stream of this form in a container, with an encoder that only says what stands at the beginning of the file."""
    stream = container.add_stream(form.codec, rate=Fraction(*form.rate))
    form.apply(stream.codec_context)
    if form.tag is not None:
        stream.codec_context.codec_tag = form.tag
    stream.time_base = Fraction(*form.time_base)
    if form.display_matrix is not None:
        stream.set_display_matrix(form.display_matrix)
    return stream


def _add_copy(new: Any, stream: Any, container: str, target: Path) -> Any | None:
    """A stream of the new file that takes the packets of one of the old; None where the container cannot hold it."""
    av = import_av()
    try:
        # What a container takes shows when its beginning is written
        with av.open(io.BytesIO(), "w", format=container) as trial:
            _copy_of(trial, stream)
            trial.start_encoding()
    except (ValueError, av.FFmpegError) as error:
        logger.warning(
            "%s: stream %d (%s) is left out, since %s does not hold it (%s). Matroska (.mkv) holds most.",
            target, stream.index, _described(stream), target.suffix, " ".join(str(error).split()),
        )  # fmt: skip
        return None
    if stream.type == "video" and not stream.disposition & av.stream.Disposition.attached_pic:
        logger.warning("%s: stream %d is a further video, which is copied as it is.", target, stream.index)
    return _copy_of(new, stream)


def _copy_of(container: Any, stream: Any) -> Any:
    copy = container.add_stream_from_template(stream, opaque=True)
    copy.metadata.update(_kept_metadata(stream.metadata))
    copy.disposition = int(stream.disposition)
    return copy


def _described(stream: Any) -> str:
    codec = stream.codec_context.name if stream.codec_context is not None else None
    return ", ".join(str(part) for part in (stream.type, codec, stream.language) if part)


#: Metadata that are of the old file's form rather than of what it shows, and that would be wrong of the new one.
STALE = {"encoder", "major_brand", "minor_version", "compatible_brands", "duration", "rotate", "bps", "alpha_mode"}


def _kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in metadata.items()
        if key.lower().partition("-")[0] not in STALE and not key.lower().startswith(("number_of_", "_statistics"))
    }


def _moved_chapters(chapters: Iterable[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    moved = []
    for chapter in chapters:
        shift = round(Fraction(start, MICROSECONDS) / chapter["time_base"]) if start else 0
        moved.append({**chapter, "start": chapter["start"] - shift, "end": chapter["end"] - shift})
    return moved


def _video_packets(folder: WorkFolder, form: Form, stream: Any) -> Iterator[Any]:
    av = import_av()
    decoded = decoding_times([time for segment in folder.segments for time in segment.shown])
    times = [time for segment in folder.segments for time in segment.times]
    durations = {time: after - time for time, after in pairwise(times)}
    durations[times[-1]] = _last_duration(folder, form, times)
    for found, dts in zip(folder.packets(), decoded, strict=True):
        packet = av.Packet(found.data)
        packet.pts, packet.dts, packet.duration = found.pts, dts, durations[found.pts]
        packet.time_base, packet.is_keyframe, packet.stream = Fraction(*form.time_base), found.is_key, stream
        yield packet


def _last_duration(folder: WorkFolder, form: Form, times: list[int]) -> int:
    """For how long the last frame is shown: as the source says, else as the one before it, else by the rate."""
    found = folder.segments[-1].last_duration
    if found:
        return found
    if len(times) > 1:
        return times[-1] - times[-2]
    return max(round(1 / (Fraction(*form.rate) * Fraction(*form.time_base))), 1)


def _copied_packets(old: Any, copies: Mapping[int, Any], start: int) -> Iterator[Any]:
    with suppress(import_av().FFmpegError):  # where the source is cut off, it was said when its frames were read
        for packet in old.demux([old.streams[index] for index in copies]):
            if not packet.size:  # the end of a stream
                continue
            if start:
                shift = round(Fraction(start, MICROSECONDS) / packet.time_base)
                packet.dts = packet.dts - shift if packet.dts is not None else None
                packet.pts = packet.pts - shift if packet.pts is not None else None
            packet.stream = copies[packet.stream.index]
            yield packet


def _by_time(ours: Iterator[Any], theirs: Iterator[Any]) -> Iterator[Any]:
    """Packets of the video and all others, in the order in which players need them."""

    def moment(packet: Any) -> Fraction | float:
        return packet.dts * packet.time_base if packet.dts is not None else float("-inf")  # a cover has no time

    return heapq.merge(ours, theirs, key=moment)
