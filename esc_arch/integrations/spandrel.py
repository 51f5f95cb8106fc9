"""ESC for spandrel (https://github.com/chaiNNer-org/spandrel), with which chaiNNer, ComfyUI and others load models."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esc_arch.archs.base import ESCFamily, SharedKernelNetwork
from esc_arch.checkpoints.conversion import build_network, identify
from esc_arch.checkpoints.reading import is_state_dict, require_usable
from esc_arch.errors import UserError
from esc_arch.tools.upscale.network import PRECISIONS, Upscaler

try:
    from spandrel import MAIN_REGISTRY, Architecture, ArchRegistry, ArchSupport, ImageModelDescriptor, ModelTiling
except ImportError as error:
    raise ImportError('esc_arch.integrations.spandrel needs spandrel: pip install "esc-arch[spandrel]"') from error

__all__ = ["ESCArch", "install"]


class ESCArch(Architecture[ESCFamily]):
    """All networks of the family: `ESC`, `ESCFP`, `ESCReal`, `ESCRealM`, `ESCRIB`, and `ESCLTE` at its default scale.

    spandrel passes only the weights, so what they do not determine is assumed: the window of ESCRIB is that of the
    published model (64), ESCLTE enlarges by 4.
    """

    def __init__(self) -> None:
        # An id of its own: spandrel may add an "ESC" itself, and refuses duplicate ids
        super().__init__(id="esc_arch", name="ESC", detect=_is_of_the_family)

    def load(self, state_dict: dict[str, Any]) -> ImageModelDescriptor[ESCFamily]:
        """The network with its weights, called with the test protocol of `Upscaler`.

        Raises:
            UserError: the weights are of no network of the family, or incomplete.
        """
        weights, section, _ = identify(_unwrapped(state_dict), {}, "The state dict")
        require_usable(weights, "The state dict")
        net = build_network(section)
        assert isinstance(net, ESCFamily)

        def call(model: ESCFamily, image: Tensor) -> Tensor:
            return _enlarged(model, section, image)

        descriptor = ImageModelDescriptor(
            net.eval(),
            weights,
            architecture=self,
            purpose="SR" if net.upscaling_factor > 1 else "Restoration",
            tags=[section["type"], f"{section['dim']}dim", f"{section['n_blocks']}blocks", f"{net.window_size}w"],
            supports_half=True,
            supports_bfloat16=True,
            scale=net.upscaling_factor,
            input_channels=3,
            output_channels=3,
            # (No size requirements: spandrel pads small images differently from the published protocol)
            tiling=ModelTiling.DISCOURAGED,
            call_fn=call,
        )
        if isinstance(net, SharedKernelNetwork):
            net.fold()
        return descriptor


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Make spandrel's `ModelLoader` accept ESC checkpoints. Calling it again does nothing.

    ESC is detected before everything registered already: spandrel takes the first match, and this detection is exact.
    An ESC that a later spandrel may have itself stays registered, for what is not recognised here.

    Args:
        registry: the one to add to; default: that of `ModelLoader`.
    """
    arch = ESCArch()
    if arch.id in registry:
        return
    first = [support.architecture.id for support in registry.architectures("detection")][:1]
    registry.add(ArchSupport.from_architecture(arch, before=tuple(first)))
    _allow_bytes()


def _allow_bytes() -> None:
    """Make spandrel read `.pth` files of ESCRealM, which describe the tail in a tensor of bytes.

    spandrel has a list of safe tensor types; this one cannot run code either.
    """
    try:
        listed = importlib.import_module("spandrel.__helpers.unpickler").safe_list
    except (ImportError, AttributeError):  # another version of spandrel
        return
    if isinstance(listed, set):
        listed.add(("torch", "ByteStorage"))


def _is_of_the_family(state_dict: Mapping[str, Any]) -> bool:
    try:
        return is_state_dict(weights := _unwrapped(state_dict)) and bool(identify(weights, {}, ""))
    except UserError:
        return False


def _unwrapped(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in `model` of the published ESC-LTE's files; other state dicts as they are."""
    weights = state_dict.get("sd")
    return weights if isinstance(weights, Mapping) else state_dict


def _enlarged(net: ESCFamily, section: Mapping[str, Any], image: Tensor) -> Tensor:
    parameter = next(net.parameters())
    precision = parameter.dtype if parameter.dtype in PRECISIONS.values() else torch.float32
    if parameter.dtype != torch.float32:
        # Coordinates and sums over the whole image need float32; autocast keeps them so, given float32 weights
        net = copy.deepcopy(net).float()
    return Upscaler(net, section, Path(), parameter.device, precision)(image).to(image.dtype)
