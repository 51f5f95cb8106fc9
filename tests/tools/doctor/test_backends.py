"""The doctor's comparison of backends with their references, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctor_context import by_key, context
from torch import Tensor

from esc_arch.ops.operation import Explanation
from esc_arch.tools.doctor import machine, self_tests
from esc_arch.tools.doctor.report import Finding
from esc_arch.tools.doctor.self_tests import CASES, TOLERANCES, compare, dispatch
from esc_arch.tools.doctor.subprocess_worker import JobFailed

SLOW = ("flex", "flex_flash", "triton", "cpu")
QUICK = [
    (operation, name)
    for operation, (described, _) in CASES.items()
    for name in described.backends
    if name not in SLOW and (name, operation) != ("flash", "window attention")
]


@pytest.mark.parametrize(("operation", "backend"), QUICK)
def test_backends_agree_with_their_reference(operation: str, backend: str) -> None:
    for dtype, tolerance in TOLERANCES.items():
        errors = compare(operation, "cpu", dtype, backend, gradients=True)
        assert 0 < errors["forward"] < tolerance
        assert 0 < errors["gradients"] < tolerance
    assert "gradients" not in compare(operation, "cpu", "float32", backend, gradients=False)


@pytest.mark.usefixtures("native")
def test_the_cpp_operators_are_chosen_and_agree() -> None:
    found = dispatch("cpu")
    assert [target for target, *_ in found] == [(operation, "cpu", "float32") for operation in CASES]
    for (operation, *kind), auto, names in found:
        assert auto == {"inference": "cpu", "training": "cpu"}
        assert names == list(CASES[operation][0].backends)
        assert max(compare(operation, *kind, "cpu", gradients=True).values()) < TOLERANCES["float32"]


# --- what is said -------------------------------------------------------------------------------------------------

KEY = "LayerNorm, cpu float32"


def section(no_test: bool = False, **answers: Any) -> dict[str, Finding]:
    return by_key(machine.backends(context(no_test=no_test, **answers)))


def test_no_test_only_asks() -> None:
    found = section(no_test=True)
    assert {f"{operation}, cpu float32" for operation in CASES} <= found.keys()
    assert found["window attention, cpu float32: naive"].text == "can run"
    assert found["window attention, cpu float32: flash"].text.startswith("cannot run: flash kernels take biases that")


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the backends of LayerNorm, the only operation then; the reference stays."""

    def replace(order: tuple[str, ...], *, in_training: tuple[str, ...] = (), **others: Callable[..., Tensor]) -> None:
        described, _ = CASES["LayerNorm"]

        def reasons(*_: Any) -> list[str]:
            return list(in_training) if torch.is_grad_enabled() else []

        made = {name: SimpleNamespace(unsupported_reasons=reasons, forward=each) for name, each in others.items()}
        monkeypatch.setattr(described, "backends", {"reference": described.reference} | made)
        monkeypatch.setattr(described, "order", (*order, "reference"))
        monkeypatch.setattr(self_tests, "CASES", {"LayerNorm": CASES["LayerNorm"]})

    return replace


def reference(*arguments: Any) -> Tensor:
    from esc_arch.ops.layer_norm import reference as module

    return module.forward(*arguments)


def wrong_gradient(*arguments: Any) -> Tensor:
    out = reference(*arguments)
    return out.detach() + 0.9 * (out - out.detach())


@pytest.mark.parametrize(("order", "status"), [(("other",), "problem"), ((), "warning")])
@pytest.mark.parametrize(
    "forward", [lambda *a: 1.001 * reference(*a), wrong_gradient, lambda *a: reference(*a) * torch.nan]
)
def test_a_wrong_backend(replace: Any, forward: Any, order: tuple[str, ...], status: str) -> None:
    replace(order, other=forward)
    found = section()
    other = found[f"{KEY}: other"]
    assert other.text.startswith("WRONG, self-test: error forward ")
    assert other.status == status
    assert other.advice == "Name another backend. Report this."
    assert found[f"{KEY}: reference"].status == "ok"
    assert found[KEY].text == f"auto takes {(*order, 'reference')[0]}"


def test_a_right_backend(replace: Any) -> None:
    replace(("other",), in_training=("it is for inference",), other=reference)
    found = section()
    other = found[f"{KEY}: other"]
    assert other.status == "ok" and other.advice == ""
    assert other.text.startswith("self-test: error forward ") and "(at most 2e-05), " in other.text
    assert ", no gradients: it is for inference" in other.text
    assert ", gradients " in found[f"{KEY}: reference"].text
    assert found[KEY].text == "auto takes other, in training reference"


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        (JobFailed("the process ended with signal SIGSEGV"), "Name another backend. Report this."),
        (JobFailed("not finished after 60 s of running", late=True), "try a longer --timeout"),
    ],
)
def test_a_crash_or_a_hang_is_a_line(replace: Any, failure: JobFailed, advice: str) -> None:
    replace(("other",), other=reference)
    found = section(examine=failure)
    other = found[f"{KEY}: other"]
    assert (other.status, other.text) == ("problem", str(failure))
    assert advice in other.advice
    assert found[f"{KEY}: reference"].status == "warning"


@pytest.mark.parametrize("no_test", [True, False])
@pytest.mark.parametrize(
    ("in_inference", "in_training", "said"),
    [
        (["slow"], ["slow"], "; auto does not take it: slow"),
        (
            ["slow"],
            ["wrong", "odd"],
            "; auto does not take it in inference: slow; auto does not take it in training: wrong; odd",
        ),
        ([], ["wrong"], "; auto does not take it in training: wrong"),
        ([], [], ""),
    ],
)
def test_a_backend_that_auto_leaves(
    replace: Any, monkeypatch: Any, in_inference: list[str], in_training: list[str], said: str, no_test: bool
) -> None:
    replace((), other=reference)

    def explain(*_: Any) -> Explanation:
        skipped = in_training if torch.is_grad_enabled() else in_inference
        return Explanation("reference", {"reference": [], "other": []}, {"other": skipped} if skipped else {})

    monkeypatch.setattr(CASES["LayerNorm"][0], "explain", explain)
    other = section(no_test)[f"{KEY}: other"]
    assert other.text.startswith("can run" if no_test else "self-test: error ")
    assert other.text.endswith(said) and ("auto" in other.text) == bool(said)


def test_operations_that_cannot_be_asked() -> None:
    found = section(dispatch=JobFailed("ImportError: no torch"))
    assert found["cpu"].text == "not known which backends can run: ImportError: no torch"
    assert found["cpu"].status == found["cuda"].status == "problem"


def test_a_gpu_is_looked_at_in_two_types(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch("cuda") == [] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(self_tests, "_explain", lambda *target: {})
    found = [target for target, *_ in dispatch("cuda")]
    assert found == [(operation, "cuda", dtype) for dtype in ("float32", "bfloat16") for operation in CASES]


# --- the C++ operators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reasons", "compiler", "status", "text", "advice"),
    [
        ([], ("sh",), "ok", "built here, kept in /cache/esc_arch", ""),
        (["the C++ operators are not built yet"], ("sh",), "warning", "not built yet", "`basicsr warmup` builds"),
        (["compiling the C++ operators failed: no space"], ("sh",), "problem", "no space", "ESC_ARCH_NATIVE=0"),
        (["needs g++"], None, "ok", "needs g++; their cache is /cache", "PyTorch's own operators"),
    ],
)
def test_operators(
    monkeypatch: pytest.MonkeyPatch, reasons: list[str], compiler: Any, status: str, text: str, advice: str
) -> None:
    from esc_arch.ops import cpu
    from esc_arch.ops.cpu import building

    monkeypatch.setattr(cpu, "unsupported_reasons", lambda: reasons)
    monkeypatch.setattr(cpu._State, "library", None)
    monkeypatch.setattr(building, "find_compiler", lambda: compiler and ("g++",))
    monkeypatch.setattr(building, "cache_folder", lambda: "/cache/esc_arch")
    done = SimpleNamespace(stdout="g++ 12\nmore", stderr="")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: done)
    found = by_key(machine.operators(context()))
    assert found["C++ operators"].status == status
    assert text in found["C++ operators"].text and advice in found["C++ operators"].advice
    assert found["C++ compiler"].text == ("g++, g++ 12" if compiler else "no g++ or clang++ found")


def test_operators_that_crash() -> None:
    crash = JobFailed("the process ended with signal SIGILL")
    (found,) = machine.operators(context(cpp_operators=crash))
    assert (found.status, found.text) == ("problem", str(crash)) and "ESC_ARCH_NATIVE=0" in found.advice
