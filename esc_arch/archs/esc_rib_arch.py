"""ESC-RIB: ESC with a position bias of low rank, for attention kernels without bias support (arXiv 2603.06738)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from esc_arch.archs.base import SharedKernelNetwork
from esc_arch.modules import FactorBiasWindowAttention, LayerNorm, RIBWindowAttention
from esc_arch.modules.conv3x3 import Conv3x3
from esc_arch.modules.fused import conv3x3
from esc_arch.modules.upsample import pixel_shuffle_with_skip
from esc_arch.modules.window_attention import WindowAttention

from .shapes import Shapes

__all__ = ["ESCRIB"]

ATTN_TYPES = {name.lower(): name for name in ("RIB", "RIBSiren", "FlashBias")}
PUBLISHED_WINDOW = 64
#: Images are padded to whole windows: a larger one, by a file's metadata, would have any image fill the memory.
LARGEST_WINDOW = 1024


@dataclass(eq=False, repr=False)
class ESCRIB(SharedKernelNetwork):
    """ESC whose attention has rank-factorised position biases, optionally gated.

    Shapes, guarantees and errors as of `ESC`.

    Args:
        attn_type: where the bias factors come from: RIB (a network of the coordinates), RIBSiren (the same with sines
            and without frequencies) or FlashBias (free factors); any case.
        rank: rank of the factors; the bias is their product divided by sqrt(rank).
        rib_hidden_dim, rib_n_freqs: of RIB's network; FlashBias has none, RIBSiren no frequencies.
        gate_type: DWC for a sigmoid gate on the attention's result, or None.
        use_ln: LayerNorm before the ConvFFNs, as in ESC-XL.
        upsampler_type: None; there is one upsampler.
        backend: how attention is computed: auto, or a backend by name; changes no result.
        others: see `ESC`.
    """

    subpixel_conv = "upsampler.up_conv"
    head_margin = 2
    published_defaults: ClassVar[dict[str, Any]] = {"exp_ratio": 2, "rank": "256 - head_dim", "rib_hidden_dim": 64}

    window_size: int = 64
    attn_type: str = "RIB"
    _: KW_ONLY
    flashbias_rank: None = field(default=None, init=False)  # `rank` is its only name here
    rank: int = 16
    rib_hidden_dim: int = 32
    rib_n_freqs: int = 10
    gate_type: str | None = None
    upsampler_type: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_type not in (None, "DWC"):
            raise ValueError(
                f"gate_type is {self.gate_type!r}; ESCRIB takes DWC, the gate of the published models, or none (~). "
                "Others, such as Linear, are not described in the paper."
            )
        if self.upsampler_type is not None:
            raise ValueError(
                f"upsampler_type is {self.upsampler_type!r}; ESCRIB has the upsampler of the published models, a 3x3 "
                "convolution and pixel shuffle: omit the option."
            )
        self.proj = Conv3x3(3, self.dim)
        self.blocks = self.new_blocks(first_exp_ratio=4)
        self.last = nn.Sequential(LayerNorm(self.dim), Conv3x3(self.dim, self.dim))
        # A module of its own for the sake of the published parameter names
        self.upsampler = nn.ModuleDict({"up_conv": Conv3x3(self.dim, 3 * self.upscaling_factor**2)})

    def new_attention(self) -> WindowAttention:
        kind = ATTN_TYPES.get(str(self.attn_type).lower())
        if kind is None:
            raise ValueError(
                f"attn_type is {self.attn_type!r}; ESCRIB takes {', '.join(ATTN_TYPES.values())}. With bias tables "
                "(Naive, SDPA, Flex) or without positions (NoPE) this network was never published: for tables use "
                "type: ESC; `backend` chooses how attention is computed."
            )
        common: dict[str, Any] = {
            "dim": self.dim,
            "window_size": self.window_size,
            "num_heads": self.num_heads,
            "rank": self.rank,
            "attn_type": self.backend,
            "gate": self.gate_type is not None,
        }
        if kind == "FlashBias":
            return FactorBiasWindowAttention(scaled=True, **common)
        siren = kind == "RIBSiren"
        return RIBWindowAttention(hidden_dim=self.rib_hidden_dim, n_freqs=self.rib_n_freqs, siren=siren, **common)

    def reconstruct(self, feat: Tensor, shallow: Tensor, image: Tensor) -> Tensor:
        norm, last = self.last
        feat = conv3x3(last, feat, norm=norm, residual=shallow)
        return pixel_shuffle_with_skip(conv3x3(self.upsampler["up_conv"], feat), image, self.upscaling_factor)

    @classmethod
    def recognise(cls, shapes: Shapes) -> dict[str, Any] | None:
        if "upsampler.up_conv.weight" not in shapes:
            return None
        rib = "blocks.0.attn.to_hidden" in shapes
        return shapes.options(
            scale=shapes.subpixels("upsampler.up_conv.weight"),
            attention=_rib_attention(shapes) if rib else shapes.attention("rank"),
            use_ln=shapes.use_ln,
            gate_type="DWC" if "blocks.0.attn.gate.0.weight" in shapes else None,
        )


def _rib_attention(shapes: Shapes) -> tuple[int, int, dict[str, Any]]:
    window = shapes.known.get("window_size")
    if not isinstance(window, int) or not 1 <= window <= LARGEST_WINDOW:
        window = PUBLISHED_WINDOW
        shapes.assumptions.append(
            f"RIB's weights do not depend on window_size: {window} is that of the published model; "
            f"`basicsr convert --window` names another."
        )
    features = shapes.size("blocks.0.attn.to_hidden", 0)
    options = {
        "attn_type": "RIB" if features > 2 else "RIBSiren",  # which has no features but the two coordinates
        "rank": shapes.size("blocks.0.attn.to_q", 2),
        "rib_hidden_dim": shapes.size("blocks.0.attn.to_hidden", 1),
        **({"rib_n_freqs": (features - 2) // 4} if features > 2 else {}),
    }
    return window, shapes.size("blocks.0.attn.to_q", 0), options
