"""The formats of exported networks: ONNX, `torch.export` programs, and libraries compiled from these by AOTInductor."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from esc_arch.atomic_io import write_file
from esc_arch.errors import UserError
from esc_arch.tools.upscale.network import Upscaler

from .checking import Export, ExportResult, InputShape, require
from .network import ExportedNetwork, onnx_network

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ATTENTION", "METADATA", "OPSETS", "TOLERANCE", "export_compiled", "export_onnx", "export_program"]

#: How attention is computed: a window at a time, or all at once in memory that grows with the image.
ATTENTION = ("windows", "whole")
#: From the first that `torch.onnx` writes without conversion to the last that was tested.
OPSETS = range(18, 24)
#: The largest difference from PyTorch allowed, of 0 .. 1.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
#: The extra file with the metadata in a package of `torch.export.save`, as JSON.
METADATA = "esc_arch.json"


def export_onnx(
    upscaler: Upscaler,
    path: str | Path,
    *,
    opset: int = 20,
    shape: InputShape = InputShape(),  # noqa: B008  immutable
    pad: bool = True,
    attention: str = "windows",
    half: bool = False,
    check: bool = True,
) -> ExportResult:
    """Write a network as an ONNX file: `input` (B, 3, H, W), RGB in 0 .. 1 -> `output` (B, 3, H', W'), float32 both.

    Args:
        upscaler: its weights are exported in float32, whatever its own precision.
        opset: of the ONNX standard, one of `OPSETS`.
        shape: the images that the file takes; any batch and size by default.
        pad: pad by reflection to whole windows and crop in the graph, which then computes `upscaler(image)`.
            Otherwise it computes the network on the image as it is.
        attention: one of `ATTENTION`.
        half: weights and features in float16 (not normalisations, global pools and coordinates).
        check: run the file in ONNX Runtime and compare it with PyTorch.

    Raises:
        UserError: a package is missing, an invalid option, the file cannot be written, or it differs from PyTorch
            by more than `TOLERANCE`; then nothing is written.
    """
    require("onnx", "onnxscript", *(["onnxruntime"] if check else []), extra="onnx", purpose="Exporting to ONNX")
    if opset not in OPSETS:
        raise UserError(f"The opset is {opset}; it must be within {OPSETS[0]} .. {OPSETS[-1]}.")
    if attention not in ATTENTION:
        raise UserError(f"attention is {attention!r}; allowed: {', '.join(ATTENTION)}.")
    precision = "fp16" if half else "fp32"
    export = Export(upscaler, shape, pad)
    net = onnx_network(export.original.net, pad=pad, loop=attention == "windows", half=half)
    model = _convert(export.trace(net), opset)
    metadata = export.metadata("torch", "onnx", "onnxscript")
    metadata |= {"opset": str(opset), "attention": attention, "precision": precision}
    _label(model, metadata)
    data = model.SerializeToString()
    importlib.import_module("onnx.checker").check_model(data, full_check=True)
    differences = export.compare(_runner(data), TOLERANCE[precision]) if check else {}
    write_file(Path(path), data)
    return ExportResult(Path(path), metadata, differences)


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
    differences = export.compare(torch.export.load(io.BytesIO(data)).module(), TOLERANCE["fp32"]) if check else {}
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
        differences = export.compare(torch._inductor.aoti_load_package(package), TOLERANCE["fp32"]) if check else {}
        write_file(Path(path), Path(package).read_bytes())
    return ExportResult(Path(path), metadata, differences)


def _convert(program: ExportedProgram, opset: int) -> ModelProto:
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about itself
        try:
            exported = torch.onnx.export(
                program,
                (),
                input_names=["input"],
                output_names=["output"],
                opset_version=opset,
                verbose=False,
                # Its pattern rewriting takes a minute and gains nothing that runtimes do not do
                optimize=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(
                f"PyTorch {torch.__version__} cannot write this network as ONNX opset {opset}; 2.15 can. It says: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
    assert exported is not None
    model = exported.model
    common.InlinePass()(model)
    fold_constants(model)
    for clean in (
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        # Traces of this machine's files
        common.ClearMetadataAndDocStringPass(),
        common.NameFixPass(),
    ):
        clean(model)
    return onnx_ir.to_proto(model)


def _label(model: ModelProto, metadata: dict[str, str]) -> None:
    from onnx import helper

    model.producer_name = "esc_arch"
    model.producer_version = metadata["esc_arch"]
    helper.set_model_props(model, metadata)
    names = {"batch": 0, "height": 2, "width": 3}
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        for name, axis in names.items():
            if not dims[axis].HasField("dim_value"):
                dims[axis].dim_param = name if value.name == "input" or axis == 0 else f"output_{name}"


def _runner(data: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["output"], {"input": image.numpy()})[0])
