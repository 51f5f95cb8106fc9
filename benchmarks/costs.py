"""What a network has to do at least: multiply-adds and bytes, counted from the shapes its layers meet.

Nothing is computed: the network runs on PyTorch's fake tensors, which have shapes and no values.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import esc_arch  # isort: skip  # noqa: F401  makes basicsr importable
import torch
from basicsr.archs import swinir_arch
from common import plain_operations
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from esc_arch.modules.conv_attn import DYNAMIC_KERNEL_SIZE, ConvAttn, DecomposedConvAttn
from esc_arch.modules.conv_ffn import ConvFFN
from esc_arch.modules.window_attention import WindowAttention

__all__ = ["Costs", "costs_of", "window_attention_costs"]


@dataclass
class Costs:
    """Of one forward pass.

    Attributes:
        multiply_adds: as papers count them (and call FLOPs): the sums of convolutions, linear layers and attention
            products, the whole large kernel and the padding to whole windows included.
        symmetric: the same, when of the large kernel only the taps that differ are multiplied.
        numbers: tensor elements that are moved when each layer is one kernel that reads its input and its weights
            once and writes its output once: what is less needs several layers in a kernel.
    """

    multiply_adds: int = 0
    symmetric: int = 0
    numbers: int = 0

    def add(self, multiply_adds: int, symmetric: int | None = None) -> None:
        self.multiply_adds += multiply_adds
        self.symmetric += multiply_adds if symmetric is None else symmetric


def window_attention_costs(shape: tuple[int, ...], window: int) -> Costs:
    """Of attention alone, from the projection (B, 3C, H, W) to the map of this shape, (B, C, H, W)."""
    batch, channels, height, width = shape
    costs = Costs(numbers=batch * 4 * channels * height * width)
    tokens = window**2 * -(-height // window) * -(-width // window)
    costs.add(2 * batch * tokens * window**2 * channels)  # q k^T and the weighted sum of v
    return costs


def costs_of(net: nn.Module, image: tuple[int, ...]) -> Costs:
    """Costs of a network of the ESC family or of SwinIR for an image (B, 3, H, W)."""
    costs = Costs()
    counted = copy.deepcopy(net).cpu().float().eval()
    inside = {inner for module in counted.modules() if isinstance(module, _LAYERS) for inner in _below(module)}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights = sum(parameter.numel() for parameter in module.parameters())
        costs.numbers += inputs[0].numel() + output.numel() + weights
        costs.add(*_multiply_adds(module, inputs[0], output))

    for module in counted.modules():
        if isinstance(module, (*_LAYERS, nn.Conv2d)) and module not in inside:
            module.register_forward_hook(count)
    with torch.no_grad(), plain_operations(counted), FakeTensorMode(allow_non_fake_inputs=True):
        counted(torch.empty(image))
    return costs


#: Layers of several steps. What is inside is counted with them: backends compute some steps without their modules.
_LAYERS = (ConvFFN, WindowAttention, ConvAttn, DecomposedConvAttn, swinir_arch.WindowAttention, swinir_arch.Mlp)


def _below(module: nn.Module) -> set[nn.Module]:
    return set(module.modules()) - {module}


def _multiply_adds(module: nn.Module, x: Tensor, output: Tensor) -> tuple[int, int]:
    """Of a layer: all, and with the large kernel's symmetry."""
    if isinstance(module, nn.Conv2d):
        products = output.numel() * module.weight[0].numel()
        return products, products
    # Every weight of a convolution or a linear layer multiplies once at each pixel, but for those of the pooled map
    pixels = output.numel() // output.shape[-1 if isinstance(module, _SWINIR) else 1]
    dense = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    pooled = _below(module.plk) if isinstance(module, (ConvAttn, DecomposedConvAttn)) else set()
    products = sum(layer.weight.numel() * (x.shape[0] if layer in pooled else pixels) for layer in dense)
    if isinstance(module, swinir_arch.WindowAttention):
        products += 2 * x.numel() * x.shape[1]
    elif isinstance(module, WindowAttention):
        products += _attention_products(module, x)
    elif isinstance(module, DecomposedConvAttn):
        products += pixels * module.pdim * (module.pdim + module.kernel_size**2)
    elif isinstance(module, ConvAttn):
        products += pixels * module.pdim * DYNAMIC_KERNEL_SIZE**2
        reach = module.kernel_size // 2
        taps, distinct = module.kernel_size**2, (reach + 1) * (reach + 2) // 2
        return products + pixels * module.pdim**2 * taps, products + pixels * module.pdim**2 * distinct
    return products, products


_SWINIR = (swinir_arch.WindowAttention, swinir_arch.Mlp)


def _attention_products(module: WindowAttention, x: Tensor) -> int:
    """With the projection of the padding, which the formula has and some backends save."""
    height, width = (-(-side // module.window_size) * module.window_size for side in x.shape[-2:])
    padding = x.shape[0] * (height * width - x.shape[-2] * x.shape[-1])
    products = window_attention_costs(tuple(x.shape), module.window_size).multiply_adds
    return products + module.to_qkv.weight.numel() * padding
