"""Whether the networks of an option file can be built, and the weights and parameters it names fit them.

BasicSR finds out after it has put the old experiment's folder aside; here nothing on disk has been touched yet.
Networks are built without memory for their weights (on PyTorch's meta device), so this takes milliseconds.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from esc_arch.checkpoints import adapt_weights, mismatch_message, read_checkpoint
from esc_arch.checkpoints.reading import find_weights
from esc_arch.errors import UserError
from esc_arch.training.parameter_groups import pattern_problems

from .data_checks import Extent
from .files import Options
from .section_checks import entries

__all__ = ["check_networks"]


def check_networks(opt: Options, is_train: bool, extent: Extent | None = None) -> Iterator[str]:
    """All that is wrong with the values of `network_*`, the files of `path: pretrain_network_*`, and name patterns.

    To be called when `checks.check_options` finds nothing wrong. A network that cannot be built without memory is
    left to BasicSR; or, when `extent` is thorough, built with memory.
    """
    extent = extent or Extent()
    keys = [key for key in opt if key.startswith("network_") and (is_train or key == "network_g")]
    for key in [key for key in keys if isinstance(opt[key], dict)]:
        net = _build(opt[key], extent)
        if isinstance(net, str):
            yield f"{key}: {net}"
        if not isinstance(net, nn.Module):
            continue
        count = sum(parameter.numel() for parameter in net.parameters())
        extent.facts.append(f"{key}: {opt[key]['type']} can be built, {count:,} parameters")
        if extent.with_files:
            yield from _check_pretrained(opt, key, net, extent)
        if is_train and key == "network_g":
            yield from pattern_problems(net, opt["train"])


def _build(section: Options, extent: Extent) -> nn.Module | str | None:
    """A network, what its constructor has against the arguments, or None when that cannot be told from here."""
    kind = entries(ARCH_REGISTRY)[section["type"]]
    is_ours = kind.__module__.startswith("esc_arch.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return kind(**_arguments(section))
        except Exception as error:
            if is_ours:  # which check their arguments; another package's constructor may only dislike the meta device
                return str(error) if isinstance(error, ValueError | TypeError) else None
        if not extent.thorough:
            return None
        try:
            return kind(**_arguments(section))
        except Exception as error:
            if isinstance(error, OSError) and not extent.with_files:
                return None
            return f"{section['type']} cannot be built: {type(error).__name__}: {error}".rstrip(".: ")


def _arguments(section: Options) -> Options:
    """As many as the constructor gets; some change what they are given."""
    return copy.deepcopy({name: value for name, value in section.items() if name != "type"})


def _pretrained(opt: Options, key: str) -> str | None:
    source = opt["path"].get(f"pretrain_{key}")
    resumed = opt.get("auto_resume") or opt["path"].get("resume_state")  # a resumed run loads its own weights
    return source if isinstance(source, str) and not resumed else None


def _check_pretrained(opt: Options, key: str, net: nn.Module, extent: Extent) -> Iterator[str]:
    paths, label, source = opt["path"], key.removeprefix("network_"), _pretrained(opt, key)
    if source is None:
        return
    try:
        found, weights = find_weights(read_checkpoint(source), paths.get(f"param_key_{label}", "params"), source)
    except UserError as error:
        yield f"path:pretrain_{key}: {error}"
        return
    adapt_weights(net, weights)
    message = mismatch_message(net, weights, strict=paths.get(f"strict_load_{label}", True), source=source)
    if message is not None:
        yield f"path:pretrain_{key}: {message}"
    else:
        extent.facts.append(f"path:pretrain_{key}: {source}{f' ({found})' if found else ''} fits {key}")
