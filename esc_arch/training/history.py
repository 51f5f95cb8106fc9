"""The numbers of a training, a line each, for plots, reports and resuming."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import read_regular, write_atomically

__all__ = ["History"]


class History:
    """A file of one JSON object per line: logged iterations and validations, in the order of time.

    Of training: ``{"iter": 100, "epoch": 0, "lr": 5e-4, "l_pix": 0.02, "images_per_s": 80.5}``; of validation:
    ``{"iter": 5000, "dataset": "Set5", "psnr": 37.9, "ssim": 0.96, "bicubic": {"psnr": 33.7}}``. Numbers
    that are not finite are written as null.

    A line is in the file, safe from the death of the process, when `append` returns. What cannot be written (full disk)
    is lost with one warning: no training ends for it. Only one process of a distributed run may write. The file need
    not exist, its folder has to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line. Values: numbers, also numpy's and one-element tensors, text, and lists and mappings of these."""
        line = _line({key: _plain(value) for key, value in record.items()})
        with self._warning(), open(self.path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line was cut off
                    line = b"\n" + line
            file.write(line)

    def records(self) -> list[dict[str, Any]]:
        """All records; a line that was cut off, when the process was killed or the disk was full, is left out."""
        lines: list[bytes] = []
        with self._warning(), suppress(FileNotFoundError):
            lines = read_regular(self.path).splitlines()
        return [record for line in lines if (record := _parse(line)) is not None]

    def truncate(self, iteration: int) -> None:
        """Drop what is later than `iteration`: a run resumed there does it again."""
        records = self.records()
        kept = [record for record in records if record["iter"] <= iteration]
        if len(kept) < len(records):
            with self._warning():
                write_atomically(self.path, b"".join(map(_line, kept)))

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """One warning for all errors of the file system."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logging.getLogger("basicsr").warning(
                    "%s cannot be read or written (%s): numbers of this training may be missing there. It goes on.",
                    self.path,
                    error.strerror or error,
                )
            self._warned = True


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("iter"), int) else None


def _plain(value: Any) -> Any:
    """What JSON can hold: Python's own numbers, and null for those that are not finite."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
