"""Lists of images (``meta_info``), a text file with a name at the beginning of each line."""

from __future__ import annotations

import re

from ..errors import UserError
from .image_files import IMAGE_SUFFIXES

__all__ = ["read_names"]

#: What follows a name: the size of the image, as BasicSR's scripts write it, `(height,width,channels)`.
_SIZE = re.compile(r"\s+\(\d+,\s*\d+(,\s*\d+)?\)(?=\s|$)")
_SUFFIXES = "|".join(map(re.escape, IMAGE_SUFFIXES))
#: A name may have blanks; without a size it ends with the first suffix of an image that a blank or nothing follows.
_NAME = re.compile(rf".+?(?:{_SUFFIXES})(?=\s|$)", re.IGNORECASE)


def read_names(file: str) -> list[str]:
    """The names in a list, in its order, without empty lines; UserError if the file cannot be read."""
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as lines:
            return [_name(line.strip()) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"Cannot read the list of images {file}: {error.strerror}.") from error


def _name(line: str) -> str:
    if size := _SIZE.search(line):
        return line[: size.start()]
    found = _NAME.match(line)
    return found[0] if found else line.split()[0]
