"""What an export is given and says of itself, and how it is compared with the network that it is of."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from esc_arch.archs import ESCLTE
from esc_arch.atomic_io import write_atomically
from esc_arch.errors import UserError
from esc_arch.tools.upscale.network import Upscaler
from esc_arch.version import __version__

__all__ = ["Difference", "InputShape", "Report", "compare", "describe", "example", "on_cpu", "write"]


#: `torch.export` of older ones makes programs that take fewer sizes than they were asked to, or none.
OLDEST_TORCH = "2.10"


@dataclass(frozen=True)
class InputShape:
    """Which images an exported network takes: a number for a fixed one, None for any."""

    batch: int | None = None
    height: int | None = None
    width: int | None = None

    def __str__(self) -> str:
        return f"({self.batch or 'B'}, 3, {self.height or 'H'}, {self.width or 'W'})"


@dataclass(frozen=True)
class Difference:
    """The largest difference between an exported network's output, in 0 .. 1, and PyTorch's for one batch."""

    batch: int
    height: int
    width: int
    largest: float


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        path: the file.
        size: of the file, in bytes.
        input: the images that it takes.
        metadata: what the file says of itself.
        differences: from PyTorch, for each batch compared; empty where that was not asked for.
    """

    path: Path
    size: int
    input: InputShape
    metadata: dict[str, str]
    differences: tuple[Difference, ...]

    @property
    def worst(self) -> float | None:
        """The largest of the differences; None without any."""
        return max((difference.largest for difference in self.differences), default=None)


def on_cpu(upscaler: Upscaler) -> Upscaler:
    """A copy of it that computes in float32 on the CPU: what is exported and what exports are compared with.

    Raises:
        UserError: this PyTorch is too old to export it.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise UserError(
            f"Exporting needs PyTorch {OLDEST_TORCH} or newer; this is {torch.__version__}. Install a newer one."
        )
    cpu = torch.device("cpu")
    return replace(upscaler, net=copy.deepcopy(upscaler.net).to(cpu).float(), device=cpu, precision=torch.float32)


def check_shape(upscaler: Upscaler, shape: InputShape) -> None:
    """Refuse what the network cannot be exported for.

    Raises:
        UserError: see the messages.
    """
    for name, number in (("batch", shape.batch), ("height", shape.height), ("width", shape.width)):
        if number is not None and number < 1:
            raise UserError(f"The {name} to export for is {number}; it must be at least 1, or dynamic.")
    if (
        isinstance(upscaler.net, ESCLTE)
        and upscaler.scale != int(upscaler.scale)
        and None in (shape.height, shape.width)
    ):
        raise UserError(
            f"ESCLTE for x{upscaler.scale:g} can be exported for images of one size alone, as sizes are rounded: "
            f"give --size HxW, or a whole scale."
        )


def example(upscaler: Upscaler, shape: InputShape) -> Tensor:
    """An image to trace with: several of a size that is no multiple of anything, where these may vary."""
    window = upscaler.window
    return torch.rand(shape.batch or 2, 3, shape.height or 3 * window - 3, shape.width or 2 * window - 1)


def dynamic_shapes(shape: InputShape) -> tuple[dict[int, object]]:
    """The dimensions that vary, as `torch.export.export` takes them for one image."""
    numbers = {0: shape.batch, 2: shape.height, 3: shape.width}
    return ({dim: torch.export.Dim.DYNAMIC for dim, number in numbers.items() if number is None},)


def describe(upscaler: Upscaler, shape: InputShape, *, pad: bool, packages: Sequence[str]) -> dict[str, str]:
    """What a file is to say of itself.

    Args:
        packages: whose versions are kept.
    """
    said = {
        "network_g": json.dumps(dict(upscaler.network_g)),
        "scale": f"{upscaler.scale:g}",
        "window": str(upscaler.window),
        "input": f"{shape}, RGB in 0 .. 1",
        "padding": "in the graph" if pad else "none",
        "source": upscaler.source.name,
        "esc_arch": __version__,
        **{package: metadata.version(package) for package in packages},
    }
    if upscaler.source.is_file():
        said["source_sha256"] = hashlib.sha256(upscaler.source.read_bytes()).hexdigest()
    licence = upscaler.metadata.get("license", upscaler.metadata.get("licence"))
    return said if licence is None else {**said, "license": str(licence)}


def sizes_to_compare(window: int, shape: InputShape) -> Iterator[tuple[int, int, int]]:
    """Batches, heights and widths: one pixel, below a window, odd, whole windows, several, as far as they may vary."""
    w = window
    sizes = [(1, 1, 1), (2, w // 2 + 1, w - 1), (1, w, w), (3, w + 1, 2 * w + 3), (1, 2 * w, 3 * w)]
    seen = {(shape.batch or b, shape.height or h, shape.width or w) for b, h, w in sizes}
    return iter(sorted(seen))


def compare(
    run: Callable[[Tensor], Tensor],
    upscaler: Upscaler,
    shape: InputShape,
    *,
    pad: bool,
    tolerance: float,
    said: Callable[[Difference], None] | None = None,
) -> tuple[Difference, ...]:
    """Run an exported network and its original on batches of several sizes.

    Args:
        run: the exported one, on the CPU.
        upscaler: see `on_cpu`.
        said: is told each difference as it comes.

    Raises:
        UserError: a difference above `tolerance`, or the exported network does not run.
    """
    differences = []
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in sizes_to_compare(upscaler.window, shape):
        image = torch.rand(batch, 3, height, width, generator=generator)
        with torch.no_grad():
            expected = upscaler(image) if pad else upscaler.net(image)
        try:
            out = run(image)
        except Exception as error:
            raise UserError(
                f"The exported network fails on {batch} x {height} x {width}, and was not written: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        if out.shape != expected.shape:
            raise UserError(
                f"The exported network makes {tuple(out.shape)} of {batch} x {height} x {width}, PyTorch "
                f"{tuple(expected.shape)}; it was not written."
            )
        differences.append(Difference(batch, height, width, (out - expected).abs().max().item()))
        if said is not None:
            said(differences[-1])
    worst = max(differences, key=lambda difference: difference.largest)
    # (Written so that a difference that is not a number is one too many)
    if not all(difference.largest <= tolerance for difference in differences):
        raise UserError(
            f"The exported network differs from PyTorch by up to {worst.largest:.2g} (of 0 .. 1), more than "
            f"{tolerance:g}; it was not written. Largest at {worst.batch} x {worst.height} x {worst.width}."
        )
    return tuple(differences)


def write(path: Path, data: bytes) -> None:
    """Write a file, all or nothing.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
