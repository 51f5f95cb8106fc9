"""`basicsr options`: the option files that come with esc_arch, which are `options/` of its repository."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from esc_arch.atomic_io import check_output, write_file
from esc_arch.errors import UserError
from esc_arch.names import nearest

__all__ = ["option_files", "run"]

_PACKAGE = Path(__file__).parents[1]


def option_files() -> Mapping[str, Path]:
    """The files by their names without .yml: beside this package in a clone, in it where a wheel was installed."""
    installed = _PACKAGE / "option_files"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "options"
    return {path.stem: path for path in sorted(folder.glob("*.yml"))}


def run(args: argparse.Namespace) -> int:
    """List, print or copy; UserError for an unknown name, or for an output that exists or cannot be written."""
    files = option_files()
    if args.part == "list":
        width = max(map(len, files))
        for name, path in files.items():
            print(f"{name:{width}}  {_title(path)}")
        return 0
    names = [name.removesuffix(".yml") for name in args.names]
    for name in names:
        if name not in files:
            guess = nearest(name, files)
            question = f" Did you mean {guess}?" if guess else ""
            raise UserError(f"There is no option file {name}.{question} `basicsr options list` lists all.")
    if args.part == "show":
        for name in names:
            print(files[name].read_text(encoding="utf-8"), end="")
        return 0
    to_folder = args.output.is_dir() or args.output.suffix not in (".yml", ".yaml")
    if len(names) > 1 and not to_folder:
        raise UserError(f"Several files need a folder: -o FOLDER, not {args.output}")
    targets = {name: args.output / f"{name}.yml" if to_folder else args.output for name in names}
    for target in targets.values():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot write {target}: {error.strerror}.") from error
        check_output(target, overwrite=args.overwrite)
    for name, target in targets.items():
        write_file(target, files[name].read_bytes())
        print(f"Wrote {target}")
    return 0


def _title(path: Path) -> str:
    """The comment that a file begins with, without its full stop."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip(".\n")
