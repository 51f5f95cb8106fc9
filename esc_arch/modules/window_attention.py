"""Window attention with its projections, in three kinds of position bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esc_arch.ops.window_attention import WINDOW_ATTENTION, Bias, dense_bias, window_attention

from .precision import in_float32

__all__ = [
    "FactorBiasWindowAttention",
    "FlashWindowAttention",
    "RIBWindowAttention",
    "WindowAttention",
    "bias_factors",
    "resize_bias_factors",
    "resize_bias_table",
]


def resize_bias_table(table: Tensor, window: int) -> tuple[Tensor, int]:
    """A table of position biases (h, (2 W - 1)^2) made for another window w: (h, (2 w - 1)^2), and W.

    Its values belong to distances in pixels. A smaller window has only the shorter ones, whose values stay; a larger
    one has longer ones, which get the value of the nearest that there is.

    Raises:
        ValueError: the table has another shape.
    """
    side = math.isqrt(table.shape[-1])
    if table.ndim != 2 or side**2 != table.shape[-1] or side % 2 == 0:
        raise ValueError(f"{tuple(table.shape)} is not (heads, (2 window - 1)^2).")
    reach = side // 2
    distances = torch.arange(1 - window, window, device=table.device).clamp(-reach, reach) + reach
    square = table.unflatten(1, (side, side))
    return square[:, distances][:, :, distances].flatten(1), reach + 1


def resize_bias_factors(factors: Tensor, window: int) -> tuple[Tensor, int]:
    """One of the two free factors (h, W^2, r) of position biases for another window w: (h, w^2, r), and W.

    It is interpolated bilinearly to the other grid of tokens.

    Raises:
        ValueError: it has another shape.
    """
    side = math.isqrt(factors.shape[1]) if factors.ndim == 3 else 0
    if side < 1 or side**2 != factors.shape[1]:
        raise ValueError(f"{tuple(factors.shape)} is not (heads, window^2, rank).")
    grid = factors.transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, size=(window, window), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).contiguous(), side


def bias_factors(table: Tensor, window: int, rank: int) -> tuple[Tensor, Tensor]:
    """The best low-rank factors of a table's bias, by singular value decomposition (FlashBias, arXiv 2603.06738).

    Of each head's bias B = U S V^T, (N, N) with N = w^2, the largest singular values are kept, and sqrt(S) is put on
    both sides, so that training moves both alike. Computed in float64.

    Args:
        table: (h, (2w - 1)^2), see `FlashWindowAttention`.
        window: w.
        rank: r, at least 1. What is above N has factors of zero.

    Returns:
        q and k, (h, N, r) each, in the table's type, with q k^T closest to B.
    """
    if table.is_meta:  # only shapes are asked for
        shape = (len(table), window**2, rank)
        return table.new_empty(shape), table.new_empty(shape)
    factors = []
    rest = (0, max(0, rank - window**2))
    for bias in dense_bias(table.detach().double().cpu(), window):
        # Turning both tokens by 180 degrees, which reverses their order, transposes B: so B with its columns reversed
        # is symmetric, and its eigenvectors give the decomposition
        values, vectors = _largest_eigenpairs(bias.flip(1), min(rank, window**2))
        strength = values.abs().sqrt()
        factors.append((F.pad(vectors * strength * values.sign(), rest), F.pad(vectors.flip(0) * strength, rest)))
    q, k = (torch.stack(parts).to(table) for parts in zip(*factors, strict=True))
    return q, k


def _largest_eigenpairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of a symmetric matrix (N, N), eigenvalues (count,), largest in magnitude first, and eigenvectors (N, count)."""
    size = len(matrix)
    if count <= size // 4 and matrix.any():  # Lanczos' method takes a third of the time, and less for larger windows
        import scipy.sparse.linalg  # only FlashBias needs SciPy

        start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
        found = scipy.sparse.linalg.eigsh(matrix.numpy(), count, which="LM", v0=start.numpy())
        values, vectors = (torch.from_numpy(part) for part in found)
    else:
        values, vectors = torch.linalg.eigh(matrix)
    largest = values.abs().topk(count).indices
    return values[largest], vectors[:, largest]


class WindowAttention(nn.Module):
    """Exact self-attention in window_size x window_size windows, without shift; what the kinds below share.

    Shapes: (B, dim, H, W) -> (B, dim, H, W), any H, W >= 1 (padded by reflection inside).

    Args:
        dim: channels.
        window_size: side of a window in pixels (32 in the paper).
        num_heads: heads; divides dim.
        attn_type: how it is computed, which changes no result: auto, or a backend by name, see
            `esc_arch.ops.window_attention`. Any case.
        gate: multiply the result, before `to_out`, by a sigmoid gate computed from the input.

    Raises:
        ValueError: num_heads does not divide dim, a size below 1, an unknown attn_type.
        RuntimeError: at the call, when attn_type names a backend that cannot take the inputs.
    """

    #: Of the parameters whose shape depends on the window: how they are made for another one, and told theirs.
    bias_resizers: ClassVar[Mapping[str, Callable[[Tensor, int], tuple[Tensor, int]]]] = {}

    def __init__(
        self, *, dim: int, window_size: int, num_heads: int, attn_type: str = "auto", gate: bool = False
    ) -> None:
        super().__init__()
        if window_size < 1:
            raise ValueError(f"window_size is {window_size}; it must be at least 1 (the paper's is 32).")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide dim = {dim}.")
        self.window_size = window_size
        self.num_heads = num_heads
        self.attn_type = WINDOW_ATTENTION.resolve(attn_type)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.to_out = nn.Conv2d(dim, dim, 1)
        self.gate = (
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Conv2d(dim, dim, 1)) if gate else None
        )

    def position_bias(self) -> Bias:
        """What is added to the scores; see `esc_arch.ops.window_attention.Bias`."""
        raise TypeError(f"{type(self).__name__} has no position bias: use one of its subclasses.")

    def forward(self, x: Tensor) -> Tensor:
        attended = window_attention(
            self.to_qkv(x), self.position_bias(), window=self.window_size, heads=self.num_heads, backend=self.attn_type
        )
        if self.gate is not None:
            attended = attended * self.gate(x).sigmoid()
        return self.to_out(attended)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.num_heads}, attn_type={self.attn_type}"


class FlashWindowAttention(WindowAttention):
    """Window attention with a learned bias for each relative position (arXiv 2503.06671).

    Arguments, shapes and errors as of `WindowAttention`; without a gate. The bias is `relative_position_bias`,
    (num_heads, (2 * window_size - 1)^2).
    """

    bias_resizers: ClassVar = {"relative_position_bias": resize_bias_table}

    def __init__(self, *, dim: int, window_size: int, num_heads: int, attn_type: str = "auto") -> None:
        super().__init__(dim=dim, window_size=window_size, num_heads=num_heads, attn_type=attn_type)
        table = torch.empty(num_heads, (2 * window_size - 1) ** 2)
        # (Without data, normal_ would do nothing but import torch's compiler)
        self.relative_position_bias = nn.Parameter(table if table.is_meta else table.normal_(std=0.001))

    def position_bias(self) -> Bias:
        return self.relative_position_bias


class FactorBiasWindowAttention(WindowAttention):
    """Window attention whose bias is the product of two free factors for each head (FlashBias).

    The two networks that have it were published with different conventions:

    - `ESC` and `ESCReal` (arXiv 2503.06671): bias = q k^T; the factors start at zero, to be replaced by those of a
      trained table.
    - `ESCRIB` (arXiv 2603.06738): bias = q k^T / sqrt(r), `scaled`; the factors start at random.

    Args:
        rank: r of the factors `flashbias_q` and `flashbias_k`, (num_heads, window_size^2, r).
        scaled: divide the bias by sqrt(r).
        others: see `WindowAttention`.
    """

    bias_resizers: ClassVar = {"flashbias_q": resize_bias_factors, "flashbias_k": resize_bias_factors}

    def __init__(self, *, rank: int, scaled: bool, **others: Any) -> None:
        super().__init__(**others)
        self.rank = _checked("rank", rank)
        self.scaled = scaled
        shape = (self.num_heads, self.window_size**2, rank)
        self.flashbias_q = nn.Parameter(torch.randn(shape) * 0.02 if scaled else torch.zeros(shape))
        self.flashbias_k = nn.Parameter(torch.randn(shape) * 0.02 if scaled else torch.zeros(shape))

    def position_bias(self) -> Bias:
        return self.flashbias_q * self.rank**-0.5 if self.scaled else self.flashbias_q, self.flashbias_k


class RIBWindowAttention(WindowAttention):
    """Window attention whose bias factors come from a small network of the tokens' coordinates (arXiv 2603.06738).

    Args:
        rank: r of the factors.
        hidden_dim: width of the network.
        n_freqs: frequencies in the coordinates' features, at least 1; without effect on a siren.
        siren: the variant RIBSiren: the coordinates alone, and sin(30 x) in place of ReLU.
        others: see `WindowAttention`.
    """

    #: Frequency of the sines of SIREN networks (Sitzmann et al., NeurIPS 2020).
    OMEGA = 30

    def __init__(self, *, rank: int, hidden_dim: int, n_freqs: int, siren: bool, **others: Any) -> None:
        super().__init__(**others)
        self.rank = _checked("rank", rank)
        self.siren = siren
        # Weights of RIB without frequencies would have the shapes of RIBSiren's, which is another network
        self.n_freqs = 0 if siren else _checked("rib_n_freqs", n_freqs)
        features = 2 + 4 * self.n_freqs
        hidden_dim = _checked("rib_hidden_dim", hidden_dim)
        # A siren's first layer is drawn from U(-1 / features, 1 / features)
        start = torch.rand(features, hidden_dim) * 2 - 1 if siren else torch.randn(features, hidden_dim)
        self.to_hidden = nn.Parameter(start / features if siren else start * features**-0.5)
        self.hidden_b = nn.Parameter(torch.zeros(1, hidden_dim))
        self.to_q = nn.Parameter(torch.randn(self.num_heads, hidden_dim, rank) * hidden_dim**-0.5)
        self.to_k = nn.Parameter(torch.randn(self.num_heads, hidden_dim, rank) * hidden_dim**-0.5)

    @in_float32
    def position_bias(self) -> Bias:
        features = coordinate_features(self.window_size, self.n_freqs, self.to_hidden)
        hidden = features @ self.to_hidden + self.hidden_b
        hidden = (self.OMEGA * hidden).sin() if self.siren else hidden.relu()
        return hidden @ self.to_q * self.rank**-0.5, hidden @ self.to_k


def coordinate_features(window: int, n_freqs: int, like: Tensor) -> Tensor:
    """[xy, sin(xy), cos(xy), sin(2 xy), cos(2 xy), ..., cos(2^(n - 1) xy)] of a window's tokens.

    Returns:
        (N, 2 + 4 n), row-major tokens; x and y are pixel centres in (-1, 1). Type and device of `like`.
    """
    centres = (2 * torch.arange(window, device=like.device, dtype=torch.float32) + 1) / window - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    xy = torch.stack([x.flatten(), y.flatten()], dim=1)
    angles = [xy * 2**i for i in range(n_freqs)]
    return torch.cat([xy, *(part for angle in angles for part in (angle.sin(), angle.cos()))], dim=1).to(like.dtype)


def _checked(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1.")
    return value
