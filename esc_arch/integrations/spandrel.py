"""ESC for spandrel (https://github.com/chaiNNer-org/spandrel), by which chaiNNer, ComfyUI and others load models."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esc_arch.archs.base import ESCFamily, SharedKernelNetwork
from esc_arch.checkpoints import recognise
from esc_arch.checkpoints.conversion import build_network, fitted_weights
from esc_arch.checkpoints.reading import is_state_dict
from esc_arch.checkpoints.recognition import own_names
from esc_arch.errors import UserError
from esc_arch.tools.upscale.network import PRECISIONS, Upscaler

try:
    from spandrel import MAIN_REGISTRY, Architecture, ArchRegistry, ArchSupport, ImageModelDescriptor, ModelTiling
except ImportError as error:
    raise ImportError('esc_arch.integrations.spandrel needs spandrel: pip install "esc-arch[spandrel]"') from error

__all__ = ["ESCArch", "install"]


class ESCArch(Architecture[ESCFamily]):
    """All networks of the family: `ESC`, `ESCFP`, `ESCReal`, `ESCRealM`, `ESCRIB`, and `ESCLTE` at its default scale.

    spandrel hands over weights alone, so what does not follow from them is assumed: the window of ESCRIB is that of
    the published model (64), ESCLTE enlarges by 4.
    """

    def __init__(self) -> None:
        # A name of its own, as spandrel may come to have an "ESC" too, and refuses the same one twice
        super().__init__(id="esc_arch", name="ESC", detect=_is_of_the_family)

    def load(self, state_dict: dict[str, Any]) -> ImageModelDescriptor[ESCFamily]:
        """The network with its weights, called by the protocol of `Upscaler`.

        Raises:
            UserError: the weights are of no network of the family, or not complete.
        """
        weights, section = _recognised(state_dict)
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
            # (No size requirements: spandrel pads small images in another way than the published protocol)
            tiling=ModelTiling.DISCOURAGED,
            call_fn=call,
        )
        if isinstance(net, SharedKernelNetwork):
            net.fold()
        return descriptor


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Have spandrel's `ModelLoader` accept ESC's checkpoints. Again, it does nothing.

    ESC is detected before all that is registered already: what spandrel finds first it takes, and this detection is
    exact. An ESC that spandrel itself may come to have stays registered, for what is not recognised here.

    Args:
        registry: the one to add to; that of `ModelLoader` by default.
    """
    arch = ESCArch()
    if arch.id in registry:
        return
    first = [support.architecture.id for support in registry.architectures("detection")][:1]
    registry.add(ArchSupport.from_architecture(arch, before=tuple(first)))
    _allow_bytes()


def _allow_bytes() -> None:
    """Have spandrel read `.pth` files of ESCRealM, whose description of the tail is a tensor of bytes.

    spandrel lists the types of tensors that it reads; like those, this one cannot run code.
    """
    try:
        listed = importlib.import_module("spandrel.__helpers.unpickler").safe_list
    except (ImportError, AttributeError):  # another version of spandrel
        return
    if isinstance(listed, set):
        listed.add(("torch", "ByteStorage"))


def _is_of_the_family(state_dict: Mapping[str, Any]) -> bool:
    if not is_state_dict(_unwrapped(state_dict)):
        return False
    try:
        _recognised(state_dict)
    except UserError:
        return False
    return True


def _unwrapped(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights within `model` of the published ESC-LTE's files; of others, as it is."""
    weights = state_dict.get("sd")
    return weights if isinstance(weights, Mapping) else state_dict


def _recognised(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and the `network_g` section of the network that all their names and shapes are those of."""
    weights = own_names(_unwrapped(state_dict))
    section = recognise(weights)
    return fitted_weights("The state dict", section, weights)[0], section


class _Protocol(nn.Module):
    """`Upscaler` as a module that has the parameters of its network."""

    def __init__(self, upscaler: Upscaler) -> None:
        super().__init__()
        self.net, self.upscaler = upscaler.net, upscaler

    def forward(self, image: Tensor) -> Tensor:
        return self.upscaler(image)


def _enlarged(net: ESCFamily, section: Mapping[str, Any], image: Tensor) -> Tensor:
    parameter = next(net.parameters())
    half = parameter.dtype in PRECISIONS.values()
    upscaler = Upscaler(net, section, Path(), parameter.device, parameter.dtype if half else torch.float32)
    if parameter.dtype == torch.float32:
        return upscaler(image).to(image.dtype)
    # Coordinates, sums over the whole image and the like would be spoilt by 16 bits; from float32 weights, autocast
    # makes 16 bits of all but these
    protocol = _Protocol(upscaler)
    weights = {name: tensor.float() for name, tensor in protocol.state_dict().items() if tensor.is_floating_point()}
    return functional_call(protocol, weights, (image,)).to(image.dtype)
