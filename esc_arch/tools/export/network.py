"""A network and the protocol around it as one module that can be exported."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from esc_arch.archs import ESCLTE
from esc_arch.archs.base import ESCFamily
from esc_arch.modules import ConvAttn, DecomposedConvAttn, DySample, LayerNorm
from esc_arch.modules.lte import LTE, query_grid
from esc_arch.modules.window_attention import WindowAttention
from esc_arch.ops.padding import reflect_pad_to_multiple
from esc_arch.ops.resize import scaled_size

from .layers import (
    ExportedAttention,
    ExportedConvAttn,
    ExportedLTE,
    InFloat32,
    replace_layers,
)

__all__ = ["ExportedNetwork", "onnx_network"]


class ExportedNetwork(nn.Module):
    """A network with the test protocol of `Upscaler`: (B, 3, H, W) -> (B, 3, H', W').

    Args:
        pad: pad by reflection to whole windows and crop; otherwise run on the image as it is, like BasicSR's SRModel.
        dtype: what the network computes in; image and output are float32.
        slices: crop by slicing, the fastest way, with which a `torch.export` program refuses images without padding.
    """

    def __init__(
        self, net: ESCFamily, *, pad: bool = True, dtype: torch.dtype = torch.float32, slices: bool = False
    ) -> None:
        super().__init__()
        self.net = net
        self.dtype = dtype
        self.slices = slices
        self.multiples = [net.window_size] * pad
        if not pad or net.window_size % net.unshuffle_factor:
            self.multiples.append(net.unshuffle_factor)

    def forward(self, image: Tensor) -> Tensor:
        shown = (image.shape[-2], image.shape[-1])
        size = scaled_size(shown, self.net.upscaling_factor)
        padded = image
        for multiple in self.multiples:
            padded = reflect_pad_to_multiple(padded, multiple) if multiple > 1 else padded
        padded = padded.to(self.dtype)
        if isinstance(self.net, ESCLTE):
            lte, features = self.net.lte, self.net.features(padded)
            if isinstance(lte, LTE):
                part = (shown[0] / padded.shape[-2], shown[1] / padded.shape[-1])
                coords, cell = query_grid(size, device=image.device, part=part)
                count = image.shape[0]
                points = lte(features, padded, coords.expand(count, -1, -1), cell.expand(count, -1))
                return points.float().unflatten(-1, size)
            exported: Tensor = lte(features.float(), padded.float(), shown, size)
            return exported
        shallow = self.net.shallow_features(padded)
        features = self.net.run_blocks(shallow, *self.net.large_kernels())
        out = self.net.reconstruct(features, shallow, padded).float()
        if self.slices:
            return out[..., : size[0], : size[1]]
        rows, columns = (torch.arange(number, device=out.device) for number in size)
        return out.index_select(-2, rows).index_select(-1, columns)


def onnx_network(net: ESCFamily, *, pad: bool = True, loop: bool = True, half: bool = False) -> ExportedNetwork:
    """The same in operations that ONNX has, for any batch and size.

    Args:
        net: in float32; not changed.
        pad, loop: see `ExportedNetwork` and `ExportedAttention`.
        half: compute in float16, but not normalisations, global pools, kernels made from them, nor DySample and LTE.
    """
    net = copy.deepcopy(net)
    whole_windows = pad and net.unshuffle_factor == 1
    with torch.no_grad():
        replace_layers(net, lambda layer: _exported(layer, pad=not whole_windows, loop=loop))
        if half:
            _halve(net)
    return ExportedNetwork(net, pad=pad, dtype=torch.float16 if half else torch.float32, slices=True).eval()


def _exported(layer: nn.Module, *, pad: bool, loop: bool) -> nn.Module | None:
    if isinstance(layer, WindowAttention):
        return ExportedAttention(layer, pad=pad, loop=loop)
    if isinstance(layer, ConvAttn | DecomposedConvAttn):
        return ExportedConvAttn(layer)
    if isinstance(layer, LTE):
        return InFloat32(ExportedLTE(layer))
    return InFloat32(layer) if isinstance(layer, (LayerNorm, DySample)) else None


def _halve(module: nn.Module) -> None:
    if isinstance(module, InFloat32):
        return
    module._apply(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor, recurse=False)
    for child in module.children():
        _halve(child)
