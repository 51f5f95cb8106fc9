"""Operations: what is counted equals formulas of the layers' shapes, and another counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import basicsr.archs.swinir_arch as swinir
import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esc_arch.archs import ESC, ESCFP, ESCLTE, ESCRIB, ESCReal
from esc_arch.modules import ConvAttn, ConvFFN, DecomposedConvAttn
from esc_arch.modules.window_attention import WindowAttention
from esc_arch.tools.benchmark.counting import count_operations

SMALL: dict[str, Any] = {
    "dim": 16,
    "pdim": 4,
    "kernel_size": 5,
    "n_blocks": 2,
    "conv_blocks": 2,
    "window_size": 8,
    "num_heads": 2,
    "upscaling_factor": 2,
}
SWINIR: dict[str, Any] = {
    "img_size": 16,
    "window_size": 8,
    "depths": [2, 1],
    "embed_dim": 12,
    "num_heads": [2, 3],
    "mlp_ratio": 2,
    "upsampler": "pixelshuffledirect",
    "upscale": 2,
}
#: Makes a network, height and width for it.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ESC": (lambda: ESC(**SMALL), 20, 27),
    "whole windows": (lambda: ESC(**SMALL), 16, 24),
    "ESC-XL's norms": (lambda: ESC(**SMALL, use_ln=True), 9, 5),
    "FlashBias": (lambda: ESC(**SMALL, attn_type="FlashBias", rank=3), 20, 27),
    "ESCFP": (lambda: ESCFP(**SMALL), 20, 27),
    "ESCReal": (lambda: ESCReal(**{**SMALL, "upscaling_factor": 4}), 10, 11),
    "SwinIR": (lambda: swinir.SwinIR(**SWINIR), 16, 24),
    "EDSR": (lambda: EDSR(3, 3, num_feat=8, num_block=2, upscale=3), 10, 11),
}


def covered(height: int, width: int, window: int) -> int:
    """Pixels of the windows that cover a map."""
    return -(-height // window) * -(-width // window) * window**2


def conv(layer: nn.Conv2d, x: Tensor, out: Tensor) -> int:
    return out.numel() * layer.weight[0].numel()


def linear(layer: nn.Linear, x: Tensor, out: Tensor) -> int:
    return out.numel() * layer.in_features


def conv_ffn(layer: ConvFFN, x: Tensor, out: Tensor) -> int:
    _, dim, height, width = x.shape
    hidden = layer.proj.out_channels
    return height * width * hidden * (dim + 9 + dim)


def conv_attn(layer: ConvAttn | DecomposedConvAttn, x: Tensor, out: Tensor) -> int:
    _, dim, height, width = x.shape
    pixels, pdim, taps = height * width, layer.pdim, layer.kernel_size**2
    if isinstance(layer, ConvAttn):
        hidden, per_pixel = pdim // 2, pdim * pdim * taps + 9 * pdim
    else:
        hidden, per_pixel = pdim // 4, pdim * pdim + pdim * taps
    return pixels * (per_pixel + dim**2) + pdim * hidden + hidden * 9 * pdim


def attention(layer: WindowAttention, x: Tensor, out: Tensor) -> int:
    _, dim, height, width = x.shape
    tokens = layer.window_size**2
    bias = layer.position_bias()
    factors = 0 if isinstance(bias, Tensor) else bias[0].numel() * tokens
    return 4 * height * width * dim**2 + 2 * covered(height, width, layer.window_size) * tokens * dim + factors


def swinir_attention(layer: Any, x: Tensor, out: Tensor) -> int:
    windows, tokens, dim = x.shape
    return windows * (4 * tokens * dim**2 + 2 * tokens**2 * dim)


FORMULAS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], int]] = {
    ConvFFN: conv_ffn,
    ConvAttn: conv_attn,
    DecomposedConvAttn: conv_attn,
    WindowAttention: attention,
    swinir.WindowAttention: swinir_attention,
    nn.Conv2d: conv,
    nn.Linear: linear,
}


def products_by_formula(net: nn.Module, image: Tensor) -> int:
    """The sum of each layer's formula, with what a real run hands to the layers; layers in layers are not asked."""
    total = 0

    def watch(module: nn.Module) -> None:
        formula = next((formula for kind, formula in FORMULAS.items() if isinstance(module, kind)), None)
        if formula is None:
            for child in module.children():
                watch(child)
            return

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            nonlocal total
            total += formula(layer, inputs[0], out)

        module.register_forward_hook(add)

    watch(net)
    with torch.no_grad():
        net(image)
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_products_against_formulas(name: str) -> None:
    make, height, width = NETWORKS[name]
    expected = products_by_formula(make().eval(), torch.rand(1, 3, height, width))
    assert count_operations(make(), height, width).products == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_products_against_a_counter_of_a_real_run(name: str) -> None:
    make, height, width = NETWORKS[name]
    net = make().eval().double()  # the products of plain PyTorch
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.attn_type = "naive"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.rand(1, 3, height, width, dtype=torch.float64))
    assert count_operations(make(), height, width).products == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["ESC", "whole windows", "ESC-XL's norms", "ESCFP", "SwinIR"])
def test_what_the_papers_convention_adds(name: str) -> None:
    make, height, width = NETWORKS[name]
    net, added = make().eval(), 0

    def normalised(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal added
        added += 5 * out.numel()

    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(normalised)
    with torch.no_grad():
        net(torch.rand(1, 3, height, width))
    blocks, pixels = SMALL["n_blocks"], height * width
    if name != "SwinIR":
        added += blocks * SMALL["conv_blocks"] * SMALL["pdim"] * pixels
        added += blocks * 3 * SMALL["dim"] ** 2 * (covered(height, width, SMALL["window_size"]) - pixels)
    counted = count_operations(make(), height, width)
    assert counted.paper - counted.products == added


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_the_backend_does_not_matter(backend: str) -> None:
    assert count_operations(ESC(**SMALL, attn_type=backend), 20, 27) == count_operations(ESC(**SMALL), 20, 27)


def test_the_bias_of_rib_does_not_grow_with_the_image() -> None:
    small, large = (count_operations(ESCRIB(**SMALL), 8, width).products for width in (8, 16))
    larger = count_operations(ESCRIB(**SMALL), 8, 24).products
    assert larger - large == large - small
    assert 0 < 2 * small - large < small  # the networks of coordinates, and the pooled kernels


def test_queries_in_parts_cost_the_same() -> None:
    options = {**SMALL, "hidden_dim": 8, "mlp_dims": [8, 8]}
    parts, whole = (count_operations(ESCLTE(**options, query_chunk=n), 10, 11) for n in (100, None))
    assert parts == whole
    assert whole.output == (1, 3, 20, 22)


def test_nothing_is_computed() -> None:
    operations = count_operations(ESC(**SMALL), 10_000, 10_000)  # a feature map of it would be 12.8 GB
    assert operations.output == (1, 3, 20_000, 20_000)


def test_fvcore_counts_as_the_paper_does() -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    net = ESC(**SMALL).eval()
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.attn_type = "naive"
    analysis = fvcore.FlopCountAnalysis(net, torch.rand(1, 3, 16, 24))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert count_operations(ESC(**SMALL), 16, 24).paper == analysis.total()
