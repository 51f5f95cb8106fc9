"""Feature maps that are read and written a region at a time, in memory or in temporary files."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from esc_arch.archs.heads import Region
from esc_arch.errors import UserError

from .memory import format_memory

__all__ = ["FeatureMap"]


class FeatureMap:
    """(1, C, H, W), with the channels innermost, in memory or in a temporary file.

    Args:
        device: where what is read goes.
        folder: where the file is; None for memory. The file has no name, and ends with the process or the map.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device, folder: Path | None = None
    ) -> None:
        shape = (*size, channels)
        self.dtype, self.device = dtype, device
        self._mapped: mmap.mmap | None = None
        if folder is None:
            self._rows = torch.empty(shape, dtype=dtype)
        else:
            self._mapped = _mapped_file(folder, size[0] * size[1] * channels * dtype.itemsize)
            self._rows = torch.frombuffer(self._mapped, dtype=dtype).view(shape)

    def read(self, region: Region) -> Tensor:
        """A region (1, C, h, w), channels_last, as a tensor of its own."""
        part = self._part(region)
        pinned = self.device.type == "cuda"  # where a GPU can fetch it from by itself
        rows = torch.empty(part.shape, dtype=self.dtype, pin_memory=pinned).copy_(part)
        self._untouch()
        return rows.permute(2, 0, 1)[None].to(self.device, non_blocking=pinned)

    def write(self, region: Region, x: Tensor) -> None:
        """Set a region to x (1, C, h, w)."""
        self._part(region).copy_(x[0].permute(1, 2, 0))
        self._untouch()

    def _part(self, region: Region) -> Tensor:
        return self._rows[region.top : region.bottom, region.left : region.right]

    def _untouch(self) -> None:
        # Pages that were touched count as memory of the process
        if self._mapped is not None and sys.platform != "win32":
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Give back what it takes. It must not be used after."""
        self._rows, self._mapped = torch.empty(0), None


def _mapped_file(folder: Path, size: int) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="esc_arch_") as file:
            if hasattr(os, "posix_fallocate"):  # writing to a mapped file for which there is no room ends the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UserError(
            f"scratch: a temporary file of {format_memory(size)} for features cannot be made in {folder}: "
            f"{error.strerror}. Make room there, name another folder (scratch), or allow more memory (max_memory)."
        ) from error
