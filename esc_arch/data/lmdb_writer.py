"""Writing LMDBs that BasicSR's data sets read, completely or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb

from esc_arch.atomic_io import fsync_folder, remove, write_atomically, writing_to

from .image_files import PNG_COMPRESSION

__all__ = ["LmdbWriter", "Settings", "read_shapes", "why_not_reusable"]

Settings = Mapping[str, str | int | None]
"""All that the content of an LMDB depends on. Equal settings make equal content."""

SETTINGS_FILE = "prepare.json"
META_FILE = "meta_info.txt"
JOURNAL_FILE = "journal.jsonl"
FIRST_MAP_SIZE = 2**26
"""Bytes. Doubled whenever it proves too small; a generous guess would be a file of that size on Windows."""


class LmdbWriter:
    """A new LMDB `path` of PNG images with BasicSR's meta_info.txt, which a later run can continue.

    What is guaranteed:

     - Nothing is at `path` before :meth:`finish`, or the former LMDB in full; after it, all of the new one.
       Until then everything is in the folder ``.NAME.partial`` beside it.
     - What :meth:`commit` took is safe from a kill of the process and from a power cut.
     - A writer with the same `settings` continues after the last commit, and `finished` names the sources
       committed so far. One with others starts over. Leaving the ``with`` block early keeps the partial folder.
     - The size is bounded by the disk only: the memory map grows as needed.

    One process at a time may write an LMDB; see `esc_arch.atomic_io.locked`.

    Args:
        path: the LMDB; ends in ``.lmdb``, as BasicSR demands.
        settings: see :data:`Settings`.

    Raises:
        UserError: from every method, when the disk is full or cannot be written.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        if path.suffix != ".lmdb":
            raise ValueError(f"the name of an LMDB must end in .lmdb, not {path.name}")
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.finished: set[str] = set()
        self._shapes: dict[str, tuple[int, int, int]] = {}
        self._pending: dict[str, bytes] = {}
        self._pending_shapes: dict[str, tuple[int, int, int]] = {}
        with writing_to(path.parent):
            if _read_settings(self.partial) != dict(settings):
                self._begin(settings)
            try:
                self._open()
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError):
                self._begin(settings)
                self._open()
            self._read_journal()

    def __enter__(self) -> LmdbWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._env.close()

    @property
    def pending_bytes(self) -> int:
        """Size of the images that are put but not committed; they are kept in memory."""
        return sum(map(len, self._pending.values()))

    def put(self, key: str, png: bytes, shape: tuple[int, int, int]) -> None:
        """Add an image for the next commit. A key put before is replaced.

        Args:
            key: printable ASCII without dots, as BasicSR reads it back.
            png: the image as PNG.
            shape: its (H, W, C).
        """
        if not re.fullmatch(r"[ -~]+", key) or "." in key:
            raise ValueError(f"an LMDB key is printable ASCII without dots, not {key!r}")
        self._pending[key] = png
        self._pending_shapes[key] = shape

    def commit(self, sources: Iterable[str] = ()) -> None:
        """Make all that was put safe on disk, then note that `sources` are `finished`."""
        with writing_to(self.path.parent):
            self._write_pending()
            # After the commit: what the journal names is there. What it does not name is put again.
            sources = list(sources)
            line = json.dumps({"sources": sources, "entries": self._pending_shapes}) + "\n"
            with open(self.partial / JOURNAL_FILE, "ab") as journal:
                journal.write(line.encode())
                journal.flush()
                os.fsync(journal.fileno())
        self.finished.update(sources)
        self._shapes.update(self._pending_shapes)
        self._pending.clear()
        self._pending_shapes.clear()

    def finish(self) -> None:
        """Commit, write meta_info.txt, and move the LMDB to its final name, in place of a former one."""
        if self._pending:
            self.commit()
        entries = self._env.stat()["entries"]
        if entries != len(self._shapes):
            raise RuntimeError(f"{self.partial} has {entries} entries, but {len(self._shapes)} were put")
        self._env.close()
        with writing_to(self.path.parent):
            lines = [f"{key}.png ({h},{w},{c}) {PNG_COMPRESSION}\n" for key, (h, w, c) in sorted(self._shapes.items())]
            write_atomically(self.partial / META_FILE, "".join(lines).encode())
            fsync_folder(self.partial)
            self._take_final_place()

    def _take_final_place(self) -> None:
        old = self.path.with_name(f".{self.path.name}.old")
        if os.path.lexists(self.path):  # a folder cannot replace another in one step
            remove(old)
            os.replace(self.path, old)
        os.replace(self.partial, self.path)
        fsync_folder(self.path.parent)
        remove(old)
        remove(self.path / JOURNAL_FILE)

    def _begin(self, settings: Settings) -> None:
        remove(self.partial)
        self.partial.mkdir(parents=True)
        write_atomically(self.partial / SETTINGS_FILE, json.dumps(dict(settings), indent=1).encode())

    def _open(self) -> None:
        self._env = lmdb.open(str(self.partial), map_size=FIRST_MAP_SIZE, lock=False)

    def _read_journal(self) -> None:
        path = self.partial / JOURNAL_FILE
        path.touch()
        intact = 0
        with open(path, "rb") as journal, suppress(ValueError):
            for line in journal:
                record = json.loads(line)
                self.finished.update(record["sources"])
                self._shapes.update({key: tuple(shape) for key, shape in record["entries"].items()})
                intact += len(line)
        os.truncate(path, intact)  # the last line may be cut short by a kill, and would spoil the next one

    def _write_pending(self) -> None:
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, png in self._pending.items():
                        transaction.put(key.encode("ascii"), png)
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])


def why_not_reusable(path: Path, settings: Settings) -> str | None:
    """Why the LMDB `path` is not, in full, what `settings` would make; None when it is."""
    made_with = _read_settings(path)
    if made_with is None:
        return "it was not made by this command"
    changed = [
        f"{key} was {made_with.get(key)}, is now {settings.get(key)}"
        for key in sorted(made_with.keys() | settings.keys())
        if made_with.get(key) != settings.get(key)
    ]
    if changed:
        return "it was made otherwise: " + "; ".join(changed)
    # It came to its place when it was complete, so only a later accident can make it incomplete.
    missing = [name for name in ("data.mdb", META_FILE) if not (path / name).is_file()]
    return f"it has no {' and no '.join(missing)}" if missing else None


def read_shapes(path: Path) -> dict[str, tuple[int, int, int]]:
    """The (H, W, C) of every image of the LMDB `path`, by key, as its meta_info.txt has them."""
    shapes = {}
    for line in (path / META_FILE).read_text(encoding="ascii").splitlines():
        key, rest = line.split(".png (")
        height, width, channels = rest.split(")")[0].split(",")
        shapes[key] = int(height), int(width), int(channels)
    return shapes


def _read_settings(folder: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None
