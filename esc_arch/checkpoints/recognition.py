"""Which network weights are of, and with which options, from their names and shapes alone.

How the types are told apart (`DISTINCT_NAMES`): ESCLTE's tail is `lte`, ESCRIB's `upsampler.up_conv`; ESCFP has two
shared filters, `lk_channel` and `lk_spatial`, the others `plk_filter`; ESC has one convolution `to_img`. ESC-Real has
a way of the image around the blocks, `skip`, and a tail `to_img` of several layers: that of ESCReal begins with an
enlargement, so that its first weights are `to_img.1` (or it is a DySample, `to_img.offset`), while every tail of
ESCRealM begins with weights, `to_img.0`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esc_arch.errors import UserError
from esc_arch.modules.upsample import UPSAMPLERS, UniversalUpsampler

from .reading import some

__all__ = ["describe_difference", "examine", "own_names", "recognise"]

#: What only one type has among its names, in the order to look for it.
DISTINCT_NAMES = {
    "lte.phase.weight": "ESCLTE",
    "upsampler.up_conv.weight": "ESCRIB",
    "lk_spatial": "ESCFP",
    "to_img.weight": "ESC",
    "to_img.0.weight": "ESCRealM",
    "to_img.0.offset.weight": "ESCRealM",
    "to_img.offset.weight": "ESCReal",
    "to_img.1.weight": "ESCReal",
}
#: What every type has, besides a large kernel and one of the above.
COMMON_NAMES = ("blocks.0.attn.to_qkv.weight", "blocks.0.attn.to_out.weight", "blocks.0.conv_out.weight")
#: Expansions in published models; of several numbers that give the same width one of these is meant.
PUBLISHED_RATIOS = (1.25, 2)
PUBLISHED_RIB_WINDOW = 64
#: Images are padded to whole windows: a file's word for a larger one would have any image fill the memory.
LARGEST_RIB_WINDOW = 1024
DEFAULT_MID_DIM = 48
#: Characters of a name that a message shows.
LONGEST_NAME = 80
DYSAMPLE_GROUPS = 4
META = "to_img.MetaUpsample"
NORMALIZED = "image_mean_std"
#: Tails that traiNNer-redux has and ESCRealM here has not, by what is found among their names alone.
UNSUPPORTED_TAILS = {
    "lda": re.compile(r"to_img\.[0-9]+\.proj_q\.weight"),
    "pa_up": re.compile(r"to_img\.[0-9]+\.conv\.0\.weight"),
}
IMNET_LAYER = re.compile(r"lte\.imnet\.([0-9]{1,4})\.weight")


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
        UserError: the weights are of no network of the family; the message lists names looked for and names found.
    """
    return examine(weights, known).section


class Recognised(NamedTuple):
    """The `network_g` section, and what in it is an assumption, a sentence each."""

    section: dict[str, Any]
    assumptions: list[str]


def examine(weights: Mapping[str, Tensor], known: Mapping[str, Any] | None = None) -> Recognised:
    """`recognise`, with what it had to assume."""
    reader = _Reader(own_names(weights), known or {})
    return Recognised(reader.section(), reader.assumptions)


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

    Names are freed of what all of them begin with (`net_g.`, `model.`, `generator.`): a network of the family has
    several parts, so that no first word common to all names can be its own. Those of the published ESC-LTE, which
    normalizes its images, become those of `ESCLTE` with ``normalize``.
    """
    stripped = dict(weights)
    while len(first := {name.partition(".")[0] for name in stripped}) == 1 and all("." in name for name in stripped):
        prefix = f"{first.pop()}."
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    if "encoder.plk_filter" not in stripped or "imnet.layers.0.weight" not in stripped:
        return stripped
    renamed = {_own_name_of_published_lte(name): tensor for name, tensor in stripped.items()}
    return renamed | {NORMALIZED: torch.full((2,), 0.5)}


def _own_name_of_published_lte(name: str) -> str:
    if name.startswith("encoder."):
        return name.removeprefix("encoder.")
    return f"lte.{name.replace('imnet.layers.', 'imnet.')}"


class _Tail(NamedTuple):
    """A tail of ESCRealM: the upsampler, its scale, and mid_dim if it uses that."""

    upsampler: str
    scale: int
    mid_dim: int | None


class _Reader:
    """Reads options off the shapes of a state dict, one method for each question."""

    def __init__(self, weights: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
        self.weights = weights
        self.known = known
        self.assumptions: list[str] = []

    def section(self) -> dict[str, Any]:
        kind = self._kind()
        shared = {
            "type": kind,
            "dim": (dim := self._size("blocks.0.attn.to_qkv.weight", 1)),
            "pdim": self._size(self._kernel, 0),
            "kernel_size": self._size(self._kernel, -1),
            "n_blocks": self._count("blocks."),
            "conv_blocks": self._count("blocks.0.pconvs."),
        }
        exp_ratio = self._exp_ratio(dim)
        if kind == "ESCRIB":
            window_size, num_heads, attention = self._attention_of_rib()
        else:
            window_size, num_heads, attention = self._attention()
        further: dict[str, Any] = {}
        scale: float
        if kind in ("ESC", "ESCFP"):
            scale = self._subpixels("to_img.weight")
        elif kind == "ESCLTE":
            scale, further = self._local_texture_tail()
        elif kind == "ESCRIB":
            scale = self._subpixels("upsampler.up_conv.weight")
            further = {"gate_type": "DWC" if "blocks.0.attn.gate.0.weight" in self.weights else None}
        elif kind == "ESCReal":
            use_dysample = "to_img.offset.weight" in self.weights
            scale = self._dysample_scale("to_img.offset.weight") if use_dysample else 4
            further = {"use_dysample": use_dysample}
        else:
            scale, further = self._universal_tail(dim)
        if kind in ("ESC", "ESCLTE", "ESCRIB"):
            further = {"use_ln": "blocks.0.lns.0.weight" in self.weights, **further}
        return {
            **shared,
            "window_size": window_size,
            "num_heads": num_heads,
            "upscaling_factor": scale,
            "exp_ratio": exp_ratio,
            **further,
            **attention,
        }

    @property
    def _kernel(self) -> str:
        return "lk_spatial" if "lk_spatial" in self.weights else "plk_filter"

    def _kind(self) -> str:
        for tail, pattern in UNSUPPORTED_TAILS.items():
            if any(map(pattern.fullmatch, self.weights)):
                raise UserError(
                    f"The weights are nearly those of an ESCRealM, but its tail is {tail}, an upsampler of "
                    f"traiNNer-redux that is not supported here; supported: {', '.join(UPSAMPLERS)}."
                )
        kind = next((kind for name, kind in DISTINCT_NAMES.items() if name in self.weights), None)
        missing = [name for name in (*COMMON_NAMES, self._kernel) if name not in self.weights]
        if kind is None:
            missing.append("a tail (to_img, upsampler.up_conv or lte)")
        if kind is None or missing:
            raise UserError(
                f"These are not the weights of an ESC network (or not all of them): {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing. They hold {some(list(self.weights)) or 'nothing'}."
            )
        return kind

    def _size(self, name: str, axis: int) -> int:
        tensor = self.weights.get(name)
        if tensor is None:
            raise UserError(f"The weights are nearly those of an ESC network, but {name} is missing.")
        if not -tensor.dim() <= axis < tensor.dim():
            raise self._misshapen(name, "of too few dimensions")
        if tensor.shape[axis] == 0:
            raise self._misshapen(name, "which is empty")
        return tensor.shape[axis]

    def _misshapen(self, name: str, what: str) -> UserError:
        shape = tuple(self.weights[name].shape)
        return UserError(f"The weights are nearly those of an ESC network, but {name} is {shape}, {what}.")

    def _count(self, prefix: str) -> int:
        """How many parts the names number after a prefix, from 0 on; `n_blocks` of such a network is built."""
        numbers = {name.removeprefix(prefix).partition(".")[0] for name in self.weights if name.startswith(prefix)}
        count = len(numbers)
        if unexpected := sorted(numbers - {str(number) for number in range(count)}):
            raise UserError(
                f"The weights are nearly those of an ESC network, but the {count} parts that begin with {prefix} are "
                f"not numbered from 0 to {count - 1}: there is {prefix}{unexpected[0][:LONGEST_NAME]}."
            )
        return count

    def _root(self, name: str, axis: int, what: str, times: int = 1) -> int:
        """The side of a square, of which a size is a number of `times`."""
        size = self._size(name, axis)
        side = math.isqrt(size // times)
        if side < 1 or size != times * side**2:
            raise self._misshapen(name, f"which is not {what}")
        return side

    def _subpixels(self, name: str) -> int:
        return self._root(name, 0, "3 colours times a square of sub-pixels", times=3)

    def _dysample_scale(self, name: str) -> int:
        what = f"two coordinates, for {DYSAMPLE_GROUPS} groups, of a square of sub-pixels"
        return self._root(name, 0, what, times=2 * DYSAMPLE_GROUPS)

    def _exp_ratio(self, dim: int) -> float:
        if "blocks.0.convffns.0.proj.weight" not in self.weights:
            return PUBLISHED_RATIOS[0]
        hidden = self._size("blocks.0.convffns.0.proj.weight", 0)
        return next(ratio for ratio in self._ratios(hidden, dim) if int(dim * ratio) == hidden)

    def _ratios(self, hidden: int, dim: int) -> Iterator[float]:
        """Numbers to try, the ones to be preferred first: known, published, of few digits, and one that always does."""
        known = self.known.get("exp_ratio")
        if isinstance(known, (int, float)) and 0 < known <= hidden + 1:
            yield known
        yield from PUBLISHED_RATIOS
        for digits in range(4):  # rounded up, as what follows the point is dropped when a width is made of the ratio
            ratio = math.ceil(hidden / dim * 10**digits) / 10**digits
            yield int(ratio) if ratio.is_integer() else ratio
        yield (hidden + 0.5) / dim

    def _attention(self) -> tuple[int, int, dict[str, Any]]:
        """Window, heads and the further options of an attention with a bias table or free factors."""
        table, factors = "blocks.0.attn.relative_position_bias", "blocks.0.attn.flashbias_q"
        if factors in self.weights:
            window = self._root(factors, 1, "(heads, window^2, rank)")
            rank = "rank" if "upsampler.up_conv.weight" in self.weights else "flashbias_rank"
            return window, self._size(factors, 0), {"attn_type": "FlashBias", rank: self._size(factors, 2)}
        side = self._root(table, 1, "(heads, (2 window - 1)^2)")
        if side % 2 == 0:
            raise self._misshapen(table, "which is not (heads, (2 window - 1)^2)")
        return (side + 1) // 2, self._size(table, 0), {"attn_type": "auto"}

    def _attention_of_rib(self) -> tuple[int, int, dict[str, Any]]:
        if "blocks.0.attn.to_hidden" not in self.weights:
            return self._attention()
        window = self.known.get("window_size")
        if not isinstance(window, int) or not 1 <= window <= LARGEST_RIB_WINDOW:
            window = PUBLISHED_RIB_WINDOW
            self.assumptions.append(
                f"RIB's weights do not depend on window_size: {window} is that of the published model; "
                f"`basicsr convert --window` names another."
            )
        features = self._size("blocks.0.attn.to_hidden", 0)
        options = {
            "attn_type": "RIB" if features > 2 else "RIBSiren",  # which has no features but the two coordinates
            "rank": self._size("blocks.0.attn.to_q", 2),
            "rib_hidden_dim": self._size("blocks.0.attn.to_hidden", 1),
            **({"rib_n_freqs": (features - 2) // 4} if features > 2 else {}),
        }
        return window, self._size("blocks.0.attn.to_q", 0), options

    def _local_texture_tail(self) -> tuple[float, dict[str, Any]]:
        """The scale when none is asked for, which weights cannot tell, and the options of ESCLTE's tail."""
        numbers = {name: IMNET_LAYER.fullmatch(name) for name in self.weights}
        layers = sorted((int(found[1]), self._size(name, 0)) for name, found in numbers.items() if found is not None)
        options = {
            "hidden_dim": self._size("lte.coef.weight", 0),
            "mlp_dims": [width for _, width in layers[:-1]],
            "normalize": NORMALIZED in self.weights,
        }
        scale = self.known.get("upscaling_factor")
        return scale if isinstance(scale, (int, float)) and scale > 0 else 4, options

    def _universal_tail(self, dim: int) -> tuple[int, dict[str, Any]]:
        """Scale and the options of ESCRealM's tail."""
        unshuffle = "proj.1.weight" in self.weights
        tails = self._possible_tails(dim, (4,) if unshuffle else (4, 3, 2, 1))
        if not tails:
            names = some([name for name in self.weights if name.startswith("to_img.")])
            raise UserError(
                f"The weights are nearly those of an ESCRealM, but its tail ({names}) is none of "
                f"{', '.join(UPSAMPLERS)} for {dim} channels."
            )
        said = self._meta()
        fits = {
            "network_g": [tail for tail in tails if (tail.upsampler, tail.scale) == self._known_tail()],
            META: [tail for tail in tails if said is not None and tail[:2] == said[:2]],
        }
        tail = next((found[0] for found in fits.values() if found), tails[0])
        if len(tails) > 1 and not any(fits.values()):
            others = " or ".join(f"{other.upsampler} of x{other.scale}" for other in tails if other is not tail)
            self.assumptions.append(f"{tail.upsampler} of x{tail.scale} has the same shapes as {others}.")
        mid_dim = tail.mid_dim
        if mid_dim is None:  # this upsampler does not use it
            known = self.known.get("mid_dim", said.mid_dim if said is not None else None)
            mid_dim = known if isinstance(known, int) and known > 0 else DEFAULT_MID_DIM
        scale = tail.scale
        if unshuffle:
            folding = self._root("proj.1.weight", 1, "3 colours times a square of 2 or 4 pixels", times=3)
            scale = 4 // folding
            if folding not in (2, 4):
                raise self._misshapen("proj.1.weight", "which is not 3 colours times a square of 2 or 4 pixels")
        further = {
            "upsampler": tail.upsampler,
            "mid_dim": mid_dim,
            "unshuffle_mod": unshuffle or (scale > 2 and bool(self.known.get("unshuffle_mod", True))),
        }
        return scale, further

    def _possible_tails(self, dim: int, scales: tuple[int, ...]) -> list[_Tail]:
        """Every tail whose names and shapes are those here."""
        shapes = {
            name.removeprefix("to_img."): tensor.shape
            for name, tensor in self.weights.items()
            if name.startswith("to_img.") and name != META
        }
        first = self._size("to_img.0.weight", 0) if "to_img.0.weight" in self.weights else dim
        return [tail for tail in self._all_tails(dim, first, scales) if self._shapes_of(tail, dim) == shapes]

    def _all_tails(self, dim: int, first: int, scales: tuple[int, ...]) -> Iterator[_Tail]:
        for scale in scales:
            for upsampler in UPSAMPLERS:
                if (upsampler == "conv") == (scale == 1):
                    yield _Tail(upsampler, scale, first if upsampler in ("pixelshuffle", "dysample") else None)

    def _shapes_of(self, tail: _Tail, dim: int) -> dict[str, torch.Size]:
        try:
            with torch.device("meta"):
                net = UniversalUpsampler(tail.upsampler, scale=tail.scale, dim=dim, mid=tail.mid_dim or DEFAULT_MID_DIM)
        except ValueError:  # DySample with a number of channels that it cannot divide
            return {}
        return {name: tensor.shape for name, tensor in net.state_dict().items() if name != "MetaUpsample"}

    def _known_tail(self) -> tuple[object, object]:
        """Upsampler and scale of the tail by what is known; with unshuffling only one scale is to be chosen from."""
        scale = 4 if "proj.1.weight" in self.weights else self.known.get("upscaling_factor")
        return self.known.get("upsampler"), scale

    def _meta(self) -> _Tail | None:
        """What the buffer says, if there is one with anything in it; the weights decide whether to believe it."""
        buffer = self.weights.get(META)
        if buffer is None or buffer.is_meta or tuple(buffer.shape) != (7,):
            return None
        _, number, scale, _, _, mid_dim, _ = buffer.tolist()
        # Widths above 255 do not fit its type
        return (
            _Tail(list(UPSAMPLERS)[number], scale, mid_dim if mid_dim < 255 else None)
            if number < len(UPSAMPLERS)
            else None
        )
