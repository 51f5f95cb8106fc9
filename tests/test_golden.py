"""All networks against recorded weights, outputs, gradients and losses of the original networks (`tests/golden`)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import build_network
from networks import BACKENDS, DEVICES, TRAINABLE, max_error, reference_esc
from safetensors.torch import load_file
from torch import Tensor, nn

from esc_arch.checkpoints.recognition import own_names

FOLDER = Path(__file__).parent / "golden"
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
FILES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
FACTORS = [name for name in FILES if MANIFEST[name]["options"].get("attn_type") == "FlashBias"]
ESC_FILES = [name for name in FILES if MANIFEST[name]["type"] == "ESC" and name not in FACTORS]
TRAINED_FILES = [name for name in FILES if "losses" in MANIFEST[name]]
#: Every upsampler is tried with the default backend, a network of every type with all of them.
OUTPUTS = [
    *((name, "auto") for name in FILES),
    *((name, backend) for name in TRAINED_FILES for backend in ("naive", "sdpa")),
]
TOLERANCE = 1e-4  # absolute; what the recorded numbers are good for, having been computed in float32


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def part(name: str, prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix: `weights.`, `grad.` or `train.`."""
    return {key.removeprefix(prefix): value for key, value in tensors(name).items() if key.startswith(prefix)}


def golden_net(name: str, backend: str, device: str = "cpu") -> nn.Module:
    entry = MANIFEST[name]
    key = "backend" if entry["type"] == "ESCRIB" or name in FACTORS else "attn_type"
    net: nn.Module = build_network({"type": entry["type"], **entry["options"], key: backend})
    net.load_state_dict(own_names(part(name, "weights.")), strict=True)
    return net.to(device).eval()


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU convolutions of float32 are computed with 10 bits of mantissa unless this is said."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_no_golden_file_is_missing() -> None:
    assert set(MANIFEST) == set(FILES)
    assert {MANIFEST[name]["type"] for name in FILES} == {"ESC", "ESCFP", "ESCLTE", "ESCReal", "ESCRealM", "ESCRIB"}
    assert len(ESC_FILES) >= 4
    assert len(TRAINED_FILES) >= 7


@pytest.mark.parametrize("name", ESC_FILES)
def test_the_reference_of_these_tests(name: str) -> None:
    """What the other tests trust for sizes that were not recorded has to agree with the recorded ones itself."""
    options = MANIFEST[name]["options"]
    sizes = {"window": options["window_size"], "heads": options["num_heads"], "scale": options["upscaling_factor"]}
    output = reference_esc(part(name, "weights."), tensors(name)["input"], **sizes)
    assert max_error(output, tensors(name)["output"]) < TOLERANCE / 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "backend"), OUTPUTS)
def test_output(name: str, backend: str, device: str) -> None:
    net = golden_net(name, backend, device)
    outputs = part(name, "output")
    for of_scale, expected in outputs.items():  # "" alone, or such as ".x2.5" for networks of any scale
        asked = {"scale": float(of_scale.removeprefix(".x"))} if of_scale else {}
        with torch.no_grad():
            output = net(tensors(name)["input"].to(device), **asked)
        assert output.dtype == torch.float32
        assert max_error(output, expected) < TOLERANCE
    assert len(outputs) == (3 if MANIFEST[name]["type"] == "ESCLTE" else 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRAINED_FILES)
def test_training_output_without_gradient(name: str, backend: str) -> None:
    net = golden_net(name, backend).train()
    with torch.no_grad():
        output = net(tensors(name)["train.input"])
    assert max_error(output, tensors(name)["train.output"]) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", TRAINABLE)
@pytest.mark.parametrize("name", TRAINED_FILES)
def test_training_output_and_gradients(name: str, backend: str, device: str) -> None:
    net = golden_net(name, backend, device).train()
    train = {key: value.to(device) for key, value in part(name, "train.").items()}
    output = net(train["input"])
    assert max_error(output, train["output"]) < TOLERANCE
    F.l1_loss(output, train["target"]).backward()
    gradients = {key: parameter.grad for key, parameter in net.named_parameters()}
    expected = part(name, "grad.")
    assert gradients.keys() == expected.keys()
    assert {key: error for key in expected if (error := max_error(gradients[key], expected[key])) >= TOLERANCE} == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", TRAINABLE)
@pytest.mark.parametrize("name", TRAINED_FILES)
def test_losses_of_ten_steps(name: str, backend: str, device: str) -> None:
    net = golden_net(name, backend, device).train()
    train = {key: value.to(device) for key, value in part(name, "train.").items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-4, weight_decay=0, betas=(0.9, 0.9))
    losses = []
    for _ in range(10):
        loss = F.l1_loss(net(train["input"]), train["target"])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(MANIFEST[name]["losses"], rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["esc_x2", "esc_rib_x2"])
def test_flex_says_that_it_cannot_train_on_the_cpu(name: str) -> None:
    net = golden_net(name, "flex").train()
    with pytest.raises(RuntimeError, match=r"attn_type flex cannot run here\..*no backward pass on the CPU"):
        net(tensors(name)["train.input"])
