"""What a network has to do at least: multiply-adds and numbers moved, counted from the shapes its layers meet.

Nothing is computed: see `esc_arch.tools.benchmark.counting`, which counts the multiply-adds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import esc_arch  # isort: skip  # noqa: F401  makes basicsr importable
from basicsr.archs import swinir_arch
from torch import Tensor, nn

from esc_arch.modules.conv_attn import ConvAttn, DecomposedConvAttn
from esc_arch.modules.conv_ffn import ConvFFN
from esc_arch.modules.window_attention import WindowAttention
from esc_arch.tools.benchmark.counting import count_operations

__all__ = ["Costs", "costs_of", "window_attention_costs"]


@dataclass
class Costs:
    """Of one forward pass of one image.

    Attributes:
        multiply_adds: of convolutions, linear layers and attention products, the whole large kernel included.
        symmetric: the same, when of the large kernel only the taps that differ are multiplied.
        numbers: tensor elements that are moved when each layer is one kernel that reads its input and its weights
            once and writes its output once: what is less needs several layers in a kernel.
    """

    multiply_adds: int
    symmetric: int
    numbers: int


def window_attention_costs(shape: tuple[int, int, int], window: int) -> Costs:
    """Of attention alone, from the projection (1, 3C, H, W) to the map of this shape, (C, H, W)."""
    channels, height, width = shape
    tokens = window**2 * -(-height // window) * -(-width // window)
    products = 2 * tokens * window**2 * channels  # q k^T and the weighted sum of v
    return Costs(products, products, 4 * channels * height * width)


def costs_of(net: nn.Module, height: int, width: int) -> Costs:
    """Costs of a network for an image (1, 3, H, W)."""
    counted = copy.deepcopy(net)
    inside = {part for module in counted.modules() if isinstance(module, _LAYERS) for part in [*module.modules()][1:]}
    numbers = saved = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal numbers, saved
        weights = sum(parameter.numel() for parameter in module.parameters())
        numbers += inputs[0].numel() + output.numel() + weights
        if isinstance(module, ConvAttn):
            reach = module.kernel_size // 2
            equal = module.kernel_size**2 - (reach + 1) * (reach + 2) // 2
            saved += output[0, 0].numel() * module.pdim**2 * equal

    for module in counted.modules():
        if isinstance(module, (*_LAYERS, nn.Conv2d)) and module not in inside:
            module.register_forward_hook(count)
    products = count_operations(counted, height, width).products
    return Costs(products, products - saved, numbers)


#: Layers of several steps, which a kernel may compute at once.
_LAYERS = (ConvFFN, WindowAttention, ConvAttn, DecomposedConvAttn, swinir_arch.WindowAttention, swinir_arch.Mlp)
