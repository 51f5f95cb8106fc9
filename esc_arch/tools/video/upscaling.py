"""Videos through a network: decoding, the network and encoding at the same time, to be interrupted and resumed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_arch.atomic_io import writing_to
from esc_arch.errors import UserError
from esc_arch.ops.resize import scaled_size
from esc_arch.tools.upscale.memory import is_out_of_memory, peak_of
from esc_arch.tools.upscale.network import Upscaler

from .frames import Coding, exact, frame_of, import_av, open_to_read, planes_of, side_data_of
from .output import CONTAINERS, MICROSECONDS, Encoder, Form, check_form, container_of, form_of, join
from .segments import WorkFolder
from .stages import overlapped

__all__ = ["SUFFIXES", "result_suffix", "upscale_video"]

logger = logging.getLogger("esc_arch")

#: What names of videos end in.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("3gp", "asf", "avi", "divx", "dv", "f4v", "flv", "h264", "hevc", "ivf", "m2ts", "m2v", "m4v", "mkv", "mov"),
        *("mp4", "mpeg", "mpg", "mts", "mxf", "nut", "ogv", "ts", "vob", "webm", "wmv", "y4m"),
    )
)
#: Frames in a segment, which an interruption costs at most; each begins with a key frame.
SEGMENT = {"cpu": 48, "cuda": 120}
#: The most frames that run together, and the share of a GPU's free memory that they may take.
LARGEST_BATCH, SHARE = 8, 0.7
#: AVFMT_TS_DISCONT: formats whose clock begins anywhere.
TS_DISCONT = 0x0200
#: How much (s) a file may end before what it says, by rounding.
TOLERANCE = 0.1

Planes = npt.NDArray[Any]


def result_suffix(path: Path) -> str | None:
    """The suffix of an enlarged video: the source's where it can be written, else .mkv; None if it names no video."""
    suffix = path.suffix.lower()
    return path.suffix if suffix in CONTAINERS else ".mkv" if suffix in SUFFIXES else None


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
        batch: frames that run together; None for 1 on a CPU, and for what fits, up to 8, on a GPU.
        overwrite: replace a target that is there.
        codec: an encoder of FFmpeg's; auto: libx264, for .webm libvpx-vp9, or another where this is not there.
        crf: quality, from 0, the best; None for a high one. Some encoders have none.
        pixel_format: FFmpeg's name; auto: chroma and depth of the source, as far as the encoder has them.
        progress: is called in this thread with the part that is done, 0 .. 1.
        max_memory: bytes that a frame may take in the network; above it, it is run in parts with the same result.

    Raises:
        UserError: PyAV is missing, the source is no video or has no frame that can be decoded, or one of the arguments
            cannot be had; the message says which. What is done is kept.
    """
    import_av()
    source, target = Path(source), Path(target)
    _check(source, target, scale, batch, overwrite)
    asked = scale if upscaler.any_scale and scale is not None and scale >= 1 else None
    with _opened(source) as container:
        stream = _video_stream(container, source)
        first = next(iter(_Frames(container, stream, source)), None)
        if first is None:
            raise UserError(f"{source}: no frame can be decoded. The file is damaged, or not a video.")
        size = scaled_size((first.frame.height, first.frame.width), upscaler.scale if scale is None else scale)
        with _naming(source):
            coding = Coding.of(first.frame)
            form = form_of(first.frame, stream, target, size, codec=codec, crf=crf, pixel_format=pixel_format)
        plan = _Plan(source, stream.index, _origin(container), coding, first.frame.height, first.frame.width)
        frames = _number_of_frames(container, stream)
    check_form(form, target)
    if (form.height, form.width) != size:
        logger.warning(
            "%s: %s has no odd sizes; the last row or column is repeated: %d x %d becomes %d x %d.",
            *(target, form.pixel_format, *size[::-1], form.width, form.height),
        )
    network = _Network(upscaler, coding, form.coding, asked, max_memory)
    length = SEGMENT.get(upscaler.device.type, SEGMENT["cpu"])
    settings = _settings(upscaler, plan, form)
    with writing_to(target.parent), WorkFolder.opened(target, settings, length) as folder:
        if folder.frames:
            logger.warning("%s: %d frames are there from an earlier run, which goes on.", target, folder.frames)
        try:
            count = batch or network.batch(planes_of(first.frame, coding, plan.height, plan.width))
            _run(network, plan, form, folder, count, frames, progress)
            join(folder, form, source, plan.stream, plan.origin, target)
        except BaseException:
            _leave(folder, target)
            raise
        folder.remove()
    if progress is not None:
        progress(1.0)


def _check(source: Path, target: Path, scale: float | None, batch: int | None, overwrite: bool) -> None:
    container_of(target)
    if not source.is_file():
        raise UserError(f"{source}: not there. Give a video file.")
    if scale is not None and not 0 < scale < float("inf"):
        raise UserError(f"scale: {scale:g} given; it must be a number above 0.")
    if batch is not None and batch < 1:
        raise UserError(f"batch: {batch} given; it must be a number of frames, 1 or more.")
    if target.exists() and target.resolve() == source.resolve():
        raise UserError(f"{target} is the video to be enlarged. Choose another name for the result.")
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already. Choose another name, or have it overwritten.")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is not there. Make this folder first.")


class _Plan(NamedTuple):
    """What is read.

    Attributes:
        origin: what is taken from all times, in microseconds.
        coding, height, width: of the first frame, and what all are brought to.
    """

    source: Path
    stream: int
    origin: int
    coding: Coding
    height: int
    width: int


class _Batch(NamedTuple):
    """Frames that run together: when they are shown, for how long (None where it is not known), and (B, 3, H, W)."""

    times: list[int]
    durations: list[int | None]
    planes: Planes


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    av = import_av()
    try:
        container = open_to_read(str(source))
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source}: cannot be read as a video ({reason}). The file is damaged, or no video.") from error
    with container:
        yield container


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Messages that begin with what is wrong get the file's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") if str(error).startswith("its ") else error from error


def _video_stream(container: Any, source: Path) -> Any:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic and stream.codec_context is not None:
            stream.thread_type = "AUTO"
            return stream
    raise UserError(f"{source}: there is no video in this file that can be decoded.")


def _origin(container: Any) -> int:
    """What is taken from all times: of broadcasts, whose clock may begin at hours, where it begins; else nothing."""
    return int(container.start_time or 0) if container.format.flags & TS_DISCONT else 0


def _number_of_frames(container: Any, stream: Any) -> int | None:
    if stream.frames:
        return int(stream.frames)
    rate = exact(stream.guessed_rate)
    if container.duration and rate:
        return round(Fraction(container.duration, MICROSECONDS) * rate) or None
    return None


class _Frame(NamedTuple):
    """A frame, and when it is shown, in units of its stream's time base."""

    frame: Any
    time: int


@dataclass
class _Frames:
    """The frames of a stream, in the order in which they are shown, as many as can be decoded.

    Attributes:
        faults: packets that could not be decoded, and frames that were damaged.
        end: when the last packet of any stream ends, in seconds.
    """

    container: Any
    stream: Any
    source: Path
    faults: int = 0
    end: float = 0.0
    notes: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[_Frame]:
        rate, unit, last = exact(self.stream.guessed_rate), exact(self.stream.time_base), None
        assert unit is not None
        step = max(round(1 / (rate * unit)), 1) if rate else 1
        shift = round(Fraction(_origin(self.container), MICROSECONDS) / unit)
        for frame in self._decoded():
            time = frame.pts - shift if frame.pts is not None else 0 if last is None else last + step
            if last is not None and time <= last:
                self.note("times of frames that do not grow were put right")
                time = last + 1
            last = time
            self.faults += bool(frame.is_corrupt)
            yield _Frame(frame, time)

    def _decoded(self) -> Iterator[Any]:
        av = import_av()
        for packet in self._packets():
            try:
                yield from packet.decode()
            except av.FFmpegError:
                self.faults += 1
        try:
            yield from self.stream.decode(None)
        except av.FFmpegError:
            self.faults += 1

    def _packets(self) -> Iterator[Any]:
        """Those of the stream. Those of others only say how far the file goes."""
        try:
            for packet in self.container.demux():
                if packet.dts is None and packet.size == 0:  # the end of a stream
                    continue
                moment = packet.pts if packet.pts is not None else packet.dts
                if moment is not None:
                    self.end = max(self.end, float((moment + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == self.stream.index:
                    yield packet
        except import_av().FFmpegError:
            self.faults += 1

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.add(text)
            logger.warning("%s: %s.", self.source, text)

    def conclude(self, frames: int) -> None:
        """Say what was wrong with the file."""
        container = self.container
        stored = {"mov", "mp4", "matroska", "webm", "avi"} & set(container.format.name.split(","))
        expected = ((container.start_time or 0) + (container.duration or 0)) / MICROSECONDS
        if stored and self.end < expected - TOLERANCE:
            self.note(
                f"the file is cut off at {self.end:.2f} of {expected:.2f} seconds; the {frames} frames that can be "
                "decoded are enlarged"
            )
        if self.faults:
            self.note(f"{self.faults} places are damaged; the {frames} frames that can be decoded are enlarged")


#: What frames may carry beside pixels that is not carried over.
LEFT_OUT = {
    "MASTERING_DISPLAY_METADATA": "metadata of HDR (mastering display) are left out",
    "CONTENT_LIGHT_LEVEL": "metadata of HDR (content light level) are left out",
    "DYNAMIC_HDR_PLUS": "metadata of HDR10+ are left out",
    "DOVI_METADATA": "metadata of Dolby Vision are left out",
    "A53_CC": "closed captions in the video are left out",
}


def _remark(frames: _Frames, frame: Any, plan: _Plan) -> None:
    """Say what of a frame the result has not."""
    if frame.interlaced_frame:
        frames.note("it is interlaced, and enlarged as if it were not. Deinterlace it first (ffmpeg -vf bwdif)")
    alpha = any(part.is_alpha for part in frame.format.components) or frames.stream.metadata.get("alpha_mode") == "1"
    if alpha and not frame.format.has_palette:
        frames.note("its alpha is left out")
    if (frame.height, frame.width) != (plan.height, plan.width):
        frames.note(f"its frames change their size; all are made {plan.width} x {plan.height} before they are enlarged")
    for data in side_data_of(frame):
        if data.type.name in LEFT_OUT:
            frames.note(LEFT_OUT[data.type.name])


def _batches(plan: _Plan, done: int, batch: int, length: int) -> Iterator[_Batch]:
    """The frames that are still to do. Batches end where segments do, so that they are the same after a resumption."""
    with _opened(plan.source) as container:
        stream = container.streams[plan.stream]
        stream.thread_type = "AUTO"
        frames = _Frames(container, stream, plan.source)
        waiting: list[tuple[int, int | None, Planes]] = []
        index = -1
        for index, (frame, time) in enumerate(frames):
            if index < done:
                continue
            _remark(frames, frame, plan)
            waiting.append((time, frame.duration or None, planes_of(frame, plan.coding, plan.height, plan.width)))
            if len(waiting) == batch or (index + 1) % length == 0:
                yield _batch_of(waiting)
                waiting = []
        if waiting:
            yield _batch_of(waiting)
        frames.conclude(index + 1)


def _batch_of(waiting: list[tuple[int, int | None, Planes]]) -> _Batch:
    times, durations, planes = zip(*waiting, strict=True)
    return _Batch(list(times), list(durations), np.stack(planes))


class _Network:
    """Samples of frames to those of enlarged frames."""

    def __init__(
        self, upscaler: Upscaler, source: Coding, result: Coding, scale: float | None, max_memory: int | None
    ) -> None:
        self.upscaler, self.source, self.result = upscaler, source, result
        self.scale, self.max_memory = scale, max_memory
        self.in_parts = False

    def batch(self, planes: Planes) -> int:
        """How many frames like this (3, H, W) are to run together."""
        device = self.upscaler.device
        if device.type != "cuda" or self.max_memory is not None:
            return 1
        rgb = self._rgb(planes[None])
        try:
            self.upscaler(rgb, self.scale)  # libraries choose their algorithms, which takes memory of its own
            each = peak_of(lambda: self.upscaler(rgb, self.scale), device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return 1
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, min(LARGEST_BATCH, int(SHARE * free) // max(each, 1)))

    def __call__(self, planes: Planes) -> Planes:
        """(B, 3, H, W) to (B, 3, H', W'). Where memory runs out, in smaller batches, and then in parts of a frame."""
        if self.max_memory is not None or self.in_parts:
            return np.stack([self._parts(each) for each in planes])
        try:
            enlarged = self.upscaler(self._rgb(planes), self.scale)
            return self._samples(enlarged)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Behind the exception, whose frames hold tensors
        if self.upscaler.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(planes) > 1:
            logger.warning("Memory ran out for %d frames together: they are run in two halves.", len(planes))
            middle = len(planes) // 2
            return np.concatenate([self(planes[:middle]), self(planes[middle:])])
        logger.warning("Memory ran out for a frame as a whole: frames are run in parts, with the same result.")
        self.in_parts = True
        return self(planes)

    def _parts(self, planes: Planes) -> Planes:
        from esc_arch.tools.upscale.large_images import enlarge, enlarge_exactly

        height, width = planes.shape[1:]
        out = np.empty((3, *self.upscaler.output_size(height, width, self.scale)), self.result.dtype)

        def write(top: int, left: int, block: Tensor) -> None:
            rows, columns = block.shape[1:]
            out[:, top : top + rows, left : left + columns] = self._samples(block)

        image = np.ascontiguousarray(self.source.to_rgb(_tensor(planes)).permute(1, 2, 0).numpy())
        run = enlarge_exactly if self.in_parts else enlarge
        run(self.upscaler, image, write, scale=self.scale, max_memory=self.max_memory)
        return out

    def _rgb(self, planes: Planes) -> Tensor:
        return self.source.to_rgb(_tensor(planes).to(self.upscaler.device))

    def _samples(self, rgb: Tensor) -> Planes:
        return self.result.from_rgb(rgb).cpu().numpy().astype(self.result.dtype, copy=False)


def _tensor(planes: Planes) -> Tensor:
    # PyTorch does little with 16 bits without a sign
    return torch.from_numpy(planes if planes.dtype == np.uint8 else planes.astype(np.int32))


def _run(
    network: _Network,
    plan: _Plan,
    form: Form,
    folder: WorkFolder,
    batch: int,
    total: int | None,
    progress: Callable[[float], None] | None,
) -> None:
    """Fill the folder with what is still to do."""
    done = folder.frames

    def compute(found: _Batch) -> _Batch:
        nonlocal done
        enlarged = network(found.planes)
        done += len(found.times)
        if progress is not None and total:
            progress(min(done / total, 1.0))
        return found._replace(planes=enlarged)

    def write(results: Iterable[_Batch]) -> None:
        encoder = None
        for times, durations, frames in results:
            for time, duration, planes in zip(times, durations, frames, strict=True):
                encoder = encoder or Encoder(form)
                encoder.add(frame_of(planes, form.coding, form.pixel_format, form.height, form.width), time, duration)
                if len(encoder.times) == folder.length:
                    folder.add(encoder.finish())
                    encoder = None
        if encoder is not None:
            folder.add(encoder.finish())

    overlapped(_batches(plan, done, batch, folder.length), compute, write)


def _leave(folder: WorkFolder, target: Path) -> None:
    """Say what an interruption leaves, or leave nothing."""
    if folder.frames:
        logger.warning(
            "%s: %d frames are kept in %s; the same command goes on there.", target, folder.frames, folder.path
        )
    else:
        folder.remove()


def _settings(upscaler: Upscaler, plan: _Plan, form: Form) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "source": {"size": plan.source.stat().st_size, "sha256": _file_digest(plan.source), "stream": plan.stream},
        "network": {
            "network_g": dict(upscaler.network_g),
            "weights": _weights_digest(upscaler),
            "precision": str(upscaler.precision),
        },
        "video settings": form.settings(),
        "PyAV": import_av().__version__,
    }


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _weights_digest(upscaler: Upscaler) -> str:
    digest = hashlib.sha256()
    for name, weight in upscaler.net.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
