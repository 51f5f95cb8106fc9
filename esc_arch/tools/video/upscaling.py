"""Videos through a network: decoding, the network and encoding at the same time, to be interrupted and resumed."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esc_arch.atomic_io import check_output, writing_to
from esc_arch.errors import UserError
from esc_arch.ops.resize import scaled_size
from esc_arch.tools.upscale import large_images
from esc_arch.tools.upscale.memory import is_out_of_memory, release
from esc_arch.tools.upscale.network import Upscaler
from esc_arch.tools.upscale.stages import overlapped
from esc_arch.tools.upscale.upscaling import Settings, finite

from .encoding import CONTAINERS, Encoder, VideoSpec, container_format, video_spec
from .frames import Coding, Planes, frame_of, import_av
from .muxing import join
from .reading import Batch, VideoReader, open_video
from .segments import WorkFolder

__all__ = ["RESULT_SUFFIXES", "upscale_video"]

logger = logging.getLogger("esc_arch")

#: What names of videos may end in, and what those of results then end in. Matroska takes whatever the others have.
RESULT_SUFFIXES = {".gif": ".mp4"} | {
    suffix: suffix if suffix in CONTAINERS else ".mkv"
    for suffix in (
        *(".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".h264", ".hevc", ".ivf", ".m2ts", ".m2v", ".m4v"),
        *(".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
        ".y4m",
    )
}
#: Frames in a segment, which an interruption costs at most; each begins with a key frame.
SEGMENT = {"cpu": 48, "cuda": 120}


def upscale_video(
    upscaler: Upscaler,
    source: str | Path,
    target: str | Path,
    *,
    scale: float | None = None,
    batch: int | None = None,
    overwrite: bool = False,
    codec: str = "auto",
    crf: float | None = None,
    pixel_format: str = "auto",
    progress: Callable[[float], None] | None = None,
    max_memory: int | None = None,
) -> None:
    """Enlarge a video. Times of frames, sound, subtitles, chapters and metadata stay as they are.

    What is done is kept in the hidden folder `.TARGET.partial` beside the target, and the same call goes on there after
    an interruption, with the same result. The target appears when it is whole. Warnings go to the logger `esc_arch`.

    Args:
        source: any container, codec and pixel format that FFmpeg reads.
        target: .mp4, .m4v, .mov, .mkv or .webm.
        scale: by how much; None for the network's own. Of a network that has one scale alone, the result is resized.
        batch: frames that run together; None for 1 on a CPU, and on a GPU for up to 16 small ones.
        overwrite: replace a target that is there.
        codec: an encoder of FFmpeg's; auto: libx264, for .webm libvpx-vp9, or another where this is not there.
        crf: quality, 0 is best; None for the encoder's default here, 17 for libx264. Some encoders have none.
        pixel_format: FFmpeg's name; auto: chroma and depth of the source, as far as the encoder has them.
        progress: is called in this thread with the part that is done, 0 .. 1.
        max_memory: bytes that a frame may take in the network; above it, it is run in parts with the same result.

    Raises:
        UserError: PyAV is missing, the source is no video or has no frame that can be decoded, an argument is invalid,
            the network gives NaN, the disk is full, or another process writes the target; the message says which.
            What is done is kept.
    """
    import_av()
    source, target = Path(source), Path(target)
    _check(source, target, batch, overwrite)
    report = progress or (lambda part: None)
    asked = Settings(scale=scale).asked(upscaler)
    with open_video(source) as video:
        size = scaled_size((video.first.height, video.first.width), upscaler.scale if scale is None else scale)
        spec = video_spec(video.first, video.stream, target, size, codec=codec, crf=crf, pixel_format=pixel_format)
        if (spec.height, spec.width) != size:
            logger.warning(
                "%s: %s has no odd sizes; the last row or column is repeated: %d x %d becomes %d x %d.",
                *(target, spec.pixel_format, *size[::-1], spec.width, spec.height),
            )
        network = _Network(upscaler, video.coding, spec.coding, asked, max_memory)
        length = SEGMENT.get(upscaler.device.type, SEGMENT["cpu"])
        settings = _settings(upscaler, video, spec)
        with writing_to(target.parent), WorkFolder.opened(target, settings, length) as folder:
            check_output(target, overwrite=overwrite)  # again: another process may just have finished it
            if folder.shown:
                logger.warning("%s: resuming an earlier run, of which %d frames are there.", target, len(folder.shown))
            try:
                _run(network, video, spec, folder, batch, report)
                join(folder, spec, source, video.stream.index, video.origin, target)
            except BaseException:
                if folder.shown:
                    kept = len(folder.shown), folder.path
                    logger.warning("%s: %d frames are kept in %s; the same command resumes.", target, *kept)
                raise
            folder.remove()
    report(1.0)


def _check(source: Path, target: Path, batch: int | None, overwrite: bool) -> None:
    container_format(target)
    if not os.path.isfile(source):
        what = "a folder, a pipe, a socket or a device, not a file" if os.path.exists(source) else "no such file"
        raise UserError(f"{source}: {what}. Give a video file.")
    if batch is not None and batch < 1:
        raise UserError(f"batch: {batch} given; it must be a number of frames, 1 or more.")
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} is the video to be enlarged. Choose another name for the result.")
    check_output(target, overwrite=overwrite)


def _run(
    network: _Network,
    video: VideoReader,
    spec: VideoSpec,
    folder: WorkFolder,
    batch: int | None,
    report: Callable[[float], None],
) -> None:
    """Fill the folder with what is still to do."""
    done, total = len(folder.shown), video.number
    encoders: list[Encoder] = []  # the one at work

    def compute(found: Batch) -> Batch:
        nonlocal done
        enlarged = network(np.stack([planes for *_, planes in found]))
        done += len(found)
        if total:
            report(min(done / total, 1.0))
        return [(time, duration, planes) for (time, duration, _), planes in zip(found, enlarged, strict=True)]

    def write(found: Batch) -> None:
        for time, duration, planes in found:
            if not encoders:
                encoders.append(Encoder(spec))
            frame = frame_of(planes, spec.coding, spec.pixel_format, spec.height, spec.width)
            encoders[0].add(frame, time, duration)
            if len(encoders[0].shown) == folder.length:
                folder.add(encoders.pop().finish())

    if batch is None:
        height, width = video.first.height, video.first.width
        batch = 1 if network.max_memory is not None else network.upscaler.batch_size(height, width)
    overlapped(video.batches(done, batch, folder.length), compute, write)
    if encoders:
        folder.add(encoders.pop().finish())


class _Network:
    """Samples of frames to those of enlarged frames."""

    def __init__(
        self, upscaler: Upscaler, source: Coding, result: Coding, scale: float | None, max_memory: int | None
    ) -> None:
        self.upscaler, self.source, self.result = upscaler, source, result
        self.scale, self.max_memory = scale, max_memory
        self.in_parts = False

    def __call__(self, planes: Planes) -> Planes:
        """(B, 3, H, W) to (B, 3, H', W'). Where memory runs out, in smaller batches, and then in parts of a frame."""
        # PyTorch does little with 16 bits without a sign
        samples = torch.from_numpy(planes if planes.dtype == np.uint8 else planes.astype(np.int32))
        if self.max_memory is None and not self.in_parts:
            try:
                return self._samples(self.upscaler(self.source.to_rgb(samples.to(self.upscaler.device)), self.scale))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            release(self.upscaler.device)  # after the exception, whose frames hold tensors
            if len(planes) > 1:
                logger.warning("Memory ran out for %d frames together: they are run in two halves.", len(planes))
                return np.concatenate([self(half) for half in np.array_split(planes, 2)])
            logger.warning("Memory ran out for a frame as a whole: frames are run in parts, with the same result.")
            self.in_parts = True
        options: dict[str, Any] = {"scale": self.scale, "max_memory": self.max_memory, "at_once": not self.in_parts}
        frames = [np.ascontiguousarray(each.permute(1, 2, 0).numpy()) for each in self.source.to_rgb(samples)]
        parts = [map(self._samples, large_images.enlarge(self.upscaler, frame, **options)) for frame in frames]
        return np.stack([np.concatenate(list(rows), axis=1) for rows in parts])

    def _samples(self, rgb: Tensor) -> Planes:
        return self.result.from_rgb(finite(self.upscaler, rgb)).cpu().numpy().astype(self.result.dtype, copy=False)


def _settings(upscaler: Upscaler, video: VideoReader, spec: VideoSpec) -> dict[str, str]:
    """All that the result depends on."""
    weights, source = upscaler.net.state_dict(), hashlib.sha256()
    network = hashlib.sha256(repr((upscaler.network_g, upscaler.precision, list(weights))).encode())
    for each in weights.values():
        network.update(each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    with open(video.path, "rb") as file:
        while part := file.read(2**20):
            source.update(part)
    return {
        "source": f"{source.hexdigest()}, stream {video.stream.index}",
        "network": network.hexdigest(),
        "video settings": repr(spec),
        "PyAV": import_av().__version__,
    }
