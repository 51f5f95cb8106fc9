"""`basicsr warmup`: what it makes ready, what it says, and its exit status."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from esc_arch.cli import main, warmup


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., float]], None]:
    """Replaces what builds the C++ operators, which may be long built or never be here."""

    def replace(build: Callable[..., float]) -> None:
        monkeypatch.setattr(warmup.cpu, "ready", lambda: False)
        monkeypatch.setattr(warmup.cpu, "build", build)
        monkeypatch.setattr(warmup.cpu, "origin", lambda: "built here, kept in /cache/native-1")

    replace(lambda progress: 31.4)
    return replace


def raising(cause: Exception | None) -> Callable[..., float]:
    def build(progress: Any) -> float:
        raise RuntimeError("The C++ operators cannot be built: the reason.") from cause

    return build


@pytest.mark.usefixtures("building")
def test_base_networks_without_an_option_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--size", "5x7", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "C++ operators: ready after 31.4 s, built here, kept in /cache/native-1\n" in out
    for scale in (2, 3, 4):
        assert f"ESC x{scale} on cpu: ready. The first image took " in out
    assert "(attn_type: auto)" in out
    assert "triton cannot run here: it runs on GPUs" in out


@pytest.mark.parametrize(("cause", "status"), [(None, 0), (OSError("the disk is full"), 1)])
def test_operators_that_cannot_be_built(
    building: Callable[..., None], run_basicsr: Any, train_options: Any, cause: Exception | None, status: int
) -> None:
    building(raising(cause))
    run = run_basicsr("warmup", train_options, "--size", "8x8", "--device", "cpu")
    assert run.status == status
    assert "The C++ operators cannot be built: the reason." in run.out
    assert "PyTorch's own operators are used instead" in run.out
    assert "trial.yml on cpu: ready" in run.out


@pytest.mark.usefixtures("building")
def test_a_network_to_train_runs_backward_in_its_precision(
    run_basicsr: Any, train_options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_options["train"] |= {"amp": "bf16", "channels_last": True, "compile": True}
    made: list[Any] = []
    original = warmup._from_option_file
    monkeypatch.setattr(warmup, "_from_option_file", lambda file: made.extend(original(file)) or tuple(made))
    run = run_basicsr("warmup", train_options, "--size", "8x8", "--device", "cpu")
    assert run.status == 0, run.err
    assert "trial.yml on cpu: ready. The first forward and backward pass took " in run.out
    assert "window attention in bfloat16: " in run.out
    assert "flex cannot run here: PyTorch's flex attention has no backward pass on the CPU" in run.out
    assert made[0].proj.weight.grad.abs().sum() > 0
    assert made[0].blocks[0].attn.to_qkv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("building")
@pytest.mark.parametrize("again", [[], ["--again"]])
def test_kernels_are_tried_on_gpus_alone(
    run_basicsr: Any, test_options: Any, monkeypatch: pytest.MonkeyPatch, again: list[str]
) -> None:
    """Before the networks that use them are made ready."""
    done: list[Any] = []
    monkeypatch.setattr(warmup, "autotune_gpus", lambda **asked: done.append(asked))
    assert run_basicsr("warmup", test_options, "--size", "8x8", "--device", "cpu", *again).status == 0
    assert done == []
    monkeypatch.setattr(warmup, "_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(warmup, "_warm_up", lambda *_: done.append("ready"))
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.zeros(size))
    assert run_basicsr("warmup", test_options, "--size", "8x8", *again).status == 0
    assert done == [{"again": bool(again)}, "ready"]


@pytest.mark.usefixtures("building")
def test_a_backend_that_auto_leaves_is_told(
    run_basicsr: Any, test_options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        warmup.WINDOW_ATTENTION.backends["sdpa"], "auto_skip_reasons", lambda *_: ["it is slower"], raising=False
    )
    run = run_basicsr("warmup", test_options, "--size", "8x8", "--device", "cpu")
    assert "  auto skips sdpa: it is slower\n" in run.out


@pytest.mark.usefixtures("building")
def test_a_network_to_test_has_no_backward_pass(run_basicsr: Any, test_options: Any) -> None:
    test_options["network_g"]["attn_type"] = "naive"
    run = run_basicsr("warmup", test_options, "--size", "8x8", "--device", "cpu")
    assert run.status == 0
    assert "The first image took " in run.out
    assert "window attention in float32: naive (attn_type: naive)" in run.out


@pytest.mark.usefixtures("building")
def test_a_backend_asked_for_by_name_that_cannot_run(run_basicsr: Any, train_options: Any) -> None:
    train_options["network_g"]["attn_type"] = "Flex"
    run = run_basicsr("warmup", train_options, "--size", "8x8", "--device", "cpu")
    assert run.status == 2
    assert "trial.yml: attn_type flex cannot run here. flex: PyTorch's flex attention has no backward" in run.err


@pytest.mark.usefixtures("building")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_g": None}, "network_g: missing; ESCModel needs it"),
        ({"network_g": {"type": "ESC", "upscaling_factor": 2, "dim": 7}}, "network_g: .*must divide dim = 7"),
        ({"network_g": {"type": "ESX"}}, "network_g:type: 'ESX' is not known. .* name the module: --import MODULE"),
        ({"train": {"amp": "fp8"}}, "train:amp: 'fp8' given; must be bf16 or fp16"),
    ],
)
def test_option_files_that_cannot_be_used(
    run_basicsr: Any, train_options: Any, change: dict[str, Any], message: str
) -> None:
    run = run_basicsr("warmup", train_options | change, "--device", "cpu")
    assert run.status == 2
    assert re.search(rf"trial\.yml:\d+:\d+: {message}", run.err)


@pytest.mark.parametrize("size", ["64", "0x8", "axb", "8x8x8"])
def test_a_size_that_is_none(capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert main(["warmup", "--size", size]) == 2
    message = f"basicsr warmup: --size {size}: give rows and columns of the LR image, such as 128x128."
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["warmup", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no GPU here. Use --device cpu, or auto." in capsys.readouterr().err
