"""Where the keys of an option file stand, for messages: kept beside the options, which stay plain data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

__all__ = ["Place", "Positions", "Repeated", "repeated_keys"]

#: Line and column of a key that its mapping had before, it and those above it, and what to say of it.
Repeated = tuple[int, int, str, str]

_BOOL, _INT, _FLOAT, _TIME = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))
_MERGE = "tag:yaml.org,2002:merge"
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
        repeated: its `repeated_keys`, as it was before.
    """

    def __init__(self, file: str, root: yaml.Node | None, repeated: Sequence[Repeated] = ()) -> None:
        self.file = file
        self._root = root
        self._repeated = repeated
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

    def remarks(self) -> Iterator[tuple[Place, str, str]]:
        """What is read unexpectedly: its place, the key and those above it, and how it is read.

        Keys that are given twice, and numbers written in octal or to base 60, which hardly anybody means.
        """
        for line, column, key, message in self._repeated:
            yield Place(self.file, line, column), key, message
        told = set()  # merged values are in several mappings
        for path, mapping in _mappings(self._root):
            last = {key.value: value for key, value in mapping.value if isinstance(key, yaml.ScalarNode)}
            for name, value in last.items():
                keys = [*path, name]
                for number in _scalars(value):
                    odd = number.tag in (_INT, _FLOAT) and (":" in number.value or _OCTAL.fullmatch(number.value))
                    surprise = _surprise(number) if odd and id(number) not in told else None
                    told.add(id(number))
                    if surprise is not None and self.of(keys).entry is None:
                        yield self.of(keys), ":".join(keys), surprise

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


def repeated_keys(root: yaml.Node) -> Iterator[Repeated]:
    """The keys of a tree of nodes that their mappings had before."""
    for path, mapping in _mappings(root):
        first_line: dict[str, int] = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in first_line:
                message = f"is also given in line {first_line[key.value]}; the last one counts"
                yield line, key.start_mark.column + 1, ":".join([*path, key.value]), message
            first_line[key.value] = line


def _mappings(root: yaml.Node | None) -> Iterator[tuple[list[str], yaml.MappingNode]]:
    """Every mapping with the keys above it, each once though aliases may lead to it again (or in a circle)."""
    waiting: list[tuple[list[str], yaml.Node | None]] = [([], root)]
    seen = set()
    while waiting:
        path, node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield path, node
            waiting += [([*path, str(key.value)], value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(path, part) for part in node.value]


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """A value, or those of a list in the order of the file."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        yield from (part for part in node.value if isinstance(part, yaml.ScalarNode))


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
