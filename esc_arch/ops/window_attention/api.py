"""Window attention: check the inputs, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esc_arch.ops.cpu import input_reasons
from esc_arch.ops.operation import Operation, SampleShapes, Size, check_shapes, normal, wants_gradients

from . import cpu, flash, flex, flex_flash, reference, sdpa, triton
from .bias import Bias, parameters_of

__all__ = ["WINDOW_ATTENTION", "window_attention", "window_attention_fused"]

#: Weight and bias of a 1 x 1 convolution.
Projection = tuple[Tensor, Tensor | None]
#: Weight, bias and eps of a layer normalisation.
Norm = tuple[Tensor, Tensor, float]


def _inputs(shapes: SampleShapes, size: Size) -> list[Tensor]:
    """The projection, and biases with which the weights are neither flat nor all on one token."""
    batch, height, width = size
    table, factors = (shapes.heads, (2 * shapes.window - 1) ** 2), (shapes.heads, shapes.window**2, shapes.rank)
    qkv, *bias = normal((batch, 3 * shapes.channels, height, width), *([factors] * 2 if shapes.rank else [table]))
    return [qkv, *bias] if shapes.rank else [qkv, 2 * bias[0]]


def _arguments(shapes: SampleShapes, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    qkv, *bias = tensors
    return qkv, tuple(bias) if shapes.rank else bias[0], shapes.window, shapes.heads


WINDOW_ATTENTION = Operation(
    name="window attention",
    option="attn_type",
    backends={
        "naive": reference,
        "sdpa": sdpa,
        "flex": flex,
        "flex_flash": flex_flash,
        "flash": flash,
        "triton": triton,
        "cpu": cpu,
    },
    # `cpu` is taken once it is built, `triton` where it has passed autotuning. Flex attention is taken by name alone:
    # its first call compiles for a minute or more.
    order=("cpu", "triton", "flash", "sdpa", "naive"),
    inputs=_inputs,
    arguments=_arguments,
    parts=("the result", "the gradient of the projection", "the gradient of the biases", "that of the key factor"),
    parameters_stay_float32=True,
)


def window_attention(qkv: Tensor, bias: Bias, *, window: int, heads: int, backend: str = "auto") -> Tensor:
    """Attention within non-overlapping windows, with a position bias (arXiv 2503.06671).

    The map is padded at the bottom and the right by reflection to whole windows and cropped again after. The
    projection comes before the padding here: a 1 x 1 convolution works on each pixel alone, so that equals
    padding the features first, and saves projecting the padding.

    Args:
        qkv: (B, 3C, H, W), channels in the order q, k, v, inside each heads, then head dimension. H, W >= 1.
        bias: a table by relative position, (h, (2w - 1)^2), or two factors, (h, N, r) each; see `Bias`.
        window: w, the side of a window in pixels.
        heads: h.
        backend: one of `WINDOW_ATTENTION.backends`, or auto.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        RuntimeError: the backend requested by name cannot take these inputs; the message lists every reason.
    """
    _check(qkv, 3, bias, window, heads)
    return WINDOW_ATTENTION(backend, qkv, bias, window, heads)


def window_attention_fused(
    x: Tensor,
    to_qkv: Projection,
    bias: Bias,
    to_out: Projection,
    *,
    window: int,
    heads: int,
    norm: Norm | None = None,
    residual: bool = False,
    backend: str = "auto",
) -> Tensor | None:
    """to_out(`window_attention`(to_qkv(norm(x)))), added to x if that is wanted, in one operator.

    Without gradients and on the CPU this saves writing the normalised map, the projection and what was attended to
    memory, and reading them again.

    Args:
        x: (B, C, H, W).
        to_qkv: weight and bias of the first 1 x 1 convolution, (3C, C, 1, 1) and (3C), or None for no bias.
        to_out: of the last one, (C, C, 1, 1) and (C) or None.
        norm: weight (C), bias (C) and eps of a layer normalisation over the channels; None for none.
        residual: add x to the result.
        backend: as of `window_attention`; only `auto` and `cpu` can be this operator.
        others: see `window_attention`.

    Returns:
        (B, C, H, W), channels_last; None where no operator does it in one.

    Raises:
        ValueError: a map or a bias that does not fit, or an unknown backend.
        RuntimeError: weights that do not fit.
    """
    _check(x, 1, bias, window, heads)
    name = WINDOW_ATTENTION.resolve(backend)
    weight, shift, eps = norm or (None, None, 0.0)
    tensors = (weight, shift, *to_qkv, *parameters_of(bias), *to_out)
    if (
        "cpu" not in (WINDOW_ATTENTION.order if name == "auto" else (name,))
        or wants_gradients(x, *tensors)  # there is no backward pass
        or cpu.unsupported_reasons(x, bias, window, heads)
        or input_reasons(*tensors, maps=[x])
    ):
        return None
    return torch.ops.esc_arch.window_attention_fused_cpu(
        x, weight, shift, eps, *to_qkv, *cpu.operands(bias), *to_out, window, heads, residual
    )


def _check(x: Tensor, parts: int, bias: Bias, window: int, heads: int) -> None:
    """`parts`: the number of maps side by side in x, of which each has the channels of all heads."""
    if window < 1 or heads < 1:
        raise ValueError(f"window is {window} and heads is {heads}; both must be at least 1.")
    if x.dim() != 4 or x.shape[1] % (parts * heads):
        name, channels = ("x", "C") if parts == 1 else ("qkv", f"{parts}C")
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (B, {channels}, H, W), C a multiple of {heads} heads."
        )
    if isinstance(bias, Tensor):
        check_shapes({"the bias table": "hT"}, bias, h=heads, T=(2 * window - 1) ** 2)
    else:
        check_shapes({"the query factor": "hNr", "the key factor": "hNr"}, *bias, h=heads, N=window**2)
