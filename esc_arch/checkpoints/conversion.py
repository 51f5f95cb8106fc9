"""A checkpoint as one network and its weights: opened, folded, written as `.pth` or `.safetensors`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esc_arch.archs.base import network_named
from esc_arch.atomic_io import write_file
from esc_arch.errors import UserError
from esc_arch.ops.conv_attn import symmetrise
from esc_arch.version import __version__

from .loading import adapt_weights, describe_mismatch
from .reading import find_weights, from_json, is_safetensors, is_state_dict, read_checkpoint, read_metadata
from .recognition import UnknownNetwork, examine, own_names

__all__ = [
    "CHECKPOINT_FORMATS",
    "Checkpoint",
    "build_network",
    "fold",
    "identify",
    "is_folded",
    "open_checkpoint",
    "save_checkpoint",
]

CHECKPOINT_FORMATS = ("pth", "safetensors")
#: Characters of JSON that one value beside the weights may take.
LONGEST_VALUE = 2**20
#: Metadata keys of our own `.safetensors` files. `network_g` and `beside` (values beside the weights) are JSON.
RESERVED = ("format", "esc_arch", "network_g", "param_key", "beside")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one network of the family, and the other values in its file.

    Attributes:
        weights: names as the network has them.
        network_g: type and options of the network.
        key: the entry that held the weights; None for a bare state dict.
        beside: plain values in the file, such as `iter`, and notes of conversions.
        left_out: entries that are neither: other weights, optimizer states.
        assumptions: what in network_g does not follow from the weights, a sentence each.
    """

    weights: dict[str, Tensor]
    network_g: dict[str, Any]
    key: str | None = None
    beside: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)


def open_checkpoint(path: str | Path, *, param_key: str | None = None, window_size: int | None = None) -> Checkpoint:
    """Read a checkpoint and recognise its network.

    Args:
        param_key: the entry wanted; None for the first of `params_ema`, `params` and other toolboxes' names.
        window_size: of RIB, whose weights do not determine it; None for the file's value, else the published one.

    Raises:
        UserError: the file cannot be read, has no weights (under that key), they are of no network of the family or
            do not fit the one recognised, or window_size cannot be chosen.
    """
    path = Path(path)
    content = read_checkpoint(path)
    if param_key is not None and not is_state_dict(content.get(param_key)):
        found = ", ".join(key for key, value in content.items() if is_state_dict(value))
        hint = f"it has weights under {found}." if found else "omit the key, and they are found."
        raise UserError(f"{path} holds no weights under {param_key!r}; {hint}")
    key, weights = find_weights(content, param_key, path)
    others = {} if key is None else {name: value for name, value in content.items() if name != key}
    beside = {name: value for name, value in others.items() if isinstance(name, str) and _is_plain(value)}
    left_out = [str(name) for name in others if name not in beside]
    if is_safetensors(path):
        metadata = read_metadata(path)
        beside = {name: value for name, value in metadata.items() if name not in RESERVED}
        beside |= from_json(metadata.get("beside"))
        known, key = from_json(metadata.get("network_g")), metadata.get("param_key")
    else:
        noted = beside.pop("network_g", None)
        known = noted if isinstance(noted, dict) else {}
    if window_size is not None:
        if window_size < 1:
            raise UserError(f"The window given is {window_size}; it must be at least 1.")
        known["window_size"] = window_size
    weights, section, assumptions = identify(weights, known, path)
    if window_size is not None and section["window_size"] != window_size:
        raise UserError(f"The weights of {path} have window {section['window_size']}; only RIB takes another one.")
    return Checkpoint(weights, section, key, beside, left_out, assumptions)


def _is_plain(value: object) -> bool:
    """True if JSON holds the value unchanged, in at most `LONGEST_VALUE` characters."""
    text = ""
    try:
        # Piece by piece, as a list that holds one list twice, which holds one twice, and so on, has no end as text
        for piece in json.JSONEncoder().iterencode(value):
            text += piece
            if len(text) > LONGEST_VALUE:
                return False
        return bool(json.loads(text) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def build_network(section: Mapping[str, Any]) -> nn.Module:
    """The network of esc_arch that a `network_g` section describes, even if BasicSR's registry has another by its name.

    Raises:
        ValueError: an invalid option.
    """
    return network_named(section["type"])(**{key: value for key, value in section.items() if key != "type"})


def save_checkpoint(checkpoint: Checkpoint, path: str | Path, *, file_format: str) -> None:
    """Write a checkpoint, all or nothing.

    A `.pth` is like BasicSR's: the weights under their key (`params`, BasicSR's default, if they had none), the rest
    beside them. A `.safetensors` file has the rest in its metadata, so nothing is lost in a round trip.

    Args:
        file_format: one of `CHECKPOINT_FORMATS`.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, and torch.save would store all of a tensor that is a part of one
    weights = {name: tensor.contiguous().clone() for name, tensor in checkpoint.weights.items()}
    if file_format == "safetensors":
        strings = {k: v for k, v in checkpoint.beside.items() if isinstance(v, str) and k not in RESERVED}
        metadata = {
            "format": "pt",
            "esc_arch": __version__,
            "network_g": json.dumps(checkpoint.network_g),
            "beside": json.dumps({k: v for k, v in checkpoint.beside.items() if k not in strings}),
            **({} if checkpoint.key is None else {"param_key": checkpoint.key}),
            **strings,
        }
        data = _sort_metadata(save(weights, metadata))
    else:
        buffer = io.BytesIO()
        torch.save(
            {checkpoint.key or "params": weights, **checkpoint.beside, "network_g": checkpoint.network_g}, buffer
        )
        data = buffer.getvalue()
    write_file(Path(path), data)


def _sort_metadata(data: bytes) -> bytes:
    """Sort a safetensors file's metadata: their order differs from run to run, and with it the file's hash."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def is_folded(weights: Mapping[str, Tensor]) -> bool | None:
    """True if the large kernel is symmetric, as training hardly ever leaves it; None if there is none to fold."""
    kernel = weights.get("plk_filter")
    return None if kernel is None else torch.equal(_symmetrised(kernel), kernel)


def fold(checkpoint: Checkpoint) -> Checkpoint:
    """Symmetrise the large kernel, which leaves the output as it is; raises UserError if there is none (ESCFP)."""
    if "plk_filter" not in checkpoint.weights:
        raise UserError(
            f"{checkpoint.network_g['type']} has no large kernel to fold: its filters are used as they are."
        )
    folded = {"plk_filter": _symmetrised(checkpoint.weights["plk_filter"])}
    return replace(checkpoint, weights=checkpoint.weights | folded, beside=checkpoint.beside | {"folded": True})


def _symmetrised(kernel: Tensor) -> Tensor:
    """In float64: folding a half-precision kernel rounds once, and folding it again changes nothing."""
    return symmetrise(kernel.double()).to(kernel.dtype)


def identify(
    weights: Mapping[str, Tensor], known: Mapping[str, Any], source: str | Path
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Weights under whatever names as those of a network of the family.

    Args:
        known: see `recognise`.

    Returns:
        The weights as the network has them, in its order; its `network_g` section; what in both is assumed.

    Raises:
        UserError: they are of no network, a part is missing, or of other options; the message begins with `source`.
    """
    weights = own_names(weights)
    try:
        section, assumptions = examine(weights, known)
    except UnknownNetwork as error:
        raise UnknownNetwork(f"{source}: {error}") from error
    options = ", ".join(f"{key}: {value}" for key, value in section.items() if key != "type")
    try:
        with torch.device("meta"):
            net = build_network(section)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # sizes that no tensor has, among others
        raise UserError(
            f"{source} looks like {section['type']} with {options}, but that is invalid: {error}"
        ) from error
    completed = dict(weights)
    assumptions += [f"the weights are of {note}" for note in adapt_weights(net, completed)]
    own = net.state_dict()
    if problems := describe_mismatch(own, completed):
        raise UserError(f"{source} is almost {section['type']} with {options}: {'; '.join(problems)}.")
    # What the network has itself, such as MetaUpsample, has no content on the meta device
    fitted = {name: weights.get(name) if completed[name].is_meta else completed[name] for name in own}
    return {name: tensor.detach() for name, tensor in fitted.items() if tensor is not None}, section, assumptions
