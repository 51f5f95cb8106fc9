"""What an LMDB lists, whether it can be read, and whether it has what it lists.

LMDB trusts its file, and a damaged one ends the process that reads it by a signal. Looked at are the pages of keys, not
the images: some hundred pages for a data set of tens of thousands. What is found sound makes LMDB read nothing outside
the file. The layout is that of LMDB 0.9 (data version 1) on 64-bit machines, the one that py-lmdb's releases have; see
`MDB_page`, `MDB_node`, `MDB_db` and `MDB_meta` in its source, mdb.c.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

__all__ = ["Contents", "contents_of", "listed_sizes", "lmdb_problem"]

_SHAPE = re.compile(r"\((\d+),\s*(\d+)")

_ORDER = "<" if sys.byteorder == "little" else ">"
#: Of a page: its number, padding, flags, where its free space begins and ends.
_HEADER = struct.Struct(f"{_ORDER}QHHHH")
#: Of a node: two halves of the data's size, flags, size of the key. In a branch the first three are a page's number.
_NODE = struct.Struct(f"{_ORDER}HHHH")
#: Magic, version, address, size of the map.
_META = struct.Struct(f"{_ORDER}IIQQ")
#: Of a tree: page size (of the first one), flags, depth, counts of branches, leaves, further pages and entries, root.
_TREE = struct.Struct(f"{_ORDER}IHHQQQQQ")
_NUMBER = struct.Struct(f"{_ORDER}Q")

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_METAS = 2
_NO_PAGE = 2**64 - 1
_BRANCH, _LEAF, _DIRTY = 1, 2, 16
_BIG = 1
_KNOWN_FLAGS = (0, _BIG, 2)
_SMALLEST_PAGE, _LARGEST_PAGE = 256, 2**15


class _DamageError(Exception):
    pass


def lmdb_problem(path: str | Path) -> str | None:
    """What is wrong with the file of an LMDB, without a full stop; None when it is sound or of another layout.

    Args:
        path: the folder of the LMDB.
    """
    try:
        with open(Path(path, "data.mdb"), "rb") as file:
            _Reader(file).check()
    except _DamageError as error:
        return str(error)
    except OSError as error:
        return f"data.mdb: {error.strerror or error}"
    return None


def listed_sizes(path: str | Path) -> dict[str, tuple[int, int] | None]:
    """The keys that an LMDB's meta_info.txt lists, by BasicSR's rule, with height and width where they are told.

    Its lines are like `0001.png (480,480,3) 1`.

    Raises:
        OSError: it cannot be read.
    """
    sizes: dict[str, tuple[int, int] | None] = {}
    with open(Path(path, "meta_info.txt"), encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            shape = _SHAPE.search(line)
            sizes[line.split(".")[0]] = (int(shape[1]), int(shape[2])) if shape else None
    return sizes


class Contents(NamedTuple):
    """What is in an LMDB, beside its list.

    Attributes:
        keys: how many there are.
        missing, unlisted: those of the list alone, and of the database alone.
        tried: how many images were decoded.
        bad: for those of them that are not as they should be, what is wrong, as `decoding.image_problem` says it.
    """

    keys: int
    missing: list[str]
    unlisted: list[str]
    tried: int
    bad: dict[str, str]


def contents_of(path: str | Path, listed: Mapping[str, tuple[int, int] | None], most: int) -> Contents:
    """Compare an LMDB in which `lmdb_problem` finds nothing with its list, as of `listed_sizes`.

    Args:
        most: so many images, from all over the list, are decoded.

    Raises:
        lmdb.Error: it cannot be opened.
    """
    import lmdb

    from .decoding import image_problem

    opened = lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
    with opened as environment, environment.begin() as transaction:
        keys = {bytes(key).decode(errors="surrogateescape") for key in transaction.cursor().iternext(values=False)}
        there = [key for key in listed if key in keys]
        chosen = there[:: max(1, -(-len(there) // most))]
        images = ((key, transaction.get(key.encode(errors="surrogateescape"), b"")) for key in chosen)
        bad = {key: problem for key, image in images if (problem := image_problem(image, listed[key]))}
    missing = [key for key in listed if key not in keys]
    return Contents(len(keys), missing, sorted(keys - listed.keys()), len(chosen), bad)


class _Reader:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = file.seek(0, 2)

    def check(self) -> None:
        """Walk from the root to all leaves."""
        if (root := self._root()) is None:
            return
        waiting, seen = [root], {root}
        while waiting:
            for child in self._children(waiting.pop()):
                if child in seen:
                    raise _DamageError(f"page {child} is in two places")
                seen.add(child)
                waiting.append(child)

    def _root(self) -> int | None:
        """The page that the keys begin at; None when there are none, or the layout is another."""
        first = self._read(0, _HEADER.size + _META.size + 2 * _TREE.size + 2 * _NUMBER.size)
        magic, version, *_ = _META.unpack_from(first, _HEADER.size)
        if magic != _MAGIC or version != _VERSION:  # which LMDB itself sees
            return None
        self._page_size, *_ = _TREE.unpack_from(first, _HEADER.size + _META.size)
        if not _SMALLEST_PAGE <= self._page_size <= _LARGEST_PAGE or self._page_size & (self._page_size - 1):
            raise _DamageError(f"its pages are said to have {self._page_size} bytes")
        metas = [self._read(number * self._page_size, len(first)) for number in range(_METAS)]
        after = _HEADER.size + _META.size + 2 * _TREE.size
        newest = max(metas, key=lambda meta: int(_NUMBER.unpack_from(meta, after + _NUMBER.size)[0]))
        self._pages = _NUMBER.unpack_from(newest, after)[0] + 1
        _, flags, *_, root = _TREE.unpack_from(newest, after - _TREE.size)
        if flags:
            raise _DamageError("it holds something else than images")
        return None if root == _NO_PAGE else self._within(root)

    def _children(self, number: int) -> Iterator[int]:
        """The pages below one, after a look at all of its nodes."""
        page = self._read(number * self._page_size, self._page_size)
        _, _, flags, lower, upper = _HEADER.unpack_from(page)
        flags &= ~_DIRTY
        if flags not in (_BRANCH, _LEAF) or not _HEADER.size < lower <= upper <= self._page_size:
            raise _DamageError(f"page {number} is no page of keys")
        count = (lower - _HEADER.size) // 2
        if count < (2 if flags == _BRANCH else 1):
            raise _DamageError(f"page {number} has too few keys")
        for start in struct.unpack_from(f"{_ORDER}{count}H", page, _HEADER.size):
            end = start + _NODE.size
            if not upper <= start <= self._page_size - _NODE.size:
                raise _DamageError(f"a key of page {number} is outside of it")
            low, high, node_flags, key_size = _NODE.unpack_from(page, start)
            end += key_size
            if flags == _BRANCH:
                self._require(end <= self._page_size, number)
                yield self._within(low | high << 16 | node_flags << 32)
            else:
                self._check_leaf(page, number, end, low | high << 16, node_flags)

    def _check_leaf(self, page: bytes, number: int, start: int, size: int, flags: int) -> None:
        """Whether what belongs to a key, at `start` of the page or in pages of its own, is in the file."""
        if flags not in _KNOWN_FLAGS:
            raise _DamageError(f"page {number} holds something else than images")
        if flags != _BIG:
            self._require(start + size <= self._page_size, number)
            return
        self._require(start + _NUMBER.size <= self._page_size, number)
        (first,) = _NUMBER.unpack_from(page, start)
        needed = -(-(_HEADER.size + size) // self._page_size)
        self._within(first)
        self._within(first + needed - 1)

    def _require(self, condition: bool, number: int) -> None:
        if not condition:
            raise _DamageError(f"an entry of page {number} is longer than the page")

    def _within(self, page: int) -> int:
        if not _METAS <= page < self._pages:
            raise _DamageError(f"it refers to page {page} of {self._pages}")
        # (Pages at the end that nothing refers to are never written)
        if (page + 1) * self._page_size > self._size:
            raise _DamageError(self._cut_short())
        return page

    def _read(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        content = self._file.read(size)
        if len(content) < size:
            raise _DamageError(self._cut_short())
        return content

    def _cut_short(self) -> str:
        return f"data.mdb was cut short: it has {self._size:,} bytes, and refers to what is behind them"
