"""A network as an ONNX file, compared with PyTorch in ONNX Runtime before it is written."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
from .network import onnx_network

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ATTENTION", "OPSETS", "TOLERANCE", "export_onnx"]

#: How attention is computed: a window at a time, or all at once in memory that grows with the image.
ATTENTION = ("windows", "whole")

#: The first that `torch.onnx` writes without conversion, and the last that was tried.
OPSETS = range(18, 24)

#: The largest difference from PyTorch allowed, of 0 .. 1: in float32, and in float16.
TOLERANCE = {False: 1e-4, True: 2e-2}


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
    said: Callable[[Difference], None] | None = None,
) -> Report:
    """Write a network as an ONNX file: `input` (B, 3, H, W), RGB in 0 .. 1 -> `output` (B, 3, H', W'), float32 both.

    Args:
        upscaler: its weights are exported in float32, whatever it computes in.
        opset: of the ONNX standard, one of `OPSETS`.
        shape: the images it is to take; any batch and size by default.
        pad: have the graph pad by reflection to whole windows and crop, so that it computes what `upscaler(image)`
            does. Without, it computes what the network makes of the image as it is.
        attention: one of `ATTENTION`.
        half: weights and features in float16 (not normalisations, global pools and coordinates).
        check: run the file in ONNX Runtime and compare with PyTorch.
        said: is told each difference as it comes.

    Raises:
        UserError: a package is missing, an option cannot be, the file cannot be written, or it differs from PyTorch
            by more than `TOLERANCE`; then nothing is written.
    """
    needed = ("onnx", "onnxscript", *(("onnxruntime",) if check else ()))
    require(*needed)
    if opset not in OPSETS:
        raise UserError(f"The opset is {opset}; it must be within {OPSETS[0]} .. {OPSETS[-1]}.")
    if attention not in ATTENTION:
        raise UserError(f"attention is {attention!r}; allowed: {', '.join(ATTENTION)}.")
    check_shape(upscaler, shape)
    original = on_cpu(upscaler)
    net = onnx_network(original.net, pad=pad, loop=attention == "windows", half=half)
    model = _converted(net, example(original, shape), shape, opset)
    packages = ("torch", "onnx", "onnxscript")
    description = describe(upscaler, shape, pad=pad, packages=packages) | {
        "opset": str(opset),
        "attention": attention,
        "precision": "fp16" if half else "fp32",
    }
    _label(model, description)
    data = model.SerializeToString()
    importlib.import_module("onnx.checker").check_model(data, full_check=True)
    differences: tuple[Difference, ...] = ()
    if check:
        differences = compare(_runner(data), original, shape, pad=pad, tolerance=TOLERANCE[half], said=said)
    write(Path(path), data)
    return Report(Path(path), len(data), shape, description, differences)


def require(*packages: str) -> None:
    """Import packages of the extra `onnx`.

    Raises:
        UserError: one is missing.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f'Exporting to ONNX needs {package}, which cannot be imported: pip install "esc-arch[onnx]" ({error})'
            ) from error


def _converted(net: torch.nn.Module, image: Tensor, shape: InputShape, opset: int) -> ModelProto:
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PyTorch, about itself
        program = torch.export.export(net, (image,), dynamic_shapes=dynamic_shapes(shape), strict=False)
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


def _label(model: ModelProto, description: dict[str, str]) -> None:
    from onnx import helper

    model.producer_name = "esc_arch"
    model.producer_version = description["esc_arch"]
    helper.set_model_props(model, description)
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
