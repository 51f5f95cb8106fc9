"""Weights by name: small ones that come with this package, and published ones, downloaded when first asked for."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

from esc_arch.archs.base import network_named
from esc_arch.atomic_io import fsync_folder, open_regular, writing_to
from esc_arch.errors import UserError, first_line
from esc_arch.names import did_you_mean, nearest
from esc_arch.ops.cache import cache_folder
from esc_arch.printing import shown
from esc_arch.system import lock

from .reading import find_weights, read_checkpoint
from .recognition import recognise

__all__ = ["INCLUDED", "NamedWeights", "find", "named_weights", "release_page", "resolve", "unknown_name"]

#: The weights that come with this package, by scale.
INCLUDED = {2: "ESC_small_X2", 4: "ESC_small_X4"}

_HERE = Path(__file__).parent
#: A name that ends so was meant as a file's, unless it is near that of published weights.
_SUFFIXES = (".pth", ".safetensors", ".pt", ".ckpt")
#: Seconds without a byte after which a server is given up, and bytes to read at once.
_TIMEOUT, _CHUNK = 30, 2**18


@dataclass(frozen=True)
class NamedWeights:
    """Weights that have a name.

    Attributes:
        type, scale, parameters: of the network that they are of.
        sha256: of the file, if known.
    """

    name: str
    type: str
    scale: int
    trained_on: str
    parameters: int
    sha256: str | None

    @property
    def included(self) -> bool:
        """True if they come with this package."""
        return self.name in INCLUDED.values()

    @property
    def path(self) -> Path:
        """Their file, which may be there or not."""
        if self.included:
            return _HERE / "weights" / f"{self.name}.safetensors"
        folder = os.environ.get("ESC_ARCH_WEIGHTS")
        return (Path(folder).absolute() if folder else cache_folder() / "weights") / f"{self.name}.pth"

    @property
    def url(self) -> str:
        """The address of their file: below ESC_ARCH_WEIGHTS_URL if that is set, else in the release."""
        base = os.environ.get("ESC_ARCH_WEIGHTS_URL") or release_page().replace("/tag/", "/download/")
        return f"{base.rstrip('/')}/{self.name}.pth"


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((_HERE / "published.json").read_text(encoding="utf-8"))
    return table


@cache
def named_weights() -> dict[str, NamedWeights]:
    """All weights that have a name, by name."""
    return {row["name"]: NamedWeights(**row) for row in _table()["weights"]}


def release_page() -> str:
    """The web page of the published weights."""
    return str(_table()["release"])


def find(weights: str | Path) -> NamedWeights | None:
    """The weights of a name, in any case, with or without .pth; None if it is another, or that of a file here."""
    if os.path.isfile(weights):
        return None
    return {name.lower(): each for name, each in named_weights().items()}.get(str(weights).lower().removesuffix(".pth"))


def resolve(weights: str | Path) -> Path:
    """The file of weights, given by its path or by their name; it is downloaded if it is not there yet.

    Raises:
        UserError: neither a file nor a known name; a file that cannot be downloaded, or is not what its name says.
    """
    named = find(weights)
    if named is None:
        if message := unknown_name(str(weights)):
            raise UserError(f"{message}.")
        return Path(weights)
    if not named.included:
        if not named.path.exists():
            _download(named)
        if reason := _why_wrong(named, named.path):
            raise UserError(f"{named.path} is not {named.name}: {reason} Remove it to download it again.")
    return named.path


def unknown_name(text: str) -> str | None:
    """What to say of a text that is no path and the name of no weights; None for those that are."""
    stem, suffix = os.path.splitext(text)
    is_path = os.path.lexists(text) or "/" in text or (suffix in _SUFFIXES and not nearest(stem, named_weights(), 0.8))
    if is_path or find(text):
        return None
    what = f"{text} is neither a file (looked for {os.path.abspath(text)}) nor the name of weights"
    return f"{what}. {did_you_mean(stem if suffix in _SUFFIXES else text, named_weights())}"


def _download(named: NamedWeights) -> None:
    path = named.path
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with _opened_alone(partial) as file:
            if path.exists():  # another process has just downloaded it
                _release(file)
                partial.unlink()
                return
            _fetch(named, file)
            os.fsync(file.fileno())
            _release(file)
            if reason := _why_wrong(named, partial):
                partial.unlink()
                raise UserError(f"{named.url} is not {named.name}: {reason} It was removed.")
            os.replace(partial, path)
            fsync_folder(path.parent)


def _release(file: IO[bytes]) -> None:
    if sys.platform == "win32":  # which moves and removes no open files
        file.close()


@contextmanager
def _opened_alone(path: Path) -> Iterator[IO[bytes]]:
    """`path`, opened to append to, once no other process has it."""
    while True:
        with open_regular(path, create=True) as file:
            with suppress(OSError):  # a network file system without locks
                lock(file, wait=True)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def _fetch(named: NamedWeights, file: IO[bytes]) -> None:
    """Append to `file` what it lacks."""
    print(f"Downloading {shown(named.url)} to {shown(named.path)}", file=sys.stderr, flush=True)
    done = os.fstat(file.fileno()).st_size
    with _server_errors(named):
        try:
            answer = urlopen(Request(named.url, headers={"Range": f"bytes={done}-"} if done else {}), timeout=_TIMEOUT)
        except HTTPError as error:
            if error.code == 416:  # there is nothing beyond that
                return
            raise
    if answer.status != 206:  # it sends the file from its beginning
        done = 0
        file.truncate(done)
    with _server_errors(named):
        total = done + int(answer.headers["Content-Length"] or 0)
    with answer, tqdm(total=total or None, initial=done, unit="B", unit_scale=True, disable=None) as bar:
        while True:
            with _server_errors(named):
                chunk = answer.read(_CHUNK)
                if not chunk and done < total:
                    raise ConnectionError(f"it ended after {done:,} of {total:,} bytes; the same command continues")
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
            done += len(chunk)
    file.flush()


@contextmanager
def _server_errors(named: NamedWeights) -> Iterator[None]:
    """One message for all that can go wrong with a connection, and with an address that somebody set."""
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        reason = (
            first_line(error) if isinstance(error, HTTPError) else getattr(error, "reason", None) or first_line(error)
        )
        raise UserError(
            f"{named.name} cannot be downloaded ({reason}). Get {named.url} in another way and save it as "
            f"{named.path}, or set ESC_ARCH_WEIGHTS_URL to the address of a mirror. What comes with esc_arch needs no "
            f"download: {' and '.join(INCLUDED.values())}."
        ) from error


def _why_wrong(named: NamedWeights, file: Path) -> str | None:
    """Why a file is not that of these weights; a sentence."""
    if named.sha256 and file.is_file() and (found := hashlib.sha256(file.read_bytes()).hexdigest()) != named.sha256:
        return f"its SHA-256 is {found}, not {named.sha256}."
    try:
        section = recognise(find_weights(read_checkpoint(file), None, file)[1])
    except UserError as error:
        return str(error)
    kind, scale = section.pop("type"), section["upscaling_factor"]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in network_named(kind)(**section).parameters())
    if (kind, scale, count) == (named.type, named.scale, named.parameters):
        return None
    wanted = f"{named.type} x{named.scale} with {named.parameters:,} parameters"
    return f"its network is {kind} x{scale:g} with {count:,} parameters, not {wanted}."
