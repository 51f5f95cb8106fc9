"""A network as a `torch.export` program, or as a library compiled from it by AOTInductor."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from esc_arch.atomic_io import write_file
from esc_arch.errors import UserError
from esc_arch.tools.upscale.network import Upscaler

from .checking import Export, ExportResult, InputShape
from .network import ExportedNetwork

__all__ = ["METADATA", "TOLERANCE", "export_compiled", "export_program"]

#: The extra file with the metadata in a package of `torch.export.save`, as JSON.
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
) -> ExportResult:
    """Write a network with `torch.export.save`, for `torch.export.load(path).module()`; on the CPU, in float32.

    Arguments and errors as of `export_onnx`.
    """
    export = Export(upscaler, shape, pad)
    program, metadata = export.trace(ExportedNetwork(export.original.net, pad=pad)), export.metadata("torch")
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    data = buffer.getvalue()
    differences = export.compare(torch.export.load(io.BytesIO(data)).module(), TOLERANCE) if check else {}
    write_file(Path(path), data)
    return ExportResult(Path(path), metadata, differences)


def export_compiled(
    upscaler: Upscaler, path: str | Path, *, shape: InputShape, pad: bool = True, check: bool = True
) -> ExportResult:
    """Write a network compiled by AOTInductor for this machine's CPU, for `torch._inductor.aoti_load_package(path)`.

    Args:
        path: ends in .pt2.
        shape: all dimensions fixed.

    Raises:
        UserError: as of `export_onnx`, or there is no C++ compiler.
    """
    # With PyTorch 2.15 a varying batch gave outputs of another batch's shape, and took minutes to compile
    if None in shape:
        raise UserError(
            "AOTInductor packages take one input shape: give --batch N and --size HxW, such as "
            "--batch 1 --size 270x480."
        )
    if os.environ.get("CXX") is None and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UserError(
            "AOTInductor needs a C++ compiler, and there is no g++, clang++ or cl on the PATH: install one."
        )
    export = Export(upscaler, shape, pad)
    program, metadata = export.trace(ExportedNetwork(export.original.net, pad=pad)), export.metadata("torch")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        package = str(Path(folder) / "network.pt2")
        configs = {"aot_inductor.metadata": metadata}
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=configs)
        differences = export.compare(torch._inductor.aoti_load_package(package), TOLERANCE) if check else {}
        write_file(Path(path), Path(package).read_bytes())
    return ExportResult(Path(path), metadata, differences)
