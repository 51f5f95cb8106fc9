"""High-resolution images as data sets read them, from folders or LMDBs, one or several of them."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .image_files import IMAGE_SUFFIXES, Image
from .lmdb_check import listed_sizes
from .names import read_names

__all__ = ["HRImages", "as_list", "random_start"]


class HRImages:
    """The images under a data set's `dataroot_gt`, in a fixed order: root by root, and by name in each.

    Args:
        opt: a data set's options, of which these are used:

            - ``dataroot_gt``: a folder (searched with the folders in it) or an LMDB made for BasicSR, or a list of
              them, all of one kind.
            - ``io_backend``: ``type: disk`` (the default) or ``lmdb``, with arguments of BasicSR's backend.
            - ``meta_info_file``: for folders; a text file with names of images, relative to the root, at the
              beginning of lines; or a list with a file or null for each root. Only images that it names are used.

    Attributes:
        paths: of each image, the file, or its key in an LMDB.

    UserError if a root or a list is missing, has no images, or does not go with the others.
    """

    def __init__(self, opt: Mapping[str, Any]) -> None:
        roots = [str(root) for root in as_list(opt.get("dataroot_gt"))]
        if not roots:
            raise UserError("dataroot_gt is missing. Give the folder or the LMDB of the images, or a list of them.")
        self._backend = dict(opt.get("io_backend") or {"type": "disk"})
        lists = as_list(opt.get("meta_info_file"))
        if not lists or self._backend["type"] == "lmdb":  # which has a list of its own
            lists = [None] * len(roots)
        if len(lists) != len(roots) or not all(isinstance(entry, str | None) for entry in lists):
            raise UserError(
                f"meta_info_file is {opt['meta_info_file']!r}, for {len(roots)} entries of dataroot_gt. Give a "
                f"text file for each, or ~ for a folder whose images are all to be used."
            )
        self._places = [
            (root, path)
            for root, list_file in zip(roots, lists, strict=True)
            for path in self._paths_of(root, list_file)
        ]
        self.paths = [path for _, path in self._places]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image:
        """The image `index`: (H, W, 3), BGR in 0 .. 255; UserError if it is missing or cannot be decoded."""
        from basicsr.utils import FileClient, imfrombytes

        root, path = self._places[index]
        options = self._backend | ({"db_paths": root} if self._backend["type"] == "lmdb" else {})
        # Nothing is kept here, so that workers can have it; a process opens each LMDB once, see `compat.files`
        client = FileClient(options.pop("type"), **options)
        image: Image = imfrombytes(client.get(path))
        return image

    def _paths_of(self, root: str, list_file: str | None) -> list[str]:
        if self._backend["type"] == "lmdb":
            if not root.endswith(".lmdb") or not Path(root, "meta_info.txt").is_file():
                raise UserError(
                    f"{root} is not an LMDB that BasicSR can read: a folder NAME.lmdb with a meta_info.txt in it."
                )
            paths = list(listed_sizes(root))
        elif list_file is not None:
            paths = [os.path.join(root, name) for name in read_names(list_file)]
        else:
            paths = _images_below(root)
        if not paths:
            raise UserError(f"{root} holds no image ({' '.join(IMAGE_SUFFIXES)}). Give a folder or an LMDB that does.")
        return paths


def as_list(value: Any) -> list[Any]:
    """`value` itself if it is a list, a list of it alone otherwise; empty for None."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def random_start(image: Image, size: int, step: int, path: str) -> tuple[int, int]:
    """Top and left of a random patch of `size` x `size` pixels of `image` (H, W, 3), both multiples of `step`.

    Drawn with Python's `random`, which BasicSR seeds, the top first. UserError, with `path`, if the image is smaller.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise UserError(
            f"{path} has {height} x {width} pixels (height x width), fewer than the patches of {size} x {size} that "
            f"are cut from it. Remove it from the data set, or cut smaller patches."
        )
    return random.randint(0, (height - size) // step) * step, random.randint(0, (width - size) // step) * step


def _images_below(root: str) -> list[str]:
    """The image files in a folder and in the folders in it, sorted; nothing that is hidden."""
    if not os.path.isdir(root):
        raise UserError(f"{root} is not a folder. Relative paths start in the current folder.")
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        images = (name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
        found += [os.path.join(folder, name) for name in images]
    return sorted(found)
