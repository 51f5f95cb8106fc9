"""The networks whose shapes backends are tried with."""

from __future__ import annotations

from dataclasses import dataclass

from esc_arch.ops.operation import SampleShapes, Size

__all__ = ["NETWORKS", "Network", "nearest"]


@dataclass(frozen=True)
class Network(SampleShapes):
    """Shapes that a network computes with.

    Attributes:
        small: what results are compared on: no multiple of the window, and few enough windows for float64.
        image, patches: what inference and training are timed on. What PyTorch keeps of the scores of all patches for
            their gradients must fit into 4 GB.
    """

    small: Size = (2, 35, 45)
    image: Size = (1, 180, 320)
    patches: Size = (4, 64, 64)


NETWORKS = {
    "ESC": Network(),
    "ESC-XL": Network(192, 12, 48, 48, 13, 240, small=(1, 41, 30), image=(1, 96, 144), patches=(1, 96, 96)),
}


def nearest(*, channels: int = 0, pdim: int = 0) -> str:
    """The network of `NETWORKS` nearest to one with these channels, or these channels that ConvAttn convolves."""
    # (Compared with numbers only, so that torch.compile can trace it, where these may be symbols)
    return "ESC" if channels <= 128 and pdim <= 32 else "ESC-XL"
