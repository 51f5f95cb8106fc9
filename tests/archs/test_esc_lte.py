"""What ESCLTE promises beyond LTE's formulas, with every parameter random."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from torch import Tensor

from esc_arch import ESC, ESCLTE
from esc_arch.checkpoints import load_weights

SMALL: dict[str, Any] = {
    "dim": 8,
    "pdim": 4,
    "kernel_size": 3,
    "n_blocks": 1,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
}


def make(**options: Any) -> ESCLTE:
    net = ESCLTE(**SMALL | {"hidden_dim": 8, "mlp_dims": (8,)} | options)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return net.eval()


def image(batch: int = 2, height: int = 7, width: int = 9) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_built_by_basicsr_it_enlarges_by_its_scale() -> None:
    net = build_network({"type": "ESCLTE", **SMALL, "hidden_dim": 8, "mlp_dims": [8], "upscaling_factor": 2.5})
    assert net(image()).shape == (2, 3, 18, 22)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (28, 36)),
        ({"scale": 2}, (14, 18)),
        ({"scale": 2.5}, (18, 22)),
        ({"scale": 6}, (42, 54)),
        ({"scale": 8.0}, (56, 72)),
        ({"scale": (2, 3.5)}, (14, 32)),
        ({"scale": [1, 0.5]}, (7, 4)),
        ({"size": (5, 31)}, (5, 31)),
    ],
)
def test_sizes(asked: dict[str, Any], size: tuple[int, int]) -> None:
    assert make()(image(), **asked).shape == (2, 3, *size)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 2), (4, 4), (9, 13)])
@pytest.mark.parametrize("scale", [1, 2.5, 8])
def test_any_size_alone_or_in_a_batch_in_training_or_evaluation(size: tuple[int, int], scale: float) -> None:
    net, batch = make(), image(3, *size)
    before, result = batch.clone(), net(batch, scale)
    assert torch.isfinite(result).all()
    assert torch.equal(batch, before)
    for index in range(len(batch)):
        assert torch.allclose(net(batch[index : index + 1], scale), result[index : index + 1], atol=1e-5)
    assert torch.equal(net.train()(batch, scale), result)


def test_layouts_of_memory() -> None:
    net, batch = make(), image()
    expected = net(batch, 2.5)
    assert torch.allclose(net(batch.contiguous(memory_format=torch.channels_last), 2.5), expected, atol=1e-5)
    assert torch.allclose(net(batch.mT.contiguous().mT, 2.5), expected, atol=1e-5)
    assert torch.allclose(net.to(memory_format=torch.channels_last)(batch, 2.5), expected, atol=1e-5)


def test_a_copy_is_independent() -> None:
    net = make()
    expected, twin = net(image()), copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.zero_()
    assert torch.equal(twin(image()), expected)
    assert not torch.allclose(net(image()), expected)


@pytest.mark.parametrize("size", [(7, 9), (4, 8)])
def test_normalized_it_is_the_network_of_images_in_minus_1_to_1(size: tuple[int, int]) -> None:
    net, batch = make(normalize=True), image(2, *size)
    around = make()(batch * 2 - 1, 2.5) * 0.5 + 0.5
    assert torch.allclose(net(batch, 2.5), around, atol=1e-5)
    assert not torch.allclose(around, make()(batch, 2.5), atol=1e-2)


def test_points_are_pixels_of_the_whole_image() -> None:
    net, batch = make(), image()
    whole = net(batch, size=(14, 27)).flatten(2)
    pixels = torch.tensor([0, 5, 26, 27, 200, 377])
    y, x = pixels // 27, pixels % 27
    coords = torch.stack([(2 * y + 1) / 14 - 1, (2 * x + 1) / 27 - 1], dim=-1)
    cell = torch.tensor([2 / 14, 2 / 27])
    result = net(batch, coords=coords.expand(2, -1, -1), cell=cell.expand(2, -1))
    assert torch.allclose(result, whole[..., pixels], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 50, 10_000, None])
def test_chunks_change_nothing(chunk: int | None) -> None:
    assert torch.allclose(make(query_chunk=chunk)(image(), 2.5), make(query_chunk=37)(image(), 2.5), atol=1e-6)


def test_folding_keeps_the_result() -> None:
    net = make()
    expected = net(image(), 2.5)
    assert torch.allclose(net.fold()(image(), 2.5), expected, atol=1e-5)


def test_the_body_of_an_esc_checkpoint() -> None:
    weights = ESC(**SMALL, upscaling_factor=3).state_dict()
    net = make()
    load_weights(net, weights, strict=False, source="an ESC")
    own = net.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items() if not name.startswith("to_img."))
    assert {name.split(".")[0] for name in own.keys() - weights.keys()} == {"lte"}


def test_number_of_parameters() -> None:
    body = sum(p.numel() for name, p in ESC().named_parameters() if not name.startswith("to_img."))
    convs, phase = 2 * (64 * 9 + 1) * 256, 2 * 128
    mlp = 3 * 257 * 256 + 257 * 3
    assert sum(p.numel() for p in ESCLTE().parameters()) == body + convs + phase + mlp == 1_433_631


def test_exported_it_takes_other_sizes() -> None:
    net = make(upscaling_factor=2.5, query_chunk=7)
    sides = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    exported = torch.export.export(net, (image(),), dynamic_shapes=(sides,)).module()
    other = image(2, 10, 6)
    assert torch.allclose(exported(other), net(other), atol=1e-5)


def test_compiled() -> None:
    net = make()
    expected = net(image(), 2.5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(image(), 2.5), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"scale": 0}, "scale is 0; it must be a number above 0"),
        ({"scale": (2, -1)}, r"scale is \(2, -1\); it must be a number above 0"),
        ({"size": (0, 4)}, r"size is \(0, 4\); height and width must be at least 1"),
        ({"scale": 2, "size": (4, 4)}, "more than one of scale, size and coords is given"),
        ({"coords": torch.zeros(2, 5, 2)}, "coords and cell go together"),
        ({"cell": torch.zeros(2, 2)}, "coords and cell go together"),
        (
            {"coords": torch.zeros(5, 2), "cell": torch.zeros(2, 2)},
            r"coords are \(5, 2\) and cell \(2, 2\); for a batch of 2 they must be \(2, Q, 2\) and \(2, 2\)",
        ),
    ],
)
def test_invalid_queries(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(image(), **asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upscaling_factor": 0}, "upscaling_factor is 0; it must be a number above 0"),
        ({"query_chunk": 0}, "query_chunk is 0; it must be at least 1, or null"),
        ({"hidden_dim": 3}, "hidden_dim is 3; it must be even"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
