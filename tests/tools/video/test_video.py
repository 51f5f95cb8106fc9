"""Videos from end to end: frames, colours, times, all that goes with them, interruptions, and what can be wrong."""

from __future__ import annotations

import builtins
import errno
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NETWORK
from networks import needs_cuda, randomise
from torch import Tensor

from esc_arch.checkpoints.conversion import build_network
from esc_arch.errors import UserError
from esc_arch.tools.upscale import Upscaler
from esc_arch.tools.video import segments
from esc_arch.tools.video import upscaling as video
from esc_arch.tools.video.frames import side_data_of
from esc_arch.tools.video.upscaling import upscale_video

av = pytest.importorskip("av", reason="PyAV is not installed")

HEIGHT, WIDTH = 24, 32
TICK = Fraction(1, 12800)
#: A frame at 25 per second.
STEP = 512


@pytest.fixture(scope="module")
def upscaler() -> Upscaler:
    """A tiny network whose output is the picture, and a little that depends on all of the weights."""
    net = build_network(NETWORK)
    randomise(net)
    with torch.no_grad():
        net.to_img.weight *= 0.01
        net.to_img.bias *= 0.01
    return Upscaler(net.eval().requires_grad_(False), NETWORK, Path("tiny.pth"), torch.device("cpu"))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="esc_arch"):
        yield caplog


def picture(index: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A part of a photograph, which moves with the index: (H, W, 3), uint8."""
    from skimage.data import astronaut

    return np.ascontiguousarray(
        astronaut()[30 + 2 * index : 30 + 2 * index + height, 200 + index : 200 + index + width]
    )


def write_clip(
    path: Path,
    *,
    count: int = 6,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    times: Sequence[int] | None = None,
    matrix: int = 1,
    color_range: int = 1,
    options: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    beside: Callable[[Any], Callable[[], None]] | None = None,
    file_format: str | None = None,
    alpha: int = 255,
) -> Path:
    """A video of `picture`s.

    Args:
        times: of the frames, in units of `TICK`.
        prepare: may change the stream before anything is written.
        beside: adds streams to the container, and returns what writes them.
    """
    options = {"crf": "4", "bf": "2"} if codec == "libx264" and options is None else options
    with av.open(str(path), "w", format=file_format) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt, context.time_base = size[1], size[0], pixel_format, TICK
        context.colorspace, context.color_range = matrix, color_range
        context.color_primaries = context.color_trc = 1
        prepare(stream)
        write_others = beside(container) if beside is not None else None
        for index, time in enumerate([STEP * index for index in range(count)] if times is None else times):
            pixels = np.dstack([picture(index, *size), np.full(size, alpha, np.uint8)])
            frame = av.VideoFrame.from_ndarray(pixels, "rgba").reformat(
                format=pixel_format, dst_colorspace={1: 1, 6: 5}.get(matrix, matrix), dst_color_range=color_range
            )
            frame.pts, frame.time_base = time, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if write_others is not None:
            write_others()
    return path


def sine(
    container: Any, *, language: str = "eng", codec: str = "aac", seconds: float = 0.25, start: int = 0
) -> Callable[[], None]:
    stream = container.add_stream(codec, rate=48000)
    stream.metadata["language"] = language

    def write() -> None:
        tone = np.sin(np.arange(round(48000 * seconds)) / 20).astype(np.float32)
        for begin in range(0, len(tone) - 1023, 1024):
            frame = av.AudioFrame.from_ndarray(np.stack([tone[begin : begin + 1024]] * 2), "fltp", "stereo")
            frame.sample_rate, frame.pts = 48000, start + begin
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    return write


def frames_of(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def times_of(path: Path) -> list[Fraction]:
    return [frame.pts * frame.time_base for frame in frames_of(path)]


def packets_of(path: Path, index: int) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as container:
        packets = container.demux(container.streams[index])
        return [((packet.pts or 0) * packet.time_base, bytes(packet)) for packet in packets if packet.size]


def samples(frame: Any) -> np.ndarray:
    """(3, H, W) of a planar frame with full chroma."""
    kind = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
    rows = [np.frombuffer(plane, kind).reshape(frame.height, -1)[:, : frame.width] for plane in frame.planes]
    return np.stack(rows)


def by_formula(upscaler: Upscaler, frame: Any, weights: tuple[float, float], *, full: bool, bits: int) -> np.ndarray:
    """The enlarged samples of a frame with full chroma, in float64 but for the network."""
    red, blue = weights
    step, top = 2 ** (bits - 8), 2**bits - 1
    zero = np.array([0 if full else 16 * step, 128 * step, 128 * step]).reshape(3, 1, 1)
    gain = np.array([top] * 3 if full else [219 * step, 224 * step, 224 * step]).reshape(3, 1, 1)
    y, cb, cr = (samples(frame).astype(float) - zero) / gain
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    image = torch.from_numpy(np.stack([r, g, b]).clip(0, 1)).float()[None]
    r, g, b = upscaler(image)[0].double().clamp(0, 1).numpy()
    y = red * r + (1 - red - blue) * g + blue * b
    out = np.stack([y, (b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))]) * gain + zero
    return out.round().clip(0, top)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9)))


@pytest.mark.parametrize(
    ("pixel_format", "matrix", "color_range", "weights", "bits"),
    [
        ("yuv444p", 6, 1, (0.299, 0.114), 8),
        ("yuv444p", 1, 2, (0.2126, 0.0722), 8),
        ("yuv444p10le", 9, 1, (0.2627, 0.0593), 10),
        ("yuv444p12le", 1, 2, (0.2126, 0.0722), 12),
    ],
)
def test_frames_are_those_of_the_network(
    upscaler: Upscaler,
    tmp_path: Path,
    pixel_format: str,
    matrix: int,
    color_range: int,
    weights: tuple[float, float],
    bits: int,
) -> None:
    source = write_clip(
        tmp_path / "in.mkv", codec="ffv1", pixel_format=pixel_format, matrix=matrix, color_range=color_range
    )
    upscale_video(upscaler, source, tmp_path / "out.mkv", codec="ffv1")
    before, after = frames_of(source), frames_of(tmp_path / "out.mkv")
    assert len(before) == len(after) == 6
    for old, new in zip(before, after, strict=True):
        assert (new.height, new.width, new.format.name) == (2 * HEIGHT, 2 * WIDTH, pixel_format)
        assert (new.colorspace, new.color_range, new.color_primaries, new.color_trc) == (matrix, color_range, 1, 1)
        expected = by_formula(upscaler, old, weights, full=color_range == 2, bits=bits)
        difference = np.abs(samples(new) - expected)
        assert difference.max() <= 1
        assert difference.mean() < 0.01  # rounding to the other side, here and there


@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("matrix", [1, 6])
def test_ordinary_videos_keep_their_colours(upscaler: Upscaler, tmp_path: Path, matrix: int, color_range: int) -> None:
    """4:2:0, against FFmpeg's own conversion to RGB on both sides."""
    source = write_clip(tmp_path / "in.mp4", matrix=matrix, color_range=color_range)
    upscale_video(upscaler, source, tmp_path / "out.mp4", crf=1)
    ranges = {"src_color_range": color_range, "dst_color_range": 2}
    for old, new in zip(frames_of(source), frames_of(tmp_path / "out.mp4"), strict=True):
        assert (new.format.name.replace("yuvj", "yuv"), new.colorspace, new.color_range) == (
            "yuv420p",
            matrix,
            color_range,
        )
        image = torch.from_numpy(old.to_ndarray(format="rgb24", **ranges)).permute(2, 0, 1)[None] / 255
        expected = (upscaler(image)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        found = new.to_ndarray(format="rgb24", **ranges)
        assert psnr(found, expected) > 34  # of which most is chroma, stored at half the size
        assert np.abs(found.mean((0, 1)) - expected.mean((0, 1))).max() < 1


def test_ten_bits_are_not_cut_to_eight(upscaler: Upscaler, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", codec="ffv1", pixel_format="yuv420p10le")
    upscale_video(upscaler, source, tmp_path / "out.mp4", crf=0)
    (frame, *_) = frames_of(tmp_path / "out.mp4")
    assert frame.format.name == "yuv420p10le"
    luma = np.frombuffer(frame.planes[0], np.uint16)
    assert len(np.unique(luma % 4)) == 4


def test_a_matrix_that_is_not_said_is_said_of_the_result(upscaler: Upscaler, tmp_path: Path) -> None:
    """Players take BT.601 for small videos and BT.709 for large ones, and enlarging makes one of the other."""
    source = write_clip(tmp_path / "in.mp4", matrix=2, color_range=0)
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    (frame, *_) = frames_of(tmp_path / "out.mp4")
    assert (frame.colorspace, frame.color_range) == (6, 1)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_times_of_a_variable_rate_are_kept(upscaler: Upscaler, tmp_path: Path, suffix: str) -> None:
    """With frames that are decoded in another order than shown, and a beginning after 0."""
    gaps = np.random.default_rng(0).integers(100, 900, 30)
    times = (3840 + np.cumsum(gaps) - gaps[0]).tolist()  # what writes the source stores the first in milliseconds
    source = write_clip(tmp_path / "in.mp4", times=times)
    target = tmp_path / f"out{suffix}"
    upscale_video(upscaler, source, target)
    before, after = times_of(source), times_of(target)
    assert before == [time * TICK for time in times]
    if suffix == ".mkv":  # whole milliseconds are all that it has
        assert max(abs(a - b) for a, b in zip(before, after, strict=True)) <= Fraction(1, 2000)
    else:
        assert after == before
    with av.open(str(source)) as old, av.open(str(target)) as new:
        if suffix != ".mkv":
            assert new.streams.video[0].time_base == old.streams.video[0].time_base
            assert new.streams.video[0].frames == 30
            # The last frame's own duration differs by the order of decoding
            assert abs(new.streams.video[0].duration - old.streams.video[0].duration) < max(gaps)
        decoded = [packet.dts for packet in new.demux(video=0) if packet.size and packet.dts is not None]
    assert decoded == sorted(set(decoded))
    shown = [time for time, _ in packets_of(target, 0)]
    assert shown != sorted(shown)  # B-frames


def test_sound_subtitles_chapters_and_metadata_are_copied(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    def beside(container: Any) -> Callable[[], None]:
        writers = [sine(container, language="deu"), sine(container, language="fra", codec="libopus")]
        subtitles = container.add_mux_stream("subrip")
        subtitles.metadata["language"] = "ita"
        container.add_attachment("font.ttf", "font/ttf", b"a font")
        container.metadata["title"] = "A title"
        second = Fraction(1, 1000)
        container.set_chapters(
            [{"id": 1, "start": 0, "end": 100, "time_base": second, "metadata": {"title": "First"}},
             {"id": 2, "start": 100, "end": 240, "time_base": second, "metadata": {"title": "Second"}}]
        )  # fmt: skip

        def write() -> None:
            for each in writers:
                each()
            packet = av.Packet(b"Ciao")
            packet.stream, packet.time_base, packet.pts, packet.dts, packet.duration = subtitles, second, 40, 40, 100
            container.mux(packet)

        return write

    source = write_clip(tmp_path / "in.mkv", beside=beside)
    target = tmp_path / "out.mkv"
    upscale_video(upscaler, source, target)
    with av.open(str(source)) as old, av.open(str(target)) as new:
        assert [stream.type for stream in new.streams] == ["video", "audio", "audio", "subtitle", "attachment"]
        assert [stream.language for stream in new.streams][1:4] == ["deu", "fra", "ita"]
        assert new.metadata["title"] == "A title"
        assert new.streams[4].data == b"a font"
        assert new.streams[4].metadata["filename"] == "font.ttf"
        for before, after in zip(old.chapters(), new.chapters(), strict=True):
            assert before["metadata"] == after["metadata"]
            for edge in ("start", "end"):
                assert before[edge] * before["time_base"] == after[edge] * after["time_base"]
    for index in (1, 2, 3):
        assert packets_of(source, index) == packets_of(target, index)
        assert packets_of(source, index)
    assert not log.messages


def test_what_a_container_does_not_hold_is_left_out_with_a_warning(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    source = write_clip(tmp_path / "in.mp4", beside=sine)
    target = tmp_path / "out.webm"
    upscale_video(upscaler, source, target)
    with av.open(str(target)) as new:
        assert [stream.type for stream in new.streams] == ["video"]
        assert new.streams[0].codec_context.codec.canonical_name == "vp9"
    assert len(frames_of(target)) == 6
    assert f"{target}: stream 1 (audio, aac, eng) is left out, since .webm does not hold it" in log.text


def test_sound_starts_with_the_picture(upscaler: Upscaler, tmp_path: Path) -> None:
    """AAC begins before 0: neither its packets nor the frames are moved, whichever the container."""
    source = write_clip(tmp_path / "in.mp4", beside=sine)
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    assert packets_of(tmp_path / "out.mp4", 1) == packets_of(source, 1)
    upscale_video(upscaler, source, tmp_path / "out.mkv")
    assert times_of(tmp_path / "out.mkv") == times_of(source)


def test_a_cover_is_copied(upscaler: Upscaler, tmp_path: Path) -> None:
    def beside(container: Any) -> Callable[[], None]:
        cover = container.add_stream("mjpeg", width=16, height=16, pix_fmt="yuvj420p", rate=1)
        cover.disposition = av.stream.Disposition.attached_pic

        def write() -> None:
            frame = av.VideoFrame.from_ndarray(picture(0, 16, 16), "rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = 0, Fraction(1)
            for packet in [*cover.encode(frame), *cover.encode(None)]:
                container.mux(packet)

        return write

    source = write_clip(tmp_path / "in.mp4", beside=beside)
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as new:
        video_stream, cover = new.streams.video
        assert (video_stream.width, cover.width) == (2 * WIDTH, 16)
        assert cover.disposition & av.stream.Disposition.attached_pic
    assert packets_of(tmp_path / "out.mp4", 1)[0][1] == packets_of(source, 1)[0][1]


def test_a_further_video_is_copied_as_it_is(upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    def beside(container: Any) -> Callable[[], None]:
        other = container.add_stream("libx264", width=16, height=16, rate=25)

        def write() -> None:
            frame = av.VideoFrame.from_ndarray(picture(0, 16, 16), "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = 0, Fraction(1, 25)
            container.mux([*other.encode(frame), *other.encode(None)])

        return write

    source = write_clip(tmp_path / "in.mp4", beside=beside)
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    assert packets_of(tmp_path / "out.mp4", 1) == packets_of(source, 1)
    assert "stream 1 is a further video, which is copied as it is." in log.text


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_players_turn_the_result_as_the_source(upscaler: Upscaler, tmp_path: Path, degrees: int) -> None:
    source = write_clip(tmp_path / "in.mp4", prepare=lambda stream: stream.set_display_rotation(degrees, hflip=True))
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    (before, *_), (after, *_) = frames_of(source), frames_of(tmp_path / "out.mp4")
    assert before.rotation == after.rotation
    assert before.side_data
    first, second = ([bytes(data)[:24] for data in side_data_of(frame)] for frame in (before, after))
    assert first == second
    assert (after.height, after.width) == (2 * HEIGHT, 2 * WIDTH)


def test_the_shape_of_pixels_is_kept(upscaler: Upscaler, tmp_path: Path) -> None:
    def prepare(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)

    source = write_clip(tmp_path / "in.mp4", prepare=prepare)
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as new:
        assert new.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


def test_other_scales_are_resized_and_odd_sizes_filled(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    source = write_clip(tmp_path / "in.mp4", size=(26, 34))
    upscale_video(upscaler, source, tmp_path / "out.mp4", scale=1.5, crf=1)
    before, after = frames_of(source)[0], frames_of(tmp_path / "out.mp4")[0]
    assert (after.height, after.width) == (40, 52)
    assert "yuv420p has no odd sizes; the last row or column is repeated: 51 x 39 becomes 52 x 40." in log.text
    expected = before.reformat(width=52, height=40, format="rgb24", interpolation="BICUBIC").to_ndarray()
    assert psnr(after.to_ndarray(format="rgb24"), expected) > 24


def test_interlaced_video_and_alpha_are_warned_of(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    source = write_clip(tmp_path / "in.mp4", size=(32, 32), options={"x264-params": "interlaced=1:tff=1", "crf": "4"})
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    message = f"{source}: it is interlaced, and enlarged as if it were not. Deinterlace it first (ffmpeg -vf bwdif)."
    assert log.messages.count(message) == 1
    source = write_clip(tmp_path / "alpha.mov", codec="prores_ks", pixel_format="yuva444p10le", alpha=127)
    upscale_video(upscaler, source, tmp_path / "opaque.mov", codec="prores_ks")
    assert log.messages.count(f"{source}: its alpha is left out.") == 1
    assert frames_of(tmp_path / "opaque.mov")[0].format.name.startswith("yuv444p1")


def test_gifs(upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """Their delays are kept, of what they do not show nothing is said, and the result is one that all players show."""
    from PIL import Image

    source, delays = tmp_path / "a.gif", [100, 50, 200, 300]
    first, *others = [Image.fromarray(picture(index)) for index in range(4)]
    first.save(source, save_all=True, append_images=others, duration=delays)
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    assert times_of(tmp_path / "out.mp4") == [Fraction(sum(delays[:index]), 1000) for index in range(4)]
    assert frames_of(tmp_path / "out.mp4")[0].format.name == "yuv420p"
    assert not log.messages


def test_grey_and_rgb(upscaler: Upscaler, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "grey.mkv", codec="ffv1", pixel_format="gray", color_range=2)
    upscale_video(upscaler, source, tmp_path / "out.mp4", crf=1)
    (old, *_), (new, *_) = frames_of(source), frames_of(tmp_path / "out.mp4")
    image = torch.from_numpy(old.to_ndarray()).expand(1, 3, -1, -1) / 255
    expected = (upscaler(image)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    full = {"src_color_range": new.color_range, "dst_color_range": 2}
    assert psnr(new.to_ndarray(format="rgb24", **full), expected) > 30
    source = write_clip(tmp_path / "rgb.mkv", codec="ffv1", pixel_format="bgr0", matrix=0, color_range=2)
    upscale_video(upscaler, source, tmp_path / "rgb_out.mkv", codec="ffv1")
    (old, *_), (new, *_) = frames_of(source), frames_of(tmp_path / "rgb_out.mkv")
    image = torch.from_numpy(old.to_ndarray(format="rgb24")).permute(2, 0, 1)[None] / 255
    expected = (upscaler(image)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert new.format.name == "bgr0"
    assert np.abs(new.to_ndarray(format="rgb24") - expected).max() <= 1


def test_a_broadcast_begins_at_0(upscaler: Upscaler, tmp_path: Path) -> None:
    """The clock of a transport stream begins anywhere; sound and picture keep their distance."""

    def beside(container: Any) -> Callable[[], None]:
        return sine(container, codec="mp2", start=10 * 3600 * 48000)

    late = [STEP * index + 10 * 3600 * 12800 for index in range(6)]
    source = write_clip(tmp_path / "in.ts", file_format="mpegts", times=late, beside=beside)
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    before, after = times_of(source), times_of(tmp_path / "out.mp4")
    with av.open(str(source)) as container:
        origin = Fraction(container.start_time, 1_000_000)
    assert origin > 1
    tick = Fraction(1, 90000)
    assert all(abs(a - origin - b) <= tick for a, b in zip(before, after, strict=True))
    shifted = [time - origin for time, _ in packets_of(source, 1)]
    assert all(abs(a - b[0]) <= tick for a, b in zip(shifted, packets_of(tmp_path / "out.mp4", 1), strict=True))


def test_a_bare_stream_gets_times_from_its_rate(upscaler: Upscaler, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.h264", file_format="h264", options={"crf": "4", "bf": "0"})
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    assert times_of(tmp_path / "out.mp4") == [Fraction(index, 25) for index in range(6)]


def test_hevc_is_marked_for_apple(upscaler: Upscaler, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", size=(32, 32))
    upscale_video(upscaler, source, tmp_path / "out.mp4", codec="libx265")
    with av.open(str(tmp_path / "out.mp4")) as new:
        assert new.streams.video[0].codec_context.codec_tag == "hvc1"
    assert len(frames_of(tmp_path / "out.mp4")) == 6


@pytest.mark.parametrize("codec", ["libsvtav1", "libvpx-vp9", "prores_ks", "libx264rgb"])
def test_other_encoders(upscaler: Upscaler, tmp_path: Path, codec: str) -> None:
    target = tmp_path / ("out.mov" if codec == "prores_ks" else "out.mkv")
    source = write_clip(tmp_path / "in.mp4", size=(32, 32))
    upscale_video(upscaler, source, target, codec=codec)
    (old, *_), (new, *_) = frames_of(source), frames_of(target)
    image = torch.from_numpy(old.to_ndarray(format="rgb24")).permute(2, 0, 1)[None] / 255
    expected = (upscaler(image)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert psnr(new.to_ndarray(format="rgb24"), expected) > 27
    assert len(frames_of(target)) == 6


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads and their scheduling are Linux's here")
def test_no_encoder_leaves_real_time_threads(
    upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = set()

    class Watched(video.Encoder):
        def add(self, frame: Any, time: int, duration: int | None) -> None:
            super().add(frame, time, duration)
            for task in Path("/proc/self/task").iterdir():
                with suppress(OSError):
                    policies.add(os.sched_getscheduler(int(task.name)))

    monkeypatch.setattr(video, "Encoder", Watched)
    before = os.sched_getscheduler(0)
    upscale_video(upscaler, write_clip(tmp_path / "in.mp4", size=(32, 32)), tmp_path / "out.mkv", codec="libsvtav1")
    assert policies == {before} == {os.sched_getscheduler(0)}


class Counting(Upscaler):
    """Notes the shapes that it is called with."""

    shapes: list[tuple[int, ...]]

    def __call__(self, image: Tensor, scale: float | None = None) -> Tensor:
        self.shapes.append(tuple(image.shape))
        return super().__call__(image, scale)


def counting(upscaler: Upscaler, kind: type[Counting] = Counting) -> Counting:
    found = kind(**{name: getattr(upscaler, name) for name in Upscaler.__dataclass_fields__})
    object.__setattr__(found, "shapes", [])
    return found


def test_frames_run_in_batches(upscaler: Upscaler, tmp_path: Path) -> None:
    network = counting(upscaler)
    source = write_clip(tmp_path / "in.mp4", count=8)
    upscale_video(network, source, tmp_path / "three.mkv", batch=3, codec="ffv1")
    assert network.shapes == [(3, 3, HEIGHT, WIDTH), (3, 3, HEIGHT, WIDTH), (2, 3, HEIGHT, WIDTH)]
    network.shapes.clear()
    upscale_video(network, source, tmp_path / "one.mkv", codec="ffv1")
    assert network.shapes == [(1, 3, HEIGHT, WIDTH)] * 8
    for a, b in zip(frames_of(tmp_path / "one.mkv"), frames_of(tmp_path / "three.mkv"), strict=True):
        assert np.abs(a.to_ndarray().astype(int) - b.to_ndarray()).max() <= 1


class Small(Counting):
    """Has memory for two whole frames; for none, when `most` is 0. Other sizes than theirs always fit."""

    most = 2
    sizes = ((HEIGHT, WIDTH), (42, 58))

    def __call__(self, image: Tensor, scale: float | None = None) -> Tensor:
        if image.shape[0] > self.most and image.shape[2:] in self.sizes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(image, scale)


def test_memory_that_runs_out_makes_smaller_batches(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    network = counting(upscaler, Small)
    source = write_clip(tmp_path / "in.mp4")
    upscale_video(network, source, tmp_path / "small.mkv", batch=6, codec="ffv1")
    assert [shape[0] for shape in network.shapes] == [2, 1, 2, 1]
    assert "Memory ran out for 6 frames together: they are run in two halves." in log.messages
    upscale_video(upscaler, source, tmp_path / "large.mkv", codec="ffv1")
    for a, b in zip(frames_of(tmp_path / "small.mkv"), frames_of(tmp_path / "large.mkv"), strict=True):
        assert np.abs(a.to_ndarray().astype(int) - b.to_ndarray()).max() <= 1


def test_large_frames_run_in_parts(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esc_arch.tools.upscale import large_images

    given: list[tuple[bool, Any]] = []

    def enlarge(
        network: Upscaler, image: np.ndarray, *, scale: Any, max_memory: Any, at_once: bool
    ) -> Iterator[Tensor]:
        given.append((at_once, max_memory))
        assert (image.shape, image.dtype) == ((HEIGHT, WIDTH, 3), np.float32)
        yield from upscaler(torch.from_numpy(image).permute(2, 0, 1)[None], scale)[0].split(20, dim=1)

    monkeypatch.setattr(large_images, "enlarge", enlarge)
    source = write_clip(tmp_path / "in.mkv", count=3, codec="ffv1", pixel_format="yuv444p10le")
    upscale_video(upscaler, source, tmp_path / "whole.mkv", codec="ffv1")
    assert not given
    upscale_video(upscaler, source, tmp_path / "limited.mkv", codec="ffv1", max_memory=12345, batch=2)
    network = counting(upscaler, Small)
    monkeypatch.setattr(Small, "most", 0)
    upscale_video(network, source, tmp_path / "full.mkv", codec="ffv1")
    assert given == [(True, 12345)] * 3 + [(False, None)] * 3
    assert log.text.count("Memory ran out for a frame as a whole: frames are run in parts, with the same result.") == 1
    for name in ("limited", "full"):
        for a, b in zip(frames_of(tmp_path / "whole.mkv"), frames_of(tmp_path / f"{name}.mkv"), strict=True):
            assert np.abs(samples(a).astype(int) - samples(b)).max() <= 1


def test_a_frame_that_does_not_fit_is_the_same_in_real_parts(upscaler: Upscaler, tmp_path: Path) -> None:
    network = counting(upscaler, Small)
    object.__setattr__(network, "most", 0)
    source = write_clip(tmp_path / "in.mkv", count=2, codec="ffv1", size=(42, 58))
    upscale_video(upscaler, source, tmp_path / "whole.mkv", codec="ffv1")
    upscale_video(network, source, tmp_path / "parts.mkv", codec="ffv1")
    for a, b in zip(frames_of(tmp_path / "whole.mkv"), frames_of(tmp_path / "parts.mkv"), strict=True):
        assert np.abs(a.to_ndarray().astype(int) - b.to_ndarray()).max() <= 1


class Interrupted(Counting):
    """Is stopped at the frame `at`, as by Ctrl-C; later calls go on."""

    at = 7

    def __call__(self, image: Tensor, scale: float | None = None) -> Tensor:
        if len(self.shapes) == self.at:
            object.__setattr__(self, "at", -1)
            raise KeyboardInterrupt
        return super().__call__(image, scale)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(video.SEGMENT, "cpu", 3)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(
    ("suffix", "codec", "exact"),
    # x264 (core 165) with AVX-512 does not always give the same for the same frames
    [(".mp4", "libx264", False), (".mkv", "ffv1", True), (".webm", "libvpx-vp9", True)],
)
def test_an_interrupted_run_goes_on_to_the_same_file(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture, suffix: str, codec: str, exact: bool
) -> None:
    times = (np.cumsum(np.random.default_rng(1).integers(100, 900, 11))).tolist()
    source = write_clip(tmp_path / "in.mp4", times=times, beside=lambda container: sine(container, codec="libopus"))
    whole, target = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    upscale_video(upscaler, source, whole, batch=2, codec=codec)
    network = counting(upscaler, Interrupted)
    object.__setattr__(network, "at", 5)  # of batches of 2, 1, 2, 1, 2, ...
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        upscale_video(network, source, target, batch=2, codec=codec)
    assert threading.active_count() == before
    assert not target.exists()
    work = tmp_path / f".out{suffix}.partial"
    assert sorted(path.name for path in work.iterdir()) == ["000000.segment", "000001.segment", "lock", "manifest.json"]
    assert f"{target}: 6 frames are kept in {work}; the same command resumes." in log.messages
    network.shapes.clear()
    upscale_video(network, source, target, batch=2, codec=codec)
    assert f"{target}: resuming an earlier run, of which 6 frames are there." in log.messages
    assert [shape[0] for shape in network.shapes] == [2, 1, 2]
    assert not work.exists()
    assert times_of(target) == times_of(whole)
    assert len(times_of(target)) == 11
    assert packets_of(target, 1) == packets_of(whole, 1)
    assert not exact or packets_of(target, 0) == packets_of(whole, 0)
    for a, b in zip(frames_of(target), frames_of(whole), strict=True):
        assert psnr(a.to_ndarray(), b.to_ndarray()) > 40


@pytest.mark.usefixtures("short_segments")
def test_other_settings_start_over(upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    source, target = write_clip(tmp_path / "in.mp4", count=9), tmp_path / "out.mp4"
    network = counting(upscaler, Interrupted)
    with pytest.raises(KeyboardInterrupt):
        upscale_video(network, source, target)
    network.shapes.clear()
    upscale_video(network, source, target, crf=30)
    assert len(network.shapes) == 9
    assert f"{target}: an earlier run had another video settings; starting over." in log.messages
    other = write_clip(tmp_path / "other.mp4", count=9, options={"crf": "9"})
    object.__setattr__(network, "at", 7)
    network.shapes.clear()
    with pytest.raises(KeyboardInterrupt):
        upscale_video(network, other, target, overwrite=True)
    shutil.copy(source, other)
    upscale_video(network, other, target, overwrite=True)
    assert f"{target}: an earlier run had another source; starting over." in log.messages


@pytest.mark.usefixtures("short_segments")
def test_other_weights_start_over(upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    source, target = write_clip(tmp_path / "in.mp4", count=9), tmp_path / "out.mp4"
    with pytest.raises(KeyboardInterrupt):
        upscale_video(counting(upscaler, Interrupted), source, target)
    net = build_network(NETWORK)
    randomise(net, 5)
    other = counting(replace(upscaler, net=net.eval()))
    upscale_video(other, source, target)
    assert len(other.shapes) == 9
    assert "an earlier run had another network; starting over." in log.text


@pytest.mark.usefixtures("short_segments")
def test_an_interruption_while_joining_costs_nothing(
    upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_clip(tmp_path / "in.mp4", count=7), tmp_path / "out.mp4"
    target.write_bytes(b"an older result")
    network = counting(upscaler)
    with monkeypatch.context() as patch:
        patch.setattr(video, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            upscale_video(network, source, target, overwrite=True)
    assert target.read_bytes() == b"an older result"
    network.shapes.clear()
    upscale_video(network, source, target, overwrite=True)
    assert not network.shapes
    assert len(frames_of(target)) == 7


def test_a_failure_before_the_first_segment_leaves_nothing(upscaler: Upscaler, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", count=9)
    network = counting(upscaler, Interrupted)
    with pytest.raises(KeyboardInterrupt):
        upscale_video(network, source, tmp_path / "out.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


def test_progress_is_a_growing_part(upscaler: Upscaler, tmp_path: Path) -> None:
    source, seen = write_clip(tmp_path / "in.mp4", count=4), list[float]()
    upscale_video(upscaler, source, tmp_path / "out.mp4", progress=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_cut_off_file_is_enlarged_up_to_the_fault(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    source = write_clip(tmp_path / "in.mkv", count=30, codec="ffv1")
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    upscale_video(upscaler, source, tmp_path / "out.mkv")
    count = len(frames_of(tmp_path / "out.mkv"))
    assert 10 < count < 16
    assert f"of 1.20 seconds; the {count} frames that can be decoded are enlarged." in log.text
    assert f"{source}: the file is cut off at 0." in log.text


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov", ".avi"])
def test_a_whole_file_that_begins_late_is_not_cut_off(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture, suffix: str
) -> None:
    source = write_clip(tmp_path / f"in{suffix}", times=[STEP * index for index in range(50, 56)])
    upscale_video(upscaler, source, tmp_path / "out.mkv")
    assert len(frames_of(tmp_path / "out.mkv")) >= 6
    assert "cut off" not in log.text


def test_a_cut_off_mp4(upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    whole = write_clip(tmp_path / "whole.mp4", count=30)
    source = tmp_path / "in.mp4"
    with av.open(str(whole)) as old, av.open(str(source), "w", container_options={"movflags": "+faststart"}) as new:
        copy = new.add_stream_from_template(old.streams[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = copy
                new.mux(packet)
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * 0.7)])
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    count = len(frames_of(tmp_path / "out.mp4"))
    assert 5 < count < 28
    assert f"of 1.20 seconds; the {count} frames that can be decoded are enlarged." in log.text
    source.write_bytes(data[:200])
    with pytest.raises(UserError, match=r"in\.mp4: there is no video in this file that can be decoded"):
        upscale_video(upscaler, source, tmp_path / "none.mp4")


def test_damaged_places_are_counted(upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    source = write_clip(tmp_path / "in.mkv", count=12, codec="ffv1")
    data = bytearray(source.read_bytes())
    for start in range(len(data) // 2, len(data) // 2 + 300):
        data[start] ^= 0x5A
    source.write_bytes(bytes(data))
    upscale_video(upscaler, source, tmp_path / "out.mkv")
    assert 9 <= len(frames_of(tmp_path / "out.mkv")) <= 12
    assert "places are damaged; the " in log.text


@pytest.mark.parametrize(
    "name",
    [
        *(b"http:127.0.0.1:9?.mp4", b"concat:a.mp4|b.mp4", b"subfile,,start,0,end,9,,:in.mp4", b"cache:in.mp4"),
        *(b"file:in.mp4", b"%d.mp4", b"-i.mp4", b"line\nend.mp4", b"\xff\xfe.mp4", b"n" * 251 + b".mp4"),
    ],
)
def test_names_are_names(
    upscaler: Upscaler, clip: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    """FFmpeg would take many of them for addresses."""
    monkeypatch.chdir(tmp_path)
    source, target = Path(os.fsdecode(name)), Path("results", os.fsdecode(name))
    target.parent.mkdir()
    source.write_bytes(clip)
    upscale_video(upscaler, source, target)
    target.rename("out.mp4")
    assert len(frames_of(Path("out.mp4"))) == 2
    assert not list(target.parent.iterdir())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video of two frames."""
    return write_clip(tmp_path_factory.mktemp("clip") / "in.mp4", count=2).read_bytes()


HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("in.mp4", "ffconcat version 1.0\nfile other.ts\n"), ("in.m3u8", HLS), ("in.mp4", HLS)),
        (
            "in.mp4",
            "# VobSub index file, v7\nsize: 32x24\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 000000000\n",
        ),
        ("in.mp4", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 33\n"),
    ],
)
def test_lists_of_other_files_open_none(upscaler: Upscaler, tmp_path: Path, name: str, text: str) -> None:
    write_clip(tmp_path / "other.ts", count=2)
    write_clip(tmp_path / "in.sub", count=2, file_format="vob")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"no video, or a list of other files, which are not opened\."):
        upscale_video(upscaler, tmp_path / name, tmp_path / "out.mp4")


def test_pipes_and_folders_are_no_videos(upscaler: Upscaler, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.mp4")
    for source in (tmp_path / "in.mp4", tmp_path):
        with pytest.raises(UserError, match=r": a folder, a pipe, a socket or a device, not a file\."):
            upscale_video(upscaler, source, tmp_path / "out.mp4")


def test_results_that_are_no_numbers_end_the_run(upscaler: Upscaler, tmp_path: Path) -> None:
    class Broken(Counting):
        def __call__(self, image: Tensor, scale: float | None = None) -> Tensor:
            return super().__call__(image, scale) * (float("inf") if len(self.shapes) == 2 else 1)

    source, broken = write_clip(tmp_path / "in.mp4"), counting(upscaler, Broken)
    with pytest.raises(UserError, match=r"gave values that are not finite .*weights are broken"):
        upscale_video(broken, source, tmp_path / "out.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


@pytest.mark.usefixtures("short_segments")
def test_a_full_disk_costs_nothing_that_is_done(
    upscaler: Upscaler, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While segments are written, and while they are joined by FFmpeg."""
    import resource

    source, target, work = write_clip(tmp_path / "in.mkv"), tmp_path / "out.mkv", tmp_path / ".out.mkv.partial"
    network, write, soft = counting(upscaler), segments.write_atomically, resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:

        def full(path: Path, data: bytes) -> None:
            if path.name == "000001.segment":
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, data)

        patch.setattr(segments, "write_atomically", full)
        with pytest.raises(UserError, match=r"Cannot write to .*No space left on device.*000001\.segment.* is kept"):
            upscale_video(network, source, target, codec="ffv1")
    assert f"{target}: 3 frames are kept in {work}; the same command resumes." in log.messages
    size = (work / "000000.segment").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (round(1.5 * size), soft[1]))
    try:
        with pytest.raises(UserError, match=r"Cannot write to .*File too large.*joined\.mkv.* is kept"):
            upscale_video(network, source, target, codec="ffv1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    network.shapes.clear()
    upscale_video(network, source, target, codec="ffv1")
    assert (network.shapes, len(frames_of(target)), work.exists()) == ([], 6, False)


def test_another_process_may_finish_the_target_first(
    upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, settings = write_clip(tmp_path / "in.mp4", count=1), tmp_path / "out.mp4", video._settings

    def slow(*arguments: Any) -> dict[str, str]:
        target.write_bytes(b"theirs")
        return settings(*arguments)

    monkeypatch.setattr(video, "_settings", slow)
    with pytest.raises(UserError, match=r"out\.mp4 already exists"):
        upscale_video(upscaler, source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
    assert target.read_bytes() == b"theirs"


def test_no_video(upscaler: Upscaler, tmp_path: Path) -> None:
    text = tmp_path / "in.mp4"
    text.write_text("This is no video.\n" * 100)
    with pytest.raises(UserError, match=r"in\.mp4: cannot be read as a video \(.*\)\. The file is damaged, no video"):
        upscale_video(upscaler, text, tmp_path / "out.mp4")
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        sine(container)()
    with pytest.raises(UserError, match=r"sound\.mkv: there is no video in this file that can be decoded"):
        upscale_video(upscaler, sound, tmp_path / "out.mp4")
    broken = write_clip(tmp_path / "broken.mkv", count=1, codec="ffv1")
    data = bytearray(broken.read_bytes())
    packet = packets_of(broken, 0)[0][1]
    start = data.index(packet)
    data[start : start + len(packet)] = bytes(len(packet))
    broken.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"broken\.mkv: no frame can be decoded\. The file is damaged"):
        upscale_video(upscaler, broken, tmp_path / "out.mp4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "out.avi"}, r"out\.avi: videos are written as \.mp4"),
        ({"target": "in.mp4"}, r"in\.mp4 is the video to be enlarged"),
        ({"target": "there.mp4"}, r"there\.mp4 already exists. Choose another name"),
        ({"target": "nowhere/out.mp4"}, r"Cannot write .*nowhere/out\.mp4: it must be a file in an existing folder"),
        ({"source": "none.mp4"}, r"none\.mp4: no such file"),
        ({"scale": -1}, r"The scale is -1; it must be a number above 0"),
        ({"batch": 0}, r"batch: 0 given; it must be a number of frames, 1 or more"),
        ({"codec": "h265"}, r"codec: 'h265' is no video encoder .*libx265"),
        ({"crf": 99}, r"crf: 99 given; for libx264"),
        ({"pixel_format": "yuv"}, r"pixel_format: 'yuv' given"),
        ({"target": "out.webm", "codec": "libx264"}, r"out\.webm: libx264 cannot write 64 x 48 pixels of yuv420p here"),
        ({"codec": "libsvtav1", "scale": 0.1}, r"out\.mp4: libsvtav1 cannot write 4 x 2 pixels"),
    ],
)
def test_mistakes(upscaler: Upscaler, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_clip(tmp_path / "in.mp4", count=1)
    (tmp_path / "there.mp4").touch()
    names = {"source": "in.mp4", "target": "out.mp4"} | {
        key: changes[key] for key in changes if key in ("source", "target")
    }
    options = {key: value for key, value in changes.items() if key not in names}
    with pytest.raises(UserError, match=message):
        upscale_video(upscaler, tmp_path / names["source"], tmp_path / names["target"], **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "there.mp4"]


def test_an_unknown_matrix_names_the_file(upscaler: Upscaler, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", matrix=14, pixel_format="yuv420p10le")
    with pytest.raises(UserError, match=r"in\.mp4: its colours are coded with matrix 14"):
        upscale_video(upscaler, source, tmp_path / "out.mp4")


def test_without_pyav(upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av" or name.startswith("av."):
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    for name in list(sys.modules):
        if name == "av" or name.startswith("av."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r'Video needs PyAV 17\.1 or newer \(No module named .av.\): pip install "esc-arch\[video\]"'
    ):
        upscale_video(upscaler, tmp_path / "in.mp4", tmp_path / "out.mp4")


def test_with_an_old_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    from esc_arch.tools.video import frames as video_frames

    class VideoStream:
        pass

    monkeypatch.setattr("av.video.stream.VideoStream", VideoStream)
    with pytest.raises(UserError, match=r"Video needs PyAV 17\.1 or newer \(PyAV .* is too old\)"):
        video_frames.import_av()


@needs_cuda
@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv444p10le"])
def test_on_a_gpu(upscaler: Upscaler, tmp_path: Path, pixel_format: str) -> None:
    device = torch.device("cuda")
    net = build_network(NETWORK)
    net.load_state_dict(upscaler.net.state_dict())
    source = write_clip(tmp_path / "in.mkv", count=20, codec="ffv1", pixel_format=pixel_format)
    network = counting(replace(upscaler, net=net.eval().to(device), device=device))
    upscale_video(network, source, tmp_path / "gpu.mkv", codec="ffv1")
    assert max(shape[0] for shape in network.shapes) > 1
    upscale_video(upscaler, source, tmp_path / "cpu.mkv", codec="ffv1")
    for a, b in zip(frames_of(tmp_path / "gpu.mkv"), frames_of(tmp_path / "cpu.mkv"), strict=True):
        assert np.abs(samples(a).astype(int) - samples(b)).max() <= 1
