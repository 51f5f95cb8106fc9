"""Fused kernels: several layers of a block in one step. This is the only place that decides to bypass layers.

A step is computed by its fused kernel where there is one for the input and the layers would do nothing else; otherwise
by the layers. Only `convolve` depends on the whole image, through the means that `mix` returns; `window_attention`
depends on a pixel's window, `first_ffn`, `mix` and `finish` on 3 x 3 pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from esc_arch.ops import cpu
from esc_arch.ops.conv3x3 import conv3x3_fused
from esc_arch.ops.conv_attn import conv_attention_fused
from esc_arch.ops.conv_ffn import conv_ffn_fused
from esc_arch.ops.window_attention import window_attention_fused

from .conv3x3 import Conv3x3
from .conv_attn import ConvAttn
from .conv_ffn import ConvFFN
from .norm import LayerNorm
from .window_attention import WindowAttention

if TYPE_CHECKING:
    from .block import ESCBlock

__all__ = ["block", "can_fuse", "conv3x3", "convolve", "finish", "first_ffn", "mix", "usable", "window_attention"]

#: Where the layers that networks are made of are defined.
_OWN = ("torch.nn.modules.", "esc_arch.modules.")


def usable(block: ESCBlock, x: Tensor) -> bool:
    """True if there are fused kernels for this input; each step of `block` still looks at its layers."""
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()
    float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and float32 and not exported and cpu.ready()


def block(block: ESCBlock, x: Tensor, *large_kernels: Tensor) -> Tensor:
    """`ESCBlock.forward` in fused steps."""
    skip, x = x, window_attention(block.attn, block.ln_attn, first_ffn(block, x))
    for pair in range(len(block.pconvs)):
        mixed, means = mix(block, pair, x)
        x = convolve(block, pair, x, mixed, means, *large_kernels)
    return finish(block, x, skip)


def first_ffn(block: ESCBlock, x: Tensor) -> Tensor:
    """The ConvFFN before the window attention."""
    return _norm_ffn(block.proj, block.ln_proj, x)[0]


def window_attention(attn: WindowAttention, norm: nn.Module, x: Tensor) -> Tensor:
    """x + attn(norm(x))."""
    if attn.gate is None and isinstance(norm, LayerNorm) and can_fuse(attn, attn.to_qkv, attn.to_out, norm):
        fused = window_attention_fused(
            x,
            (attn.to_qkv.weight, attn.to_qkv.bias),
            attn.position_bias(),
            (attn.to_out.weight, attn.to_out.bias),
            window=attn.window_size,
            heads=attn.num_heads,
            norm=(norm.weight, norm.bias, norm.eps),
            residual=True,
            backend=attn.attn_type,
        )
        if fused is not None:
            return fused
    return x + attn(norm(x))


def mix(block: ESCBlock, pair: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The ConvFFN of a pair.

    Returns:
        (B, dim, H, W), and the means (B, pdim) of its first channels over all pixels where they come without a pass of
        their own, else None.
    """
    return _norm_ffn(block.convffns[pair], block.lns[pair], x, pooled=channels_pooled(block, pair))


def channels_pooled(block: ESCBlock, pair: int) -> int:
    """How many of the first channels of `mix` the kernel of `convolve` is made from."""
    pdim: int = block.pconvs[pair].pdim  # type: ignore[assignment]  # all kinds have it
    return pdim


def convolve(
    block: ESCBlock, pair: int, x: Tensor, mixed: Tensor, means: Tensor | None, *large_kernels: Tensor
) -> Tensor:
    """x + the convolutional attention of a pair on `mixed`.

    Args:
        means: of the first channels of `mixed` over the whole image, (B, pdim); None to have them computed.
    """
    pconv = block.pconvs[pair]
    if isinstance(pconv, ConvAttn) and can_fuse(pconv, pconv.aggr, *pconv.plk.modules()):
        _, first, _, second = pconv.plk.dwc_proj
        weights: list[Any] = [part for layer in (first, second, pconv.aggr) for part in (layer.weight, layer.bias)]
        (large_kernel,) = large_kernels
        fused = conv_attention_fused(mixed, x, large_kernel, means, *weights, symmetric=pconv.symmetric)
        if fused is not None:
            return fused
    return x + pconv(mixed, *large_kernels, means=means)


def finish(block: ESCBlock, x: Tensor, skip: Tensor) -> Tensor:
    """The last convolution, and the skip around the block."""
    return conv3x3(block.conv_out, x, norm=block.ln_out, residual=skip)


def conv3x3(conv: nn.Module, x: Tensor, *, norm: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """residual + conv(norm(x)).

    Args:
        conv: `Conv3x3`, or what was put in its place.
        x: (B, C, H, W).
        norm: a LayerNorm before it; None for x as it is.
        residual: (B, D, H, W), added to the result.

    Returns:
        (B, D, H, W).
    """
    if isinstance(conv, Conv3x3) and isinstance(norm, LayerNorm | None) and can_fuse(conv, norm):
        fused = conv3x3_fused(x, *_norm_params(norm), conv.weight, conv.bias, residual)
        if fused is not None:
            return fused
    out: Tensor = conv(x if norm is None else norm(x))
    return out if residual is None else out + residual


def _norm_ffn(ffn: nn.Module, norm: nn.Module, x: Tensor, pooled: int = 0) -> tuple[Tensor, Tensor | None]:
    """ffn(norm(x)), and means as of `mix`."""
    layer_norm = None if isinstance(norm, nn.Identity) else norm
    if (
        isinstance(ffn, ConvFFN)
        and isinstance(layer_norm, LayerNorm | None)
        and can_fuse(ffn, ffn.proj, ffn.dwc, ffn.aggr, layer_norm)
    ):
        fused = conv_ffn_fused(x, *_norm_params(layer_norm), *ffn.weights(), pooled=pooled)
        if fused is not None:
            return fused
    return ffn(norm(x)), None


def _any_global_hook() -> bool:
    """True if hooks are registered for all modules; PyTorch 2.7 has no function of its own for it."""
    return bool(
        torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
    )


def can_fuse(*layers: nn.Module | None) -> bool:
    """True if a fused kernel may bypass these layers.

    It may where calling them would do no more than their formula: they are layers of torch or of this package, not
    wrapped, replaced (adapters, quantisation) or with another `forward` on the instance, and nothing is hooked to them
    or to every module (feature extraction, counting).
    """
    return not _any_global_hook() and all(layer is None or _is_plain(layer) for layer in layers)


def _norm_params(norm: LayerNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)


def _is_plain(layer: nn.Module) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer).__module__.startswith(_OWN) and not hooked and "forward" not in vars(layer)
