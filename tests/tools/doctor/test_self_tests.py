"""The doctor's comparison of backends with their references, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctor_context import by_key, context
from torch import Tensor

from esc_arch.tools.doctor import backends, self_tests
from esc_arch.tools.doctor.self_tests import OPERATIONS, TOLERANCES, compare, examine
from esc_arch.tools.doctor.subprocess_worker import JobFailed

QUICK = [
    (operation, name)
    for operation, (described, _) in OPERATIONS.items()
    for name in described.backends
    if name not in ("flex", "flex_flash", "triton", "triton_folded", "cpu")
    and (name, operation) != ("flash", "window attention")
]


def test_all_operations_are_shown() -> None:
    assert tuple(OPERATIONS) == backends._OPERATIONS


@pytest.mark.parametrize(("operation", "backend"), QUICK)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backends_agree_with_their_reference(operation: str, backend: str, dtype: str) -> None:
    result = compare(operation, backend, "cpu", dtype, True)
    assert 0 < result["forward"] < result["tolerance"] == TOLERANCES[getattr(torch, dtype)]
    assert 0 < result["gradients"] < result["tolerance"]
    assert "gradients" not in compare(operation, backend, "cpu", dtype, False)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_the_cpp_operators_are_chosen_and_agree(operation: str) -> None:
    found = examine(operation, "cpu", "float32")
    assert found["auto"] == {"inference": "cpu", "training": "cpu"}
    assert found["reasons"]["cpu"] == []
    result = compare(operation, "cpu", "cpu", "float32", True)
    assert max(result["forward"], result["gradients"]) < result["tolerance"]


def test_reasons_in_training_are_told_apart() -> None:
    found = examine("window attention", "cpu", "float32")
    assert found["reasons_in_training"]["flex"][0] == "PyTorch's flex attention has no backward pass on the CPU"
    assert found["reasons_in_training"]["flex"][0] not in found["reasons"]["flex"]
    assert "flash kernels take biases that are a product of two factors" in found["reasons"]["flash"][0]


# --- what is said -------------------------------------------------------------------------------------------------


def sections(**answers: Any) -> dict[str, Any]:
    no_gpu = {"devices": [], "reason": "none"}
    return by_key(backends.examine(context(**({"gpus": no_gpu} | answers))))


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the backends of LayerNorm; the reference stays."""

    def replace(order: tuple[str, ...], **others: Callable[..., Tensor]) -> None:
        described, _ = OPERATIONS["LayerNorm"]
        made = {name: SimpleNamespace(unsupported_reasons=lambda *_: [], forward=each) for name, each in others.items()}
        monkeypatch.setattr(described, "backends", {"reference": described.reference} | made)
        monkeypatch.setattr(described, "order", order)
        monkeypatch.setattr(backends, "_OPERATIONS", ("LayerNorm",))
        monkeypatch.setattr(self_tests, "OPERATIONS", {"LayerNorm": OPERATIONS["LayerNorm"]})

    return replace


def reference(*arguments: Any) -> Tensor:
    from esc_arch.ops.layer_norm import reference as module

    return module.forward(*arguments)


def wrong_gradient(*arguments: Any) -> Tensor:
    out = reference(*arguments)
    return out.detach() + 0.9 * (out - out.detach())


@pytest.mark.parametrize(("order", "status"), [(("other", "reference"), "problem"), (("reference",), "warning")])
@pytest.mark.parametrize(
    "forward", [lambda *a: 1.001 * reference(*a), wrong_gradient, lambda *a: reference(*a) * torch.nan]
)
def test_a_wrong_backend(replace: Any, forward: Any, order: tuple[str, ...], status: str) -> None:
    replace(order, other=forward)
    found = sections()
    other = found["LayerNorm, cpu float32: other"]
    assert other.text.startswith("WRONG, self-test: error forward ")
    assert other.status == status
    assert other.advice == "Name another backend. Report this."
    assert found["LayerNorm, cpu float32: reference"].status == "ok"
    assert found["LayerNorm, cpu float32"].text == f"auto takes {order[0]}"


def test_a_right_backend(replace: Any) -> None:
    replace(("other",), other=reference)
    other = sections()["LayerNorm, cpu float32: other"]
    assert other.status == "ok"
    assert "WRONG" not in other.text and "gradients" in other.text and "(at most 2e-05)" in other.text
    assert other.advice == ""


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        (JobFailed("the process ended with signal SIGSEGV", crashed=True), "Name another backend. Report this."),
        (JobFailed("not finished after 60 s of running", late=True), "It may still be compiling"),
    ],
)
def test_a_crash_or_a_hang_is_a_line(replace: Any, failure: JobFailed, advice: str) -> None:
    replace(("other",), other=reference)
    found = sections(compare=failure)
    other = found["LayerNorm, cpu float32: other"]
    assert other.status == "problem"
    assert other.text == f"self-test: {failure}"
    assert advice in other.advice
    assert found["LayerNorm, cpu float32: reference"].status == "warning"


@pytest.mark.parametrize("no_test", [True, False])
@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"inference": {"other": ["slow"]}, "training": {"other": ["slow"]}}, "; auto does not take it: slow"),
        (
            {"inference": {"other": ["slow"]}, "training": {"other": ["wrong", "odd"]}},
            "; auto does not take it in inference: slow; auto does not take it in training: wrong; odd",
        ),
        ({"inference": {}, "training": {"other": ["wrong"]}}, "; auto does not take it in training: wrong"),
        ({"inference": {}, "training": {}}, ""),
    ],
)
def test_a_backend_that_auto_leaves(replace: Any, left: dict[str, Any], said: str, no_test: bool) -> None:
    replace(("reference",), other=reference)
    nothing = {"reference": [], "other": []}
    auto = dict.fromkeys(("inference", "training"), "reference")
    answer = {"auto": auto, "reasons": nothing, "reasons_in_training": nothing, "left_by_auto": left}
    asked = context(no_test=no_test, gpus={"devices": [], "reason": ""}, examine=lambda *_: answer)
    other = by_key(backends.examine(asked))["LayerNorm, cpu float32: other"]
    assert other.text.startswith("can run" if no_test else "self-test: error ")
    assert other.text.endswith(said) and ("auto" in other.text) == bool(said)
    assert other.data["can_run"] and set(other.data["left_by_auto"]) == {mode for mode, why in left.items() if why}


def test_operations_that_cannot_be_asked() -> None:
    found = sections(examine=JobFailed("ImportError: no torch"))
    assert found["ConvFFN, cpu float32"].text == "not known which backends can run: ImportError: no torch"
    assert found["ConvFFN, cpu float32"].status == "problem"


def test_no_test_only_asks() -> None:
    asked = context(no_test=True, gpus={"devices": [], "reason": ""}, compare=JobFailed("tested"))
    found = by_key(backends.examine(asked))
    assert found["window attention, cpu float32: naive"].text == "can run"
    assert found["window attention, cpu float32: flash"].text.startswith("cannot run: flash kernels take biases that")


def test_a_gpu_is_looked_at_in_two_types() -> None:
    answer = {"auto": {"inference": "a", "training": "b"}, "reasons": {"c": ["why"]}, "reasons_in_training": {"c": []}}
    answer["left_by_auto"] = {}
    found = by_key(backends.examine(context(gpus={"devices": [{}], "reason": ""}, examine=lambda *_: answer)))
    assert found["ConvFFN, cuda bfloat16"].text == "auto takes a, in training b"
    assert "ConvFFN, cuda float32" in found and "ConvFFN, cpu bfloat16" not in found
