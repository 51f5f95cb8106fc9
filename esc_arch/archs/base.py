"""What all networks of the family have in common."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, MutableMapping
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esc_arch.errors import UserError
from esc_arch.modules import ConvAttn, DecomposedConvAttn, ESCBlock, FactorBiasWindowAttention, FlashWindowAttention
from esc_arch.modules.conv_attn import new_large_kernel
from esc_arch.modules.upsample import rescale_subpixel_conv
from esc_arch.modules.window_attention import WindowAttention, bias_factors, resize_bias_table
from esc_arch.ops import cpu
from esc_arch.ops.conv_attn import symmetrise
from esc_arch.ops.layout import fast_layout
from esc_arch.ops.window_attention.flash import MAX_WIDTH

from .flashbias import Origin, convert_old_factors, mark_published, origin_of
from .heads import Head
from .shapes import Shapes

__all__ = ["NETWORKS", "ESCFamily", "SharedKernelNetwork", "earlier_order", "network_named"]

#: Upper bound of n_blocks and conv_blocks that catches typos.
MOST_PARTS = 1000
#: What BasicSR's own loading puts behind names of other shapes (strict_load_g: false), and at the end.
IGNORED = ".ignore"
#: All networks that were imported, of this package and of others, the last one first.
NETWORKS: list[type[ESCFamily]] = []

_Net = TypeVar("_Net", bound="SharedKernelNetwork")


@dataclass(eq=False, repr=False)
class ESCFamily(nn.Module):
    """A network of `blocks` between a first convolution `proj` and a head. Subclasses make all three.

    The fields of these data classes are the constructor's options, `ESC` describes them; `__post_init__` makes the
    layers. The class attributes and the methods up to `conflict_with` are all that the rest of the package asks for.
    """

    #: Receptive margin of `reconstruct` in pixels of the features, or more, for images computed in parts.
    head_margin: ClassVar[int] = 8
    #: How many pixels of the image along each side become one of the features.
    unshuffle_factor = 1
    #: True for networks of any scale; others have a whole one.
    any_scale: ClassVar[bool] = False
    #: True for photographs with unknown degradations, not for images made smaller by bicubic interpolation.
    real_world: ClassVar[bool] = False
    #: The convolution before the pixel shuffle, whose weights can be interpolated to another scale.
    subpixel_conv: ClassVar[str | None] = "to_img"
    #: Activation checkpointing: keep only the inputs of blocks for the backward pass, and compute the rest again.
    checkpointing = False
    #: Options whose default differs in the published code, with that default.
    published_defaults: ClassVar[Mapping[str, Any]] = {}

    dim: int = 64
    pdim: int = 16
    kernel_size: int = 13
    n_blocks: int = 5
    conv_blocks: int = 5
    window_size: int = 32
    num_heads: int = 4
    upscaling_factor: int = 4
    exp_ratio: float = 1.25
    attn_type: str = "auto"
    _: KW_ONLY
    use_ln: bool = False
    flashbias_rank: int | None = None
    rank: int | None = None
    backend: str = "auto"

    proj: nn.Module = field(init=False)
    blocks: nn.ModuleList = field(init=False)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        NETWORKS.insert(0, cls)

    def __post_init__(self) -> None:
        super().__init__()
        scale = self.upscaling_factor
        if self.any_scale:
            if not 0 < scale < math.inf:
                raise ValueError(f"upscaling_factor is {scale}; it must be a number above 0.")
        elif not 1 <= scale < math.inf or scale != int(scale):
            raise ValueError(f"upscaling_factor is {scale}; it must be a whole number of at least 1.")
        else:
            self.upscaling_factor = int(scale)
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim}; it must be a whole number of at least 1.")
        for name, count in (("n_blocks", self.n_blocks), ("conv_blocks", self.conv_blocks)):
            if not 0 <= count <= MOST_PARTS or count != int(count):
                raise ValueError(f"{name} is {count}; it must be a whole number from 0 to {MOST_PARTS}.")

    def new_blocks(self, first_exp_ratio: float = 2) -> nn.ModuleList:
        """The blocks of the network; `first_exp_ratio` is of a block's first ConvFFN."""
        return nn.ModuleList(
            ESCBlock(
                self.dim,
                attn=self.new_attention(),
                pconvs=[self.new_conv_attn() for _ in range(int(self.conv_blocks))],
                exp_ratio=self.exp_ratio,
                first_exp_ratio=first_exp_ratio,
                use_ln=self.use_ln,
            )
            for _ in range(int(self.n_blocks))
        )

    def new_conv_attn(self) -> ConvAttn | DecomposedConvAttn:
        return ConvAttn(dim=self.dim, pdim=self.pdim, kernel_size=self.kernel_size, symmetric=True)

    def new_attention(self) -> WindowAttention:
        """Window attention with a bias table, or for FlashBias (any case) with free factors of the bias.

        Raises:
            ValueError: as of `WindowAttention`; `backend` is given though attn_type names one; two different ranks.
        """
        sizes: dict[str, Any] = {"dim": self.dim, "window_size": self.window_size, "num_heads": self.num_heads}
        if str(self.attn_type).lower() == "flashbias":
            ranks = {rank for rank in (self.flashbias_rank, self.rank) if rank is not None}
            if len(ranks) > 1:
                raise ValueError(
                    f"flashbias_rank is {self.flashbias_rank} and rank is {self.rank}; they are one option, give one."
                )
            # The published default: the widest that flash kernels take
            rank = ranks.pop() if ranks else MAX_WIDTH - self.dim // max(1, self.num_heads)
            return FactorBiasWindowAttention(rank=rank, scaled=False, attn_type=self.backend, **sizes)
        if self.backend != "auto":
            raise ValueError(
                f"backend is {self.backend!r}, but only attn_type: FlashBias takes one; here attn_type "
                f"({self.attn_type!r}) names it."
            )
        return FlashWindowAttention(attn_type=self.attn_type, **sizes)

    def shallow_features(self, x: Tensor) -> Tensor:
        """The input of the blocks, in the layout that suits the device: (B, 3, H, W) -> (B, dim, H, W)."""
        return self.proj(fast_layout(x))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.shallow_features(x)
        return self.reconstruct(self.run_blocks(shallow, *self.large_kernels()), shallow, x)

    def large_kernels(self) -> tuple[Tensor, ...]:
        """The large kernels that all blocks share."""
        raise NotImplementedError

    def reconstruct(self, feat: Tensor, shallow: Tensor, image: Tensor) -> Tensor:
        """The head: from the features behind the blocks to the enlarged image.

        Every pixel of it depends on its neighbourhood alone, see `head`.

        Args:
            feat, shallow: features behind and before the blocks, (B, dim, H, W).
            image: (B, 3, H * f, W * f), the network's input, f being `unshuffle_factor`.
        """
        raise NotImplementedError

    def head(self, image_size: tuple[int, int], size: tuple[int, int], out_size: tuple[int, int]) -> Head:
        """The head for an image that is computed in parts; see `Head`, whose arguments these are."""
        return Head(self, image_size, size, out_size)

    def enlarge(self, image: Tensor, image_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
        """The enlarged image of a padded one.

        Args:
            image: (B, 3, H, W), of which the first h rows and w columns are not padding.
            image_size: (h, w).
            out_size: (H', W') of the result.
        """
        return self(image)[..., : out_size[0], : out_size[1]]

    def run_blocks(self, x: Tensor, *large_kernels: Tensor) -> Tensor:
        """All blocks one after the other: (B, dim, H, W) -> (B, dim, H, W)."""
        with nullcontext() if torch.compiler.is_compiling() else cpu.reusing_memory(x):
            for block in self.blocks:
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, *large_kernels, use_reentrant=False)
                else:
                    x = block(x, *large_kernels)
            return x

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for note in self.adapt_state_dict(state_dict, prefix):
            logging.getLogger("basicsr").warning("The checkpoint is of %s", note)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        """The constructor's options if these are weights of this network, None if their names are another's.

        Every network has a method of its own: none is recognised by that of its parent class.
        """
        return None

    @classmethod
    def own_names(cls, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of published files with other names, renamed to those of this network."""
        return weights

    def conflict_with(self, weights: Mapping[str, Tensor]) -> str | None:
        """Why weights whose names and shapes fit are still of another network, and what to do; None if they are not."""
        return None

    def adapt_state_dict(self, state_dict: MutableMapping[str, Tensor], prefix: str = "") -> list[str]:
        """Make a checkpoint of another scale or window fit this network, in place.

        The last convolution is interpolated to the scale, the attentions' position biases are adapted to the window,
        and to the kind of bias: FlashBias's factors are made of tables. Done at every `load_state_dict`.

        Args:
            prefix: of the names in it that are this network's.

        Raises:
            UserError: a bias table with infinite numbers or NaN, from which no FlashBias factors can be made.

        Returns:
            What the checkpoint is of and what was done, a sentence each, such as "another scale: to_img.weight was
            interpolated from x2 to x3."; empty for a checkpoint that fits.
        """
        origin = origin_of([name for name in state_dict if not name.endswith(IGNORED)], prefix)
        renamed = [name for name in state_dict if name.startswith(prefix) and name.endswith(IGNORED)]
        ignored = [name for name in (name.removesuffix(IGNORED) for name in renamed) if name not in state_dict]
        for name in ignored:
            state_dict[name] = state_dict.pop(name + IGNORED)
        notes = self._adapt_factors(state_dict, prefix, origin) + self._adapt_shapes(state_dict, prefix)
        own = self.state_dict(prefix=prefix) if ignored else {}
        for name in ignored:  # those that still do not fit
            if name in state_dict and (name not in own or state_dict[name].shape != own[name].shape):
                state_dict[name + IGNORED] = state_dict.pop(name)
        return notes

    def _adapt_factors(self, state_dict: MutableMapping[str, Tensor], prefix: str, origin: Origin) -> list[str]:
        """FlashBias's factors in the published convention: made from tables, or converted from earlier versions."""
        layers = {
            f"{prefix}{path}.": module
            for path, module in self.named_modules()
            if isinstance(module, FactorBiasWindowAttention) and not module.scaled
        }
        notes = []
        if any(f"{path}flashbias_q" in state_dict for path in layers):
            if origin is Origin.OLD:
                convert_old_factors(state_dict, prefix)
                notes.append(
                    "an earlier esc_arch, whose FlashBias divided q k^T by sqrt(rank): its q factors were divided by "
                    "sqrt(rank), so that the network stays the same."
                )
            elif origin is Origin.UNKNOWN:
                notes.append(
                    "unknown origin: its FlashBias factors are taken as published, bias = q k^T without a factor of "
                    "the rank. Files of an earlier esc_arch that were re-saved elsewhere have sqrt(rank) times that."
                )
        rank = None
        for path, module in layers.items():
            table = state_dict.get(f"{path}relative_position_bias")
            if table is None or f"{path}flashbias_q" in state_dict or table.shape[:1] != (module.num_heads,):
                continue
            try:
                table, _ = resize_bias_table(table, module.window_size)
            except ValueError:
                continue  # not of a square window: loading reports the names
            if not table.is_meta and not table.isfinite().all():
                raise UserError(
                    f"{path}relative_position_bias holds infinite numbers or NaN: no FlashBias factors can be made "
                    "from it. Use an earlier checkpoint."
                )
            rank = module.rank
            q, k = bias_factors(table, module.window_size, rank)
            state_dict.update({f"{path}flashbias_q": q, f"{path}flashbias_k": k})
            del state_dict[f"{path}relative_position_bias"]
        if rank is not None:
            mark_published(state_dict, prefix)
            note = f"attention with bias tables: FlashBias factors of rank {rank} were made from them (truncated SVD)."
            notes.append(note)
        return notes

    def _adapt_shapes(self, state_dict: MutableMapping[str, Tensor], prefix: str) -> list[str]:
        """The last convolution and the position biases, resized where their shapes are others."""
        notes = []
        for name, parameter in self.named_parameters():
            tensor = state_dict.get(prefix + name)
            if tensor is None or tensor.ndim != parameter.ndim or tensor.shape == parameter.shape:
                continue
            path, _, kind = name.rpartition(".")
            layer = self.get_submodule(path)
            try:
                if path == self.subpixel_conv:
                    resized, source = rescale_subpixel_conv(tensor, len(parameter))
                    scales = f"from x{source} to x{self.upscaling_factor}"
                    note = f"another scale: {prefix}{name} was interpolated {scales}."
                elif isinstance(layer, WindowAttention) and kind in layer.bias_resizers:
                    resized, source = layer.bias_resizers[kind](tensor, layer.window_size)
                    windows = f"from window {source} to window {layer.window_size}"
                    note = f"another window: its position biases were adapted {windows}."
                else:
                    continue
            except ValueError:
                continue  # not a sub-pixel convolution, or not of a square window: loading reports the shapes
            if resized.shape == parameter.shape:
                state_dict[prefix + name] = resized
                notes.append(note)
        return list(dict.fromkeys(notes))


@dataclass(eq=False, repr=False)
class SharedKernelNetwork(ESCFamily):
    """A network whose ConvAttns share one large kernel `plk_filter`, symmetrised before use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plk_filter = new_large_kernel(self.pdim, self.kernel_size)

    def large_kernels(self) -> tuple[Tensor, ...]:
        """The symmetrised kernel alone, (pdim, pdim, K, K)."""
        return (symmetrise(self.plk_filter),)

    @torch.no_grad()
    def fold(self: _Net) -> _Net:
        """Store the symmetrised large kernel in place of the free one, for inference; returns the network.

        The output stays the same, and so it does when folded again. Train the free kernel, not the folded one.
        """
        self.plk_filter.copy_(symmetrise(self.plk_filter))
        return self

    convert = fold  # the name that published scripts use


def network_named(name: str) -> type[ESCFamily]:
    """The class of a network by its name in option files; of this package where another has one of the same name.

    Raises:
        KeyError: there is none.
    """
    named = {network.__name__: network for network in NETWORKS}  # this package's come last
    return named[name.removeprefix("esc_arch.")]


def earlier_order(net: ESCFamily) -> list[str]:
    """The names of a network's parameters in the order that they had in early versions of this package.

    States of optimisers that say nothing of names may be in it (see `esc_arch.training.parameter_order`).
    """
    names = [name for name, _ in net.named_parameters()]
    parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    if "skip" in parts:  # ESC-Real
        parts = ["plk_filter", "blocks", "last", "proj", "skip", "to_img"]

    def place(name: str) -> tuple[int, int, int]:
        part, *rest = name.split(".")
        if part != "blocks":
            return parts.index(part), 0, 0
        return parts.index(part), int(rest[0]), {"convffns": 1, "pconvs": 2, "ln_out": 3, "conv_out": 3}.get(rest[1], 0)

    return sorted(names, key=place)
