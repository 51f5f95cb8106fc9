"""The block that every network of the family repeats (paper, figure 3)."""

from __future__ import annotations

from torch import Tensor, nn

from .conv_attn import ConvAttn
from .conv_ffn import ConvFFN
from .norm import LayerNorm
from .window_attention import FlashWindowAttention

__all__ = ["ESCBlock"]


class ESCBlock(nn.Module):
    """One exact window attention, then `conv_blocks` pairs of ConvFFN and ConvAttn, and a skip around it all.

    Shapes: x (B, dim, H, W), lk (pdim, pdim, K, K) -> (B, dim, H, W).

    Args:
        dim, pdim, kernel_size: see `ConvAttn`.
        conv_blocks: pairs of ConvFFN and ConvAttn.
        window_size, num_heads, attn_type: see `FlashWindowAttention`.
        exp_ratio: of the ConvFFNs in the pairs; the first one has `first_exp_ratio`.
        use_ln: LayerNorm before each pair's ConvFFN.
    """

    def __init__(
        self,
        *,
        dim: int,
        pdim: int,
        kernel_size: int,
        conv_blocks: int,
        window_size: int,
        num_heads: int,
        exp_ratio: float,
        attn_type: str,
        use_ln: bool,
        first_exp_ratio: float = 2,
    ) -> None:
        super().__init__()
        self.ln_proj = LayerNorm(dim)
        self.proj = ConvFFN(dim, first_exp_ratio)
        self.ln_attn = LayerNorm(dim)
        self.attn = FlashWindowAttention(dim=dim, window_size=window_size, num_heads=num_heads, attn_type=attn_type)
        self.lns = nn.ModuleList(LayerNorm(dim) if use_ln else nn.Identity() for _ in range(conv_blocks))
        self.convffns = nn.ModuleList(ConvFFN(dim, exp_ratio) for _ in range(conv_blocks))
        self.pconvs = nn.ModuleList(ConvAttn(dim=dim, pdim=pdim, kernel_size=kernel_size) for _ in range(conv_blocks))
        self.ln_out = LayerNorm(dim)
        self.conv_out = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, lk: Tensor) -> Tensor:
        skip = x
        x = self.proj(self.ln_proj(x))
        x = x + self.attn(self.ln_attn(x))
        for ln, convffn, pconv in zip(self.lns, self.convffns, self.pconvs, strict=True):
            x = x + pconv(convffn(ln(x)), lk)
        return self.conv_out(self.ln_out(x)) + skip
