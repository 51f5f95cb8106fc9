"""How a training computes what it computes: precision, memory layout, compilation, what the backward pass keeps."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esc_arch.archs.base import ESCFamily
from esc_arch.names import OWN
from esc_arch.problems import Problem

__all__ = ["COMPILE_MODES", "PUBLISHED_MODEL", "PerformanceOptions", "is_published_model", "performance_problems"]

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
#: The model type of published option files, and what their `use_amp` is: PyTorch's default.
PUBLISHED_MODEL = "ESRModel"
PUBLISHED_AMP = "fp16"
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def is_published_model(opt: Mapping[str, Any]) -> bool:
    """True if the options are of `ESRModel`, by either of its names."""
    return str(opt.get("model_type")).removeprefix(OWN) == PUBLISHED_MODEL


@dataclass(frozen=True, kw_only=True)
class PerformanceOptions:
    """The options of ``train:`` for speed, memory and stability; docs/training.md says what each does.

    The defaults are BasicSR's ways. ``tf32: None`` leaves PyTorch's choice.
    """

    amp: str | None = None
    channels_last: bool = False
    compile: bool | str = False
    accumulate_grad: int = 1
    gradient_clip: float | None = None
    tf32: bool | None = None
    activation_checkpointing: bool = False
    nonfinite: str = "stop"

    @classmethod
    def of(cls, opt: Mapping[str, Any]) -> PerformanceOptions:
        """From all options of a run; those of the published `ESRModel` by their names there, too."""
        train = opt.get("train") or {}
        given = {name: train[name] for name in cls.__dataclass_fields__ if train.get(name) is not None}
        if is_published_model(opt) and train.get("use_amp"):
            given["amp"] = PUBLISHED_AMP
        return cls(**given)

    def set_globals(self) -> None:
        """Set PyTorch's process-wide switches."""
        if self.tf32 is not None:
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32

    def prepare(self, net: nn.Module, device: torch.device) -> nn.Module:
        """Set up a network for training, in place, before it is wrapped for several processes."""
        if self.channels_last:
            net.to(memory_format=torch.channels_last)
        if self.activation_checkpointing and isinstance(net, ESCFamily):
            net.checkpointing = True
        if self.amp is not None:
            setattr(net, "amp", (device.type, _PRECISIONS[self.amp]))  # noqa: B010  mypy takes attributes for modules
            # A bound method, unlike a closure, belongs to the copy when the network is copied
            net.forward = types.MethodType(_forward_in_low_precision, net)
        if self.compile:
            mode = self.compile if isinstance(self.compile, str) else None
            net.compile(mode=mode, dynamic=False)  # in place, so that the names of the weights stay (fault 38)
        return net


def _forward_in_low_precision(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not self.training:
        return type(self).forward(self, *args, **kwargs)
    device, dtype = self.amp
    with torch.autocast(device, dtype):
        output = type(self).forward(self, *args, **kwargs)
    return output.float()


#: Options of the published `ESRModel` that are not supported, and what there is instead.
_UNSUPPORTED = {
    "wave_opt": "train: losses: fft: {type: FFTLoss, loss_weight: 0.05} is a loss by frequencies",
    "mesa_opt": "ema_decay averages the weights",
    "reset_momentum_iter": "a new run from a checkpoint, by path: pretrain_network_g, has a new optimiser",
}


def performance_problems(opt: Mapping[str, Any], net: type[Any] | None) -> Iterator[Problem]:
    """What does not go together in these options and those of the published model; `net` is network_g's class.

    Single values are checked with those of all keys.
    """
    train = opt.get("train") or {}
    parts, perceptual = train.get("accumulate_grad"), train.get("perceptual_opt")
    if isinstance(parts, int) and parts > 1:
        batch = (opt["datasets"].get("train") or {}).get("batch_size_per_gpu")
        if isinstance(batch, int) and batch % parts:
            message = (
                f"{parts} given; it must divide datasets:train:batch_size_per_gpu, {batch}, because it is the number "
                f"of equal parts that a batch is computed in"
            )
            yield Problem("train:accumulate_grad", message)
        if isinstance(perceptual, Mapping) and perceptual.get("criterion") == "fro":
            message = "does not go with perceptual_opt:criterion: fro, a norm over the whole batch"
            yield Problem("train:accumulate_grad", message)
    if train.get("activation_checkpointing") and net is not None and not issubclass(net, ESCFamily):
        message = f"only for networks of the ESC family, not for {net.__name__}. Remove it"
        yield Problem("train:activation_checkpointing", message)
    for key, instead in _UNSUPPORTED.items():
        if train.get(key):
            yield Problem(f"train:{key}", f"not supported. Remove it; {instead}")
    if train.get("use_amp") and not is_published_model(opt):
        yield Problem("train:use_amp", f"{PUBLISHED_MODEL} has it. Give amp: fp16 or amp: bf16")
    elif train.get("use_amp") and train.get("amp") not in (None, PUBLISHED_AMP):
        message = f"it is amp: {PUBLISHED_AMP}, and amp: {train['amp']} is given, too. Remove one of the two"
        yield Problem("train:use_amp", message)
    use_ema, decay = train.get("use_ema"), train.get("ema_decay") or 0
    if use_ema is not None and bool(use_ema) != (decay != 0):
        wanted = "give ema_decay, such as 0.999" if use_ema else "give ema_decay: 0 for no average"
        message = f"{use_ema} given, and ema_decay is {decay}. Remove use_ema, or {wanted}"
        yield Problem("train:use_ema", message)
