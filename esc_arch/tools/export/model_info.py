"""What people must say of a model to publish it, checked, and what its card and its OpenModelDB entry are made from."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from esc_arch.errors import UserError
from esc_arch.names import did_you_mean
from esc_arch.printing import is_utf8

from .checking import ExportResult
from .experiment import Training

__all__ = ["LICENCES", "TAGS", "Model", "ModelInfo", "PublishedFile", "complete", "model_id", "user_id"]

#: Tags of OpenModelDB (https://openmodeldb.info); its list can grow.
TAGS = (
    *("anime", "anti-aliasing", "cartoon", "colorization", "compression-removal", "dds", "debanding", "deblur"),
    *("dedither", "dehalo", "denoise", "faces", "game-textures", "general-upscaler", "inpainting", "jpeg", "manga"),
    *("photo", "pixel-art", "pretrained", "research", "restoration", "text", "texture-generation", "video-frame"),
)
#: SPDX ids of licences (https://spdx.org/licenses) that Hugging Face knows, too. Those that OpenModelDB explains to
#: its readers come first; it takes all.
LICENCES = (
    *("Apache-2.0", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"),
    *("GPL-3.0-only", "MIT", "Unlicense", "WTFPL"),
    *("AFL-3.0", "AGPL-3.0-only", "AGPL-3.0-or-later", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause-Clear", "BSL-1.0"),
    *("CC-BY-3.0", "CC-BY-ND-4.0", "CC-BY-NC-3.0", "CC-BY-NC-ND-4.0", "CC-BY-SA-3.0", "EPL-2.0", "EUPL-1.2"),
    *("GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-or-later", "ISC", "LGPL-2.1-only", "LGPL-3.0-only", "MPL-2.0"),
    *("NCSA", "OFL-1.1", "OSL-3.0", "Zlib"),
)
#: The address of a file, or of the folder of all files.
ADDRESS = re.compile(
    r"https?://(?!cdn\.discordapp\.com/)[^/\s]+/(\S*\.(safetensors|onnx)(\?\S*)?|(\S*/)?)", re.IGNORECASE
)


@dataclass(frozen=True)
class ModelInfo:
    """What no file says of a model.

    Attributes:
        name: with or without the scale before it.
        authors: names of people.
        licence: an SPDX id, in upper or lower case.
        dataset: what the network was trained on; that of the experiment if empty.
        description: Markdown.
        tags: of OpenModelDB.
        purpose: what the model is for, in a line; may be empty.
        date: of publication, YYYY-MM-DD; today if empty.
    """

    name: str = ""
    authors: tuple[str, ...] = ()
    licence: str = ""
    dataset: str = ""
    description: str = ""
    tags: tuple[str, ...] = ()
    purpose: str = ""
    date: str = ""


class PublishedFile(NamedTuple):
    """A published file: its name, size in bytes and SHA-256 in hexadecimal digits."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """A model that is published; `scale` is a whole number.

    Attributes:
        samples: for each picture the names of its files: as given, enlarged by bicubic interpolation, by the network.
    """

    identifier: str
    scale: int
    info: ModelInfo
    network_g: Mapping[str, Any]
    training: Training
    samples: Sequence[tuple[str, ...]]
    onnx: ExportResult | None


def model_id(name: str, scale: int) -> str:
    """The id of a model: `4x-My-Name` for `My Name`, `4xMy_Name` and `My-Name-x4`; `4x-` for a name without letters."""
    plain = re.sub(rf"^(?:{scale}x|x{scale}(?![0-9]))-?", "", _dashed(name), flags=re.IGNORECASE)
    plain = re.sub(rf"-(?:x{scale}|{scale}x)$", "", plain, flags=re.IGNORECASE)
    return f"{scale}x-{plain}"


def user_id(author: str) -> str:
    """The id of a user: `philip-k` for `Philip K.`"""
    return _dashed(author).lower()


def _dashed(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-")


def complete(info: ModelInfo, training: Training, scale: int, urls: Sequence[str]) -> ModelInfo:
    """Fill in what is known from elsewhere; raises UserError with everything that is missing or invalid."""
    info = replace(
        info,
        name=info.name.strip(),
        licence={known.lower(): known for known in LICENCES}.get(info.licence.lower(), info.licence),
        dataset=info.dataset.strip() or training.settings.get("data", ""),
        description=info.description.strip(),
        date=info.date or datetime.date.today().isoformat(),
    )
    nameless = [author for author in info.authors if not user_id(author)]
    invalid_tags = [tag for tag in info.tags if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", tag)]
    texts = (info.name, *info.authors, info.dataset, info.description, info.purpose)
    invalid_texts = [text for text in texts if not is_utf8(text)]
    invalid_urls = [url for url in urls if not ADDRESS.fullmatch(url)]
    name_id = model_id(info.name, scale).partition("-")[2]
    licences, tags = did_you_mean(info.licence, LICENCES), ", ".join(TAGS)
    addresses = "https:// addresses that end in .safetensors or .onnx, or in a slash: the folder of all files"
    # Flag, what is given, true if it is valid, what to give
    rules: list[tuple[str, object, object, str]] = [
        ("-m WEIGHTS", scale, scale <= 16, "a network of scale 1 to 16, as OpenModelDB takes them"),
        ("--name NAME", info.name, name_id, "what the model is called, in ASCII letters or digits"),
        ("--author NAME ...", nameless, info.authors and not nameless, "who made it, in ASCII letters or digits"),
        ("all texts", invalid_texts, not invalid_texts, "UTF-8"),
        ("--license ID", info.licence, info.licence in LICENCES, f"the licence, an SPDX id. {licences}"),
        ("--dataset TEXT", "", info.dataset, "what it was trained on, such as 'DIV2K, Flickr2K'"),
        ("--description TEXT", "", info.description, "what it does, and how it differs from others"),
        ("--tags TAG ...", invalid_tags, info.tags and not invalid_tags, f"what it is for, such as {tags}"),
        ("--date YYYY-MM-DD", info.date, _is_date(info.date), "a day like 2025-03-31"),
        ("--resources URL ...", invalid_urls, not invalid_urls, f"{addresses}; those of Discord's CDN expire"),
    ]
    if problems := [rule for rule in rules if not rule[2]]:
        lines = [f"{flag}: {what}{f' (given: {given})' if given else ''}" for flag, given, _, what in problems]
        raise UserError("Cannot publish yet. Please give:", *(f" - {line}" for line in lines))
    return info


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
