"""Replacements for functions of basicsr 1.4.2 that fail.

Each is put wherever basicsr's own modules hold the original, because most of them import functions by name. A
replacement that only adds a check or a message calls the original. What a run that works computes stays the same, but
for two faults: a run ended before `total_iter`, and its workers drew the same random crops in every epoch.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esc_arch.errors import UserError
from esc_arch.version import __version__

__all__ = ["PATCHES", "SUPPORTED_VERSION", "apply_patches", "patch"]

SUPPORTED_VERSION = "1.4.2"

logger = logging.getLogger("esc_arch")

#: (module, dotted name in it, maker of the replacement from the original, what it mends)
PATCHES: list[tuple[str, str, Callable[[Any], Any], str]] = []


def patch(module: str, name: str, mends: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Note the decorated function as the maker of a replacement: it gets the original and returns what replaces it."""

    def note(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        PATCHES.append((module, name, make, mends))
        return make

    return note


def apply_patches() -> None:
    """Put every replacement in place, once; does nothing for another version of basicsr, and says so."""
    version = getattr(sys.modules["basicsr"], "__version__", "unknown")
    if version != SUPPORTED_VERSION:
        logger.warning(
            "esc_arch mends faults of basicsr %s; this is %s, which is left as it is.", SUPPORTED_VERSION, version
        )
        return
    for module_name, name, make, mends in PATCHES:
        owner: Any = sys.modules[module_name]
        *parents, attribute = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        current = getattr(owner, attribute)
        original = getattr(current, "_esc_arch_original", current)  # after a re-import: never patch a patch
        replacement = make(original)
        replacement._esc_arch_original = original
        setattr(owner, attribute, replacement)
        if not parents:
            _replace_imported_names(attribute, current, replacement)
        logger.debug("basicsr: %s.%s replaced: %s", module_name, name, mends)


def _replace_imported_names(name: str, current: object, replacement: object) -> None:
    """`from basicsr.utils import f` in basicsr's modules made more names for the same function."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "basicsr" and getattr(module, name, None) is current:
            setattr(module, name, replacement)


@patch("basicsr.utils.logger", "get_env_info", "a run's log lists these replacements")
def _get_env_info(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_env_info() -> str:
        listed = "".join(f"\n\t{module}.{name}: {mends}" for module, name, _, mends in PATCHES)
        return f"{original()}\nesc_arch {__version__} replaces in basicsr {SUPPORTED_VERSION}:{listed}"

    return get_env_info


# --- resuming -----------------------------------------------------------------------------------------------------


@patch("basicsr.train", "load_resume_state", "resuming needs no GPU, and looks where this run writes")
def _load_resume_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
        from basicsr.utils import check_resume

        if opt["auto_resume"]:
            found = _newest_state(opt)
            if found is None:
                return None
            path, state = found
            opt["path"]["resume_state"] = str(path)
        elif opt["path"].get("resume_state"):
            state = _read_state(Path(opt["path"]["resume_state"]))
        else:
            return None
        root = opt["path"]["experiments_root"]
        if not os.path.isdir(root):
            raise UserError(
                f"{opt['path']['resume_state']} cannot be resumed under the name {opt['name']}: there is no folder "
                f"{root}, from which its networks would be read. Give name and path: experiments_root of the run "
                f"that saved it."
            )
        check_resume(opt, state["iter"])
        if state.get("manual_seed") is not None:
            opt["manual_seed"] = state["manual_seed"]  # the order of the data follows from it
        return state

    return load_resume_state


def _newest_state(opt: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest training state of a run that can be used, with its content; None when the run saved none."""
    folder = Path(opt["path"]["training_states"])
    paths = [path for path in folder.glob("*.state") if path.stem.isdigit()] if folder.is_dir() else []
    problems = []
    for path in sorted(paths, key=lambda path: int(path.stem), reverse=True):
        try:
            state = _read_state(path)
            _require_networks(opt, path, state["iter"])
            return path, state
        except UserError as error:
            problems.append(str(error))
            print(f"--auto_resume skips a state: {error}", file=sys.stderr, flush=True)
    if problems:  # going on would archive the very run that was to be continued
        raise UserError(f"--auto_resume found no usable state in {folder}: {' '.join(problems)} Nothing was changed.")
    return None


def _require_networks(opt: dict[str, Any], state: Path, iteration: int) -> None:
    """Whether the networks that were saved with a state are there: one may have met a full disk."""
    for network in (key.removeprefix("network_") for key in opt if key.startswith("network_") and opt[key]):
        path = Path(opt["path"]["models"], f"net_{network}_{iteration}.pth")
        if f"network_{network}" not in (opt["path"].get("ignore_resume_networks") or ()) and not path.is_file():
            raise UserError(f"{state} belongs to {path}, which is not there.")


def _read_state(path: Path) -> dict[str, Any]:
    from esc_arch.checkpoints import read_checkpoint

    state = read_checkpoint(path)
    if missing := {"epoch", "iter", "optimizers", "schedulers"} - state.keys():
        raise UserError(f"{path} is not a training state: it has no {', '.join(sorted(missing))}.")
    return state


@patch("basicsr.train", "copy_opt_file", "option files are UTF-8 whatever the locale")
def _copy_opt_file(original: Callable[..., Any]) -> Callable[..., Any]:
    from basicsr.utils.dist_util import master_only

    @master_only
    @functools.wraps(original)
    def copy_opt_file(opt_file: str, experiments_root: str) -> None:
        text = Path(opt_file).read_text(encoding="utf-8")
        header = f"# GENERATE TIME: {time.asctime()}\n# CMD:\n# {' '.join(sys.argv)}\n\n"
        Path(experiments_root, os.path.basename(opt_file)).write_text(header + text, encoding="utf-8")

    return copy_opt_file


@patch("basicsr.utils.logger", "get_root_logger", "log files are UTF-8 whatever the locale")
def _get_root_logger(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_root_logger(*args: Any, **kwargs: Any) -> logging.Logger:
        root: logging.Logger = original(*args, **kwargs)
        for handler in root.handlers:
            stream = getattr(handler, "stream", None)
            if isinstance(handler, logging.FileHandler) and isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8")
        return root

    return get_root_logger


# --- data -----------------------------------------------------------------------------------------------------------


class _NamedBytes(bytes):
    """File content that remembers where it is from, so that a decoding error can name it."""

    source: str


@patch("basicsr.utils.file_client", "FileClient.get", "a file or LMDB entry that is missing is named")
def _file_client_get(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get(self: Any, filepath: str, client_key: str = "default") -> bytes:
        try:
            content = original(self, filepath, client_key)
        except OSError as error:
            raise UserError(f"Cannot read the image {filepath}: {error.strerror or error}.") from error
        source = str(filepath)
        if self.backend == "lmdb":
            lmdb_path = self.client.paths.get(client_key, "the LMDB")
            source = f"{filepath} in {lmdb_path}"
            if content is None:
                raise UserError(
                    f"{lmdb_path} has no image {filepath!r}, though its meta_info.txt lists it: make it anew."
                )
        named = _NamedBytes(content)
        named.source = source
        return named

    return get


@patch("basicsr.utils.img_util", "imfrombytes", "an image that cannot be decoded is named")
def _imfrombytes(original: Callable[..., Any]) -> Callable[..., Any]:
    import cv2
    import numpy as np

    @functools.wraps(original)
    def imfrombytes(content: bytes, flag: str = "color", float32: bool = False) -> Any:
        try:
            image = original(content, flag, float32=False)
        except cv2.error:
            image = None
        if image is None:
            source = getattr(content, "source", "An image")
            raise UserError(
                f"{source} is not an image that OpenCV can read ({len(content):,} bytes): damaged, cut short or of "
                f"another format. Replace it or take it out of the data set."
            )
        return image.astype(np.float32) / 255.0 if float32 else image

    return imfrombytes


#: path -> environment. lmdb refuses a second environment of one file in one process, and counts those that a forked
#: worker inherited; without locks, as BasicSR opens them, a worker can read on through its parent's.
_ENVIRONMENTS: dict[str, Any] = {}


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
                try:
                    _ENVIRONMENTS[place] = lmdb.open(path, readonly=readonly, lock=lock, readahead=readahead, **kwargs)
                except lmdb.Error as error:
                    raise UserError(
                        f"Cannot open the LMDB {path}: {str(error).rstrip('.')}. Make it anew with `basicsr prepare`."
                    ) from error
            self._client[key] = _ENVIRONMENTS[place]

    return __init__


@patch("basicsr.data.data_util", "scandir", "the order of a folder's images does not depend on the file system")
def _scandir(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def scandir(*args: Any, **kwargs: Any) -> list[str]:
        return sorted(original(*args, **kwargs))

    return scandir


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
                f"datasets: train: gt_size, or mend the image."
            ) from error

    return paired_random_crop


# --- models ---------------------------------------------------------------------------------------------------------


@patch("basicsr.models.base_model", "BaseModel.get_optimizer", "every optimiser of torch.optim, AdamW among them")
def _get_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_optimizer(self: Any, optim_type: str, params: Any, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
        from esc_arch.training.optimizers import build_optimizer

        nets = [entry for entry in vars(self).values() if isinstance(entry, torch.nn.Module)]
        return build_optimizer(optim_type, params, nets=nets, lr=lr, **kwargs)

    return get_optimizer


@patch("basicsr.models.base_model", "BaseModel.setup_schedulers", "schedules of torch.optim.lr_scheduler")
def _setup_schedulers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup_schedulers(self: Any) -> None:
        from esc_arch.training.schedulers import BASICSR_SCHEDULERS, build_scheduler

        options = dict(self.opt["train"]["scheduler"])
        kind = options.pop("type")
        if kind in BASICSR_SCHEDULERS:
            original(self)
        else:
            self.schedulers += [build_scheduler(kind, optimizer, **options) for optimizer in self.optimizers]

    return setup_schedulers


@patch("basicsr.models.base_model", "BaseModel.get_bare_model", "a network wrapped by torch.compile can be saved")
def _get_bare_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_bare_model(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        while True:  # either wrapper may be the outer one
            inner = original(self, net)
            inner = getattr(inner, "_orig_mod", inner)
            if inner is net:
                return net
            net = inner

    return get_bare_model


@patch("basicsr.models.base_model", "BaseModel.model_to_device", "distributed training on CPUs")
def _model_to_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def model_to_device(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        if not self.opt["dist"] or self.device.type != "cpu":
            return original(self, net)
        from torch.nn.parallel import DistributedDataParallel

        find_unused = self.opt.get("find_unused_parameters", False)
        return DistributedDataParallel(net.to(self.device), find_unused_parameters=find_unused)

    return model_to_device


@patch("basicsr.models.base_model", "BaseModel.load_network", "checkpoints of every kind, and what does not fit")
def _load_network(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_network(
        self: Any, net: torch.nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
    ) -> None:
        from esc_arch.checkpoints import load_weights, read_checkpoint, select_weights

        net = self.get_bare_model(net)
        weights = select_weights(read_checkpoint(load_path), param_key, load_path)
        load_weights(net, weights, strict=strict, source=load_path)
        logging.getLogger("basicsr").info("Loaded %s from %s.", type(net).__name__, load_path)

    return load_network


@patch("basicsr.archs.vgg_arch", "VGGFeatureExtractor.__init__", "without a network, it says where VGG weights go")
def _vgg_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH

        try:
            original(self, *args, **kwargs)
        except OSError as error:  # URLError and time-outs are OSErrors
            hub = Path(torch.hub.get_dir(), "checkpoints")
            raise UserError(
                f"The VGG19 weights for the perceptual loss could not be downloaded ({error}). Get the file "
                f"vgg19-dcbb9e9d.pth (PyTorch's VGG19) on another machine and put it at "
                f"{Path(VGG_PRETRAIN_PATH).absolute()} or in {hub}."
            ) from error

    return __init__
