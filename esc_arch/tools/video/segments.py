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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from esc_arch.atomic_io import write_atomically
from esc_arch.errors import UserError

__all__ = ["Packet", "Segment", "WorkFolder", "decoding_times"]

logger = logging.getLogger("esc_arch")

MAGIC = b"esc_arch video segment 1\n"
MANIFEST, LOCK = "manifest.json", "lock"


class Packet(NamedTuple):
    """An encoded frame: when it is shown, in units of the source's time base; whether it needs no other; its bytes."""

    pts: int
    is_key: bool
    data: bytes


@dataclass
class Segment:
    """Frames that follow each other: when each is shown, and packets in the order of decoding."""

    times: list[int]
    packets: list[Packet]
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


class WorkFolder:
    """The hidden folder beside a target in which it comes to be, for one process alone. Make one with `opened`.

    Attributes:
        path: the folder.
        length: frames in a segment, but for the last.
        times: of all frames that are done, from the first on.
        shown: the same in the order of decoding.
        last_duration: of the last frame.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length = path, length
        self.times: list[int] = []
        self.shown: list[int] = []
        self.last_duration: int | None = None
        self._count = 0

    def add(self, segment: Segment) -> None:
        """Keep the next segment."""
        segment.write(self._segment(self._count))
        self._note(segment)

    def packets(self) -> Iterator[Packet]:
        """All packets, in the order of decoding.

        Raises:
            UserError: a file was damaged since it was written.
        """
        for path in map(self._segment, range(self._count)):
            segment = Segment.read(path)
            if segment is None:
                raise UserError(f"{path} is damaged: the disk may be. Remove the folder and start over.")
            yield from segment.packets

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path)

    @classmethod
    @contextmanager
    def opened(cls, target: Path, settings: Mapping[str, Any], length: int) -> Iterator[WorkFolder]:
        """The folder of a target, with what an earlier run left that had the same settings.

        Args:
            settings: all that the result depends on, as JSON has it.
            length: frames in a segment, of a new folder.

        Raises:
            UserError: another process is at the same target.
        """
        path = target.with_name(f".{target.name}.partial")
        path.mkdir(exist_ok=True)
        with _locked(path / LOCK, target):
            kept = _kept_length(path / MANIFEST, settings, target)
            folder = cls(path, kept or length)
            folder._find() if kept else folder._clear(keep=())
            if not kept:
                write_atomically(path / MANIFEST, json.dumps({"settings": settings, "segment": length}).encode())
            yield folder

    def _segment(self, index: int) -> Path:
        return self.path / f"{index:06}.segment"

    def _note(self, segment: Segment) -> None:
        self.times += segment.times
        self.shown += [packet.pts for packet in segment.packets]
        self.last_duration = segment.last_duration
        self._count += 1

    def _find(self) -> None:
        """Take the whole segments up to the first that is missing; files behind are of no use."""
        while (path := self._segment(self._count)).is_file():
            segment = Segment.read(path)
            if segment is None:
                logger.warning("%s is damaged: its frames, and those behind, are made again.", path)
                break
            self._note(segment)
        self._clear(keep=(MANIFEST, *(self._segment(index).name for index in range(self._count))))

    def _clear(self, keep: Sequence[str]) -> None:
        for path in self.path.iterdir():
            if path.name not in (LOCK, *keep):
                path.unlink()


def _kept_length(path: Path, settings: Mapping[str, Any], target: Path) -> int | None:
    """The length of the segments of an earlier run that had these settings; None where there was none."""
    try:
        manifest = json.loads(path.read_bytes())
        before, length = manifest["settings"], int(manifest["segment"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        before, length = {}, 0
    now = json.loads(json.dumps(settings))
    if before == now:
        return length
    changed = ", ".join(key for key in now if before.get(key) != now[key])
    logger.warning("%s: an earlier run had another %s; starting over.", target, changed)
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
    return [ordered[0] - step * (delay - index) for index in range(delay)] + ordered[: len(ordered) - delay]
