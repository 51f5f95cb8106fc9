"""Both convolutions in one Triton kernel: the large one on tensor cores, the dynamic one in the same pass.

The first C channels of a channels-last map are read where they are; any other layout is copied first, C channels once
where the kernel reads each number dozens of times. Every gradient is a sum in a fixed order: repeated runs are equal to
the last bit. float32 is multiplied as PyTorch's convolutions are told to (`torch.backends.cudnn.allow_tf32`: TF32
unless switched off), half types with sums in float32.

Rows of a symmetric kernel are folded: pixels as far above as below meet the same taps and are added before the product,
so that there are half as many. The sums are rounded to the type of the map once, which adds about as much error as
rounding the output does; in float16 pixels must stay below 32752 for that.

The first call for a combination of type, channels and kernel size compiles up to five variants of a kernel and measures
which is the fastest; the choice and the kernels stay in Triton's cache on disk. New sizes of images compile nothing.
Inside a CUDA graph that choice cannot be made: call once before capturing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esc_arch.ops import triton_support
from esc_arch.ops.autotune import results
from esc_arch.ops.float32 import tf32_in_convolutions
from esc_arch.ops.layout import empty_like, is_channels_last
from esc_arch.ops.operation import wants_gradients
from esc_arch.ops.triton_support import precision

#: Channels of a group of outputs: as wide as the registers of a multiprocessor allow.
MAX_CHANNELS = 64
#: Programs that share a map when the kernels' gradients are summed: enough to keep every GPU busy.
PROGRAMS = 256


def unsupported_reasons(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> list[str]:
    """Why these kernels cannot take these inputs."""
    reasons = triton_support.unsupported_reasons(x)
    if any(kernel.device != x.device for kernel in (large_kernel, dynamic_kernel)):
        reasons.append(f"x is on {x.device}, the kernels are on {large_kernel.device} and {dynamic_kernel.device}")
    if x.shape[1] > MAX_CHANNELS:
        reasons.append(f"it takes up to {MAX_CHANNELS} channels, not {x.shape[1]}")
    if x.numel() == 0:
        reasons.append("there is nothing to compute")
    return reasons


def auto_skip_reasons(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> list[str]:
    """Why `auto` leaves these kernels to those who ask for them by name."""
    if not symmetric:
        return ["its trials are of symmetric kernels"]
    training = wants_gradients(x, large_kernel, dynamic_kernel)
    # (Of the kernel, whose sizes no compiler at work takes for symbols)
    network = results.nearest(pdim=large_kernel.shape[0])
    where = x.device.type, x.device.index
    return results.auto_skip_reasons("ConvAttn", network, _computed_in(x), tf32_in_convolutions(), training, *where)


def _computed_in(x: Tensor) -> torch.dtype:
    """The type of the map, or that of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def forward(x: Tensor, large_kernel: Tensor, dynamic_kernel: Tensor, symmetric: bool) -> Tensor:
    """Both convolutions; see `conv_attention`."""
    x = x.to(_computed_in(x))
    # Laid out here, where a compiler sees that all layers of a network share it
    taps = large_kernel.permute(2, 3, 0, 1).to(x.dtype).contiguous()
    return _convolve(x, taps, dynamic_kernel, symmetric)


@torch.library.custom_op("esc_arch::conv_attention_triton", mutates_args=())
def _convolve(x: Tensor, taps: Tensor, dynamic: Tensor, fold: bool) -> Tensor:
    """x (B, C, H, W), taps (K, K, C out, C in) of its type, dynamic (B, C, s, s) -> (B, C, H, W)."""
    out = empty_like(x)
    _convolve_into(out, x, taps, dynamic, fold)
    return out


_convolve.register_fake(lambda x, taps, dynamic, fold: empty_like(x))


def _convolve_into(out: Tensor, x: Tensor, taps: Tensor, dynamic: Tensor, fold: bool) -> None:
    from .triton_kernels import convolve

    x, pixel = _readable(x)
    batch, _, height, width = x.shape

    def grid(meta: dict[str, Any]) -> tuple[int]:
        group = max(meta["COLUMNS"] // meta["BLOCK_C"], 1)
        return (math.ceil(batch * height * math.ceil(width / group) / meta["BLOCK"]),)

    constants = _constants(x, taps) | {"PIXEL": pixel, "DYNAMIC_SIDE": dynamic.shape[-1], "FOLD": fold}
    taps, dynamic = taps.contiguous(), dynamic.contiguous()
    with torch.cuda.device_of(x):
        convolve[grid](x, taps, dynamic, out, batch, height, width, OUT_LAST=is_channels_last(out), **constants)


@torch.library.custom_op("esc_arch::conv_attention_backward_triton", mutates_args=())
def _differentiate(
    gradient: Tensor, x: Tensor, taps: Tensor, dynamic: Tensor, fold: bool, of_x: bool, of_taps: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, in float32, of the taps; empty if not asked for."""
    d_x = empty_like(x) if of_x else x.new_empty(0)
    if of_x:
        _convolve_into(d_x, gradient, taps.flip((0, 1)).transpose(2, 3), dynamic.flip((2, 3)), fold)
    return d_x, _differentiate_taps(gradient, x, taps, fold) if of_taps else x.new_empty(0, dtype=torch.float32)


@_differentiate.register_fake
def _(
    gradient: Tensor, x: Tensor, taps: Tensor, dynamic: Tensor, fold: bool, of_x: bool, of_taps: bool
) -> tuple[Tensor, Tensor]:
    d_taps = x.new_empty(taps.shape if of_taps else (0,), dtype=torch.float32)
    return empty_like(x) if of_x else x.new_empty(0), d_taps


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.fold = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, taps, dynamic = ctx.saved_tensors
    of_x, of_taps, of_dynamic, _ = ctx.needs_input_grad
    d_x, d_taps = _differentiate(gradient, x, taps, dynamic, ctx.fold, of_x, of_taps)
    d_dynamic = _differentiate_dynamic(gradient, x, dynamic.shape[-1]).to(dynamic.dtype) if of_dynamic else None
    return d_x if of_x else None, d_taps.to(taps.dtype) if of_taps else None, d_dynamic, None


_convolve.register_autograd(_backward, setup_context=_keep)


def _differentiate_taps(gradient: Tensor, x: Tensor, taps: Tensor, fold: bool) -> Tensor:
    """(K, K, C out, C in), float32; with `fold` the mean of its rows above and below the centre."""
    from .triton_kernels import correlate

    side, channels = taps.shape[0], taps.shape[2]
    x, pixel = _readable(x)
    gradient, gradient_pixel = _readable(gradient)
    batch, _, height, width = x.shape
    constants = _constants(x, taps)
    block_c = constants["BLOCK_C"]
    group, count = 64 // block_c, 256 // block_c
    block = 64 if x.dtype is not torch.float32 else 32
    rows, steps = side // 2 + 1 if fold else side, math.ceil((group + side - 1) / count)
    blocks = math.ceil(batch * height * math.ceil(width / group) / block)
    share = math.ceil(blocks / math.ceil(PROGRAMS / (rows * steps)))
    constants |= {"PIXEL": pixel, "GRADIENT_PIXEL": gradient_pixel, "FOLD": fold}
    constants |= {"GROUP": group, "COUNT": count, "BLOCK": block, "num_warps": 8, "num_stages": 2}
    sums = x.new_empty(math.ceil(blocks / share), rows, steps * count, block_c, group, block_c, dtype=torch.float32)
    with torch.cuda.device_of(x):
        correlate[(rows * steps, sums.shape[0])](x, gradient, sums, batch, height, width, share, **constants)
    band = sums.sum(0).movedim(2, 4)
    of_rows = sum(band[:, g : g + side, g, :channels, :channels] for g in range(group))
    assert isinstance(of_rows, Tensor)
    if fold:  # the sum over a row and its mirror image went to both
        of_rows[:-1] /= 2
        of_rows = torch.cat([of_rows, of_rows[:-1].flip(0)])
    return of_rows.contiguous()


def _differentiate_dynamic(gradient: Tensor, x: Tensor, side: int) -> Tensor:
    """(B, C, s, s), float32. In PyTorch: nine products a pixel are next to nothing beside those of the large kernel."""
    neighbours = F.pad(x, (side // 2,) * 4).unfold(2, side, 1).unfold(3, side, 1)
    return (neighbours * gradient.float()[..., None, None]).sum((2, 3))


def _constants(x: Tensor, taps: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for."""
    channels = x.shape[1]
    return {
        "C": channels,
        "BLOCK_C": max(16, 1 << (channels - 1).bit_length()),
        "SIDE": taps.shape[0],
        "PRECISION": precision(x, tf32_in_convolutions()),
    }


def _readable(x: Tensor) -> tuple[Tensor, int]:
    """A map whose channels lie side by side and whose pixels equally far from each other, and how far."""
    batch, channels, height, width = x.shape
    steps = ((width, x.stride(3), 1), (height, x.stride(2), width), (batch, x.stride(0), height * width))
    distances = {stride / pixels for count, stride, pixels in steps if count > 1} or {float(channels)}
    (distance, *others) = distances
    if others or not distance.is_integer() or distance < channels or (channels > 1 and x.stride(1) != 1):
        return x.contiguous(memory_format=torch.channels_last), channels
    return x, int(distance)
