"""Making what BasicSR trains on: LMDBs of sub-images, by scale; 1 stands for HR."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from esc_arch.atomic_io import locked

from ..errors import UserError
from ..printing import shown
from .image_files import (
    IMAGE_SUFFIXES,
    Image,
    Source,
    checked_scales,
    digest_of,
    downscale,
    encode_png,
    folder_sources,
    read_hr,
    refuse_equal,
    sub_image_starts,
)
from .lmdb_writer import LmdbWriter, why_not_reusable
from .worker_pool import map_in_order

__all__ = ["prepare_train"]

FORMAT = 1
"""Increase it when the same images and settings come to give other data; older data are then not taken as equal."""


def prepare_train(
    sources: Sequence[Source],
    out: Path,
    name: str,
    *,
    scales: Sequence[int] = (2, 3, 4),
    crop_size: int = 480,
    overlap: int = 240,
    lr_folders: Mapping[int, Path] | None = None,
    jobs: int = 1,
    overwrite: bool = False,
) -> dict[int, Path]:
    """Cut HR images and their LR images into the sub-images that training reads; returns the LMDBs by scale.

    Each image is cropped at the bottom and right to a multiple of all scales, reduced as a whole (MATLAB's
    bicubic) and cut at corresponding places. After an interruption, the same call continues; see `LmdbWriter`.
    LMDBs that were made with the same settings are kept.

    Args:
        out, name: the LMDBs are ``out/NAME_HR_sub.lmdb`` and, of scale S, ``out/NAME_LR_bicubic_XS_sub.lmdb``.
        crop_size: side of an HR sub-image in pixels; a multiple of all scales. Smaller images are one sub-image.
        overlap: of neighbouring sub-images in pixels; `crop_size` less this is a multiple of all scales too.
        lr_folders: for some scales a folder of LR images to use, instead of reducing the HR images.
        overwrite: replace LMDBs that were made with other settings, each when its new one is complete.

    UserError if a setting, an image or `out` cannot be used, or an LMDB exists and `overwrite` is not given.
    """
    import basicsr

    scales = checked_scales(scales)
    multiple = math.lcm(*scales)
    if not 0 <= overlap < crop_size:
        raise UserError(
            f"An overlap of {overlap} does not go with a crop size of {crop_size}: "
            "it must be at least 0 and less than the crop size."
        )
    for what, length in (("crop size", crop_size), ("step (crop size less overlap)", crop_size - overlap)):
        if length % multiple:
            raise UserError(
                f"The {what} is {length}, but must be a multiple of {multiple} for LR and HR to correspond "
                f"at the scales {', '.join(map(str, scales))}."
            )
    if not name or Path(name).name != name:
        raise UserError(f"The name {name!r} cannot begin a file name. Give --name without any folder.")
    refuse_equal(sources, lambda source: source.key)
    given = {scale: _match_lr(sources, folder, scale) for scale, folder in (lr_folders or {}).items()}
    if not given.keys() <= set(scales):
        raise UserError(f"LR folders are given for the scales {sorted(given)}, but the scales are {list(scales)}.")

    lmdbs = {1: out / f"{name}_HR_sub.lmdb"}
    lmdbs |= {scale: out / f"{name}_LR_bicubic_X{scale}_sub.lmdb" for scale in scales}
    settings: dict[int, dict[str, Any]] = {
        scale: {
            "format": FORMAT,
            "basicsr": basicsr.__version__,
            "scale": scale,
            "images": len(sources),
            "digest of the images' names, sizes and times": digest_of([source.identity for source in sources]),
            "digest of the given LR images": (
                digest_of([lr.identity for lr in given[scale]]) if scale in given else None
            ),
            "HR size multiple": multiple,
            "crop size": crop_size,
            "overlap": overlap,
        }
        for scale in lmdbs
    }
    with locked(out), ExitStack() as stack:
        wanted = _lmdbs_to_make(lmdbs, settings, overwrite)
        writers = {scale: stack.enter_context(LmdbWriter(lmdbs[scale], settings[scale])) for scale in wanted}
        if not writers:
            return lmdbs
        # All sub-images of an image are written together
        written = set.intersection(*({key.rpartition("_s")[0] for key in each.sizes} for each in writers.values()))
        remaining = [
            (source, {scale: lr_images[index] for scale, lr_images in given.items()})
            for index, source in enumerate(sources)
            if source.key not in written
        ]
        cut = partial(_sub_images, scales=scales, wanted=wanted, crop_size=crop_size, overlap=overlap)
        with map_in_order(cut, remaining, jobs, finished=len(sources) - len(remaining)) as results:
            for made in results:
                for scale, writer in writers.items():
                    writer.write(made[scale])
        for writer in writers.values():
            writer.finish()
    return lmdbs


def _match_lr(sources: Iterable[Source], folder: Path, scale: int) -> list[Source]:
    """The LR image in `folder` of every HR image: ``0001x2`` or ``0001`` for ``0001``."""
    by_stem = {lr.stem: lr for lr in folder_sources(folder)}
    matches = []
    for source in sources:
        lr = by_stem.get(f"{source.stem}x{scale}") or by_stem.get(source.stem)
        if lr is None:
            raise UserError(
                f"{folder} has no LR image of scale {scale} for {source.name}. Its name must be "
                f"{source.stem}x{scale} or {source.stem}, with one of {' '.join(IMAGE_SUFFIXES)}."
            )
        matches.append(lr)
    return matches


def _sub_images(
    task: tuple[Source, Mapping[int, Source]],
    *,
    scales: Sequence[int],
    wanted: Sequence[int],
    crop_size: int,
    overlap: int,
) -> dict[int, dict[str, bytes]]:
    """All sub-images of an HR image, row by row, as PNG by key and scale; for some scales, its LR image is given."""
    source, given = task
    hr = read_hr(source, scales)
    made = {}
    for scale in wanted:
        if scale in given:
            whole = _given_lr(given[scale], source, hr, scale, spare=math.lcm(*scales) // scale)
        else:
            whole = hr if scale == 1 else downscale(hr, scale)
        size, step = crop_size // scale, (crop_size - overlap) // scale
        tops, lefts = (sub_image_starts(length, size, step) for length in whole.shape[:2])
        pieces = (whole[top : top + size, left : left + size] for top in tops for left in lefts)
        made[scale] = {f"{source.key}_s{index:03d}": encode_png(piece) for index, piece in enumerate(pieces, start=1)}
    return made


def _given_lr(lr: Source, source: Source, hr: Image, scale: int, spare: int) -> Image:
    """The LR image that is given, without up to `spare` rows and columns that the cropped HR image does not have."""
    image = lr.read()
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    if not (0 <= image.shape[0] - height <= spare and 0 <= image.shape[1] - width <= spare):
        raise UserError(
            f"The LR image {lr.name} has {image.shape[0]} x {image.shape[1]} pixels (height x width) and does not fit "
            f"{source.name} at scale {scale}: {height} x {width} pixels are needed, and no more than {spare} can be "
            "cut off. Replace or remove both."
        )
    return image[:height, :width]


def _lmdbs_to_make(lmdbs: Mapping[int, Path], settings: Mapping[int, dict[str, Any]], overwrite: bool) -> list[int]:
    """The scales whose LMDB does not exist yet."""
    wanted, in_the_way = [], []
    for scale, path in lmdbs.items():
        if not os.path.lexists(path):  # a link whose target is away for now is in the way, too
            wanted.append(scale)
        elif reason := why_not_reusable(path, settings[scale]):
            wanted.append(scale)
            in_the_way.append(f"{path} exists, and {reason}.")
        else:
            print(f"{shown(path)} is complete already.")
    if in_the_way and not overwrite:
        raise UserError(*in_the_way, "Give --overwrite to replace it, or another folder or name.")
    return wanted
