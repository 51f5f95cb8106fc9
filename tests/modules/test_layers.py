"""The layers: initial values, names, errors, and independence of copies, mode and batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    BACKENDS,
    SIZES,
    average_of_symmetries,
    loop_attention,
    loop_conv_attention,
    max_error,
    needs_compiler,
    normal,
)
from networks import randomise as randomised
from torch import Tensor, nn

from esc_arch.modules import (
    ConvAttn,
    ConvFFN,
    FlashWindowAttention,
    LayerNorm,
)
from esc_arch.modules.conv_attn import new_large_kernel
from esc_arch.modules.upsample import pixel_shuffle_with_skip, rescale_subpixel_conv

FLOAT64 = {"dtype": torch.float64}


def names(net: nn.Module) -> set[str]:
    return set(net.state_dict())


# --- names and initial values --------------------------------------------------------------------------------------


def test_names_of_the_parameters() -> None:
    def pairs(*layers: str) -> set[str]:
        return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}

    assert names(LayerNorm(8)) == {"weight", "bias"}
    assert names(ConvFFN(8, 1.25)) == pairs("proj", "dwc", "aggr")
    conv_attn = pairs("plk.dwc_proj.1", "plk.dwc_proj.3", "aggr")
    assert names(ConvAttn(dim=8, pdim=4)) == conv_attn
    assert names(ConvAttn(dim=8, pdim=4, own_kernel=True)) == conv_attn | {"plk_filter"}
    attention = FlashWindowAttention(dim=8, window_size=4, num_heads=2)
    assert names(attention) == pairs("to_qkv", "to_out") | {"relative_position_bias"}
    assert attention.relative_position_bias.shape == (2, 49)
    assert list(attention.buffers()) == []  # no index of N * N numbers, neither saved nor carried along


@pytest.mark.parametrize(("pdim", "side"), [(16, 13), (4, 5), (3, 1)])
def test_large_kernel_starts_orthogonal(pdim: int, side: int) -> None:
    rows = new_large_kernel(pdim, side).detach().double().flatten(1)
    assert max_error(rows @ rows.T, torch.eye(pdim)) < 1e-5


def test_dynamic_kernel_starts_at_zero() -> None:
    layer = ConvAttn(dim=8, pdim=4)
    last = layer.plk.dwc_proj[3]
    assert not last.weight.any()
    assert not last.bias.any()
    assert layer.plk.dwc_proj[1].weight.any()  # the first one does not, or nothing would ever be learned


def test_bias_table_starts_normal_and_small() -> None:
    torch.manual_seed(0)
    table = FlashWindowAttention(dim=64, window_size=32, num_heads=4).relative_position_bias.detach().double()
    n = table.numel()
    assert table.mean().abs() < 5 * 0.001 / math.sqrt(n)
    assert table.std() == pytest.approx(0.001, rel=5 / math.sqrt(2 * n))
    for sigmas, share in [(1, 0.3173), (2, 0.0455), (3, 0.0027)]:  # neither uniform nor cut off
        beyond = (table.abs() > sigmas * 0.001).double().mean().item()
        assert beyond == pytest.approx(share, abs=5 * math.sqrt(share / n))


# --- what they compute ---------------------------------------------------------------------------------------------


def test_layer_norm_is_over_channels_at_every_pixel() -> None:
    layer = randomised(LayerNorm(6).double())
    x = normal(2, 6, 3, 5, **FLOAT64)
    out = layer(x)
    for y in range(3):
        for column in range(5):
            pixel = x[:, :, y, column]
            centred = pixel - pixel.mean(1, keepdim=True)
            normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
            assert max_error(out[:, :, y, column], normed * layer.weight + layer.bias) < 1e-12


def test_layer_norm_has_the_small_epsilon() -> None:
    x = 1e-3 * normal(1, 6, 2, 2, **FLOAT64)  # the variance is near the epsilon
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    assert max_error(LayerNorm(6).double()(x), expected) < 1e-12


@pytest.mark.parametrize(("exp_ratio", "hidden"), [(1.25, 12), (2, 20), (0.99, 9)])
def test_conv_ffn(exp_ratio: float, hidden: int) -> None:
    layer = randomised(ConvFFN(10, exp_ratio).double())
    assert layer.proj.out_channels == hidden

    def gelu(value: Tensor) -> Tensor:
        return value * 0.5 * (1 + torch.erf(value / 2**0.5))

    x = normal(2, 10, 4, 3, **FLOAT64)
    wide = gelu(F.conv2d(x, layer.proj.weight, layer.proj.bias))
    wide = wide + gelu(F.conv2d(wide, layer.dwc.weight, layer.dwc.bias, padding=1, groups=hidden))
    assert max_error(layer(x), F.conv2d(wide, layer.aggr.weight, layer.aggr.bias)) < 1e-12


@pytest.mark.parametrize("own_kernel", [False, True])
@pytest.mark.parametrize("pdim", [2, 5, 8])
def test_conv_attn(pdim: int, own_kernel: bool) -> None:
    layer = randomised(ConvAttn(dim=8, pdim=pdim, kernel_size=5, own_kernel=own_kernel).double())
    x, lk = normal(3, 8, 7, 6, **FLOAT64), normal(pdim, pdim, 5, 5, seed=5, **FLOAT64)
    static = average_of_symmetries(layer.plk_filter) if own_kernel else lk
    first, last = layer.plk.dwc_proj[1], layer.plk.dwc_proj[3]
    kernels = []
    for picture in x:
        hidden = F.gelu(first.weight[:, :, 0, 0] @ picture[:pdim].mean((1, 2)) + first.bias)
        kernels.append((last.weight[:, :, 0, 0] @ hidden + last.bias).reshape(pdim, 3, 3))
    mixed = torch.cat([loop_conv_attention(x[:, :pdim], static, torch.stack(kernels)), x[:, pdim:]], dim=1)
    expected = F.conv2d(mixed, layer.aggr.weight, layer.aggr.bias)
    assert max_error(layer(x) if own_kernel else layer(x, lk), expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_attention(backend: str) -> None:
    layer = randomised(FlashWindowAttention(dim=16, window_size=8, num_heads=2, attn_type=backend))
    with torch.no_grad():
        for size in SIZES:
            x = normal(2, 16, *size)
            attended = loop_attention(layer.to_qkv(x), layer.relative_position_bias, 8, 2)
            weight, bias = layer.to_out.weight.double(), layer.to_out.bias.double()
            assert max_error(layer(x), F.conv2d(attended, weight, bias)) < 1e-5, size


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_window_attention_pads_the_features(backend: str) -> None:
    """The projection may come before the padding only because it looks at each pixel alone: padding first is equal."""
    layer = randomised(FlashWindowAttention(dim=16, window_size=4, num_heads=2, attn_type=backend).double())
    x = normal(1, 16, 6, 7, **FLOAT64)
    padded = F.pad(x, (0, 1, 0, 2), mode="reflect")
    assert max_error(layer(x), layer(padded)[:, :, :6, :7]) < 1e-12


LAYERS = {
    "ConvFFN": lambda: (ConvFFN(16, 1.25), ()),
    "ConvAttn": lambda: (ConvAttn(dim=16, pdim=4), (normal(4, 4, 13, 13, seed=9) / 26,)),
    "ConvAttn with its own kernel": lambda: (ConvAttn(dim=16, pdim=4, own_kernel=True), ()),
    "window attention": lambda: (FlashWindowAttention(dim=16, window_size=8, num_heads=2), ()),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_mode_batch_layout_and_input(make: Any) -> None:
    layer, more = make()
    randomised(layer)
    x = normal(3, 16, 9, 11)
    before = x.clone()
    expected = layer.eval()(x, *more)
    assert torch.equal(x, before)
    assert max_error(layer.train()(x, *more), expected) < 1e-6
    assert max_error(torch.cat([layer(one[None], *more) for one in x]), expected) < 1e-5
    assert max_error(layer(x.contiguous(memory_format=torch.channels_last), *more), expected) < 1e-5
    assert max_error(layer(x.transpose(2, 3).contiguous().transpose(2, 3), *more), expected) < 1e-5
    layer(x.requires_grad_(), *more).sum().backward()
    assert torch.equal(x, before)
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_copy_of_window_attention_has_its_own_table(backend: str) -> None:
    layer = randomised(FlashWindowAttention(dim=16, window_size=8, num_heads=2, attn_type=backend))
    x = normal(1, 16, 20, 27)
    with torch.no_grad():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        layer.relative_position_bias.mul_(-1)
        changed = layer(x)
        assert torch.equal(twin(x), expected)
        assert max_error(changed, expected) > 0.01
        twin.relative_position_bias.data = layer.relative_position_bias.data.clone()  # as loading and casting do
        assert torch.equal(twin(x), changed)


@needs_compiler
def test_flex_inside_a_larger_compiled_module() -> None:
    """Expensive, some 10 s: it is then the other compiler that takes the kernel in."""
    layer = randomised(FlashWindowAttention(dim=16, window_size=8, num_heads=2, attn_type="flex"))
    x = normal(1, 16, 20, 27)
    with torch.no_grad():
        assert max_error(torch.compile(layer)(x), layer(x)) < 1e-5


def test_pixel_shuffle_with_skip_is_nearest_neighbour_plus_residual() -> None:
    picture, residual = normal(2, 3, 4, 5), normal(2, 27, 4, 5, seed=3)
    assert torch.equal(
        pixel_shuffle_with_skip(torch.zeros_like(residual), picture, 3), F.interpolate(picture, scale_factor=3)
    )
    expected = F.interpolate(picture, scale_factor=3) + F.pixel_shuffle(residual, 3)
    assert max_error(pixel_shuffle_with_skip(residual, picture, 3), expected) < 1e-6


# --- errors --------------------------------------------------------------------------------------------------------


CONV_ATTN = {"dim": 16, "pdim": 4}
ATTENTION = {"dim": 16, "window_size": 8, "num_heads": 2}


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        *((ConvAttn, {"pdim": pdim}, f"pdim is {pdim}; it must be between 2 and dim = 16") for pdim in (-4, 0, 1, 17)),
        (ConvAttn, {"kernel_size": 12}, "kernel_size is 12; it must be odd"),
        (ConvAttn, {"kernel_size": 0, "own_kernel": True}, "kernel_size is 0; it must be odd"),
        (FlashWindowAttention, {"window_size": -8}, "window_size is -8; it must be at least 1"),
        (FlashWindowAttention, {"num_heads": 32}, "num_heads is 32; it must divide dim = 16"),
        (FlashWindowAttention, {"num_heads": -2}, "num_heads is -2; it must divide dim = 16"),
        (FlashWindowAttention, {"attn_type": "Fast"}, "attn_type 'Fast' is not known; allowed: auto, naive, sdpa, "),
    ],
)
def test_invalid_options(layer: type[nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**(CONV_ATTN if layer is ConvAttn else ATTENTION) | options)


@pytest.mark.parametrize("shape", [(4, 4, 11, 11), (4, 1, 13, 13), (8, 8, 13, 13), (13, 13), (4, 4, 13, 11)])
def test_large_kernel_missing_or_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    layer, x = ConvAttn(**CONV_ATTN), normal(1, 16, 4, 4)
    with pytest.raises(ValueError, match="has no large kernel: pass lk, or build it with own_kernel: true"):
        layer(x)
    with pytest.raises(ValueError, match=r"the large kernel has shape .*; this layer needs \(4, 4, 13, 13\)"):
        layer(x, torch.zeros(shape))


@pytest.mark.parametrize("channels", [6, 8])
def test_rescaling_needs_a_square_of_subpixels(channels: int) -> None:
    good, bad = torch.zeros(12, 1), torch.zeros(channels, 1)
    for source, target in [(bad, 12), (good, channels)]:
        with pytest.raises(ValueError, match=f"{channels} channels are not 3 colours times a square of sub-pixels"):
            rescale_subpixel_conv(source, target)
