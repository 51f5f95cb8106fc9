"""Where the keys of an option file are, for messages: kept beside the options, which stay plain data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import yaml

from esc_arch.problems import Place, Problem, join

__all__ = ["Positions"]

_BOOL, _INT, _FLOAT, _TIME, _MERGE = (f"tag:yaml.org,2002:{t}" for t in ("bool", "int", "float", "timestamp", "merge"))
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


class Positions:
    """Finds the places of keys, in the file and among the entries of `--force_yml` that were set over it.

    Args:
        file: its name, for messages.
        root: the node of its top level, as the parser returns it: merge keys (`<<`) not yet resolved; None if empty.

    Attributes:
        repeated: a warning for each key that its mapping has before, by its place.
    """

    def __init__(self, file: str, root: yaml.Node | None) -> None:
        self.file = file
        self.repeated: dict[tuple[int, int], Problem] = {}
        self._nodes: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        self._forced: list[tuple[str, str]] = []
        if root is not None:
            self._add("", root, root)

    def _add(self, path: str, key: yaml.Node, value: yaml.Node) -> None:
        self._nodes[path] = key, value
        if isinstance(value, yaml.MappingNode):
            for name, pair in self._pairs(value, path).items():
                self._add(join(path, name), *pair)
        elif isinstance(value, yaml.SequenceNode):
            for index, part in enumerate(value.value):
                self._add(join(path, str(index)), part, part)

    def _pairs(self, mapping: yaml.MappingNode, path: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The entries that count: the last of repeated keys, and those merged by `<<` where there is no own one."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in mapping.value:
            if key.tag == _MERGE:
                bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for base in reversed(bases):
                    merged |= self._pairs(base, path) if isinstance(base, yaml.MappingNode) else {}
            elif isinstance(key, yaml.ScalarNode):
                if key.value in own:
                    message = f"is also given in line {_place(own[key.value][0])[0]}; the last one counts"
                    problem = Problem(join(path, key.value), message, "warning", Place(self.file, *_place(key)))
                    self.repeated.setdefault(_place(key), problem)  # once, though aliases may lead here again
                own[key.value] = key, value
        return merged | own

    def add_forced(self, path: str, entry: str) -> None:
        """Note that `entry` set the value at `path`, whatever the file says there."""
        self._forced.append((path, entry))

    def place(self, path: str) -> Place:
        """The place of a key `KEY[:KEY...]`; if it is missing, of the innermost section around it that is given."""
        entry, found = self._entry(path), path
        while found and found not in self._nodes:
            found = found.rpartition(":")[0]
        if entry is None and found != path:  # a section that the file lacks may have been made by an entry
            entry = next((entry for forced, entry in self._forced if _is_within(forced, path)), None)
        if entry is not None:
            return Place(self.file, entry=entry)
        return Place(self.file, *_place(self._nodes[found][0]))

    def locate(self, problem: Problem) -> Problem:
        """The same problem with its place, and with how YAML reads the value where that is not what it looks like.

        If the message begins with a key of the section at `path`, as constructors' messages do, that key is the place.
        """
        if problem.place is not None:
            return problem
        inner = join(problem.path, problem.message.split(" ", 1)[0].rstrip(":"))
        message = ". ".join(filter(None, [problem.message, self.reading(problem.path)]))
        return replace(problem, message=message, place=self.place(inner if inner in self._nodes else problem.path))

    def reading(self, path: str) -> str | None:
        """How YAML 1.1 reads the value at `path`, where that is not what it looks like."""
        return _surprise(self._nodes[path][1]) if path in self._nodes and self._entry(path) is None else None

    def odd_numbers(self) -> Iterator[Problem]:
        """A warning for each number written in octal or to base 60, which is rarely meant."""
        told = set()  # merged values are in several mappings
        for path, (_, value) in self._nodes.items():
            odd = value.tag in (_INT, _FLOAT) and (":" in value.value or _OCTAL.fullmatch(value.value))
            if odd and id(value) not in told and (surprise := self.reading(path)) is not None:
                told.add(id(value))
                yield Problem(path, surprise, "warning", self.place(path))

    def _entry(self, path: str) -> str | None:
        """The entry of `--force_yml` that set the value at `path`, or a section above it."""
        return next((entry for forced, entry in reversed(self._forced) if _is_within(path, forced)), None)


def _is_within(path: str, section: str) -> bool:
    """True if `path` is `section` or in it."""
    return f"{path}:".startswith(f"{section}:")


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _surprise(node: yaml.Node) -> str | None:
    if not isinstance(node, yaml.ScalarNode) or node.style:  # in quotes
        return None
    text, value = node.value, None
    if node.tag == _BOOL:
        value = _BOOLEANS.get(text.lower())
    elif node.tag in (_INT, _FLOAT) and (":" in text or "_" in text or _OCTAL.fullmatch(text)):
        value = str(yaml.safe_load(text))
    elif node.tag == _TIME:
        value = "a date"
    return None if value is None else f"YAML reads {text} as {value}: write '{text}', in quotes, if it is text"
