"""The entry of a model in OpenModelDB (https://openmodeldb.info), and that database's rules for entries.

An entry is a file `data/models/ID.json` of its repository, OpenModelDB/open-model-database. The rules are those of its
`src/lib/model-props.ts`, `schema-util.ts` and `license.ts`, and of entries there. What it keeps lists of itself, users,
tags and architectures, can grow: only their form is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["ARCHITECTURE", "LICENCES", "TAGS", "entry_problems", "model_id", "user_id"]

#: The id of the family among architectures.
ARCHITECTURE = "esc"
#: Tags of what models are for, as far as they are known here.
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

_MODEL_ID = re.compile(r"\d+x-[a-zA-Z0-9]+(?:-[a-zA-Z0-9]+)*")
_USER_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_TAG_ID = re.compile(r"(?:[a-z0-9]+:)?[a-z0-9]+(?:-[a-z0-9]+|[+])*")
_ARCH_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+|[+])*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_PLATFORMS = {"pth": "pytorch", "safetensors": "pytorch", "onnx": "onnx"}
_EXPIRING = "https://cdn.discordapp.com/"


def model_id(name: str, scale: int) -> str:
    """The id of a model: `4x-My-Name` for `My Name`, `4xMy_Name` and `My-Name-x4`; `4x-` for a name without letters."""
    plain = _dashes(name)
    plain = re.sub(rf"^(?:{scale}x|x{scale}(?![0-9]))-?", "", plain, flags=re.IGNORECASE)
    plain = re.sub(rf"-(?:x{scale}|{scale}x)$", "", plain, flags=re.IGNORECASE)
    return f"{scale}x-{plain}"


def user_id(author: str) -> str:
    """The id of a user: `philip-k` for `Philip K.`"""
    return _dashes(author).lower()


def _dashes(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-")


def entry_problems(identifier: str, entry: Mapping[str, Any]) -> list[str]:
    """All that is wrong with an entry: a field each, what it holds and what is allowed.

    An entry without addresses of its files is not wrong here: they are known when the files are there.
    """
    return list(_problems(identifier, entry))


def _problems(identifier: str, entry: Mapping[str, Any]) -> Iterator[str]:
    scale = entry.get("scale")
    if not _MODEL_ID.fullmatch(identifier) or not identifier.startswith(f"{scale}x-"):
        yield (
            f"the id {identifier!r} must be the scale, x, and letters and digits with single dashes between, such as "
            "4x-Name"
        )
    for field, lowest, highest in (("scale", 1, 16), ("inputChannels", 1, 4), ("outputChannels", 1, 4)):
        if not _is_whole(entry.get(field), lowest, highest):
            yield f"{field}: {entry.get(field)!r} given; must be a whole number, {lowest} to {highest}"
    for field in ("name", "description"):
        text = entry.get(field)
        if not isinstance(text, str) or not text or text != text.strip():
            yield f"{field}: {text!r} given; must be text, without blanks around it"
    yield from _ids("author", entry.get("author"), _USER_ID)
    yield from _ids("tags", entry.get("tags"), _TAG_ID)
    yield from _ids("architecture", [entry.get("architecture")], _ARCH_ID)
    if not _matches(_DATE, entry.get("date")):
        yield f"date: {entry.get('date')!r} given; must be a day like 2025-03-31"
    licence = entry.get("license")
    if licence is not None and licence not in LICENCES:
        yield f"license: {licence!r} given; must be an SPDX id: {', '.join(LICENCES)}"
    for resource in entry.get("resources") or [None]:
        yield from _resource_problems(resource)
    for field in ("trainingIterations", "trainingEpochs", "trainingBatchSize", "trainingHRSize", "datasetSize"):
        if field in entry and not _is_whole(entry[field], 1):
            yield f"{field}: {entry[field]!r} given; must be a whole number of at least 1"


def _ids(field: str, value: Any, pattern: re.Pattern[str]) -> Iterator[str]:
    ids = value if isinstance(value, list) else [value]
    if not ids:
        yield f"{field}: none given; must be at least one"
    for one in ids:
        if not _matches(pattern, one):
            yield f"{field}: {one!r} given; must be small letters and digits, with single dashes between"


def _resource_problems(resource: Any) -> Iterator[str]:
    if not isinstance(resource, Mapping):
        yield "resources: none given; must be at least one file"
        return
    kind = resource.get("type")
    if kind not in _PLATFORMS or resource.get("platform") != _PLATFORMS[kind]:
        pairs = ", ".join(f"{kind} of {platform}" for kind, platform in _PLATFORMS.items())
        yield f"resources: {kind!r} of {resource.get('platform')!r} given; must be {pairs}"
    if not _is_whole(resource.get("size"), 1) or not _matches(_SHA256, resource.get("sha256")):
        yield f"resources: {kind} must have its size in bytes, and its sha256 as 64 hexadecimal digits"
    yield from url_problems(resource.get("urls") or ())


def url_problems(urls: Iterable[str]) -> Iterator[str]:
    """What is wrong with addresses of files."""
    for url in urls:
        if not re.match(r"https?://[^/\s]+/\S*$", url):
            yield f"resources: {url!r} given; must be an address that begins with https://"
        elif url.startswith(_EXPIRING):
            yield f"resources: {url!r} expires within a day: put the file elsewhere, such as a GitHub release"


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_whole(value: Any, lowest: int, highest: int | None = None) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= lowest and (highest is None or value <= highest)
