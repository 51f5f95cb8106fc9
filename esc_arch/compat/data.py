"""Patches for `basicsr.data`: which images are read, in which order, and how workers draw from them."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from basicsr.utils import scandir

from esc_arch.data.hr_images import as_list
from esc_arch.data.image_files import IMAGE_SUFFIXES
from esc_arch.data.names import read_names
from esc_arch.data.worker_pool import require_open_files
from esc_arch.errors import UserError
from esc_arch.training.data_order import SeededDataset
from esc_arch.training.stopping import shield_worker

from .files import require_sound
from .patches import Original, patch


@patch("basicsr.data", "build_dataset", "a data set whose LMDB is damaged is named")
def build_dataset(original: Original, dataset_opt: dict[str, Any]) -> Any:
    if (dataset_opt.get("io_backend") or {}).get("type") == "lmdb":
        # Here, in the main process, once for all workers
        for key, roots in dataset_opt.items():
            for root in as_list(roots) if key.startswith("dataroot") else ():
                require_sound(str(root))
    return original(dataset_opt)


@patch("basicsr.data", "build_dataloader", "samples depend on no workers, processes and interruptions")
def build_dataloader(
    original: Original, dataset: Any, dataset_opt: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    if dataset_opt["phase"] == "train":
        dataset = SeededDataset(dataset)
    loader = original(dataset, dataset_opt, *args, **kwargs)
    require_open_files(loader.num_workers, "datasets: train: num_worker_per_gpu")
    return loader


@patch("basicsr.data", "worker_init_fn", "workers draw other random crops in every epoch")
def worker_init_fn(_: Original, worker_id: int, num_workers: int, rank: int, seed: int) -> None:
    shield_worker()
    # torch gives every worker of every epoch a seed of its own, which follows from the run's seed and rank
    own = torch.initial_seed() % 2**32
    np.random.seed(own)
    random.seed(own)


@patch("basicsr.data.data_util", "scandir", "the order of a folder's images does not depend on the file system")
def sorted_scandir(original: Original, *args: Any, **kwargs: Any) -> list[str]:
    return sorted(original(*args, **kwargs))


@patch("basicsr.data.data_util", "paired_paths_from_meta_info_file", "names in lists may have blanks")
def paired_paths_from_meta_info_file(
    _: Original, folders: list[str], keys: list[str], meta_info_file: str, filename_tmpl: str
) -> list[dict[str, str]]:
    paths = []
    for name in read_names(meta_info_file):
        stem, suffix = os.path.splitext(os.path.basename(name))
        lq, gt = os.path.join(folders[0], filename_tmpl.format(stem) + suffix), os.path.join(folders[1], name)
        paths.append({f"{keys[0]}_path": lq, f"{keys[1]}_path": gt})
    return paths


@patch("basicsr.data.single_image_dataset", "SingleImageDataset.__init__", "names in lists may have blanks")
def single_image_init(original: Original, self: Any, opt: dict[str, Any]) -> None:
    original(self, {key: value for key, value in opt.items() if key != "meta_info_file"})
    self.opt = opt
    if opt["io_backend"]["type"] != "lmdb" and (listed := opt.get("meta_info_file")) is not None:
        self.paths = [os.path.join(opt["dataroot_lq"], name) for name in read_names(listed)]


@patch("basicsr.data.realesrgan_dataset", "RealESRGANDataset.__init__", "without meta_info, all images are read")
def realesrgan_init(original: Original, self: Any, opt: dict[str, Any]) -> None:
    original(self, {**opt, "meta_info": os.devnull})
    self.opt = opt
    if opt["io_backend"]["type"] != "lmdb":
        root, listed = opt["dataroot_gt"], opt.get("meta_info")
        images = (name for name in scandir(root) if name.lower().endswith(IMAGE_SUFFIXES))
        names = images if listed is None else read_names(listed)
        self.paths = [os.path.join(root, name) for name in names]


@patch("basicsr.data.transforms", "paired_random_crop", "a patch that cannot be cut names its image")
def paired_random_crop(
    original: Original, img_gts: Any, img_lqs: Any, gt_patch_size: int, scale: int, gt_path: str | None = None
) -> Any:
    try:
        return original(img_gts, img_lqs, gt_patch_size, scale, gt_path)
    except ValueError as error:
        raise UserError(
            f"No patch of gt_size {gt_patch_size} can be cut from {gt_path or 'an image'} (LQ {_size(img_lqs)}, GT "
            f"{_size(img_gts)}, width x height): GT must be exactly {scale} times LQ, and at least {gt_patch_size} on "
            f"each side. Lower datasets: train: gt_size, or fix the image."
        ) from error


def _size(images: Any) -> str:
    image = images[0] if isinstance(images, list) else images
    height, width = image.shape[-2:] if torch.is_tensor(image) else image.shape[:2]
    return f"{width} x {height}"
