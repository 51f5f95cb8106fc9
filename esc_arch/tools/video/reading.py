"""Frames of a video file: opened, decoded as far as can be, and what is wrong with it said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

from esc_arch.errors import UserError

from .frames import MICROSECONDS, Coding, Planes, exact, import_av, open_to_read, planes_of, side_data_of

__all__ = ["Batch", "VideoReader", "open_video"]

logger = logging.getLogger("esc_arch")

#: AVFMT_TS_DISCONT: formats whose clock begins anywhere.
TS_DISCONT = 0x0200
#: Formats that say how long they are, and how much (s) a file may end before that, by rounding.
STORED, TOLERANCE = {"mov", "mp4", "matroska", "webm", "avi"}, 0.1
#: What frames may carry beside pixels that is not carried over.
LEFT_OUT = {
    "MASTERING_DISPLAY_METADATA": "metadata of HDR (mastering display)",
    "CONTENT_LIGHT_LEVEL": "metadata of HDR (content light level)",
    "DYNAMIC_HDR_PLUS": "metadata of HDR10+",
    "DOVI_METADATA": "metadata of Dolby Vision",
    "A53_CC": "closed captions in the video",
}
#: Frames that run together: when each is shown, for how long (None where it is not known), and (3, H, W).
Batch = list[tuple[int, int | None, Planes]]


class VideoReader:
    """The frames of a video stream, as many as can be decoded. Make one with `open_video`.

    Attributes:
        origin: what is taken from all times, in `MICROSECONDS`: of broadcasts, whose clock may begin at hours, where
            it begins; else nothing.
        first: the first frame, of PyAV's.
        coding: of the first frame. All are brought to it, and to its size.
    """

    def __init__(self, path: Path, container: Any, stream: Any) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.origin = int(container.start_time or 0) if container.format.flags & TS_DISCONT else 0
        # Packets that could not be decoded and damaged frames; when the last packet of any stream ends, in seconds
        self._faults, self._end = 0, 0.0
        self._notes: set[str] = set()
        self._frames = self._in_order()
        self.first: Any = next(self._frames, None)
        if self.first is None:
            raise UserError(f"{path}: no frame can be decoded. The file is damaged, or not a video.")
        try:
            self.coding = Coding.of(self.first)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @property
    def number(self) -> int | None:
        """How many frames there are, as far as the file says."""
        rate = exact(self.stream.guessed_rate)
        if not self.stream.frames and self.container.duration and rate:
            return round(Fraction(self.container.duration, MICROSECONDS) * rate) or None
        return int(self.stream.frames) or None

    def batches(self, done: int, batch: int, length: int) -> Iterator[Batch]:
        """All frames, once, but for the first `done`.

        Batches end where segments of this length do, so that they are the same after a resumption.
        """
        number, waiting = 0, Batch()
        for number, frame in enumerate(chain([self.first], self._frames), 1):
            if number > done:
                self._note_losses(frame)
                planes = planes_of(frame, self.coding, self.first.height, self.first.width)
                waiting.append((frame.pts, frame.duration or None, planes))
            if waiting and (len(waiting) == batch or number % length == 0):
                yield waiting
                waiting = []
        if waiting:
            yield waiting
        self._note_faults(number)

    def _in_order(self) -> Iterator[Any]:
        """Frames in the order in which they are shown, with times that grow."""
        rate, unit, last = exact(self.stream.guessed_rate), exact(self.stream.time_base), None
        assert unit is not None
        step = max(round(1 / (rate * unit)), 1) if rate else 1
        shift = round(Fraction(self.origin, MICROSECONDS) / unit)
        for packet in chain(self._packets(), [None]):
            try:
                frames = self.stream.decode(packet)
            except import_av().FFmpegError:
                self._faults += 1
                continue
            for frame in frames:
                time = frame.pts - shift if frame.pts is not None else 0 if last is None else last + step
                if last is not None and time <= last:
                    self._note("times of frames that do not grow were put right")
                    time = last + 1
                frame.pts = last = time
                self._faults += bool(frame.is_corrupt)
                yield frame

    def _packets(self) -> Iterator[Any]:
        """Those of the stream. Those of others only say how far the file goes."""
        try:
            for packet in self.container.demux():
                if packet.dts is None and packet.size == 0:  # the end of a stream
                    continue
                moment = packet.pts if packet.pts is not None else packet.dts
                if moment is not None:
                    self._end = max(self._end, float((moment + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == self.stream.index:
                    yield packet
        except (import_av().FFmpegError, OSError):
            self._faults += 1

    def _note(self, text: str) -> None:
        """Say something once."""
        if text not in self._notes:
            self._notes.add(text)
            logger.warning("%s: %s.", self.path, text)

    def _note_losses(self, frame: Any) -> None:
        """Say what of a frame the result has not."""
        if frame.interlaced_frame:
            self._note("it is interlaced, and enlarged as if it were not. Deinterlace it first (ffmpeg -vf bwdif)")
        if self.stream.metadata.get("alpha_mode") == "1" or _is_transparent(frame):
            self._note("its alpha is left out")
        height, width = self.first.height, self.first.width
        if (frame.height, frame.width) != (height, width):
            self._note(f"its frames change their size; all are made {width} x {height} before they are enlarged")
        for data in side_data_of(frame):
            if data.type.name in LEFT_OUT:
                self._note(f"{LEFT_OUT[data.type.name]} are left out")

    def _note_faults(self, frames: int) -> None:
        rest = f"the {frames} frames that can be decoded are enlarged"
        # Some files count their duration from 0, others from where they begin
        expected = ((self.container.duration or 0) + min(self.container.start_time or 0, 0)) / MICROSECONDS
        if STORED & set(self.container.format.name.split(",")) and self._end < expected - TOLERANCE:
            self._note(f"the file is cut off at {self._end:.2f} of {expected:.2f} seconds; {rest}")
        if self._faults:
            self._note(f"{self._faults} places are damaged; {rest}")


def _is_transparent(frame: Any) -> bool:
    """True if it has alpha that says something: that of GIFs is mostly full."""
    alpha = any(part.is_alpha for part in frame.format.components) and not frame.format.has_palette
    return alpha and bool(frame.to_ndarray(format="rgba")[..., 3].min() < 255)


@contextmanager
def open_video(path: Path) -> Iterator[VideoReader]:
    """The first video stream of a file; raises UserError if there is none that can be decoded."""
    av = import_av()
    with ExitStack() as opened:
        try:
            container = opened.enter_context(open_to_read(path))
        except av.FFmpegError as error:
            raise UserError(
                f"{path}: cannot be read as a video ({error.strerror}). The file is damaged, no video, or a list of "
                "other files, which are not opened."
            ) from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
        for stream in container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context is not None:
                stream.thread_type = "AUTO"
                yield VideoReader(path, container, stream)
                return
    raise UserError(f"{path}: there is no video in this file that can be decoded.")
