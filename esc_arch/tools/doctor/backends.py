"""Which backends can run here, which one `auto` takes, and whether they compute what the reference does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .context import Context
from .report import OK, PROBLEM, WARNING, Finding
from .subprocess_worker import JobFailed

__all__ = ["examine"]

#: Types of numbers that are looked at on a device. Half precision is for GPUs.
_TYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
_OPERATIONS = ("window attention", "ConvAttn", "ConvFFN", "LayerNorm", "3x3 convolution", "window attention, factors")
_INSTEAD = {
    "cpu": "ESC_ARCH_NATIVE=0 in the environment switches the C++ operators off.",
    "triton": "ESC_ARCH_TRITON=0 in the environment keeps auto from it.",
    "triton_folded": "ESC_ARCH_TRITON=0 in the environment keeps auto from it.",
}


def examine(context: Context) -> Iterator[Finding]:
    """A line for each backend of each operation, on the CPU and on the first GPU."""
    for device in _devices(context):
        for kind in _TYPES[device]:
            for operation in _OPERATIONS:
                yield from _operation(context, operation, device, kind)


def _devices(context: Context) -> list[str]:
    try:
        found = context.worker.call("esc_arch.tools.doctor.probes:gpus")
    except JobFailed:  # told with the GPUs
        return ["cpu"]
    return ["cpu", "cuda"] if found["devices"] else ["cpu"]


def _operation(context: Context, operation: str, device: str, kind: str) -> Iterator[Finding]:
    name = f"{operation}, {device} {kind}"
    try:
        found = context.worker.call("esc_arch.tools.doctor.self_tests:examine", operation, device, kind)
    except JobFailed as failure:
        yield Finding(name, f"not known which backends can run: {failure}", PROBLEM, "Report this.")
        return
    auto, refusals = found["auto"], found["reasons"]
    chosen = " and ".join(dict.fromkeys(f"{each}" for each in auto.values()))
    told = chosen if len(set(auto.values())) < 2 else f"{auto['inference']}, in training {auto['training']}"
    yield Finding(name, f"auto takes {told}", data={"auto": auto})
    for backend, reasons in refusals.items():
        key = f"{name}: {backend}"
        in_training = found["reasons_in_training"][backend]
        left = {mode: why[backend] for mode, why in found["left_by_auto"].items() if backend in why}
        facts = {
            "can_run": not reasons, "reasons": reasons, "reasons_in_training": in_training, "left_by_auto": left,
        }  # fmt: skip
        if reasons:
            yield Finding(key, f"cannot run: {'; '.join(reasons)}", data=facts)
            continue
        if context.args.no_test:
            result = Finding(key, "can run", data=facts)
        else:
            context.tell(f"{key} ...")
            result = _tested(context, key, (operation, backend, device, kind), facts, backend in auto.values())
        yield replace(result, text=result.text + _left(left))


def _left(reasons: dict[str, list[str]]) -> str:
    """That auto does not take a backend that can run, and why: said once where the reasons are those of every mode."""
    told = {mode: "; ".join(why) for mode, why in reasons.items()}
    if not told:
        return ""
    if len(told) > 1 and len(set(told.values())) == 1:
        return f"; auto does not take it: {next(iter(told.values()))}"
    return "".join(f"; auto does not take it in {mode}: {why}" for mode, why in told.items())


def _tested(
    context: Context, key: str, test: tuple[str, str, str, str], facts: dict[str, Any], is_chosen: bool
) -> Finding:
    """A wrong backend is a problem where auto takes it, and a warning where nobody meets it without asking."""
    bad = PROBLEM if is_chosen else WARNING
    advice = f"{_INSTEAD.get(test[1], 'Name another backend.')} Report this."
    trainable = not facts["reasons_in_training"]
    try:
        result = context.worker.call("esc_arch.tools.doctor.self_tests:compare", *test, trainable)
    except JobFailed as failure:
        if failure.late:
            advice = "It may still be compiling: try a longer --timeout."
        return Finding(key, f"self-test: {failure}", bad, advice, facts)
    errors = {name: result[name] for name in ("forward", "gradients") if name in result}
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not trainable:
        told += f", no gradients: {'; '.join(facts['reasons_in_training'])}"
    text = f"self-test: error {told} (at most {result['tolerance']:.0e}), {result['seconds']:.2f} s"
    wrong = max(errors.values()) > result["tolerance"]
    return Finding(key, f"WRONG, {text}" if wrong else text, bad if wrong else OK, advice * wrong, facts | result)
