"""The convolutional feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from esc_arch.ops.conv_ffn import conv_ffn, conv_ffn_step

from .fused import can_fuse, norm_params

__all__ = ["ConvFFN"]


class ConvFFN(nn.Module):
    """1 x 1 expansion, a 3 x 3 depth-wise convolution with a skip around it, 1 x 1 reduction.

    Shapes: (B, C, H, W) -> (B, C, H, W), C = dim.

    Args:
        dim: channels.
        exp_ratio: hidden channels are int(dim * exp_ratio).

    Raises:
        ValueError: no hidden channel.
    """

    def __init__(self, dim: int, exp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * exp_ratio)
        if hidden < 1:
            raise ValueError(f"exp_ratio is {exp_ratio}; it must make at least one hidden channel of dim = {dim}.")
        self.proj = nn.Conv2d(dim, hidden, 1)
        self.dwc = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.aggr = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return conv_ffn(x, *self._weights())

    def of_normed(self, x: Tensor, norm: nn.Module, means_of: int = 0) -> tuple[Tensor, Tensor | None]:
        """This network of norm(x), in one pass over the map when the fused kernel is available.

        Args:
            x: (B, C, H, W).
            norm: a LayerNorm, or the identity.
            means_of: how many channels of the result are wanted as means over all pixels too.

        Returns:
            (B, C, H, W), and (B, means_of) where they come without a pass of their own, else None.
        """
        layer_norm = None if isinstance(norm, nn.Identity) else norm
        if can_fuse(self, self.proj, self.dwc, self.aggr, layer_norm):
            done = conv_ffn_step(x, *norm_params(layer_norm), *self._weights(), pooled=means_of)
            if done is not None:
                return done
        return self(norm(x)), None

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        proj, dwc, aggr = self.proj, self.dwc, self.aggr
        assert proj.bias is not None
        assert dwc.bias is not None
        assert aggr.bias is not None
        return proj.weight, proj.bias, dwc.weight, dwc.bias, aggr.weight, aggr.bias
