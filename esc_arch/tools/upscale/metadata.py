"""What image files hold beside pixels: colour profile, camera data (EXIF), XMP, texts, resolution."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import IO, Any

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from esc_arch.errors import first_line

__all__ = [
    *("DESCRIPTIVE", "EXIF", "EXIF_MARKER", "GPS", "TEXTS", "XMP_CHUNK", "XMP_SEGMENT", "XMP_TAG", "Exif", "Metadata"),
    *("image_metadata", "parse_exif", "png_chunks", "tiff_metadata"),
]

#: What stands before the tags in a JPEG file, and may in others.
EXIF_MARKER = b"Exif\0\0"
CLASSIC, BIG = b"II*\0\x08\0\0\0", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0"

SHORT, LONG = 3, 4
ORIENTATION, WIDTH, HEIGHT = 0x0112, 0xA002, 0xA003
EXIF, GPS, INTEROPERABILITY = 0x8769, 0x8825, 0xA005
#: Tags whose value is the place of a directory, by the directory that they stand in. Others, such as that of the
#: thumbnail, are left out: it shows the image as it was.
DIRECTORIES = {0: (EXIF, GPS), EXIF: (INTEROPERABILITY,)}

#: What a TIFF file's first directory says of the scene rather than of how the pixels are stored: description, maker,
#: model, orientation, software, date, artist, rating, copyright, IPTC, and Windows' title to subject.
DESCRIPTIVE = {
    *(0x010E, 0x010F, 0x0110, ORIENTATION, 0x0131, 0x0132, 0x013B, 0x4746, 0x4749, 0x8298, 0x83BB),
    *range(0x9C9B, 0x9CA0),
}

#: Chunks of a PNG file that say how its numbers are colours, where no profile does.
PNG_COLOUR = (b"cICP", b"sRGB", b"gAMA", b"cHRM")
#: How the chunk of a PNG file and the segment of a JPEG file that hold XMP begin, and JPEG's with what does not fit.
XMP_CHUNK = b"XML:com.adobe.xmp\0"
XMP_SEGMENT, XMP_EXTENSION = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"
#: Markers of JPEG's comments and of Photoshop's resources, and the number of IPTC among these; XMP's tag in TIFF.
COMMENT, APP13, IPTC, XMP_TAG = b"\xff\xfe", b"\xff\xed", 0x0404, 0x02BC
#: What one format alone holds, by the names of its chunks and the markers of its segments.
TEXTS = {"png": (b"tEXt", b"zTXt", b"iTXt"), "jpg": (COMMENT, APP13)}


@dataclass(frozen=True)
class Exif:
    """A directory of tags, with type (TIFF 6.0) and value (as Pillow has it) of each, and the directories below."""

    tags: dict[int, tuple[int, Any]]
    directories: dict[int, Exif] = field(default_factory=dict)

    @property
    def orientation(self) -> int:
        """How the pixels are to be turned, 1 .. 8; 1 when it is not said, or out of range."""
        _, value = self.tags.get(ORIENTATION, (SHORT, 1))
        return value if value in range(1, 9) else 1

    def fitted(self, height: int, width: int) -> Exif:
        """The same for upright pixels of this size."""
        directories = dict(self.directories)
        if EXIF in directories:
            directories[EXIF] = directories[EXIF]._updated({WIDTH: (LONG, width), HEIGHT: (LONG, height)})
        return replace(self._updated({ORIENTATION: (SHORT, 1)}), directories=directories)

    def _updated(self, tags: dict[int, tuple[int, Any]]) -> Exif:
        return replace(self, tags={tag: tags.get(tag, value) for tag, value in self.tags.items()})

    def encode(self) -> bytes:
        """The block that PNG, JPEG and WebP files hold, without `EXIF_MARKER`."""
        return CLASSIC + self.directory(len(CLASSIC))

    def directory(self, place: int, *, big: bool = False) -> bytes:
        """The directory and those below, as they are to stand at `place` of a TIFF file, or a BigTIFF one."""
        found = ImageFileDirectory_v2(BIG if big else CLASSIC)
        for tag, (kind, value) in self.tags.items():
            found.tagtype[tag] = kind
            # Pillow reads text as Latin-1, whatever it is, and would write it as ASCII
            found[tag] = value.encode("latin-1") if isinstance(value, str) else value
        for tag in self.directories:
            found.tagtype[tag], found[tag] = LONG, 0
        below = place + len(found.tobytes())
        contents = b""
        for tag, directory in self.directories.items():
            found[tag] = below + len(contents)
            contents += directory.directory(below + len(contents), big=big)
        return found.tobytes(place) + contents


@dataclass(frozen=True)
class Metadata:
    """What goes with pixels from the source to the result.

    Attributes:
        icc: the colour profile, byte for byte.
        dpi: resolution in pixels per inch, horizontal and vertical.
        png_colour: chunks of `PNG_COLOUR`, name and content.
        xmp: as it is to stand in any format.
        texts: what one format alone holds, see `TEXTS`: names, or JPEG's markers, and contents.
    """

    icc: bytes | None = None
    exif: Exif | None = None
    dpi: tuple[float, float] | None = None
    png_colour: tuple[tuple[bytes, bytes], ...] = ()
    xmp: bytes | None = None
    texts: tuple[tuple[bytes, bytes], ...] = ()


def image_metadata(image: Image.Image) -> tuple[Metadata, tuple[str, ...]]:
    """What Pillow finds in a PNG, JPEG, WebP or BMP file, and notes of what is left out, a sentence each."""
    exif, notes = None, tuple[str, ...]()
    if block := image.info.get("exif"):
        exif, notes = parse_exif(io.BytesIO(block.removeprefix(EXIF_MARKER)))
    texts = []
    for name, content in getattr(image, "applist", ()):  # of JPEG
        if name == "COM":
            texts.append((COMMENT, content))
        elif content.startswith(XMP_EXTENSION):
            notes = (*notes, "its extended XMP, beyond 64 KiB, was left out")
    if isinstance(iptc := image.info.get("photoshop", {}).get(IPTC), bytes):
        resource = b"8BIM" + struct.pack(">HHI", IPTC, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)
        texts.append((APP13, b"Photoshop 3.0\0" + resource))
    icc, dpi, xmp = image.info.get("icc_profile") or None, _known(image.info.get("dpi")), image.info.get("xmp")
    return Metadata(icc, exif, dpi, xmp=_upright_xmp(xmp), texts=tuple(texts)), notes


def _upright_xmp(xmp: object) -> bytes | None:
    """XMP of pixels that are not turned any more; None for what is no text."""
    upright = rb"(tiff:Orientation(?:>|\s*=\s*[\"']))[2-8]"
    return re.sub(upright, rb"\g<1>1", xmp) if isinstance(xmp, bytes) and xmp else None


def tiff_metadata(file: IO[bytes], page: Any) -> tuple[Metadata, tuple[str, ...]]:
    """The same of a TIFF file, of which tifffile has read the first page."""
    exif, notes = parse_exif(file, DESCRIPTIVE)
    description = exif.tags.get(0x010E, (0, ""))[1] if exif else ""
    if exif and str(description).startswith(('{"shape"', "ImageJ=")):  # of the array, rather than of the scene
        exif = replace(exif, tags={tag: value for tag, value in exif.tags.items() if tag != 0x010E})
    numbers = [page.tags.valueof(tag) for tag in (0x011A, 0x011B)]
    per_inch = {2: 1.0, 3: 2.54}.get(page.tags.valueof(0x0128, 2))
    dpi = None
    if per_inch is not None and all(number and number[1] for number in numbers):
        dpi = _known([number[0] / number[1] * per_inch for number in numbers])
    profile = page.tags.valueof(0x8773)
    xmp = page.tags.valueof(XMP_TAG)
    return Metadata(bytes(profile) if profile else None, exif, dpi, xmp=_upright_xmp(xmp)), notes


def _known(dpi: Any) -> tuple[float, float] | None:
    # Programs that know no resolution say 1
    return (float(dpi[0]), float(dpi[1])) if dpi and min(dpi) > 1 else None


def parse_exif(file: IO[bytes], only: Collection[int] | None = None) -> tuple[Exif | None, tuple[str, ...]]:
    """The tags of a TIFF or BigTIFF file, or of an EXIF block, which is built alike; and notes of what is left out.

    Args:
        only: of the first directory, these tags.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module=r"PIL\.TiffImagePlugin")  # it warns of damage and goes on
            file.seek(0)
            head = file.read(8)
            head += file.read(8) if b"+" in head[2:4] else b""
            exif = _read_directory(file, head, ImageFileDirectory_v2(head).next, 0, only)
            exif.encode()
    except Exception as error:  # Pillow raises whatever nonsense leads to
        return None, (f"its EXIF data are damaged ({first_line(error)}) and left out",)
    return (exif if exif.tags or exif.directories else None), ()


def _read_directory(file: IO[bytes], head: bytes, place: int, kind: int, only: Collection[int] | None = None) -> Exif:
    found = ImageFileDirectory_v2(head)
    file.seek(place)
    found.load(file)
    inner = DIRECTORIES.get(kind, ())
    others = {tag for tags in DIRECTORIES.values() for tag in tags}
    tags = {tag: found[tag] for tag in found if tag not in others and (only is None or tag in only)}
    return Exif(
        {tag: (found.tagtype[tag], value) for tag, value in tags.items()},
        {tag: _read_directory(file, head, found[tag], tag) for tag in inner if tag in found},
    )


def png_chunks(file: IO[bytes], metadata: Metadata) -> Metadata:
    """With the chunks of `PNG_COLOUR` and `TEXTS` in a file."""
    colour, texts = [], []
    place = 8
    while file.seek(place) and len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"IEND":
            break
        if name in PNG_COLOUR and length <= 32:
            colour.append((name, file.read(length)))
        elif name in TEXTS["png"] and not (content := file.read(length)).startswith(XMP_CHUNK):
            texts.append((name, content))
        place += length + 12
    return replace(metadata, png_colour=tuple(colour), texts=tuple(texts))
