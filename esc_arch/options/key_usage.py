"""Which keys of the options a registered class reads, found in its source, whatever package it is of.

The source of the class, of its base classes and of the functions and classes of the same packages that they hand the
options on to is followed: `opt['x']`, `opt.get('x')`, `'x' in opt`, `self.opt['train'].get('x')`, and all of it through
variables and attributes. What cannot be followed is said: a section that is handed on to something else, or gone
through as a whole, is open: any key may be read from it.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

__all__ = ["Usage", "usage_of"]

Path = tuple[str, ...]
Paths = frozenset[Path]

_NOTHING: Paths = frozenset()
_OPTIONS: Paths = frozenset({()})
_NOT_FOLLOWED = {"builtins", "torch", "abc", "typing", "collections", "numpy", "copy"}
_LOOKS_ONLY = {"bool", "isinstance", "len", "print", "repr", "str", "type", "dict2str", "pformat"}
_COPIES = {"dict", "OrderedDict", "deepcopy", "copy"}
_READS = {"get", "pop", "setdefault"}
_GOES_THROUGH = {"items", "keys", "values"}
_MAX_FUNCTIONS = 500
#: What is in these may be left out when the program runs.
_CONDITIONAL = (
    *(ast.If, ast.For, ast.While, ast.Try, ast.IfExp, ast.BoolOp, ast.Lambda, ast.FunctionDef, ast.Assert, ast.Match),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


@dataclass(frozen=True)
class Usage:
    """What a class does with the options that its constructor gets.

    Attributes:
        reads: the keys that it reads, each with those of the sections above it: ``("train", "ema_decay")``.
        open: sections from which it may read any key; ``()`` are the options themselves.
        words: all that stands in quotes in the modules of its source, or is a field there: what may be a key.
        complete: whether all of its source was there to be read.
        requires: the keys of the options themselves without which it surely fails: those that its constructor, or the
            `__getitem__` of a data set, takes as `opt['x']` whatever else is given.
        requires_in_training: the same of a data set whose `phase` is train.
    """

    reads: Paths
    open: Paths
    words: frozenset[str]
    complete: bool
    requires: frozenset[str]
    requires_in_training: frozenset[str]

    def keys(self, *section: str) -> set[str]:
        """The keys that are read in a section."""
        return {path[-1] for path in self.reads if path[:-1] == section}

    def is_open(self, *section: str) -> bool:
        return any(section[: len(path)] == path for path in self.open)


@functools.cache
def usage_of(kind: type) -> Usage:
    """What the class `kind`, made as `kind(opt)`, reads of `opt`."""
    reader = _Reader(kind)
    attributes = reader.read_class(kind, _OPTIONS)
    required = _required(reader, kind, attributes)
    return Usage(frozenset(reader.reads), frozenset(reader.open), _words(kind), reader.complete, *required)


def _required(reader: _Reader, kind: type, attributes: dict[str, Paths]) -> tuple[frozenset[str], frozenset[str]]:
    """Always, and in training."""
    always: set[str] = set()
    in_training: set[str] = set()
    stored: set[str] = set()
    for name in ("__init__", "__getitem__"):
        for base in _followed_bases(kind):
            node = _method(base, name)
            if node is None:
                continue
            function = _Function(reader, base, kind, attributes)
            names = [argument.arg for argument in node.args.args]
            function.run(node, {names[1]: _OPTIONS} if name == "__init__" and len(names) > 1 else {})
            always |= function.required
            in_training |= function.required_in_training
            stored |= function.stored
            if not function.calls_super:
                break
    return frozenset(always - stored), frozenset((always | in_training) - stored)


def _method(kind: type, name: str) -> ast.FunctionDef | None:
    body = getattr(_tree(kind), "body", [])
    return next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def _followed_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _NOT_FOLLOWED]


def _words(kind: type) -> frozenset[str]:
    words: set[str] = set()
    for name in {base.__module__ for base in _followed_bases(kind)}:
        try:
            tree = ast.parse(inspect.getsource(sys.modules[name]))
        except (OSError, TypeError, KeyError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                words.add(node.target.id)
    return frozenset(words)


class _Reader:
    """Goes through source, and notes what is read of the options."""

    def __init__(self, kind: type) -> None:
        self.reads: set[Path] = set()
        self.open: set[Path] = set()
        self.complete = True
        self._packages = {base.__module__.partition(".")[0] for base in _followed_bases(kind)}
        self._seen: set[tuple[Any, ...]] = set()

    def read_class(self, kind: type, options: Paths) -> dict[str, Paths]:
        """Go through all methods of a class and its bases; the first argument of its constructor is `options`.

        Returns:
            Which parts of the options its attributes are; nothing for a class that was gone through before.
        """
        attributes: dict[str, Paths] = {}
        if (kind, options) in self._seen:
            return attributes
        self._seen.add((kind, options))
        methods = []
        for base in _followed_bases(kind):
            tree = _tree(base)
            if tree is None:
                self.complete = False
                continue
            methods += [(node, base) for node in getattr(tree, "body", []) if isinstance(node, ast.FunctionDef)]
        known: dict[str, Paths] | None = None
        while known != attributes:  # what one method keeps in an attribute, another may read
            known = dict(attributes)
            for node, base in methods:
                names = [argument.arg for argument in node.args.args]
                bound = {name: options for name in names if name in ("opt", "opts", "options")}
                if node.name == "__init__" and len(names) > 1:
                    bound[names[1]] = options
                _Function(self, base, kind, attributes).run(node, bound)
        return attributes

    def follow(self, target: Any, arguments: list[Paths], keywords: Mapping[str | None, Paths]) -> None:
        """Go through what is called with parts of the options, if its source may tell what it reads."""
        given = frozenset().union(*arguments, *keywords.values())
        if keywords.get(None) or not self._is_followed(target):
            self.open |= given
            return
        if inspect.isclass(target) and "__init__" in vars(target) and _tree(target) is not None and arguments:
            self.read_class(target, arguments[0])
            return
        owner = target.__self__ if isinstance(target, MethodType) and inspect.isclass(target.__self__) else None
        function = inspect.unwrap(target.__func__ if isinstance(target, MethodType) else target)
        tree = _tree(function) if isinstance(function, FunctionType) else None
        if not isinstance(tree, ast.FunctionDef) or len(self._seen) > _MAX_FUNCTIONS:
            self.open |= given
            return
        names = [argument.arg for argument in tree.args.args][owner is not None :]
        bound = dict(zip(names, arguments, strict=False)) | {name: value for name, value in keywords.items() if name}
        call = (function, tuple(sorted((name, tuple(sorted(paths))) for name, paths in bound.items())))
        if call not in self._seen:
            self._seen.add(call)
            _Function(self, function, owner, {}).run(tree, bound)

    def _is_followed(self, target: Any) -> bool:
        return (getattr(target, "__module__", None) or "").partition(".")[0] in self._packages


def _tree(thing: Any) -> ast.stmt | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


class _Function(ast.NodeVisitor):
    """Goes through a function: which of its variables hold which part of the options, and what is read of them."""

    def __init__(self, reader: _Reader, where: Any, kind: type | None, attributes: dict[str, Paths]) -> None:
        self._reader = reader
        self._namespace = vars(sys.modules.get(where.__module__, builtins))
        self._kind = kind
        self._attributes = attributes
        self._names: dict[str, Paths] = {}
        self._words: dict[str, list[str]] = {}
        #: How many conditions, loops and the like are around the place that is looked at.
        self._conditions = 0
        #: Keys of the options themselves that are taken without a condition, and those that are set.
        self.required: set[str] = set()
        self.required_in_training: set[str] = set()
        self.stored: set[str] = set()
        self.calls_super = False

    def run(self, node: ast.FunctionDef, bound: Mapping[str, Paths]) -> None:
        self._names.update(bound)
        for statement in node.body:
            self.visit(statement)
            # What comes behind a way out may not be reached; behind `raise` it need not, for the class fails anyway
            self._conditions += any(isinstance(part, ast.Return) for part in ast.walk(statement))

    def visit(self, node: ast.AST) -> Any:
        conditional = isinstance(node, _CONDITIONAL)
        self._conditions += conditional
        super().visit(node)
        self._conditions -= conditional

    def visit_If(self, node: ast.If) -> None:
        """A condition as any other, but for `if opt['phase'] == 'train'`, of which it is known when it holds."""
        self._conditions -= 1
        self._paths(node.test)
        in_training = self._is_of_training(node.test)
        if in_training:
            self.required, self.required_in_training = self.required_in_training, self.required
            for statement in node.body:
                self.visit(statement)
            self.required, self.required_in_training = self.required_in_training, self.required
        self._conditions += 1
        for statement in node.orelse if in_training else [*node.body, *node.orelse]:
            self.visit(statement)

    def _is_of_training(self, test: ast.expr) -> bool:
        return (
            isinstance(test, ast.Compare)
            and isinstance(test.left, ast.Subscript)
            and self._paths(test.left.value) == _OPTIONS
            and self._texts(test.left.slice) == ["phase"]
            and isinstance(test.ops[0], ast.Eq)
            and self._texts(test.comparators[0]) == ["train"]
        )

    # --- statements ---------------------------------------------------------------------------------------------------

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._assign(node.target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for part, of_value in zip(target.elts, value.elts, strict=True):
                self._assign(part, of_value)
            return
        paths = self._paths(value)
        if isinstance(target, ast.Name):
            self._conditions += bool(self._names.get(target.id)) and paths != self._names[target.id]
            self._names[target.id] = self._names.get(target.id, _NOTHING) | paths
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self._attributes[target.attr] = self._attributes.get(target.attr, _NOTHING) | paths
        else:
            self._paths(target)

    def visit_For(self, node: ast.For) -> None:
        self._loop(node.target, node.iter)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._loop(node.target, node.iter)
        for condition in node.ifs:
            self.visit(condition)

    def _comprehend(self, node: Any) -> None:
        for generator in node.generators:
            self.visit(generator)
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(part)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehend

    def _loop(self, target: ast.expr, values: ast.expr) -> None:
        self._reader.open |= self._paths(values)
        words = self._texts(values)
        for name in [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]:
            self._words[name] = words

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self._paths(node)
        else:
            super().generic_visit(node)

    # --- expressions --------------------------------------------------------------------------------------------------

    def _paths(self, node: ast.expr) -> Paths:
        """Which parts of the options an expression is; notes what it reads."""
        conditional = isinstance(node, _CONDITIONAL)
        self._conditions += conditional
        paths = self._paths_of(node)
        self._conditions -= conditional
        return paths

    def _paths_of(self, node: ast.expr) -> Paths:
        if isinstance(node, ast.Name):
            return self._names.get(node.id, _NOTHING)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self._attributes.get(node.attr, _NOTHING)
            self._paths(node.value)
            return _NOTHING
        if isinstance(node, ast.Subscript):
            paths, texts = self._paths(node.value), self._texts(node.slice)
            if paths == _OPTIONS and isinstance(node.ctx, ast.Store):
                self.stored.update(texts)
            elif paths == _OPTIONS and len(texts) == 1 and not self._conditions:
                self.required.update(texts)
            return self._entry(paths, node.slice)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BoolOp):
            return _NOTHING.union(*[self._paths(value) for value in node.values])
        if isinstance(node, ast.IfExp):
            self._paths(node.test)
            return self._paths(node.body) | self._paths(node.orelse)
        if isinstance(node, ast.BinOp):
            return self._paths(node.left) | self._paths(node.right)
        if isinstance(node, ast.Compare):
            return self._compare(node)
        if isinstance(node, ast.NamedExpr):
            self._assign(node.target, node.value)
            return self._paths(node.value)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                paths = self._paths(value)
                if key is None:  # {**section}
                    self._reader.open |= paths
            return _NOTHING
        if isinstance(node, ast.DictComp | ast.ListComp | ast.SetComp | ast.GeneratorExp):
            self._comprehend(node)
            return _NOTHING
        for child in ast.iter_child_nodes(node):
            self.visit(child)
        return _NOTHING

    def _entry(self, paths: Paths, key: ast.expr) -> Paths:
        self._paths(key)
        texts = self._texts(key)
        if paths and not texts:
            self._reader.open |= paths
        entries = frozenset((*path, text) for path in paths for text in texts)
        self._reader.reads |= entries
        return entries

    def _compare(self, node: ast.Compare) -> Paths:
        parts = [node.left, *node.comparators]
        for left, operator, right in zip(parts, node.ops, parts[1:], strict=False):
            if isinstance(operator, ast.In | ast.NotIn) and (paths := self._paths(right)):
                self._entry(paths, left)
        for part in parts:
            self._paths(part)
        return _NOTHING

    def _call(self, node: ast.Call) -> Paths:
        function = node.func
        if isinstance(function, ast.Attribute) and (paths := self._paths(function.value)):
            if function.attr in _READS and node.args:
                for default in node.args[1:]:
                    self._paths(default)
                if function.attr == "setdefault":
                    self.stored.update(self._texts(node.args[0]))
                return self._entry(paths, node.args[0])
            if function.attr in _GOES_THROUGH:
                self._reader.open |= paths
            self._conditions += function.attr == "update"  # with keys that are not known
            return paths if function.attr == "copy" else _NOTHING
        arguments = [self._paths(entry) for entry in node.args]
        keywords = {entry.arg: self._paths(entry.value) for entry in node.keywords}
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in _COPIES:
            return arguments[0] if arguments else _NOTHING
        if isinstance(function, ast.Attribute):
            self._paths(function.value)
        self.calls_super |= _is_super(function) and not self._conditions
        if any(arguments) or any(keywords.values()):
            self._hand_on(node, name, arguments, keywords)
        return _NOTHING

    def _hand_on(self, node: ast.Call, name: str, arguments: list[Paths], keywords: Mapping[str | None, Paths]) -> None:
        if name in _LOOKS_ONLY or _is_super(node.func):  # the methods of base classes are gone through anyway
            return
        self._conditions += () in _NOTHING.union(*arguments, *keywords.values())  # what gets them may add to them
        target = self._resolve(node.func)
        bound_to = getattr(node.func, "value", None)
        if isinstance(bound_to, ast.Name) and bound_to.id == "self" and isinstance(target, FunctionType):
            arguments = [_NOTHING, *arguments]
        self._reader.follow(target, arguments, keywords)

    def _resolve(self, node: ast.expr) -> Any:
        """What a dotted name stands for, of modules, classes and functions; None for anything else."""
        if isinstance(node, ast.Name):
            if node.id in ("self", "cls"):
                return self._kind
            return self._namespace.get(node.id, getattr(builtins, node.id, None))
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            if isinstance(owner, ModuleType) or inspect.isclass(owner):
                return getattr(owner, node.attr, None)
        return None

    def _texts(self, node: ast.expr) -> list[str]:
        """The texts that an expression may be, or goes through; none when that is not known."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.Name) and node.id in self._words:
            return self._words[node.id]
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return [text for part in node.elts for text in self._texts(part)]
        if isinstance(node, ast.IfExp):
            return [*self._texts(node.body), *self._texts(node.orelse)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _GOES_THROUGH:
            return self._texts(node.func.value)
        if isinstance(node, ast.ListComp) and isinstance(node.elt, ast.Name):
            return self._texts(node.generators[0].iter)
        value = self._resolve(node)
        if isinstance(value, str):
            return [value]
        entries: Iterable[Any] = value if isinstance(value, Mapping | tuple | list | set | frozenset) else ()
        return [entry for entry in entries if isinstance(entry, str)]


def _is_super(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and (getattr(node.value.func, "id", None) == "super")
    )
