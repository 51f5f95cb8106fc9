"""Layer normalisation: check the inputs, choose a backend, call it."""

from __future__ import annotations

from torch import Tensor

from esc_arch.ops.operation import Operation, check_shapes, normal

from . import cpu, reference

__all__ = ["LAYER_NORM", "layer_norm"]

LAYER_NORM = Operation(
    name="LayerNorm",
    option="LayerNorm backend",
    backends={"reference": reference, "cpu": cpu},
    order=("cpu", "reference"),
    inputs=lambda shapes, size: normal((size[0], shapes.channels, *size[1:]), (shapes.channels,), (shapes.channels,)),
    arguments=lambda shapes, tensors: (*tensors, 1e-6),
    parts=("the result", "the gradient of the map", "the gradient of the weight", "the gradient of the bias"),
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, backend: str = "auto") -> Tensor:
    """Normalise the channels at every pixel by itself: (x - mean) / sqrt(variance + eps) * weight + bias.

    Args:
        x: (B, C, H, W), of any strides.
        weight, bias: (C,) each.
        eps: added to the variance.
        backend: reference, cpu or auto.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        RuntimeError: the backend requested by name cannot take these inputs; the message lists every reason.
    """
    check_shapes({"x": "BCHW", "weight": "C", "bias": "C"}, x, weight, bias)
    return LAYER_NORM(backend, x, weight, bias, eps)
