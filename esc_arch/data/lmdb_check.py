"""What an LMDB lists, whether it can be read, and whether it has what it lists.

LMDB trusts its file, and a damaged one ends the process that reads it by a signal. So its keys, not its images, are
read once in a child process, which is this file run as a script: it imports nothing of esc_arch.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Contents", "contents_of", "listed_sizes", "lmdb_problem"]

_SHAPE = re.compile(r"\((\d+),\s*(\d+)")
_DAMAGED = 3  # exit status of the child process
#: Bytes; no length that an entry can claim is larger.
_LONGEST_ENTRY = 2**32


def lmdb_problem(path: str | Path) -> str | None:
    """What is wrong with the file of the LMDB `path` (a folder), without a full stop; None when it is sound."""
    file = Path(path, "data.mdb")
    try:
        status = file.stat()
    except OSError as error:
        return f"data.mdb: {error.strerror or error}"
    return _walk_in_child(file.resolve().parent, status.st_size, status.st_mtime_ns)


@functools.cache
def _walk_in_child(folder: Path, _size: int, _time: int) -> str | None:
    """The problem of an LMDB; looked for once for each size and time of its file."""
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return None
    reason = done.stdout.strip().removeprefix(f"{folder}: ").rstrip(".")
    if done.returncode < 0:
        reason = f"reading it ends with {signal.Signals(-done.returncode).name}"
    elif done.returncode != _DAMAGED:
        raise RuntimeError(f"{folder} could not be checked: {done.stderr}")
    return f"data.mdb was cut short or is damaged: {reason}"


def listed_sizes(path: str | Path) -> dict[str, tuple[int, int] | None]:
    """The keys that an LMDB's meta_info.txt lists, with height and width where they are told; or an OSError.

    Its lines are like `0001.png (480,480,3) 1`.
    """
    sizes: dict[str, tuple[int, int] | None] = {}
    with open(Path(path, "meta_info.txt"), encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            shape = _SHAPE.search(line)
            sizes[line.split(".")[0]] = (int(shape[1]), int(shape[2])) if shape else None
    return sizes


class Contents(NamedTuple):
    """What is in an LMDB, compared with its list."""

    #: How many there are.
    keys: int
    #: Keys that only the list, and only the database has.
    missing: list[str]
    unlisted: list[str]
    #: How many images were decoded, and what is wrong with some, as `decoding.image_problem` says it.
    tried: int
    bad: dict[str, str]


def contents_of(path: str | Path, listed: Mapping[str, tuple[int, int] | None], most: int) -> Contents:
    """Compare an LMDB, sound by `lmdb_problem`, with its list; up to `most` images are decoded. Or an lmdb.Error."""
    import lmdb

    from .decoding import image_problem

    opened = lmdb.open(os.fsencode(path), readonly=True, lock=False, readahead=False, create=False)
    with opened as environment, environment.begin() as transaction:
        keys = {bytes(key).decode(errors="surrogateescape") for key in transaction.cursor().iternext(values=False)}
        there = [key for key in listed if key in keys]
        chosen = there[:: max(1, -(-len(there) // most))]
        images = ((key, transaction.get(key.encode(errors="surrogateescape"), b"")) for key in chosen)
        bad = {key: problem for key, image in images if (problem := image_problem(image, listed[key]))}
    missing = [key for key in listed if key not in keys]
    return Contents(len(keys), missing, sorted(keys - listed.keys()), len(chosen), bad)


def _walk(folder: str) -> None:
    """Find every key as LMDB does, and touch the last byte of all values; crashes or raises lmdb.Error for damage."""
    import lmdb
    import numpy as np

    # Behind the file the map goes on so far that no entry leads out of it, to memory that can be read
    size = Path(folder, "data.mdb").stat().st_size + 2 * _LONGEST_ENTRY
    opened = lmdb.open(os.fsencode(folder), map_size=size, readonly=True, lock=False, readahead=False, create=False)
    with opened as environment, environment.begin(buffers=True) as transaction:
        before, end, last = b"", 0, memoryview(b"")
        for key, value in transaction.cursor():
            if bytes(key) <= before or transaction.get(bytes(key)) is None:
                raise lmdb.CorruptedError("its keys are not in order")
            before = bytes(key)
            end_of_value = np.frombuffer(value, np.uint8).ctypes.data + len(value) if value else 0
            if end_of_value > end:
                end, last = end_of_value, value
        last[-1:].tobytes()


if __name__ == "__main__":
    import lmdb

    try:
        _walk(sys.argv[1])
    except lmdb.Error as damage:
        print(damage)
        sys.exit(_DAMAGED)
