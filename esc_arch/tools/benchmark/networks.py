"""Networks to measure: the published ones by name, and any that BasicSR's ARCH_REGISTRY can build."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from esc_arch.archs.base import ESCFamily
from esc_arch.errors import UserError
from esc_arch.options.files import load_options, load_yaml
from esc_arch.options.section_checks import check_call, entries, shown_names
from esc_arch.suggestions import did_you_mean

__all__ = ["PRESETS", "Network", "Preset", "from_option_file", "named"]

#: What constructors call the scale.
SCALE_KEYS = ("upscaling_factor", "upscale", "scale")

#: Options that change how attention is computed and not the network.
_COMPUTATION = ("attn_type", "backend", "query_chunk", *SCALE_KEYS)


@dataclass(frozen=True)
class Preset:
    """A published network: `network_g` of its option file, without what has a default and without the scale."""

    options: Mapping[str, Any]
    scales: Sequence[int] = (2, 3, 4)


_SWINIR_LIGHT = {
    "type": "SwinIR",
    "img_size": 64,
    "window_size": 8,
    "depths": [6, 6, 6, 6],
    "embed_dim": 60,
    "num_heads": [6, 6, 6, 6],
    "mlp_ratio": 2,
    "upsampler": "pixelshuffledirect",
}

#: By name, those of the paper by the paper's: what is measured when none is named.
PRESETS: Mapping[str, Preset] = {
    "ESC-FP": Preset({"type": "esc_arch.ESCFP"}),
    "ESC-light": Preset({"type": "esc_arch.ESC", "n_blocks": 3}),
    "ESC": Preset({"type": "esc_arch.ESC"}),
    "ESC-FlashBias": Preset({"type": "esc_arch.ESC", "attn_type": "FlashBias", "flashbias_rank": 48}),
    "ESC-RIB": Preset({"type": "esc_arch.ESCRIB", "gate_type": "DWC"}),
    "ESC-XL": Preset(
        {
            "type": "esc_arch.ESC",
            "dim": 192,
            "pdim": 48,
            "n_blocks": 8,
            "window_size": 48,
            "num_heads": 12,
            "use_ln": True,
        }
    ),
    "ESC-Real": Preset({"type": "esc_arch.ESCReal"}, scales=(4,)),
    "ESC-LTE": Preset({"type": "esc_arch.ESCLTE"}),
    "SwinIR-light": Preset(_SWINIR_LIGHT),
    "EDSR-baseline": Preset({"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3}),
    "RRDBNet": Preset({"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3}, scales=(2, 4)),
}


@dataclass(frozen=True)
class Network:
    """A network at a scale.

    Args:
        name: what the user knows it by.
        options: a `network_g` section with its scale.
        scale: of the enlargement.
        published: the name in `PRESETS` of the same network; None for others.
    """

    name: str
    options: Mapping[str, Any]
    scale: float
    published: str | None = field(init=False)

    def __post_init__(self) -> None:
        names = (name for name, preset in PRESETS.items() if _identity(preset.options) == _identity(self.options))
        object.__setattr__(self, "published", next(names, None))

    @property
    def multiple(self) -> int:
        """What height and width of its input are to be multiples of.

        ESC's networks take every size. Others with windows are given padded images, as by BasicSR's SwinIRModel.
        """
        if issubclass(_constructor(self.options), ESCFamily):
            return 1
        return int(_with_defaults(self.options).get("window_size") or 1)

    def build(self) -> nn.Module:
        """Make it, with random weights, for evaluation.

        Raises:
            UserError: its constructor does not take the options.
        """
        options = {key: value for key, value in self.options.items() if key != "type"}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.meshgrid")  # BasicSR's SwinIR, on every current PyTorch
                net: nn.Module = _constructor(self.options)(**options)
        except Exception as error:  # constructors of other packages may raise anything
            raise UserError(f"{self.name} x{self.scale:g} cannot be built: {type(error).__name__}: {error}") from error
        return net.eval()


def named(text: str, scales: Iterable[int]) -> list[Network]:
    """Networks that a word of the command line means.

    Args:
        text: a name of `PRESETS`, a type of ARCH_REGISTRY, or a type with options as in an option file, such as
            "SwinIR: {upscale: 2, window_size: 8}".
        scales: those wanted; a preset has some of them, options with a scale have that one.

    Raises:
        UserError: there is none of this name, it does not take the options, or the text is not understood.
    """
    name, colon, _ = text.partition(":")
    given = _parse_options(text) if colon else {}
    preset = None if colon else PRESETS.get(name)
    if preset is not None:
        return [_at(name, preset.options, scale) for scale in scales if scale in preset.scales]
    types = entries(ARCH_REGISTRY)
    if name not in types:
        raise UserError(
            f"--networks: there is no {name!r}. {did_you_mean(name, {*PRESETS, *shown_names(types)})}. If it is of "
            "your own package, name the module: --import MODULE."
        )
    options = _checked("--networks", {"type": name, **given})
    if _scale_key(options) in (None, *given):
        return [_of_section(name, options)]
    return [_at(name, options, scale) for scale in scales]


def from_option_file(path: Path) -> Network:
    """The network of an option file's `network_g`, by the file's name.

    Raises:
        UserError: the file cannot be read, or has no network_g that is one.
    """
    return _of_section(path.stem, _checked(f"option file {path}, network_g", load_options(path).get("network_g")))


def _parse_options(text: str) -> Mapping[str, Any]:
    parsed = load_yaml(f"{text}\n")
    options = next(iter(parsed.values()))
    if len(parsed) != 1 or not isinstance(options, dict):
        raise UserError(
            f"--networks {text!r} is not understood. Give a name, or a type with its options, such as "
            "'SwinIR: {upscale: 2, window_size: 8}'."
        )
    return options


def _checked(where: str, section: Any) -> Mapping[str, Any]:
    """A section whose type is registered and takes the options."""
    problems = "; ".join(check_call(where, section, entries(ARCH_REGISTRY)))
    if problems:
        raise UserError(f"{problems}. Options are given as in --networks 'SwinIR: {{upscale: 2, window_size: 8}}'.")
    options: Mapping[str, Any] = section
    return options


def _constructor(options: Mapping[str, Any]) -> type[nn.Module]:
    network: type[nn.Module] = entries(ARCH_REGISTRY)[options["type"]]
    return network


def _with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(_constructor(options)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(options)


def _identity(options: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes networks but for the scale."""
    kind, factors = _constructor(options), str(options.get("attn_type")).lower() == "flashbias"
    complete = {key: value for key, value in _with_defaults(options).items() if key not in _COMPUTATION}
    if not factors and "flashbias_rank" in complete:  # without factors these options have no effect
        complete = {key: value for key, value in complete.items() if key not in ("rank", "flashbias_rank")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in complete.items()} | {
        "type": kind,
        "factors": factors,
    }


def _scale_key(options: Mapping[str, Any]) -> str | None:
    parameters = inspect.signature(_constructor(options)).parameters
    return next((key for key in SCALE_KEYS if key in parameters), None)


def _at(name: str, options: Mapping[str, Any], scale: int) -> Network:
    return Network(name, {**options, str(_scale_key(options)): scale}, scale)


def _of_section(name: str, options: Mapping[str, Any]) -> Network:
    """With the scale that its options have; a network without such an option enlarges nothing."""
    scale = _with_defaults(options).get(_scale_key(options) or "", 1)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        raise UserError(f"{name}: the scale is {scale!r}; it must be a number above 0.")
    return Network(name, options, scale)
