"""Layers computed from their weights, without being called: by operators that do several steps in one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .norm import LayerNorm

__all__ = ["are_plain", "numbers_of"]

#: Where the layers that networks are made of are defined.
_OWN = ("torch.nn.modules.", "esc_arch.modules.")


def are_plain(*layers: nn.Module | None) -> bool:
    """Whether nobody would notice that the layers themselves are not called.

    They are what the network was made of, not wrapped or replaced (adapters, quantisation), and nothing is hooked to
    them or to every module (feature extraction, counting).
    """
    return not _hooks_for_all() and all(layer is None or _is_plain(layer) for layer in layers)


def numbers_of(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and eps of a plain LayerNorm; two times None and 0 for none."""
    if norm is None:
        return None, None, 0.0
    assert isinstance(norm, LayerNorm)
    return norm.weight, norm.bias, norm.eps


def _is_plain(layer: nn.Module) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer).__module__.startswith(_OWN) and not hooked


def _hooks_for_all() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
