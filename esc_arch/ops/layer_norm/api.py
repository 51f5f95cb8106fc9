"""Layer normalisation: check the inputs, choose a backend, call it."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from esc_arch.ops.backends import choose

from . import cpu, reference

__all__ = ["BACKENDS", "layer_norm"]

#: Every backend by name: a module with `unsupported_reasons` (why not, empty when it can) and `forward`.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpp": cpu}

#: What `auto` tries, in this order; the first one with no reason against it is taken.
AUTO_ORDER = ("cpp", "reference")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, backend: str = "auto") -> Tensor:
    """Normalise the channels at every pixel by itself: (x - mean) / sqrt(variance + eps) * weight + bias.

    Args:
        x: (B, C, H, W), of any strides.
        weight, bias: (C,) each.
        eps: added to the variance.
        backend: a key of `BACKENDS`, or auto.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        RuntimeError: the backend asked for by name cannot take these inputs; the message lists every reason.
    """
    if x.dim() != 4 or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; they must be "
            "(B, C, H, W), (C,) and (C,)."
        )
    chosen = choose("LayerNorm", BACKENDS, AUTO_ORDER, backend, x, weight, bias, option="LayerNorm backend")
    out: Tensor = chosen.forward(x, weight, bias, eps)
    return out
