"""Whether benchmark data are those that published figures were measured on.

The common mistake is LR images that were not made by MATLAB's `imresize` (bicubic, antialiased): PSNR then differs by
tenths of a dB and more, and nothing says so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image as Pillow

from esc_arch.data.image_files import IMAGE_SUFFIXES, Image, read_image
from esc_arch.data.lmdb_writer import read_shapes
from esc_arch.errors import UserError
from esc_arch.ops.resize import matlab_resize, resize_matrix

__all__ = ["KNOWN_SETS", "Folders", "KnownSet", "Report", "Resampling", "check_folders", "check_lmdbs", "recognise"]

Size = tuple[int, int]
Levels = npt.NDArray[np.float32]
Resize = Callable[[Image, Size], npt.NDArray[np.generic]]


# --- what the sets are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownSet:
    """A data set that papers use.

    Attributes:
        images: how many it has.
        names: what its files are called, without suffix (a regular expression), and the same in words.
        source: who made it, by which to find it.
        crops: whether its images are no multiples of 12 as they are published.
    """

    images: int
    names: str
    in_words: str
    source: str
    crops: bool = True


KNOWN_SETS: Mapping[str, KnownSet] = {
    "Set5": KnownSet(
        5,
        "baby|bird|butterfly|head|woman",
        "baby, bird, butterfly, head, woman",
        "Bevilacqua et al., BMVC 2012, nonnegative neighbor embedding",
    ),
    "Set14": KnownSet(
        14,
        "baboon|barbara|bridge|coastguard|comic|face|flowers|foreman|lenna|man|monarch|pepper|ppt3|zebra",
        "baboon, barbara, bridge, coastguard, comic, face, flowers, foreman, lenna, man, monarch, pepper, ppt3, zebra",
        "Zeyde, Elad and Protter, Curves and Surfaces 2010, sparse representations",
    ),
    "B100": KnownSet(
        100,
        r"\d{4,6}",
        "numbers such as 101085",
        "the 100 test images of the Berkeley Segmentation Dataset BSDS300, Martin et al., ICCV 2001",
    ),
    "Urban100": KnownSet(
        100,
        r"img_?\d{3}",
        "img001 ... img100, also as img_001",
        "Huang, Singh and Ahuja, CVPR 2015, transformed self-exemplars (SelfExSR)",
    ),
    "Manga109": KnownSet(
        109,
        r".+",
        "titles such as ARMS, YumeiroCooking",
        "Matsui et al., Multimedia Tools and Applications 2017, sketch-based manga retrieval, who give it on request",
    ),
    "DIV2K_train": KnownSet(
        800,
        r"0[0-7]\d\d|0800",
        "0001 ... 0800",
        "Agustsson and Timofte, NTIRE 2017 at CVPR: the archives DIV2K_train_HR, DIV2K_train_LR_bicubic_X2, _X3, _X4",
        crops=False,
    ),
    "DIV2K_valid": KnownSet(
        100,
        r"08\d\d|0900",
        "0801 ... 0900",
        "Agustsson and Timofte, NTIRE 2017 at CVPR: the archives DIV2K_valid_HR, DIV2K_valid_LR_bicubic_X2, _X3, _X4",
        crops=False,
    ),
}
#: What files of published archives have after their names.
_SUFFIXES = r"(_HR|_GT|_SRF_[234]_HR)?"
#: To what `prepare benchmark --crop common` and BasicSR's data sets named GTmod12 crop.
_COMMON_MULTIPLE = 12


@dataclass(frozen=True)
class Folders:
    """HR images and their LR images of one scale.

    Attributes:
        template: how an LR file is called, after the name of the HR file, as `filename_tmpl` of option files.
    """

    name: str
    scale: int
    hr: Path
    lr: Path
    template: str

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Folders | None:
        """Those of a data set's section in an option file; None for other kinds than paired images in folders.

        Raises:
            TypeError, ValueError: it has no scale that is whole, or no folders.
        """
        backend = (section.get("io_backend") or {}).get("type", "disk")
        if backend != "disk" or section.get("type") != "PairedImageDataset":
            return None
        if not isinstance(section["scale"], int):
            raise ValueError("the scale is not whole")
        hr, lr = (Path(section.get(f"dataroot_{kind}")).expanduser() for kind in ("gt", "lq"))  # type: ignore[arg-type]
        return cls(str(section["name"]), section["scale"], hr, lr, str(section.get("filename_tmpl", "{}")))


@dataclass
class Report:
    """What was found of a set at a scale.

    Attributes:
        images: HR images that have LR images.
        hr_images: all of them.
        expected: images of the published set; None for one that is not known.
        resampling: what the LR images were made with; None if there was nothing to look at.
        problems: why published figures cannot be reproduced with it, each a sentence.
        notes: what is good to know.
    """

    name: str
    scale: int
    images: int = 0
    hr_images: int = 0
    expected: int | None = None
    resampling: str | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- what LR images were made with ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resampling:
    """What an LR image was made with.

    Attributes:
        name: in words.
        is_matlab: whether it is MATLAB's bicubic.
        rms: what is left, in grey levels (root of the mean square).
    """

    name: str
    is_matlab: bool
    rms: float


MATLAB = "MATLAB's bicubic"

#: Grey levels (RMS). Two computations of the same differ by a level where a value lies between two; a rounding between
#: rows and columns, as MATLAB's own for 8-bit images, makes it up to about 0.4.
_SAME = 0.1
_CLOSE = 0.6
#: What JPEG leaves may be this much of what it explains.
_EXPLAINED = 0.5
_JPEG_QUALITIES = range(30, 101, 5)
_LIKELY = 4
#: LR pixels: the side of the part in which shifts are looked for, and what the kernels reach from its borders.
_SHIFT_SIDE = 64
_REACH = 4


def recognise(hr: Image, lr: Image, scale: int) -> Resampling:
    """What `lr` (H, W, 3) was made with from `hr` (at least H * scale, W * scale), both uint8.

    Compared are MATLAB's, Pillow's, OpenCV's and PyTorch's ways on the top left H * scale x W * scale of `hr`; if none
    fits, MATLAB's of a shifted part of `hr`, and the nearest with JPEG after it.
    """
    size = lr.shape[0], lr.shape[1]
    part = hr[: size[0] * scale, : size[1] * scale]
    matlab = _rms(_matlab(part, size), lr)
    if matlab <= _SAME:
        return Resampling(MATLAB, True, matlab)
    errors = {name: _rms(resize(part, size), lr) for name, resize in CANDIDATES.items()}
    nearest = min(errors, key=errors.__getitem__)
    if errors[nearest] <= _CLOSE:
        return Resampling(nearest, nearest in _MATLAB_NAMES, errors[nearest])
    shift, shifted = _best_shift(hr, lr, scale)
    if shifted <= _CLOSE and shift != (0, 0):
        name = f"{MATLAB}, but of HR {_in_words(shift)}: HR and LR are cropped differently"
        return Resampling(name, False, shifted)
    # JPEG blurs: what it was applied to need not be the nearest itself
    likely = [*sorted(errors, key=errors.__getitem__)[:_LIKELY], MATLAB]
    compressed = {name: _best_jpeg(CANDIDATES[name](part, size), lr) for name in likely}
    name = min(compressed, key=lambda name: compressed[name][1])
    quality, error = compressed[name]
    if error <= _EXPLAINED * errors[nearest]:
        return Resampling(f"{name}, saved as JPEG (quality about {quality})", False, error)
    return Resampling(f"none of the known ways (the nearest is {nearest})", False, errors[nearest])


def _rms(made: npt.NDArray[np.generic], lr: Image) -> float:
    return float(np.sqrt(np.mean((made.astype(np.float32) - lr) ** 2)))


def _levels(values: Levels) -> Image:
    return cast(Image, np.clip(values, 0, 255).round().astype(np.uint8))


def _tensor(image: Image) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()


def _image(tensor: torch.Tensor) -> Image:
    return _levels(tensor[0].permute(1, 2, 0).numpy())


def _matlab(image: Image, size: Size) -> Image:
    return _image(matlab_resize(_tensor(image), size))


def _matlab_of_integers(image: Image, size: Size) -> Image:
    """As MATLAB does with 8-bit images: rounded when the height is done."""
    rows, columns = (resize_matrix(*sizes) for sizes in zip(image.shape[:2], size, strict=True))
    return _image((rows @ _tensor(image)).clamp(0, 255).round() @ columns.T)


def _pillow(filter_: Pillow.Resampling) -> Resize:
    return lambda image, size: np.asarray(Pillow.fromarray(image).resize((size[1], size[0]), filter_))


def _opencv(interpolation: int) -> Resize:
    return lambda image, size: cv2.resize(np.ascontiguousarray(image), (size[1], size[0]), interpolation=interpolation)


def _torch(mode: str, **options: bool) -> Resize:
    return lambda image, size: _image(F.interpolate(_tensor(image), size, mode=mode, **options))


_MATLAB_NAMES = (MATLAB, f"{MATLAB}, rounded between rows and columns")
#: By name; of equally near ones the first counts.
CANDIDATES: Mapping[str, Resize] = {
    _MATLAB_NAMES[0]: _matlab,
    _MATLAB_NAMES[1]: _matlab_of_integers,
    "Pillow's bicubic": _pillow(Pillow.Resampling.BICUBIC),
    "PyTorch's bicubic with antialias": _torch("bicubic", antialias=True),
    "OpenCV's INTER_CUBIC (no antialiasing)": _opencv(cv2.INTER_CUBIC),
    "PyTorch's bicubic without antialias": _torch("bicubic"),
    "PyTorch's bicubic with align_corners": _torch("bicubic", align_corners=True),
    "OpenCV's INTER_AREA (means of blocks)": _opencv(cv2.INTER_AREA),
    "OpenCV's INTER_LINEAR (no antialiasing)": _opencv(cv2.INTER_LINEAR),
    "Pillow's bilinear": _pillow(Pillow.Resampling.BILINEAR),
    "PyTorch's bilinear with antialias": _torch("bilinear", antialias=True),
    "Pillow's Lanczos": _pillow(Pillow.Resampling.LANCZOS),
    "OpenCV's INTER_LANCZOS4 (no antialiasing)": _opencv(cv2.INTER_LANCZOS4),
    "Pillow's Hamming": _pillow(Pillow.Resampling.HAMMING),
    "single pixels (nearest)": _opencv(cv2.INTER_NEAREST),
    "single pixels (nearest, of the middle)": _pillow(Pillow.Resampling.NEAREST),
}


def _best_shift(hr: Image, lr: Image, scale: int) -> tuple[tuple[int, int], float]:
    """By how many rows and columns of HR what MATLAB's bicubic was applied to lies further, and what is left then."""
    sizes = [min(length, _SHIFT_SIDE) for length in lr.shape[:2]]
    starts = [(length - size) // 2 for length, size in zip(lr.shape[:2], sizes, strict=True)]
    inner = np.s_[_REACH : sizes[0] - _REACH, _REACH : sizes[1] - _REACH]
    target = lr[starts[0] : starts[0] + sizes[0], starts[1] : starts[1] + sizes[1]][inner]
    best, least = (0, 0), np.inf
    if not target.size:
        return best, least
    more = [max(scale, total - length * scale) for total, length in zip(hr.shape[:2], lr.shape[:2], strict=True)]
    for down in range(-scale, more[0] + 1):
        for across in range(-scale, more[1] + 1):
            top, left = starts[0] * scale + down, starts[1] * scale + across
            part = hr[max(top, 0) : top + sizes[0] * scale, max(left, 0) : left + sizes[1] * scale]
            if top < 0 or left < 0 or part.shape[:2] != (sizes[0] * scale, sizes[1] * scale):
                continue
            error = _rms(_matlab(part, (sizes[0], sizes[1]))[inner], target)
            if error < least:
                best, least = (down, across), error
    return best, least


def _in_words(shift: tuple[int, int]) -> str:
    ways = (("up", "down"), ("left", "right"))
    return "moved " + " and ".join(f"{abs(by)} px {way[by > 0]}" for by, way in zip(shift, ways, strict=True) if by)


def _best_jpeg(made: npt.NDArray[np.generic], lr: Image) -> tuple[int, float]:
    """The quality at which `made` becomes most like `lr`, and what is left then."""
    errors = {}
    for quality in _JPEG_QUALITIES:
        _, data = cv2.imencode(".jpg", np.ascontiguousarray(made), [cv2.IMWRITE_JPEG_QUALITY, quality])
        errors[quality] = _rms(cast(Image, cv2.imdecode(data, cv2.IMREAD_COLOR)), lr)
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


# --- sets in folders ------------------------------------------------------------------------------------------------


def check_folders(
    folders: Folders, *, most: int | None = None, watch: Callable[[Sequence[Path]], Iterable[Path]] = iter
) -> Report:
    """Look into a set at a scale: its images, their names and sizes, and what the LR images were made with.

    Args:
        most: how many LR images are compared with HR, evenly chosen; None: all.
        watch: given the HR files that are compared, iterates over them (for a progress bar).
    """
    known = KNOWN_SETS.get(folders.name)
    report = Report(folders.name, folders.scale, expected=known.images if known else None)
    hr_files, lr_files = _images_in(folders.hr), _images_in(folders.lr)
    if not hr_files:
        report.problems.append(f"There are no HR images in {folders.hr}.{_where_from(known)}")
        return report
    report.hr_images = len(hr_files)
    if known is not None:
        _check_names(report, known, hr_files)
    if not lr_files:
        report.problems.append(f"There are no LR images in {folders.lr}.")
        return report
    pairs = {hr: folders.lr / (folders.template.format(hr.stem) + hr.suffix) for hr in hr_files}
    _check_partners(report, pairs, lr_files)
    pairs = {hr: lr for hr, lr in pairs.items() if lr in set(lr_files)}
    report.images = len(pairs)
    fitting = _check_sizes(report, pairs, folders.scale, cropped=known is not None and known.crops)
    step = 1 if most is None else -(-len(fitting) // most) or 1
    _check_resampling(report, {hr: pairs[hr] for hr in watch(fitting[::step])}, folders.scale)
    if step > 1:
        report.notes.append(f"Of its LR images every {step}th was compared with HR.")
    return report


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _where_from(known: KnownSet | None) -> str:
    return f" It is the set of {known.source}; its files: {known.in_words}." if known else ""


def _check_names(report: Report, known: KnownSet, files: Sequence[Path]) -> None:
    if len(files) != known.images:
        report.problems.append(
            f"It has {len(files)} HR images instead of {known.images}.{_where_from(known)}",
        )
    strange = [path.name for path in files if not re.fullmatch(f"({known.names}){_SUFFIXES}", path.stem, re.IGNORECASE)]
    if strange:
        report.notes.append(f"{_some(strange)} cannot be told by name; the set's files: {known.in_words}.")


def _check_partners(report: Report, pairs: Mapping[Path, Path], lr_files: Sequence[Path]) -> None:
    missing = [lr.name for lr in pairs.values() if lr not in set(lr_files)]
    strangers = [lr.name for lr in lr_files if lr not in set(pairs.values())]
    if missing:
        report.problems.append(f"LR images are missing: {_some(missing)}.")
    if strangers:
        report.problems.append(f"LR images belong to no HR image: {_some(strangers)}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_sizes(report: Report, pairs: Mapping[Path, Path], scale: int, *, cropped: bool) -> list[Path]:
    """The HR images whose LR images have the size that belongs to them."""
    sizes = {hr: (_size_of(hr), _size_of(lr)) for hr, lr in pairs.items()}
    wrong = {hr: both for hr, both in sizes.items() if not _fit(*both, scale)}
    if wrong:
        hr, (large, small) = next(iter(wrong.items()))
        report.problems.append(
            f"{len(wrong)} of {len(pairs)} LR images have the wrong size: {pairs[hr].name} has {_in_pixels(small)}, "
            f"but {hr.name} has {_in_pixels(large)}, of which x{scale} makes "
            f"{_in_pixels(_reduced(large, scale, scale))}."
        )
    multiples = [size % _COMMON_MULTIPLE == 0 for large, _ in sizes.values() for size in large]
    if cropped and len(sizes) > 2 and all(multiples):
        report.notes.append(
            f"All HR images are cropped to multiples of {_COMMON_MULTIPLE}; published figures are of images cropped "
            "for each scale by itself, so that means differ slightly. Create it again from whole HR images."
        )
    return [hr for hr in pairs if hr not in wrong]


def _fit(hr: Size, lr: Size, scale: int) -> bool:
    return lr in (_reduced(hr, scale, scale), _reduced(hr, _COMMON_MULTIPLE, scale))


def _reduced(hr: Size, multiple: int, scale: int) -> Size:
    height, width = (length // multiple * multiple // scale for length in hr)
    return height, width


def _size_of(path: Path) -> Size:
    try:
        with warnings.catch_warnings(), Pillow.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not an image that can be read: {error}. Replace or remove it.") from None


def _in_pixels(size: Size) -> str:
    return f"{size[1]} x {size[0]}"


def _check_resampling(report: Report, pairs: Mapping[Path, Path], scale: int) -> None:
    found: dict[str, list[Path]] = {}
    for hr, lr in pairs.items():
        resampling = recognise(read_image(hr), read_image(lr), scale)
        found.setdefault(MATLAB if resampling.is_matlab else resampling.name, []).append(lr)
    if not found:
        return
    others = sorted((name for name in found if name != MATLAB), key=lambda name: -len(found[name]))
    report.resampling = others[0] if others else MATLAB
    for name in others[:3]:
        names = [lr.name for lr in found[name]]
        report.problems.append(
            f"{len(names)} of {len(pairs)} LR images compared were not made by {MATLAB}, but by {name}: {_some(names)}."
        )


# --- prepared training data -----------------------------------------------------------------------------------------


def check_lmdbs(name: str, hr: Path, lr: Path, scale: int) -> Report:
    """Look into the sub-images that `basicsr prepare train` makes: of how many images they are, and their sizes.

    Args:
        hr, lr: LMDBs.
    """
    known = KNOWN_SETS.get(name)
    report = Report(name, scale, expected=known.images if known else None)
    missing = [str(path) for path in (hr, lr) if not (path / "meta_info.txt").is_file()]
    if missing:
        report.problems.append(f"{' and '.join(missing)} cannot be found, or was not made by basicsr prepare train.")
        return report
    large, small = read_shapes(hr), read_shapes(lr)
    report.images = len({key.rpartition("_s")[0] for key in large})
    if known is not None and report.images != known.images:
        report.problems.append(f"{hr} is of {report.images} images instead of {known.images}.{_where_from(known)}")
    if large.keys() != small.keys():
        report.problems.append(f"{lr} has other sub-images than {hr}.")
    wrong = [key for key in _shared(large, small) if _times(small[key], scale) != tuple(large[key][:2])]
    if wrong:
        report.problems.append(f"{len(wrong)} sub-images of {lr} have the wrong size for x{scale}: {_some(wrong)}.")
    report.notes.append("Sub-images are not compared; basicsr prepare train makes LR by MATLAB's bicubic, or of --lr.")
    return report


def _shared(first: Mapping[str, object], second: Mapping[str, object]) -> Iterator[str]:
    return (key for key in first if key in second)


def _times(shape: Sequence[int], scale: int) -> Size:
    return shape[0] * scale, shape[1] * scale
