"""Feature maps that are read and written a region at a time, in memory or in temporary files."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from esc_arch.archs.heads import Region
from esc_arch.errors import UserError

from .memory import format_memory

__all__ = ["FeatureMap", "FeatureMapInFile", "check_space"]


class FeatureMap:
    """(1, C, H, W), with the channels innermost, in memory.

    Args:
        pinned: what is read lies where a GPU can fetch it from by itself.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], dtype: torch.dtype, *, pinned: bool = False, stored: bool = True
    ) -> None:
        self.shape, self.dtype, self.pinned = (*size, channels), dtype, pinned
        self._rows = torch.empty(self.shape if stored else 0, dtype=dtype)

    def read(self, region: Region, device: torch.device) -> Tensor:
        """A region (1, C, h, w), channels_last, as a tensor of its own."""
        rows = torch.empty((region.height, region.width, self.shape[2]), dtype=self.dtype, pin_memory=self.pinned)
        self._read(region, rows)
        return rows.permute(2, 0, 1)[None].to(device, non_blocking=self.pinned)

    def write(self, region: Region, x: Tensor) -> None:
        """Set a region to x (1, C, h, w)."""
        self._write(region, x[0].permute(1, 2, 0).to("cpu", self.dtype).contiguous())

    def _read(self, region: Region, rows: Tensor) -> None:
        rows.copy_(self._rows[region.top : region.bottom, region.left : region.right])

    def _write(self, region: Region, rows: Tensor) -> None:
        self._rows[region.top : region.bottom, region.left : region.right] = rows

    def close(self) -> None:
        """Give back what it takes. It must not be used after."""
        self._rows = torch.empty(0)


class FeatureMapInFile(FeatureMap):
    """In a temporary file without a name, which the system removes however the process ends.

    It is read and written explicitly: what of a mapped file has been touched counts as memory of the process.

    Args:
        folder: where the file is.
        needed: bytes of all files that are written side by side, for the message when there is no room.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        *,
        pinned: bool = False,
        folder: Path,
        needed: int,
    ) -> None:
        super().__init__(channels, size, dtype, pinned=pinned, stored=False)
        self.folder, self.needed = folder, needed
        with _writing(folder, needed):
            self._file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115  `close` closes it
                dir=folder, prefix="esc_arch_", buffering=0
            )

    def _read(self, region: Region, rows: Tensor) -> None:
        for part in self._parts(region, rows):
            while part:  # the system may give less than is asked for
                count = self._file.readinto(part)  # type: ignore[attr-defined]  # of unbuffered files
                if not count:
                    part[:] = bytes(len(part))  # beyond what has been written
                    break
                part = part[count:]

    def _write(self, region: Region, rows: Tensor) -> None:
        with _writing(self.folder, self.needed):
            for part in self._parts(region, rows):
                while part:
                    part = part[self._file.write(part) :]

    def _parts(self, region: Region, rows: Tensor) -> Iterator[memoryview]:
        """The bytes of `rows` that lie together in the file, which is moved there: a row, or all if rows are whole."""
        _, width, channels = self.shape
        pixel = channels * self.dtype.itemsize
        numbers = memoryview(rows.view(torch.uint8).numpy().reshape(-1).data)
        count, length = (1, rows.nbytes) if region.width == width else (region.height, region.width * pixel)
        for row in range(count):
            self._file.seek(((region.top + row) * width + region.left) * pixel)
            yield numbers[row * length : (row + 1) * length]

    def close(self) -> None:
        self._file.close()


def check_space(folder: Path, needed: int) -> None:
    """Check that temporary files have room.

    Raises:
        UserError: they have not, or there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"scratch: {folder} is not a folder; name one for temporary files of {format_memory(needed)}.")
    if shutil.disk_usage(folder).free < needed:
        raise _full(folder, needed)


def _full(folder: Path, needed: int) -> UserError:
    free = format_memory(shutil.disk_usage(folder).free)
    return UserError(
        f"The features of this image need {format_memory(needed)} of temporary files in {folder}, where {free} are "
        "free: make room, name another folder (scratch), or allow more memory (max_memory)."
    )


@contextmanager
def _writing(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder, needed) from error
        raise UserError(f"scratch: temporary files cannot be written in {folder}: {error}.") from error
