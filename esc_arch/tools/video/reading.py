"""Frames of a video file: opened, decoded as far as can be, and what is wrong with it said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esc_arch.errors import UserError

from .frames import MICROSECONDS, Coding, Planes, exact, import_av, open_to_read, planes_of, side_data_of

__all__ = ["Batch", "Frames", "Source", "open_video", "read_batches"]

logger = logging.getLogger("esc_arch")

#: AVFMT_TS_DISCONT: formats whose clock begins anywhere.
TS_DISCONT = 0x0200
#: Formats that say how long they are, and how much (s) a file may end before that, by rounding.
STORED, TOLERANCE = {"mov", "mp4", "matroska", "webm", "avi"}, 0.1
#: What frames may carry beside pixels that is not carried over.
LEFT_OUT = {
    "MASTERING_DISPLAY_METADATA": "metadata of HDR (mastering display) are left out",
    "CONTENT_LIGHT_LEVEL": "metadata of HDR (content light level) are left out",
    "DYNAMIC_HDR_PLUS": "metadata of HDR10+ are left out",
    "DOVI_METADATA": "metadata of Dolby Vision are left out",
    "A53_CC": "closed captions in the video are left out",
}


class Source(NamedTuple):
    """What is read.

    Attributes:
        origin: what is taken from all times, in microseconds.
        coding, height, width: of the first frame, and what all are brought to.
    """

    path: Path
    stream: int
    origin: int
    coding: Coding
    height: int
    width: int


class Batch(NamedTuple):
    """Frames that run together: when they are shown, for how long (None where it is not known), and (B, 3, H, W)."""

    times: list[int]
    durations: list[int | None]
    planes: Planes


class Frame(NamedTuple):
    """A frame, and when it is shown, in units of its stream's time base."""

    frame: Any
    time: int


class Frames:
    """The frames of a video stream, in the order in which they are shown, as many as can be decoded.

    Attributes:
        origin: what is taken from all times, in microseconds: of broadcasts, whose clock may begin at hours, where it
            begins; else nothing.
        faults: packets that could not be decoded, and frames that were damaged.
        end: when the last packet of any stream ends, in seconds.
    """

    def __init__(self, path: Path, container: Any, stream: Any) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.origin = int(container.start_time or 0) if container.format.flags & TS_DISCONT else 0
        self.faults, self.end = 0, 0.0
        self._notes: set[str] = set()

    def __iter__(self) -> Iterator[Frame]:
        rate, unit, last = exact(self.stream.guessed_rate), exact(self.stream.time_base), None
        assert unit is not None
        step = max(round(1 / (rate * unit)), 1) if rate else 1
        shift = round(Fraction(self.origin, MICROSECONDS) / unit)
        for frame in self._decoded():
            time = frame.pts - shift if frame.pts is not None else 0 if last is None else last + step
            if last is not None and time <= last:
                self.note("times of frames that do not grow were put right")
                time = last + 1
            last = time
            self.faults += bool(frame.is_corrupt)
            yield Frame(frame, time)

    def _decoded(self) -> Iterator[Any]:
        av = import_av()
        for packet in self._packets():
            try:
                yield from packet.decode()
            except av.FFmpegError:
                self.faults += 1
        try:
            yield from self.stream.decode(None)
        except av.FFmpegError:
            self.faults += 1

    def _packets(self) -> Iterator[Any]:
        """Those of the stream. Those of others only say how far the file goes."""
        try:
            for packet in self.container.demux():
                if packet.dts is None and packet.size == 0:  # the end of a stream
                    continue
                moment = packet.pts if packet.pts is not None else packet.dts
                if moment is not None:
                    self.end = max(self.end, float((moment + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == self.stream.index:
                    yield packet
        except import_av().FFmpegError:
            self.faults += 1

    def expected_number(self) -> int | None:
        """How many frames there are, as far as the file says."""
        rate = exact(self.stream.guessed_rate)
        if not self.stream.frames and self.container.duration and rate:
            return round(Fraction(self.container.duration, MICROSECONDS) * rate) or None
        return int(self.stream.frames) or None

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self._notes:
            self._notes.add(text)
            logger.warning("%s: %s.", self.path, text)

    def conclude(self, frames: int) -> None:
        """Say what was wrong with the file."""
        container = self.container
        expected = ((container.start_time or 0) + (container.duration or 0)) / MICROSECONDS
        if STORED & set(container.format.name.split(",")) and self.end < expected - TOLERANCE:
            self.note(
                f"the file is cut off at {self.end:.2f} of {expected:.2f} seconds; the {frames} frames that can be "
                "decoded are enlarged"
            )
        if self.faults:
            self.note(f"{self.faults} places are damaged; the {frames} frames that can be decoded are enlarged")


@contextmanager
def open_video(path: Path) -> Iterator[Frames]:
    """The first video stream of a file.

    Raises:
        UserError: there is none that can be decoded.
    """
    av = import_av()
    try:
        container = open_to_read(str(path))
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as a video ({reason}). The file is damaged, or no video.") from error
    with container:
        for stream in container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context is not None:
                stream.thread_type = "AUTO"
                yield Frames(path, container, stream)
                return
    raise UserError(f"{path}: there is no video in this file that can be decoded.")


def read_batches(source: Source, done: int, batch: int, length: int) -> Iterator[Batch]:
    """The frames behind the first `done`.

    Batches end where segments of this length do, so that they are the same after a resumption.
    """
    with open_video(source.path) as frames:
        waiting: list[tuple[int, int | None, Planes]] = []
        number = 0
        for frame, time in frames:
            number += 1
            if number <= done:
                continue
            _note_losses(frames, frame, source)
            planes = planes_of(frame, source.coding, source.height, source.width)
            waiting.append((time, frame.duration or None, planes))
            if len(waiting) == batch or number % length == 0:
                yield _batch_of(waiting)
                waiting = []
        if waiting:
            yield _batch_of(waiting)
        frames.conclude(number)


def _batch_of(waiting: list[tuple[int, int | None, Planes]]) -> Batch:
    times, durations, planes = zip(*waiting, strict=True)
    return Batch(list(times), list(durations), np.stack(planes))


def _note_losses(frames: Frames, frame: Any, source: Source) -> None:
    """Say what of a frame the result has not."""
    if frame.interlaced_frame:
        frames.note("it is interlaced, and enlarged as if it were not. Deinterlace it first (ffmpeg -vf bwdif)")
    alpha = any(part.is_alpha for part in frame.format.components) or frames.stream.metadata.get("alpha_mode") == "1"
    if alpha and not frame.format.has_palette:
        frames.note("its alpha is left out")
    if (frame.height, frame.width) != (source.height, source.width):
        frames.note(
            f"its frames change their size; all are made {source.width} x {source.height} before they are enlarged"
        )
    for data in side_data_of(frame):
        if data.type.name in LEFT_OUT:
            frames.note(LEFT_OUT[data.type.name])
