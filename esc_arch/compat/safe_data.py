"""Replacements in basicsr 1.4.2 around reading data: what cannot be read is named, and no file can crash a training."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable
from typing import Any

import torch

from esc_arch.errors import UserError

from .patches import patch

__all__: list[str] = []

#: Bytes; OpenCV decodes no longer ones.
_LONGEST_FILE = 2**31 - 1


class _NamedBytes(bytes):
    """File content that remembers where it is from, so that a decoding error can name it."""

    source: str


@patch("basicsr.utils.file_client", "FileClient.get", "a file or LMDB entry that is missing is named")
def _file_client_get(original: Callable[..., Any]) -> Callable[..., Any]:
    import lmdb

    @functools.wraps(original)
    def get(self: Any, filepath: str, client_key: str = "default") -> bytes:
        from esc_arch.data.names import shown

        name = source = shown(filepath)
        try:
            if self.backend == "disk":
                _require_regular_file(str(filepath))
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

    return get


def _require_regular_file(path: str) -> None:
    """Refuse what opening would wait for (a pipe), what never ends (/dev/zero) and what is no image by its size alone.

    Raises:
        OSError: it cannot be looked at.
        ValueError: it is nothing of the kind, with the reason.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is a folder, a pipe or a device, not a file")
    if status.st_size > _LONGEST_FILE:
        raise ValueError(f"it has {status.st_size:,} bytes, more than OpenCV decodes")


@patch("basicsr.utils.img_util", "imfrombytes", "an image that cannot be decoded is named")
def _imfrombytes(original: Callable[..., Any]) -> Callable[..., Any]:
    import cv2
    import numpy as np

    @functools.wraps(original)
    def imfrombytes(content: bytes, flag: str = "color", float32: bool = False) -> Any:
        from esc_arch.data.decoding import reason_against

        source = getattr(content, "source", "An image")
        if isinstance(content, bytes) and (reason := reason_against(content)) is not None:
            raise UserError(f"{source} {reason}")
        try:
            image = original(content, flag, float32=False)
        except cv2.error:
            image = None
        if image is None:
            raise UserError(
                f"{source} is not an image that OpenCV can read ({len(content):,} bytes): damaged, cut short or of "
                f"another format. Replace it or take it out of the data set."
            )
        return image.astype(np.float32) / 255.0 if float32 else image

    return imfrombytes


#: path -> environment. lmdb refuses a second environment of one file in one process, and counts those that a forked
#: worker inherited; without locks, as BasicSR opens them, a worker can read on through its parent's.
_ENVIRONMENTS: dict[str, Any] = {}
#: What was found sound: path, size and time of change of its file. Forked workers need not look again.
_SOUND: set[tuple[str, int, int]] = set()


def require_sound(path: str) -> None:
    """Look through the LMDB at `path` before LMDB does, which a damaged file would make crash.

    Raises:
        UserError: it is damaged.
    """
    from esc_arch.data.lmdb_check import lmdb_problem

    try:
        status = os.stat(os.path.join(path, "data.mdb"))
    except OSError:  # LMDB has words for it
        return
    version = os.path.realpath(path), status.st_size, status.st_mtime_ns
    if version in _SOUND:
        return
    if (problem := lmdb_problem(path)) is not None:
        raise UserError(f"Cannot open the LMDB {path}: {problem}. Create it again: `basicsr prepare`.")
    _SOUND.add(version)


@patch("basicsr.utils.file_client", "LmdbBackend.__init__", "one LMDB can serve several data sets of a process")
def _lmdb_backend_init(original: Callable[..., Any]) -> Callable[..., Any]:
    import lmdb

    @functools.wraps(original)
    def __init__(
        self: Any,
        db_paths: str | list[str],
        client_keys: str | list[str] = "default",
        readonly: bool = True,
        lock: bool = False,
        readahead: bool = False,
        **kwargs: Any,
    ) -> None:
        keys = [client_keys] if isinstance(client_keys, str) else client_keys
        self.db_paths = [str(path) for path in ([db_paths] if isinstance(db_paths, str) else db_paths)]
        self.paths = dict(zip(keys, self.db_paths, strict=True))
        self._client = {}
        for key, path in self.paths.items():
            place = os.path.realpath(path)
            if place not in _ENVIRONMENTS:
                require_sound(path)
                try:
                    _ENVIRONMENTS[place] = lmdb.open(path, readonly=readonly, lock=lock, readahead=readahead, **kwargs)
                except lmdb.Error as error:
                    raise UserError(
                        f"Cannot open the LMDB {path}: {str(error).rstrip('.')}. Create it again: `basicsr prepare`."
                    ) from error
            self._client[key] = _ENVIRONMENTS[place]

    return __init__


@patch("basicsr.data.data_util", "scandir", "the order of a folder's images does not depend on the file system")
def _scandir(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def scandir(*args: Any, **kwargs: Any) -> list[str]:
        return sorted(original(*args, **kwargs))

    return scandir


@patch("basicsr.data.data_util", "paired_paths_from_meta_info_file", "names in lists may have blanks")
def _paired_paths_from_meta_info_file(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def paired_paths_from_meta_info_file(
        folders: list[str], keys: list[str], meta_info_file: str, filename_tmpl: str
    ) -> list[dict[str, str]]:
        from esc_arch.data.name_lists import read_names

        (input_folder, gt_folder), (input_key, gt_key) = folders, keys
        paths = []
        for name in read_names(meta_info_file):
            stem, suffix = os.path.splitext(os.path.basename(name))
            input_path = os.path.join(input_folder, filename_tmpl.format(stem) + suffix)
            paths.append({f"{input_key}_path": input_path, f"{gt_key}_path": os.path.join(gt_folder, name)})
        return paths

    return paired_paths_from_meta_info_file


def _with_optional_list(root_key: str, list_key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a data set with one folder: a list whose names may have blanks, or without one all files of the folder."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __init__(self: Any, opt: dict[str, Any]) -> None:
            from basicsr.utils import scandir

            from esc_arch.data.image_files import IMAGE_SUFFIXES
            from esc_arch.data.name_lists import read_names

            if opt["io_backend"]["type"] == "lmdb":
                original(self, opt)
                return
            original(self, {**opt, list_key: os.devnull})
            self.opt = opt
            root, list_file = opt[root_key], opt.get(list_key)
            if list_file is not None:
                names = read_names(list_file)
            else:
                names = sorted(scandir(root))
                if list_key == "meta_info":  # whose folder BasicSR itself does not go through: images alone
                    names = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
            self.paths = [os.path.join(root, name) for name in names]

        return __init__

    return make


patch("basicsr.data.single_image_dataset", "SingleImageDataset.__init__", "names in lists may have blanks")(
    _with_optional_list("dataroot_lq", "meta_info_file")
)
patch("basicsr.data.realesrgan_dataset", "RealESRGANDataset.__init__", "without meta_info, the folder is gone through")(
    _with_optional_list("dataroot_gt", "meta_info")
)


@patch("basicsr.data.transforms", "paired_random_crop", "a patch that cannot be cut names its image")
def _paired_random_crop(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def paired_random_crop(
        img_gts: Any, img_lqs: Any, gt_patch_size: int, scale: int, gt_path: str | None = None
    ) -> Any:
        try:
            return original(img_gts, img_lqs, gt_patch_size, scale, gt_path)
        except ValueError as error:
            gt, lq = ((images[0] if isinstance(images, list) else images) for images in (img_gts, img_lqs))
            sizes = "LQ {1} x {0}, GT {3} x {2}".format(
                *(lq.shape[-2:] if torch.is_tensor(lq) else lq.shape[:2]),
                *(gt.shape[-2:] if torch.is_tensor(gt) else gt.shape[:2]),
            )
            raise UserError(
                f"No patch of gt_size {gt_patch_size} can be cut from {gt_path or 'an image'} ({sizes}, width x "
                f"height): GT must be exactly {scale} times LQ, and at least {gt_patch_size} on each side. Lower "
                f"datasets: train: gt_size, or fix the image."
            ) from error

    return paired_random_crop


@patch("basicsr.data", "build_dataset", "a data set whose LMDB is damaged, or whose list is no text, is named")
def _build_dataset(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build_dataset(dataset_opt: dict[str, Any]) -> Any:
        if (dataset_opt.get("io_backend") or {}).get("type") == "lmdb":
            # Here, in the main process, once for all workers
            for root in (value for key, value in dataset_opt.items() if key.startswith("dataroot")):
                for path in root if isinstance(root, list) else [root]:
                    require_sound(str(path))
        try:
            return original(dataset_opt)
        except UnicodeDecodeError as error:
            raise UserError(
                f"The list of images of the data set {dataset_opt.get('name')} (its meta_info) is not "
                f"{error.encoding} text: {error.reason} at byte {error.start}. Save it as {error.encoding}."
            ) from error

    return build_dataset
