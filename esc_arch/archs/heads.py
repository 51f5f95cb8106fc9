"""The heads of networks, from the features behind the blocks to a region of the enlarged image.

A region comes out as it is in the whole image: its features are read with as much around them as it depends on, and
what depends on coordinates is computed from those of the whole image, with the rounding that they have there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .base import ESCFamily

__all__ = ["Head", "Read", "Region"]


class Region(NamedTuple):
    """Rows top .. bottom - 1 and columns left .. right - 1 of a map."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width

    def expand(self, margin: int, size: tuple[int, int]) -> Region:
        """With a margin on all sides, within a map of this height and width."""
        return Region(
            max(self.top - margin, 0),
            max(self.left - margin, 0),
            min(self.bottom + margin, size[0]),
            min(self.right + margin, size[1]),
        )

    def times(self, factor: int) -> Region:
        """The same region of a map that is larger by a whole number."""
        return Region(*(edge * factor for edge in self))

    def shrunk(self, factor: int) -> Region:
        """The pixels of a map that is smaller by a whole number which this region shows at least in part."""
        return Region(self.top // factor, self.left // factor, -(-self.bottom // factor), -(-self.right // factor))

    def crop(self, x: Tensor, shown: Region) -> Tensor:
        """This region of x (..., H, W), which shows another one."""
        return x[..., self.top - shown.top : self.bottom - shown.top, self.left - shown.left : self.right - shown.left]

    def halves(self, align: int) -> tuple[Region, Region] | None:
        """Cut across the longer side at a multiple of `align` from its beginning; None if it is too short."""
        if max(self.height, self.width) < 2 * align:
            return None
        if self.height >= self.width:
            middle = self.top + self.height // (2 * align) * align
            return self._replace(bottom=middle), self._replace(top=middle)
        middle = self.left + self.width // (2 * align) * align
        return self._replace(right=middle), self._replace(left=middle)


#: Gives a region of a map, (1, C, h, w).
Read = Callable[[Region], Tensor]


class Head:
    """A head of convolutions, pixel shuffles and repeated pixels; others are subclasses, see `ESCFamily.head`.

    Args:
        net: the network.
        image_size: (h, w) of the image without padding.
        size: (H, W) of the features, which are of the padded image.
        out_size: (H', W') of the enlarged image.

    Attributes:
        align: regions of the result begin at multiples of so many pixels.
        margin: how much around the features of a region is read.
    """

    #: Regions are made of what `prepare` makes of the whole map, not of the features themselves.
    prepares = False

    def __init__(
        self, net: ESCFamily, image_size: tuple[int, int], size: tuple[int, int], out_size: tuple[int, int]
    ) -> None:
        self.net, self.image_size, self.size, self.out_size = net, image_size, size, out_size
        self.align = 1 if net.any_scale else net.upscaling_factor * net.unshuffle_factor
        self.margin = net.head_margin

    @property
    def enlargement(self) -> float:
        """Pixels of the result to one of the features."""
        return self.out_size[0] * self.net.unshuffle_factor / self.image_size[0]

    def prepare(self, feat: Tensor, image: Tensor) -> Tensor:
        """What `block` reads in place of the features, from `margin` pixels around each; by default they themselves."""
        return feat

    def block(self, out: Region, features: Read, image: Read) -> Tensor:
        """A region of the enlarged image.

        Args:
            out: the region; it begins at multiples of `align`.
            features: reads those behind the blocks, or what `prepare` made.
            image: reads the image by a region of the features; (1, 3, f h, f w), f being `unshuffle_factor`.

        Returns:
            (3, h, w), float32.
        """
        region = out.shrunk(self.align).expand(self.margin, self.size)
        enlarged = self.reconstruct(features(region), image(region), region)
        return out.crop(enlarged, region.times(self.align))[0].float().contiguous()

    def reconstruct(self, feat: Tensor, image: Tensor, region: Region) -> Tensor:
        """`ESCFamily.reconstruct` of a region of the features."""
        return self.net.reconstruct(feat, self.net.shallow_features(image), image)
