"""The convolutional feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from esc_arch.ops.conv_ffn import conv_ffn

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
        return conv_ffn(x, *self.weights())

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `esc_arch.ops.conv_ffn.conv_ffn` takes them."""
        proj, dwc, aggr = self.proj, self.dwc, self.aggr
        assert proj.bias is not None
        assert dwc.bias is not None
        assert aggr.bias is not None
        return proj.weight, proj.bias, dwc.weight, dwc.bias, aggr.weight, aggr.bias
