"""Names that come with data: read from lists, and made fit to be names of files, in the folder that is meant."""

from __future__ import annotations

import hashlib
import os
import re

from ..errors import UserError
from .image_files import IMAGE_SUFFIXES

__all__ = ["image_name", "read_names"]

#: Bytes. File systems take 255, of which an iteration or a suffix and `.png` need some.
_LONGEST = 160
#: What no file name, log line or TensorBoard tag should have: control characters, and bytes that are no UTF-8.
_UNFIT = re.compile(r"[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff/\\]")


def image_name(path: str | os.PathLike[str]) -> str:
    """The name by which an image is known where results of it are written: that of its file, without the suffix.

    Names as people give them stay as they are. Characters that are unfit for file names become `_`, and long names are
    cut; a digest then tells them from others that would look the same. The result is never empty, `.` or `..`, and has
    no separator: joined to a folder, it is in this folder. `path` is a file or a key in an LMDB.
    """
    stem = os.path.splitext(os.path.basename(os.fspath(path)))[0]
    name = _UNFIT.sub("_", stem)
    if name == stem and name.strip(".") and len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    cut = name.strip(".").encode()[: _LONGEST - len(digest) - 1].decode(errors="ignore")
    return f"{cut or 'image'}_{digest}"


#: What follows a name in a list: the size of the image, as BasicSR's scripts write it, `(height,width,channels)`.
_SIZE = re.compile(r"\s+\(\d+,\s*\d+(,\s*\d+)?\)(?=\s|$)")
#: A name may have blanks; without a size it ends with the first suffix of an image that a blank or nothing follows.
_NAME = re.compile(rf".+?(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?=\s|$)", re.IGNORECASE)


def read_names(file: str) -> list[str]:
    """The names of images at the beginning of a list's lines (``meta_info``); UserError if it cannot be read."""
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as lines:
            return [_listed_name(line.strip()) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"Cannot read the list of images {file}: {error.strerror}.") from error


def _listed_name(line: str) -> str:
    if size := _SIZE.search(line):
        return line[: size.start()]
    found = _NAME.match(line)
    return found[0] if found else line.split()[0]
