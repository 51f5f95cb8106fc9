"""Whether the networks of an option file can be built, and the weights and parameters it names fit them.

BasicSR finds out after it has put the old experiment's folder aside; here nothing on disk has been touched yet.
Networks are built without memory for their weights (on PyTorch's meta device), so this takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from esc_arch.checkpoints import adapt_weights, mismatch_message, read_checkpoint, select_weights
from esc_arch.errors import UserError
from esc_arch.training.parameter_groups import pattern_problems

from .files import Options

__all__ = ["check_networks"]


def check_networks(opt: Options, is_train: bool) -> Iterator[str]:
    """All that is wrong with the values of `network_*`, the files of `path: pretrain_network_*`, and name patterns.

    To be called when `checks.check_options` finds nothing wrong. A network that cannot be built without memory is
    left to BasicSR.
    """
    for key in [key for key in opt if key.startswith("network_") and (is_train or key == "network_g")]:
        if not isinstance(opt[key], dict):
            continue
        try:
            net = _build_without_memory(opt[key])
        except (ValueError, TypeError) as error:
            # Another package's constructor may only dislike the meta device; ours checks its arguments
            if ARCH_REGISTRY.get(opt[key]["type"]).__module__.startswith("esc_arch."):
                yield f"{key}: {error}"
            continue
        except Exception:
            continue
        yield from _check_pretrained(opt, key, net)
        if is_train and key == "network_g":
            yield from pattern_problems(net, opt["train"])


def _build_without_memory(section: Options) -> nn.Module:
    options = {name: value for name, value in section.items() if name != "type"}
    with torch.device("meta"):
        return ARCH_REGISTRY.get(section["type"])(**options)


def _check_pretrained(opt: Options, key: str, net: nn.Module) -> Iterator[str]:
    paths, label = opt["path"], key.removeprefix("network_")
    source = paths.get(f"pretrain_{key}")
    if not isinstance(source, str) or opt.get("auto_resume") or paths.get("resume_state"):
        return  # a resumed run loads its own weights
    try:
        weights = select_weights(read_checkpoint(source), paths.get(f"param_key_{label}", "params"), source)
    except UserError as error:
        yield f"path:pretrain_{key}: {error}"
        return
    adapt_weights(net, weights)
    message = mismatch_message(net, weights, strict=paths.get(f"strict_load_{label}", True), source=source)
    if message is not None:
        yield f"path:pretrain_{key}: {message}"
