"""Low-rank factors in place of bias tables (FlashBias), and the error that they make."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.modules.window_attention import bias_factors
from esc_arch.ops.window_attention import dense_bias

from .conversion import Checkpoint, build_network

__all__ = ["BiasError", "factorise", "output_error"]

TABLE = ".relative_position_bias"


class BiasError(NamedTuple):
    """How well factors reproduce the bias of one attention layer.

    Attributes:
        layer: the layer's name.
        largest: the largest absolute error, in units of attention scores.
        kept: the share of the bias's energy (sum of squares) that the factors keep.
    """

    layer: str
    largest: float
    kept: float


def factorise(checkpoint: Checkpoint, rank: int) -> tuple[Checkpoint, list[BiasError]]:
    """Replace bias tables by low-rank factors (FlashBias), in the published convention.

    Returns:
        The checkpoint, its network_g made to fit, and the errors of every layer.

    Raises:
        UserError: the network has no bias tables or one with non-finite numbers, or the rank is not within
            1 .. window_size^2.
    """
    section = checkpoint.network_g
    if not any(name.endswith(TABLE) for name in checkpoint.weights):
        raise UserError(
            f"This {section['type']} has no bias table to factorise: its attn_type is {section['attn_type']}."
        )
    window = section["window_size"]
    if not 1 <= rank <= window**2:
        raise UserError(f"The rank is {rank}; for windows of {window} x {window} it must be within 1 .. {window**2}.")
    weights: dict[str, Tensor] = {}
    errors = []
    for name, tensor in checkpoint.weights.items():
        if not name.endswith(TABLE):
            weights[name] = tensor
            continue
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds infinities or NaN.")
        layer = name.removesuffix(TABLE)
        q, k = bias_factors(tensor, window, rank)
        weights |= {f"{layer}.flashbias_q": q, f"{layer}.flashbias_k": k}
        bias = dense_bias(tensor.double(), window)
        error = q.double() @ k.double().mT - bias
        energy = bias.square().sum().item()
        kept = 1 - error.square().sum().item() / energy if energy else 1.0
        errors.append(BiasError(layer, error.abs().max().item(), kept))
    factors = {"attn_type": "FlashBias", "flashbias_rank": rank}
    return replace(checkpoint, weights=weights, network_g={**section, **factors}), errors


@torch.no_grad()
def output_error(before: Checkpoint, after: Checkpoint, image: Tensor) -> tuple[float, float]:
    """Run two networks on an image (1, 3, H, W) in 0 .. 1: the largest difference, and the PSNR in dB."""
    outputs = []
    for checkpoint in (before, after):
        net = build_network(checkpoint.network_g)
        net.load_state_dict(checkpoint.weights)
        outputs.append(net.eval().to(image.device)(image).double())
    difference = outputs[0] - outputs[1]
    return difference.abs().max().item(), (-10 * difference.square().mean().log10()).item()
