"""What an unfinished video has done: encoded frames in segments, files of their own that are whole or not there.

A segment begins with a key frame and is encoded by an encoder of its own, so that a video made in several goes is, to
the last bit, the one made in a single go. Packets are kept as the encoder gave them, with their times in the unit of
the source: containers would round them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from esc_arch.atomic_io import write_atomically
from esc_arch.errors import UserError

__all__ = ["Packet", "Segment", "WorkFolder", "decoding_times"]

logger = logging.getLogger("esc_arch")

MAGIC = b"esc_arch video segment 1\n"
SUFFIX = ".segment"
#: Files that a folder may have and still be one of these, which may be removed.
MANIFEST, LOCK = "manifest.json", "lock"


class Packet(NamedTuple):
    """An encoded frame: when it is shown, in units of the source's time base; whether it needs no other; its bytes."""

    pts: int
    is_key: bool
    data: bytes


@dataclass
class Segment:
    """Frames that follow each other: when each is shown, and packets in the order of decoding."""

    times: list[int] = field(default_factory=list)
    packets: list[Packet] = field(default_factory=list)
    last_duration: int | None = None

    def write(self, path: Path) -> None:
        """Write it, whole and on disk, or not at all."""
        header = {
            "times": self.times,
            "last_duration": self.last_duration,
            "packets": [(packet.pts, packet.is_key, len(packet.data)) for packet in self.packets],
        }
        parts = [MAGIC, json.dumps(header).encode(), b"\n", *(packet.data for packet in self.packets)]
        content = b"".join(parts)
        write_atomically(path, content + hashlib.sha256(content).digest())

    @classmethod
    def read(cls, path: Path) -> Segment | None:
        """What a file holds; None when it is damaged."""
        file = path.read_bytes()
        content, digest = file[:-32], file[-32:]
        if not content.startswith(MAGIC) or hashlib.sha256(content).digest() != digest:
            return None
        head, _, data = content[len(MAGIC) :].partition(b"\n")
        header = json.loads(head)
        packets, position = [], 0
        for pts, is_key, size in header["packets"]:
            packets.append(Packet(pts, is_key, data[position : position + size]))
            position += size
        return cls(header["times"], packets, header["last_duration"])


class Outline(NamedTuple):
    """What is kept in memory of a segment."""

    times: list[int]
    shown: list[int]
    last_duration: int | None


class WorkFolder:
    """The hidden folder beside a target in which it comes to be. Make one with `opened`.

    Attributes:
        path: the folder.
        length: frames in a segment, but for the last.
        segments: what is there of whole segments, from the first on.
    """

    def __init__(self, path: Path, length: int, segments: list[Outline]) -> None:
        self.path, self.length, self.segments = path, length, segments

    @property
    def frames(self) -> int:
        """How many frames are done."""
        return sum(len(segment.times) for segment in self.segments)

    def add(self, segment: Segment) -> None:
        """Keep the next segment."""
        segment.write(self._segment(len(self.segments)))
        self.segments.append(_outline(segment))

    def packets(self) -> Iterator[Packet]:
        """All packets, in the order of decoding.

        Raises:
            UserError: a file was damaged since it was written.
        """
        for index in range(len(self.segments)):
            segment = Segment.read(self._segment(index))
            if segment is None:
                raise UserError(
                    f"{self._segment(index)} is damaged: the disk may be. Remove the folder and start over."
                )
            yield from segment.packets

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path)

    def _segment(self, index: int) -> Path:
        return self.path / f"{index:06}{SUFFIX}"

    @classmethod
    @contextmanager
    def opened(cls, target: Path, settings: Mapping[str, Any], length: int) -> Iterator[WorkFolder]:
        """The folder of a target, for one process alone, with what an earlier go left by the same settings.

        Args:
            settings: all that the result depends on, as JSON has it.
            length: frames in a segment, of a new folder.

        Raises:
            UserError: another process is at the same target.
        """
        path = target.with_name(f".{target.name}.partial")
        path.mkdir(exist_ok=True)
        with _locked(path / LOCK, target):
            kept = _left(path, settings, target)
            if kept is None:
                for old in path.iterdir():
                    if old.name != LOCK:
                        old.unlink()
                kept = length
                manifest = {"settings": settings, "segment": length}
                write_atomically(path / MANIFEST, json.dumps(manifest, indent=1).encode())
            folder = cls(path, kept, [])
            folder._find()
            yield folder

    def _find(self) -> None:
        """Take the whole segments up to the first that is missing; files behind are of no use."""
        while (path := self._segment(len(self.segments))).is_file():
            segment = Segment.read(path)
            if segment is None:
                logger.warning("%s is damaged: its frames, and those behind, are made again.", path)
                break
            self.segments.append(_outline(segment))
        used = {self._segment(index) for index in range(len(self.segments))}
        for path in self.path.iterdir():
            if path not in used and path.name not in (MANIFEST, LOCK):
                path.unlink()


def _outline(segment: Segment) -> Outline:
    return Outline(segment.times, [packet.pts for packet in segment.packets], segment.last_duration)


def _left(path: Path, settings: Mapping[str, Any], target: Path) -> int | None:
    """The length of the segments of an earlier go that had these settings; None where there was none."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        before, length = manifest["settings"], int(manifest["segment"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        before, length = {}, 0
    now = json.loads(json.dumps(settings))
    if before == now:
        return length
    changed = [key for key in now if before.get(key) != now[key]]
    logger.warning("%s: what an earlier run left was made with another %s; it starts over.", target, ", ".join(changed))
    return None


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another process is writing {target}. Wait for it, or choose another name.") from error
        except (ImportError, OSError):
            pass  # Windows, or a network file system without locks
        yield


def decoding_times(shown: Sequence[int]) -> list[int]:
    """When packets are to be decoded: growing, and never after they are shown.

    An encoder's own times restart with each segment. These are the times of all frames in order, put off by as many
    frames as the order of decoding needs.

    Args:
        shown: when each packet is shown, in the order of decoding; no time twice.
    """
    ordered = sorted(shown)
    place = {time: index for index, time in enumerate(ordered)}
    delay = max((index - place[time] for index, time in enumerate(shown)), default=0)
    step = max(ordered[1] - ordered[0], 1) if len(ordered) > 1 else 1
    return [
        ordered[0] - step * (delay - index) if index < delay else ordered[index - delay] for index in range(len(shown))
    ]
