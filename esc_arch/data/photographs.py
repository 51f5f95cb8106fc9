"""A small data set of real photographs, which come with scikit-image, for trying things out without any download."""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import skimage.data

from ..errors import UserError
from .benchmark import prepare_benchmark
from .image_files import Image, Source

__all__ = ["TRAIN", "VALIDATION", "photograph_sources", "prepare_demo", "read_photograph"]

TRAIN = (
    "astronaut",
    "brick",
    "camera",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
)
"""Functions of skimage.data; esc_arch/checkpoints/weights/README.md has the licences. Left out: drawings, scanned text,
the retina, half of whose sub-images are black, and photographs without a licence (moon, stereo_motorcycle)."""

VALIDATION = ("chelsea", "coffee", "rocket")

CROP_SIZE = 240


def prepare_demo(out: Path, *, jobs: int = 1, overwrite: bool = False) -> tuple[dict[int, Path], dict[int, Path]]:
    """Make ``train_*_sub.lmdb`` in `out` and the benchmark ``val`` beside them, for the scales 2, 3 and 4.

    Returns what `prepare_train` and `prepare_benchmark` made, by scale. UserError as of these and `read_photograph`.
    """
    from .prepare import prepare_train  # which needs lmdb

    train, validation = photograph_sources(TRAIN), photograph_sources(VALIDATION)
    more: dict[str, Any] = {"jobs": jobs, "overwrite": overwrite}
    lmdbs = prepare_train(train, out, "train", crop_size=CROP_SIZE, overlap=CROP_SIZE // 2, **more)
    return lmdbs, prepare_benchmark(validation, out / "val", **more)


def photograph_sources(names: tuple[str, ...]) -> list[Source]:
    """The photographs `names`. Their pixels identify them, whichever version of scikit-image they come from."""
    digests = {name: hashlib.sha256(read_photograph(name).tobytes()).hexdigest() for name in names}
    return [Source(name, partial(read_photograph, name), (name, digest)) for name, digest in digests.items()]


def read_photograph(name: str) -> Image:
    """The photograph of the function ``skimage.data.NAME`` as (H, W, 3) uint8 BGR; grey as three equal channels.

    UserError if the installed scikit-image does not have it.
    """
    try:
        photograph = getattr(skimage.data, name)()
    except Exception as error:  # an old version has no such function, another would download the file and cannot
        raise UserError(
            f"The photograph {name!r} does not come with the installed scikit-image {version('scikit-image')} "
            f"({type(error).__name__}: {error}). Install scikit-image 0.21 or newer."
        ) from error
    return cv2.cvtColor(photograph, cv2.COLOR_GRAY2BGR if photograph.ndim == 2 else cv2.COLOR_RGB2BGR)
