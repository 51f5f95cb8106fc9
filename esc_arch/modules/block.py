"""The block that every network of the family repeats (paper, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .conv3x3 import Conv3x3, conv3x3
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
        skip = x
        x = self.attend(x)
        for pair in range(len(self.pconvs)):
            mixed, means = self.mix(pair, x)
            x = self.convolve(pair, x, mixed, means, *large_kernels)
        return self.finish(x, skip)

    # The steps of a block. Only `convolve` depends on the whole image, through the means that `mix` is asked for;
    # `attend` depends on a pixel's window and one pixel around it, `mix` and `finish` on 3 x 3 pixels.

    def attend(self, x: Tensor) -> Tensor:
        """The first ConvFFN and the window attention."""
        return self.attn.added_to(self.proj.of_normed(x, self.ln_proj)[0], self.ln_attn)

    def mix(self, pair: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The ConvFFN of a pair; see `ConvFFN.of_normed`."""
        convffn: ConvFFN = self.convffns[pair]  # type: ignore[assignment]  # a list of them
        return convffn.of_normed(x, self.lns[pair], means_of=self.channels_pooled(pair))

    def convolve(self, pair: int, x: Tensor, mixed: Tensor, means: Tensor | None, *large_kernels: Tensor) -> Tensor:
        """The convolutional attention of a pair, added to x.

        Args:
            means: of the first channels of `mixed` over the whole image, (B, pdim); None to have them computed.
        """
        pconv: ConvAttn | DecomposedConvAttn = self.pconvs[pair]  # type: ignore[assignment]
        return pconv.added_to(x, mixed, *large_kernels, means=means)

    def channels_pooled(self, pair: int) -> int:
        """How many of the first channels of `mix` the kernel of `convolve` is made from."""
        pdim: int = self.pconvs[pair].pdim  # type: ignore[assignment]
        return pdim

    def finish(self, x: Tensor, skip: Tensor) -> Tensor:
        """The last convolution, and the skip around the block."""
        return conv3x3(self.conv_out, x, norm=self.ln_out, residual=skip)
