"""Which network weights are of, and with which options, from their names and shapes alone: the networks tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from esc_arch.archs.base import NETWORKS
from esc_arch.archs.shapes import Shapes, some
from esc_arch.errors import UserError

__all__ = ["UnknownNetwork", "describe_difference", "examine", "own_names", "recognise"]

_RRDBNET = "RRDBNet (ESRGAN, Real-ESRGAN, BSRGAN)"
#: Networks of others, by a parameter that hardly any other network has under this name.
OTHERS = {
    # (Without what all names of a file begin with)
    "body.0.rdb1.conv1.weight": _RRDBNET,
    "RRDB_trunk.0.RDB1.conv1.weight": _RRDBNET,
    "1.sub.0.RDB1.conv1.0.weight": _RRDBNET,
    "layers.0.residual_group.blocks.0.conv_block.cab.0.weight": "HAT",
    "layers.0.residual_group.blocks.0.attn.logit_scale": "Swin2SR",
    "layers.0.residual_group.blocks.0.attn.relative_position_bias_table": "SwinIR",
    "layers.0.blocks.0.ffn.sg.norm.weight": "DAT",
    "residual_layer.0.residual_layer.0.layer.0.fn.0.weight": "OmniSR",
    "block_1.c1_r.eval_conv.weight": "SPAN",
    "unet1.conv1.conv.0.weight": "Real-CUGAN",
    "3.weight": "SRVGGNetCompact (Real-ESRGAN)",  # numbers alone
}


class UnknownNetwork(UserError):
    """Weights are of no network of the family."""


def recognise(weights: Mapping[str, Tensor], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `network_g` section of the network that weights are of.

    Args:
        weights: a state dict; tensors on the meta device will do. A prefix that all names share is no obstacle.
        known: options known from elsewhere, as from a file's metadata. They decide only where the weights leave a
            choice: `window_size` of RIB, whose parameters do not depend on it; `mid_dim` of upsamplers that do not
            use it; `exp_ratio` among ratios that give the same width.

    Returns:
        `type` and the constructor's options, in the order of the option files; `{"type": "ESC", "dim": 64, ...}`.

    Raises:
        UnknownNetwork: the weights are of no network of the family; the message names another, or lists names found.
    """
    return examine(weights, known)[0]


def examine(weights: Mapping[str, Tensor], known: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """`recognise`, with what in it is an assumption, a sentence each."""
    shapes = Shapes(own_names(weights), known or {})
    asked = [network for network in NETWORKS if "recognise" in vars(network)]
    for network in asked:
        options = network.recognise(shapes)
        if options is not None:
            return {"type": network.__name__, **options}, shapes.assumptions
    if (other := next((OTHERS[name] for name in OTHERS if name in shapes.weights), None)) is not None:
        raise UnknownNetwork(
            f"These are not the weights of an ESC network: this looks like {other}. Where spandrel is installed (pip "
            'install "esc-arch[spandrel]"), basicsr upscale runs it.'
        )
    raise UnknownNetwork(
        "These are not the weights of an ESC network (or not all of them): their names are those of none of "
        f"{', '.join(sorted(network.__name__ for network in asked))}. They hold {some([*shapes.weights]) or 'nothing'}."
    )


def describe_difference(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """How the network that weights are of differs from the one with the state dict `own`, by its options.

    None when either is no network of the family, or all options that shapes depend on are the same.
    """
    try:
        # Only shapes matter here, so the same is assumed on both sides where they leave a choice
        theirs, ours = (
            recognise({name: tensor.to("meta") for name, tensor in side.items()}) for side in (weights, own)
        )
    except UserError:
        return None
    same_type = theirs["type"] == ours["type"]

    def differing(side: dict[str, Any], other: dict[str, Any]) -> str:
        keys = [key for key in side if (side[key] != other[key] if key in other else same_type) and key != "type"]
        return " with " * bool(keys) + ", ".join(f"{key}: {side[key]}" for key in keys)

    this, that = differing(theirs, ours), differing(ours, theirs)
    if same_type and not this and not that:
        return None
    return f"the checkpoint is {theirs['type']}{this}, the network {ours['type']}{that}"


def own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that the networks here have for them.

    Names lose what all of them begin with (`net_g.`, `model.`, `generator.`): a network of the family has several
    parts, so no first word common to all names is its own. Then each network renames those of its published files.
    """
    stripped = dict(weights)
    while len(first := {name.partition(".")[0] for name in stripped}) == 1 and all("." in name for name in stripped):
        prefix = f"{first.pop()}."
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    for network in NETWORKS:
        stripped = network.own_names(stripped)
    return stripped
