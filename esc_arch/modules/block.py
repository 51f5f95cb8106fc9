"""The block that every network of the family repeats (paper, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from . import fused
from .conv3x3 import Conv3x3
from .conv_attn import ConvAttn, DecomposedConvAttn
from .conv_ffn import ConvFFN
from .norm import LayerNorm
from .window_attention import WindowAttention

__all__ = ["ESCBlock"]


class ESCBlock(nn.Module):
    """One exact window attention, then pairs of ConvFFN and convolutional attention, and a skip around it all.

    Shapes: x (B, dim, H, W), and the large kernels that every `pconvs` takes -> (B, dim, H, W).

    Args:
        dim: channels.
        attn: the window attention.
        pconvs: the convolutional attentions; added to the map, with the network's shared large kernels.
        exp_ratio: of the ConvFFNs in the pairs; the first one has `first_exp_ratio`.
        use_ln: LayerNorm before each pair's ConvFFN.
    """

    def __init__(
        self,
        dim: int,
        *,
        attn: WindowAttention,
        pconvs: Sequence[ConvAttn | DecomposedConvAttn],
        exp_ratio: float,
        first_exp_ratio: float,
        use_ln: bool,
    ) -> None:
        super().__init__()
        self.ln_proj = LayerNorm(dim)
        self.proj = ConvFFN(dim, first_exp_ratio)
        self.ln_attn = LayerNorm(dim)
        self.attn = attn
        self.lns = nn.ModuleList(LayerNorm(dim) if use_ln else nn.Identity() for _ in pconvs)
        self.pconvs = nn.ModuleList(pconvs)  # in the published order of parameters, by which optimisers' states go
        self.convffns = nn.ModuleList(ConvFFN(dim, exp_ratio) for _ in pconvs)
        self.ln_out = LayerNorm(dim)
        self.conv_out = Conv3x3(dim, dim)

    def forward(self, x: Tensor, *large_kernels: Tensor) -> Tensor:
        if fused.usable(self, x):
            return fused.block(self, x, *large_kernels)
        skip, x = x, self.proj(self.ln_proj(x))
        x = x + self.attn(self.ln_attn(x))
        for ln, ffn, pconv in zip(self.lns, self.convffns, self.pconvs, strict=True):
            x = x + pconv(ffn(ln(x)), *large_kernels)
        return self.conv_out(self.ln_out(x)) + skip
