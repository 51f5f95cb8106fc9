"""Making what BasicSR trains on: LMDBs of sub-images, by scale; 1 stands for HR."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from esc_arch.atomic_io import locked

from ..errors import UserError
from .image_files import (
    IMAGE_SUFFIXES,
    Image,
    Source,
    checked_scales,
    digest_of,
    downscale,
    encode_png,
    folder_sources,
    keys_of,
    read_hr,
    sub_image_starts,
)
from .lmdb_writer import LmdbSettings, LmdbWriter, why_not_reusable
from .worker_pool import map_in_order, progress_bar

__all__ = ["match_lr", "prepare_train", "train_lmdbs"]

FORMAT = 1
"""Increase it when the same images and settings come to give other data; older data are then not taken as equal."""
WRITE_BYTES = 2**25
"""How much may be lost by a kill: LMDB waits for the disk, which for every small image would take longest."""


def train_lmdbs(out: Path, name: str, scales: Iterable[int]) -> dict[int, Path]:
    """Where :func:`prepare_train` writes, by scale."""
    return {1: out / f"{name}_HR_sub.lmdb"} | {s: out / f"{name}_LR_bicubic_X{s}_sub.lmdb" for s in scales}


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
    bicubic) and cut at corresponding places. See :class:`.lmdb_writer.LmdbWriter` for what an interruption leaves.
    Existing LMDBs that were made with the same settings are kept.

    Args:
        sources: the HR images.
        out, name: where the LMDBs are written, see :func:`train_lmdbs`.
        crop_size: side of an HR sub-image in pixels; a multiple of all scales. Smaller images are one sub-image.
        overlap: of neighbouring sub-images in pixels; `crop_size` less this is a multiple of all scales too.
        lr_folders: for some scales a folder of LR images to use, instead of reducing the HR images.
        jobs: number of processes.
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
    keys = keys_of(sources)
    given = {scale: match_lr(sources, folder, scale) for scale, folder in (lr_folders or {}).items()}
    if not given.keys() <= set(scales):
        raise UserError(f"LR folders are given for the scales {sorted(given)}, but the scales are {list(scales)}.")

    lmdbs = train_lmdbs(out, name, scales)
    settings: dict[int, LmdbSettings] = {
        scale: {
            "format": FORMAT,
            "basicsr": basicsr.__version__,
            "scale": scale,
            "images": len(sources),
            "digest of the images' names, sizes and times": digest_of(sources),
            "digest of the given LR images": digest_of(given[scale].values()) if scale in given else None,
            "HR size multiple": multiple,
            "crop size": crop_size,
            "overlap": overlap,
        }
        for scale in lmdbs
    }
    with locked(out), ExitStack() as stack:
        wanted = _lmdbs_to_make(lmdbs, settings, overwrite)
        writers = {scale: stack.enter_context(LmdbWriter(lmdbs[scale], settings[scale])) for scale in wanted}
        if writers:
            images = [
                _TrainImage(source, keys[source.name], {scale: found[source.name] for scale, found in given.items()})
                for source in sources
            ]
            cut = partial(_sub_images, scales=scales, wanted=wanted, crop_size=crop_size, overlap=overlap)
            _write_lmdbs(writers, cut, images, jobs)
    return lmdbs


def match_lr(sources: Iterable[Source], folder: Path, scale: int) -> dict[str, Source]:
    """The LR image in `folder` of every HR image, by the HR image's name: ``0001x2`` or ``0001`` for ``0001``."""
    by_stem = {lr.stem: lr for lr in folder_sources(folder)}
    matches = {}
    for source in sources:
        lr = by_stem.get(f"{source.stem}x{scale}") or by_stem.get(source.stem)
        if lr is None:
            raise UserError(
                f"{folder} has no LR image of scale {scale} for {source.name}. Its name must be "
                f"{source.stem}x{scale} or {source.stem}, with one of {' '.join(IMAGE_SUFFIXES)}."
            )
        matches[source.name] = lr
    return matches


class _TrainImage(NamedTuple):
    """An HR image, the beginning of its sub-images' keys, and the LR images that are given, by scale."""

    hr: Source
    key: str
    given: Mapping[int, Source]


def _sub_images(
    image: _TrainImage, *, scales: Sequence[int], wanted: Sequence[int], crop_size: int, overlap: int
) -> dict[int, dict[str, bytes]]:
    """All sub-images of an image, row by row, as PNG by key and scale; lengths are in HR pixels."""
    hr = read_hr(image.hr, scales)
    made = {}
    for scale in wanted:
        if scale in image.given:
            whole = _given_lr(image, hr, scale, spare=math.lcm(*scales) // scale)
        else:
            whole = hr if scale == 1 else downscale(hr, scale)
        size, step = crop_size // scale, (crop_size - overlap) // scale
        tops, lefts = (sub_image_starts(length, size, step) for length in whole.shape[:2])
        pieces = (whole[top : top + size, left : left + size] for top in tops for left in lefts)
        made[scale] = {f"{image.key}_s{index:03d}": encode_png(piece) for index, piece in enumerate(pieces, start=1)}
    return made


def _given_lr(image: _TrainImage, hr: Image, scale: int, spare: int) -> Image:
    """The LR image that is given, without up to `spare` rows and columns that the cropped HR image does not have."""
    lr = image.given[scale].read()
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    if not (0 <= lr.shape[0] - height <= spare and 0 <= lr.shape[1] - width <= spare):
        raise UserError(
            f"The LR image {image.given[scale].name} has {lr.shape[0]} x {lr.shape[1]} pixels (height x width) "
            f"and does not fit {image.hr.name} at scale {scale}: {height} x {width} pixels are needed, and "
            f"no more than {spare} can be cut off. Replace or remove both."
        )
    return lr[:height, :width]


def _lmdbs_to_make(lmdbs: Mapping[int, Path], settings: Mapping[int, LmdbSettings], overwrite: bool) -> list[int]:
    """The scales whose LMDB does not exist yet."""
    wanted, in_the_way = [], []
    for scale, path in lmdbs.items():
        if not os.path.lexists(path):  # a link whose target is away for now is in the way, too
            wanted.append(scale)
        elif reason := why_not_reusable(path, settings[scale]):
            wanted.append(scale)
            in_the_way.append(f"{path} exists, and {reason}.")
        else:
            print(f"{path} is complete already.")
    if in_the_way and not overwrite:
        raise UserError("\n".join([*in_the_way, "Give --overwrite to replace it, or another folder or name."]))
    return wanted


def _write_lmdbs(
    writers: Mapping[int, LmdbWriter],
    cut: Callable[[_TrainImage], dict[int, dict[str, bytes]]],
    images: Sequence[_TrainImage],
    jobs: int,
) -> None:
    # All sub-images of an image are written together
    finished = set.intersection(*({key.rpartition("_s")[0] for key in writer.sizes} for writer in writers.values()))
    remaining = [image for image in images if image.key not in finished]
    pending: dict[int, dict[str, bytes]] = {scale: {} for scale in writers}
    with (
        progress_bar(len(images), len(images) - len(remaining)) as progress,
        closing(map_in_order(cut, remaining, jobs)) as results,
    ):
        for number, made in enumerate(results, start=1):
            for scale in writers:
                pending[scale] |= made[scale]
            size = sum(len(png) for of_scale in pending.values() for png in of_scale.values())
            if size >= WRITE_BYTES or number == len(remaining):
                for scale, writer in writers.items():
                    writer.write(pending[scale])
                    pending[scale].clear()
            progress.update()
    for writer in writers.values():
        writer.finish()
