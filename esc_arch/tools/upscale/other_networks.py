"""Networks of other families as `Upscaler`s, built and run by spandrel (https://github.com/chaiNNer-org/spandrel)."""

from __future__ import annotations

import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from torch import Tensor, nn

from esc_arch.checkpoints.reading import find_weights, read_checkpoint
from esc_arch.checkpoints.recognition import UnknownNetwork
from esc_arch.errors import UserError

from .network import PRECISIONS, Upscaler, find_device, load

__all__ = ["OVERLAP", "OtherNetwork", "load_any"]

#: Pixels of the input that tiles see beyond their edges: about what the result depends on visibly.
OVERLAP = 32


class OtherNetwork(nn.Module):
    """A network of spandrel's, with what `Upscaler` asks of one of the family."""

    window_size = unshuffle_factor = 1
    any_scale = False

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.model, self.upscaling_factor, self._descriptor = descriptor.model, descriptor.scale, descriptor
        sequences = [each for each in self.model.modules() if isinstance(each, nn.ModuleList | nn.Sequential)]
        #: What runs one after the other, for progress.
        self.blocks = list(max(sequences, key=len, default=()))

    def enlarge(self, image: Tensor, *_: Any) -> Tensor:
        """(B, 3, H * scale, W * scale) for (B, 3, H, W)."""
        enlarged: Tensor = self._descriptor(image)
        return enlarged


def load_any(weights: str | Path, *, device: str = "auto", precision: str = "auto", **options: Any) -> Upscaler:
    """`network.load`, and networks of other families where spandrel is installed and knows them.

    The file is read as ours are: spandrel is given tensors, and unpickles nothing.

    Raises:
        UserError: as `network.load`; a network that does not turn RGB into RGB.
    """
    try:
        return load(weights, device=device, precision=precision, **options)
    except UnknownNetwork as error:
        unknown = error
    try:
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError
    except ImportError:
        raise unknown from None
    tensors = find_weights(read_checkpoint(weights), None, weights)[1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, about how networks are written
            found = ModelLoader().load_from_state_dict(tensors)
    except UnsupportedModelError:
        raise unknown from None
    except Exception as error:  # of weights that are not what their names say, about anything
        raise UserError(f"{weights}: spandrel cannot load it: {shorten(str(error) or repr(error), 300)}.") from error
    name = found.architecture.name
    if not isinstance(found, ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise UserError(f"{weights} is {name}, a {found.purpose} network that does not take and give RGB images.")
    place = find_device(device)
    half = place.type == "cuda" and precision == "auto" and found.supports_half
    return Upscaler(
        cast(Any, OtherNetwork(found).eval().requires_grad_(False).to(place)),
        {"type": name},
        Path(weights),
        place,
        torch.float16 if half else PRECISIONS.get(precision, torch.float32),
        assumptions=(f"run by spandrel; an image in tiles is approximate: they overlap by {OVERLAP} pixels",),
    )
