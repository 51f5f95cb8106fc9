"""Writing LMDBs that BasicSR's data sets read, completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from esc_arch.atomic_io import fsync_folder, remove, replace_folder, require_own_folder, write_atomically, writing_to

from .decoding import size_in_header
from .image_files import PNG_COMPRESSION
from .lmdb_check import lmdb_problem

__all__ = ["LmdbWriter", "why_not_reusable"]

SETTINGS_FILE = "prepare.json"
META_FILE = "meta_info.txt"
FREE_MAP_SIZE = 2**26
WRITE_BYTES = 2**25
"""How much may be lost by a kill: LMDB waits for the disk, which for every small image would take longest."""


class LmdbWriter:
    """A new LMDB of PNG images (H, W, 3) with BasicSR's meta_info.txt, which a later run can continue.

    Until :meth:`finish`, nothing or the former LMDB is at `path`, and the new one beside it in ``.NAME.partial``.
    There, a writer with the same `settings`, all that the content depends on, continues with what was
    written, and one with others starts over. Only one process may write at a time, see `locked`.

    All methods raise UserError if the disk is full or cannot be written.

    Attributes:
        sizes: (H, W) of every image on disk so far, by its key.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self._waiting: dict[str, bytes] = {}
        require_own_folder(self.partial)
        with _writing_to(path.parent):
            if _read_settings(self.partial) != dict(settings) or lmdb_problem(self.partial) is not None:
                remove(self.partial)
                self.partial.mkdir(parents=True)
                write_atomically(self.partial / SETTINGS_FILE, json.dumps(dict(settings), indent=1).encode())
            self._env = lmdb.open(os.fsencode(self.partial), map_size=FREE_MAP_SIZE, lock=False)
            with self._env.begin(buffers=True) as transaction:
                self.sizes = {bytes(key).decode(): _size(bytes(png[:24])) for key, png in transaction.cursor()}

    def __enter__(self) -> LmdbWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()

    def write(self, images: Mapping[str, bytes]) -> None:
        """Add PNG files by key, which is ASCII without dots; a kill keeps all of a call or none."""
        self._waiting |= images
        if sum(map(len, self._waiting.values())) >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        # Room for what is there, for the images in whole pages, and for the pages of keys
        there = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        with _writing_to(self.path.parent):
            self._env.set_mapsize(there + 2 * sum(map(len, self._waiting.values())) + FREE_MAP_SIZE)
            with self._env.begin(write=True) as transaction:
                for key, png in self._waiting.items():
                    transaction.put(key.encode("ascii"), png)
        self.sizes |= {key: _size(png) for key, png in self._waiting.items()}
        self._waiting.clear()

    def finish(self) -> None:
        """Write meta_info.txt, and move the LMDB to its final name, replacing a former one."""
        self._flush()
        self._env.close()
        lines = [f"{key}.png ({h},{w},3) {PNG_COMPRESSION}\n" for key, (h, w) in sorted(self.sizes.items())]
        with _writing_to(self.path.parent):
            write_atomically(self.partial / META_FILE, "".join(lines).encode())
            fsync_folder(self.partial)
            replace_folder(self.partial, self.path)


def _size(png: bytes) -> tuple[int, int]:
    return size_in_header(png) or (0, 0)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    with writing_to(folder):
        try:
            yield
        except lmdb.Error as error:
            raise OSError(str(error)) from error


def why_not_reusable(path: Path, settings: Mapping[str, Any]) -> str | None:
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
        return "it was made with other settings: " + "; ".join(changed)
    missing = [name for name in ("data.mdb", META_FILE) if not (path / name).is_file()]
    return f"it has no {' and no '.join(missing)}" if missing else None


def _read_settings(folder: Path) -> dict[str, Any] | None:
    try:
        file = folder / SETTINGS_FILE
        settings = json.loads(file.read_bytes()) if file.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None
