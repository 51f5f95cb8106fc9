"""Weights from files into networks: read safely, recognised in all their wrappings, and checked before they are used.

A checkpoint is data, never code: only tensors and plain values are read. What does not fit is reported in full
instead of being skipped.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esc_arch.errors import UserError

__all__ = [
    "adapt_weights",
    "describe_mismatch",
    "load_weights",
    "mismatch_message",
    "read_checkpoint",
    "select_weights",
]

logger = logging.getLogger("basicsr")

#: Where toolboxes keep the weights within a file. BasicSR's own keys come first, the average before the raw ones.
PARAM_KEYS = ("params_ema", "params", "params-ema", "state_dict", "model_state_dict", "model", "net_g")
#: What wrappers (DataParallel, torch.compile) put before every name.
PREFIXES = ("module.", "_orig_mod.")
#: How many names a message lists before it says how many more there are.
LISTED = 8


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a ``.pth`` (also ``.pt``, ``.ckpt``, ``.state``) or ``.safetensors`` file, on the CPU.

    Raises:
        UserError: the file is missing, is no checkpoint (a web page, a Git LFS pointer, cut short), or holds
            anything but tensors and plain values, which could run code.
    """
    path = Path(path)
    if not path.is_file():
        what = (
            "is a folder, not a checkpoint file" if path.is_dir() else f"does not exist (looked at {path.absolute()})"
        )
        raise UserError(f"The checkpoint {path} {what}.")
    head = path.open("rb").read(512)
    if (problem := _not_a_checkpoint(path, head)) is not None:
        raise UserError(f"{path} is not a checkpoint: {problem}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Its text advises to load the file without this protection: only the name of what was refused is passed on
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is not None:
            raise UserError(
                f"{path} holds {refused[1]}. What is more than tensors and plain values could run code, so it was not "
                f"loaded. If you trust where the file comes from, save its state dict alone to a new file."
            ) from error
        raise UserError(f"{path} cannot be read: it is damaged, or was not written by torch.save.") from error
    except Exception as error:  # damaged files make the reader fail in about every way there is
        size = path.stat().st_size
        raise UserError(
            f"{path} ({size:,} bytes) is no checkpoint, or was cut short while it was saved or downloaded: "
            f"{type(error).__name__}: {_first_line(error)} Get it again."
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights.")
    return dict(content)


def select_weights(checkpoint: Mapping[str, Any], param_key: str | None, source: str | Path) -> dict[str, Tensor]:
    """The state dict within a checkpoint, its names freed of wrappers' prefixes.

    Args:
        checkpoint: what `read_checkpoint` returns.
        param_key: the entry wanted (`params`, `params_ema`); None for the checkpoint itself. Another entry that
            holds weights is taken in its place, with a log line, and a bare state dict is recognised.
        source: the file, for messages.

    Raises:
        UserError: no weights in it.
    """
    if param_key is not None and _is_state_dict(checkpoint.get(param_key)):
        weights = checkpoint[param_key]
    elif _is_state_dict(checkpoint):
        weights = checkpoint
    else:
        found = [key for key in PARAM_KEYS if _is_state_dict(checkpoint.get(key))]
        if not found:
            keys = ", ".join(map(str, list(checkpoint)[:LISTED])) or "nothing"
            raise UserError(
                f"{source} holds no weights under {param_key!r} nor under any of {', '.join(PARAM_KEYS)}; "
                f"it holds {keys}."
                + (" It is a training state: name it as path: resume_state." if "optimizers" in checkpoint else "")
            )
        logger.info("%s has no %r; using %r.", source, param_key, found[0])
        weights = checkpoint[found[0]]
    return {_strip_prefixes(name): tensor for name, tensor in weights.items()}


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], *, strict: bool, source: str | Path) -> None:
    """Load a state dict into a network, and say what does not fit.

    A network that can adapt a checkpoint (of another scale, say) does so first: it has a method
    `adapt_state_dict(state_dict) -> notes`, see `esc_arch.archs.ESC.adapt_state_dict`.

    Args:
        strict: every name and shape must be the same. Otherwise what fits is loaded, the rest is listed as a warning.

    Raises:
        UserError: it does not fit (strict), or nothing of it fits.
    """
    weights = dict(weights)
    for note in adapt_weights(net, weights):
        logger.warning("%s is of another scale: %s", source, note)
    message = mismatch_message(net, weights, strict=strict, source=source)
    if message is not None:
        raise UserError(message)
    own = net.state_dict()
    fitting = _fitting(own, weights)
    if problems := describe_mismatch(own, weights):
        logger.warning("Of %s, %d of %d tensors were loaded: %s.", source, len(fitting), len(own), "; ".join(problems))
    net.load_state_dict(fitting, strict=False)


def mismatch_message(net: nn.Module, weights: Mapping[str, Tensor], *, strict: bool, source: str | Path) -> str | None:
    """Why a state dict, adapted already, cannot be loaded into a network; None when it can."""
    own = net.state_dict()
    problems = "; ".join(describe_mismatch(own, weights))
    fitting = len(_fitting(own, weights))
    if not fitting:
        return (
            f"Nothing in {source} fits {type(net).__name__}, so it would stay untrained: {problems}. "
            f"Is it a checkpoint of another network? Compare network_g."
        )
    if problems and strict:
        return (
            f"{source} does not fit {type(net).__name__}: {problems}. Make network_g that of the checkpoint, or set "
            f"path: strict_load_g: false to load only what fits ({fitting} of {len(own)} tensors)."
        )
    return None


def adapt_weights(net: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Let the network adapt `weights` in place where it can; what it did, a sentence each."""
    adapt = getattr(net, "adapt_state_dict", None)
    return adapt(weights) if callable(adapt) else []


def describe_mismatch(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """How a state dict differs from a network's: missing names, unknown names, other shapes. Empty when it fits."""
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {tuple(tensor.shape)} and should be {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    ]
    groups = {"missing in it": missing, "not in the network": unknown, "of other shapes": shapes}
    return [f"{len(names)} {what} ({_some(names)})" for what, names in groups.items() if names]


def _fitting(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}


def _some(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, Tensor) for item in value.values())


def _strip_prefixes(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path, device="cpu"))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or was cut short: {_first_line(error)} Get it again.") from error


def _not_a_checkpoint(path: Path, head: bytes) -> str | None:
    """What a file that is not a checkpoint at all most likely is; None when it may be one."""
    text = head.lstrip().lower()
    if not head:
        return "it is empty."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page. Download the file itself, not the page that shows it."
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer. Fetch the file itself with `git lfs pull`."
    if text.startswith(b"pk") and path.suffix != ".safetensors" and not _is_whole_zip(path):
        return f"it was cut short ({path.stat().st_size:,} bytes). Get it again."
    return None


def _is_whole_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(error).__name__) + "."
