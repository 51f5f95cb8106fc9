"""Enlarging to any size: the colour at any point, from features around it.

LTE: Lee & Jin, "Local Texture Estimator for Implicit Representation Function", CVPR 2022; it builds on
LIIF: Chen et al., "Learning Continuous Image Representation with Local Implicit Image Function", CVPR 2021.

Coordinates, as in both papers: a map spans -1 .. 1 in height and in width, and points are (y, x). In an image of n
pixels a side that shows the same, pixel i has its centre at -1 + (2 i + 1) / n and is 2 / n wide: its cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv3x3 import Conv3x3
from .precision import in_float32

__all__ = ["LTE", "pixels_around", "query_grid"]


class LTE(nn.Module):
    """Local texture estimator: colours at given points, from Fourier features of the four nearest pixels.

    For a point q with the cell c, and a pixel j of the features with its centre at p_j, the colour estimate is

        residual_scale * imnet(coef_j * [cos(pi (F_j d + phase(s))), sin(pi (F_j d + phase(s)))]) + image_j

    where d = (q - p_j) * (H, W) and s = c * (H, W), so that a pixel of the features is 2 wide in both, and two
    convolutions make the hidden_dim amplitudes coef_j and the hidden_dim / 2 frequencies F_j (a pair each: of height
    and of width) of the features. The estimates of the four pixels around q are averaged with the weights of bilinear
    interpolation: the areas of LIIF's local ensemble, and their limit where all four vanish. Of image_j this makes the
    bilinearly enlarged image, LTE's skip connection. The outermost pixels stand for those missing beyond them.

    Shapes, Q being the number of points: features (B, dim, H, W), image (B, 3, H, W), coords (B, Q, 2) and cell
    (B, 2) -> (B, 3, Q).

    Args:
        dim: channels of the features.
        hidden_dim: channels of the Fourier features, even.
        mlp_dims: channels of the hidden layers of `imnet`.
        max_scale: largest scale of training. Cells of larger scales are taken as those of this one, because the
            phase has never seen them.
        residual_scale: what the network's colours are multiplied by before the image is added.

    Raises:
        ValueError: hidden_dim is odd, or an option is not positive.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int = 256,
        mlp_dims: Sequence[int] = (256, 256, 256),
        max_scale: float = 4,
        residual_scale: float = 1,
    ) -> None:
        super().__init__()
        if hidden_dim < 2 or hidden_dim % 2:
            raise ValueError(f"hidden_dim is {hidden_dim}; it must be even: one half for cosines, the other for sines.")
        if min(mlp_dims, default=1) < 1:
            raise ValueError(f"mlp_dims are {list(mlp_dims)}; each must be at least 1.")
        if not 0 < max_scale < math.inf:
            raise ValueError(f"max_scale is {max_scale}; it must be a number above 0.")
        self.max_scale = max_scale
        self.residual_scale = residual_scale
        self.coef = Conv3x3(dim, hidden_dim)
        self.freq = Conv3x3(dim, hidden_dim)
        self.phase = nn.Linear(2, hidden_dim // 2, bias=False)
        layers: list[nn.Module] = []
        for before, after in zip((hidden_dim, *mlp_dims), mlp_dims, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.imnet = nn.Sequential(*layers, nn.Linear((hidden_dim, *mlp_dims)[-1], 3))

    @in_float32
    def forward(
        self,
        features: Tensor,
        image: Tensor,
        coords: Tensor,
        cell: Tensor,
        *,
        chunk: int | None = None,
        origin: tuple[int, int] = (0, 0),
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """See the class.

        Args:
            chunk: the number of points, of all images together, computed at a time; None for all. It bounds the memory,
                and changes the result by rounding at most. Where gradients are asked for, which keep every intermediate
                result, and while exporting, all points are computed at once.
            origin, size: features and image are a part of maps of this (H, W), which begins at this row and column and
                has all pixels around the points; coords and cell are those of the whole.
        """
        height, width = size or image.shape[-2:]
        maps = self.maps(features, image)
        sides = torch.stack([cell[:, 0] * height, cell[:, 1] * width], dim=-1).clamp(min=2 / self.max_scale)
        phase = self.phase(sides.to(image.dtype))[:, None] * math.pi  # (B, 1, K), K frequencies

        def query(points: Tensor) -> Tensor:  # (B, q, 2) -> (B, 3, q)
            nearest = _nearest_pixels(points, (height, width), origin, image.shape[-2:])
            return self.colours(maps, phase, *nearest)

        if chunk is None or torch.is_grad_enabled() or torch.compiler.is_exporting():
            return query(coords)
        return torch.cat([query(points) for points in coords.split(max(1, chunk // len(coords)), dim=1)], dim=-1)

    def maps(self, features: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Amplitudes, frequencies times pi and colours of every pixel: (B * H * W, C) each."""
        coef = rows_of_pixels(self.coef(features))
        # Of every pixel the frequencies of height, then those of width; each channel pair of `freq` is one (y, x)
        freq = rows_of_pixels(self.freq(features).unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) * math.pi)
        return coef, freq, rows_of_pixels(image)

    def colours(
        self, maps: tuple[Tensor, Tensor, Tensor], phase: Tensor, index: Tensor, delta: Tensor, weight: Tensor
    ) -> Tensor:
        """Colours at points, (B, 3, q), from the four pixels around each, N = B * q * 4.

        Args:
            maps: see `maps`.
            phase: (B, 1, K), K frequencies, times pi.
            index, delta, weight: rows of the pixels (N,), the way from their centres (N, 2) and weights (N, 1).
        """
        # F.embedding is the way of picking rows with the fastest backward
        coef, freq, pixels = (F.embedding(index, each) for each in maps)
        f_y, f_x = freq.chunk(2, dim=-1)
        d_y, d_x = delta.to(freq.dtype).split(1, dim=-1)
        angle = torch.addcmul(f_y * d_y, f_x, d_x)  # (N, K)
        angle = (angle.unflatten(0, (len(phase), -1)) + phase).flatten(0, 1)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        colour = self.imnet(coef * waves) * self.residual_scale + pixels
        return (colour * weight.to(colour.dtype)).unflatten(0, (len(phase), -1, 4)).sum(2).transpose(1, 2)


def query_grid(
    size: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    part: tuple[float, float] = (1, 1),
    region: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The points to ask for to get a whole image, or a region of it.

    Args:
        size: (H', W') of the image.
        part: how much of the map's height and width the image shows, from the top left: less than 1 where padding was
            added to the map at the bottom and the right.
        region: rows and columns of the image wanted, (top, left, bottom, right); None for all.

    Returns:
        The centres of its pixels, row by row (H' * W', 2), and their cell (2,); float32.
    """
    cells = [2 * shown / n for n, shown in zip(size, part, strict=True)]
    top, left, bottom, right = region or (0, 0, *size)
    axes = [
        (torch.arange(first, last, device=device, dtype=torch.float32) + 0.5) * cell - 1
        for first, last, cell in ((top, bottom, cells[0]), (left, right, cells[1]))
    ]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return coords, torch.tensor(cells, device=device)


def rows_of_pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _nearest_pixels(
    points: Tensor, size: tuple[int, int], origin: tuple[int, int], shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The four pixels around every point of (B, q, 2) in a map of `size`, of which a part (h, w) is there.

    Returns:
        Their rows in that part as (B * h * w, C) (N,), the way from their centres to the point (N, 2), in units of
        which a pixel is 2 wide, and their weights (N, 1); N = B * q * 4.
    """
    (y, d_y, w_y), (x, d_x, w_x) = (
        pixels_around((coords + 1) * (n / 2) - 0.5, coords.new_full((), n - 1))
        for coords, n in zip(points.unbind(-1), size, strict=True)
    )
    height, width = shape
    first = torch.arange(len(points), device=points.device).view(-1, 1, 1, 1) * (height * width)
    index = first + ((y - origin[0]) * width)[..., :, None] + (x - origin[1])[..., None, :]  # (B, q, 2, 2)
    delta = torch.stack(torch.broadcast_tensors(d_y[..., :, None], d_x[..., None, :]), dim=-1)
    weight = w_y[..., :, None] * w_x[..., None, :]
    return index.flatten(), delta.flatten(0, -2), weight.flatten()[:, None]


def pixels_around(position: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the two pixels around every position (...) on an axis, in pixels from the first to the `last`.

    Returns:
        Their numbers, the way from them to the position in halves of a pixel, and their weights; (..., 2) each.
    """
    before = position.floor()
    after_weight = position - before
    pixel = torch.minimum(torch.stack([before, before + 1], dim=-1).clamp(min=0), last)
    delta = 2 * (position[..., None] - pixel)
    return pixel.long(), delta, torch.stack([1 - after_weight, after_weight], dim=-1)
