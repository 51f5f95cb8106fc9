"""How a training computes what it computes: precision, memory layout, compilation, what the backward pass keeps."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esc_arch.archs.base import ESCFamily
from esc_arch.ops.float32 import float32_products
from esc_arch.register import OWN

__all__ = [
    "COMPILE_MODES",
    "PUBLISHED_MODEL",
    "PerformanceOptions",
    "eager",
    "full_float32",
    "is_published_model",
    "performance_problems",
]

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
#: The model type of published option files, and what their `use_amp` is: PyTorch's default.
PUBLISHED_MODEL = "ESRModel"
PUBLISHED_AMP = "fp16"
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def is_published_model(opt: Mapping[str, Any]) -> bool:
    """Whether the options are of `ESRModel`, by either of its names."""
    return str(opt.get("model_type")).removeprefix(OWN) == PUBLISHED_MODEL


@dataclass(frozen=True, kw_only=True)
class PerformanceOptions:
    """The options of ``train:`` that are about speed and memory. The defaults are BasicSR's ways.

    Args:
        amp: bf16 or fp16 mixed precision. Convolutions, matrix products and the features between them are in it;
            weights, gradients, optimiser and EMA, LayerNorm, the global pool and the kernel made from it, the
            symmetrised large kernel, softmax, the output image and the losses stay in float32: sums over many numbers,
            and differences of almost equal ones, are what 8 or 11 bits spoil. fp16 scales the loss so that small
            gradients do not vanish. Validation is in float32.
        channels_last: the memory layout that convolutions are faster in on CPUs and on tensor cores.
        compile: training steps by torch.compile; true or one of `COMPILE_MODES`. Validation, with its many image sizes,
            is not compiled.
        accumulate_grad: parts that a batch is cut into, one after the other: the same step with less memory.
        gradient_clip: the largest norm of all gradients together; longer ones are shortened to it.
        tf32: whether float32 products may be done in TF32 (10 bits of mantissa) on GPUs. None leaves PyTorch's choice:
            convolutions yes, matrix products no.
        activation_checkpointing: keep only the inputs of blocks, and compute the rest again in the backward pass.
        nonfinite: what a loss or gradient that is infinite or not a number does: "stop" the training, "skip" the step.
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
        """What PyTorch has for the whole process."""
        if self.tf32 is not None:
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32

    def prepare(self, net: nn.Module, device: torch.device) -> nn.Module:
        """A network for training, changed in place; to be called before it is wrapped for several processes."""
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


@contextmanager
def eager(net: nn.Module) -> Iterator[None]:
    """Call `net` as it is, though it is compiled: for sizes that are met once, compiling takes longer."""
    compiled, net._compiled_call_impl = net._compiled_call_impl, None
    try:
        yield
    finally:
        net._compiled_call_impl = compiled


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products without TF32, whose 10 bits of mantissa are seen in the last digits of a PSNR."""
    with float32_products(tf32=False):
        yield


def performance_problems(opt: Mapping[str, Any], net: type[Any] | None) -> Iterator[str]:
    """What is wrong with these options; `net` is the class of network_g."""
    train = opt.get("train") or {}
    for key in ("channels_last", "tf32", "activation_checkpointing"):
        if not isinstance(train.get(key), bool | None):
            yield f"train:{key}: {train[key]!r} given; must be true or false"
    if train.get("amp") not in (None, *_PRECISIONS):
        yield f"train:amp: {train['amp']!r} given; must be {' or '.join(_PRECISIONS)}, or ~ for float32"
    if not isinstance(train.get("compile"), bool | None) and train["compile"] not in COMPILE_MODES:
        yield f"train:compile: {train['compile']!r} given; must be true, false or one of {', '.join(COMPILE_MODES)}"
    if train.get("nonfinite") not in (None, "stop", "skip"):
        yield f"train:nonfinite: {train['nonfinite']!r} given; must be stop (the default) or skip"
    clip = train.get("gradient_clip")
    if clip is not None and not (isinstance(clip, int | float) and not isinstance(clip, bool) and clip > 0):
        yield f"train:gradient_clip: {clip!r} given; must be a positive number, the largest norm, such as 1.0"
    yield from _accumulation_problems(opt, train.get("accumulate_grad"))
    yield from _published_problems(opt, train)
    if train.get("activation_checkpointing") and net is not None and not issubclass(net, ESCFamily):
        yield f"train:activation_checkpointing: only for networks of the ESC family, not for {net.__name__}. Remove it"


def _published_problems(opt: Mapping[str, Any], train: Mapping[str, Any]) -> Iterator[str]:
    """Options of the published `ESRModel` that would do something else here, or nothing."""
    if train.get("wave_opt"):
        yield (
            "train:wave_opt: this loss of wavelets is not known here. Remove it; train: losses: fft: {type: FFTLoss, "
            "loss_weight: 0.05} is a loss by frequencies"
        )
    if train.get("mesa_opt"):
        yield "train:mesa_opt: MESA is not known here. Remove it; ema_decay averages the weights"
    if train.get("reset_momentum_iter"):
        yield (
            "train:reset_momentum_iter: not known here. Remove it; a new run that begins at the checkpoint of that "
            "iteration, with path: pretrain_network_g, has a new optimiser"
        )
    if not is_published_model(opt):
        if train.get("use_amp"):
            yield f"train:use_amp: {PUBLISHED_MODEL} has it. Give amp: fp16 or amp: bf16"
    elif train.get("use_amp") and train.get("amp") not in (None, PUBLISHED_AMP):
        yield f"train:use_amp: it is amp: {PUBLISHED_AMP}, and amp: {train['amp']} is given, too. Remove one of the two"
    use_ema, decay = train.get("use_ema"), train.get("ema_decay") or 0
    if use_ema is not None and bool(use_ema) != (decay != 0):
        wanted = "give ema_decay, such as 0.999" if use_ema else "give ema_decay: 0 for no average"
        yield f"train:use_ema: {use_ema} given, and ema_decay is {decay}. Remove use_ema, or {wanted}"


def _accumulation_problems(opt: Mapping[str, Any], parts: Any) -> Iterator[str]:
    if parts is None:
        return
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        yield f"train:accumulate_grad: {parts!r} given; must be the number of parts of a batch, 1 or more"
        return
    batch = (opt["datasets"].get("train") or {}).get("batch_size_per_gpu")
    if isinstance(batch, int) and batch % parts:
        yield (
            f"train:accumulate_grad: {parts} given; it must divide datasets:train:batch_size_per_gpu, {batch}, because "
            f"it is the number of equal parts that a batch is computed in"
        )
    perceptual = opt["train"].get("perceptual_opt")
    if parts > 1 and isinstance(perceptual, Mapping) and perceptual.get("criterion") == "fro":
        yield "train:accumulate_grad: does not go with perceptual_opt:criterion: fro, a norm over the whole batch"
