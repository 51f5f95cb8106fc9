"""Reading option files and `--force_yml` entries as data: nothing in them is ever executed.

BasicSR 1.4.2 reads option files with a loader whose tags can call any function, and applies
`--force_yml` with `exec` and `eval` (faults 14 and 15).
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from esc_arch.atomic_io import read_regular
from esc_arch.errors import UserError
from esc_arch.problems import Place
from esc_arch.project import import_modules

from .positions import TOO_DEEP, Positions

__all__ = ["Options", "YAMLError", "apply_force_yml", "load_options", "load_with_positions", "load_yaml"]

Options = dict[str, Any]

#: No library takes larger whole numbers; Python does not even print all of them.
_TOO_LARGE, _LONGEST_NUMBER = 2**63, 40
_FORCE_FORM = "--force_yml takes KEY[:KEY...]=VALUE, such as train:ema_decay=0.999"


class YAMLError(UserError):
    """A mistake in the YAML of an option file, with its place."""

    def __init__(self, message: str, place: Place) -> None:
        super().__init__(message)
        self.place = place


class _OptionLoader(yaml.SafeLoader):
    """YAML's plain data types only, with `5e-4` read as a number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            is_long = _short(node.tag) == "!!int" and len(node.value) > _LONGEST_NUMBER
            value = _TOO_LARGE if is_long else super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) >= _TOO_LARGE:
                raise ValueError("whole numbers must be below 2**63 (9.2e18)")
            return value
        except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
            # 2024-13-45, which looks like a date; !!bool z, !!int '' and !!timestamp z, at which PyYAML stumbles
            if not isinstance(node, yaml.ScalarNode):
                raise
            reason = f": {error}" if isinstance(error, ArithmeticError | ValueError) else ""
            text = node.value if len(node.value) <= _LONGEST_NUMBER else f"{node.value[:_LONGEST_NUMBER]}..."
            raise yaml.constructor.ConstructorError(
                problem=f"{text!r} cannot be read as {_short(node.tag)}{reason}", problem_mark=node.start_mark
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
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load_yaml(text_or_path: str | os.PathLike[str]) -> Options:
    """The mapping in an option file, or in a text (told from a path by its line breaks).

    Files are read as UTF-8 whatever the locale says (fault 45). A key given twice in one mapping
    keeps its last value, as always in BasicSR, with a warning in the log.

    Raises:
        UserError: the file is missing, a folder, not UTF-8 or empty; its YAML has a mistake or a tag
            other than those of plain data (fault 14); its top level is not a mapping.
    """
    options, positions = load_with_positions(text_or_path)
    for problem in positions.repeated.values():
        logging.getLogger("basicsr").warning("%s.", problem)
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


def load_with_positions(text_or_path: str | os.PathLike[str]) -> tuple[Options, Positions]:
    """The mapping in an option file, and where its keys are; otherwise as `load_yaml`."""
    text, file, source = os.fspath(text_or_path), "the option text", "the option text"
    if "\n" not in text:
        file, source = text, f"option file {text}"
        try:
            text = io.TextIOWrapper(io.BytesIO(read_regular(file, pipes=True)), encoding="utf-8-sig").read()
        except FileNotFoundError:
            raise UserError(f"{source} does not exist (looked for {Path(file).absolute()}).") from None
        except UnicodeDecodeError as error:
            what = f"{error.reason} at byte {error.start}"
            raise UserError(f"{source} is not UTF-8 text: {what}. Save it as UTF-8.") from None
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror}. Give the path of a .yml file.") from None
    options, positions = _parse(text, source, file)
    if options is None:
        raise UserError(f"{source} is empty. Write the options into it as 'key: value' lines.")
    if not isinstance(options, dict):
        raise UserError(f"{source} holds {type(options).__name__} at its top level; it must be 'key: value' lines.")
    return options, positions


def apply_force_yml(opt: Options, entries: Iterable[str], positions: Positions | None = None) -> None:
    """Set values in `opt` from entries like `train:ema_decay=0.999`, in place, and note them in `positions`.

    A value is read as in an option file, lists and mappings too; `null` removes the key, `none` in any case means None,
    as in BasicSR, and takes a whole data set out (`datasets:val_2=none`). Keys that do not exist are made, with the
    mappings above them.

    Raises:
        UserError: an entry without `=`, with an empty key, with a value that is not YAML, or one that
            leads through something that is not a mapping.
    """
    for entry in entries:
        source = f"--force_yml entry {entry[:100]!r}"
        key_path, equals, text = entry.partition("=")
        *sections, key = (part.strip() for part in key_path.split(":"))
        if not equals or not all((*sections, key)):
            raise UserError(f"{source} cannot be read: {_FORCE_FORM}.")
        section: Any = opt
        for depth, name in enumerate((*sections, key)):
            # Patterns of parameters may have dots
            if "." in name and name not in section and (depth == 0 or name.partition(".")[0] in section):
                raise UserError(f"{source}: there is no key {name!r}. Write {key_path.replace('.', ':')}={text[:100]}.")
            if depth == len(sections):
                break
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                raise UserError(
                    f"{source} leads through {':'.join(sections[: depth + 1])}, which is {section!r} and no mapping: "
                    f"{_FORCE_FORM}, where every KEY but the last names a mapping."
                )
        try:
            value = None if text.strip().lower() == "none" else _parse(text.strip(), source, "")[0]
        except UserError as error:
            hint = "to give text with special characters: \"KEY='TEXT'\""
            raise UserError(f"{error}. {_FORCE_FORM}; {hint}.") from None
        if text.strip() == "null" or (value is None and sections == ["datasets"] and key in section):
            section.pop(key, None)
        else:
            section[key] = value
        if positions is not None:
            positions.add_forced(":".join((*sections, key)), entry)


def _parse(text: str, source: str, file: str) -> tuple[Any, Positions]:
    try:
        loader = _OptionLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None, Positions(file, None)
            positions = Positions(file, root)  # before the loader puts merged keys into the nodes
            return loader.construct_document(root), positions
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)
        raise YAMLError(f"{place}: {error.problem}", place) from None
    except RecursionError:
        raise YAMLError(f"{source}: {TOO_DEEP}", Place(source)) from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # such as characters that YAML forbids
        raise YAMLError(f"{source}: {error}", Place(source)) from None
