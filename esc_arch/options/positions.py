"""Where the keys of an option file stand, for messages: kept beside the options, which stay plain data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

__all__ = ["Place", "Positions"]

_BOOL, _INT, _FLOAT, _TIME = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_WORDS_FOR_BOOLEANS = ("yes", "no", "on", "off")


@dataclass(frozen=True)
class Place:
    """A place in an option file, counted from 1; or the `--force_yml` entry that set a value."""

    file: str
    line: int | None = None
    column: int | None = None
    entry: str | None = None

    def __str__(self) -> str:
        if self.entry is not None:
            return f"--force_yml {self.entry}"
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


class Positions:
    """Finds places by keys, in the nodes of a YAML file and among the entries that were set over it.

    Args:
        file: its name, for messages.
        root: the node of its top level, as it is after the options were made of it.
    """

    def __init__(self, file: str, root: yaml.Node | None) -> None:
        self.file = file
        self._root = root
        self._forced: list[tuple[list[str], str]] = []

    def add_forced(self, keys: Sequence[str], entry: str) -> None:
        """Note that `entry` set the value at `keys`, whatever the file says there."""
        self._forced.append((list(keys), entry))

    def of(self, keys: Sequence[str]) -> Place:
        """The place of the last of `keys` that is given: a missing key is in the section that lacks it."""
        keys = list(keys)
        for forced, entry in reversed(self._forced):
            if keys[: len(forced)] == forced:
                return Place(self.file, entry=entry)
        node, _, depth = self._find(keys)
        if depth < len(keys):  # it is not in the file, but may be the beginning of an entry's keys
            for forced, entry in self._forced:
                if forced[: len(keys)] == keys:
                    return Place(self.file, entry=entry)
        if node is None:
            return Place(self.file)
        return Place(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def of_problem(self, problem: str) -> tuple[str, Place]:
        """The key that a problem `KEY[:KEY...]: text` names, and its place.

        When the text begins with a key of the section that is named, as a constructor's message about an argument
        does, the place is that key's.
        """
        path, _, text = problem.partition(": ")
        keys = path.split(":")
        word = text.split(" ", 1)[0].rstrip(":")
        depth = self._find([*keys, word])[2]
        return path, self.of([*keys, word] if depth > len(keys) else keys)

    def reading(self, keys: Sequence[str]) -> str | None:
        """How YAML 1.1 reads the value at `keys`, where that is not what it looks like."""
        if any(list(keys)[: len(forced)] == forced for forced, _ in self._forced):
            return None
        _, value, depth = self._find(keys)
        return _surprise(value) if depth == len(keys) else None

    def odd_numbers(self) -> Iterator[tuple[str, str]]:
        """The numbers written in octal or to base 60, which hardly anybody means: `KEY[:KEY...]` and how it is read."""
        waiting: list[tuple[str, yaml.Node]] = [("", self._root)] if self._root is not None else []
        seen = set()  # aliases lead to the same node again
        while waiting:
            path, node = waiting.pop(0)
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, yaml.MappingNode):
                last = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
                waiting += [(f"{path}:{key}".lstrip(":"), value) for key, value in last.items()]
            elif isinstance(node, yaml.SequenceNode):
                waiting += [(path, value) for value in node.value]
            elif node.tag in (_INT, _FLOAT) and (":" in node.value or _OCTAL.fullmatch(node.value)):
                surprise = _surprise(node)
                if surprise is not None and self.of(path.split(":")).entry is None:
                    yield path, surprise

    def _find(self, keys: Sequence[str]) -> tuple[yaml.Node | None, yaml.Node | None, int]:
        """The nodes of the key and the value that `keys` lead to, as far as they go, and how far."""
        place = value = self._root
        for depth, key in enumerate(keys):
            pairs = value.value if isinstance(value, yaml.MappingNode) else []
            # Of keys that are given twice the last counts; merged ones come first
            found = next((pair for pair in reversed(pairs) if pair[0].value == key), None)
            if found is None:
                return place, value, depth
            place, value = found
        return place, value, len(keys)


def _surprise(node: yaml.Node | None) -> str | None:
    if not isinstance(node, yaml.ScalarNode) or node.style:  # in quotes
        return None
    text, value = node.value, None
    if node.tag == _BOOL and text.lower() in _WORDS_FOR_BOOLEANS:
        value = "true" if text.lower() in ("yes", "on") else "false"
    elif node.tag in (_INT, _FLOAT) and (":" in text or "_" in text or _OCTAL.fullmatch(text)):
        value = str(yaml.safe_load(text))
    elif node.tag == _TIME:
        value = "a date"
    return None if value is None else f"YAML reads {text} as {value}: write '{text}', in quotes, if it is text"
