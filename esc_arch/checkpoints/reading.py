"""Checkpoint files: read safely, and the weights found in all their wrappings."""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esc_arch.archs.flashbias import Origin, convert_old_factors, mark_published, origin_of
from esc_arch.archs.shapes import some
from esc_arch.errors import UserError, first_line
from esc_arch.printing import is_utf8

__all__ = [
    "find_weights",
    "from_json",
    "is_safetensors",
    "is_state_dict",
    "read_checkpoint",
    "read_metadata",
    "require_usable",
    "select_weights",
]

logger = logging.getLogger("basicsr")

#: Where toolboxes keep the weights within a file. BasicSR's own keys come first, the average before the raw ones.
PARAM_KEYS = ("params_ema", "params", "params-ema", "state_dict", "model_state_dict", "model", "net_g")
#: What wrappers (DataParallel, torch.compile) put before every name.
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
#: Bytes of memory that the content of a file may take beyond the size of the file. PyTorch stores records as they
#: are; only ones made to do harm grow by more when they are read.
LARGEST_GROWTH = 2**28
#: What torch.save writes: a zip archive, or before 1.6 a pickle.
ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"
#: What files that are downloaded in place of a checkpoint begin with, and what they are.
OTHER_FILES = {
    (b"<!doctype", b"<html", b"<?xml"): "a web page. Download the file itself, not the page that shows it",
    (b"version https://git-lfs",): "a Git LFS pointer. Fetch the file itself with `git lfs pull`",
    # A protobuf: the version of the format, then the name of the program that wrote it
    tuple(bytes((8, version, 18)) for version in range(3, 32)): (
        "an ONNX model, which runs in ONNX Runtime and not here. Give the .pth or .safetensors file it was made from"
    ),
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a ``.pth`` (also ``.pt``, ``.ckpt``, ``.state``) or ``.safetensors`` file, on the CPU.

    Weights in ``{"model": {"name", "args", "sd"}}``, as the published ESC-LTE has them, come as ``{"model": weights}``.
    What it is of the two its content decides, not its name: files are renamed.

    Raises:
        UserError: the file is missing, is no checkpoint (a web page, a Git LFS pointer, cut short), holds anything but
            tensors and plain values, which could run code, or would take far more memory than its size.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"The checkpoint {path} is a folder, not a checkpoint file.")
    if not path.is_file():
        raise UserError(f"The checkpoint {path} does not exist (looked at {path.absolute()}).")
    start = _head(path).lstrip().lower()
    if not start:
        raise UserError(f"{path} is not a checkpoint: it is empty.")
    for beginnings, what in OTHER_FILES.items():
        if start.startswith(beginnings) and start[8:9] != b"{":  # as safetensors have it, whose length may look so
            raise UserError(f"{path} is not a checkpoint: it is {what}.")
    if is_safetensors(path):
        content = _read_safetensors(path)
        _settle_factors(content, from_json(read_metadata(path).get("network_g")), path)
    else:
        content = _read_pickled(path)
        _settle_factors(content, content.get("network_g"), path)
    return content


def _read_pickled(path: Path) -> dict[str, Any]:
    _check_growth(path)
    try:
        with path.open("rb") as file:  # from its name alone, torch.load might take it for something else
            content = torch.load(file, map_location="cpu", weights_only=True)
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
        raise _damaged(path, error) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights.")
    content = dict(content)
    model = content.get("model")
    if isinstance(model, Mapping) and is_state_dict(model.get("sd")):
        content["model"] = model["sd"]
    return content


def _settle_factors(content: dict[str, Any], network_g: object, path: Path) -> None:
    """Bring FlashBias's factors into the published convention, where the file says of which network they are.

    Programs of others may note `network_g` as their option files have it, where `rank` is still a name of the option:
    weights whose order is the published one are no earlier version's, whatever the file says.
    """
    if not isinstance(network_g, Mapping) or network_g.get("attn_type") != "FlashBias":
        return
    if str(network_g.get("type")).removeprefix("esc_arch.") == "ESCRIB":  # which has a convention of its own
        return
    converted = False
    # Each once: `params` and `params_ema` may be one dictionary
    for weights in {id(entry): entry for entry in (content, *content.values()) if isinstance(entry, dict)}.values():
        if not any(isinstance(tensor, Tensor) for tensor in weights.values()):
            continue
        if "flashbias_rank" in network_g:
            mark_published(weights)
        elif origin_of(weights) is not Origin.PUBLISHED:  # `rank` is the name of the option before 0.2
            convert_old_factors(weights)
            converted = True
    if converted:
        logger.warning("%s was written by esc_arch before 0.2: its FlashBias factors were converted.", path)


def select_weights(checkpoint: Mapping[str, Any], param_key: str | None, source: str | Path) -> dict[str, Tensor]:
    """The state dict within a checkpoint, its names freed of wrappers' prefixes.

    Args:
        checkpoint: what `read_checkpoint` returns.
        param_key: the entry wanted (`params`, `params_ema`); None for the checkpoint itself. Another entry that
            holds weights is taken in its place, and a bare state dict is recognised. What is taken is logged.
        source: the file, for messages.

    Raises:
        UserError: no weights in it, or some that no network can take: sparse, quantised, complex, without content,
            infinite or not a number, or repeated to far more than the file holds.
    """
    key, weights = find_weights(checkpoint, param_key, source)
    if key == param_key is not None:
        logger.info("Using %r of %s.", key, source)
    elif key is not None:
        logger.info("%s has no %r; using %r.", source, param_key, key)
    return weights


def find_weights(
    checkpoint: Mapping[str, Any], param_key: str | None, source: str | Path
) -> tuple[str | None, dict[str, Tensor]]:
    """The entry of a checkpoint that its weights were found in (None: it is a bare state dict), and the weights.

    Arguments and errors as of `select_weights`.
    """
    key: str | None
    if param_key is not None and is_state_dict(checkpoint.get(param_key)):
        key, weights = param_key, checkpoint[param_key]
    elif is_state_dict(checkpoint):
        key, weights = None, checkpoint
    else:
        found = [key for key in PARAM_KEYS if is_state_dict(checkpoint.get(key))]
        if not found:
            asked = "" if param_key is None else f"{param_key!r} nor under "
            is_state = " It is a training state: name it as path: resume_state." if "optimizers" in checkpoint else ""
            raise UserError(
                f"{source} holds no weights under {asked}any of {', '.join(PARAM_KEYS)}; it holds "
                f"{some([*map(str, checkpoint)]) or 'nothing'}.{is_state}"
            )
        key, weights = found[0], checkpoint[found[0]]
    require_usable(weights, source)
    return key, {PREFIXES.sub("", name): tensor for name, tensor in weights.items()}


def is_state_dict(value: object) -> bool:
    """True if a value can be a network's weights: names with tensors, and nothing else."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())
    )


def require_usable(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError if tensors of a file are of kinds, or hold numbers, with which no network can compute."""
    for name, tensor in weights.items():
        odd = {
            "a nested tensor": tensor.is_nested,
            "a sparse tensor": tensor.layout != torch.strided,
            "a quantised tensor": tensor.is_quantized,
            "complex numbers": tensor.is_complex(),
            "a tensor without content": tensor.is_meta,
            "packed numbers": str(tensor.dtype).endswith("_x2"),  # of 4 bits
        }
        if kind := next((kind for kind, found in odd.items() if found), None):
            raise UserError(
                f"{source} holds {name} as {kind}, which cannot be loaded into a network. Save its weights as ordinary "
                "tensors."
            )
    # A view may repeat one stored number as often as it says
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.values()}
    taken = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if taken > sum(stored.values()) + LARGEST_GROWTH:
        raise UserError(
            f"The weights in {source} would take {taken:,} bytes of memory, and are stored in "
            f"{sum(stored.values()):,}: it was not made by saving a network. Get it from another source."
        )
    for name, tensor in weights.items():
        # In float32, in which they are used: larger ones of float64 are infinite there
        if tensor.is_floating_point() and (wrong := tensor.numel() - int(tensor.float().isfinite().sum())):
            raise UserError(
                f"{source} holds {name} with {wrong:,} of {tensor.numel():,} numbers that are infinite or not a number "
                "(NaN): the training that saved it had diverged, or the file is damaged. Use an earlier checkpoint of "
                "that training, or get the file again."
            )


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with _utf8_name(path) as name:
            return dict(load_file(name, device="cpu"))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or was cut short: {first_line(error)}. Get it again.") from error
    except Exception as error:  # a type that PyTorch has not; sizes that no memory holds
        raise _damaged(path, error) from error


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """Another name of a file whose own is not UTF-8, while this lasts: safetensors opens no other."""
    with path.open("rb") as file:
        yield str(path) if is_utf8(path) else f"/dev/fd/{file.fileno()}"


def is_safetensors(path: Path) -> bool:
    """True if a file is to be read as safetensors: it begins as they do, or is named so and begins as no other does.

    They begin with the length of a JSON object, in 8 bytes, and that object.
    """
    head = _head(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return True
    return path.suffix == ".safetensors" and not head.startswith((ZIP, PICKLE))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    from safetensors import safe_open

    with _utf8_name(Path(path)) as name, safe_open(name, framework="pt") as file:
        return dict(file.metadata() or {})


def from_json(text: str | None) -> dict[str, Any]:
    """An object from metadata that anyone may have written; empty when it is none."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _check_growth(path: Path) -> None:
    """Check that the records of a zip archive take no more memory than the file can mean."""
    if not _head(path).startswith(ZIP):  # then torch.load takes it for no archive
        return
    size = path.stat().st_size
    try:
        taken = sum(record.file_size for record in zipfile.ZipFile(path).infolist())
    except Exception as error:  # cut short; a damaged directory makes the reader fail in many ways
        raise _damaged(path, error) from error
    if taken > size + LARGEST_GROWTH:
        raise UserError(
            f"{path} has {size:,} bytes and would take {taken:,} of memory: it was not written by torch.save. Get it "
            "from another source."
        )


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} ({path.stat().st_size:,} bytes) is no checkpoint, or was cut short while it was saved or downloaded: "
        f"{type(error).__name__}: {first_line(error)}. Get it again."
    )
