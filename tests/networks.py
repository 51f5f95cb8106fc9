"""Helpers of the tests of the networks: small randomised networks, and the formulas written out plainly.

The references here follow the description of the networks, not the code: loops over windows, pixels and images in
float64, so that they are slow, obvious and independent of what they check.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esc_arch import ESC
from esc_arch.ops.window_attention import Bias, dense_bias, merge_windows, pad_to_windows, split_windows
from esc_arch.ops.window_attention.bias import parameters_of

SMALL: dict[str, Any] = {
    "dim": 16,
    "pdim": 4,
    "kernel_size": 13,
    "n_blocks": 1,
    "conv_blocks": 2,
    "window_size": 8,
    "num_heads": 2,
    "exp_ratio": 1.25,
    "upscaling_factor": 2,
}

#: Sizes around the window of 8: a pixel, rows, smaller than the window or the padding, exact, and larger.
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (4, 11), (8, 8), (16, 8), (20, 27)]

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="flex attention on the CPU needs a C++ compiler (g++ or clang++)",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
#: Backends that run everywhere and can be trained everywhere, and all of them.
TRAINABLE = ["naive", "sdpa"]
BACKENDS = [*TRAINABLE, pytest.param("flex", marks=needs_compiler)]


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value of a size that keeps features near 1, so that no part can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if name.endswith("relative_position_bias"):
                value = 1.5 * value
            elif parameter.dim() > 1:
                value = value * parameter[0].numel() ** -0.5
            elif name.endswith("weight"):  # of a LayerNorm
                value = 1 + 0.3 * value
            else:
                value = 0.3 * value
            parameter.copy_(value)
    return net


def small_esc(*, seed: int = 0, **changes: Any) -> ESC:
    """A randomised small network in evaluation mode; `changes` are options in place of those of `SMALL`."""
    net = ESC(**{**SMALL, **changes})
    randomise(net, seed)
    return net.eval()


def image(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random picture, (B, 3, H, W) or (3, H, W) in 0 .. 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite when a number is not finite, so that NaN never passes."""
    assert actual.shape == expected.shape
    error = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().max().item()
    return error if math.isfinite(error) else math.inf


def sum_rounding(exact: Tensor, terms: int) -> float:
    """What rounding may cost float32 sums of so many terms, one after the other, in any order.

    Errors of either sign add up to the square root of their number, in units of the largest result; 16 are for what is
    around the sum. The error of PyTorch's own kernels is no measure of it alone: on some processors they sum in
    blocks, and are several times nearer.
    """
    return torch.finfo(torch.float32).eps * math.sqrt(16 + terms) * exact.abs().max().item()


def attention_rounding(qkv: Tensor, bias: Bias, cotangent: Tensor, window: int, heads: int) -> list[float]:
    """What rounding may cost the gradients of `window_attention`: of qkv, and of the table or the two factors.

    The gradient of a query's scores is p (d - sum p d), d being the products of its cotangent and the values: a
    difference of almost equal numbers where values are alike, and 0 where a padded pixel repeats. So the error goes
    with the absolute values of what is subtracted and summed, not with the result: that sum of absolute values, times
    half a unit for each rounding on the way (of sums over a head's dimensions, the rank and the tokens), of which signs
    at random leave the square root.
    """
    qkv = qkv.detach().double().requires_grad_()
    leaves = [part.detach().double().requires_grad_() for part in parameters_of(bias)]
    dense = dense_bias(leaves[0] if isinstance(bias, Tensor) else (leaves[0], leaves[1]), window)
    q, k, v = split_windows(pad_to_windows(qkv, window), window, heads)
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.mT * scale + dense).softmax(-1)
    attended = (weights @ v).detach().requires_grad_()
    merged = merge_windows(attended, window, *qkv.shape[-2:])
    (upstream,) = torch.autograd.grad(merged, attended, cotangent.detach().double().abs())
    with torch.no_grad():
        products = upstream @ v.abs().mT
        of_scores = weights * (products + (weights * products).sum(-1, keepdim=True))
        of_parts = (of_scores @ k.abs() * scale, of_scores.mT @ q.abs() * scale, weights.mT @ upstream)
        of_bias = of_scores.sum(0)
    (of_qkv,) = torch.autograd.grad((q, k, v), qkv, of_parts)
    if isinstance(bias, Tensor):
        sums = [of_qkv, *torch.autograd.grad(dense, leaves, of_bias)]
    else:
        sums = [of_qkv, of_bias @ leaves[1].abs(), of_bias.mT @ leaves[0].abs()]
    rank = 0 if isinstance(bias, Tensor) else bias[0].shape[-1]
    roundings = q.shape[-1] + rank + window**2
    return [math.sqrt(roundings) * torch.finfo(torch.float32).eps / 2 * part.abs().max().item() for part in sums]


def reflected_indices(size: int, length: int) -> list[int]:
    """The pixels read by a row of `size` pixels that is padded to `length`: walk to and fro between its ends."""
    indices, position, step = [], 0, 1
    for _ in range(length):
        indices.append(position)
        if size > 1:
            if not 0 <= position + step < size:
                step = -step
            position += step
    return indices


def loop_bias(table: Tensor, window: int) -> Tensor:
    """(h, (2w - 1)^2) -> (h, N, N), the formula as nested loops; differentiable."""
    side = 2 * window - 1
    rows = []
    for head in table:
        for qy in range(window):
            for qx in range(window):
                for ky in range(window):
                    for kx in range(window):
                        rows.append(head[(ky - qy + window - 1) * side + (kx - qx + window - 1)])
    return torch.stack(rows).reshape(table.shape[0], window**2, window**2)


def loop_attention(qkv: Tensor, table: Tensor, window: int, heads: int) -> Tensor:
    """Window attention in float64, a window, an image and a head at a time: (B, 3C, H, W) -> (B, C, H, W)."""
    x = qkv.detach().double().cpu().numpy()
    bias = loop_bias(table.detach().double().cpu(), window).numpy()
    batch, channels, height, width = x.shape
    dim, head_dim = channels // 3, channels // 3 // heads
    x = x[:, :, reflected_indices(height, -(-height // window) * window)]
    x = x[:, :, :, reflected_indices(width, -(-width // window) * window)]
    out = np.zeros((batch, dim, *x.shape[2:]))
    for top in range(0, x.shape[2], window):
        for left in range(0, x.shape[3], window):
            for b in range(batch):
                for head in range(heads):
                    first = head * head_dim
                    patch = x[b, :, top : top + window, left : left + window].reshape(channels, window**2)
                    q, k, v = (patch[part * dim + first : part * dim + first + head_dim].T for part in range(3))
                    weights = np.exp(q @ k.T / math.sqrt(head_dim) + bias[head])
                    attended = weights @ v / weights.sum(1, keepdims=True)
                    target = out[b, first : first + head_dim, top : top + window, left : left + window]
                    target[...] = attended.T.reshape(head_dim, window, window)
    return torch.from_numpy(out[:, :, :height, :width].copy())


def average_of_symmetries(kernel: Tensor) -> Tensor:
    """The mean of a filter's four flips and of the four flips of its rotation by 90 degrees."""
    turned = torch.rot90(kernel, 1, (-2, -1))
    variants = [view.flip(axes) for view in (kernel, turned) for axes in ((), (-1,), (-2,), (-2, -1))]
    return torch.stack(variants).mean(dim=0)


def loop_conv_attention(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor) -> Tensor:
    """ConvAttn's convolutions, an image and a channel at a time."""
    images = []
    for picture, kernels in zip(x, dynamic_kernel, strict=True):
        pairs = zip(picture, kernels, strict=True)
        dynamic = [F.conv2d(channel[None, None], kernel[None, None], padding="same")[0] for channel, kernel in pairs]
        images.append(F.conv2d(picture[None], large_kernel, padding="same")[0] + torch.cat(dynamic))
    return torch.stack(images)


def reference_esc(weights: Mapping[str, Tensor], x: Tensor, *, window: int, heads: int, scale: int) -> Tensor:
    """The whole network in float64 from a state dict, as it is described, for any size of image."""
    weights = {name: value.detach().double() for name, value in weights.items()}
    x = x.double()

    def conv(name: str, value: Tensor, groups: int = 1) -> Tensor:
        return F.conv2d(value, weights[f"{name}.weight"], weights[f"{name}.bias"], padding="same", groups=groups)

    def gelu(value: Tensor) -> Tensor:
        return 0.5 * value * (1 + torch.erf(value / math.sqrt(2)))

    def norm(name: str, value: Tensor) -> Tensor:
        centred = value - value.mean(1, keepdim=True)
        value = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-6)
        return value * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def conv_ffn(name: str, value: Tensor) -> Tensor:
        value = gelu(conv(f"{name}.proj", value))
        value = gelu(conv(f"{name}.dwc", value, groups=value.shape[1])) + value
        return conv(f"{name}.aggr", value)

    def conv_attn(name: str, value: Tensor) -> Tensor:
        convolved, passed = value[:, :pdim], value[:, pdim:]
        mean = convolved.mean((2, 3), keepdim=True)
        kernel = conv(f"{name}.plk.dwc_proj.3", gelu(conv(f"{name}.plk.dwc_proj.1", mean)))
        convolved = loop_conv_attention(convolved, large_kernel, kernel.reshape(-1, pdim, 3, 3))
        return conv(f"{name}.aggr", torch.cat([convolved, passed], 1))

    def attention(name: str, value: Tensor) -> Tensor:
        table = weights[f"{name}.relative_position_bias"]
        return conv(f"{name}.to_out", loop_attention(conv(f"{name}.to_qkv", value), table, window, heads))

    large_kernel = average_of_symmetries(weights["plk_filter"])
    pdim = large_kernel.shape[0]
    shallow = feat = conv("proj", x)
    for block in sorted({name.split(".")[1] for name in weights if name.startswith("blocks.")}, key=int):
        block = f"blocks.{block}"
        skip = feat
        feat = conv_ffn(f"{block}.proj", norm(f"{block}.ln_proj", feat))
        feat = feat + attention(f"{block}.attn", norm(f"{block}.ln_attn", feat))
        for pair in range(sum(name.startswith(f"{block}.pconvs.") for name in weights) // 6):
            normed = norm(f"{block}.lns.{pair}", feat) if f"{block}.lns.{pair}.weight" in weights else feat
            feat = feat + conv_attn(f"{block}.pconvs.{pair}", conv_ffn(f"{block}.convffns.{pair}", normed))
        feat = conv(f"{block}.conv_out", norm(f"{block}.ln_out", feat)) + skip
    subpixels = conv("to_img", conv("last", feat) + shallow)
    enlarged = x.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    for colour in range(3):  # channel colour * s^2 + i * s + j is the pixel (i, j) of every s x s square
        for i in range(scale):
            for j in range(scale):
                enlarged[:, colour, i::scale, j::scale] += subpixels[:, colour * scale**2 + i * scale + j]
    return enlarged
