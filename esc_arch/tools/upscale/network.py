"""A checkpoint as a network that is ready to enlarge images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esc_arch.archs.base import ESCFamily, SharedKernelNetwork
from esc_arch.checkpoints.conversion import build_network, open_checkpoint
from esc_arch.errors import UserError
from esc_arch.ops.padding import reflect_pad_to_multiple
from esc_arch.ops.resize import scaled_size

__all__ = ["PRECISIONS", "Upscaler", "find_device", "load"]

#: What networks may compute in, by name.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Images that run together on a GPU: as many as have so many pixels, and at most so many.
BATCH_PIXELS, BATCH_LARGEST = 2**18, 16


@dataclass(frozen=True, eq=False)
class Upscaler:
    """A network with its weights, in evaluation mode on its device, and what its file says of it.

    Attributes:
        net: the network.
        network_g: its type and options, as an option file has them.
        source: the file that its weights are from.
        metadata: plain values in the file beside the weights, such as `iter`.
        assumptions: what of network_g does not follow from the weights, a sentence each.
        device: where it computes.
        precision: what it computes in: torch.float32, or a type for autocast.
    """

    net: ESCFamily
    network_g: Mapping[str, Any]
    source: Path
    device: torch.device
    precision: torch.dtype = torch.float32
    metadata: Mapping[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """By how much it enlarges; ESCLTE's is what it enlarges by when nothing else is asked for."""
        return self.net.upscaling_factor

    @property
    def any_scale(self) -> bool:
        """True if it can be asked for any scale."""
        return self.net.any_scale

    def output_size(self, height: int, width: int, scale: float | None = None) -> tuple[int, int]:
        """The size of what an image of this size becomes.

        Raises:
            UserError: a scale that this network has not.
        """
        if scale is not None and scale != self.scale and not self.any_scale:
            raise UserError(f"{self.source.name} enlarges by {self.scale:g}, not by {scale:g}.")
        return scaled_size((height, width), self.scale if scale is None else scale)

    @torch.no_grad()
    def __call__(self, image: Tensor, scale: float | None = None) -> Tensor:
        """The whole image at once, by the protocol of the published scores (see `esc_arch.models.ESCModel`).

        Args:
            image: (B, 3, H, W), RGB in 0 .. 1, of any floating type, on any device.
            scale: of ESCLTE, any; others have their own.

        Returns:
            (B, 3, H', W'), float32, on the network's device, not clipped.

        Raises:
            UserError: a scale that this network has not.
        """
        height, width = image.shape[-2:]
        size = self.output_size(height, width, scale)
        padded = reflect_pad_to_multiple(image.to(self.device, torch.float32), self.net.window_size)
        with self.computing():
            return self.net.enlarge(padded, (height, width), size).float()

    def computing(self) -> AbstractContextManager[Any]:
        """The context that the network, or parts of it, compute in."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def batch_size(self, height: int, width: int) -> int:
        """How many images of this size run together by default: small ones, on a GPU."""
        return max(1, min(BATCH_LARGEST, BATCH_PIXELS // (height * width))) if self.device.type == "cuda" else 1

    def __repr__(self) -> str:
        number = sum(parameter.numel() for parameter in self.net.parameters())
        device = str(self.device).replace("cpu", "CPU")
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == self.precision)
        return f"{self.network_g['type']} x{self.scale:g}, {number:,} parameters, {device}, {precision}"


def load(
    weights: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
    param_key: str | None = None,
    window_size: int | None = None,
) -> Upscaler:
    """A network from its checkpoint alone: recognised, built, and ready to enlarge images.

    Args:
        weights: a .pth or .safetensors file.
        device: auto (the first GPU, else the CPU), or a device's name.
        precision: a key of `PRECISIONS`; auto: fp16 on a GPU, fp32 on a CPU, where half precision is slower.
        param_key: the entry of the file wanted; None for the first of `params_ema`, `params` and others.
        window_size: of ESCRIB, whose weights do not say it.

    Raises:
        UserError: the file cannot be read or is of no network of the family; the device is not there; the precision
            is not known.
    """
    place = find_device(device)
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"The precision {precision!r} is not known; allowed: auto, {', '.join(PRECISIONS)}.")
    checkpoint = open_checkpoint(weights, param_key=param_key, window_size=window_size)
    net = build_network(checkpoint.network_g)
    assert isinstance(net, ESCFamily)
    net.load_state_dict(checkpoint.weights)
    if isinstance(net, SharedKernelNetwork):
        net.fold()
    half = precision == "auto" and place.type == "cuda"
    return Upscaler(
        net.eval().requires_grad_(False).to(place),
        checkpoint.network_g,
        Path(weights),
        place,
        torch.float16 if half else PRECISIONS.get(precision, torch.float32),
        checkpoint.beside,
        tuple(checkpoint.assumptions),
    )


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name, auto for the first GPU or else the CPU; UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("There is no CUDA device here: use device='cpu', or auto.")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {str(name)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
