"""What an unfinished video has done: encoded frames in segments, files of their own that are whole or not there.

A segment begins with a key frame and is encoded by an encoder of its own, so that a video made in several goes is, to
the last bit, the one made in a single go. Packets are kept as the encoder gave them, with their times in the unit of
the source: containers would round them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from esc_arch.atomic_io import locked, remove_partial, require_own_folder, write_atomically
from esc_arch.errors import UserError

__all__ = ["Packet", "WorkFolder", "decoding_times", "read_segment", "write_segment"]

logger = logging.getLogger("esc_arch")

MAGIC = b"esc_arch video segment 2\n"
MANIFEST, LOCK = "manifest.json", "lock"
#: What else is made here; whatever has another name is somebody's.
OURS = re.compile(r"\d{6,}\.segment|joined\.\w+")
#: Bytes of a target's name that leave room for the rest of the folder's, of 255.
LONGEST_NAME = 235


class Packet(NamedTuple):
    """An encoded frame; when, and for how long if known, it is shown, in units of the source's time base."""

    pts: int
    duration: int | None
    is_key: bool
    data: bytes


def write_segment(path: Path, packets: Sequence[Packet]) -> None:
    """Write packets, in the order of decoding, whole and on disk, or not at all."""
    header = json.dumps([(*packet[:3], len(packet.data)) for packet in packets]).encode()
    content = b"".join([MAGIC, header, b"\n", *(packet.data for packet in packets)])
    write_atomically(path, content + hashlib.sha256(content).digest())


def read_segment(path: Path) -> list[Packet] | None:
    """The packets in a file; None when it is damaged."""
    file = path.read_bytes()
    content, digest = file[:-32], file[-32:]
    if not content.startswith(MAGIC) or hashlib.sha256(content).digest() != digest:
        return None
    header, _, data = content[len(MAGIC) :].partition(b"\n")
    packets, position = [], 0
    for pts, duration, is_key, size in json.loads(header):
        packets.append(Packet(pts, duration, is_key, data[position : position + size]))
        position += size
    return packets


class WorkFolder:
    """The hidden folder beside a target in which it comes to be, for one process alone. Make one with `opened`.

    Attributes:
        path: the folder.
        length: frames in a segment, but for the last.
        shown: when each frame that is done is shown, in the order of decoding.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length = path, length
        self.shown: list[int] = []
        self._files: list[Path] = []

    @classmethod
    @contextmanager
    def opened(cls, target: Path, settings: Mapping[str, str], length: int) -> Iterator[WorkFolder]:
        """The folder of a target, with what an earlier run left that had the same settings.

        `settings` are all that the result depends on; `length` is that of a new folder.

        Raises:
            UserError: another process is at the same target, or the folder is a link or another user's.
        """
        name = os.fsencode(target.name)
        short = target.name if len(name) < LONGEST_NAME else hashlib.sha256(name).hexdigest()
        path = target.with_name(f".{short}.partial")
        busy = f"Another process is writing {target}. Wait for it, or choose another name."
        require_own_folder(path)
        path.mkdir(0o700, exist_ok=True)  # what others could put there would be taken for ours
        with locked(path, LOCK, busy):
            earlier = _manifest(path / MANIFEST)
            folder = cls(path, earlier.get("segment", length))
            changed = [key for key in settings if earlier.get(key) != settings[key]]
            if not changed:
                while (segment := folder._next_file()).is_file():  # up to the first that is missing
                    packets = read_segment(segment)
                    if packets is None:
                        logger.warning("%s is damaged: its frames, and those behind, are made again.", segment)
                        break
                    folder._keep(packets)
            elif earlier:
                logger.warning("%s: an earlier run had another %s; starting over.", target, ", ".join(changed))
            folder._remove_files(but=folder._files)
            try:
                if changed:
                    folder.length = length
                    write_atomically(path / MANIFEST, json.dumps({**settings, "segment": length}).encode())
                yield folder
            except BaseException:
                if folder.shown:
                    folder._remove_files(but=folder._files)  # a half-written result takes room that may be needed
                else:
                    folder.remove()
                raise

    def add(self, packets: Sequence[Packet]) -> None:
        """Write the next segment."""
        write_segment(self._next_file(), packets)
        self._keep(packets)

    def _keep(self, packets: Sequence[Packet]) -> None:
        self._files.append(self._next_file())
        self.shown += [packet.pts for packet in packets]

    def _next_file(self) -> Path:
        return self.path / f"{len(self._files):06}.segment"

    def packets(self) -> Iterator[Packet]:
        """All packets, in the order of decoding; raises UserError if a file was damaged since it was written."""
        for path in self._files:
            packets = read_segment(path)
            if packets is None:
                raise UserError(f"{path} is damaged: the disk may be. Remove the folder and start over.")
            yield from packets

    def remove(self) -> None:
        """Remove what is ours, and the folder if nothing else is in it."""
        self._remove_files()
        (self.path / MANIFEST).unlink(missing_ok=True)
        with suppress(OSError):  # on Windows, which removes no open files, the lock stays
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    def _remove_files(self, but: Sequence[Path] = ()) -> None:
        remove_partial(self.path)
        for each in self.path.iterdir():
            if OURS.fullmatch(each.name) and each not in but:
                each.unlink()


def _manifest(path: Path) -> dict[str, Any]:
    """What a manifest says; nothing if it is not there or not whole."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) and type(found.get("segment")) is int and found["segment"] > 0 else {}


def decoding_times(shown: Sequence[int]) -> list[int]:
    """When packets are to be decoded: growing, and never after they are shown.

    An encoder's own times restart with each segment. These are the times of all frames in order, put off by as many
    frames as the order of decoding needs. `shown` says when each packet is shown, in that order.
    """
    ordered = sorted(shown)
    place = {time: index for index, time in enumerate(ordered)}
    delay = max((index - place[time] for index, time in enumerate(shown)), default=0)
    step = max(ordered[1] - ordered[0], 1) if len(ordered) > 1 else 1
    return [ordered[0] - step * (delay - index) for index in range(delay)] + ordered[: len(ordered) - delay]
