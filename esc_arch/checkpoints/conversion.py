"""Checkpoints to other formats and forms: `.pth` and `.safetensors`, a folded kernel, factors in place of tables."""

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
from esc_arch.atomic_io import write_atomically
from esc_arch.errors import UserError
from esc_arch.modules.window_attention import bias_factors
from esc_arch.ops.conv_attn import symmetrise
from esc_arch.ops.window_attention import dense_bias
from esc_arch.version import __version__

from .loading import adapt_weights, describe_mismatch
from .reading import find_weights, from_json, is_safetensors, is_state_dict, read_checkpoint, read_metadata
from .recognition import examine, own_names

__all__ = [
    "FORMATS",
    "BiasError",
    "Checkpoint",
    "OutputError",
    "build_network",
    "factorise",
    "fitted_weights",
    "fold",
    "is_folded",
    "open_checkpoint",
    "output_error",
    "save_checkpoint",
]

FORMATS = ("pth", "safetensors")
#: Where weights that had no key of their own are put in a `.pth`: what BasicSR looks for by default.
DEFAULT_KEY = "params"
#: Values beside the weights that are kept, counting those in lists and mappings.
MOST_VALUES = 100_000
#: What a `.safetensors` file's metadata, strings all, say of ours: the format that readers expect, the version that
#: wrote it, the network, the entry that the weights were in, and what stood beside them, the last three as JSON.
RESERVED = ("format", "esc_arch", "network_g", "param_key", "beside")
TABLE = "relative_position_bias"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one network of the family, and what stood beside them in the file.

    Attributes:
        weights: names as the network has them.
        network_g: type and options of the network.
        key: the entry that the weights were in; None when the file was a bare state dict.
        beside: plain values in the file, such as `iter`, and what conversions have to say.
        left_out: entries that are neither: other weights, states of optimizers.
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
        window_size: of RIB, whose weights do not say it; None for what the file says, else the published one.

    Raises:
        UserError: the file cannot be read, has no weights (under that key), they are of no network of the family or
            do not fit the one recognised, or window_size is not to be chosen.
    """
    path = Path(path)
    content = read_checkpoint(path)
    if param_key is not None and not is_state_dict(content.get(param_key)):
        sets = ", ".join(key for key, value in content.items() if is_state_dict(value))
        raise UserError(
            f"{path} holds no weights under {param_key!r}; "
            + (f"it does under {sets}." if sets else "leave the key away to have them found.")
        )
    key, weights = find_weights(content, param_key, path)
    beside, left_out = _split_plain({name: value for name, value in content.items() if name != key}, bare=key is None)
    if is_safetensors(path):
        metadata = read_metadata(path)
        beside = {name: value for name, value in metadata.items() if name not in RESERVED}
        beside |= from_json(metadata.get("beside"))
        known = from_json(metadata.get("network_g"))
        key = metadata.get("param_key")
    else:
        known = beside.pop("network_g", None)
        known = known if isinstance(known, dict) else {}
    if window_size is not None:
        if window_size < 1:
            raise UserError(f"The window given is {window_size}; it must be at least 1.")
        known["window_size"] = window_size
    weights = {name: tensor.detach() for name, tensor in own_names(weights).items()}
    try:
        section, assumptions = examine(weights, known)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if window_size is not None and section["window_size"] != window_size:
        raise UserError(
            f"The window of {path} is {section['window_size']}, by its weights; a window is to be given for RIB alone."
        )
    weights, notes = fitted_weights(path, section, weights)
    assumptions += [f"the weights are of {note}" for note in notes]
    return Checkpoint(weights, section, key, beside, left_out, assumptions)


def build_network(section: Mapping[str, Any]) -> nn.Module:
    """The network of esc_arch that a `network_g` section describes, whoever has its name in BasicSR's registry.

    Raises:
        ValueError: an invalid option.
    """
    return network_named(section["type"])(**{key: value for key, value in section.items() if key != "type"})


def save_checkpoint(checkpoint: Checkpoint, path: str | Path, *, file_format: str) -> None:
    """Write a checkpoint, all or nothing.

    A `.pth` is as BasicSR's: the weights under their key (`params` if they had none), the rest beside them. A
    `.safetensors` file has the rest in its metadata, so that nothing is lost on the way there and back.

    Args:
        file_format: one of `FORMATS`.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors.torch import save

    path = Path(path)
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
        data = _with_sorted_header(save(weights, metadata))
    else:
        buffer = io.BytesIO()
        beside = {**checkpoint.beside, "network_g": checkpoint.network_g}
        torch.save({checkpoint.key or DEFAULT_KEY: weights, **beside}, buffer)
        data = buffer.getvalue()
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error


def _with_sorted_header(data: bytes) -> bytes:
    """A safetensors file whose metadata are in the order of their names: the library's order changes from run to run,
    and with it the file's hash."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def is_folded(weights: Mapping[str, Tensor]) -> bool | None:
    """Whether the large kernel is symmetric, as training hardly ever leaves it; None when there is none to fold."""
    if "plk_filter" not in weights:
        return None
    kernel = weights["plk_filter"]
    return torch.equal(_symmetrised(kernel), kernel)


def fold(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with the symmetrised large kernel in place of the free one. The network's output stays the same.

    Raises:
        UserError: the network has no kernel that is symmetrised (ESCFP).
    """
    if "plk_filter" not in checkpoint.weights:
        raise UserError(
            f"{checkpoint.network_g['type']} has no large kernel to fold: its filters are used as they are."
        )
    folded = {"plk_filter": _symmetrised(checkpoint.weights["plk_filter"])}
    return replace(checkpoint, weights=checkpoint.weights | folded, beside=checkpoint.beside | {"folded": True})


def _symmetrised(kernel: Tensor) -> Tensor:
    """In float64, so that folding a kernel of half precision rounds once, and again changes nothing."""
    return symmetrise(kernel.double()).to(kernel.dtype)


@dataclass(frozen=True)
class BiasError:
    """How well factors reproduce the bias of one attention layer, or of all.

    Attributes:
        layer: the layer's name.
        largest, rms: absolute error, in the units of attention's scores.
        kept: share of the bias's energy (sum of squares).
    """

    layer: str
    largest: float
    rms: float
    kept: float


def factorise(checkpoint: Checkpoint, rank: int) -> tuple[Checkpoint, list[BiasError]]:
    """A checkpoint with factors of a low rank in place of its bias tables (FlashBias), in the published convention.

    Returns:
        The checkpoint, its network_g made to fit; the errors of every layer, and in the last place those of all.

    Raises:
        UserError: the network has no bias tables or none of finite numbers, or the rank is not within
            1 .. window_size^2.
    """
    section = checkpoint.network_g
    if not any(name.endswith(f".{TABLE}") for name in checkpoint.weights):
        raise UserError(
            f"There is no bias table to make factors of: the attention of this {section['type']} is "
            f"{section['attn_type']}."
        )
    window = section["window_size"]
    if not 1 <= rank <= window**2:
        raise UserError(f"The rank is {rank}; for windows of {window} x {window} it must be within 1 .. {window**2}.")
    weights, errors = {}, []
    squared_error = energy = 0.0
    for name, tensor in checkpoint.weights.items():
        if not name.endswith(f".{TABLE}"):
            weights[name] = tensor
            continue
        if not tensor.isfinite().all():
            raise UserError(f"{name} has numbers that are infinite or not a number.")
        layer = name.removesuffix(f".{TABLE}")
        q, k = bias_factors(tensor, window, rank)
        weights |= {f"{layer}.flashbias_q": q, f"{layer}.flashbias_k": k}
        bias = dense_bias(tensor.double(), window)
        error = q.double() @ k.double().mT - bias
        errors.append(_bias_error(layer, error.abs().max().item(), _squares(error), _squares(bias), error.numel()))
        squared_error, energy, count = squared_error + _squares(error), energy + _squares(bias), error.numel()
    largest = max(error.largest for error in errors)
    errors.append(_bias_error("all layers", largest, squared_error, energy, len(errors) * count))
    changes: dict[str, Any] = {"attn_type": "FlashBias", "flashbias_rank": rank}
    return replace(checkpoint, weights=weights, network_g={**section, **changes}), errors


def _squares(values: Tensor) -> float:
    return values.square().sum().item()


def _bias_error(layer: str, largest: float, squared_error: float, energy: float, count: int) -> BiasError:
    kept = 1 - squared_error / energy if energy else 1.0
    return BiasError(layer, largest, (squared_error / count) ** 0.5, kept)


@dataclass(frozen=True)
class OutputError:
    """How far the output of one network is from that of another, pixels being in 0 .. 1; PSNR in dB."""

    largest: float
    psnr: float


@torch.no_grad()
def output_error(before: Checkpoint, after: Checkpoint, image: Tensor) -> OutputError:
    """Run two networks on an image (1, 3, H, W) in 0 .. 1, in float32 on its device."""
    first, second = (_loaded(checkpoint).to(image.device)(image) for checkpoint in (before, after))
    difference = (first - second).double()
    mean_square = difference.square().mean()
    return OutputError(difference.abs().max().item(), (-10 * mean_square.log10()).item())


def _loaded(checkpoint: Checkpoint) -> nn.Module:
    net = build_network(checkpoint.network_g)
    net.load_state_dict(checkpoint.weights)
    return net.eval()


def fitted_weights(
    source: Path | str, section: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in the order of the network that they were recognised as, and what it did to make them fit.

    Raises:
        UserError: a part is missing, or of other options; the message begins with `source`.
    """
    options = ", ".join(f"{key}: {value}" for key, value in section.items() if key != "type")
    try:
        with torch.device("meta"):
            net = build_network(section)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # sizes that no tensor has, among others
        raise UserError(f"{source} looks like {section['type']} with {options}, but there is none: {error}") from error
    completed = dict(weights)
    notes = adapt_weights(net, completed)
    own = net.state_dict()
    if problems := describe_mismatch(own, completed):
        raise UserError(f"{source} is almost {section['type']} with {options}: {'; '.join(problems)}.")
    # What the network has itself, such as MetaUpsample, is without content here
    fitted = {name: weights.get(name) if completed[name].is_meta else completed[name] for name in own}
    return {name: tensor for name, tensor in fitted.items() if tensor is not None}, notes


def _split_plain(content: Mapping[Any, Any], *, bare: bool) -> tuple[dict[str, Any], list[str]]:
    """Tell values that JSON can hold unchanged from entries that it cannot; a bare state dict has neither."""
    if bare:
        return {}, []
    plain = {name: value for name, value in content.items() if isinstance(name, str) and _is_plain(value)}
    return plain, [str(name) for name in content if name not in plain]


def _is_plain(value: object) -> bool:
    try:
        return _is_small(value) and bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _is_small(value: object) -> bool:
    """Whether a value is no larger than what is noted beside weights: lists that hold one list twice, which holds one
    twice, and so on, are small in a file and endless written out."""
    waiting = [value]
    for _ in range(MOST_VALUES):
        if not waiting:
            return True
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return not waiting
