"""A network and the protocol around it as one module that can be exported."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from esc_arch.archs import ESCLTE
from esc_arch.archs.base import ESCFamily
from esc_arch.modules import LTE, ConvAttn, DecomposedConvAttn, DySample, LayerNorm
from esc_arch.modules.window_attention import WindowAttention
from esc_arch.ops.padding import reflect_pad_to_multiple
from esc_arch.ops.resize import scaled_size

from .layers import ExportedAttention, ExportedConvAttn, ExportedLTE, InFloat32

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
