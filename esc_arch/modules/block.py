"""The block that every network of the family repeats (paper, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .conv_ffn import ConvFFN
from .norm import LayerNorm

__all__ = ["ESCBlock"]


class ESCBlock(nn.Module):
    """One exact window attention, then pairs of ConvFFN and convolutional attention, and a skip around it all.

    Shapes: x (B, dim, H, W), and the large kernels that every `pconvs` takes -> (B, dim, H, W).

    Args:
        dim: channels.
        attn: the window attention.
        pconvs: the convolutional attentions; called with the map and the network's shared large kernels.
        exp_ratio: of the ConvFFNs in the pairs; the first one has `first_exp_ratio`.
        use_ln: LayerNorm before each pair's ConvFFN.
    """

    def __init__(
        self,
        dim: int,
        *,
        attn: nn.Module,
        pconvs: Sequence[nn.Module],
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
        self.convffns = nn.ModuleList(ConvFFN(dim, exp_ratio) for _ in pconvs)
        self.pconvs = nn.ModuleList(pconvs)
        self.ln_out = LayerNorm(dim)
        self.conv_out = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, *large_kernels: Tensor) -> Tensor:
        skip = x
        x = self.proj(self.ln_proj(x))
        x = x + self.attn(self.ln_attn(x))
        for ln, convffn, pconv in zip(self.lns, self.convffns, self.pconvs, strict=True):
            x = x + pconv(convffn(ln(x)), *large_kernels)
        return self.conv_out(self.ln_out(x)) + skip
