"""Where the keys of an option file are, for messages: kept beside the options, which stay plain data."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import count
from typing import Any

import yaml

from esc_arch.problems import Place, Problem, join

__all__ = ["TOO_DEEP", "Positions"]

#: Far more than any option file has; files that expand to more (aliases of aliases) would take for ever to check.
_MAX_VALUES = 100_000
_MAX_DEPTH = 100
TOO_DEEP = f"more than {_MAX_DEPTH} levels of lists and mappings, or an alias (*NAME) that leads back to itself"

_BOOL, _TIME, _MERGE, *_NUMBERS = (f"tag:yaml.org,2002:{t}" for t in ("bool", "timestamp", "merge", "int", "float"))
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_LONGEST_NUMBER = 40
_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


class Positions:
    """The places of keys, in the file and among the entries of `--force_yml` that were set over it.

    Args:
        file: its name, for messages.
        root: the node of its top level, as the parser returns it: merge keys (`<<`) not yet resolved; None if empty.

    Raises:
        yaml.YAMLError: there are more levels or values than could be checked.

    Attributes:
        repeated: a warning for each key that its mapping has before, by its place.
        readings: how YAML 1.1 reads values that are not what they look like, by their paths.
    """

    def __init__(self, file: str, root: yaml.Node | None) -> None:
        self.file = file
        self.repeated: dict[Place, Problem] = {}
        self.readings: dict[str, str] = {}
        self._places: dict[str, Place] = {}
        self._odd_numbers: dict[Place, str] = {}  # each once, though aliases may lead to it again
        self._values = count(1)
        if root is not None:
            self._add("", root, root, 0)

    def _add(self, path: str, key: yaml.Node, value: yaml.Node, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=value.start_mark)
        self._count()
        self._places[path] = self._place(key)
        if isinstance(value, yaml.MappingNode):
            for name, pair in self._pairs(value, path).items():
                self._add(join(path, name), *pair, depth + 1)
        elif isinstance(value, yaml.SequenceNode):
            for index, part in enumerate(value.value):
                self._add(join(path, str(index)), part, part, depth + 1)
        elif (reading := _reading(value)) is not None:
            self.readings[path] = reading
            if value.tag in _NUMBERS and "_" not in value.value:  # 1_000 is as it looks
                self._odd_numbers.setdefault(self._place(value), path)

    def _pairs(self, mapping: yaml.MappingNode, path: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The entries that count: the last of repeated keys, and those merged by `<<` where there is no own one."""
        self._count()
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in mapping.value:
            if next(self._values) > _MAX_VALUES:
                raise yaml.YAMLError(
                    f"its aliases (*NAME) expand to more than {_MAX_VALUES} values; write fewer of them"
                )
            if key.tag == _MERGE:
                bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for base in reversed(bases):
                    merged |= self._pairs(base, path) if isinstance(base, yaml.MappingNode) else {}
            elif isinstance(key, yaml.ScalarNode):
                if key.value in own:
                    message = f"is also given in line {self._place(own[key.value][0]).line}; the last one counts"
                    problem = Problem(join(path, key.value), message, "warning", self._place(key))
                    self.repeated.setdefault(self._place(key), problem)  # once, though aliases may lead here again
                own[key.value] = key, value
        return merged | own

    def _count(self) -> None:
        if next(self._values) > _MAX_VALUES:
            raise yaml.YAMLError(f"its aliases (*NAME) expand to more than {_MAX_VALUES} values; write fewer of them")

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def add_forced(self, path: str, entry: str) -> None:
        """Note that `entry` set the value at `path`, whatever the file says there."""
        for inner in [inner for inner in self._places if f"{inner}:".startswith(f"{path}:")]:
            del self._places[inner]
            self.readings.pop(inner, None)
        while path:
            self._places.setdefault(path, Place(self.file, entry=entry))
            path = path.rpartition(":")[0]

    def place(self, path: str) -> Place:
        """The place of a key `KEY[:KEY...]`; if it is missing, of the innermost section around it that is given."""
        while path not in self._places:
            path = path.rpartition(":")[0]
        return self._places[path]

    def locate(self, problem: Problem) -> Problem:
        """The same problem with its place, and with how YAML reads the value where that is not what it looks like.

        If the message begins with a key of the section at `path`, as constructors' messages do, that key is the place.
        """
        if problem.place is not None:
            return problem
        inner = join(problem.path, problem.message.split(" ", 1)[0].rstrip(":"))
        message = ". ".join(filter(None, [problem.message, self.readings.get(problem.path)]))
        return replace(problem, message=message, place=self.place(inner if inner in self._places else problem.path))

    def odd_numbers(self) -> list[Problem]:
        """A warning for each number written in octal or to base 60, which is rarely meant."""
        paths = [path for path in self._odd_numbers.values() if path in self.readings]
        return [Problem(path, self.readings[path], "warning", self.place(path)) for path in paths]


def _reading(node: Any) -> str | None:
    """How YAML 1.1 reads a scalar, where that is not what it looks like."""
    text, value = node.value, None
    if node.style or len(text) > _LONGEST_NUMBER:  # in quotes, or refused when it is read
        return None
    if node.tag == _BOOL:
        value = _BOOLEANS.get(text.lower())
    elif node.tag == _TIME:
        value = "a date"
    elif node.tag in _NUMBERS and (":" in text or "_" in text or _OCTAL.fullmatch(text)):
        value = str(yaml.safe_load(text))
    return None if value is None else f"YAML reads {text} as {value}: write '{text}', in quotes, if it is text"
