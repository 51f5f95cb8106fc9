"""Patches for files in `basicsr.utils`: what cannot be read is named, none crashes a run, and none is overwritten."""

from __future__ import annotations

import itertools
import logging
import os
import stat
import sys
from pathlib import Path
from typing import IO, Any

import cv2
import lmdb
import numpy as np

from esc_arch.atomic_io import replacing
from esc_arch.data.decoding import decode
from esc_arch.data.hr_images import as_list
from esc_arch.data.lmdb_check import lmdb_problem
from esc_arch.errors import UserError
from esc_arch.printing import shown
from esc_arch.training.run import current_run

from .patches import Original, patch

__all__ = ["require_sound", "unused"]

#: Bytes; OpenCV decodes no longer files.
_LONGEST_FILE = 2**31 - 1

#: As BasicSR's function names them.
_FLAGS = {"color": cv2.IMREAD_COLOR, "grayscale": cv2.IMREAD_GRAYSCALE, "unchanged": cv2.IMREAD_UNCHANGED}

#: By path: the environment, its file and the file's size. lmdb refuses a second environment of a file in one process,
#: also in a forked worker, which can read on through its parent's, as BasicSR opens them without locks.
_ENVIRONMENTS: dict[str, tuple[Any, IO[bytes], int]] = {}

logger = logging.getLogger("basicsr")


class _NamedBytes(bytes):
    """File content that remembers where it is from, so that a decoding error can name it."""

    source: str


@patch("basicsr.utils.file_client", "FileClient.get", "a file or LMDB entry that is missing is named")
def get(original: Original, self: Any, filepath: str, client_key: str = "default") -> bytes:
    name = source = shown(filepath)
    try:
        if self.backend == "disk":
            status = os.stat(filepath)
            if not stat.S_ISREG(status.st_mode):  # opening would wait for a pipe, and /dev/zero never ends
                raise ValueError("it is a folder, a pipe or a device, not a file")
            if status.st_size > _LONGEST_FILE:
                raise ValueError(f"it has {status.st_size:,} bytes, more than OpenCV decodes")
        content = original(self, filepath, client_key)
    except OSError as error:
        raise UserError(f"Cannot read the image {name}: {error.strerror or error}.") from error
    except (lmdb.Error, UnicodeEncodeError, ValueError) as error:  # names that no file and no key can have
        raise UserError(f"Cannot read the image {name!r}: {error}.") from error
    if self.backend == "lmdb":
        lmdb_path = self.client.paths.get(client_key, "the LMDB")
        source = f"{name} in {lmdb_path}"
        if content is None:
            raise UserError(f"{lmdb_path} has no image {name!r}, but its meta_info.txt lists it: create it again.")
    named = _NamedBytes(content)
    named.source = source
    return named


@patch("basicsr.utils.file_client", "LmdbBackend.__init__", "one LMDB can serve several data sets of a process")
def lmdb_backend_init(_: Original, self: Any, db_paths: Any, client_keys: Any = "default", **options: Any) -> None:
    options = {"readonly": True, "lock": False, "readahead": False} | options
    self.db_paths = [str(path) for path in as_list(db_paths)]
    self.paths = dict(zip(as_list(client_keys), self.db_paths, strict=True))
    self._client, self._files = {}, {}
    for key, path in self.paths.items():
        place = os.path.realpath(path)
        if place not in _ENVIRONMENTS:
            require_sound(path)
            try:
                environment = lmdb.open(os.fsencode(path), **options)
            except lmdb.Error as error:
                raise UserError(f"Cannot open the LMDB {path}: {str(error).rstrip('.')}.") from error
            file = open(Path(path, "data.mdb"), "rb")  # noqa: SIM115  as long as the environment
            size = os.fstat(file.fileno()).st_size
            require_sound(path)  # again, for nothing but a `stat` unless it was cut short or changed meanwhile
            _ENVIRONMENTS[place] = environment, file, size
        self._client[key], *self._files[key] = _ENVIRONMENTS[place]


@patch("basicsr.utils.file_client", "LmdbBackend.get", "a file that is cut short meanwhile ends no process by SIGBUS")
def lmdb_get(original: Original, self: Any, filepath: str, client_key: str) -> Any:
    file, size = self._files[client_key]
    if (left := os.fstat(file.fileno()).st_size) < size:
        raise UserError(
            f"The LMDB {self.paths[client_key]} was cut short while it was read: data.mdb has {left:,} of {size:,} "
            "bytes. Create it again: `basicsr prepare`."
        )
    return original(self, filepath, client_key)


def require_sound(path: str) -> None:
    """Check the LMDB at `path` before LMDB opens it here, which a damaged file could make crash: UserError if it is."""
    if (problem := lmdb_problem(path)) is not None:
        raise UserError(f"Cannot open the LMDB {path}: {problem}. Create it again: `basicsr prepare`.")


@patch("basicsr.utils.img_util", "imfrombytes", "an image that cannot be decoded is named")
def imfrombytes(_: Original, content: bytes, flag: str = "color", float32: bool = False) -> Any:
    image = decode(content, getattr(content, "source", "An image"), _FLAGS[flag])
    return image.astype(np.float32) / 255.0 if float32 else image


@patch("basicsr.utils.img_util", "imwrite", "images are written whole, and end no training when they cannot be")
def imwrite(_: Original, img: Any, file_path: str, params: list[int] | None = None, auto_mkdir: bool = True) -> None:
    path = Path(file_path)
    encoded = cv2.imencode(path.suffix, img, params or [])[1]
    try:
        if auto_mkdir:
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False) as file:
            file.write(encoded.tobytes())
    except OSError as error:
        if current_run() is None:
            raise
        logger.error("The image %s was not written: %s. The training goes on.", path, error.strerror or error)


@patch("basicsr.utils.misc", "mkdir_and_rename", "what is archived never takes the place of an earlier archive")
def mkdir_and_rename(_: Original, path: str) -> None:
    if os.path.lexists(path):
        archive = unused(f"{path}_archived_{sys.modules['basicsr.utils.misc'].get_time_str()}")
        print(f"Path already exists. Rename it to {archive}", flush=True)
        os.rename(path, archive)
    os.makedirs(path, exist_ok=True)


def unused(path: str) -> str:
    """`path`, or the first of `path_2`, `path_3`, ... (before the suffix `.log`) that does not exist.

    Names made of the time can be taken: when runs begin within one second, or the clock was put back.
    """
    stem, suffix = path.removesuffix(".log"), ".log" if path.endswith(".log") else ""
    numbered = (f"{stem}_{number}{suffix}" for number in itertools.count(2))
    return path if not os.path.lexists(path) else next(name for name in numbered if not os.path.lexists(name))
