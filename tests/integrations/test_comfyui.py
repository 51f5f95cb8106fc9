"""The nodes as ComfyUI calls them, with stand-ins for what they import of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from networks import SMALL, image, randomise

import esc_arch
from esc_arch import UserError
from esc_arch.checkpoints.conversion import build_network
from esc_arch.tools.upscale.memory import resident


class ProgressBar:
    values: list[int]

    def __init__(self, total: int) -> None:
        self.total = total
        ProgressBar.values = []

    def update_absolute(self, value: int) -> None:
        self.values.append(value)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What ComfyUI finds in the file of a user that the documentation has, by name."""
    net = randomise(build_network({"type": "ESC", **SMALL}))
    torch.save({"params": net.state_dict()}, tmp_path / "net.pth")
    stubs: dict[str, Any] = {
        "folder_paths": SimpleNamespace(
            get_filename_list=lambda kind: [path.name for path in tmp_path.iterdir()],
            get_full_path_or_raise=lambda kind, name: str(tmp_path / name),
        ),
        "comfy": ModuleType("comfy"),
        "comfy.model_management": SimpleNamespace(
            get_torch_device=lambda: torch.device("cpu"), free_memory=lambda size, device: []
        ),
        "comfy.utils": SimpleNamespace(ProgressBar=ProgressBar),
    }
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
        if name.startswith("comfy."):
            monkeypatch.setattr(stubs["comfy"], name[6:], stub, raising=False)
    found: dict[str, Any] = {}
    exec("from esc_arch.integrations.comfyui import *", found)
    yield {name: node() for name, node in found["NODE_CLASS_MAPPINGS"].items()}
    del sys.modules["esc_arch.integrations.comfyui"]


def call(node: Any, **inputs: Any) -> Any:
    """As ComfyUI does: names of inputs, the function by its name, one output for each type."""
    asked = node.INPUT_TYPES()
    assert asked["required"].keys() <= inputs.keys() <= {**asked["required"], **asked.get("optional", {})}.keys()
    results = getattr(node, node.FUNCTION)(**inputs)
    assert len(results) == len(node.RETURN_TYPES) == 1
    return results[0]


def test_a_batch_is_enlarged_exactly(nodes: dict[str, Any], tmp_path: Path) -> None:
    loader, upscaler = nodes["LoadESC"], nodes["UpscaleWithESC"]
    assert loader.INPUT_TYPES()["required"]["model_name"] == (["net.pth"],)
    model = call(loader, model_name="net.pth")
    images = image(2, 3, 13, 22)
    expected = esc_arch.load(tmp_path / "net.pth")(images).clamp(0, 1).permute(0, 2, 3, 1)
    result = call(upscaler, model=model, image=images.permute(0, 2, 3, 1))
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert (result - expected).abs().max() < 1e-5
    assert ProgressBar.values == sorted(ProgressBar.values) and ProgressBar.values[-1] == 2000


def test_memory_is_bounded(nodes: dict[str, Any]) -> None:
    model, picture = call(nodes["LoadESC"], model_name="net.pth"), image(1, 3, 200, 240).permute(0, 2, 3, 1)
    whole = call(nodes["UpscaleWithESC"], model=model, image=picture)
    parts = call(nodes["UpscaleWithESC"], model=model, image=picture, max_memory=(resident() + 12 * 2**20) / 2**30)
    assert len(ProgressBar.values) > 4
    assert (parts - whole).abs().max() < 1e-5
    with pytest.raises(UserError, match=r"max_memory: .* needs at least"):
        call(nodes["UpscaleWithESC"], model=model, image=picture, max_memory=0.01)


def test_values_and_transparency(nodes: dict[str, Any]) -> None:
    model = call(nodes["LoadESC"], model_name="net.pth")
    picture = torch.cat([image(1, 9, 8, 3) * 1.5 - 0.25, torch.ones(1, 9, 8, 1)], dim=-1)
    result = call(nodes["UpscaleWithESC"], model=model, image=picture)
    colours = call(nodes["UpscaleWithESC"], model=model, image=picture[..., :3].clamp(0, 1))
    assert torch.equal(result[..., :3], colours) and (result[..., 3] == 1).all()
