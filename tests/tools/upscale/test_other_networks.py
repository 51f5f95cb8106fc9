"""Networks of other families: named without spandrel, enlarged with it, whole or in tiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.archs.swinir_arch import SwinIR
from PIL import Image
from torch import nn

from esc_arch import UserError
from esc_arch.cli import main
from esc_arch.tools.upscale import large_images
from esc_arch.tools.upscale.memory import resident
from esc_arch.tools.upscale.other_networks import OVERLAP, OtherNetwork, load_any

#: Small networks, and how messages name them.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "RRDBNet (ESRGAN, Real-ESRGAN, BSRGAN)": lambda: RRDBNet(3, 3, num_feat=8, num_block=2, num_grow_ch=32, scale=4),
    "SRVGGNetCompact (Real-ESRGAN)": lambda: SRVGGNetCompact(num_feat=8, num_conv=2, upscale=2),
    "SwinIR": lambda: SwinIR(
        img_size=16, window_size=8, depths=[2], embed_dim=8, num_heads=[2], upscale=2, upsampler="pixelshuffledirect"
    ),
}
COMPACT = "SRVGGNetCompact (Real-ESRGAN)"


def saved(folder: Path, kind: str) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    net = NETWORKS[kind]().eval()
    torch.save({"params_ema": net.state_dict()}, folder / "other.pth")
    return folder / "other.pth", net


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_spandrel_it_is_said_what_it_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(UserError) as caught:
        load_any(saved(tmp_path, kind)[0], device="cpu")
    assert f"this looks like {kind}. Where spandrel is installed (pip install" in str(caught.value)


def test_what_nobody_knows_is_said_as_before(tmp_path: Path) -> None:
    torch.save({"params": {"weight": torch.ones(2, 2), "mine.bias": torch.ones(2)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"not the weights of an ESC network \(or not all of them\).* They hold weight"):
        load_any(tmp_path / "a.pth", device="cpu")


@pytest.mark.parametrize("kind", NETWORKS)
def test_images_are_what_the_network_makes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("spandrel", reason='needs spandrel: pip install "esc-arch[spandrel]"')
    weights, net = saved(tmp_path, kind)
    image = picture(16, 24)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert main(["upscale", "-g", "-1", "-m", str(weights), "-i", f"{tmp_path}/a.png", "-o", f"{tmp_path}/b.png"]) == 0
    out = capsys.readouterr().out
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters, CPU, fp32" in out
    assert f"run by spandrel; an image in tiles is approximate: they overlap by {OVERLAP} pixels" in out
    with torch.no_grad():
        expected = net(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0].clamp(0, 1).permute(1, 2, 0)
    difference = np.asarray(Image.open(tmp_path / "b.png")).astype(int) - (expected * 255).round().numpy()
    assert np.abs(difference).max() <= 1


def test_tiles_and_progress(tmp_path: Path) -> None:
    pytest.importorskip("spandrel", reason='needs spandrel: pip install "esc-arch[spandrel]"')
    upscaler, image = load_any(saved(tmp_path, COMPACT)[0], device="cpu"), picture(70, 100)
    assert isinstance(upscaler.net, OtherNetwork)
    told: list[float] = []
    (whole,) = large_images.enlarge(upscaler, image, progress=told.append)
    assert told == sorted(told) and len(told) > 3 and told[-1] == 1
    told.clear()
    bands = list(large_images.enlarge(upscaler, image, tile=40, progress=told.append))
    assert [band.shape[1] for band in bands] == [70, 70]
    assert told == pytest.approx([33 / 200, 66 / 200, 1 / 2, 133 / 200, 166 / 200, 1])
    # It sees 4 pixels to each side, so that nothing is lost
    torch.testing.assert_close(torch.cat(bands, dim=1), whole)


def test_memory_bounds_the_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spandrel", reason='needs spandrel: pip install "esc-arch[spandrel]"')
    upscaler, image = load_any(saved(tmp_path, COMPACT)[0], device="cpu"), picture(150, 300)
    cost = large_images.costs_of(upscaler, None)[0]
    free = cost.of((128 + 2 * OVERLAP) ** 2)
    monkeypatch.setattr(large_images, "_host", lambda _: free)
    assert len(list(large_images.enlarge(upscaler, image))) == 2
    monkeypatch.setattr(large_images, "_host", lambda budget: budget - resident())
    with pytest.raises(UserError, match=r"needs .* for tiles of 64 pixels; .* may be taken. Raise --max-memory"):
        list(large_images.enlarge(upscaler, image, max_memory=2**20))


def test_networks_for_other_channels_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("spandrel", reason='needs spandrel: pip install "esc-arch[spandrel]"')
    torch.save(SRVGGNetCompact(1, 1, num_feat=8, num_conv=2, upscale=2).state_dict(), tmp_path / "grey.pth")
    with pytest.raises(UserError, match="does not take and give RGB images"):
        load_any(tmp_path / "grey.pth", device="cpu")


def test_shapes_that_do_not_fit_are_one_message(tmp_path: Path) -> None:
    pytest.importorskip("spandrel", reason='needs spandrel: pip install "esc-arch[spandrel]"')
    weights: dict[str, Any] = NETWORKS[COMPACT]().state_dict()
    torch.save(weights | {"body.2.weight": torch.ones(3)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd\.pth: spandrel cannot load it: .*size mismatch for body\.2\.weight"):
        load_any(tmp_path / "odd.pth", device="cpu")
