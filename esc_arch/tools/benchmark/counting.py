"""Multiply-adds of a network, counted on the meta device: nothing is computed, whatever the size of the image."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from esc_arch.archs import ESCLTE
from esc_arch.modules.window_attention import WindowAttention

__all__ = ["Operations", "count_operations"]

_LAYER_NORM = torch.ops.aten.native_layer_norm


@dataclass(frozen=True)
class Operations:
    """What a network has, and what one image costs."""

    parameters: int
    #: Multiply-adds of convolutions, linear layers and matrix products, both of attention included.
    products: int
    #: By the paper's convention, which is fvcore's: plus 5 for each output value of a LayerNorm, 1 for each input value
    #: of a global pool, and the q, k, v projection of the pixels that window attention pads (the paper pads before the
    #: projection, this package after it).
    paper: int
    #: Shape of the output.
    output: tuple[int, ...]


def count_operations(net: nn.Module, height: int, width: int) -> Operations:
    """Count the operations of one image (1, 3, H, W), attention by the plain formula; raises what the network raises.

    The network loses its weights: pass a new one.
    """
    extra = 0  # by hooks, because operators do not show it

    def count_extra(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal extra
        if isinstance(module, nn.AdaptiveAvgPool2d):
            extra += inputs[0].numel()
        elif isinstance(module, WindowAttention):
            _, channels, rows, columns = inputs[0].shape
            window = module.window_size
            padded = -(-rows // window) * -(-columns // window) * window**2
            extra += (padded - rows * columns) * 3 * channels**2

    net.eval().double().to("meta")  # no fused operator takes float64, so every product is an operator of PyTorch
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.attn_type = "naive"
        if isinstance(module, ESCLTE):
            module.query_chunk = None  # the same work in one part, which is traced sooner than many
    flops = {_LAYER_NORM: lambda shape, *_, **__: 2 * 5 * prod(shape)}
    counter = FlopCounterMode(display=False, custom_mapping=flops)
    with torch.no_grad(), register_module_forward_pre_hook(count_extra), counter:
        output = net(torch.empty(1, 3, height, width, dtype=torch.float64, device="meta"))
    norms = counter.get_flop_counts()["Global"].get(_LAYER_NORM, 0)
    products = (counter.get_total_flops() - norms) // 2  # a multiply-add is two FLOPs of PyTorch's counter
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return Operations(parameters, products, products + norms // 2 + extra, tuple(output.shape))
