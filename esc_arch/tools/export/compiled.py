"""A network as a `torch.export` program, or as a library compiled from it by AOTInductor."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from esc_arch.archs import ESCLTE
from esc_arch.errors import UserError
from esc_arch.tools.upscale.network import Upscaler

from .checking import (
    Difference,
    InputShape,
    Report,
    check_shape,
    compare,
    describe,
    dynamic_shapes,
    example,
    on_cpu,
    write,
)
from .network import ExportedNetwork

__all__ = ["METADATA", "TOLERANCE", "export_compiled", "export_program"]

#: The extra file in a package of `torch.export.save` that says what it is, as JSON.
METADATA = "esc_arch.json"

#: The largest difference from PyTorch allowed, of 0 .. 1.
TOLERANCE = 1e-4


def export_program(
    upscaler: Upscaler,
    path: str | Path,
    *,
    shape: InputShape = InputShape(),  # noqa: B008  immutable
    pad: bool = True,
    check: bool = True,
    said: Callable[[Difference], None] | None = None,
) -> Report:
    """Write a network with `torch.export.save`, for `torch.export.load(path).module()`; on the CPU, in float32.

    Args:
        shape, pad, check, said: see `export_onnx`; the file is loaded again and compared.

    Raises:
        UserError: an option cannot be, the file cannot be written, or it differs from PyTorch by more than `TOLERANCE`;
            then nothing is written.
    """
    original = on_cpu(upscaler)
    program = _program(original, shape, pad)
    description = describe(upscaler, shape, pad=pad, packages=("torch",))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(description)})
    differences: tuple[Difference, ...] = ()
    if check:
        buffer.seek(0)
        run = torch.export.load(buffer).module()
        differences = compare(run, original, shape, pad=pad, tolerance=TOLERANCE, said=said)
    write(Path(path), buffer.getvalue())
    return Report(Path(path), len(buffer.getvalue()), shape, description, differences)


def export_compiled(
    upscaler: Upscaler,
    path: str | Path,
    *,
    shape: InputShape,
    pad: bool = True,
    check: bool = True,
    said: Callable[[Difference], None] | None = None,
) -> Report:
    """Write a network compiled by AOTInductor for this machine's CPU, for `torch._inductor.aoti_load_package(path)`.

    Args:
        path: ends in .pt2.
        shape: with fixed numbers alone.
        others: as of `export_program`.

    Raises:
        UserError: as of `export_program`, or the shape is not fixed, or there is no C++ compiler.
    """
    # With PyTorch 2.15 a varying batch gave outputs of another batch's shape, and took minutes to compile
    if None in (shape.batch, shape.height, shape.width):
        raise UserError(
            "AOTInductor packages are made for one shape of input: give --batch N and --size HxW, such as "
            "--batch 1 --size 270x480."
        )
    if os.environ.get("CXX") is None and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UserError(
            "AOTInductor needs a C++ compiler, and there is no g++, clang++ or cl on the PATH: install one."
        )
    original = on_cpu(upscaler)
    program = _program(original, shape, pad)
    description = describe(upscaler, shape, pad=pad, packages=("torch",))
    differences: tuple[Difference, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        package = str(Path(folder) / "network.pt2")
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program, package_path=package, inductor_configs={"aot_inductor.metadata": description}
            )
        if check:
            run: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(package)
            differences = compare(run, original, shape, pad=pad, tolerance=TOLERANCE, said=said)
        data = Path(package).read_bytes()
    write(Path(path), data)
    return Report(Path(path), len(data), shape, description, differences)


def _program(upscaler: Upscaler, shape: InputShape, pad: bool) -> ExportedProgram:
    check_shape(upscaler, shape)
    if isinstance(upscaler.net, ESCLTE) and shape.batch is None:
        raise UserError(
            "ESCLTE is exported by torch.export for a fixed batch alone: give --batch N, such as --batch 1."
        )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PyTorch, about itself
        net = ExportedNetwork(upscaler.net, pad=pad).eval()
        return torch.export.export(net, (example(upscaler, shape),), dynamic_shapes=dynamic_shapes(shape), strict=False)
