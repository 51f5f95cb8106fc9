"""Checkpoints through the real spandrel, as programs load them, beside `esc_arch.load`."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import image, max_error, needs_cuda, normal, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

import esc_arch
from esc_arch import UserError
from esc_arch.checkpoints.conversion import build_network
from esc_arch.tools.upscale import Upscaler

spandrel = pytest.importorskip("spandrel", reason='needs spandrel: pip install "esc-arch[spandrel]"')

from esc_arch.integrations.spandrel import ESCArch, install  # noqa: E402  after the check that spandrel is there

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST: dict[str, dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
#: RIB's window does not follow from its weights: see below.
NAMES = [name for name, entry in MANIFEST.items() if entry["options"].get("attn_type") != "RIB"]
SMALL: dict[str, Any] = {"dim": 16, "pdim": 4, "kernel_size": 5, "n_blocks": 1, "conv_blocks": 1, "num_heads": 2}
LTE = {"type": "ESCLTE", **SMALL, "window_size": 8, "hidden_dim": 16, "mlp_dims": [16]}
RIB = {"type": "ESCRIB", **SMALL, "upscaling_factor": 2, "rank": 6, "rib_hidden_dim": 8, "rib_n_freqs": 4}
#: No multiple of the window, one smaller than what is padded, and exact.
SIZES = [(13, 22), (3, 5), (16, 8)]


@pytest.fixture(autouse=True)
def _installed() -> None:
    install()


def weights_of(name: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}


def network(section: dict[str, Any]) -> dict[str, Tensor]:
    net = build_network(section)
    return {name: tensor.clone() for name, tensor in randomise(net).state_dict().items()}


def check_same(descriptor: Any, upscaler: Upscaler) -> None:
    for height, width in SIZES:
        picture = image(1, 3, height, width)
        # (A copy, as spandrel clips the result in place)
        assert torch.equal(descriptor(picture.clone()), upscaler(picture).clamp(0, 1))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_every_network(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save({"params_ema": weights_of(name), "iter": 5}, path)
    else:
        save_file(weights_of(name), path)
    descriptor = spandrel.ModelLoader().load_from_file(path)
    options = MANIFEST[name]["options"]
    scale = options.get("upscaling_factor", 4)
    assert isinstance(descriptor, spandrel.ImageModelDescriptor)
    assert (descriptor.architecture.id, descriptor.architecture.name) == ("esc_arch", "ESC")
    assert descriptor.purpose == ("SR" if scale > 1 else "Restoration")
    assert (descriptor.scale, descriptor.input_channels, descriptor.output_channels) == (scale, 3, 3)
    assert descriptor.tiling == spandrel.ModelTiling.DISCOURAGED
    assert descriptor.size_requirements.none
    assert descriptor.supports_half and descriptor.supports_bfloat16
    assert descriptor.tags == [
        MANIFEST[name]["type"],
        f"{options['dim']}dim",
        f"{options['n_blocks']}blocks",
        f"{options['window_size']}w",
    ]
    check_same(descriptor, esc_arch.load(path, device="cpu"))


@pytest.mark.parametrize("section", [RIB, LTE])
def test_what_weights_do_not_say_is_assumed(section: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(network(section), path)
    descriptor = spandrel.ModelLoader().load_from_file(path)
    check_same(descriptor, esc_arch.load(path, device="cpu"))
    if section["type"] == "ESCLTE":
        assert descriptor.scale == 4
    else:
        assert "64w" in descriptor.tags


WRAPPINGS = {
    "bare": lambda weights, _: weights,
    "params": lambda weights, _: {"params": weights},
    "the average first": lambda weights, other: {"params": other, "params_ema": weights},
    "beside values": lambda weights, _: {"params": weights, "iter": 5, "network_g": {"type": "ESC"}},
    "parallel": lambda weights, _: {"params": {f"module.{name}": tensor for name, tensor in weights.items()}},
    "another toolbox": lambda weights, _: {"state_dict": {f"net_g.{name}": tensor for name, tensor in weights.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(wrapping: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    weights = weights_of("esc_x2")
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    torch.save(WRAPPINGS[wrapping](weights, other), path)
    check_same(spandrel.ModelLoader().load_from_file(path), esc_arch.load(path, device="cpu"))


def test_the_published_lte_in_its_wrapping(tmp_path: Path) -> None:
    path = tmp_path / "lte.pth"
    torch.save({"model": {"name": "lte", "args": {}, "sd": weights_of("esc_lte_official")}}, path)
    check_same(spandrel.ModelLoader().load_from_file(path), esc_arch.load(path, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["esc_x2", "esc_fp_x2", "esc_real_x4", "esc_real_dysample_x4", "esc_flashbias_x2", "rib", "lte"]
)
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As `Upscaler` in mixed precision, of the same rounded weights."""
    sections = {"rib": RIB, "lte": LTE}
    weights = network(sections[name]) if name in sections else weights_of(name)
    descriptor = spandrel.ModelLoader().load_from_state_dict(weights).to(dtype)
    path = tmp_path / "rounded.safetensors"
    save_file(descriptor.model.state_dict(), path)
    mixed = esc_arch.load(path, device="cpu", precision="fp16" if dtype == torch.float16 else "bf16")
    picture = image(1, 3, 13, 22).to(dtype)
    out = descriptor(picture.clone())
    assert descriptor.dtype == out.dtype == dtype
    assert torch.equal(out, mixed(picture).clamp(0, 1).to(dtype))
    assert {tensor.dtype for tensor in descriptor.model.parameters()} == {dtype}


def test_coordinates_stay_exact_in_half_precision() -> None:
    """DySample reads at places that float16 cannot tell apart beyond some hundred pixels, nor bfloat16 beyond some."""
    weights = weights_of("esc_real_m_dysample_x2")
    whole = spandrel.ModelLoader().load_from_state_dict(dict(weights))
    picture = image(1, 3, 16, 300)
    reference = whole(picture.clone())
    for dtype in (torch.float16, torch.bfloat16):
        half = spandrel.ModelLoader().load_from_state_dict(dict(weights)).to(dtype)
        error = (half(picture.to(dtype)).float() - reference).abs()
        assert error[..., -40:].mean() < 2 * error[..., :40].mean()


def small_esrgan() -> Any:
    from spandrel.architectures.ESRGAN import ESRGAN

    return ESRGAN(num_filters=8, num_blocks=1, scale=2)


def small_compact() -> Any:
    from spandrel.architectures.Compact import Compact

    return Compact(num_feat=8, num_conv=2, upscale=2)


def small_plksr() -> Any:
    from spandrel.architectures.PLKSR import PLKSR

    return PLKSR(dim=8, n_blocks=1, upscaling_factor=2)


@pytest.mark.parametrize(
    ("make", "arch"), [(small_esrgan, "ESRGAN"), (small_compact, "Compact"), (small_plksr, "PLKSR")]
)
def test_other_architectures_are_what_they_were(make: Any, arch: str) -> None:
    state_dict = make().state_dict()
    assert not ESCArch().detect(state_dict)
    assert spandrel.ModelLoader().load_from_state_dict(state_dict).architecture.id == arch


REAL_M = {"type": "ESCRealM", **SMALL, "window_size": 8, "mid_dim": 12}


def without_tail(section: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network(section).items() if not name.startswith("to_img.")}


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("upsampler", ["pixelshuffledirect", "pixelshuffle", "nearest+conv", "transpose+conv"])
def test_tails_as_spandrel_has_them(upsampler: str, scale: int, tmp_path: Path) -> None:
    """Its third version of the universal upsampler, traiNNer-redux's, which other architectures end in.

    (Its dysample cannot run on a machine without a GPU.)
    """
    module = pytest.importorskip("spandrel.architectures.FDAT.__arch.fdat", reason="another version of spandrel")
    tail = randomise(module.UniUpsampleV3(upsampler, scale, in_dim=16, mid_dim=12)).eval()
    section = {**REAL_M, "upscaling_factor": scale, "upsampler": upsampler, "unshuffle_mod": False}
    weights = without_tail(section) | {f"to_img.{name}": tensor.clone() for name, tensor in tail.state_dict().items()}
    assert weights["to_img.MetaUpsample"][0] == 3
    path = tmp_path / "net.pth"
    torch.save({"params_ema": weights}, path)
    descriptor = spandrel.ModelLoader().load_from_file(path)
    assert (descriptor.architecture.id, descriptor.scale) == ("esc_arch", scale)
    check_same(descriptor, esc_arch.load(path, device="cpu"))
    x = normal(1, 16, 5, 7)
    with torch.no_grad():
        assert max_error(descriptor.model.to_img(x), tail(x)) < 1e-5


def incomplete(name: str) -> dict[str, Tensor]:
    weights = weights_of("esc_x2")
    del weights[name]
    return weights


#: Names and shapes of weights that are nearly those of a network here, and a part of what is said of them.
CLOSE: dict[str, tuple[dict[str, Tensor], str]] = {
    "lda": (
        without_tail(REAL_M) | {"to_img.0.proj_q.weight": torch.zeros(4, 16, 1, 1)},
        r"its tail \(to_img\.0\.proj_q\.weight\) is none of conv, .* such as lda and pa_up, are not supported",
    ),
    "pa_up": (
        without_tail(REAL_M) | {"to_img.1.weight": torch.zeros(12, 16, 3, 3), "to_img.2.conv.0.weight": torch.zeros(1)},
        r"its tail \(to_img\.1\.weight, to_img\.2\.conv\.0\.weight\) is none of conv, .* such as lda and pa_up",
    ),
    "dysample with another convolution": (
        network({**REAL_M, "upsampler": "dysample"}) | {"to_img.2.end_conv.weight": torch.zeros(3, 12, 3, 3)},
        "is none of conv, pixelshuffledirect",
    ),
    "enlarged once": (
        without_tail({**REAL_M, "unshuffle_mod": False})
        | {f"to_img.{i}.weight": torch.zeros(out, 16, 3, 3) for i, out in ((1, 16), (3, 16), (5, 3))},
        r"is almost ESCReal with .* 7 missing in it \(to_img\.1\.bias.* 2 not in the network \(to_img\.3\.weight",
    ),
    "a part is missing": (incomplete("last.bias"), r"is almost ESC with .* 1 missing in it \(last\.bias\)"),
    "a part too many": (
        weights_of("esc_x2") | {"blocks.0.attn.gate.0.weight": torch.zeros(16, 1, 3, 3)},
        r"is almost ESC with .* 1 not in the network \(blocks\.0\.attn\.gate\.0\.weight\)",
    ),
    "another size": (
        weights_of("esc_x2") | {"last.weight": torch.zeros(16, 16, 1, 1)},
        r"1 of other shapes \(last\.weight is \(16, 16, 1, 1\) and should be \(16, 16, 3, 3\)\)",
    ),
}


class Others(spandrel.Architecture):
    """Another package's, which knows how to load what is only close to the networks here."""

    def __init__(self) -> None:
        super().__init__(id="others", detect=lambda state_dict: "plk_filter" in state_dict)

    def load(self, state_dict: Any) -> Any:
        return spandrel.ImageModelDescriptor(
            torch.nn.Identity(), {}, self, "SR", [], supports_half=True, supports_bfloat16=True, scale=1,
            input_channels=3, output_channels=3,
        )  # fmt: skip


@pytest.mark.parametrize("case", CLOSE)
def test_what_is_only_close_is_left_to_others(case: str, tmp_path: Path) -> None:
    weights, message = CLOSE[case]
    assert not ESCArch().detect(weights)
    registry = spandrel.ArchRegistry()
    install(registry)
    registry.add(spandrel.ArchSupport.from_architecture(Others()))
    assert registry.load(dict(weights)).architecture.id == "others"
    with pytest.raises(UserError, match=message):
        ESCArch().load(dict(weights))
    path = tmp_path / "net.pth"
    torch.save(weights, path)
    with pytest.raises(UserError, match=message):
        esc_arch.load(path)


def test_what_is_nothing_is_refused_as_before() -> None:
    for state_dict in ({}, {"weight": torch.zeros(3)}, {"plk_filter": "text"}, {"plk_filter": torch.zeros(())}):
        assert not ESCArch().detect(state_dict)
        with pytest.raises(spandrel.UnsupportedModelError):
            spandrel.ModelLoader().load_from_state_dict(state_dict)
    with pytest.raises(UserError, match="These are not the weights of an ESC network"):
        ESCArch().load({"weight": torch.zeros(3)})


def test_installing_again_changes_nothing() -> None:
    registry = spandrel.MAIN_REGISTRY
    before = registry.architectures("detection")
    install()
    assert registry.architectures("detection") == before
    assert before[0].architecture.id == "esc_arch"
    assert len(before) == len({support.architecture.id for support in before})


def test_another_registry() -> None:
    registry = spandrel.ArchRegistry()
    install(registry)
    assert spandrel.ModelLoader(registry=registry).load_from_state_dict(weights_of("esc_x2")).scale == 2


class SpandrelsOwn(spandrel.Architecture):
    """An ESC as a later spandrel may have it, which takes whatever has a large kernel."""

    def __init__(self) -> None:
        super().__init__(id="ESC", detect=lambda state_dict: "plk_filter" in state_dict)

    def load(self, state_dict: Any) -> Any:
        raise AssertionError("ours was to load it")


def test_an_esc_that_spandrel_has_itself() -> None:
    for ours_first in (False, True):
        registry = spandrel.ArchRegistry()
        if ours_first:
            install(registry)
        registry.add(spandrel.ArchSupport.from_architecture(SpandrelsOwn()))
        install(registry)
        assert registry.load(weights_of("esc_x2")).architecture.id == "esc_arch"
        assert [support.architecture.id for support in registry].count("ESC") == 1


def test_the_network_can_be_trained_afterwards() -> None:
    """Nothing that spandrel's inference mode makes is kept for later."""
    descriptor = spandrel.ModelLoader().load_from_state_dict(weights_of("esc_x2"))
    picture = image(1, 3, 8, 8)
    descriptor(picture.clone())
    descriptor.model.train()(picture).mean().backward()
    assert all(parameter.grad is not None for parameter in descriptor.model.parameters())


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    descriptor = spandrel.ModelLoader(device="cuda").load_from_state_dict(weights_of("esc_x2")).to(dtype)
    path = tmp_path / "net.safetensors"
    save_file(descriptor.model.state_dict(), path)
    upscaler = esc_arch.load(path, device="cuda", precision="fp32" if dtype == torch.float32 else "fp16")
    picture = image(1, 3, 13, 22).to("cuda", dtype)
    assert torch.equal(descriptor(picture.clone()), upscaler(picture).clamp(0, 1).to(dtype))


def test_without_spandrel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    monkeypatch.delitem(sys.modules, "esc_arch.integrations.spandrel")
    with pytest.raises(ImportError, match=re.escape('needs spandrel: pip install "esc-arch[spandrel]"')):
        importlib.import_module("esc_arch.integrations.spandrel")
