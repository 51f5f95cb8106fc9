"""Multiply-adds of a network, counted by running it on tensors without numbers, in no memory and at any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from esc_arch.archs import ESCLTE
from esc_arch.modules.window_attention import WindowAttention

__all__ = ["Operations", "count_operations", "count_parameters"]

_LAYER_NORM = torch.ops.aten.native_layer_norm

#: What fvcore, whose counts the paper's equal, takes for a value that is normalised and for one that is averaged.
_PER_NORMALISED_VALUE = 5
_PER_POOLED_VALUE = 1


@dataclass(frozen=True)
class Operations:
    """What one image costs.

    Attributes:
        products: multiply-adds of convolutions, linear layers and matrix products, both of attention among them.
        paper: the same in the paper's convention, which adds 5 for each value that a LayerNorm makes, 1 for each that
            is averaged by a global pool, and the projection to q, k and v of what window attention pads: the paper
            pads before it, and this package after it.
        output: shape of what comes out.
    """

    products: int
    paper: int
    output: tuple[int, ...]


def count_parameters(net: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in net.parameters())


def count_operations(net: nn.Module, height: int, width: int) -> Operations:
    """Count what a network does with one image, attention in the plain formula.

    It runs in PyTorch's fake tensors, which have shapes alone. The network is spoiled by that: its weights are, too.

    Args:
        net: (1, 3, H, W) -> a tensor.
        height, width: H and W.

    Raises:
        Exception: what the network raises for such an image.
    """
    further = 0

    def add(values: int) -> None:
        nonlocal further
        further += values

    fake = FakeTensorMode(allow_non_fake_inputs=True)  # such as colours' means that are no buffers
    _make_plain(net)
    _forget_numbers(net, fake)
    counter = FlopCounterMode(display=False, custom_mapping={_LAYER_NORM: _layer_norm_flops})
    with torch.no_grad(), _what_operators_do_not_show(net, add), fake, counter:
        output = net(torch.empty(1, 3, height, width, dtype=torch.float64))
    counts = counter.get_flop_counts()["Global"]
    normalisation = counts.get(_LAYER_NORM, 0)
    products = (counter.get_total_flops() - normalisation) // 2
    return Operations(products, products + normalisation // 2 + further, tuple(output.shape))


def _make_plain(net: nn.Module) -> None:
    """Have every product done by an operator of PyTorch, whose shapes can be read."""
    net.eval().double()  # float64 is what no fast operator takes
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.attn_type = "naive"
        if isinstance(module, ESCLTE):
            module.query_chunk = None  # the same work in one part, which is traced sooner than many


def _forget_numbers(net: nn.Module, fake: FakeTensorMode) -> None:
    for module in net.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake.from_tensor(tensor)


def _layer_norm_flops(shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * _PER_NORMALISED_VALUE * prod(shape)  # the counter's unit is half a multiply-add


@contextmanager
def _what_operators_do_not_show(net: nn.Module, add: Callable[[int], None]) -> Iterator[None]:
    """Report, during a run, the operations of the paper's convention that belong to modules and not to operators."""

    def pooled(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        add(_PER_POOLED_VALUE * inputs[0].numel())

    def padded(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, WindowAttention)
        _, channels, height, width = inputs[0].shape
        window = module.window_size
        covered = -(-height // window) * -(-width // window) * window**2
        add((covered - height * width) * 3 * channels**2)

    with ExitStack() as stack:
        for module in net.modules():
            if isinstance(module, nn.AdaptiveAvgPool2d):
                stack.enter_context(module.register_forward_pre_hook(pooled))
            elif isinstance(module, WindowAttention):
                stack.enter_context(module.register_forward_pre_hook(padded))
        yield
