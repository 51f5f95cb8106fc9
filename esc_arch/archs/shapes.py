"""Read a network's options off the names and shapes of a state dict; every `recognise` uses this."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from esc_arch.errors import UserError

__all__ = ["Shapes", "some"]

#: Expansions in published models; of several numbers that give the same width one of these is meant.
PUBLISHED_RATIOS = (1.25, 2)
#: Characters of a name that a message shows.
LONGEST_NAME = 80
#: How many names a message lists before it says how many more there are.
LISTED = 8


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


class Shapes:
    """Reads options off a state dict; what is missing or has an impossible shape raises a UserError that names it.

    Args:
        weights: names as the networks here have them; tensors on the meta device will do.
        known: options known from elsewhere, such as a file's metadata, for what shapes leave open.

    Attributes:
        assumptions: options that follow neither from the weights nor from `known`, a sentence each.
    """

    def __init__(self, weights: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
        self.weights = weights
        self.known = known
        self.assumptions: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def size(self, name: str, axis: int) -> int:
        """The size of a tensor along an axis."""
        tensor = self.weights.get(name)
        if tensor is None:
            raise UserError(f"The weights are nearly those of an ESC network, but {name} is missing.")
        if not -tensor.dim() <= axis < tensor.dim():
            raise self.error(name, "of too few dimensions")
        if tensor.shape[axis] == 0:
            raise self.error(name, "which is empty")
        return tensor.shape[axis]

    def error(self, name: str, what: str) -> UserError:
        """The error for a tensor that does not fit; `what` is such as "of too few dimensions"."""
        shape = tuple(self.weights[name].shape)
        return UserError(f"The weights are nearly those of an ESC network, but {name} is {shape}, {what}.")

    def count(self, prefix: str) -> int:
        """The number of parts whose names are numbered after a prefix, from 0 on."""
        numbers = {name.removeprefix(prefix).partition(".")[0] for name in self.weights if name.startswith(prefix)}
        count = len(numbers)
        if unexpected := sorted(numbers - {str(number) for number in range(count)}):
            raise UserError(
                f"The weights are nearly those of an ESC network, but the {count} parts that begin with {prefix} are "
                f"not numbered from 0 to {count - 1}: there is {prefix}{unexpected[0][:LONGEST_NAME]}."
            )
        return count

    def root(self, name: str, axis: int, what: str, times: int = 1) -> int:
        """The side of a square of which a size is a number of `times`; `what` describes it in the error."""
        size = self.size(name, axis)
        side = math.isqrt(size // times)
        if side < 1 or size != times * side**2:
            raise self.error(name, f"which is not {what}")
        return side

    def subpixels(self, name: str) -> int:
        """The scale of a convolution before a pixel shuffle to 3 colours."""
        return self.root(name, 0, "3 colours times a square of sub-pixels", times=3)

    def options(
        self,
        *,
        scale: float,
        kernel: str = "plk_filter",
        attention: tuple[int, int, dict[str, Any]] | None = None,
        **further: Any,
    ) -> dict[str, Any]:
        """The constructor's options: those of all networks and further ones, in the order of the option files.

        Args:
            scale: upscaling_factor.
            kernel: name of the large kernel, (pdim, ..., K, K).
            attention: window_size, num_heads and other options of the attention; None for `attention()`.
        """
        dim = self.size("blocks.0.attn.to_qkv.weight", 1)
        window_size, num_heads, of_attention = attention or self.attention()
        return {
            "dim": dim,
            "pdim": self.size(kernel, 0),
            "kernel_size": self.size(kernel, -1),
            "n_blocks": self.count("blocks."),
            "conv_blocks": self.count("blocks.0.pconvs."),
            "window_size": window_size,
            "num_heads": num_heads,
            "upscaling_factor": scale,
            "exp_ratio": self._exp_ratio(dim),
            **further,
            **of_attention,
        }

    @property
    def use_ln(self) -> bool:
        """True if there are LayerNorms before the ConvFFNs."""
        return "blocks.0.lns.0.weight" in self.weights

    def attention(self, rank: str = "flashbias_rank") -> tuple[int, int, dict[str, Any]]:
        """Window, heads and further options of an attention with a bias table, or with factors (option `rank`)."""
        table, factors = "blocks.0.attn.relative_position_bias", "blocks.0.attn.flashbias_q"
        if factors in self.weights:
            window = self.root(factors, 1, "(heads, window^2, rank)")
            return window, self.size(factors, 0), {"attn_type": "FlashBias", rank: self.size(factors, 2)}
        side = self.root(table, 1, "(heads, (2 window - 1)^2)")
        if side % 2 == 0:
            raise self.error(table, "which is not (heads, (2 window - 1)^2)")
        return (side + 1) // 2, self.size(table, 0), {"attn_type": "auto"}

    def _exp_ratio(self, dim: int) -> float:
        name = "blocks.0.convffns.0.proj.weight"
        if name not in self:
            return PUBLISHED_RATIOS[0]
        hidden, known = self.size(name, 0), self.known.get("exp_ratio")
        # Best first: known, published, of few digits (the width is the ratio times dim, rounded down), one that fits
        ratios: list[float] = [*PUBLISHED_RATIOS, *(math.ceil(hidden / dim * 10**n) / 10**n for n in range(4))]
        if isinstance(known, (int, float)) and 0 < known <= hidden + 1:
            ratios.insert(0, known)
        ratio = next(ratio for ratio in (*ratios, (hidden + 0.5) / dim) if int(dim * ratio) == hidden)
        return int(ratio) if ratio == int(ratio) else ratio
