"""What cameras say beside pictures: the directories of tags of TIFF 6.0 and Exif 3.0, read and written value by value.

Values are kept as bytes in the order of bytes that they came in, so that what is unknown here passes unchanged.
Thumbnails are left out: they show the picture as it was.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["MARK", "SHORT", "Buffer", "Directory", "Exif", "Value", "directory_bytes", "parse", "value"]

#: What stands before the tags in a JPEG file, and may in others.
MARK = b"Exif\0\0"

#: Bytes of a value, by its type in TIFF 6.0 and BigTIFF.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
SHORT, LONG, LONG8 = 3, 4, 16

ORIENTATION, WIDTH, HEIGHT = 0x0112, 0xA002, 0xA003
#: Tags whose value is the place of a directory: Exif, GPS, interoperability.
EXIF, DIRECTORIES = 0x8769, (0x8769, 0x8825, 0xA005)

#: What a TIFF file's first directory says of the scene rather than of how the pixels are stored: description, maker,
#: model, orientation, software, date, artist, rating, copyright, IPTC, Windows' title to subject, and directories.
DESCRIPTIVE = {
    *(0x010E, 0x010F, 0x0110, ORIENTATION, 0x0131, 0x0132, 0x013B, 0x4746, 0x4749, 0x8298, 0x83BB),
    *range(0x9C9B, 0x9CA0),
    *DIRECTORIES,
}

Buffer = bytes | memoryview


class Value(NamedTuple):
    """A tag's value: its type, how many there are, and their bytes."""

    kind: int
    length: int
    data: bytes


Directory = dict[int, "Value | Directory"]


@dataclass(frozen=True)
class Exif:
    """Tags, and the order of bytes of their values: `<` or `>`."""

    order: str
    tags: Directory

    @property
    def orientation(self) -> int:
        """How the pixels are to be turned to be seen as meant, 1 .. 8; 1 when it is not said, or out of range."""
        found = self.tags.get(ORIENTATION)
        if not isinstance(found, Value) or found.kind != SHORT or found.length != 1:
            return 1
        (number,) = struct.unpack(f"{self.order}H", found.data)
        return number if 1 <= number <= 8 else 1

    def upright(self, height: int, width: int) -> Exif:
        """The same for pixels that are turned as they are to be seen, and of this size."""
        tags = dict(self.tags)
        if ORIENTATION in tags:
            tags[ORIENTATION] = value(self.order, SHORT, 1)
        details = tags.get(EXIF)
        if isinstance(details, dict):
            size = {WIDTH: value(self.order, LONG, width), HEIGHT: value(self.order, LONG, height)}
            tags[EXIF] = details | {tag: number for tag, number in size.items() if tag in details}
        return Exif(self.order, tags)

    def descriptive(self) -> Exif:
        """Without what says how the pixels of a file are stored."""
        return Exif(self.order, {tag: found for tag, found in self.tags.items() if tag in DESCRIPTIVE})

    def block(self) -> bytes:
        """The bytes that PNG, JPEG and WebP files hold, without `MARK`."""
        start = (b"II" if self.order == "<" else b"MM") + struct.pack(f"{self.order}HI", 42, 8)
        return start + directory_bytes(self.tags, self.order, len(start))


def parse(data: Buffer) -> Exif:
    """The tags of a TIFF or BigTIFF file, or of a picture's EXIF block, which is built alike.

    Raises:
        ValueError: it is not built so, or cut short.
    """
    if data[: len(MARK)] == MARK:
        data = data[len(MARK) :]
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    try:
        if order is None:
            raise ValueError("it starts with no order of bytes")
        (version,) = struct.unpack_from(f"{order}H", data, 2)
        (start,) = struct.unpack_from(f"{order}{'Q' if version == 43 else 'I'}", data, 8 if version == 43 else 4)
        return Exif(order, _parse_directory(data, start, order, big=version == 43, depth=0))
    except struct.error as error:
        raise ValueError("it is cut short") from error


def _parse_directory(data: Buffer, start: int, order: str, *, big: bool, depth: int) -> Directory:
    if depth > 3:
        raise ValueError("its directories go round in a circle")
    number, entry_size = ("Q", 20) if big else ("I", 12)
    counter = f"{order}{'Q' if big else 'H'}"
    (entries,) = struct.unpack_from(counter, data, start)
    tags: Directory = {}
    for index in range(entries):
        at = start + struct.calcsize(counter) + index * entry_size
        tag, kind, count = struct.unpack_from(f"{order}HH{number}", data, at)
        place = at + 4 + struct.calcsize(f"={number}")
        size = SIZES.get(kind, 0) * count
        if size > struct.calcsize(f"={number}"):
            (place,) = struct.unpack_from(f"{order}{number}", data, place)
        if tag in DIRECTORIES and kind in (LONG, 13, LONG8, 18):
            (child,) = struct.unpack_from(f"{order}{'Q' if SIZES[kind] == 8 else 'I'}", data, place)
            tags[tag] = _parse_directory(data, child, order, big=big, depth=depth + 1)
            continue
        content = bytes(data[place : place + size])
        if len(content) < size:
            raise ValueError("it is cut short")
        if size:
            tags[tag] = Value(kind, count, content)
    return tags


def value(order: str, kind: int, *numbers: int) -> Value:
    """Whole numbers as a value of a type, SHORT, LONG or LONG8."""
    letter = {SHORT: "H", LONG: "I", LONG8: "Q"}[kind]
    return Value(kind, len(numbers), struct.pack(f"{order}{len(numbers)}{letter}", *numbers))


def directory_bytes(tags: Mapping[int, Value | Directory], order: str, offset: int, *, big: bool = False) -> bytes:
    """A directory, the values and directories that it names behind it, as they are to stand at `offset` of a file."""
    number, inline = ("Q", 8) if big else ("I", 4)
    counter = f"{order}{'Q' if big else 'H'}"
    behind = offset + struct.calcsize(counter) + len(tags) * (4 + 2 * inline) + inline
    entries, contents = [struct.pack(counter, len(tags))], b""
    for tag, found in sorted(tags.items()):
        place = behind + len(contents)
        if isinstance(found, Value) and len(found.data) <= inline:
            kind, count, field = found.kind, found.length, found.data.ljust(inline, b"\0")
        else:
            field = struct.pack(f"{order}{number}", place)
            if isinstance(found, Value):
                kind, count, content = found
            else:
                kind, count = (LONG8 if big else LONG), 1
                content = directory_bytes(found, order, place, big=big)
            contents += content + b"\0" * (len(content) % 2)
        entries.append(struct.pack(f"{order}HH{number}", tag, kind, count) + field)
    return b"".join(entries) + b"\0" * inline + contents
