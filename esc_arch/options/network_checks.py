"""Checks of the networks of an option file: they can be built and run, and the weights and parameters named fit them.

BasicSR finds out after it has put the old experiment's folder aside; here nothing on disk has been touched yet.
Networks are built without memory for their weights (on PyTorch's meta device), so this takes milliseconds.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from esc_arch.checkpoints import adapt_weights, mismatch_message, read_checkpoint
from esc_arch.checkpoints.published import find, resolve
from esc_arch.checkpoints.reading import find_weights
from esc_arch.errors import UserError, first_line
from esc_arch.modules.window_attention import FactorBiasWindowAttention, WindowAttention
from esc_arch.ops.cpu import NOT_BUILT
from esc_arch.ops.operation import wants_gradients
from esc_arch.ops.window_attention import WINDOW_ATTENTION
from esc_arch.ops.window_attention.bias import parameters_of
from esc_arch.problems import Problem
from esc_arch.training.parameter_groups import freeze, pattern_problems

from .files import Options
from .section_checks import QUICK, CheckScope, entries, is_esc_model, is_known_code, lacks_memory

__all__ = ["check_networks"]


def check_networks(opt: Options, is_train: bool, scope: CheckScope = QUICK) -> Iterator[Problem]:
    """What is wrong with the values of `network_*`, the files of `path: pretrain_network_*`, and name patterns.

    So is an attention backend asked for by name that cannot train (or test) on this machine.

    To be called when `checks.check_options` finds nothing wrong. A network that cannot be built without memory is
    left to BasicSR; or, when `scope` is thorough, built with memory.
    """
    is_resumed = opt.get("auto_resume") or opt["path"].get("resume_state")  # then the run loads its own weights
    keys = [key for key in opt if key.startswith("network_") and (is_train or key == "network_g")]
    for key in keys:
        net = _build(opt[key], scope) if isinstance(opt[key], dict) else None
        if isinstance(net, str):
            yield Problem(key, net)
        if not isinstance(net, nn.Module):
            continue
        pretrained = None if is_resumed else opt["path"].get(f"pretrain_{key}")
        count = sum(parameter.numel() for parameter in net.parameters())
        if scope.with_files and (lack := lacks_memory(4 * count * (1 + is_train))):
            kept = "weights and gradients" if is_train else "weights"
            yield Problem(key, f"{count:,} parameters, whose {kept} alone take {lack}. Make the network smaller")
        elif scope.thorough:
            whose = "" if is_known_code(type(net)) else f" of {type(net).__module__}"
            yield Problem(key, f"{opt[key]['type']}{whose} can be built, {count:,} parameters", "note")
        if scope.with_files and pretrained:
            yield from _check_pretrained(opt, key, net, pretrained, scope)
        yield from _published_defaults(key, opt[key])
        if is_train and key == "network_g" and is_esc_model(opt):
            yield from pattern_problems(net, opt["train"])
            freeze(net, opt["train"])
        if scope.with_files:
            yield from _check_backends(opt, key, net, is_train)
        factors = (module for module in net.modules() if isinstance(module, FactorBiasWindowAttention))
        if is_train and not pretrained and not is_resumed and not all(module.scaled for module in factors):
            message = (
                "FlashBias's factors start at zero, where their gradients are zero, too, so "
                "positions would never be learned: name weights with bias tables as path:pretrain_network_g"
            )
            yield Problem(f"{key}:attn_type", message, "warning")


def _published_defaults(key: str, section: Options) -> Iterator[Problem]:
    """Warn where an option is left out whose default is another one in the published code."""
    kind = entries(ARCH_REGISTRY)[section["type"]]
    factors = str(section.get("attn_type")).lower() == "flashbias"
    for name, published in getattr(kind, "published_defaults", {}).items():
        if name not in section and not (factors and name.startswith("rib_")):
            default = inspect.signature(kind).parameters[name].default
            message = f"not given, so {default!r} is taken; the published code takes {published}"
            yield Problem(f"{key}:{name}", f"{message}. Give it to build the same network everywhere", "warning")


def _build(section: Options, scope: CheckScope) -> nn.Module | str | None:
    """A network, its constructor's objection to the arguments, or None if that cannot be told from here."""
    kind = entries(ARCH_REGISTRY)[section["type"]]
    arguments = {name: value for name, value in section.items() if name != "type"}
    for device in ("meta", "cpu") if scope.thorough else ("meta",):
        try:
            with warnings.catch_warnings(), torch.device(device):
                warnings.simplefilter("ignore")
                return kind(**copy.deepcopy(arguments))  # some change what they are given
        except Exception as error:
            if kind.__module__.startswith("esc_arch."):  # which check their arguments; others may dislike the device
                is_message = isinstance(error, ValueError | TypeError)
                return str(error) if is_message else f"{section['type']} cannot be built: {first_line(error)}"
            if device == "cpu" and (scope.with_files or not isinstance(error, OSError)):
                return f"{section['type']} cannot be built: {type(error).__name__}: {error}".rstrip(".: ")
    return None


class _Described(Tensor):
    """A tensor of a shape, type and device, without memory on it: making one does not start CUDA."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError("There are no values to compute with.")


def _check_backends(opt: Options, key: str, net: nn.Module, is_train: bool) -> Iterator[Problem]:
    device = "cuda" if opt.get("num_gpu", "auto") != 0 and torch.cuda.is_available() else "cpu"
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = halves.get(str(opt["train"].get("amp")), torch.float32) if is_train else torch.float32
    for layer in net.modules():
        if not isinstance(layer, WindowAttention) or layer.attn_type == "auto":
            continue
        bias = layer.position_bias()
        qkv = Tensor._make_wrapper_subclass(
            _Described,
            (1, layer.to_qkv.out_channels, layer.window_size, layer.window_size),
            dtype=dtype,
            device=torch.device(device),
            requires_grad=is_train and wants_gradients(*layer.to_qkv.parameters(), *parameters_of(bias)),
        )
        with torch.set_grad_enabled(is_train):
            inputs = (qkv, bias, layer.window_size, layer.num_heads)
            reasons = WINDOW_ATTENTION.unsupported_reasons(layer.attn_type, *inputs)
        if reasons := [reason for reason in reasons if reason != NOT_BUILT]:
            option = "backend" if str(opt[key].get("backend")).lower() == layer.attn_type else "attn_type"
            what = f"{layer.attn_type} given, which cannot {'train' if is_train else 'test'} here"
            yield Problem(f"{key}:{option}", f"{what}: {'; '.join(reasons)}. Give auto to have one chosen")
            return


def _check_pretrained(opt: Options, key: str, net: nn.Module, source: str, scope: CheckScope) -> Iterator[Problem]:
    paths, label = opt["path"], key.removeprefix("network_")
    named = find(source)
    if named and scope.thorough and not named.path.exists():
        yield Problem(f"path:pretrain_{key}", f"{named.name} will be downloaded from {named.url}", "note")
        if paths.get(f"strict_load_{label}", True) and named.scale != getattr(net, "upscaling_factor", named.scale):
            what = f"{named.name} is of scale {named.scale}, and {key} of {net.upscaling_factor}"
            yield Problem(
                f"path:pretrain_{key}", f"{what}. Give weights of that scale, or set strict_load_{label}: false"
            )
        return
    try:
        source = str(resolve(source))
        found, weights = find_weights(read_checkpoint(source), paths.get(f"param_key_{label}", "params"), source)
    except UserError as error:
        yield Problem(f"path:pretrain_{key}", str(error))
        return
    weights = {name: tensor.to("meta") for name, tensor in weights.items()}  # their shapes say all
    adapt_weights(net, weights)
    message = mismatch_message(net, weights, strict=paths.get(f"strict_load_{label}", True), source=source)
    if message is not None:
        yield Problem(f"path:pretrain_{key}", message)
    elif scope.thorough:
        yield Problem(f"path:pretrain_{key}", f"{source}{f' ({found})' if found else ''} fits {key}", "note")
