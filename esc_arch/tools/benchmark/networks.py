"""Networks to measure: the published ones by name, and any that BasicSR's ARCH_REGISTRY can build."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from esc_arch.archs.base import ESCFamily
from esc_arch.errors import UserError
from esc_arch.names import did_you_mean
from esc_arch.options.files import load_options, load_yaml
from esc_arch.options.section_checks import check_call, entries, shown_names

__all__ = ["PRESETS", "NetworkSpec", "from_option_file", "named"]

_EXAMPLE = "as in --networks 'SwinIR: {upscale: 2, window_size: 8}'"
#: What constructors call the scale.
_SCALE_KEYS = ("upscaling_factor", "upscale", "scale")
#: Options other than those of the network itself.
_COMPUTATION = ("attn_type", "backend", "query_chunk", "rank", "flashbias_rank", *_SCALE_KEYS)


def _section(text: str) -> dict[str, Any]:
    """`network_g` from a type, or a type with its options, as in an option file."""
    name, colon, _ = text.partition(":")
    options = load_yaml(f"{text}\n").get(name) if colon else {}
    if not isinstance(options, dict):
        raise UserError(f"--networks {text!r} is invalid. Give a name, or a type with its options, {_EXAMPLE}.")
    return {"type": name, **options}


#: `network_g` of published networks by the paper's names, most without a scale: what is measured when none is named.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ESC-FP": _section("esc_arch.ESCFP"),
    "ESC-light": _section("esc_arch.ESC: {n_blocks: 3}"),
    "ESC": _section("esc_arch.ESC"),
    "ESC-FlashBias": _section("esc_arch.ESC: {attn_type: FlashBias, flashbias_rank: 48}"),
    "ESC-RIB": _section("esc_arch.ESCRIB: {gate_type: DWC}"),
    "ESC-XL": _section("esc_arch.ESC: {dim: 192, pdim: 48, n_blocks: 8, window_size: 48, num_heads: 12, use_ln: true}"),
    "ESC-Real": _section("esc_arch.ESCReal: {upscaling_factor: 4}"),
    "ESC-LTE": _section("esc_arch.ESCLTE"),
    "SwinIR-light": _section(
        "SwinIR: {img_size: 64, window_size: 8, depths: [6, 6, 6, 6], embed_dim: 60, num_heads: [6, 6, 6, 6], "
        "mlp_ratio: 2, upsampler: pixelshuffledirect}"
    ),
    "EDSR-baseline": _section("EDSR: {num_in_ch: 3, num_out_ch: 3}"),
    "RRDBNet": _section("RRDBNet: {num_in_ch: 3, num_out_ch: 3, scale: 4}"),
}


@dataclass(frozen=True)
class NetworkSpec:
    """A network: the name to show, a `network_g` section, and the scale that is in it."""

    name: str
    options: Mapping[str, Any]
    scale: float

    @property
    def published(self) -> str | None:
        """The name in `PRESETS` of the same network; None for others."""
        identity = _identity(self.options)
        return next((name for name, options in PRESETS.items() if _identity(options) == identity), None)

    @property
    def multiple(self) -> int:
        """What height and width of its input must be multiples of: ESC's networks take every size."""
        if issubclass(_constructor(self.options), ESCFamily):
            return 1
        return int(_arguments(self.options).get("window_size") or 1)

    def build(self) -> nn.Module:
        """Make it with random weights, for evaluation; raises UserError if its constructor refuses the options."""
        options = {key: value for key, value in self.options.items() if key != "type"}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.meshgrid")  # BasicSR's SwinIR, on every current PyTorch
                net: nn.Module = _constructor(self.options)(**options)
        except Exception as error:  # constructors of other packages may raise anything
            raise UserError(f"{self.name} x{self.scale:g} cannot be built: {type(error).__name__}: {error}") from error
        return net.eval()


def named(text: str, scales: Sequence[int]) -> list[NetworkSpec]:
    """Networks that an argument of the command line means, at `scales` unless the options have a scale.

    `text` is a name of `PRESETS`, a type of ARCH_REGISTRY, or a type with options as in an option file, such as
    "SwinIR: {upscale: 2, window_size: 8}". UserError if the name is not known, or the options cannot be used.
    """
    if text in PRESETS:
        return _at_scales(text, PRESETS[text], scales)
    section, types = _section(text), entries(ARCH_REGISTRY)
    name = section["type"]
    if name not in types:
        raise UserError(
            f"--networks: there is no {name!r}. {did_you_mean(name, {*PRESETS, *shown_names(types)})}. If it is of "
            "your own package, name the module: --import MODULE."
        )
    return _at_scales(name, _checked("--networks", section), scales)


def from_option_file(path: Path) -> NetworkSpec:
    """The network of an option file, under the file's name; raises UserError if the file or network_g is invalid."""
    options = _checked(f"option file {path}, network_g", load_options(path).get("network_g"))
    return _at_scales(path.stem, options, ())[0]


def _checked(where: str, section: Any) -> Any:
    """A section whose type is registered and takes the options."""
    if problems := list(map(str, check_call(where, section, entries(ARCH_REGISTRY)))):
        raise UserError(f"{'; '.join(problems)}. Options are given {_EXAMPLE}.")
    return section


def _at_scales(name: str, options: Mapping[str, Any], scales: Sequence[int]) -> list[NetworkSpec]:
    """A network at its own scale if it has one in its options or cannot have others, otherwise at each of `scales`."""
    arguments = _arguments(options)
    key = next((key for key in _SCALE_KEYS if key in arguments), "")
    if key and key not in options and scales:
        return [NetworkSpec(name, {**options, key: scale}, scale) for scale in scales]
    scale = arguments.get(key, 1)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        raise UserError(f"{name}: the scale is {scale!r}; it must be a number above 0.")
    return [NetworkSpec(name, options, scale)]


def _constructor(options: Mapping[str, Any]) -> type[nn.Module]:
    network: type[nn.Module] = entries(ARCH_REGISTRY)[options["type"]]
    return network


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and the defaults of all arguments that are not given."""
    parameters = inspect.signature(_constructor(options)).parameters.values()
    return {each.name: None if each.default is each.empty else each.default for each in parameters} | dict(options)


def _identity(options: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes networks other than the scale, how attention is computed, and the rank of its factors."""
    own = {key: value for key, value in _arguments(options).items() if key not in _COMPUTATION}
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    has_factors = str(options.get("attn_type")).lower() == "flashbias"
    return own | {"type": _constructor(options), "factors": has_factors}
