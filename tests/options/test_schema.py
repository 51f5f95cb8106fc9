"""The JSON schema: option files that ship satisfy it, typical mistakes do not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from esc_arch.options import load_yaml
from esc_arch.options import schema as schema_module
from esc_arch.options.schema import options_schema

jsonschema = pytest.importorskip("jsonschema")

HERE = Path(__file__).parent
FILES = [*sorted((HERE.parents[1] / "options").glob("*.yml")), *sorted((HERE / "published").glob("*.yml"))]


@pytest.fixture(scope="module")
def schema() -> Any:
    """As if no other test had registered classes of its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(schema_module, "is_known_code", lambda reader: True)
        return json.loads(json.dumps(options_schema()))


@pytest.fixture(scope="module")
def validator(schema: Any) -> Any:
    kind = jsonschema.Draft202012Validator
    kind.check_schema(schema)
    return kind(schema)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_option_files_satisfy_it(file: Path, validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(load_yaml(file))] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", 5),
        ("nmae", "x"),
        ("model_type", "ESCModl"),
        ("scale", "2"),
        ("num_gpu", "all"),
        ("network_g:type", "ESCC"),
        ("network_g:n_block", 3),
        ("network_g:dim", "64"),
        ("train:total_iter", "5e5"),
        ("train:total_iter", ...),
        ("train:total_iters", 5),
        ("train:ema_decay", 2),
        ("train:optim_g:lr", ...),
        ("train:optim_g:type", "Adamm"),
        ("train:optim_d", {"type": "Adam", "lr": 1e-3, "beta": 1}),
        ("train:scheduler:gama", 0.5),
        ("train:pixel_opt:type", "L1"),
        ("train:losses", {"fft": {"type": "FFTLos"}}),
        ("val:save_img", "yes"),
        ("val:metrics:psnr:crop_border", ...),
        ("val:metrics:psnr:type", "psnr"),
        ("val:protocol", "publishd"),
        ("logger:print_frequency", 5),
        ("datasets:train:gt_sise", 5),
        ("datasets:train:gt_size", "128"),
        ("datasets:trian", {"type": "PairedImageDataset"}),
        ("path:pretrain", "x"),
        ("path:strict_load_g", "no"),
    ],
)
def test_mistakes_do_not(path: str, value: Any, train_options: Any, validator: Any) -> None:
    assert validator.is_valid(train_options)
    opt = section = copy.deepcopy(train_options)
    *sections, key = path.split(":")
    for name in sections:
        section = section[name]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    assert not validator.is_valid(opt)


def test_arguments_come_from_constructors(schema: Any) -> None:
    cases = {
        name: case["then"]
        for case in schema["$defs"]["network"]["allOf"]
        for name in case["if"]["properties"]["type"]["enum"]
    }
    dim = cases["ESC"]["properties"]["dim"]
    assert dim == {"type": ["integer"], "default": 64}
    assert cases["RRDBNet"]["required"] == ["num_in_ch", "num_out_ch"]


def test_what_is_registered_is_in_it() -> None:
    class OtherNetwork(nn.Module):
        def __init__(self, width: int, deep: bool = False) -> None: ...

    ARCH_REGISTRY.register(OtherNetwork)
    try:
        network = options_schema()["$defs"]["network"]
    finally:
        del ARCH_REGISTRY._obj_map["OtherNetwork"]
    assert "OtherNetwork" in network["properties"]["type"]["enum"]
    (case,) = [
        case["then"] for case in network["allOf"] if case["if"]["properties"]["type"]["enum"] == ["OtherNetwork"]
    ]
    assert case["required"] == ["width"] and case["additionalProperties"] is False
    assert case["properties"]["deep"] == {"type": ["boolean"], "default": False}
