"""The networks that backends are tried with the shapes of."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NETWORKS", "Network", "nearest"]

#: Batch, height and width of a map.
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Network:
    """Shapes that a network computes with.

    Attributes:
        channels, heads, window: of its window attention; the side of a window in pixels.
        pdim, kernel_size: of its ConvAttn: channels that are convolved, and the side of the large kernel.
        small: what results are compared on: no multiple of the window, and few enough windows for float64.
        image, patches: what inference and training are timed on. What PyTorch keeps of the scores of all patches for
            their gradients must fit into 4 GB.
    """

    channels: int
    heads: int
    window: int
    pdim: int
    kernel_size: int
    small: Size
    image: Size
    patches: Size


NETWORKS = {
    "ESC": Network(64, 4, 32, 16, 13, small=(2, 35, 45), image=(1, 180, 320), patches=(4, 64, 64)),
    "ESC-XL": Network(192, 12, 48, 48, 13, small=(1, 41, 30), image=(1, 96, 144), patches=(1, 96, 96)),
}

_SMALL, _LARGE = NETWORKS


def _between(part: str) -> int:
    return int(sum(getattr(network, part) for network in NETWORKS.values()) // len(NETWORKS))


_CHANNELS, _PDIM = _between("channels"), _between("pdim")


def nearest(*, channels: int = 0, pdim: int = 0) -> str:
    """The network of `NETWORKS` that is nearest to one of so many channels, or so many that ConvAttn convolves."""
    # (Compared with numbers only, so that a compiler at work follows, for which these may be symbols)
    return _SMALL if channels <= _CHANNELS and pdim <= _PDIM else _LARGE
