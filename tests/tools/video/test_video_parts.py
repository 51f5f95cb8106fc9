"""What videos are made of: samples and colours, segments on the disk, stages that run together, choices of formats."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from esc_arch import atomic_io
from esc_arch.errors import UserError
from esc_arch.tools.upscale.stages import WAITING, overlapped
from esc_arch.tools.video import encoding
from esc_arch.tools.video.encoding import (
    choose_codec,
    choose_pixel_format,
    container_format,
    padded_size,
    quality_options,
)
from esc_arch.tools.video.frames import Coding, frame_of, planes_of
from esc_arch.tools.video.segments import Packet, WorkFolder, decoding_times, read_segment, write_segment

av = pytest.importorskip("av", reason="PyAV is not installed")

#: Colours, with black and white, that no two channels have in common.
COLOURS = np.array([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.8, 0.3, 0.45], [0.1, 0.7, 0.9]])


def standard_samples(colour: np.ndarray, weights: tuple[float, float], *, full: bool, depth: int) -> list[float]:
    """Y, Cb, Cr of a colour, as BT.601, BT.709 and BT.2020 write it."""
    red, blue = weights
    luma = red * colour[0] + (1 - red - blue) * colour[1] + blue * colour[2]
    cb, cr = (colour[2] - luma) / (2 * (1 - blue)), (colour[0] - luma) / (2 * (1 - red))
    if full:
        top = 2**depth - 1
        return [top * luma, top * cb + 2 ** (depth - 1), top * cr + 2 ** (depth - 1)]
    step = 2 ** (depth - 8)
    return [(219 * luma + 16) * step, (224 * cb + 128) * step, (224 * cr + 128) * step]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("depth", [8, 10, 16])
@pytest.mark.parametrize(
    ("matrix", "weights"),
    [(1, (0.2126, 0.0722)), (5, (0.299, 0.114)), (6, (0.299, 0.114)), (9, (0.2627, 0.0593))],
)
def test_colours_are_those_of_the_standards(matrix: int, weights: tuple[float, float], depth: int, full: bool) -> None:
    coding = Coding(matrix, full, depth)
    rgb = torch.from_numpy(COLOURS.T[:, :, None]).float()
    expected = np.array([standard_samples(each, weights, full=full, depth=depth) for each in COLOURS]).T[:, :, None]
    samples = coding.from_rgb(rgb)
    assert np.abs(samples.numpy() - expected.clip(0, 2**depth - 1)).max() <= 0.5 + 2**depth * 1e-6
    assert (coding.to_rgb(torch.from_numpy(expected)) - rgb).abs().max() < 1e-5
    # Half a step of luma, and of chroma times at most 1.9 / 2
    assert (coding.to_rgb(samples) - rgb).abs().max() < 1.5 / (219 * 2 ** (depth - 8))


def test_ycgco_and_rgb() -> None:
    rgb = torch.tensor([0.8, 0.4, 0.2]).view(3, 1, 1)
    assert Coding(8, True, 8).from_rgb(rgb).flatten().tolist() == [round(255 * 0.45), 128 - 13, 128 + 76]
    assert Coding(0, True, 8).from_rgb(rgb).flatten().tolist() == [204, 102, 51]
    assert Coding(0, False, 8).from_rgb(rgb).flatten().tolist() == [191, 104, 60]
    assert torch.allclose(
        Coding(0, False, 8).to_rgb(torch.tensor([235, 16, 16]).view(3, 1, 1)).flatten(), rgb.new_tensor([1, 0, 0])
    )


FORMATS = [
    *("yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p12le", "yuv420p16le"),
    *("nv12", "nv21", "p010le", "p210le", "yuyv422", "uyvy422", "yuva444p10le", "yuva420p", "yuv410p", "yuv411p"),
    *("rgb24", "bgr24", "bgra", "bgr0", "gbrp", "gbrp10le", "rgb48le", "rgb48be", "x2rgb10le", "yuv420p9le"),
]


@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("pixel_format", FORMATS)
def test_a_plain_colour_keeps_its_samples_in_every_pixel_format(pixel_format: str, color_range: int) -> None:
    like = av.VideoFrame(34, 22, pixel_format)
    like.colorspace, like.color_range = 1, color_range
    coding = Coding.of(like)
    samples = coding.from_rgb(torch.tensor([0.8, 0.3, 0.45]).view(3, 1, 1).expand(3, 22, 34)).numpy()
    frame = frame_of(samples, coding, pixel_format, 22, 34)
    assert (frame.format.name, frame.height, frame.width) == (pixel_format, 22, 34)
    found = planes_of(frame, coding, 22, 34)
    assert found.dtype == (np.uint8 if coding.depth == 8 else np.uint16)
    np.testing.assert_array_equal(found, samples)


@pytest.mark.parametrize("pixel_format", ["gray", "gray10le"])
@pytest.mark.parametrize(("color_range", "white"), [(0, 235), (1, 235), (2, 255)])
def test_grey_is_of_the_range_that_it_says(pixel_format: str, color_range: int, white: int) -> None:
    frame = av.VideoFrame(32, 24, pixel_format)
    depth = 10 if "10" in pixel_format else 8
    rows = np.frombuffer(frame.planes[0], np.uint8 if depth == 8 else np.uint16)
    rows[:] = (white + 1) * 2 ** (depth - 8) - 1 if white == 255 else white * 2 ** (depth - 8)
    frame.color_range = color_range
    coding = Coding.of(frame)
    rgb = coding.to_rgb(torch.from_numpy(planes_of(frame, coding, 24, 32).astype(np.int32)))
    assert (rgb - 1).abs().max() < 1e-6


def test_other_formats_are_read() -> None:
    for name, depth in (("pal8", 8), ("monow", 8), ("rgb565le", 8), ("gbrpf32le", 16), ("xyz12le", 12), ("ya8", 8)):
        frame = av.VideoFrame(32, 24, name)
        for plane in frame.planes:
            np.frombuffer(plane, np.uint8)[:] = 0
        coding = Coding.of(frame)
        assert coding.depth == depth
        assert planes_of(frame, coding, 24, 32).shape == (3, 24, 32)


@pytest.mark.parametrize(("size", "matrix"), [((576, 720), 6), ((720, 1280), 1), ((578, 720), 1), ((100, 1280), 1)])
def test_what_a_frame_does_not_say_is_guessed_as_players_do(size: tuple[int, int], matrix: int) -> None:
    assert Coding.of(av.VideoFrame(size[1], size[0], "yuv420p")) == Coding(matrix, False, 8)


def test_an_unknown_matrix_is_named() -> None:
    frame = av.VideoFrame(32, 24, "yuv420p10le")
    frame.colorspace = 14
    with pytest.raises(UserError, match=r"its colours are coded with matrix 14 of ITU-T H\.273, .*zscale"):
        Coding.of(frame)


def test_odd_sizes_get_the_last_row_and_column_again() -> None:
    samples = np.random.default_rng(0).integers(0, 256, (3, 21, 33), np.uint8)
    coding = Coding(1, False, 8)
    frame = frame_of(samples, coding, "yuv444p", 22, 34)
    found = planes_of(frame, coding, 22, 34)
    np.testing.assert_array_equal(found[:, :21, :33], samples)
    np.testing.assert_array_equal(found[:, 21, :33], samples[:, 20])
    np.testing.assert_array_equal(found[:, :21, 33], samples[:, :, 32])


@pytest.mark.parametrize(
    ("pixel_format", "padded"),
    [("yuv420p", (22, 34)), ("yuv422p10le", (21, 34)), ("yuv444p", (21, 33)), ("gbrp", (21, 33))],
)
def test_sizes_that_formats_ask_for(pixel_format: str, padded: tuple[int, int]) -> None:
    assert padded_size((21, 33), pixel_format) == padded
    assert padded_size((22, 34), pixel_format) == (22, 34)


@pytest.mark.parametrize(
    ("codec", "source", "chosen"),
    [
        ("libx264", "yuv420p", "yuv420p"),
        ("libx264", "yuvj420p", "yuv420p"),
        ("libx264", "nv12", "yuv420p"),
        ("libx264", "p010le", "yuv420p10le"),
        ("libx264", "yuv420p12le", "yuv420p10le"),
        ("libx264", "yuv422p", "yuv422p"),
        ("libx264", "yuva444p10le", "yuv444p10le"),
        ("libx264", "yuv410p", "yuv420p"),
        ("libx264", "gray", "yuv420p"),
        ("libx264", "gray10le", "yuv420p10le"),
        ("libx264", "rgb24", "yuv444p"),
        ("libx264", "bgra", "yuv420p"),
        ("ffv1", "bgra", "bgr0"),
        ("libsvtav1", "yuv444p10le", "yuv420p10le"),
        ("ffv1", "yuv444p12le", "yuv444p12le"),
        ("ffv1", "bgr24", "bgr0"),
        ("ffv1", "rgb48le", "rgb48le"),
        ("prores_ks", "yuv420p", "yuv422p10le"),
    ],
)
def test_the_pixel_format_is_the_nearest_that_the_encoder_has(codec: str, source: str, chosen: str) -> None:
    assert choose_pixel_format("auto", choose_codec(codec, Path("a.mkv")), av.VideoFormat(source)) == chosen


def test_choices_that_cannot_be_had() -> None:
    source = av.VideoFormat("yuv420p")
    with pytest.raises(UserError, match=r"pixel_format: 'yuv4' given; with libx264 it must be auto, .*yuv420p10le"):
        choose_pixel_format("yuv4", "libx264", source)
    with pytest.raises(UserError, match=r"codec: gif takes no pixel format"):
        choose_pixel_format("auto", "gif", source)
    with pytest.raises(UserError, match=r"codec: 'x264' is no video encoder of this FFmpeg; it has, .*libx264"):
        choose_codec("x264", Path("a.mp4"))
    with pytest.raises(UserError, match=r"'aac' is no video encoder"):
        choose_codec("aac", Path("a.mp4"))
    with pytest.raises(UserError, match=r"a\.avi: videos are written as \.mp4, \.m4v, \.mov, \.mkv, \.webm"):
        container_format(Path("a.avi"))
    with pytest.raises(UserError, match=r"crf: 52 given; for libx264 it must be from 0 \(best\) to 51"):
        quality_options("libx264", 52)
    with pytest.raises(UserError, match=r"crf: 20 given, but the encoder ffv1 takes none"):
        quality_options("ffv1", 20)
    assert quality_options("libx264", 18.5) == {"crf": "18.5"}
    assert quality_options("ffv1", None) == {}


def test_without_any_of_the_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_is_encoder", lambda name: name == "libsvtav1")
    assert choose_codec("auto", Path("a.mp4")) == "libsvtav1"
    monkeypatch.setattr(encoding, "_is_encoder", lambda name: False)
    with pytest.raises(UserError, match=r"a\.webm: this FFmpeg has none of the encoders libvpx-vp9, libsvtav1"):
        choose_codec("auto", Path("a.webm"))


def reordered(times: list[int], pattern: list[int]) -> list[int]:
    """Groups of frames in another order of decoding."""
    size = len(pattern)
    return [times[start + index] for start in range(0, len(times), size) for index in pattern]


@pytest.mark.parametrize("pattern", [[0], [0, 2, 1], [0, 4, 2, 1, 3], [3, 1, 0, 2]])
def test_decoding_times_grow_and_come_before_showing(pattern: list[int]) -> None:
    gaps = np.random.default_rng(0).integers(1, 100, 60)
    shown = reordered(np.cumsum(gaps).tolist(), pattern)
    times = decoding_times(shown)
    assert all(before < after for before, after in pairwise(times))
    assert all(decoded <= time for decoded, time in zip(times, shown, strict=True))
    if pattern == [0]:
        assert times == shown


def test_decoding_times_of_one_frame() -> None:
    assert decoding_times([7]) == [7]
    assert decoding_times([]) == []


def packets(*times: int) -> list[Packet]:
    return [Packet(time, 3, time == times[0], bytes([time] * 5)) for time in times]


def test_a_segment_survives_the_disk_or_is_known_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.segment"
    write_segment(path, packets(1, 2, 10))
    assert read_segment(path) == packets(1, 2, 10)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", whole[:70] + b"x" + whole[71:]):
        path.write_bytes(damaged)
        assert read_segment(path) is None


def test_a_work_folder_keeps_whole_segments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, settings = tmp_path / "a.mp4", {"codec": "one", "numbers": "1, 2"}
    with WorkFolder.opened(target, settings, 2) as folder:
        for times in ((1, 2), (3, 4), (5, 6)):
            folder.add(packets(*times))
    with WorkFolder.opened(target, settings, 99) as folder:
        assert (folder.shown, folder.length) == ([1, 2, 3, 4, 5, 6], 2)
        assert list(folder.packets()) == [*packets(1, 2), *packets(3, 4), *packets(5, 6)]
    assert not caplog.messages
    second = folder.path / "000001.segment"
    second.write_bytes(second.read_bytes()[:-3])
    with WorkFolder.opened(target, settings, 2) as folder:
        assert folder.shown == [1, 2]
    assert "000001.segment is damaged: its frames, and those behind, are made again." in caplog.text
    assert sorted(path.name for path in folder.path.iterdir()) == ["000000.segment", "lock", "manifest.json"]
    with WorkFolder.opened(target, settings | {"codec": "two"}, 7) as folder:
        assert (folder.shown, folder.length) == ([], 7)
    assert f"{target}: an earlier run had another codec; starting over." in caplog.text
    (folder.path / "manifest.json").write_text("{")
    with WorkFolder.opened(target, settings, 2) as folder:
        assert (folder.shown, folder.length) == ([], 2)


def test_a_segment_that_is_damaged_later_is_named(tmp_path: Path) -> None:
    with WorkFolder.opened(tmp_path / "a.mp4", {"codec": "one"}, 2) as folder:
        folder.add(packets(1, 2))
        (folder.path / "000000.segment").write_bytes(b"")
        with pytest.raises(UserError, match=r"000000\.segment is damaged: the disk may be"):
            list(folder.packets())


def test_what_others_put_into_a_work_folder_stays(tmp_path: Path) -> None:
    work, precious = tmp_path / ".a.mp4.partial", tmp_path / "precious"
    precious.write_bytes(b"precious")
    (work / "films").mkdir(parents=True)
    (work / "notes.txt").write_text("notes")
    (work / "joined.mp4").symlink_to(precious)
    (work / "000007.segment").symlink_to(precious)
    os.mkfifo(work / "manifest.json")
    with WorkFolder.opened(tmp_path / "a.mp4", {"codec": "one"}, 2) as folder:
        folder.add(packets(1, 2))
        folder.remove()
    assert sorted(path.name for path in work.iterdir()) == ["films", "notes.txt"]
    assert precious.read_bytes() == b"precious"
    shutil.rmtree(work)
    precious.rename(work)
    with pytest.raises(UserError, match=r"\.a\.mp4\.partial is in the way: it must be a folder of yours"):
        WorkFolder.opened(tmp_path / "a.mp4", {}, 2).__enter__()
    work.unlink()
    work.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is in the way"):
        WorkFolder.opened(tmp_path / "a.mp4", {}, 2).__enter__()


@pytest.mark.parametrize("text", ["[]", '{"codec": "one"}', '{"codec": "one", "segment": 0}', "[" * 100_000, "\xff"])
def test_a_manifest_without_sense_is_none(tmp_path: Path, text: str) -> None:
    with WorkFolder.opened(tmp_path / "a.mp4", {"codec": "one"}, 2) as folder:
        folder.add(packets(1, 2))
        (folder.path / "manifest.json").write_text(text)
    with WorkFolder.opened(tmp_path / "a.mp4", {"codec": "one"}, 3) as folder:
        assert (folder.shown, folder.length) == ([], 3)


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.mp4"
    with (
        WorkFolder.opened(target, {}, 2),
        pytest.raises(UserError, match=r"Another process is writing .*a\.mp4"),
        WorkFolder.opened(target, {}, 2),
    ):
        pass
    with WorkFolder.opened(target, {}, 2) as folder:
        lock = open(folder.path / "lock", "rb")  # noqa: SIM115  of a process that is about to lock it
        folder.remove()
    monkeypatch.setattr(atomic_io, "open_regular", lambda *_, **__: lock)
    with pytest.raises(UserError, match=r"Another process has just finished with .*Run the command again\."):
        WorkFolder.opened(target, {}, 2).__enter__()


def test_stages_run_at_the_same_time() -> None:
    """The first result is not written before the third item has been read, and the second not computed before both."""
    third_read, first_written = threading.Event(), threading.Event()
    waited: list[bool] = []
    written: list[int] = []

    def items() -> Iterable[int]:
        for index in range(4):
            if index == 2:
                third_read.set()
            yield index

    def compute(item: int) -> int:
        if item == 1:
            waited.append(first_written.wait(20))
        return item * 10

    def write(result: int) -> None:
        if result == 0:
            waited.append(third_read.wait(20))
            first_written.set()
        written.append(result)

    overlapped(items(), compute, write)
    assert written == [0, 10, 20, 30]
    assert waited == [True, True]


@pytest.mark.parametrize("stage", ["read", "compute", "write", "the last write", "interrupt"])
def test_a_failure_of_any_stage_ends_all(stage: str) -> None:
    failing = 999 if stage == "the last write" else 5

    def fail(here: str, item: int) -> None:
        if item == failing and here in stage:
            raise ValueError(stage)

    def items() -> Iterable[int]:
        for index in range(1000):
            fail("read", index)
            yield index

    def compute(item: int) -> int:
        fail("compute", item)
        if item == failing and stage == "interrupt":
            raise KeyboardInterrupt(stage)
        return item

    before = threading.active_count()
    with pytest.raises((ValueError, KeyboardInterrupt), match=stage):
        overlapped(items(), compute, lambda result: fail("write", result))
    assert threading.active_count() == before


def test_few_items_wait() -> None:
    """A slow stage holds the others up, or memory would fill."""
    read: list[int] = []
    written: list[int] = []
    most = 0

    def items() -> Iterable[int]:
        for index in range(50):
            read.append(index)
            yield index

    def write(result: int) -> None:
        nonlocal most
        most = max(most, len(read) - len(written))
        written.append(result)
        threading.Event().wait(0.002)

    overlapped(items(), lambda item: item, write)
    assert written == read == list(range(50))
    assert most <= 2 * (WAITING + 2)
