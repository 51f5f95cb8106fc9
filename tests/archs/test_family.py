"""What holds for every network of the family besides ESC, whose own tests are in test_esc.py."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import build_network
from networks import BACKENDS, SIZES, TRAINABLE, image, max_error, normal, randomise
from torch import nn

from esc_arch.modules import DySample, UniversalUpsampler
from esc_arch.modules.window_attention import coordinate_features

SMALL: dict[str, Any] = {
    "dim": 16, "pdim": 4, "n_blocks": 1, "conv_blocks": 1, "window_size": 8, "num_heads": 2, "exp_ratio": 1.25
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "fp": {"type": "ESCFP", "upscaling_factor": 3},
    "real": {"type": "ESCReal", "upscaling_factor": 4},
    "real dysample": {"type": "ESCReal", "upscaling_factor": 2, "use_dysample": True},
    "m conv x1": {"type": "ESCRealM", "upscaling_factor": 1, "upsampler": "conv", "unshuffle_mod": False},
    "m direct x1": {"type": "ESCRealM", "upscaling_factor": 1, "upsampler": "pixelshuffledirect"},
    "m shuffle x2": {"type": "ESCRealM", "upscaling_factor": 2, "upsampler": "pixelshuffle", "mid_dim": 12},
    "m nearest x3": {"type": "ESCRealM", "upscaling_factor": 3, "upsampler": "nearest+conv"},
    "m transpose x1": {"type": "ESCRealM", "upscaling_factor": 1, "upsampler": "transpose+conv"},
    "m transpose x2": {
        "type": "ESCRealM",
        "upscaling_factor": 2,
        "upsampler": "transpose+conv",
        "unshuffle_mod": False,
    },
    "m transpose x3": {"type": "ESCRealM", "upscaling_factor": 3, "upsampler": "transpose+conv"},
    "m dysample x2": {"type": "ESCRealM", "upscaling_factor": 2, "upsampler": "dysample", "mid_dim": 12},
    "m dysample x4": {"type": "ESCRealM", "upscaling_factor": 4, "upsampler": "dysample", "mid_dim": 16},
    "rib": {"type": "ESCRIB", "upscaling_factor": 2, "rank": 6, "rib_hidden_dim": 8, "rib_n_freqs": 4},
    "rib gate": {"type": "ESCRIB", "upscaling_factor": 3, "rank": 6, "gate_type": "DWC", "use_ln": True},
    "rib siren": {"type": "ESCRIB", "upscaling_factor": 2, "rank": 6, "rib_hidden_dim": 8, "attn_type": "RIBSiren"},
    "flashbias": {"type": "ESCRIB", "upscaling_factor": 2, "rank": 6, "attn_type": "FlashBias"},
}


#: One for each way that parts are put together: what compilers and exporters see. Other tails are tried by themselves.
STRUCTURES = ["fp", "real", "real dysample", "m direct x1", "rib gate", "rib siren", "flashbias"]
TAILS = ["pixelshuffle", "nearest+conv", "dysample", "transpose+conv"]


def build(variant: str, seed: int = 0, **changes: Any) -> nn.Module:
    net: nn.Module = build_network({**SMALL, **VARIANTS[variant], **changes})
    return randomise(net, seed).eval()


def scale_of(variant: str) -> int:
    return VARIANTS[variant]["upscaling_factor"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_size(variant: str) -> None:
    net, scale = build(variant), scale_of(variant)
    with torch.no_grad():
        for height, width in SIZES:
            out = net(image(1, 3, height, width))
            assert out.shape == (1, 3, height * scale, width * scale)
            assert out.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_in_both_modes_for_each_of_a_batch_and_for_any_layout(variant: str) -> None:
    net = build(variant)
    x = image(3, 3, 13, 21)
    before, version = x.clone(), x._version
    with torch.no_grad():
        expected = net(x)
        assert max_error(net.train()(x), expected) < 1e-6
        assert max_error(torch.cat([net(one[None]) for one in x]), expected) < 1e-4
        wide = torch.cat([x, 1 - x, x], dim=3)
        for value in (x.contiguous(memory_format=torch.channels_last), wide[..., 42:]):
            assert max_error(net(value), expected) < 1e-4
    assert torch.equal(x, before)
    assert x._version == version


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_reaches_every_parameter(variant: str) -> None:
    net = build(variant).train()
    net(image(2, 3, 9, 11)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_deep_copy_is_independent(variant: str) -> None:
    net, other = build(variant), build(variant, seed=7)
    x = image(1, 3, 9, 11)
    with torch.no_grad():
        expected = net(x)
        twin = copy.deepcopy(net)
        net.load_state_dict(other.state_dict())
        assert torch.equal(twin(x), expected)
        assert max_error(net(x), other(x)) < 1e-6
        assert max_error(net(x), expected) > 1e-3


def tail(name: str, scale: int = 4) -> nn.Module:
    return randomise(UniversalUpsampler(name, scale=scale, dim=4, mid=8))


@pytest.mark.parametrize("variant", [*STRUCTURES, *TAILS])
def test_compiles_without_a_break(variant: str) -> None:
    """Tracing is what can fail here; the generated code is tried with ESC."""
    net, x = (tail(variant), normal(1, 4, 13, 21)) if variant in TAILS else (build(variant), image(1, 3, 13, 21))
    torch._dynamo.reset()
    with torch.no_grad():
        assert max_error(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x)) < 1e-5


@pytest.mark.parametrize("variant", [*STRUCTURES, *TAILS])
def test_exports_with_dynamic_sizes(variant: str) -> None:
    net, channels = (tail(variant), 4) if variant in TAILS else (build(variant), 3)
    Dim = torch.export.Dim
    if (factor := getattr(net, "unshuffle_factor", 1)) == 1:
        varying = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
        example, sizes = (9, 11), [(1, 1), (2, 3), (8, 8), (20, 27)]
    else:  # networks that unshuffle the image: multiples of the factor
        varying = {0: Dim.DYNAMIC, 2: factor * Dim("rows", min=2), 3: factor * Dim("columns", min=2)}
        example, sizes = (8, 12), [(2 * factor, 3 * factor), (8, 8), (20, 24)]
    program = torch.export.export(net, (image(2, channels, *example),), dynamic_shapes=(varying,)).module()
    for batch in (1, 3):
        for size in sizes:
            x = image(batch, channels, *size)
            with torch.no_grad():
                assert max_error(program(x), net(x)) < 1e-4, (batch, size)


@pytest.mark.parametrize("variant", ["rib", "rib gate", "flashbias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_of_factorised_biases_agree(variant: str, backend: str) -> None:
    x = image(1, 3, 13, 21)
    with torch.no_grad():
        assert max_error(build(variant, backend=backend)(x), build(variant, backend="naive")(x)) < 1e-5


@pytest.mark.parametrize("backend", TRAINABLE)
def test_attn_type_chooses_the_backend(backend: str) -> None:
    assert build("fp", attn_type=backend).blocks[0].attn.attn_type == backend
    assert build("real", attn_type=backend).blocks[0].attn.attn_type == backend


@pytest.mark.parametrize(("variant", "layer"), [("fp", "to_img"), ("rib", "upsampler.up_conv")])
def test_checkpoint_of_another_scale(variant: str, layer: str, basicsr_log: pytest.LogCaptureFixture) -> None:
    source, target = build(variant, upscaling_factor=2), build(variant, seed=3, upscaling_factor=4)
    target.load_state_dict(source.state_dict())
    weight = source.get_submodule(layer).weight.detach()
    grid = weight.reshape(3, 2, 2, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 4), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    assert max_error(target.get_submodule(layer).weight, expected.reshape(48, *weight.shape[1:])) < 1e-6
    assert f"{layer}.weight was interpolated from x2 to x4" in basicsr_log.text


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("fp", {"pdim": 3}, "pdim is 3; it must be between 4 and dim = 16"),
        ("fp", {"kernel_size": 1}, "kernel_size is 1; it must be odd and at least 3"),
        ("real", {"upscaling_factor": 2}, "upscaling_factor is 2; ESCReal enlarges by 4"),
        ("real dysample", {"dim": 18}, "4 groups; 18 is not a multiple"),
        ("m direct x1", {"upscaling_factor": 5}, "upscaling_factor is 5; ESCRealM takes 1, 2, 3 or 4"),
        ("m direct x1", {"upsampler": "bilinear"}, "upsampler 'bilinear' is not known; allowed: conv, pixelshuffled"),
        ("m shuffle x2", {"upsampler": "conv"}, "upsampler conv does not enlarge, but the scale here is 4"),
        ("rib", {"attn_type": "SDPA"}, "attn_type is 'SDPA'; ESCRIB takes RIB, RIBSiren, FlashBias"),
        ("rib", {"attn_type": "NoPE"}, r"attn_type is 'NoPE'; .* without positions \(NoPE\) .* never published"),
        ("rib", {"gate_type": "Linear"}, r"gate_type is 'Linear'; .* DWC, .*, or none \(~\). Others, such as Linear"),
        ("rib", {"upsampler_type": "nearest"}, "upsampler_type is 'nearest'; ESCRIB has the upsampler .* omit the"),
        ("rib", {"rib_n_freqs": 0}, "rib_n_freqs is 0; it must be at least 1"),
        ("rib", {"rank": 0}, "rank is 0; it must be at least 1"),
        ("flashbias", {"rank": 0}, "rank is 0; it must be at least 1"),
        ("rib", {"rib_hidden_dim": 0}, "rib_hidden_dim is 0; it must be at least 1"),
        ("rib", {"backend": "xformers"}, "'xformers' is not known"),
    ],
)
def test_invalid_options(variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(variant, **changes)


@pytest.mark.parametrize("stored", ["absent", "different"])
def test_meta_upsample_of_a_checkpoint_does_not_matter(stored: str) -> None:
    source, target = build("m shuffle x2"), build("m shuffle x2", seed=3)
    weights = source.state_dict()
    number = weights.pop("to_img.MetaUpsample")
    assert number.dtype == torch.uint8 and number.tolist() == [2, 2, 4, 16, 3, 12, 4]
    if stored == "different":
        weights["to_img.MetaUpsample"] = torch.zeros(3)
    target.load_state_dict(weights)
    assert target.state_dict()["to_img.MetaUpsample"].tolist() == number.tolist()
    x = image(1, 3, 9, 11)
    with torch.no_grad():
        assert torch.equal(target(x), source(x))


def test_a_wide_upsampler_stays_within_the_buffers_type() -> None:
    assert UniversalUpsampler("conv", scale=1, dim=300, mid=8).MetaUpsample.tolist() == [2, 0, 1, 255, 3, 8, 4]


@pytest.mark.parametrize(("scale", "size", "padding"), [(2, 4, 1), (3, 3, 0)])
def test_transposed_convolution(scale: int, size: int, padding: int) -> None:
    """Input pixel i is spread over the pixels scale * i - padding + (0 .. size - 1); a 3 x 3 convolution ends it."""
    layers = tail("transpose+conv", scale).double()
    x = normal(1, 4, 3, 2, dtype=torch.float64)
    weight, bias = layers[0].weight, layers[0].bias
    assert weight.shape == (4, 3, size, size)
    spread = bias[:, None, None].expand(3, scale * 3 + 2 * size, scale * 2 + 2 * size).clone()
    for row in range(3):
        for column in range(2):
            top, left = scale * row - padding + size, scale * column - padding + size
            spread[:, top : top + size, left : left + size] += torch.einsum("i,iohw->ohw", x[0, :, row, column], weight)
    expected = layers[1](spread[None, :, size : size + 3 * scale, size : size + 2 * scale])
    assert max_error(layers(x), expected) < 1e-12


def test_transposed_convolutions_by_4_are_two_by_2() -> None:
    layers = tail("transpose+conv").double()
    x = normal(1, 4, 3, 2, dtype=torch.float64)
    twice = x
    for layer, activation in ((layers[0], F.gelu), (layers[2], nn.Identity())):
        twice = activation(F.conv_transpose2d(twice, layer.weight, layer.bias, stride=2, padding=1))
    assert max_error(layers(x), F.conv2d(twice, layers[3].weight, layers[3].bias, padding=1)) < 1e-12


def test_dysample_starts_as_bilinear_enlargement() -> None:
    """At first the offsets are next to nothing and each output pixel is read at its own place."""
    layer = DySample(8, out_dim=8, scale=3)
    with torch.no_grad():
        layer.offset.weight.zero_()
        layer.offset.bias.zero_()
        layer.end_conv.weight.copy_(torch.eye(8)[:, :, None, None])
        layer.end_conv.bias.zero_()
        x = normal(2, 8, 5, 7)
        assert max_error(layer(x), F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=False)) < 1e-5


def test_coordinate_features() -> None:
    features = coordinate_features(3, 2, torch.zeros(1, dtype=torch.float64)).numpy()
    assert features.shape == (9, 10)
    for token in range(9):
        xy = np.array([(token % 3 - 1) * 2 / 3, (token // 3 - 1) * 2 / 3])
        expected = np.concatenate([xy, np.sin(xy), np.cos(xy), np.sin(2 * xy), np.cos(2 * xy)])
        np.testing.assert_allclose(features[token], expected, atol=1e-6)


def test_a_siren_in_place_of_frequencies() -> None:
    """RIBSiren: sin(30 x) of the coordinates alone; all names and shapes but the width of `to_hidden` are RIB's."""
    attn = build("rib", attn_type="ribsiren").double().blocks[0].attn
    assert attn.to_hidden.shape == (2, 8)
    y, x = np.divmod(np.arange(64), 8)
    coordinates = np.stack([x, y], axis=1) * 2 / 8 + 1 / 8 - 1
    to_hidden, hidden_b, to_q, to_k = (
        parameter.detach().numpy() for parameter in (attn.to_hidden, attn.hidden_b, attn.to_q, attn.to_k)
    )
    hidden = np.sin(30 * (coordinates @ to_hidden + hidden_b))
    q, k = (factor.detach().numpy() for factor in attn.position_bias())
    for head in range(2):
        np.testing.assert_allclose(q[head] @ k[head].T, (hidden @ to_q[head]) @ (hidden @ to_k[head]).T / 6**0.5)


def test_layer_norms_of_rib() -> None:
    names = build("rib", use_ln=True).state_dict().keys()
    assert names - build("rib").state_dict().keys() == {f"blocks.0.lns.0.{name}" for name in ("weight", "bias")}


def test_same_scale_loads_silently(basicsr_log: pytest.LogCaptureFixture) -> None:
    with basicsr_log.at_level(logging.DEBUG):
        build("fp").load_state_dict(build("fp", seed=1).state_dict())
    assert "another scale" not in basicsr_log.text


def test_decomposed_conv_attn_by_itself() -> None:
    options = {"type": "DecomposedConvAttn", "dim": 12, "pdim": 4, "kernel_size": 5}
    layer = randomise(build_network({**options, "own_kernel": True}))
    x = normal(2, 12, 6, 7)
    mixed = F.conv2d(x[:, :4], layer.lk_channel)
    hidden = F.gelu(layer.plk.proj[1](x[:, :4].mean((2, 3), keepdim=True)))
    dynamic = layer.plk.proj[3](hidden).reshape(2, 4, 3, 3)
    for b in range(2):
        for c in range(4):
            kernel = layer.lk_spatial[c, 0].clone()
            kernel[1:4, 1:4] += dynamic[b, c]
            mixed[b, c] = F.conv2d(mixed[b, c][None, None].clone(), kernel[None, None], padding=2)[0, 0]
    expected = layer.aggr(torch.cat([mixed, x[:, 4:]], dim=1))
    assert max_error(layer(x), expected) < 1e-5
    other = build_network(options)
    assert set(other.state_dict()) == set(layer.state_dict()) - {"lk_channel", "lk_spatial"}
    other.load_state_dict({name: value for name, value in layer.state_dict().items() if not name.startswith("lk_")})
    assert torch.equal(other(x, layer.lk_channel, layer.lk_spatial), layer(x))
    with pytest.raises(ValueError, match="has no large kernel: pass lk_channel and lk_spatial, or build it with"):
        other(x)
    with pytest.raises(ValueError, match=r"spatial kernel has shape \(4, 1, 3, 3\); this layer needs \(4, 1, 5, 5\)"):
        other(x, layer.lk_channel, torch.zeros(4, 1, 3, 3))
