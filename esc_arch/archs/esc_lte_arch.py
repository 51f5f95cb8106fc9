"""ESC for any scale: its features with a local texture estimator in place of the pixel shuffle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from esc_arch.archs.base import SharedKernelNetwork
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.modules.fused import conv3x3
from esc_arch.modules.lte import LTE, query_grid
from esc_arch.ops.resize import scaled_size

from .heads import Head, Read, Region
from .shapes import Shapes

__all__ = ["ESCLTE"]

#: What `normalize` subtracts from images and divides them by.
IMAGE_MEAN = IMAGE_STD = 0.5
#: Points of a large image at a time: each takes some tens of kilobytes.
LARGEST_CHUNK = 4096
IMNET_LAYER = re.compile(r"lte\.imnet\.([0-9]{1,4})\.weight")


@dataclass(eq=False, repr=False)
class ESCLTE(SharedKernelNetwork):
    """ESC (arXiv 2503.06671) with the upsampler of LTE (Lee & Jin, CVPR 2022): one network for every scale.

    Shapes: (B, 3, H, W) -> (B, 3, H', W'), RGB in 0 .. 1, any H, W >= 1 and any H', W' >= 1; or -> (B, 3, Q), colours
    at Q points. The same in training and evaluation, and for each image of a batch as for the image alone. The input
    is not modified.

    All but the upsampler `lte` has the names of ESC's parameters: with `strict_load_g: false` training starts from a
    checkpoint of ESC.

    Args:
        upscaling_factor: the scale when none is asked for; any number above 0.
        hidden_dim, mlp_dims, max_scale: see `LTE`.
        query_chunk: points computed at a time when there are no gradients, which bounds the memory; None for all at
            once. The result is the same within rounding.
        normalize: shift the image from 0 .. 1 to -1 .. 1 for the network, and its result back, as the published ESC-LTE
            does. This cannot be part of the first convolution's weights, whose padding would not be shifted. Since the
            same weights mean another network without it, checkpoints of such networks have a tensor more,
            `image_mean_std`.
        others: see `ESC`.

    Raises:
        ValueError: an invalid option, with the value and what is allowed.
    """

    subpixel_conv = None
    head_margin = 3  # two convolutions, and the pixels on both sides of a point
    any_scale = True

    upscaling_factor: float = 4  # type: ignore[assignment]  # others have whole ones
    _: KW_ONLY
    hidden_dim: int = 256
    mlp_dims: Sequence[int] = (256, 256, 256)
    max_scale: float = 4
    query_chunk: int | None = 16384
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_chunk is not None and self.query_chunk < 1:
            raise ValueError(
                f"query_chunk is {self.query_chunk}; it must be at least 1, or null for all points at once."
            )
        self.proj = Conv3x3(3, self.dim)
        self.blocks = self.new_blocks()
        self.last = Conv3x3(self.dim, self.dim)
        self.lte = LTE(
            self.dim,
            hidden_dim=self.hidden_dim,
            mlp_dims=self.mlp_dims,
            max_scale=self.max_scale,
            # The image that LTE adds would be shifted there and back, so that only what is added to it is scaled
            residual_scale=IMAGE_STD if self.normalize else 1,
        )
        if self.normalize:
            self.register_buffer("image_mean_std", torch.tensor([IMAGE_MEAN, IMAGE_STD]))

    def forward(
        self,
        x: Tensor,
        scale: float | Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
        coords: Tensor | None = None,
        cell: Tensor | None = None,
    ) -> Tensor:
        """The enlarged image, or the colours at `coords`.

        Args:
            x: (B, 3, H, W).
            scale: of height and width, or one for each; without this and size, `upscaling_factor`. Sizes are rounded.
            size: (H', W') wanted, in place of a scale.
            coords: (B, Q, 2), points as (y, x) in -1 .. 1, see `esc_arch.modules.lte`.
            cell: (B, 2), with coords: height and width of a pixel of the image that the points are from, such as
                (2 / H', 2 / W').

        Returns:
            (B, 3, H', W'), or (B, 3, Q) for coords.

        Raises:
            ValueError: invalid points or sizes, or more than one of them.
        """
        if sum(given is not None for given in (scale, size, coords)) > 1:
            raise ValueError("more than one of scale, size and coords is given; give one of them, or none.")
        if (coords is None) != (cell is None):
            raise ValueError("coords and cell go together; give both or none.")
        if coords is not None and cell is not None:
            batch = x.shape[0]
            if coords.dim() != 3 or (coords.shape[0], coords.shape[2]) != (batch, 2) or cell.shape != (batch, 2):
                raise ValueError(
                    f"coords are {tuple(coords.shape)} and cell {tuple(cell.shape)}; for a batch of {batch} they must "
                    f"be ({batch}, Q, 2) and ({batch}, 2)."
                )
            return self._query(x, coords, cell)
        if size is None:
            size = scaled_size(x.shape[-2:], self.upscaling_factor if scale is None else scale)
        elif min(size) < 1:
            raise ValueError(f"size is {tuple(size)}; height and width must be at least 1.")
        return self.enlarge(x, (x.shape[-2], x.shape[-1]), size)

    def enlarge(self, image: Tensor, image_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
        part = (image_size[0] / image.shape[-2], image_size[1] / image.shape[-1])
        coords, cell = query_grid(out_size, device=image.device, part=part)
        count = image.shape[0]
        return self._query(image, coords.expand(count, -1, -1), cell.expand(count, -1)).unflatten(-1, out_size)

    def _query(self, x: Tensor, coords: Tensor, cell: Tensor) -> Tensor:
        return self.lte(self.features(x), x, coords, cell, chunk=self.query_chunk)

    def shallow_features(self, x: Tensor) -> Tensor:
        return super().shallow_features((x - IMAGE_MEAN) / IMAGE_STD if self.normalize else x)

    def features(self, x: Tensor) -> Tensor:
        """What the upsampler starts from: (B, 3, H, W) -> (B, dim, H, W). It does not depend on the scale."""
        shallow = self.shallow_features(x)
        return conv3x3(self.last, self.run_blocks(shallow, *self.large_kernels()), residual=shallow)

    def head(self, *sizes: tuple[int, int]) -> Head:
        return _LTEHead(self, *sizes)

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        if "lte.phase.weight" not in shapes:
            return None
        found = {name: IMNET_LAYER.fullmatch(name) for name in shapes.weights}
        layers = sorted((int(match[1]), shapes.size(name, 0)) for name, match in found.items() if match is not None)
        scale = shapes.known.get("upscaling_factor")  # when none is asked for, which weights do not tell
        return shapes.options(
            scale=scale if isinstance(scale, (int, float)) and scale > 0 else 4,
            use_ln=shapes.use_ln,
            hidden_dim=shapes.size("lte.coef.weight", 0),
            mlp_dims=[width for _, width in layers[:-1]],
            normalize="image_mean_std" in shapes,
        )

    @classmethod
    def own_names(cls, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The published ESC-LTE has other names, and normalizes its images."""
        if "encoder.plk_filter" not in weights or "imnet.layers.0.weight" not in weights:
            return weights
        renamed = {
            name.removeprefix("encoder.")
            if name.startswith("encoder.")
            else f"lte.{name.replace('imnet.layers.', 'imnet.')}": tensor
            for name, tensor in weights.items()
        }
        return renamed | {"image_mean_std": torch.tensor([IMAGE_MEAN, IMAGE_STD])}

    def conflict_with(self, weights: Mapping[str, Tensor]) -> str | None:
        given = "image_mean_std" in weights
        if "lte.phase.weight" not in weights or given == self.normalize:
            return None
        return (
            "The published ESC-LTE normalizes its images, esc_arch's own does not: give network_g: normalize: "
            f"{str(given).lower()}."
        )


class _LTEHead(Head):
    """Colours at points: of any scale, so that regions begin at any pixel."""

    net: ESCLTE

    def block(self, out: Region, features: Read, image: Read) -> Tensor:
        net = self.net
        part = self.image_size[0] / self.size[0], self.image_size[1] / self.size[1]
        coords, cell = query_grid(self.out_size, part=part, region=out)
        # The upper left one of the pixels around the first point, and around the last
        pixels = ((coords[[0, -1]] + 1) * (torch.tensor(self.size) / 2) - 0.5).floor().int()
        (top, left), (bottom, right) = pixels.tolist()
        region = Region(top, left, bottom + 1, right + 1).expand(self.margin, self.size)
        shown = image(region)
        feat = conv3x3(net.last, features(region), residual=net.shallow_features(shown)).float()
        chunk = min(net.query_chunk or LARGEST_CHUNK, LARGEST_CHUNK)
        coords, cell = coords[None].to(feat.device), cell[None].to(feat.device)
        colours = net.lte(feat, shown, coords, cell, chunk=chunk, origin=region[:2], size=self.size)
        return colours[0].unflatten(-1, (out.height, out.width))
