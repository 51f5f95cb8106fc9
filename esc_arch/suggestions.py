"""The known word that a mistyped one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]


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
