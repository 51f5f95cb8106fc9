"""`basicsr upscale`: which files, where to, what is said, exit statuses, and interruptions."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import NETWORK
from PIL import Image
from ranks import finish, start_forked
from skimage.data import astronaut

import esc_arch
from esc_arch import ESC
from esc_arch.cli import main, upscale
from esc_arch.tools.upscale import batch, image_writer, large_images
from esc_arch.tools.upscale.batch import BatchOptions, UpscaleTask
from esc_arch.tools.upscale.network import Upscaler

PHOTOGRAPH = astronaut()[40:70, 170:205]
OPTIONS = {key: value for key, value in NETWORK.items() if key != "type"}
Upscale = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = ESC(**OPTIONS)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("weights") / "x2.pth"
    torch.save({"params": net.state_dict()}, path)
    return path


@pytest.fixture
def run(work_folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> Upscale:
    """Runs the command on the CPU in an empty folder: exit status, and what it prints."""

    def start(*arguments: object, model: object = weights) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["upscale", "-g", "-1", "-m", str(model), *map(str, arguments)])
        return status, *capsys.readouterr()

    return start


def put(path: str, image: np.ndarray = PHOTOGRAPH, **options: Any) -> Path:
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(place, **options)
    return place


def files(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def expected(weights: Path, image: np.ndarray, **options: Any) -> np.ndarray:
    return esc_arch.upscale(image, esc_arch.load(weights, device="cpu"), **options)


def test_a_file_to_a_file(run: Upscale, weights: Path) -> None:
    status, out, err = run("-i", put("a.png"), "-o", "new/b.png")
    assert (status, err) == (0, "")
    np.testing.assert_array_equal(np.asarray(Image.open("new/b.png")), expected(weights, PHOTOGRAPH))
    assert re.match(r"ESC x2, [\d,]+ parameters, CPU, fp32\n", out)
    assert "a.png -> new/b.png (70 x 60)\n" in out
    assert out.endswith("1 done, 0 skipped (there already), 0 failed; results: new/b.png\n")


def test_folders_keep_their_structure(run: Upscale) -> None:
    for name in ("in/a.png", "in/b/c.JPG", "in/b/d/e.webp", "in/f.bmp", "in/.hidden.png", "in/.h/g.png"):
        put(name)
    Path("in/notes.txt").write_text("no picture")
    assert run("-i", "in", "-o", "out")[0] == 0
    assert files("out") == ["a_out.png", "b/c_out.JPG", "b/d/e_out.webp", "f_out.png"]


def test_several_inputs_and_a_list(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    put("a.png"), put("folder/b.png"), put("with space.png")
    os.rename(put("c.png"), b"\xff.png")
    for text in (b"with space.png\n\nfolder\r\n\xff.png", b"with space.png\0folder\0\xff.png\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        status, out, _ = run("-i", "a.png", "-", "-o", "out", "--suffix", "", "--overwrite")
        assert (status, files("out")) == (0, ["a.png", "b.png", "with space.png", "\udcff.png"])
        assert "\\udcff.png -> out/\\udcff.png (70 x 60)\n" in out


def test_a_list_from_nowhere(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run("-i", "-", "-o", "out")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "-i -: standard input is closed. Send it a list of names" in err
    with open(os.devnull, "w") as written:
        unreadable = SimpleNamespace(read=lambda: os.read(written.fileno(), 1))
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=unreadable))
        status, _, err = run("-i", "-", "-o", "out")
    assert (status, len(err.splitlines())) == (2, 1) and "standard input cannot be read: Bad file descriptor" in err


@pytest.mark.parametrize(("ext", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("tiff", "TIFF")])
def test_formats(run: Upscale, ext: str, kind: str) -> None:
    put("a.webp")
    assert run("-i", "a.webp", "-o", "out", "--ext", ext, "--suffix", "x2")[0] == 0
    with Image.open(f"out/a_x2.{ext}") as image:
        assert (image.format, image.size) == (kind, (70, 60))


def test_16_bits_stay(run: Upscale, weights: Path) -> None:
    image = PHOTOGRAPH.astype(np.uint16) * 250 + 7
    cv2.imwrite("deep.png", image[..., ::-1])
    assert run("-i", "deep.png", "-o", "out")[0] == 0
    found = cv2.imread("out/deep_out.png", cv2.IMREAD_UNCHANGED)[..., ::-1]
    np.testing.assert_array_equal(found, expected(weights, image))
    assert run("-i", "deep.png", "-o", "out", "--ext", "jpg")[0] == 0
    assert Image.open("out/deep_out.jpg").size == (70, 60)


def test_quality(run: Upscale) -> None:
    put("a.jpg")
    for quality in (20, 95):
        assert run("-i", "a.jpg", "-o", "out", "--suffix", quality, "--quality", quality)[0] == 0
    assert 2 * Path("out/a_20.jpg").stat().st_size < Path("out/a_95.jpg").stat().st_size
    assert run("-i", "a.jpg", "-o", "out", "--ext", "webp", "--lossless")[0] == 0
    assert run("-i", "a.jpg", "-o", "out", "--ext", "png")[0] == 0
    np.testing.assert_array_equal(np.asarray(Image.open("out/a_out.webp")), np.asarray(Image.open("out/a_out.png")))


def test_options_reach_the_network(run: Upscale, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    original = large_images.enlarge

    def enlarge(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(large_images, "enlarge", enlarge)
    put("a.png")
    run("-i", "a.png", "-o", "out/1.png", "-t", 16, "--tile_pad", 4, "--fp32")
    run("-i", "a.png", "-o", "out/2.png", "--max-memory", "16G", "-s", 3, "--pre_pad", 4)
    assert (seen[0]["tile"], seen[0]["max_memory"]) == (16, None)
    assert (seen[1]["tile"], seen[1]["max_memory"]) == (0, 2**34)
    assert Image.open("out/2.png").size == (105, 90)
    assert files("out") == ["1.png", "2.png"]


def test_what_is_there_is_skipped(run: Upscale) -> None:
    put("in/a.png"), put("in/b.png")
    assert run("-i", "in", "-o", "out")[0] == 0
    kept = put("out/a_out.png", np.zeros((60, 70, 3), np.uint8)).read_bytes()
    Path("out/b_out.png").unlink()
    status, out, _ = run("-i", "in", "-o", "out")
    assert status == 0
    assert "in/a.png: skipped, out/a_out.png is there" in out
    assert out.endswith("1 done, 1 skipped (there already), 0 failed; results: out\n")
    assert Path("out/a_out.png").read_bytes() == kept
    assert run("-i", "in", "-o", "out", "--overwrite")[1].endswith(
        "2 done, 0 skipped (there already), 0 failed; results: out\n"
    )
    assert np.asarray(Image.open("out/a_out.png")).any()


@pytest.mark.parametrize("ext", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("fault", ["cut off", "empty", "of 140 x 120 pixels instead of 70 x 60", "not a PNG"])
def test_what_is_there_and_is_no_result(run: Upscale, ext: str, fault: str) -> None:
    """Of another run, killed while it copied, or of another network: it is neither trusted nor overwritten unasked."""
    put("in/a.png"), put("in/b.png")
    assert run("-i", "in", "-o", "out", "--ext", ext, "-s", 4 if "140" in fault else 2)[0] == 0
    result = Path(f"out/a_out.{ext}")
    content = result.read_bytes()
    changed = {"cut off": content[: int(0.9 * len(content))], "empty": b"", "not a PNG": b"\0" * 99}
    content = changed.get(fault, content)
    result.write_bytes(content)
    status, _, err = run("-i", "in", "-o", "out", "--ext", ext)
    assert status == 1
    assert re.match(
        rf"basicsr upscale: in/a.png: {result} is there, but .*({fault}|damaged).*\. Use --overwrite to", err
    )
    assert (result.read_bytes(), files("out")) == (content, [f"a_out.{ext}", f"b_out.{ext}"])
    assert run("-i", "in", "-o", "out", "--ext", ext, "--overwrite")[0] == 0
    assert Image.open(result).size == (70, 60)


def test_a_result_that_another_run_writes_meanwhile_stays(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    original = large_images.enlarge

    def enlarge(*arguments: Any, **options: Any) -> Any:
        yield from original(*arguments, **options)
        put("out/a_out.png", np.zeros((60, 70, 3), np.uint8))

    monkeypatch.setattr(large_images, "enlarge", enlarge)
    status, out, _ = run("-i", put("a.png"), "-o", "out")
    assert (status, "a.png: skipped, out/a_out.png is there" in out) == (0, True)
    assert not np.asarray(Image.open("out/a_out.png")).any()


@pytest.mark.timeout(60)
def test_whatever_is_in_a_folder_is_said_and_the_rest_done(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: Any) -> Any:  # whoever runs this may be root
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    put("in/z.png")
    put(f"in/{'n' * 250}.png")
    os.mkfifo("in/pipe.png")
    Path("in/loop.png").symlink_to("loop.png")
    Path("in/closed").mkdir(), Path("in/sub").mkdir()
    Path("in/sub/closed").mkdir()
    Path("in/sub/back").symlink_to("../../in")
    Path("in/gone").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("in/socket.png")
        for name in ("a.psd", "sub/b.psd", "c.HEIC", "d.avif", ".hidden.psd"):
            Path("in", name).write_bytes(b"")
        status, out, err = run("-i", "in", "-o", "out")
    assert (status, files("out")) == (1, ["z_out.png"])
    lines = [line.removeprefix("basicsr upscale: ") for line in err.splitlines()]
    assert [line for line in lines if "n" * 250 not in line] == [
        "in/closed: cannot be read: Permission denied. Get the permission, or take it out.",
        "in/sub/closed: cannot be read: Permission denied. Get the permission, or take it out.",
        "in/loop.png: cannot be read: Too many levels of symbolic links.",
        "in/pipe.png: a pipe, a socket or a device, not a file. Take it out.",
        "in/socket.png: a pipe, a socket or a device, not a file. Take it out.",
    ]
    assert len(lines) == 6
    assert re.search(r"in/n+.png: out/n+_out.png: cannot be written: File name too long\.", err)
    assert out.splitlines()[-1].startswith("1 done, 0 skipped (there already), 6 failed: ")
    assert out.endswith("; left out: 1 .avif, 1 .heic, 2 .psd, 1 link to a folder, 1 without suffix; results: out\n")


@pytest.mark.parametrize("arguments", [["-i", "n" * 300, "-o", "out"], ["-i", "a.png", "-o", "n" * 300]])
def test_names_that_are_too_long(run: Upscale, arguments: list[str]) -> None:
    put("a.png")
    status, _, err = run(*arguments)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "no such file or folder" in err or "cannot be written to: File name too long" in err


@pytest.mark.parametrize("options", [[], ["--max-memory", "16G"], ["--batch", "2"]])
def test_a_network_that_gives_no_numbers(run: Upscale, weights: Path, options: list[str]) -> None:
    content = torch.load(weights, weights_only=True)
    next(iter(content["params"].values())).fill_(1e38)
    torch.save(content, "broken.pth")
    put("a.png"), put("b.png")
    status, _, err = run("-i", "a.png", "b.png", "-o", "out", *options, model="broken.pth")
    assert status == 1
    assert err.startswith("basicsr upscale: a.png: broken.pth gave values that are not finite (NaN or infinite). Its w")
    assert (len(err.splitlines()), files("out")) == (2, [])


def test_a_failing_file_is_a_line_and_the_rest_is_done(run: Upscale) -> None:
    put("in/a.png"), put("in/z.png")
    Path("in/b.png").write_bytes(Path("in/a.png").read_bytes()[:500])
    Path("in/c.jpg").write_bytes(b"")
    rgba = np.dstack([PHOTOGRAPH, PHOTOGRAPH[..., 0]])
    put("in/d.png", rgba)
    status, out, err = run("-i", "in", "missing.png", "-o", "out", "--ext", "jpg")
    assert status == 1
    lines = err.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"basicsr upscale: in/b.png: damaged \(.*\)\. Replace it\.", lines[0])
    assert lines[1] == "basicsr upscale: in/c.jpg: empty. Replace it."
    assert lines[2].startswith("basicsr upscale: in/d.png: has an alpha channel, which JPEG cannot hold. Use --ext png")
    assert lines[3] == "basicsr upscale: missing.png: cannot be read: No such file or directory."
    last = "2 done, 0 skipped (there already), 4 failed: in/b.png, in/c.jpg, in/d.png, missing.png; results: out\n"
    assert out.endswith(last)
    assert files("out") == ["a_out.jpg", "z_out.jpg"]


def test_names_do_not_steer_the_terminal(run: Upscale) -> None:
    Path("a\x1b[31m.png").write_bytes(b"")
    put("b.png")
    _, out, err = run("-i", "a\x1b[31m.png", "b.png", "-o", "out")
    assert err == "basicsr upscale: a\\x1b[31m.png: empty. Replace it.\n"
    assert "\x1b" not in out + err


def test_a_fault_of_the_network_is_a_line(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    def enlarge(*_: Any, **__: Any) -> Any:
        yield torch.zeros(3, 20, 70)
        raise RuntimeError("the device\nis gone")

    monkeypatch.setattr(large_images, "enlarge", enlarge)
    status, _, err = run("-i", put("a.png"), "-o", "out")
    assert (status, err) == (1, "basicsr upscale: a.png: RuntimeError: the device is gone\n")
    assert files("out") == []


def test_a_disk_that_is_full_is_a_line(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(image_writer.ENCODERS, "png", full)
    status, _, err = run("-i", put("a.png"), put("b.jpg"), "-o", "out")
    assert status == 1
    assert "a.png: out/a_out.png: cannot be written: No space left on device. Nothing of it is left." in err
    assert files("out") == ["b_out.jpg"]


def test_alpha_in_bounded_memory(run: Upscale, weights: Path) -> None:
    image = np.dstack([PHOTOGRAPH, PHOTOGRAPH[..., 0]])
    put("a.png", image)
    assert run("-i", "a.png", "-o", "out", "--max-memory", "16G")[0] == 0
    np.testing.assert_array_equal(np.asarray(Image.open("out/a_out.png")), expected(weights, image))
    assert files("out") == ["a_out.png"]


def test_memory_that_runs_out_is_said(run: Upscale, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Upscaler.__call__

    def call(self: Upscaler, image: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        if image.shape[-2:] == PHOTOGRAPH.shape[:2]:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, image, scale)

    monkeypatch.setattr(Upscaler, "__call__", call)
    status, _, err = run("-i", put("a.png"), "-o", "out")
    assert status == 0
    assert re.match(r"basicsr upscale: Memory ran out for .* 35 x 30 pixels .* in parts, with the same result", err)
    monkeypatch.setattr(Upscaler, "__call__", original)
    found = np.asarray(Image.open("out/a_out.png")).astype(int)
    assert np.abs(found - expected(weights, PHOTOGRAPH)).max() <= 1


def test_remarks_are_said(run: Upscale) -> None:
    Image.fromarray(PHOTOGRAPH).convert("CMYK").save("a.jpg")
    status, _, err = run("-i", "a.jpg", "-o", "out")
    assert status == 0
    assert err.startswith("basicsr upscale: a.jpg: CMYK was converted to sRGB by a plain formula")


@pytest.mark.parametrize("names", [("a.png", "a.jpg"), ("x/a.png", "y/a.png")])
def test_two_results_of_one_name(run: Upscale, names: tuple[str, str]) -> None:
    for name in names:
        put(name)
    status, _, err = run("-i", *names, "-o", "out", "--ext", "png")
    assert status == 1
    assert err.startswith(f"basicsr upscale: {names[1]}: would be written to out/a_out.png, as {names[0]} is. Use")
    assert files("out") == ["a_out.png"]


def test_inputs_named_twice_are_one(run: Upscale) -> None:
    put("a.png")
    status, out, err = run("-i", "a.png", "./a.png", ".", "a.png", "-o", "out")
    assert (status, err) == (0, "")
    assert out.endswith("1 done, 0 skipped (there already), 0 failed; results: out\n")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_inputs_are_never_written_over(run: Upscale, overwrite: list[str]) -> None:
    before = put("a.png").read_bytes()
    status, _, err = run("-i", "a.png", "-o", ".", "--suffix", "", *overwrite)
    assert status == 1
    assert "a.png: would be written over the input a.png. Choose another -o, or a --suffix." in err
    assert Path("a.png").read_bytes() == before


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
@pytest.mark.parametrize(("second", "suffix"), [("scan.png", ""), ("scan_out.png", "out"), ("scan_out.PNG", "out")])
def test_what_may_be_an_original_is_no_result(run: Upscale, second: str, suffix: str, link: Any) -> None:
    """Neither beside the input, nor where a link to it leads."""
    put("in/scan.bmp")
    before = put(f"in/{second}", np.zeros((9, 9, 3), np.uint8)).read_bytes()
    folder = "in" if link is None else "out"
    if link is not None:
        Path(folder).mkdir()
        link(Path("in", second).absolute(), Path(folder, second))
    status, _, err = run("-i", "in", "-o", folder, "--suffix", suffix, "--overwrite")
    if second.endswith("PNG"):  # another file here
        assert (status, Path("in", second).read_bytes()) == (0, before)
        return
    assert (status, Path("in", second).read_bytes()) == (1, before)
    assert f"in/scan.bmp: would be written over the input {folder}/{second}. Choose another -o, or a --suffix." in err


def test_names_that_differ_in_case_alone() -> None:
    """Where the file system ignores the case, the second would be written over the first."""
    tasks = [UpscaleTask(Path(f"in/{name}"), Path(f"out/{name}")) for name in ("A.png", "a.png", "b.png")]
    assert [task.problem for task in batch._without_conflicts(tasks, set(), False, False)] == [None] * 3
    first, second, third = batch._without_conflicts(tasks, set(), False, True)
    assert first.problem is None and third.problem is None
    assert second.problem == "would be written to out/a.png, as in/A.png is. Use another -o for it."


def test_results_beside_inputs_are_no_inputs(run: Upscale) -> None:
    put("in/a.png"), put("in/b.png")
    assert run("-i", "in", "-o", "in")[0] == 0
    status, out, _ = run("-i", "in", "-o", "in")
    assert (status, files("in")) == (0, ["a.png", "a_out.png", "b.png", "b_out.png"])
    assert out.endswith("0 done, 2 skipped (there already), 0 failed; results: in\n")
    assert run("-i", "in", "-o", "in/results")[0] == 0
    assert run("-i", "in", "-o", "in/results")[1].endswith("skipped (there already), 0 failed; results: in/results\n")
    assert not any("results/" in name for name in files("in/results"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "empty", "-o", "out"], "empty: no image found (.png .jpg .jpeg .webp .tif .tiff .bmp; hidden files"),
        (["-i", "no.png", "-o", "out"], "no.png: no such file or folder."),
        (
            ["-i", "a.png", "-o", "out.bmp"],
            "out.bmp: not a format that can be written; allowed: .png .jpg .jpeg .webp .tif",
        ),
        (["-i", "a.png", "a.png", "-o", "b.png"], "Several inputs need a folder: -o FOLDER, not b.png."),
        (["-i", ".", "-o", "b.png"], "Several inputs need a folder: -o FOLDER, not b.png."),
        (["-i", "a.png", "-o", "a.png/out"], "a.png/out: cannot be written to: Not a directory. Choose another -o."),
        (["-i", "a.png", "-o", "out", "--batch", "0"], "--batch 0: give a number of images, from 1 to 10000."),
        (["-i", "a.png", "-o", "out", "--quality", "0"], "--quality 0: give a number from 1 to 100."),
        (["-i", "a.png", "-o", "out", "--suffix", "a/b"], "--suffix a/b: a suffix is a part of a name"),
        (["-i", "a.png", "-o", "out", "-s", "-1"], "The scale is -1; it must be a number above 0."),
        (["-i", "a.png", "-o", "out", "--max-memory", "much"], "The memory 'much' is not known"),
        (["-i", "a.png", "-o", "out", "-g", "99"], "-g 99: PyTorch finds "),
        (["-i", "a.png", "-o", "out", "--window", "8"], "have window 4; only RIB takes another one"),
    ],
)
def test_mistakes_end_it_before_anything_is_done(run: Upscale, arguments: list[str], message: str) -> None:
    put("a.png")
    Path("empty").mkdir()
    status, _, err = run(*arguments)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert files(".") == ["a.png"]


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_a_wrong_checkpoint(run: Upscale, content: bytes | None) -> None:
    put("a.png")
    if content is not None:
        Path("wrong.pth").write_bytes(content)
    status, _, err = run("-i", "a.png", "-o", "out", model="wrong.pth")
    assert status == 2
    assert "wrong.pth" in err
    assert not Path("out").exists()


@pytest.mark.parametrize("number", [2, 3])
def test_pictures_of_one_size_run_together(run: Upscale, weights: Path, monkeypatch: Any, number: int) -> None:
    sizes: list[tuple[int, ...]] = []
    original = Upscaler.__call__

    def call(self: Upscaler, image: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        sizes.append(tuple(image.shape))
        return original(self, image, scale)

    turned = PHOTOGRAPH[::-1].copy()
    for index, image in enumerate((PHOTOGRAPH, turned, PHOTOGRAPH, PHOTOGRAPH[:9], turned)):
        put(f"in/{index}.png", image)
    monkeypatch.setattr(Upscaler, "__call__", call)
    assert run("-i", "in", "-o", "out", "--batch", number)[0] == 0
    monkeypatch.setattr(Upscaler, "__call__", original)
    assert [size[0] for size in sizes if size[0] > 1] == [number]
    for name, image in (("1", turned), ("2", PHOTOGRAPH), ("3", PHOTOGRAPH[:9]), ("4", turned)):
        found = np.asarray(Image.open(f"out/{name}_out.png")).astype(int)
        assert np.abs(found - expected(weights, image)).max() <= 1


def test_how_many_run_together(weights: Path) -> None:
    upscaler = esc_arch.load(weights, device="cpu")
    assert BatchOptions().batch_of(upscaler, 64, 64) == 1
    assert BatchOptions(batch=7).batch_of(upscaler, 64, 64) == 7
    object.__setattr__(upscaler, "device", torch.device("cuda"))
    assert [BatchOptions().batch_of(upscaler, side, side) for side in (64, 256, 1024)] == [16, 4, 1]
    assert BatchOptions(batch.Settings(tile=8), batch=7).batch_of(upscaler, 64, 64) == 1


def test_one_of_a_batch_that_fails(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    def together(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(batch, "enlarge_many", together)
    put("in/a.png"), put("in/b.png")
    assert run("-i", "in", "-o", "out", "--batch", 2)[0] == 0
    assert files("out") == ["a_out.png", "b_out.png"]


def test_videos_among_the_inputs(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    from esc_arch.tools.video import upscaling as video

    seen: list[tuple[Path, Path, Any]] = []

    def upscale_video(upscaler: Upscaler, source: Path, target: Path, *, scale: Any, **options: Any) -> None:
        assert sorted(options) == ["batch", "codec", "crf", "max_memory", "overwrite", "pixel_format", "progress"]
        seen.append((source, target, scale))
        if source.stem == "bad":
            raise esc_arch.UserError(f"{source}: no video.")

    monkeypatch.setattr(video, "upscale_video", upscale_video)
    put("in/a.png")
    for name in ("in/b/film.mp4", "in/bad.MKV", "in/old.avi"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    status, out, err = run("-i", "in", "-o", "out", "--ext", "jpg", "-s", "3")
    assert status == 1
    assert err == "basicsr upscale: in/bad.MKV: no video.\n"
    assert sorted(seen) == [
        (Path("in/b/film.mp4"), Path("out/b/film_out.mp4"), 3.0),
        (Path("in/bad.MKV"), Path("out/bad_out.MKV"), 3.0),
        (Path("in/old.avi"), Path("out/old_out.mkv"), 3.0),
    ]
    assert "in/b/film.mp4 -> out/b/film_out.mp4\n" in out
    assert run("-i", "in/b/film.mp4", "-o", "new.mp4")[0] == 0
    assert seen[-1][:2] == (Path("in/b/film.mp4"), Path("new.mp4"))


def test_gifs_are_videos_unless_they_have_one_frame(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    from esc_arch.tools.video import upscaling as video

    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(video, "upscale_video", lambda _, *files, **__: seen.append(tuple(map(str, files))))
    Path("in").mkdir()
    first, second = (Image.fromarray(each) for each in (PHOTOGRAPH, PHOTOGRAPH[::-1].copy()))
    first.save("in/still.gif")
    first.save("in/moving.gif", save_all=True, append_images=[second])
    Path("in/broken.gif").write_bytes(b"GIF")
    assert run("-i", "in", "-o", "out")[0] == 0
    assert sorted(seen) == [("in/broken.gif", "out/broken_out.mp4"), ("in/moving.gif", "out/moving_out.mp4")]
    assert cv2.imread("out/still_out.png").shape == (60, 70, 3)
    for source in ("in/moving.gif", "a.apng", "in/still.gif"):  # the output says that it is to be a video
        run("-i", source, "-o", "a.webm")
        assert seen[-1] == (source, "a.webm") or source == "a.apng"


def test_ctrl_c_keeps_what_is_finished(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = large_images.enlarge, []

    def enlarge(*arguments: Any, **options: Any) -> Any:
        count.append(1)
        if len(count) == 3:
            yield torch.zeros(3, 20, 70)
            raise KeyboardInterrupt
        yield from original(*arguments, **options)

    monkeypatch.setattr(large_images, "enlarge", enlarge)
    for name in "abcd":
        put(f"in/{name}.png")
    status, _, err = run("-i", "in", "-o", "out")
    assert (status, err) == (130, "basicsr upscale: interrupted.\n")
    assert files("out") == ["a_out.png", "b_out.png"]
    assert Image.open("out/b_out.png").size == (70, 60)


def test_ctrl_c_while_the_last_file_is_waited_for(run: Upscale, monkeypatch: pytest.MonkeyPatch) -> None:
    write, wait, waits = image_writer.ENCODERS["png"], Future.result, []

    def write_slowly(*arguments: Any) -> None:
        write(*arguments)
        time.sleep(0.3)

    def result(future: Any) -> Any:
        if (result := wait(future)) is None:  # of writing, not of reading
            waits.append(future)
            if len(waits) == 1:
                raise KeyboardInterrupt
        return result

    monkeypatch.setitem(image_writer.ENCODERS, "png", write_slowly)
    monkeypatch.setattr(Future, "result", result)
    for name in "abcd":
        put(f"in/{name}.png")
    status, out, err = run("-i", "in", "-o", "out")
    assert (status, err) == (130, "basicsr upscale: interrupted.\n")
    assert files("out") and all(name.endswith("_out.png") for name in files("out"))
    assert all(f"-> out/{name}" in out for name in files("out"))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_ends_the_process(work_folder: Path, weights: Path) -> None:
    for index in range(400):
        put(f"in/{index}.png", PHOTOGRAPH.repeat(4, axis=0).repeat(4, axis=1))
    command = ["upscale", "-i", "in", "-o", "out", "-m", str(weights), "-g", "-1"]
    process = start_forked(work_folder, main, command)
    deadline = time.monotonic() + 100
    while not list(Path("out").glob("*_out.png")) and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    (run,) = finish(work_folder, [process])
    assert (run.status, run.err) == (130, "basicsr upscale: interrupted.\n")
    assert 0 < len(files("out")) < 400
    for name in files("out"):
        Image.open(f"out/{name}").load()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = upscale._Progress(2)
    task = UpscaleTask(Path("a.png"), Path("b.png"))
    report.progress(0.5)
    report.add_done(task, None)
    report.add_failed(task, "a.png: bad")
    report.bar.close()
    out, err = capsys.readouterr()
    assert "-> b.png" not in out
    assert "100%" in err and "2/2" in err
    assert "basicsr upscale: a.png: bad\n" in err
