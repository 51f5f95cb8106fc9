"""When fused kernels, which do several layers in one step, may bypass the layers themselves."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .norm import LayerNorm

__all__ = ["can_fuse", "norm_params"]

#: Where the layers that networks are made of are defined.
_OWN = ("torch.nn.modules.", "esc_arch.modules.")


def can_fuse(*layers: nn.Module | None) -> bool:
    """True if a fused kernel may bypass these layers.

    It may where calling them would do no more than their formula: they are layers of torch or of this package, not
    wrapped, replaced (adapters, quantisation) or with another `forward` on the instance, and nothing is hooked to them
    or to every module (feature extraction, counting).
    """
    return not _global_hooks() and all(layer is None or _is_plain(layer) for layer in layers)


def norm_params(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and eps of a LayerNorm; (None, None, 0.0) for None."""
    if norm is None:
        return None, None, 0.0
    assert isinstance(norm, LayerNorm)
    return norm.weight, norm.bias, norm.eps


def _is_plain(layer: nn.Module) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer).__module__.startswith(_OWN) and not hooked and "forward" not in vars(layer)


def _global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
