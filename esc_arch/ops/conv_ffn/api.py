"""ConvFFN: check the inputs, choose a backend, call it."""

from __future__ import annotations

from torch import Tensor

from esc_arch.ops.operation import Operation, Shapes, Size, normal

from . import cpu, reference

__all__ = ["CONV_FFN", "conv_ffn", "conv_ffn_step"]

PARAMETERS = ("proj_weight", "proj_bias", "dwc_weight", "dwc_bias", "aggr_weight", "aggr_bias")


def _parameter_shapes(channels: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    return (
        (hidden, channels, 1, 1),
        (hidden,),
        (hidden, 1, 3, 3),
        (hidden,),
        (channels, hidden, 1, 1),
        (channels,),
    )


def _inputs(shapes: Shapes, size: Size) -> list[Tensor]:
    batch, height, width = size
    return normal((batch, shapes.channels, height, width), *_parameter_shapes(shapes.channels, shapes.hidden))


CONV_FFN = Operation(
    name="ConvFFN",
    option="ConvFFN backend",
    backends={"reference": reference, "cpu": cpu},
    order=("cpu", "reference"),
    inputs=_inputs,
    arguments=lambda shapes, tensors: tuple(tensors),
    parts=("the result", "the gradient of the map", *(f"the gradient of {name}" for name in PARAMETERS)),
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
    parameters = (proj_weight, proj_bias, dwc_weight, dwc_bias, aggr_weight, aggr_bias)
    _check_shapes(x, *parameters)
    out: Tensor = CONV_FFN.choose(backend, x, *parameters).forward(x, *parameters)
    return out


def conv_ffn_step(
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
        ValueError: shapes that do not fit each other, more channels to be averaged than there are.
    """
    parameters = (proj_weight, proj_bias, dwc_weight, dwc_bias, aggr_weight, aggr_bias)
    _check_shapes(x, *parameters)
    channels = x.shape[1]
    given = [None if tensor is None else tuple(tensor.shape) for tensor in (norm_weight, norm_bias)]
    if given not in ([None, None], [(channels,)] * 2):
        raise ValueError(f"the norm has weight {given[0]} and bias {given[1]}; both must be ({channels},), or None.")
    if not 0 <= pooled <= channels:
        raise ValueError(f"pooled is {pooled}; of {channels} channels 0 to {channels} can be averaged.")
    if "cpu" not in CONV_FFN.order or cpu.step_unsupported_reasons(x, norm_weight, norm_bias, *parameters):
        return None
    return cpu.step_forward(x, norm_weight, norm_bias, eps, *parameters, pooled=pooled)


def _check_shapes(x: Tensor, *parameters: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, C, H, W).")
    channels, hidden = x.shape[1], parameters[0].shape[0]
    wrong = [
        f"{name} {tuple(parameter.shape)}, which must be {shape}"
        for name, parameter, shape in zip(PARAMETERS, parameters, _parameter_shapes(channels, hidden), strict=True)
        if tuple(parameter.shape) != shape
    ]
    if wrong:
        raise ValueError(
            f"for {channels} channels and {hidden} hidden ones these shapes do not fit: {'; '.join(wrong)}."
        )
