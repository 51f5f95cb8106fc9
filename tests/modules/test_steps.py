"""Steps of networks in one operator each: taken where they can be, to the same result, and never past a hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import SMALL, image, max_error, randomise
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from esc_arch import ESC, ESCFP, ESCLTE, ESCRIB, ESCReal, ESCRealM
from esc_arch.modules import ConvAttn, LayerNorm, fused
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.modules.fused import can_fuse
from esc_arch.ops.conv3x3 import cpu as conv3x3
from esc_arch.ops.dispatch import OPERATIONS

pytestmark = pytest.mark.usefixtures("native")

STEPS = {
    "attention": (fused, "window_attention_fused"),
    "ConvFFN": (fused, "conv_ffn_fused"),
    "ConvAttn": (fused, "conv_attention_fused"),
    "3 x 3": (fused, "conv3x3_fused"),
    "3 x 3 alone": (conv3x3, "forward"),
}
#: The small network with 16 channels and more, which the 3 x 3 operator wants.
OPTIONS = {**SMALL, "window_size": 8}
REAL = {key: value for key, value in OPTIONS.items() if key != "upscaling_factor"}
NETWORKS: list[Any] = [
    pytest.param(lambda: ESC(**OPTIONS), id="ESC"),
    pytest.param(lambda: ESC(**OPTIONS, use_ln=True), id="ESC with norms"),
    pytest.param(lambda: ESC(**OPTIONS, attn_type="FlashBias", rank=4), id="FlashBias"),
    pytest.param(lambda: ESCFP(**OPTIONS), id="ESCFP"),
    pytest.param(lambda: ESCReal(**REAL), id="ESCReal"),
    pytest.param(lambda: ESCRealM(**REAL, upscaling_factor=2, upsampler="nearest+conv"), id="ESCRealM"),
    pytest.param(lambda: ESCRIB(**OPTIONS, gate_type="DWC"), id="ESCRIB with a gate"),
    pytest.param(lambda: ESCLTE(**OPTIONS, hidden_dim=16, mlp_dims=(16,)), id="ESCLTE"),
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each step was taken in one operator."""
    counts = dict.fromkeys(STEPS, 0)

    def counted(name: str, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            counts[name] += out is not None
            return out

        return call

    for name, (module, function) in STEPS.items():
        monkeypatch.setattr(module, function, counted(name, getattr(module, function)))
    return counts


def small_net() -> ESC:
    net = ESC(**OPTIONS)
    randomise(net)
    return net.eval()


@pytest.mark.parametrize("make", NETWORKS)
def test_the_same_as_step_by_step(make: Any, taken: dict[str, int]) -> None:
    """Against float64, which no operator takes; at a size that is no multiple of the window."""
    net = randomise(make()).eval()
    x = image(2, 3, 20, 27)
    with torch.no_grad():
        out = net(x)
        counts = dict(taken)
        exact = net.double()(x.double())
    assert max_error(out, exact) < 2e-5 * max(1, exact.abs().max().item())
    assert taken == counts
    pairs = sum(isinstance(module, ConvAttn) for module in net.modules())
    gated = any(name.endswith("gate.0.weight") for name, _ in net.named_parameters())
    blocks = len(net.get_submodule("blocks")._modules)
    assert counts["attention"] == (0 if gated else blocks)
    assert counts["ConvAttn"] == pairs
    assert counts["ConvFFN"] == blocks * (1 + OPTIONS["conv_blocks"])
    # All but the first, whose 3 or 12 channels are too few
    assert counts["3 x 3"] + counts["3 x 3 alone"] == sum(
        isinstance(module, Conv3x3) and module.in_channels >= 16 for module in net.modules()
    )


def test_those_with_gradients_where_they_are_wanted(taken: dict[str, int]) -> None:
    small_net()(image(1, 3, 20, 27))
    assert taken == {"attention": 0, "ConvFFN": 3, "ConvAttn": 2, "3 x 3": 3, "3 x 3 alone": 0}


@torch.no_grad()
def test_only_where_auto_may_choose_them(taken: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in OPERATIONS.values():
        monkeypatch.setattr(operation, "order", tuple(name for name in operation.order if name != "cpu"))
    small_net()(image(1, 3, 20, 27))
    assert taken == dict.fromkeys(STEPS, 0)


@pytest.mark.parametrize(
    ("layer", "step"),
    [
        ("blocks.0.attn", "attention"),
        ("blocks.0.ln_attn", "attention"),
        ("blocks.0.attn.to_qkv", "attention"),
        ("blocks.0.attn.to_out", "attention"),
        ("blocks.0.ln_proj", "ConvFFN"),
        ("blocks.0.convffns.0", "ConvFFN"),
        ("blocks.0.convffns.1.dwc", "ConvFFN"),
        ("blocks.0.pconvs.0", "ConvAttn"),
        ("blocks.0.pconvs.0.plk", "ConvAttn"),
        ("blocks.0.pconvs.0.aggr", "ConvAttn"),
        ("blocks.0.pconvs.1.plk.dwc_proj.3", "ConvAttn"),
        ("blocks.0.ln_out", "3 x 3"),
        ("blocks.0.conv_out", "3 x 3"),
    ],
)
@torch.no_grad()
def test_hooked_layers_are_left_to_be_called(layer: str, step: str, taken: dict[str, int]) -> None:
    net, x = small_net(), image(1, 3, 20, 27)
    expected = net(x)
    before = dict(taken)
    seen: list[Tensor] = []
    with net.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out)):
        out = net(x)
    # ConvFFN has an operator without norm, which takes its weights
    assert (len(seen) == 1) == (not layer.endswith("dwc"))
    assert max_error(out, expected) < 1e-4
    assert taken[step] - before[step] == before[step] - 1


@torch.no_grad()
def test_hooks_on_every_module(taken: dict[str, int]) -> None:
    net = small_net()
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: None):
        net(image(1, 3, 20, 27))
    assert taken["attention"] == taken["ConvAttn"] == 0


class Adapter(nn.Conv2d):
    """What adapters do: the layer's own weights stand in it, and are not all that it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
def test_replaced_layers_are_called() -> None:
    net, x = small_net(), image(1, 3, 20, 27)
    conv = net.blocks[0].get_submodule("conv_out")
    adapter = Adapter(conv.in_channels, conv.out_channels, 3, padding=1)
    adapter.load_state_dict(conv.state_dict())
    net.blocks[0].conv_out = adapter
    doubled = net(x)
    for parameter in conv.parameters():
        parameter *= 2
    net.blocks[0].conv_out = conv
    assert max_error(doubled, net(x)) < 1e-4


def test_plain_layers() -> None:
    conv = nn.Conv2d(2, 2, 1)
    assert can_fuse(conv, LayerNorm(2), Conv3x3(2, 2), None)
    assert not can_fuse(conv, Adapter(2, 2, 1))
    handle = conv.register_full_backward_hook(lambda *args: None)
    assert not can_fuse(conv)
    handle.remove()
    nn.utils.parametrizations.weight_norm(conv)
    assert not can_fuse(conv)
    patched = nn.Conv2d(2, 2, 1)
    patched.forward = lambda x: x  # type: ignore[method-assign]  # as quantisers and profilers do
    assert not can_fuse(patched)


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_for_all_modules(register: Callable[..., Any]) -> None:
    handle = register(lambda *args: None)
    try:
        assert not can_fuse(nn.Conv2d(2, 2, 1))
    finally:
        handle.remove()
    assert can_fuse(nn.Conv2d(2, 2, 1))
