"""Reading option files and `--force_yml` entries as data: nothing in them is ever executed.

BasicSR 1.4.2 reads option files with a loader whose tags can call any function, and applies
`--force_yml` with `exec` and `eval` (faults 14 and 15).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from esc_arch.errors import UserError
from esc_arch.problems import Place
from esc_arch.project import import_modules

from .positions import Positions

__all__ = ["Options", "YAMLError", "apply_force_yml", "load_options", "load_with_positions", "load_yaml"]

Options = dict[str, Any]

#: Far more than any option file has; files that expand to more (aliases of aliases) would take for ever to check.
_MAX_VALUES = 100_000
_MAX_DEPTH = 100
_TOO_DEEP = f"more than {_MAX_DEPTH} levels of lists and mappings in each other; take some out"

_FLOAT_TAG = "tag:yaml.org,2002:float"
_FORCE_FORM = "--force_yml takes KEY[:KEY...]=VALUE, such as train:ema_decay=0.999"
_FILE = "option file "


class YAMLError(UserError):
    """A mistake in the YAML of an option file, with its place if that is known."""

    def __init__(self, message: str, place: Place | None = None) -> None:
        super().__init__(message)
        self.place = place


class _OptionLoader(yaml.SafeLoader):
    """YAML's plain data types only, with `5e-4` read as a number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
            # 2024-13-45, which looks like a date; !!bool z, !!int '' and !!timestamp z, at which PyYAML stumbles
            if not isinstance(node, yaml.ScalarNode):
                raise
            reason = f": {error}" if isinstance(error, ArithmeticError | ValueError) else ""
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value!r} cannot be read as {_short(node.tag)}{reason}", problem_mark=node.start_mark
            ) from None


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _refuse_tag(_loader: Any, node: yaml.Node) -> None:
    tag = _short(node.tag)
    raise yaml.constructor.ConstructorError(
        problem=f"the tag {tag!r} is not allowed: option files hold data only. Write a plain value without the tag",
        problem_mark=node.start_mark,
    )


_OptionLoader.add_constructor(None, _refuse_tag)
# YAML 1.1 wants a dot in the number and a sign in its exponent, and leaves 5e-4, 1E3 and 1.5e3 as text.
_OptionLoader.add_implicit_resolver(
    _FLOAT_TAG, re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load_yaml(text_or_path: str | os.PathLike[str]) -> Options:
    """The mapping in an option file, or in a text (told from a path by its line breaks).

    Files are read as UTF-8 whatever the locale says (fault 45). A key given twice in one mapping
    keeps its last value, as always in BasicSR, with a warning in the log.

    Raises:
        UserError: the file is missing, a folder, not UTF-8 or empty; its YAML has a mistake or a tag
            other than those of plain data (fault 14); its top level is not a mapping.
    """
    if isinstance(text_or_path, str) and "\n" in text_or_path:
        source, text = "the option text", text_or_path
    else:
        source, text = f"{_FILE}{os.fspath(text_or_path)}", _read_text(Path(text_or_path))
    options, positions = _options(source, text)
    for problem in positions.repeated.values():
        line = problem.place.line if problem.place else None
        logging.getLogger("basicsr").warning("%s, line %s: %s %s.", source, line, problem.path, problem.message)
    return options


def load_options(path: str | os.PathLike[str], force_yml: Iterable[str] = ()) -> Options:
    """The mapping in an option file with entries of `--force_yml`; modules that its `import:` names are imported.

    Raises:
        UserError: as `load_yaml`, `apply_force_yml` and `import_modules`.
    """
    opt = load_yaml(path)
    apply_force_yml(opt, force_yml)
    import_modules(opt.get("import"), f"{os.fspath(path)}: import")
    return opt


def load_with_positions(path: str | os.PathLike[str]) -> tuple[Options, Positions]:
    """The mapping in an option file, and where its keys are; otherwise as `load_yaml`."""
    return _options(f"{_FILE}{os.fspath(path)}", _read_text(Path(path)))


def _options(source: str, text: str) -> tuple[Options, Positions]:
    options, positions = _parse(text, source)
    if options is None:
        raise UserError(f"{source} is empty. Write the options into it as 'key: value' lines.")
    if not isinstance(options, dict):
        raise UserError(f"{source} holds {type(options).__name__} at its top level; it must be 'key: value' lines.")
    return options, positions


def apply_force_yml(opt: Options, entries: Iterable[str], positions: Positions | None = None) -> None:
    """Set values in `opt` from entries like `train:ema_decay=0.999`, in place, and note them in `positions`.

    A value is read as in an option file, lists and mappings too; `none` in any case means None, as in
    BasicSR, and takes a whole data set out (`datasets:val_2=none`). Keys that do not exist are made, with
    the mappings above them.

    Raises:
        UserError: an entry without `=`, with an empty key, with a value that is not YAML, or one that
            leads through something that is not a mapping.
    """
    for entry in entries:
        key_path, equals, text = entry.partition("=")
        keys = [key.strip() for key in key_path.split(":")]
        if not equals or not all(keys):
            raise UserError(f"--force_yml entry {entry!r} cannot be read: {_FORCE_FORM}.")
        parent, value = _enter(opt, keys[:-1], entry), _forced_value(text.strip(), entry)
        if value is None and keys[:-1] == ["datasets"] and keys[-1] in parent:
            del parent[keys[-1]]
        else:
            parent[keys[-1]] = value
        if positions is not None:
            positions.add_forced(keys, entry)


def _enter(opt: Options, keys: list[str], entry: str) -> Options:
    """The mapping at `keys` below `opt`, made where there is none or null."""
    for depth, key in enumerate(keys, start=1):
        if opt.get(key) is None:
            opt[key] = {}
        opt = opt[key]
        if not isinstance(opt, dict):
            raise UserError(
                f"--force_yml entry {entry!r} leads through {':'.join(keys[:depth])}, which is {opt!r} and no mapping: "
                f"{_FORCE_FORM}, where every KEY but the last names a mapping."
            )
    return opt


def _forced_value(text: str, entry: str) -> Any:
    if text.lower() == "none":
        return None
    source = f"--force_yml entry {entry!r}"
    try:
        return _parse(text, source)[0]
    except UserError as error:
        raise UserError(f"{error}. {_FORCE_FORM}; to give text with special characters: \"KEY='TEXT'\".") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"option file {path} does not exist (looked for {path.absolute()}).") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"option file {path} is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"option file {path} cannot be read: {error.strerror}. Give the path of a .yml file.") from None


def _parse(text: str, source: str) -> tuple[Any, Positions]:
    file = source.removeprefix(_FILE)
    try:
        loader = _OptionLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None, Positions(file, None)
            _check_aliases(root, (), count(1))
            positions = Positions(file, root)  # before the loader puts merged keys into the nodes
            return loader.construct_document(root), positions
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _error_at(error.problem_mark or error.context_mark, source, str(error.problem)) from None
    except RecursionError:
        raise YAMLError(f"{source}: {_TOO_DEEP}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # such as characters that YAML forbids
        raise YAMLError(f"{source}: {error}") from None


def _error_at(mark: Any, source: str, problem: str) -> YAMLError:
    if mark is None:
        return YAMLError(f"{source}: {problem}")
    line, column = mark.line + 1, mark.column + 1
    if source.startswith(_FILE):
        return YAMLError(f"{source}:{line}:{column}: {problem}", Place(source.removeprefix(_FILE), line, column))
    return YAMLError(f"{source}, line {line}, column {column}: {problem}")


def _check_aliases(node: yaml.Node, above: tuple[yaml.Node, ...], values: Iterator[int]) -> None:
    """Refuse too many levels, and aliases (*NAME) that lead to themselves, or to more values than could be checked."""
    problem = None
    if any(node is other for other in above):
        problem = "an alias leads back to this; write the values"
    elif len(above) > _MAX_DEPTH:
        problem = _TOO_DEEP
    if problem:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    if next(values) > _MAX_VALUES:
        raise yaml.YAMLError(f"its aliases (*NAME) expand to more than {_MAX_VALUES} values; write fewer of them")
    if not isinstance(node, yaml.ScalarNode):
        for part in node.value:
            for child in part if isinstance(node, yaml.MappingNode) else [part]:
                _check_aliases(child, (*above, node), values)
