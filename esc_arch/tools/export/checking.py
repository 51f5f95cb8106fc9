"""What all exports share: a network is traced on the CPU, compared with PyTorch, and written with its metadata."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from esc_arch.errors import UserError
from esc_arch.printing import shown
from esc_arch.tools.upscale.network import Upscaler
from esc_arch.version import __version__

__all__ = ["Export", "ExportResult", "InputShape", "require"]

#: Programs that older `torch.export` makes take fewer sizes than asked for, or none.
OLDEST_TORCH = "2.10"


class InputShape(NamedTuple):
    """Which images an exported network takes: a number for a fixed dimension, None for any."""

    batch: int | None = None
    height: int | None = None
    width: int | None = None

    def __str__(self) -> str:
        return f"({self.batch or 'B'}, 3, {self.height or 'H'}, {self.width or 'W'})"


class ExportResult(NamedTuple):
    """An exported file, its metadata, and its largest difference from PyTorch (of 0 .. 1) for each batch compared.

    Batches are named by their shapes, such as 1x3x8x8.
    """

    path: Path
    metadata: dict[str, str]
    differences: dict[str, float]

    @property
    def worst(self) -> float | None:
        """The largest of the differences; None without any."""
        return max(self.differences.values(), default=None)


def require(*packages: str, extra: str, purpose: str) -> None:
    """Import optional packages; raises UserError if one is missing, with the extra of esc-arch that installs it."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f'{purpose} needs {package}, which cannot be imported: pip install "esc-arch[{extra}]" ({error})'
            ) from error


class Export:
    """An export of a network, of which it keeps a copy in float32 on the CPU.

    Args:
        shape: the images that the export takes.
        pad: pad to whole windows and crop in the graph, as `Upscaler` does.

    Raises:
        UserError: this PyTorch is too old, or the network cannot be exported for that shape.
    """

    def __init__(self, upscaler: Upscaler, shape: InputShape, pad: bool) -> None:
        if torch.__version__ < OLDEST_TORCH:
            raise UserError(f"Exporting needs PyTorch {OLDEST_TORCH} or newer; this is {torch.__version__}.")
        for name, number in shape._asdict().items():
            if number is not None and number < 1:
                raise UserError(f"The {name} to export for is {number}; it must be at least 1, or dynamic.")
        fractional = upscaler.any_scale and upscaler.scale != int(upscaler.scale)
        if fractional and None in (shape.height, shape.width):
            raise UserError(
                f"ESCLTE for x{upscaler.scale:g} can only be exported for images of one size, as sizes are rounded: "
                "give --size HxW, or use a whole scale."
            )
        net, cpu = copy.deepcopy(upscaler.net).to("cpu").float(), torch.device("cpu")
        self.original = replace(upscaler, net=net, device=cpu, precision=torch.float32)
        self.shape, self.pad = shape, pad

    def trace(self, net: nn.Module) -> ExportedProgram:
        """The program of `net`, a form of the original."""
        batch, height, width = self.shape
        window = self.original.net.window_size
        # A batch and sizes that are no multiple of anything, where these may vary
        image = torch.rand(batch or 2, 3, height or 3 * window - 3, width or 2 * window - 1)
        numbers = {0: batch, 2: height, 3: width}
        dynamic = {dim: torch.export.Dim.DYNAMIC for dim, number in numbers.items() if number is None}
        torch.compiler.reset()  # loops that were traced before would add their conditions on sizes
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # PyTorch's, about itself
            return torch.export.export(net, (image,), dynamic_shapes=(dynamic,), strict=False)

    def metadata(self, *packages: str) -> dict[str, str]:
        """The metadata of the file, with the versions of `packages`."""
        net = self.original
        entries = {
            "network_g": json.dumps(dict(net.network_g)),
            "scale": f"{net.scale:g}",
            "window": str(net.net.window_size),
            "input": f"{self.shape}, RGB in 0 .. 1",
            "padding": "in the graph" if self.pad else "none",
            "source": shown(net.source.name),
            "esc_arch": __version__,
            **{package: metadata.version(package) for package in packages},
        }
        if net.source.is_file():
            entries["source_sha256"] = hashlib.sha256(net.source.read_bytes()).hexdigest()
        licence = net.metadata.get("license", net.metadata.get("licence"))
        return entries if licence is None else {**entries, "license": str(licence)}

    def compare(self, run: Callable[[Tensor], Tensor], tolerance: float) -> dict[str, float]:
        """Run the exported network and the original on batches of several sizes; the largest difference for each.

        Raises:
            UserError: a difference above `tolerance`, or the exported network does not run.
        """
        w = self.original.net.window_size
        # One pixel, below a window, one window, odd, several windows; as far as they may vary
        sizes = [(1, 1, 1), (2, w // 2 + 1, w - 1), (1, w, w), (3, w + 1, 2 * w + 3), (1, 2 * w, 3 * w)]
        fixed = {tuple(given or size for given, size in zip(self.shape, three, strict=True)) for three in sizes}
        differences: dict[str, float] = {}
        generator = torch.Generator().manual_seed(0)
        for batch, height, width in sorted(fixed):
            image = torch.rand(batch, 3, height, width, generator=generator)
            with torch.no_grad():
                expected = self.original(image) if self.pad else self.original.net(image)
            name = f"{batch}x3x{height}x{width}"
            try:
                out = run(image)
                if out.shape != expected.shape:
                    raise ValueError(f"its output is {tuple(out.shape)} instead of {tuple(expected.shape)}")
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"The exported network fails on {name}, and was not written: {reason}") from error
            differences[name] = (out - expected).abs().max().item()
            if not differences[name] <= tolerance:  # NaN, too
                raise UserError(
                    f"The exported network differs from PyTorch by {differences[name]:.2g} (of 0 .. 1) on {name}, more "
                    f"than {tolerance:g}, and was not written."
                )
        return differences
