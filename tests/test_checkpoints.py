"""Checkpoints of every wrapping are read; what is none is told apart, and nothing in a file is ever run."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from esc_arch.checkpoints import describe_mismatch, load_weights, read_checkpoint, select_weights
from esc_arch.checkpoints.reading import is_safetensors, read_metadata
from esc_arch.errors import UserError

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([7.0, 8.0])}
OTHER = {name: -tensor for name, tensor in WEIGHTS.items()}


def with_prefix(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in WEIGHTS.items()}


def torch_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def read(path: Path, key: str | None = "params") -> dict[str, torch.Tensor]:
    return select_weights(read_checkpoint(path), key, path)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = WEIGHTS) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"params": WEIGHTS, "params_ema": OTHER}, "params"),
        ({"params": OTHER, "params_ema": WEIGHTS}, "params_ema"),
        ({"params": WEIGHTS}, "params_ema"),
        ({"params-ema": WEIGHTS}, "params"),
        ({"params-ema": WEIGHTS, "params": OTHER}, "params-ema"),
        ({"state_dict": WEIGHTS, "epoch": 3}, "params"),
        ({"model": WEIGHTS, "optimizer": {"lr": 0.1}}, "params"),
        ({"params_ema": WEIGHTS, "params": OTHER, "iter": 5}, "net"),
        (WEIGHTS, "params"),
        (WEIGHTS, None),
        ({"params": WEIGHTS}, None),
        (nn.Linear(3, 2).state_dict() | WEIGHTS, "params"),
        ({"params": with_prefix("module.")}, "params"),
        ({"params": with_prefix("_orig_mod.")}, "params"),
        (with_prefix("module._orig_mod."), "params"),
        (with_prefix("_orig_mod.module."), "params"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_in_every_wrapping(content: Any, key: str | None, zipped: bool, tmp_path: Path) -> None:
    """Fault 35."""
    path = tmp_path / "net.pth"
    path.write_bytes(torch_bytes(content, _use_new_zipfile_serialization=zipped))
    assert_same(read(path, key))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_are_read(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(with_prefix(prefix), path)
    assert_same(read(path))


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net.ckpt", "net"])
@pytest.mark.parametrize("way", ["safetensors", "zip", "old format"])
def test_the_content_decides_not_the_name(name: str, way: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if way == "safetensors":
        path.write_bytes(safetensors.torch.save(WEIGHTS))
    else:
        path.write_bytes(torch_bytes({"params": WEIGHTS}, _use_new_zipfile_serialization=way == "zip"))
    assert is_safetensors(path) == (way == "safetensors")
    assert_same(read(path))


def test_safetensors_whose_header_is_as_long_as_a_zip_is_named(tmp_path: Path) -> None:
    """A length of 0x4b50 is "PK" in the file."""
    path = tmp_path / "net.pth"
    padding = 0x4B50 - len(_header(safetensors.torch.save(WEIGHTS, {"x": ""})))
    path.write_bytes(safetensors.torch.save(WEIGHTS, {"x": "." * padding}))
    assert path.read_bytes().startswith(b"PK")
    assert_same(read(path))


def _header(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def test_weights_saved_elsewhere_are_read_onto_the_cpu(tmp_path: Path) -> None:
    """Fault 6: a file from a GPU."""
    content = torch_bytes({"params": WEIGHTS}, _use_new_zipfile_serialization=False)
    path = tmp_path / "net.pth"
    path.write_bytes(content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert path.read_bytes() != content
    assert_same(read(path))


def test_taking_another_entry_is_logged(basicsr_log: Any) -> None:
    select_weights({"params": WEIGHTS}, "params_ema", "net.pth")
    assert "net.pth has no 'params_ema'; using 'params'." in basicsr_log.text


# --- what is no checkpoint ----------------------------------------------------------------------------------------

GOOD = torch_bytes({"params": {"weight": torch.ones(100, 3)}})
LEGACY = torch_bytes({"params": {"weight": torch.ones(100, 3)}}, _use_new_zipfile_serialization=False)
NONE = {
    "empty": (b"", "it is empty"),
    "cut short": (GOOD[: len(GOOD) // 2], "was cut short .* Get it again"),
    "end missing": (GOOD[:-20], "was cut short"),
    "cut short, old format": (LEGACY[: len(LEGACY) // 2], "was cut short .*Get it again"),
    "web page": (b"\n <!DOCTYPE html><html>Sign in</html>", "it is a web page. Download the file itself"),
    "HTML": (b"<HTML><body>404</body></HTML>", "it is a web page"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "ONNX": (b"\x08\x0a\x12\x07pytorch\x1a\x03" + bytes(100), "it is an ONNX model.*Give the .pth or .safetensors"),
    "JSON": (b'{"message": "Not found"}', "damaged, or was not written by torch.save"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "damaged, or was not written by torch.save"),
    "text": (b"the weights are elsewhere\n" * 9, "no checkpoint|not written by torch.save"),
    "list": (torch_bytes([1, 2]), "holds a list, not a dictionary of weights"),
}


@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_checkpoint_is_said_to_be_none(kind: str, tmp_path: Path) -> None:
    """Fault 35."""
    content, message = NONE[kind]
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice to go on without protection


@pytest.mark.parametrize("content", [b"", b"\x10" * 40, GOOD[:-20], safetensors.torch.save(WEIGHTS)[:-9]])
def test_damaged_safetensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"net\.safetensors .*is (damaged|no checkpoint|not a checkpoint: it is empty)"):
        read_checkpoint(path)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    make(path)
    with pytest.raises(UserError, match=r"net\.pth (is a folder|does not exist)"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("base", ["random", "zip", "old format"])
def test_damage_of_any_kind_is_a_clear_error(base: str, tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "net.pth"
    refused = 0
    for _ in range(150):
        content = bytearray({"random": chance.randbytes(200), "zip": GOOD, "old format": LEGACY}[base])
        for _ in range(4):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            read_checkpoint(path)
        except UserError:
            refused += 1
    assert refused > 50


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", ["zip", "old format", "pickle 2", "pickle 4"])
def test_code_in_a_file_is_not_run(way: str, tmp_path: Path) -> None:
    """Fault 16."""
    trace = tmp_path / "was_run"
    content = {"params": Payload(trace)}
    path = tmp_path / "net.pth"
    if way.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(way[-1])))
    else:
        path.write_bytes(torch_bytes(content, _use_new_zipfile_serialization=way == "zip"))
    refusal = "was not loaded. If you trust" if way != "pickle 4" else "damaged, or was not written by torch.save"
    with pytest.raises(UserError, match=refusal) as error:
        read_checkpoint(path)
    assert not trace.exists()
    assert "weights_only" not in str(error.value)
    pickle.loads(pickle.dumps(content))
    assert trace.exists()  # the payload works


def test_a_training_state_is_not_taken_for_weights() -> None:
    state = {"epoch": 1, "iter": 2, "optimizers": [], "schedulers": []}
    with pytest.raises(UserError, match=r"2\.state holds no weights.*It is a training state.*resume_state"):
        select_weights(state, "params", "2.state")


@pytest.mark.parametrize("content", [{}, {"params": {}}, {"epoch": 3}, {"params": {"lr": 0.1}}])
def test_no_weights(content: Any) -> None:
    with pytest.raises(UserError, match=r"net\.pth holds no weights under 'params' nor under any of"):
        select_weights(content, "params", "net.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_numbers_that_no_network_can_compute_with(value: float, dtype: torch.dtype) -> None:
    """1e300 is infinite in float32, and already in the file in float16."""
    weights = WEIGHTS | {"bias": torch.tensor([1.0, value], dtype=torch.float64).to(dtype)}
    message = r"net\.pth holds bias with 1 of 2 numbers that are infinite or not a number.* Use an earlier checkpoint"
    with pytest.raises(UserError, match=message):
        select_weights({"params": weights}, "params", "net.pth")


# --- loading ------------------------------------------------------------------------------------------------------


def zeros() -> nn.Linear:
    net = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    return net


@pytest.mark.parametrize("strict", [True, False])
def test_what_fits_is_loaded(strict: bool, basicsr_log: Any) -> None:
    net = zeros()
    load_weights(net, WEIGHTS, strict=strict, source="net.pth")
    assert_same(net.state_dict())
    assert not basicsr_log.records


MISFITS = {
    "missing": ({"weight": WEIGHTS["weight"]}, r"1 missing in it \(bias\)"),
    "unknown": (WEIGHTS | {"scale": torch.ones(1)}, r"1 not in the network \(scale\)"),
    "shape": (WEIGHTS | {"bias": torch.ones(3)}, r"1 of other shapes \(bias is \(3,\) and should be \(2,\)\)"),
    **{
        kind: (
            WEIGHTS | {"bias": torch.ones(2, dtype=getattr(torch, kind))},
            rf"1 of other types \(bias is torch\.{kind} and should be torch\.float32: save it as such\)",
        )
        for kind in ("int8", "uint8", "bool")
    },
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_refused_or_listed(kind: str, basicsr_log: Any) -> None:
    weights, message = MISFITS[kind]
    net = zeros()
    with pytest.raises(UserError, match=rf"net\.pth does not fit Linear: {message}.*strict_load_g: false"):
        load_weights(net, weights, strict=True, source="net.pth")
    assert not net.weight.any()  # not half loaded
    load_weights(net, weights, strict=False, source="net.pth")
    assert torch.equal(net.weight, WEIGHTS["weight"])
    loaded = 2 if kind == "unknown" else 1
    assert f"Of net.pth, {loaded} of 2 tensors were loaded: " in basicsr_log.text


@pytest.mark.parametrize("strict", [True, False])
def test_a_network_is_never_left_untrained_silently(strict: bool) -> None:
    """Fault 34."""
    with pytest.raises(UserError, match=r"Nothing in net\.pth fits Linear, so it would stay untrained"):
        load_weights(zeros(), {"other": torch.ones(2)}, strict=strict, source="net.pth")


def test_long_lists_are_cut() -> None:
    (problem,) = describe_mismatch({}, {f"layer{index}": torch.ones(1) for index in range(11)})
    assert problem.startswith("11 not in the network (layer0, layer1")
    assert problem.endswith("layer7 and 3 more)")


def test_a_safetensors_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a\udcff.safetensors"
    path.write_bytes(safetensors.torch.save({"weight": torch.arange(3.0)}, {"a": "b"}))
    assert torch.equal(read_checkpoint(path)["weight"], torch.arange(3.0))
    assert read_metadata(path) == {"a": "b"}
