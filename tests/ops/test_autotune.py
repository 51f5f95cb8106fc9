"""Trials of backends: what passes and what does not, and what `auto` makes of the results."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from esc_arch.ops import triton_support
from esc_arch.ops.autotune import results as files
from esc_arch.ops.autotune import trial
from esc_arch.ops.autotune.results import (
    MODES,
    NETWORKS,
    PRECISIONS,
    Case,
    Network,
    TrialResult,
    file_of,
    load,
    nearest,
    save,
)
from esc_arch.ops.autotune.trial import cases
from esc_arch.ops.conv_attn import triton
from esc_arch.ops.conv_attn.api import CONV_ATTN
from esc_arch.ops.window_attention import WINDOW_ATTENTION, window_attention

BACKENDS = WINDOW_ATTENTION.backends
TINY = Network(16, 2, 4, 4, 3, 8, small=(1, 5, 7), image=(1, 4, 5), patches=(1, 4, 4))
CPU = torch.device("cpu")
TRITON_OF = files._triton
CASE = Case("window attention", "triton", "ESC", "float32", "inference")
TIMES = {"NCHW": (1.2, 1.9), "channels_last": (1.0, 1.9)}
PASSED = TrialResult("", "the result", 1e-6, 2e-6, "sdpa", TIMES)
SLOW = TrialResult("", "the result", 1e-6, 2e-6, "sdpa", {"NCHW": (1.94, 1.2), "channels_last": (1.0, 1.9)})
FAILED = TrialResult("it ended with signal SIGABRT")


# --- a trial --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrialResult]:
    """Tries a function as a backend of window attention."""

    def attempt(forward: Any, mode: str = "training", precision: str = "float32", *reasons: str) -> TrialResult:
        made = SimpleNamespace(
            forward=forward, unsupported_reasons=lambda *_: list(reasons), auto_skip_reasons=lambda *_: []
        )
        monkeypatch.setitem(BACKENDS, "tried", made)
        monkeypatch.setattr(WINDOW_ATTENTION, "order", ("tried", "flash", "sdpa"))
        return trial.run(Case("window attention", "tried", "tiny", precision, mode), TINY, CPU, 1)

    return attempt


def right(*arguments: Any) -> Tensor:
    return BACKENDS["sdpa"].forward(*arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_exact_backend_passes(tried: Any, precision: str, mode: str) -> None:
    tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    result = tried(right, mode, precision)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == tf32
    assert result.failure == "" and result.baseline == "sdpa"
    assert min(result.error, result.plain_error) > 0
    assert set(result.milliseconds) == {"NCHW", "channels_last"}
    assert all(time > 0 for times in result.milliseconds.values() for time in times)
    assert str(result).startswith("exact (error ")


@pytest.mark.usefixtures("native")
def test_conv_attn_is_tried_with_its_own_shapes() -> None:
    """Sums of thousands of pixels in another order pass, too."""
    network = replace(NETWORKS["ESC"], patches=(1, 4, 4))
    found = trial.run(Case("ConvAttn", "cpu", "ESC", "float32", "training"), network, CPU, 1)
    assert found.failure == ""
    assert found.part in CONV_ATTN.parts
    assert found.baseline == "cpu"


def wrong_gradient(*arguments: Any) -> Tensor:
    out = right(*arguments)
    return out.detach() + 0.99 * (out - out.detach())


def test_a_wrong_gradient_fails_in_training_alone(tried: Any) -> None:
    assert tried(wrong_gradient, "inference").failure == ""
    assert tried(wrong_gradient).failure.startswith("the gradient of the projection is off by ")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda *a: 1.001 * right(*a), r"^the result is off by \d\.\de-0\d, plain PyTorch by \d\.\de-07$"),
        (lambda *a: right(*a) * torch.nan, "^the result is not finite$"),
        (lambda *a: right(*a).double(), r"^the result is torch\.float64, not torch\.float32$"),
        (lambda *a: right(*a).roll(1, 3), "^the result is off by"),
    ],
)
def test_a_wrong_result_fails(tried: Any, forward: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(tried(forward, "inference").failure)


def test_a_result_that_changes_fails(tried: Any) -> None:
    numbers = itertools.count()
    failure = tried(lambda *a: right(*a) * (1 + next(numbers) % 2 * 2**-23), "inference").failure
    assert failure == "the result differs from one run to the next"


def test_a_backend_that_cannot_run_fails(tried: Any) -> None:
    assert tried(right, "inference", "float32", "too old", "too small").failure == (
        "it cannot run here: too old; too small"
    )


def test_all_that_auto_takes_after_a_trial_is_tried() -> None:
    found = {(case.operation, case.backend) for case in cases()}
    assert found == {("window attention", "triton"), ("ConvAttn", "triton")}
    assert len(list(cases())) == len(found) * len(NETWORKS) * len(PRECISIONS) * len(MODES)


def test_the_nearest_network() -> None:
    assert [nearest(channels=count) for count in (16, 64, 128, 129, 192)] == 3 * ["ESC"] + 2 * ["ESC-XL"]
    assert [nearest(pdim=count) for count in (4, 16, 32, 48)] == 3 * ["ESC"] + ["ESC-XL"]


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one, and a Triton that need not be there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ESC_ARCH_TRITON", raising=False)
    monkeypatch.setattr(files, "_triton", lambda: "3.0")
    load.cache_clear()
    yield tmp_path / "esc_arch"
    load.cache_clear()


def write(*found: tuple[Case, TrialResult]) -> Path:
    save(CPU, dict(found))
    return file_of(CPU)


def test_what_is_written_is_read(cache: Path) -> None:
    training = CASE._replace(mode="training")
    assert load("cpu", None) == {}
    file = write((CASE, PASSED), (training, FAILED))
    assert file.parent == cache
    found = load("cpu", None)
    assert str(found[CASE]) == str(PASSED) and found[training] == FAILED


@pytest.mark.parametrize(
    "change",
    [
        {"FORMAT": "99"},
        {"_triton": lambda: "3.1"},
        {"_digest": lambda: "another"},
        {"_hardware": lambda device: {"device": "another", "capability": "8.0"}},
    ],
)
def test_results_of_something_else_are_not_read(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file = write((CASE, PASSED))
    for name, value in change.items():
        monkeypatch.setattr(files, name, value)
    assert file_of(CPU) != file
    assert load("cpu", None) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1]",
        lambda text: text.replace('"error": 1e-06', '"error": null'),
        lambda text: text.replace("1.2", "0"),
        lambda text: text.replace('"backend"', '"end"'),
        lambda text: text.replace('"part"', '"apart"'),
    ],
)
def test_a_damaged_file_is_told(damage: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    file = write((CASE, PASSED))
    file.write_text(damage(file.read_text()))
    assert load("cpu", None) == {}
    assert f"{file} is damaged. `basicsr warmup` tries them again." in caplog.text


def test_a_file_that_cannot_be_read_is_told(caplog: pytest.LogCaptureFixture) -> None:
    file = file_of(CPU)
    file.mkdir(parents=True)
    assert load("cpu", None) == {}
    assert f"{file} cannot be read: Is a directory." in caplog.text


def test_results_that_others_may_have_written(caplog: pytest.LogCaptureFixture) -> None:
    file = write((CASE, PASSED))
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o660)
    load.cache_clear()
    assert load("cpu", None) == {}
    assert f"{file} cannot be read: {file} can be written by other users" in caplog.text


def test_a_broken_triton_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write((CASE, PASSED))
    monkeypatch.setattr(files, "_triton", TRITON_OF)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert load("cpu", None) == {}
    assert "Triton kernels: triton cannot be imported: " in caplog.text


# --- what auto makes of it ------------------------------------------------------------------------------------------


def reasons_for(case: Case, device: str = "cuda") -> list[str]:
    """Those of this case, whose precision is float32."""
    return files.auto_skip_reasons(
        case.operation, case.network, torch.float32, False, case.mode == "training", device, 0
    )


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes what was found, on whatever device."""
    monkeypatch.setattr(files, "_hardware", lambda device: {"device": "GPU", "capability": "9.0"})
    return write


@pytest.mark.parametrize(
    ("known", "reasons"),
    [
        ({}, ["not tried on this GPU yet: `basicsr warmup` tries it"]),
        ({CASE._replace(mode="training"): PASSED}, ["not tried on this GPU yet: `basicsr warmup` tries it"]),
        ({CASE: PASSED}, []),
        ({CASE: SLOW}, ["slower than sdpa here (1.94 against 1.2 ms)"]),
        (
            {CASE: FAILED},
            ["failed its trial on this GPU: it ended with signal SIGABRT; `basicsr warmup --again` tries it again"],
        ),
    ],
)
def test_reasons(found: Any, known: dict[Case, TrialResult], reasons: list[str]) -> None:
    found(*known.items())
    assert reasons_for(CASE) == reasons


def test_the_environment_decides_first(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found((CASE, PASSED))
    for switch, device, reasons in (
        ("0", "cuda", ["ESC_ARCH_TRITON=0 keeps auto from it"]),
        ("1", "cuda", []),
        ("1", "cpu", ["on a CPU its kernels are interpreted, for tests alone"]),
    ):
        monkeypatch.setenv("ESC_ARCH_TRITON", switch)
        assert reasons_for(CASE, device) == reasons
    found((CASE, FAILED))
    monkeypatch.setenv("ESC_ARCH_TRITON", "1")
    assert reasons_for(CASE) == []


def test_the_command_that_tries_them_is_told_once(found: Any, caplog: pytest.LogCaptureFixture) -> None:
    files._advise.cache_clear()
    with caplog.at_level(logging.INFO, logger="esc_arch"):
        found((CASE, PASSED))
        reasons_for(CASE._replace(mode="training"))
        assert not caplog.messages
        found()
        for mode in 2 * MODES:
            reasons_for(CASE._replace(mode=mode))
    assert caplog.messages == [
        "There are faster kernels for this GPU, not tried on it yet: `basicsr warmup` tries them."
    ]


@pytest.mark.parametrize("result", [PASSED, SLOW, FAILED, None])
@torch.no_grad()
def test_auto_follows_the_result(found: Any, result: TrialResult | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory, which knows no autocast, stands in for a GPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(triton_support, "missing", lambda *_: "")
    conv = Case("ConvAttn", "triton", "ESC", "tf32", "inference")
    monkeypatch.setattr(triton, "tf32_in_convolutions", lambda: True)
    found(*((case, result) for case in (CASE, conv) if result is not None))
    passes = result is PASSED
    questions = torch.empty(1, 48, 4, 4, device="meta"), torch.empty(1, 49, device="meta"), 4, 1
    attention = WINDOW_ATTENTION.explain(*questions)
    assert attention.chosen == ("triton" if passes else "sdpa")
    assert attention.reasons["triton"] == []
    assert set(attention.auto_skip_reasons) == (set() if passes else {"triton"})
    called = []
    for name in ("triton", "sdpa"):
        monkeypatch.setattr(BACKENDS[name], "forward", lambda *_, name=name: called.append(name))
    for backend in ("auto", "triton"):
        window_attention(*questions[:2], window=4, heads=1, backend=backend)
    assert called == [attention.chosen, "triton"]
    kernels = [torch.empty(shape, device="meta") for shape in ((1, 4, 5, 5), (4, 4, 3, 3), (1, 4, 3, 3))]
    assert CONV_ATTN.explain(*kernels, True).chosen == ("triton" if passes else "reference")


@pytest.mark.parametrize("result", [PASSED, SLOW])
def test_a_compiler_follows_the_result(found: Any, result: TrialResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole choice is a constant of its one graph."""
    monkeypatch.setattr(triton_support, "missing", lambda *_: "")
    monkeypatch.setattr(WINDOW_ATTENTION, "order", ("triton", "naive"))
    found((CASE._replace(mode="training"), result))
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    attend = torch.compile(
        lambda qkv, table: window_attention(qkv, table, window=4, heads=1), backend=compiler, fullgraph=True
    )
    leaves = [torch.empty(shape, device="meta", requires_grad=True) for shape in ((1, 48, 5, 7), (1, 49))]
    assert attend(*leaves).shape == (1, 16, 5, 7)
    assert ["esc_arch.window_attention_triton" in str(graph.graph) for graph in graphs] == [result is PASSED]
