"""A network and the protocol around it as one module that can be exported, in operations that ONNX has.

Three things do not go into an ONNX graph as PyTorch runs them: a convolution with as many groups as the batch has
images, attention without the scores of all windows at once, and points of `LTE` a part at a time. The layers here stand
for these, for any batch and size, in memory that does not grow with both, with the same weights and results.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esc_arch.archs import ESCLTE
from esc_arch.archs.base import ESCFamily
from esc_arch.modules import LTE, ConvAttn, DecomposedConvAttn, DySample, LayerNorm
from esc_arch.modules.conv_attn import DYNAMIC_KERNEL_SIZE
from esc_arch.modules.lte import pixels_around
from esc_arch.modules.window_attention import WindowAttention
from esc_arch.ops.padding import reflect_pad_to_multiple
from esc_arch.ops.resize import scaled_size

__all__ = ["ExportedNetwork", "onnx_network"]


class ExportedNetwork(nn.Module):
    """A network with the test protocol of `Upscaler`: (B, 3, H, W) -> (B, 3, H', W').

    Args:
        net: not changed.
        pad: pad by reflection to whole windows and crop; otherwise run on the image as it is, like BasicSR's SRModel.
        dtype: what the network computes in; image and output are float32.
    """

    def __init__(self, net: ESCFamily, *, pad: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        _replace_layers(self.net, lambda layer: ExportedLTE(layer) if isinstance(layer, LTE) else None)
        self.dtype = dtype
        self.multiples = [net.window_size] * pad
        if not pad or net.window_size % net.unshuffle_factor:
            self.multiples.append(net.unshuffle_factor)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        shown = (image.shape[-2], image.shape[-1])
        size = scaled_size(shown, self.net.upscaling_factor)
        padded = image
        for multiple in self.multiples:
            padded = reflect_pad_to_multiple(padded, multiple) if multiple > 1 else padded
        padded = padded.to(self.dtype)
        if isinstance(self.net, ESCLTE):
            out: Tensor = self.net.lte(self.net.features(padded).float(), padded.float(), shown, size)
            return out
        shallow = self.net.shallow_features(padded)
        features = self.net.run_blocks(shallow, *self.net.large_kernels())
        out = self.net.reconstruct(features, shallow, padded).float()
        # A program of `torch.export` that slices refuses images without padding
        rows, columns = (torch.arange(number, device=out.device) for number in size)
        return out.index_select(-2, rows).index_select(-1, columns)


def onnx_network(net: ESCFamily, *, pad: bool = True, loop: bool = True, half: bool = False) -> ExportedNetwork:
    """The same in operations that ONNX has, for any batch and size.

    Args:
        net: in float32; not changed.
        pad, loop: see `ExportedNetwork` and `ExportedAttention`.
        half: compute in float16, but not normalisations, global pools, kernels made from them, nor DySample and LTE.
    """
    pads_windows = not pad or net.unshuffle_factor > 1

    def substitute(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, WindowAttention):
            return ExportedAttention(layer, pad=pads_windows, loop=loop)
        if isinstance(layer, ConvAttn | DecomposedConvAttn):
            return ExportedConvAttn(layer)
        return InFloat32(layer) if isinstance(layer, (LayerNorm, DySample, ExportedLTE)) else None

    exported = ExportedNetwork(net, pad=pad, dtype=torch.float16 if half else torch.float32)
    with torch.no_grad():
        _replace_layers(exported, substitute)
        if half:
            _halve(exported)
    return exported.eval()


def _replace_layers(module: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put what `substitute` returns in the place of every layer that it returns something for."""
    for name, child in module.named_children():
        new = substitute(child)
        if new is None:
            _replace_layers(child, substitute)
        else:
            setattr(module, name, new)


def _halve(module: nn.Module) -> None:
    if isinstance(module, InFloat32):
        return
    module._apply(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor, recurse=False)
    for child in module.children():
        _halve(child)


class InFloat32(nn.Module):
    """A layer computed in float32 inside a network of half precision: what `in_float32` is to autocast."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.float()

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        out: Tensor = self.layer(x.float(), *others)
        return out.to(x.dtype)


class ExportedAttention(nn.Module):
    """`WindowAttention`, in matrix products.

    Args:
        attention: its weights are used. A table of biases stays a table, which a graph makes the dense bias from; the
            factors of RIB are numbers from here on.
        pad: maps may be of any size, not of whole windows alone.
        loop: a window at a time (a head of it at a time, with factors), which bounds the memory: a Scan in ONNX.
    """

    q_factors: Tensor
    k_factors: Tensor
    table: Tensor
    places: Tensor

    def __init__(self, attention: WindowAttention, *, pad: bool, loop: bool) -> None:
        super().__init__()
        self.to_qkv, self.to_out, self.gate = attention.to_qkv, attention.to_out, attention.gate
        self.window, self.heads = attention.window_size, attention.num_heads
        self.channels = attention.to_out.in_channels
        self.pad, self.loop = pad, loop
        bias = attention.position_bias()
        self.factorised = not isinstance(bias, Tensor)
        if isinstance(bias, Tensor):
            self.register_buffer("table", bias.detach().clone())
            token = torch.arange(self.window**2, device=bias.device)
            # The place of a pair of tokens in the table is a difference of these; see `ops.window_attention.bias`
            places = token // self.window * (2 * self.window - 1) + token % self.window
            self.register_buffer("places", places)
        else:
            for name, factors in zip(("q_factors", "k_factors"), bias, strict=True):
                self.register_buffer(name, factors.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv = self.to_qkv(x)
        if self.pad:
            qkv = reflect_pad_to_multiple(qkv, self.window)
        batch, side = qkv.shape[0], self.window
        rows, columns = qkv.shape[-2] // side, qkv.shape[-1] // side
        # (No tensor of more than 6 dimensions: some runtimes take no more)
        windows = qkv.reshape(batch, 3 * self.channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        attended = self._attended(windows.reshape(-1, side**2, 3 * self.channels))
        attended = attended.reshape(batch, rows, columns, side, side, self.channels).permute(0, 5, 1, 3, 2, 4)
        attended = attended.reshape(batch, self.channels, rows * side, columns * side)
        if self.pad:
            attended = attended[..., :height, :width]
        if self.gate is not None:
            attended = attended * self.gate(x).sigmoid()
        return self.to_out(attended)

    def _attended(self, windows: Tensor) -> Tensor:
        """(G, N, 3C) -> (G, N, C)."""
        if self.factorised:
            q, k, v = self._parts(windows)
            q = torch.cat([q, self.q_factors.expand(q.shape[0], -1, -1, -1)], dim=-1)
            k = torch.cat([k, self.k_factors.expand(k.shape[0], -1, -1, -1)], dim=-1)
            if not self.loop:
                return self._joined(_attend(q, k, v))
            heads = _one_by_one(_attend, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
            return self._joined(heads.unflatten(0, (-1, self.heads)))

        def attend(some: Tensor) -> Tensor:
            # The bias is made in here because loops of OpenVINO take nothing from outside but constants. It is
            # a constant itself, which runtimes compute once.
            return self._joined(_attend(*self._parts(some), self._dense_bias()))

        return _one_by_one(lambda window: attend(window[None])[0], windows) if self.loop else attend(windows)

    def _parts(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(G, N, 3C) -> q, divided by the root of d, k and v, (G, h, N, d) each."""
        parts = windows.reshape(-1, self.window**2, 3, self.heads, self.channels // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return q * q.shape[-1] ** -0.5, k, v

    def _joined(self, heads: Tensor) -> Tensor:
        """(G, h, N, d) -> (G, N, C)."""
        return heads.permute(0, 2, 1, 3).reshape(-1, self.window**2, self.channels)

    def _dense_bias(self) -> Tensor:
        """(h, N, N), by a gather: the graph keeps the table, which is a thousandth of the size."""
        tokens = self.window**2
        index = 2 * self.window * (self.window - 1) + self.places - self.places[:, None]
        return self.table.index_select(1, index.flatten()).reshape(self.heads, tokens, tokens)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def _one_by_one(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The results of `function` for each element of the inputs' first dimension, stacked: a Scan in ONNX."""
    from torch._higher_order_ops.scan import scan

    def step(carried: Tensor, elements: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return carried.clone(), function(*elements)

    # (It insists on something to carry from step to step)
    results: Tensor = scan(step, torch.zeros(1, device=inputs[0].device), inputs)[1]
    return results


class ExportedConvAttn(nn.Module):
    """`ConvAttn` or `DecomposedConvAttn`, with the kernel made from the image applied by `depthwise`."""

    def __init__(self, layer: ConvAttn | DecomposedConvAttn) -> None:
        super().__init__()
        self.pdim, self.plk, self.aggr = layer.pdim, InFloat32(layer.plk), layer.aggr

    def forward(self, x: Tensor, *kernels: Tensor, means: Tensor | None = None) -> Tensor:
        # (`means` are those of x, which is a whole image here)
        convolved, passed = x[:, : self.pdim], x[:, self.pdim :]
        dynamic = self.plk(convolved)
        *mixing, large = kernels  # ConvAttn's kernel; DecomposedConvAttn's mixing of channels, and depth-wise kernel
        for kernel in mixing:
            convolved = F.conv2d(convolved, kernel)
        static = F.conv2d(convolved, large, padding=large.shape[-1] // 2, groups=self.pdim // large.shape[1])
        return self.aggr(torch.cat([static + depthwise(convolved, dynamic), passed], dim=1))


def depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """A kernel of its own for each channel of each image, without a convolution of as many groups.

    A fixed convolution puts the 9 neighbours of every pixel beside each other; what is added up is exact.

    Args:
        x: (B, C, H, W).
        kernel: (B, C, 3, 3).
    """
    channels, taps = kernel.shape[1], DYNAMIC_KERNEL_SIZE**2
    one_hot = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *kernel.shape[2:])
    neighbours = F.conv2d(x, one_hot.repeat(channels, 1, 1, 1), padding=DYNAMIC_KERNEL_SIZE // 2, groups=channels)
    weighted = neighbours * kernel.reshape(-1, channels * taps, 1, 1)
    return weighted.unflatten(1, (channels, taps)).sum(dim=2)


class ExportedLTE(nn.Module):
    """`LTE` for a whole image, a row of it at a time.

    Shapes: features (B, dim, H, W) and image (B, 3, H, W), of which the first `shown` rows and columns are to be
    enlarged to `size` -> (B, 3, *size).
    """

    def __init__(self, lte: LTE) -> None:
        super().__init__()
        self.lte = lte

    def forward(self, features: Tensor, image: Tensor, shown: tuple[int, int], size: tuple[int, int]) -> Tensor:
        lte, (batch, _, height, width) = self.lte, image.shape
        maps = lte.maps(features, image)

        def number(side: int) -> Tensor:  # as few runtimes divide symbols
            return torch.full((), side, dtype=torch.float32, device=image.device)

        # How many pixels of the features a pixel of the result covers
        ratios = [number(part) / number(whole) for part, whole in zip(shown, size, strict=True)]
        phase = lte.phase((2 * torch.stack(ratios)).clamp(min=2 / lte.max_scale)) * math.pi
        phase = phase.expand(batch, 1, -1)
        centres = [(torch.arange(n, device=image.device) + 0.5) * r - 0.5 for n, r in zip(size, ratios, strict=True)]
        rows = pixels_around(centres[0], number(height) - 1)
        x, d_x, w_x = pixels_around(centres[1], number(width) - 1)
        images = torch.arange(batch, device=image.device)[:, None] * (height * width)

        def row(y: Tensor, d_y: Tensor, w_y: Tensor) -> Tensor:  # (2) each -> (B, 3, W')
            index = (images + (y[:, None] * width + x[:, None, :]).flatten()).flatten()  # (B * W' * 4)
            delta = torch.stack(torch.broadcast_tensors(d_y[:, None], d_x[:, None, :]), dim=-1).reshape(-1, 2)
            weight = (w_y[:, None] * w_x[:, None, :]).reshape(-1, 1)
            return lte.colours(maps, phase, index, delta.repeat(batch, 1), weight.repeat(batch, 1))

        return _one_by_one(row, *rows).permute(1, 2, 0, 3)
