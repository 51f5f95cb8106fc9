"""Exported networks compute what `Upscaler` does, and say what they are; what cannot be exported is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from conftest import NETWORK
from networks import image, max_error, needs_compiler, randomise
from torch import Tensor

from esc_arch.cli import main
from esc_arch.errors import UserError
from esc_arch.tools.export import InputShape, export_compiled, export_onnx, export_program, formats
from esc_arch.tools.export.checking import Export
from esc_arch.tools.export.network import ExportedNetwork, onnx_network
from esc_arch.tools.upscale.network import Upscaler, load

SMALL: dict[str, Any] = {
    "dim": 8, "pdim": 4, "kernel_size": 3, "n_blocks": 1, "conv_blocks": 1, "window_size": 4, "num_heads": 2
}  # fmt: skip

#: Of the checkpoint that is exported. Large enough for the dense bias not to be folded into the file.
NET = {**NETWORK, "window_size": 8, "num_heads": 4}

VARIANTS: dict[str, dict[str, Any]] = {
    "table": {"type": "ESC", "upscaling_factor": 2, "use_ln": True},
    "factors": {"type": "ESC", "upscaling_factor": 2, "attn_type": "FlashBias", "rank": 3},
    "fp": {"type": "ESCFP", "upscaling_factor": 3},
    "real": {"type": "ESCReal"},
    "real dysample": {"type": "ESCReal", "upscaling_factor": 2, "use_dysample": True},
    "m conv": {"type": "ESCRealM", "upscaling_factor": 1, "upsampler": "conv", "unshuffle_mod": False},
    "m direct": {"type": "ESCRealM", "upscaling_factor": 1},
    "m shuffle": {"type": "ESCRealM", "upscaling_factor": 2, "upsampler": "pixelshuffle", "mid_dim": 12},
    "m nearest": {"type": "ESCRealM", "upscaling_factor": 3, "upsampler": "nearest+conv"},
    "m transpose": {"type": "ESCRealM", "upscaling_factor": 3, "upsampler": "transpose+conv"},
    "m dysample": {"type": "ESCRealM", "upscaling_factor": 2, "upsampler": "dysample", "mid_dim": 12},
    "m odd window": {"type": "ESCRealM", "upscaling_factor": 2, "window_size": 3},
    "rib gate": {"type": "ESCRIB", "upscaling_factor": 3, "rank": 6, "gate_type": "DWC"},
}
LTE = {"type": "ESCLTE", "upscaling_factor": 3, "hidden_dim": 8, "mlp_dims": [8]}
NORMALIZED_LTE = {**LTE, "normalize": True}

#: Others than those that exports are compared on by themselves.
SIZES = [(1, 1, 2), (2, 3, 4), (1, 4, 9), (3, 13, 6)]


def upscaler_of(options: dict[str, Any], source: Path = Path("net.pth")) -> Upscaler:
    network_g = {**SMALL, **options}
    net: Any = randomise(build_network(network_g)).eval().requires_grad_(False)
    return Upscaler(net, network_g, source, torch.device("cpu"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    net = randomise(build_network(dict(NET)))
    torch.save({"params": net.state_dict(), "license": "MIT"}, path)
    return path


@pytest.fixture(scope="module")
def exported(weights: Path) -> Path:
    """The checkpoint as ONNX, made by the command."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra onnx")
    path = weights.with_suffix(".onnx")
    assert main(["export", "-m", str(weights), "-o", str(path)]) == 0
    return path


def in_onnx_runtime(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


# --- the graphs, in PyTorch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pad", [True, False])
def test_layers_that_are_exported_equal_the_networks(variant: str, pad: bool) -> None:
    upscaler = upscaler_of(VARIANTS[variant])
    graph = onnx_network(upscaler.net, pad=pad, loop=False)
    for size in SIZES:
        x = image(size[0], 3, *size[1:])
        with torch.no_grad():
            expected = upscaler(x) if pad else upscaler.net(x)
            assert max_error(graph(x), expected) < 1e-5, size


@pytest.mark.parametrize("pad", [True, False])
def test_the_whole_module_equals_the_upscaler(pad: bool) -> None:
    for options in (*VARIANTS.values(), LTE, NORMALIZED_LTE):
        upscaler = upscaler_of(options)
        x = image(2, 3, 5, 7)
        with torch.no_grad():
            expected = upscaler(x) if pad else upscaler.net(x)
            assert max_error(ExportedNetwork(upscaler.net, pad=pad)(x), expected) < 1e-5, options


def test_exporting_leaves_the_network_as_it_was() -> None:
    upscaler = upscaler_of(VARIANTS["table"])
    x = image(1, 3, 5, 7)
    expected = upscaler(x)
    onnx_network(upscaler.net, half=True)
    assert torch.equal(upscaler(x), expected)


# --- ONNX ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_onnx_runtime_computes_alike(exported: Path, weights: Path) -> None:
    upscaler = load(weights, device="cpu")
    for batch, height, width in SIZES:
        x = image(batch, 3, height, width)
        assert max_error(in_onnx_runtime(exported, x), upscaler(x)) < 1e-5, (batch, height, width)


def test_the_file_says_what_it_is(exported: Path, weights: Path) -> None:
    import hashlib

    import onnx

    model = onnx.load(exported)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["network_g"])["type"] == "ESC"
    assert said["source_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    expected = {"scale": "2", "window": "8", "license": "MIT", "opset": "20", "precision": "fp32"}
    assert {key: said[key] for key in expected} == expected
    assert {"esc_arch", "torch", "onnx", "onnxscript", "source"} <= said.keys()
    dims = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert dims == [["batch", 3, "height", "width"]]
    assert [value.name for value in model.graph.output] == ["output"]


def test_the_file_says_nothing_of_this_machine(exported: Path) -> None:
    data = exported.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in data
    assert str(Path(formats.__file__).parent).encode() not in data


def test_attention_is_computed_a_window_at_a_time(exported: Path) -> None:
    """What bounds the memory. From outside the loop come constants alone, as OpenVINO wants it."""
    import onnx

    graph = onnx.load(exported).graph
    assert "Softmax" not in {node.op_type for node in graph.node}
    (scan,) = [node for node in graph.node if node.op_type == "Scan"]
    body = scan.attribute[[attribute.name for attribute in scan.attribute].index("body")].g
    made = {name for node in body.node for name in node.output} | {value.name for value in body.input}
    outside = {name for node in body.node for name in node.input} - made
    assert outside <= {tensor.name for tensor in (*graph.initializer, *body.initializer)}
    assert max(len(tensor.raw_data) for tensor in graph.initializer) < 4 * 64 * 64 * 4, "the dense bias is in the file"


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (VARIANTS["m dysample"], {"pad": False, "attention": "whole", "shape": InputShape()}),
        (VARIANTS["rib gate"], {"opset": 18, "shape": InputShape(1, 5, 11)}),
        (NORMALIZED_LTE, {"shape": InputShape(height=5)}),
        (VARIANTS["table"], {"half": True, "shape": InputShape(1, 5, 11)}),
    ],
    ids=["m dysample", "rib", "lte", "half"],
)
def test_kinds_of_networks_in_onnx_runtime(options: dict[str, Any], arguments: dict[str, Any], tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra onnx")
    result = export_onnx(upscaler_of(options), tmp_path / "net.onnx", **arguments)
    half = bool(arguments.get("half"))
    assert result.worst is not None and (1e-5 < result.worst < 2e-2 if half else result.worst < 1e-4)
    assert result.path.is_file()
    assert len(result.differences) == (5 if None in arguments["shape"] else 1)


def test_openvino_computes_the_same(exported: Path, weights: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    upscaler = load(weights, device="cpu")
    # Without the hint it may choose bfloat16
    compiled = openvino.Core().compile_model(str(exported), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for x in (image(1, 3, 9, 7), image(2, 3, 13, 21)):
        assert max_error(torch.from_numpy(compiled({"input": x.numpy()})["output"]), upscaler(x)) < 1e-4


def test_nothing_is_written_where_it_differs(exported: Path, weights: Path, monkeypatch: Any, tmp_path: Path) -> None:
    import onnx

    monkeypatch.setattr(Export, "trace", lambda *_: None)
    monkeypatch.setattr(formats, "_convert", lambda *_: onnx.load(exported))
    upscaler = load(weights, device="cpu")
    other = replace(upscaler, net=randomise(build_network(dict(NET)), seed=1).eval())
    with pytest.raises(UserError, match=r"differs from PyTorch by .* on .*, more than 0.0001, and was not written"):
        export_onnx(other, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
    assert export_onnx(other, tmp_path / "net.onnx", check=False).worst is None


def test_a_pytorch_that_cannot(exported: Path, weights: Path, monkeypatch: Any, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise torch.onnx.errors.OnnxExporterError("no scan\nand more")

    monkeypatch.setattr(Export, "trace", lambda *_: None)
    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UserError, match=r"cannot write this network as ONNX opset 20; 2.15 can. It says: no scan$"):
        export_onnx(load(weights, device="cpu"), tmp_path / "net.onnx")


def test_a_missing_package_is_named(weights: Path, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", "-m", str(weights), "-o", str(tmp_path / "net.onnx")]) == 2
    assert 'needs onnx, which cannot be imported: pip install "esc-arch[onnx]"' in capsys.readouterr().err


# --- PyTorch's own formats -----------------------------------------------------------------------------------------


def test_a_program_of_lte(tmp_path: Path) -> None:
    """Also after its loops were traced for other sizes."""
    result = export_program(upscaler_of(NORMALIZED_LTE), tmp_path / "net.pt2")
    assert result.worst is not None and result.worst < 1e-5 and len(result.differences) == 5


def test_a_program_of_torch_export(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    upscaler = load(weights, device="cpu")
    result = export_program(upscaler, path)
    assert result.worst is not None and result.worst < 1e-5
    said = {"esc_arch.json": ""}
    program = torch.export.load(path, extra_files=said).module()
    assert json.loads(said["esc_arch.json"])["scale"] == "2"
    x = image(2, 3, 9, 6)
    assert max_error(program(x), upscaler(x)) < 1e-5


#: Of the compiler, to be done sooner: neither vectors nor optimisation, nor headers that are compiled for later.
PLAINLY = {
    "cpp.simdlen": 1,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.debug_compile": True,
}


@needs_compiler
def test_a_compiled_package(weights: Path, tmp_path: Path) -> None:
    """Expensive: some 10 s of compiling."""
    path = tmp_path / "net.pt2"
    arguments = ["--format", "aoti", "--batch", "2", "--size", "5x11"]
    with torch._inductor.config.patch(PLAINLY):
        assert main(["export", "-m", str(weights), "-o", str(path), *arguments]) == 0
    x = image(2, 3, 5, 11)
    compiled = torch._inductor.aoti_load_package(str(path))
    assert max_error(compiled(x), load(weights, device="cpu")(x)) < 1e-5
    assert compiled.get_metadata()["scale"] == "2"


def test_aoti_for_varying_shapes(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="take one input shape: give --batch N and --size HxW"):
        export_compiled(load(weights, device="cpu"), tmp_path / "net.pt2", shape=InputShape(1))


def test_aoti_without_a_compiler(weights: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and there is no g\+\+, clang\+\+ or cl"):
        export_compiled(load(weights, device="cpu"), tmp_path / "net.pt2", shape=InputShape(1, 5, 6))


# --- what is compared and refused ----------------------------------------------------------------------------------


def test_differences_are_measured_on_several_sizes() -> None:
    upscaler = upscaler_of(VARIANTS["table"])
    off = 2e-5
    differences = Export(upscaler, InputShape(), pad=True).compare(lambda x: upscaler(x) + off, 1e-4)
    assert list(differences) == ["1x3x1x1", "1x3x4x4", "1x3x8x12", "2x3x3x3", "3x3x5x11"]
    assert all(abs(largest - off) < 1e-6 for largest in differences.values())
    assert len(Export(upscaler, InputShape(1, 5, 6), pad=True).compare(upscaler, 0)) == 1


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda x: torch.full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), torch.nan),
            r"by nan .* on 1x3x1x1, more than 0.0001, and was not written",
        ),
        (lambda x: x, r"fails on 1x3x1x1, and was not written: its output is \(1, 3, 1, 1\) instead of \(1, 3, 2, 2\)"),
        (lambda x: x.reshape(7), "fails on 1x3x1x1, and was not written: shape"),
    ],
)
def test_exports_that_are_wrong(run: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Export(upscaler_of(VARIANTS["table"]), InputShape(), pad=True).compare(run, 1e-4)


def test_what_lte_cannot() -> None:
    fractional = upscaler_of({**LTE, "upscaling_factor": 2.5})
    with pytest.raises(UserError, match=r"ESCLTE for x2.5 can only be exported for images of one size.*--size HxW"):
        Export(fractional, InputShape(1), pad=True)
    Export(fractional, InputShape(1, 5, 5), pad=True)


def test_metadata_without_a_source(tmp_path: Path) -> None:
    metadata = Export(upscaler_of(LTE, tmp_path / "gone.pth"), InputShape(1), pad=False).metadata()
    assert "source_sha256" not in metadata and "license" not in metadata
    assert metadata["input"] == "(1, 3, H, W), RGB in 0 .. 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "net.trt"], "net.trt: the suffix must be .onnx for --format onnx, .pt2 for torch and aoti"),
        (
            ["-o", "net.onnx", "--format", "torch"],
            "net.onnx: the suffix must be .onnx for --format onnx, .pt2 for torch",
        ),
        (["-o", "net.pt2", "--half"], "--opset, --half and --attention are for ONNX only"),
        (["-o", "net.pt2", "--opset", "20"], "--opset, --half and --attention are for ONNX only"),
        (["-o", "net.pt2", "--attention", "whole"], "--opset, --half and --attention are for ONNX only"),
        (["-o", "gone/net.onnx"], "Cannot write gone/net.onnx: it must be a file in an existing folder"),
        (["-o", "there.onnx"], "there.onnx already exists. Choose another name, or replace it with --overwrite"),
        (["-o", "net.onnx", "--batch", "many"], "--batch many --size dynamic: give numbers"),
        (["-o", "net.onnx", "--size", "270"], "--batch dynamic --size 270: give numbers"),
        (["-o", "net.pt2", "--batch", "0"], "The batch to export for is 0; it must be at least 1, or dynamic"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str], message: str, weights: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").touch()
    assert main(["export", "-m", str(weights), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 17}, "The opset is 17; it must be within 18 .. 23"),
        ({"attention": "none"}, "allowed: windows, whole"),
    ],
)
def test_options_of_onnx_that_cannot_be(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra onnx")
    with pytest.raises(UserError, match=message):
        export_onnx(upscaler_of(VARIANTS["table"]), tmp_path / "net.onnx", **arguments)


def test_an_old_pytorch(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    upscaler = load(weights, device="cpu")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu126"))
    with pytest.raises(UserError, match=r"Exporting needs PyTorch 2\.10 or newer; this is 2\.9\.1\+cu126"):
        export_program(upscaler, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
