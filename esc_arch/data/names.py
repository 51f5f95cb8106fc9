"""Names that come with data, made fit to be names of files: what is written stays in the folder it is meant for."""

from __future__ import annotations

import hashlib
import os
import re

__all__ = ["image_name", "shown"]

#: Bytes. File systems take 255, of which an iteration or a suffix and `.png` need some.
_LONGEST = 160
#: What no file name, log line or TensorBoard tag should have: control characters, and bytes that are no UTF-8.
_UNFIT = re.compile(r"[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff/\\]")


def image_name(path: str | os.PathLike[str]) -> str:
    """The name by which an image is known where results of it are written: that of its file, without the suffix.

    Names as people give them stay as they are. Characters that are unfit for file names become `_`, and long names are
    cut; a digest then tells them from others that would look the same. The result is never empty, `.` or `..`, and has
    no separator: joined to a folder, it is in this folder.

    Args:
        path: a file, or the key in an LMDB. Nothing is looked up.
    """
    stem = os.path.splitext(os.path.basename(os.fspath(path)))[0]
    name = _UNFIT.sub("_", stem)
    if name == stem and name.strip(".") and len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    cut = name.strip(".").encode()[: _LONGEST - len(digest) - 1].decode(errors="ignore")
    return f"{cut or 'image'}_{digest}"


def shown(name: object) -> str:
    """A name as messages are to have it: on one line, and nothing in it that a terminal would obey."""
    text = str(name)
    return text if text.isprintable() else ascii(text)[1:-1]
