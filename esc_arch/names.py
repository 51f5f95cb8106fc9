"""Names in BasicSR's registries, and the known name that a mistyped one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["OWN", "did_you_mean", "nearest", "without_own"]

Entry = TypeVar("Entry")

#: Prefix of the second name of every class of ours, which no other package can take: `esc_arch.ESC`.
OWN = "esc_arch."


def without_own(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries of a registry, without those under `OWN` + name that have the plain name as well."""
    return {
        name: entry
        for name, entry in entries.items()
        if not (name.startswith(OWN) and entries.get(name.removeprefix(OWN)) is entry)
    }


def nearest(word: object, allowed: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The entry of `allowed` most like `word`, ignoring case; None if none is near."""
    spelling = {entry.lower(): entry for entry in allowed}
    found = difflib.get_close_matches(str(word).lower(), spelling, n=1, cutoff=cutoff)
    return spelling[found[0]] if found else None


def did_you_mean(word: object, allowed: Iterable[str]) -> str:
    """`Did you mean 'X'? Allowed: A, B, X`, without the question if nothing allowed is near `word`."""
    names = sorted(allowed)
    guess = nearest(word, names)
    question = f"Did you mean {guess!r}? " if guess else ""
    return f"{question}Allowed: {', '.join(names)}"
