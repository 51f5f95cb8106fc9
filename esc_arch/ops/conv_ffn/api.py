"""ConvFFN: check the inputs, choose a backend, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from esc_arch.ops.cpu import input_reasons
from esc_arch.ops.operation import Operation, SampleShapes, Size, check_norm, check_shapes, normal, wants_gradients

from . import cpu, reference

__all__ = ["CONV_FFN", "conv_ffn", "conv_ffn_fused"]

SHAPES = {
    "x": "BCHW",
    "proj_weight": "MC11",
    "proj_bias": "M",
    "dwc_weight": "M133",
    "dwc_bias": "M",
    "aggr_weight": "CM11",
    "aggr_bias": "C",
}
FUSED_SHAPES = SHAPES | {"norm_weight": "C", "norm_bias": "C"}


def _inputs(shapes: SampleShapes, size: Size) -> list[Tensor]:
    sizes = dict(zip("BHW", size, strict=True)) | {"C": shapes.channels, "M": shapes.hidden, "1": 1, "3": 3}
    return normal(*(tuple(sizes[letter] for letter in shape) for shape in SHAPES.values()))


CONV_FFN = Operation(
    name="ConvFFN",
    option="ConvFFN backend",
    backends={"reference": reference, "cpu": cpu},
    order=("cpu", "reference"),
    inputs=_inputs,
    parts=("the result", "the gradient of the map", *(f"the gradient of {name}" for name in list(SHAPES)[1:])),
)


def conv_ffn(
    x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    dwc_weight: Tensor,
    dwc_bias: Tensor,
    aggr_weight: Tensor,
    aggr_bias: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """1 x 1 expansion, GELU, a 3 x 3 depth-wise convolution with GELU and a skip around it, 1 x 1 reduction.

    With M hidden channels, and the exact (erf) GELU (arXiv 2503.06671):

    Args:
        x: (B, C, H, W), H, W >= 1, of any strides.
        proj_weight, proj_bias: (M, C, 1, 1) and (M,).
        dwc_weight, dwc_bias: (M, 1, 3, 3) and (M,); zero padding.
        aggr_weight, aggr_bias: (C, M, 1, 1) and (C,).
        backend: reference, cpu or auto.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        RuntimeError: the backend requested by name cannot take these inputs; the message lists every reason.
    """
    tensors = (x, proj_weight, proj_bias, dwc_weight, dwc_bias, aggr_weight, aggr_bias)
    check_shapes(SHAPES, *tensors)
    return CONV_FFN(backend, *tensors)


def conv_ffn_fused(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    proj_weight: Tensor,
    proj_bias: Tensor,
    dwc_weight: Tensor,
    dwc_bias: Tensor,
    aggr_weight: Tensor,
    aggr_bias: Tensor,
    *,
    pooled: int = 0,
) -> tuple[Tensor, Tensor | None] | None:
    """`conv_ffn` of the normalised map, and the means of the result's first channels, in one operator.

    On the CPU this saves two passes over the map; for gradients x is kept, and normalised again.

    Args:
        x: (B, C, H, W).
        norm_weight, norm_bias: (C) and (C) of a normalisation of each pixel over its channels; None for none.
        eps: added to the variance by this normalisation.
        pooled: how many channels are averaged over all pixels.
        others: see `conv_ffn`.

    Returns:
        (B, C, H, W) and (B, pooled), no means (None) where gradients are wanted; None where no operator does it in one.

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: more channels to be averaged than there are.
    """
    parameters = (proj_weight, proj_bias, dwc_weight, dwc_bias, aggr_weight, aggr_bias)
    check_shapes(FUSED_SHAPES, x, *parameters, norm_weight, norm_bias)
    check_norm(norm_weight, norm_bias)
    if "cpu" not in CONV_FFN.order or input_reasons(norm_weight, norm_bias, *parameters, maps=[x]):
        return None
    training = wants_gradients(x, norm_weight, norm_bias, *parameters)
    count = 0 if training else pooled
    out, means = torch.ops.esc_arch.conv_ffn_fused_cpu(x, norm_weight, norm_bias, eps, *parameters, count)
    return out, None if training else means
