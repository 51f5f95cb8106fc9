"""A network of another package: built, trained, recognised, enlarged in parts and exported without a change here.

The class is the example of docs/add_a_network.md, which is checked to be the same.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from inference_networks import joined, picture, plain
from networks import max_error, randomise
from torch import Tensor, nn

import esc_arch
from esc_arch.archs.base import SharedKernelNetwork
from esc_arch.archs.shapes import Shapes
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.tools.export import InputShape, export_program
from esc_arch.tools.upscale.large_images import enlarge

SMALL: dict[str, Any] = {
    "dim": 8,
    "pdim": 4,
    "kernel_size": 7,
    "n_blocks": 1,
    "conv_blocks": 2,
    "window_size": 8,
    "num_heads": 2,
} | {"upscaling_factor": 2, "exp_ratio": 2, "attn_type": "auto", "use_ln": True}


@ARCH_REGISTRY.register()
@dataclass(eq=False, repr=False)
class TwoStepESC(SharedKernelNetwork):
    """ESC whose pixel shuffle is followed by one more convolution."""

    head_margin = 3
    subpixel_conv = None

    conv_blocks: int = 2
    kernel_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.proj = Conv3x3(3, self.dim)
        self.blocks = self.new_blocks()
        self.last = Conv3x3(self.dim, self.dim)
        self.enlarge_features = nn.Sequential(
            Conv3x3(self.dim, self.dim * self.upscaling_factor**2), nn.PixelShuffle(self.upscaling_factor)
        )
        self.to_rgb = Conv3x3(self.dim, 3)

    def reconstruct(self, feat: Tensor, shallow: Tensor, image: Tensor) -> Tensor:
        return self.to_rgb(self.enlarge_features(self.last(feat) + shallow))

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        if "enlarge_features.0.weight" not in shapes:
            return None
        dim = shapes.size("to_rgb.weight", 1)
        scale = shapes.root("enlarge_features.0.weight", 0, "dim times a square of sub-pixels", times=dim)
        return shapes.options(scale=scale, use_ln=shapes.use_ln)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save({"params": randomise(TwoStepESC(**SMALL)).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> Any:
    return esc_arch.load(weights, device="cpu")


@pytest.mark.usefixtures("basicsr_log")
def test_it_is_built_and_trained() -> None:
    net = build_network({"type": "TwoStepESC", **SMALL})
    randomise(net)
    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    net(torch.rand(2, 3, 9, 11)).square().mean().backward()
    optimizer.step()
    assert all((tensor != before[name]).any() for name, tensor in net.named_parameters())


def test_it_is_recognised_and_loaded(model: Any, weights: Path) -> None:
    assert type(model.net) is TwoStepESC
    assert model.network_g == {"type": "TwoStepESC", **SMALL}
    image = picture(13, 20)
    assert np.abs(esc_arch.upscale(image, weights).astype(int) - esc_arch.upscale(image, model)).max() == 0


def test_it_is_the_same_in_parts(model: Any) -> None:
    image = picture(45, 70)
    blocks = list(enlarge(model, image, tile=16))
    assert len(blocks) > 1
    assert max_error(joined(blocks, (90, 140)), plain(model, image)) < 1e-5


def test_it_is_exported(model: Any, tmp_path: Path) -> None:
    """Which compares the file with the network."""
    export_program(model, tmp_path / "net.pt2", shape=InputShape(1, 9, 11))


def test_the_documentation_shows_this_class() -> None:
    page = (Path(__file__).parents[2] / "docs" / "add_a_network.md").read_text(encoding="utf-8")
    assert inspect.getsource(TwoStepESC).strip() in page
