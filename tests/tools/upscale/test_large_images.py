"""Images in parts: the same as at once, within a budget, whatever runs out."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_networks import joined, picture, plain, upscaler_of
from networks import max_error, needs_cuda
from torch import Tensor

from esc_arch import system
from esc_arch.archs.heads import Region
from esc_arch.errors import UserError
from esc_arch.tools.upscale import large_images
from esc_arch.tools.upscale.feature_maps import FeatureMap
from esc_arch.tools.upscale.large_images import costs_of, enlarge, plan_for, whole
from esc_arch.tools.upscale.memory import available, format_memory, is_out_of_memory, parse_memory, peak_of, resident
from esc_arch.tools.upscale.network import Upscaler
from esc_arch.tools.upscale.tiled_executor import PaddedImage, Plan, TiledExecutor, cuts, grid

#: Many tiles in both directions.
SMALL = Plan(tile=8)


def in_parts(upscaler: Upscaler, image: np.ndarray, plan: Plan, scale: float | None = None, **options: Any) -> Tensor:
    size = upscaler.output_size(*image.shape[:2], scale)
    padded = PaddedImage(image, upscaler.net.window_size, upscaler.net.unshuffle_factor)
    return joined(TiledExecutor(upscaler, padded, size, plan, **options).run(), size)


REAL_M = [
    pytest.param("ESCRealM", {"upsampler": name, "upscaling_factor": scale, "mid_dim": 12}, id=f"RealM-{name}-x{scale}")
    for name in ("pixelshuffledirect", "pixelshuffle", "nearest+conv", "dysample", "transpose+conv")
    for scale in (1, 2, 3, 4)
]
NETWORKS = [
    pytest.param("ESC", {"upscaling_factor": 3}, id="ESC"),
    pytest.param("ESC", {"upscaling_factor": 2, "use_ln": True, "conv_blocks": 1}, id="ESC-layer-norm-one-pair"),
    pytest.param("ESC", {"upscaling_factor": 1, "conv_blocks": 0, "n_blocks": 1}, id="ESC-no-pair"),
    pytest.param("ESC", {"upscaling_factor": 2, "attn_type": "FlashBias", "rank": 4}, id="ESC-FlashBias"),
    pytest.param("ESCFP", {"upscaling_factor": 3}, id="ESCFP"),
    pytest.param("ESCReal", {}, id="ESCReal"),
    pytest.param("ESCReal", {"use_dysample": True, "upscaling_factor": 3}, id="ESCReal-dysample"),
    *REAL_M,
    pytest.param("ESCRealM", {"upscaling_factor": 2, "unshuffle_mod": False}, id="RealM-not-folded"),
    pytest.param("ESCRIB", {"rank": 4, "upscaling_factor": 2}, id="ESCRIB"),
    pytest.param("ESCRIB", {"rank": 4, "gate_type": "DWC", "upscaling_factor": 2}, id="ESCRIB-gate"),
    pytest.param("ESCLTE", {"hidden_dim": 16, "mlp_dims": (16,), "upscaling_factor": 2.7}, id="ESCLTE"),
    pytest.param("ESCLTE", {"hidden_dim": 16, "mlp_dims": (16,), "upscaling_factor": 0.6}, id="ESCLTE-smaller"),
    pytest.param("ESCLTE", {"hidden_dim": 16, "mlp_dims": (16,), "normalize": True}, id="ESCLTE-normalized"),
]


def tolerance(options: dict[str, Any]) -> float:
    """1e-5; where places follow from features, their rounding comes on top: at 50 pixels 4e-6 times a step of 3."""
    return 4e-5 if "dysample" in options.values() or "use_dysample" in options else 1e-5


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_parts_are_the_whole(kind: str, options: dict[str, Any]) -> None:
    upscaler = upscaler_of(kind, **options)
    for height, width, in_files in ((45, 27, False), (21, 43, True)):
        image = picture(height, width)
        parts = in_parts(upscaler, image, Plan(8, in_files))
        assert max_error(parts, plain(upscaler, image)) < tolerance(options)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (8, 8), (9, 17), (70, 23)])
@pytest.mark.parametrize("kind", ["ESC", "ESCRealM"])
def test_any_size(kind: str, size: tuple[int, int]) -> None:
    upscaler = upscaler_of(kind, upscaling_factor=2)
    image = picture(*size)
    parts = in_parts(upscaler, image, SMALL)
    assert max_error(parts, plain(upscaler, image)) < 1e-5


@pytest.mark.parametrize("tile", [16, 24, 512])
def test_any_tile(tile: int) -> None:
    upscaler = upscaler_of("ESCReal")
    image = picture(45, 27)
    parts = in_parts(upscaler, image, Plan(tile))
    assert max_error(parts, plain(upscaler, image)) < 1e-5


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_type_of_picture(dtype: str, tmp_path: Path) -> None:
    upscaler = upscaler_of("ESC", upscaling_factor=2)
    image = picture(20, 30, dtype)
    mapped = np.memmap(tmp_path / "picture", dtype, "w+", shape=image.shape)
    mapped[:] = image
    parts = in_parts(upscaler, mapped, SMALL)
    assert max_error(parts, plain(upscaler, image)) < 1e-5


@pytest.mark.parametrize("scale", [1, 1.5, 3, 5.3])
def test_any_scale(scale: float) -> None:
    upscaler = upscaler_of("ESCLTE", hidden_dim=16, mlp_dims=(16,))
    image = picture(23, 31)
    parts = in_parts(upscaler, image, SMALL, scale)
    assert max_error(parts, plain(upscaler, image, scale)) < 1e-5


def test_places_far_away() -> None:
    """DySample that reads all over the map gets what is there."""
    upscaler = upscaler_of("ESCReal", use_dysample=True, upscaling_factor=2, n_blocks=1)
    sampler = upscaler.net.to_img
    sampler.offset.weight.mul_(3)  # tens of pixels
    image = picture(90, 70)
    parts = in_parts(upscaler, image, Plan(16))
    # Places have the rounding of the features times 50, and steps between neighbours are as large as the features
    assert max_error(parts, plain(upscaler, image)) < 1e-3


def test_dysample_rounds_as_pytorch_does() -> None:
    """In wide maps the places are off by up to 0.001 pixels, which a part has to repeat."""
    upscaler = upscaler_of("ESCReal", use_dysample=True, upscaling_factor=2)
    height, width = 16, 3000
    x = torch.randn(1, 8, height, width, generator=torch.Generator().manual_seed(0))
    head = upscaler.net.head((height, width), (height, width), (2 * height, 2 * width))
    out = Region(8, 5000, 24, 5400)
    block = head.block(out, lambda region: region.crop(x, Region(0, 0, height, width)), None)
    assert max_error(block, out.crop(upscaler.net.to_img(x)[0], Region(0, 0, 2 * height, 2 * width))) < 5e-6


def test_bicubic_rounds_as_pytorch_does() -> None:
    """In wide images PyTorch's places are off by up to 0.001 pixels, which a part has to repeat."""
    width, scale, part = 9000, 3, Region(0, 8000, 6, 8100)
    upscaler = upscaler_of("ESCFP", upscaling_factor=scale, n_blocks=1)
    for parameter in upscaler.net.to_img.parameters():
        parameter.zero_()  # what remains is the enlarged image
    row = torch.from_numpy(picture(1, width, "float32")).permute(2, 0, 1)[None].expand(-1, -1, 6, -1)
    expected = torch.nn.functional.interpolate(row, scale_factor=scale, mode="bicubic")[0]
    whole, x = Region(0, 0, 6, width), part.crop(row, Region(0, 0, 6, width))
    head = upscaler.net.head((6, width), (6, width), (6 * scale, width * scale))
    out = part._replace(left=8006, right=8094).times(scale)
    block = head.block(
        out, lambda region: torch.zeros(1, 8, region.height, region.width), lambda region: region.crop(row, whole)
    )
    assert max_error(block, out.crop(expected, whole.times(scale))) < 2e-6
    of_part = torch.nn.functional.interpolate(x, scale_factor=scale, mode="bicubic")[0]
    assert max_error(out.crop(of_part, part.times(scale)), out.crop(expected, whole.times(scale))) > 1e-5


def test_means_are_of_the_whole_image() -> None:
    """That tiles have means of their own would be seen: a network without the pooled kernels' part fails this."""
    upscaler = upscaler_of("ESC", upscaling_factor=2)
    left, right = picture(16, 32), picture(16, 32) // 8
    both = in_parts(upscaler, np.concatenate([left, right], 1), SMALL)
    alone = plain(upscaler, left)
    assert max_error(both[:, :16, :16], alone[:, :16, :16]) > 1e-2


def test_progress_rises_to_one() -> None:
    told: list[float] = []
    upscaler = upscaler_of("ESCReal", use_dysample=True)
    in_parts(upscaler, picture(20, 20), SMALL, progress=told.append)
    assert told == sorted(told)
    assert told[0] < 0.05
    assert told[-1] == pytest.approx(1)


# --- half precision and devices -------------------------------------------------------------------------------------


def test_half_precision_is_near() -> None:
    image = picture(20, 30)
    exact = plain(upscaler_of("ESC", upscaling_factor=2), image)
    half = upscaler_of("ESC", upscaling_factor=2, precision=torch.bfloat16)
    of_whole = max_error(plain(half, image), exact)
    assert 0 < max_error(in_parts(half, image, Plan(8, in_files=True)), exact) < 2 * of_whole


@needs_cuda
@pytest.mark.parametrize("kind", ["ESC", "ESCRealM", "ESCLTE", "ESCFP"])
def test_parts_on_a_gpu(kind: str) -> None:
    upscaler = upscaler_of(kind, upscaling_factor=2, device="cuda")
    image = picture(45, 27)
    parts = in_parts(upscaler, image, SMALL)
    assert max_error(parts, plain(upscaler, image)) < 1e-4  # convolutions there choose their algorithm by the size


@needs_cuda
def test_plan_on_a_gpu() -> None:
    upscaler = upscaler_of("ESC", device="cuda")
    image = picture(45, 27)
    parts = joined(enlarge(upscaler, image, max_memory=resident() + 2**30, at_once=False), (180, 108))
    assert max_error(parts, plain(upscaler, image)) < 1e-4


def test_device_memory_that_runs_out_makes_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESCRealM", upscaling_factor=2)
    image = picture(60, 90)
    areas = run_out_above(monkeypatch, 30 * 30)
    parts = in_parts(upscaler, image, Plan(512))
    assert max_error(parts, plain(upscaler, image)) < 1e-5
    assert sum(area > 30 * 30 for area in areas) <= 5  # it does not try what is too large again


def test_device_memory_that_is_too_little_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESC")
    run_out_above(monkeypatch, 0)
    with pytest.raises(UserError, match="Memory ran out for a tile of 8 x 8 pixels of cpu, and it cannot be smaller"):
        in_parts(upscaler, picture(16, 16), SMALL)


def run_out_above(monkeypatch: pytest.MonkeyPatch, area: int) -> list[int]:
    """Let reading more pixels than `area` fail; gives the areas that are asked for."""
    areas: list[int] = []
    read = FeatureMap.read

    def limited(self: FeatureMap, region: Region) -> Tensor:
        areas.append(region.area)
        if region.area > area:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read(self, region)

    monkeypatch.setattr(FeatureMap, "read", limited)
    return areas


# --- the budget -----------------------------------------------------------------------------------------------------


def planned(upscaler: Upscaler, height: int, width: int, budget: float, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan for a budget beyond what this process has."""
    monkeypatch.setattr(large_images, "resident", lambda: 0)
    image = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (height, width, 3))
    size = upscaler.output_size(height, width)
    return plan_for(upscaler, PaddedImage(image, upscaler.net.window_size), size, None, int(budget))


def test_tiles_grow_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESC")
    plans = [planned(upscaler, 4000, 6000, budget * 2**20, monkeypatch) for budget in (16, 32, 300, 3000, 30000)]
    tiles = [plan.tile for plan in plans]
    assert tiles == sorted(tiles)
    assert tiles[0] < tiles[-1] == large_images.LARGEST_TILE
    assert [plan.in_files for plan in plans] == [True, True, True, False, False]


@pytest.mark.parametrize("size", [(64, 200000), (200000, 64)])
def test_narrow_images_are_bounded_too(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESC")
    rows = 12 * (4 * 8) * (4 * size[1])  # of the result, as few as there may be at a time
    plan = planned(upscaler, *size, 20 * 2**20 + rows, monkeypatch)
    largest = max(tile.expand(6, size).area for tile in grid(size, plan.tile, 8))
    assert costs_of(upscaler, None)[1].of(largest) <= 20 * 2**20 + rows


@pytest.mark.parametrize("kind", ["ESC", "ESCReal", "ESCFP", "ESCLTE"])
def test_no_tile_takes_more_than_planned(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of(kind, **({"hidden_dim": 16, "mlp_dims": (16,)} if kind == "ESCLTE" else {}))
    budget = costs_of(upscaler, None)[1].of(60 * 60) + 12 * 4 * 60 * 4 * 170
    plan = planned(upscaler, 150, 170, budget, monkeypatch)
    peaks: list[int] = []
    attempt = TiledExecutor.attempt

    def measured(self: TiledExecutor, *args: Any) -> None:
        peaks.append(peak_of(lambda: attempt(self, *args), torch.device("cpu")))

    monkeypatch.setattr(TiledExecutor, "attempt", measured)
    in_parts(upscaler, picture(150, 170), plan)
    assert budget / 4 < max(peaks) < budget


def test_too_little_memory_names_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESC")
    with pytest.raises(UserError, match=r"max_memory: 98K given; trial\.pth needs at least [0-9.]+[KM], of which") as e:
        planned(upscaler, 100, 100, 1e5, monkeypatch)
    least = parse_memory(str(e.value).split("needs at least ")[1].split(",")[0])
    assert planned(upscaler, 100, 100, least, monkeypatch) == Plan(8, in_files=True)
    monkeypatch.setattr(large_images, "available", lambda: 1000)
    with pytest.raises(
        UserError, match=r"There is too little memory: trial.pth needs .* may take 0.7K of what is free"
    ):
        list(enlarge(upscaler, picture(9, 9), at_once=False))


def test_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESC")
    monkeypatch.setattr(large_images, "resident", lambda: 2**30)
    with pytest.raises(UserError, match=r"max_memory: 512M given; .* of which the program takes 1\.0G already"):
        list(enlarge(upscaler, picture(9, 9), max_memory=2**29))


def test_peak_counts_what_lives_together() -> None:
    def call() -> None:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        third = second[10:].view(-1)  # the same numbers
        torch.cat([second, third])

    assert peak_of(call, torch.device("cpu")) == 4 * (500 + 990)
    assert peak_of(lambda: torch.zeros(1000).add(1).mul(2), torch.device("cpu")) == 8000


# --- choosing -------------------------------------------------------------------------------------------------------


def test_what_fits_is_computed_at_once() -> None:
    upscaler = upscaler_of("ESC", upscaling_factor=2)
    image = picture(30, 20)
    told: list[float] = []
    (enlarged,) = enlarge(upscaler, image, progress=told.append)
    assert told == pytest.approx([1 / 3, 2 / 3, 1])  # after each block
    assert torch.equal(enlarged, plain(upscaler, image))


def test_what_does_not_fit_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESC", upscaling_factor=2)
    image = picture(230, 190)
    monkeypatch.setattr(large_images, "resident", lambda: 0)
    blocks = list(enlarge(upscaler, image, max_memory=int(costs_of(upscaler, None)[0].of(230 * 190) / 4)))
    assert len(blocks) > 1
    assert max_error(joined(blocks, (460, 380)), plain(upscaler, image)) < 1e-5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("could not create a memory object: not enough memory"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_answered_by_parts(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upscaler = upscaler_of("ESC", upscaling_factor=2)
    image = picture(30, 20)
    expected = plain(upscaler, image)
    assert costs_of(upscaler, None)  # which calls the network as a whole too
    fail_at_once(monkeypatch, error)
    with caplog.at_level(logging.WARNING, "esc_arch"):
        parts = joined(enlarge(upscaler, image), (60, 40))
    assert max_error(parts, expected) < 1e-5
    (warning,) = caplog.messages
    assert warning == (
        "Memory ran out for the image of 20 x 30 pixels as a whole: it is computed in parts, with the same result."
    )


def test_other_failures_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESC")
    assert costs_of(upscaler, None)
    fail_at_once(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        list(enlarge(upscaler, picture(8, 8)))


def fail_at_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise error

    monkeypatch.setattr(Upscaler, "__call__", fail)


def test_real_failures_of_the_allocator_are_recognised() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**60)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**58)
    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(of_numpy.value)
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.resource, "getrlimit", lambda _: (2**50, 2**50))
    free = available()
    used = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line)
    monkeypatch.setattr(system.resource, "getrlimit", lambda _: (used * 1024 + 2**20, 2**50))
    assert available() <= 2**21 < free


@pytest.mark.parametrize(("kind", "tile", "largest"), [("ESC", 16, 16), ("ESC", 9, 16), ("ESCRealM", 20, 32)])
def test_tile_bounds_the_parts(kind: str, tile: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rounded up to whole windows, of the network's features; a smaller image is computed at once."""
    upscaler = upscaler_of(kind, upscaling_factor=2)
    image = picture(45, 60)
    plans: list[Plan] = []
    run = TiledExecutor.run
    assert costs_of(upscaler, None)  # which is measured by one too
    monkeypatch.setattr(TiledExecutor, "run", lambda self: plans.append(self.plan) or run(self))
    parts = joined(enlarge(upscaler, image, tile=tile), (90, 120))
    assert max_error(parts, plain(upscaler, image)) < 1e-5
    unshuffle = 2 if kind == "ESCRealM" else 1
    assert [plan.tile for plan in plans] == [largest // unshuffle]
    joined(enlarge(upscaler, image[:9, :9], tile=tile), (18, 18))
    assert len(plans) == 1


def test_a_scale_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"trial\.pth enlarges by 4, not by 3"):
        list(enlarge(upscaler_of("ESC"), picture(9, 9), scale=3))


@pytest.mark.parametrize("image", [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 4), np.uint8), np.zeros((5, 5, 3), int)])
def test_what_is_no_picture(image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"must be \(height, width, 3\), RGB, of uint8, uint16, float32"):
        list(enlarge(upscaler_of("ESC"), image))


# --- temporary files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_file", [False, True])
def test_maps_give_back_what_they_got(in_file: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = FeatureMap(3, (5, 7), dtype, torch.device("cpu"), tmp_path if in_file else None)
    x = torch.randn(1, 3, 5, 7)
    for region in (Region(0, 0, 5, 7), Region(1, 0, 3, 7), Region(2, 3, 5, 6)):
        stored.write(region, region.crop(x, Region(0, 0, 5, 7)))
        back = stored.read(region)
        assert back.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(back, region.crop(x, Region(0, 0, 5, 7)).to(dtype))
    assert torch.equal(stored.read(Region(0, 0, 5, 7)), x.to(dtype))
    stored.close()


def test_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = upscaler_of("ESC")
    made: list[Any] = []
    original = tempfile.TemporaryFile

    def file(*args: Any, **options: Any) -> Any:
        assert options["dir"] == tmp_path
        made.append(original(*args, **options))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", file)
    plan = Plan(8, in_files=True)
    in_parts(upscaler, picture(20, 20), plan, scratch=tmp_path)
    run_out_above(monkeypatch, 0)
    with pytest.raises(UserError):
        in_parts(upscaler, picture(20, 20), plan, scratch=tmp_path)
    assert len(made) == 6
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert list(tmp_path.iterdir()) == []


def test_what_was_read_of_files_is_no_memory_of_the_process(tmp_path: Path) -> None:
    stored = FeatureMap(64, (512, 512), torch.float32, torch.device("cpu"), tmp_path)
    before = resident()
    for region in grid((512, 512), 64):
        stored.write(region, torch.ones(1, 64, 64, 64))
        stored.read(region)
    assert resident() - before < 2**24  # of 64 MiB
    stored.close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EACCES, "Permission denied"),
        (None, "No such file or directory"),
    ],
)
def test_files_that_cannot_be_made(
    error: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before anything is computed."""
    needed = format_memory(24 * 24 * 8 * 4)

    def refuse(*_: Any) -> None:
        assert error is not None
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        UserError,
        match=rf"scratch: a temporary file of {needed} for features cannot be made in .*: {message}\. Make room there",
    ):
        folder = tmp_path if error else tmp_path / "missing"
        in_parts(upscaler_of("ESC"), picture(20, 20), Plan(8, in_files=True), scratch=folder)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2**31),
        ("512M", 2**29),
        ("1.5 GiB", 3 * 2**29),
        ("800mb", 800 * 2**20),
        ("10k", 10240),
        ("123456", 123456),
    ],
)
def test_memory_is_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "G", "2 X", "-1G", "0", "1e9", "two"])
def test_memory_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match=r"The memory .* is not known; give a number with K, M, G or T, such as 2G"):
        parse_memory(text)


def test_memory_is_written_as_it_is_read() -> None:
    for size in (1, 1023, 1025, 300 * 2**20 + 1, 2**31, 9.96 * 2**30):
        assert size <= parse_memory(format_memory(size)) <= max(1.11 * size, size + 103)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 64, 100])
@pytest.mark.parametrize("most", [8, 20, 64])
def test_cuts_cover_at_multiples(length: int, most: int) -> None:
    parts = cuts(length, most, 8)
    assert parts[0][0] == 0
    assert parts[-1][1] == length
    assert all(first[1] == second[0] for first, second in pairwise(parts))
    assert all(first % 8 == 0 for first, _ in parts)
    assert all(0 < last - first < most + 8 for first, last in parts)
    assert all(last - first >= min(length, 8) for first, last in parts)  # a window's reflection is in its own part


def test_the_whole_is_measured_as_a_whole() -> None:
    upscaler = upscaler_of("ESC", upscaling_factor=2)
    image = picture(80, 80)
    peak = peak_of(lambda: whole(upscaler, image, None), torch.device("cpu"))
    assert peak < costs_of(upscaler, None)[0].of(80 * 80) < 2 * peak


def test_a_picture_is_padded_without_a_copy() -> None:
    image = picture(5, 9)
    padded = PaddedImage(image, 8, 3)
    assert (padded.height, padded.width) == (9, 18)
    twice = np.pad(np.pad(image, ((0, 3), (0, 7), (0, 0)), "reflect"), ((0, 1), (0, 2), (0, 0)), "reflect")
    region = padded.read(Region(0, 0, 9, 18), torch.device("cpu"))[0].permute(1, 2, 0)
    assert torch.equal(region, torch.from_numpy(twice / np.float32(255)))
