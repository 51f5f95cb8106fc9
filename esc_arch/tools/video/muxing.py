"""Joining an enlarged video with all else of its source: nothing is encoded again."""

from __future__ import annotations

import heapq
import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import fsync_folder

from .encoding import VideoSpec, container_format, scheduling_kept
from .frames import MICROSECONDS, import_av, open_to_read
from .segments import WorkFolder, decoding_times

__all__ = ["join"]

logger = logging.getLogger("esc_arch")

#: Metadata that are of the old file's form rather than of what it shows, and that would be wrong of the new one.
STALE = {"encoder", "major_brand", "minor_version", "compatible_brands", "duration", "rotate", "bps", "alpha_mode"}


def join(folder: WorkFolder, spec: VideoSpec, source: Path, video: int, start: int, target: Path) -> None:
    """Write a video file from segments, and with it all else of the source, copied.

    What the target's container cannot hold is left out, with a warning.

    Args:
        video: the index of the source's stream that the segments are of.
        start: what was taken from the source's times, in `MICROSECONDS`; other streams follow.
    """
    container = container_format(target)
    path = folder.path / f"joined{target.suffix.lower()}"
    path.unlink(missing_ok=True)  # FFmpeg would follow a link
    if container in ("mp4", "mov"):
        # Where the video begins is stored in this unit, by default milliseconds
        options = {"movflags": "+faststart", "movie_timescale": str(max(spec.time_base.denominator, 1000))}
    else:
        options = {"avoid_negative_ts": "disabled"}  # which moves all, where sound begins before 0
    with (
        open_to_read(source) as old,
        import_av().open(f"file:{path.absolute()}", "w", format=container, container_options=options) as new,
    ):
        new.metadata.update(_kept_metadata(old.metadata))
        chapters = old.chapters()
        for chapter in chapters:
            shift = round(Fraction(start, MICROSECONDS) / chapter["time_base"])
            chapter.update(start=chapter["start"] - shift, end=chapter["end"] - shift)
        new.set_chapters(chapters)
        stream = spec.add_to(new)
        _label(stream, old.streams[video])
        others = [each for each in old.streams if each.index != video and _is_held(each, container, target)]
        copies = {each.index: _copy_of(new, each) for each in others}
        with scheduling_kept():
            new.start_encoding()
        theirs = _copied_packets(old, copies, start) if copies else iter(())
        # In the order in which players need them; a cover has no time
        for packet in heapq.merge(
            _video_packets(folder, spec, stream),
            theirs,
            key=lambda packet: packet.dts * packet.time_base if packet.dts is not None else float("-inf"),
        ):
            new.mux(packet)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(path, target)
    fsync_folder(target.parent)


def _is_held(stream: Any, container: str, target: Path) -> bool:
    """True if the container can hold a stream; says if not."""
    av = import_av()
    try:
        # What a container takes shows when its beginning is written
        with av.open(io.BytesIO(), "w", format=container) as trial:
            _copy_of(trial, stream)
            trial.start_encoding()
    except (ValueError, av.FFmpegError) as error:
        codec = stream.codec_context.name if stream.codec_context is not None else None
        kind = ", ".join(str(part) for part in (stream.type, codec, stream.language) if part)
        reason = " ".join(str(error).split())
        logger.warning(
            "%s: stream %d (%s) is left out, since %s does not hold it (%s).%s",
            *(target, stream.index, kind, target.suffix, reason),
            "" if container == "matroska" else " Matroska (.mkv) holds most.",
        )
        return False
    if stream.type == "video" and not stream.disposition & av.stream.Disposition.attached_pic:
        logger.warning("%s: stream %d is a further video, which is copied as it is.", target, stream.index)
    return True


def _copy_of(container: Any, stream: Any) -> Any:
    copy = container.add_stream_from_template(stream, opaque=True)
    _label(copy, stream)
    return copy


def _label(new: Any, old: Any) -> None:
    new.metadata.update(_kept_metadata(old.metadata))
    new.disposition = int(old.disposition)


def _kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in metadata.items()
        if key.lower().partition("-")[0] not in STALE and not key.lower().startswith(("number_of_", "_statistics"))
    }


def _video_packets(folder: WorkFolder, spec: VideoSpec, stream: Any) -> Iterator[Any]:
    times = sorted(folder.shown)
    until = dict(pairwise(times))
    # The last frame is shown for as long as the source says, else as the one before it, else by the rate
    usual = times[-1] - times[-2] if len(times) > 1 else max(round(1 / (spec.rate * spec.time_base)), 1)
    for found, dts in zip(folder.packets(), decoding_times(folder.shown), strict=True):
        packet = import_av().Packet(found.data)
        packet.duration = until[found.pts] - found.pts if found.pts in until else found.duration or usual
        packet.pts, packet.dts, packet.time_base = found.pts, dts, spec.time_base
        packet.is_keyframe, packet.stream = found.is_key, stream
        yield packet


def _copied_packets(old: Any, copies: Mapping[int, Any], start: int) -> Iterator[Any]:
    # Where the source is cut off, it was said when its frames were read
    with suppress(import_av().FFmpegError, OSError):
        for packet in old.demux([old.streams[index] for index in copies]):
            if not packet.size:  # the end of a stream
                continue
            shift = round(Fraction(start, MICROSECONDS) / packet.time_base)
            packet.dts = packet.dts - shift if packet.dts is not None else None
            packet.pts = packet.pts - shift if packet.pts is not None else None
            packet.stream = copies[packet.stream.index]
            yield packet
