"""`basicsr warmup`: do once what would make a first image or step wait, and say what can be used here."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esc_arch.archs import ESC
from esc_arch.errors import FAULT, UserError
from esc_arch.modules.window_attention import WindowAttention
from esc_arch.ops import cpu
from esc_arch.ops.autotune.runner import autotune_gpus
from esc_arch.ops.operation import UnusableBackend
from esc_arch.ops.window_attention import WINDOW_ATTENTION
from esc_arch.problems import of_severity

if TYPE_CHECKING:
    from esc_arch.models.performance import PerformanceOptions

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Build, compile, and say what is ready; returns the exit status: 0 when all that can be used is ready.

    Raises UserError for an invalid size, device or option file, and for an attention backend that cannot run here.
    """
    size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", args.size.lower())
    if size is None:
        raise UserError(f"--size {args.size}: give rows and columns of the LR image, such as 128x128.")
    device = _device(args.device)
    image = torch.rand(1, 3, int(size[1]), int(size[2]), device=device)
    networks = {Path(args.opt).name: _from_option_file(args.opt)} if args.opt else {}
    status = _build_operators()
    if device.type == "cuda":
        autotune_gpus(again=args.again)
    for name, (net, speed) in (networks or {f"ESC x{s}": (ESC(upscaling_factor=s), None) for s in (2, 3, 4)}).items():
        _warm_up(name, net.to(device), speed, image)
    return status


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no GPU here. Use --device cpu, or auto.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _from_option_file(file: str) -> tuple[nn.Module, PerformanceOptions | None]:
    """The network of an option file, and how it is trained if it is; data and weights need not be there."""
    from basicsr.archs import build_network

    from esc_arch.models.performance import PerformanceOptions
    from esc_arch.options import CheckScope, inspect_options

    inspection = inspect_options(file, root_path=".", is_train=None, scope=CheckScope(with_files=False))
    if errors := of_severity(inspection.problems, "error"):
        raise UserError("; ".join(map(str, errors)))
    try:
        net: nn.Module = build_network(inspection.opt["network_g"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: network_g: {error}") from None
    return net, PerformanceOptions.of(inspection.opt) if inspection.is_train else None


def _build_operators() -> int:
    """Build them; returns `FAULT` if they should be ready and are not, else 0."""
    if not cpu.ready():
        print("Building the C++ operators (1 to 3 minutes, once) ...", flush=True)
    try:
        seconds = cpu.build(lambda done, total: print(f"  {done} of {total} parts are compiled", flush=True))
    except RuntimeError as error:
        print(f"{error}\nPyTorch's own operators are used instead: slower, with the same results.")
        return FAULT if error.__cause__ is not None else 0  # what was tried failed, or there is nothing to try with
    print(f"C++ operators: ready after {seconds:.1f} s, {cpu.origin()}")
    return 0


def _warm_up(name: str, net: nn.Module, speed: PerformanceOptions | None, image: Tensor) -> None:
    """Run a network twice, with its backward pass when it is to be trained, and say what it took."""
    if speed is not None:
        speed.set_globals()
        # A compiled step is compiled for the sizes of its batches, which are met in training alone
        net = replace(speed, compile=False).prepare(net, image.device)
        if speed.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
    try:
        first, second = (_seconds(net, image, speed is not None) for _ in range(2))
    except UnusableBackend as error:
        raise UserError(f"{name}: {error}") from error
    what = "image" if speed is None else "forward and backward pass"
    print(f"{name} on {image.device.type}: ready. The first {what} took {first:.2f} s, the second {second:.2f} s.")
    for line in _attention(net, image, speed):
        print(f"  {line}")


def _seconds(net: nn.Module, image: Tensor, train: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(train):
        out = net.train(train)(image)
    if train:
        out.float().mean().backward()
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _attention(net: nn.Module, image: Tensor, speed: PerformanceOptions | None) -> Iterator[str]:
    """Which backend the network's window attention takes, and why not the others."""
    module = next((each for each in net.modules() if isinstance(each, WindowAttention)), None)
    if module is None:
        return
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(speed.amp or "" if speed else "", torch.float32)
    with torch.set_grad_enabled(speed is not None):
        qkv = image.new_empty((1, module.to_qkv.out_channels, *image.shape[-2:]), dtype=dtype)
        found = WINDOW_ATTENTION.explain(qkv, module.position_bias(), module.window_size, module.num_heads)
    chosen = found.chosen if module.attn_type == "auto" else module.attn_type
    yield f"window attention in {str(dtype).removeprefix('torch.')}: {chosen} (attn_type: {module.attn_type})"
    for name, why in found.reasons.items():
        if why:
            yield f"{name} cannot run here: {'; '.join(why)}"
    for name, why in found.auto_skip_reasons.items():
        yield f"auto skips {name}: {'; '.join(why)}"
