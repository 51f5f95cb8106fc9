"""Bytes as text."""

from __future__ import annotations

__all__ = ["GIB", "MIB", "size_text"]

MIB, GIB = 2**20, 2**30


def size_text(size: float) -> str:
    """Such as 1.5 GiB."""
    for unit, of in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if size >= of:
            return f"{size / of:.1f} {unit}"
    return f"{size:.0f} bytes"
