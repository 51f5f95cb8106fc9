"""`basicsr check`: option files looked at in full, without a run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from esc_arch.errors import USER_ERROR, UserError
from esc_arch.options import CheckScope, Finding, Inspection, Place, inspect_options
from esc_arch.options.files import YAMLError
from esc_arch.options.schema import options_schema
from esc_arch.project import add_import_argument

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Check option files and the data and weights they name, without running or writing anything."

_PURPOSES = {"train": True, "test": False, "auto": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files, what they are for, and how much is looked at."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-opt", nargs="+", metavar="FILE", help="option files (YAML)")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of option files, for editors")
    parser.add_argument(
        "--force_yml", nargs="+", default=[], metavar="KEY[:KEY...]=VALUE", help="set options over those of the files"
    )
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=list(_PURPOSES),
        default="auto",
        help="what the files are for; auto: training if they have a training set",
    )
    parser.add_argument("--auto_resume", action="store_true", help="as the flag of basicsr train")
    add_import_argument(parser)
    parser.add_argument("--no-data", action="store_true", help="the files alone, not the data, weights and GPUs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Check; returns the exit status: 0 when nothing has to be fixed, 2 otherwise."""
    if args.schema:
        print(json.dumps(options_schema(), indent=1))
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # on which constructors may print
        results = [_Result(file, args) for file in args.opt]
    if args.json:
        print(json.dumps({"files": [result.as_json() for result in results]}, indent=1))
    else:
        for result in results:
            result.print()
    return USER_ERROR if any(result.errors for result in results) else 0


class _Result:
    """What was found in a file, also when it could not be read."""

    def __init__(self, file: str, args: argparse.Namespace) -> None:
        self.file = file
        self.inspection: Inspection | None = None
        self.errors: Sequence[Finding] = ()
        try:
            self.inspection = inspect_options(
                file,
                root_path=os.getcwd(),
                is_train=_PURPOSES[args.purpose],
                force_yml=args.force_yml,
                auto_resume=args.auto_resume,
                extent=CheckScope(thorough=True, with_files=not args.no_data),
            )
            self.errors = self.inspection.errors
        except UserError as error:
            self.errors = [_unreadable(file, error)]

    @property
    def warnings(self) -> Sequence[Finding]:
        return self.inspection.warnings if self.inspection else ()

    @property
    def facts(self) -> Sequence[str]:
        return self.inspection.facts if self.inspection else ()

    @property
    def purpose(self) -> str | None:
        return None if self.inspection is None else "train" if self.inspection.is_train else "test"

    def print(self) -> None:
        for warning in self.warnings:
            print(f"{_line(warning)} (warning)")
        for error in self.errors:
            print(_line(error), file=sys.stderr)
        for fact in self.facts:
            print(f"OK  {self.file}: {fact}")
        if self.errors:
            print(f"{self.file}: {len(self.errors)} problem(s)", file=sys.stderr)
        else:
            print(f"OK  {self.file}: ready for basicsr {self.purpose}")

    def as_json(self) -> Mapping[str, Any]:
        return {
            "file": self.file,
            "for": self.purpose,
            "ok": not self.errors,
            "errors": [_as_json(error) for error in self.errors],
            "warnings": [_as_json(warning) for warning in self.warnings],
            "checked": list(self.facts),
        }


def _unreadable(file: str, error: UserError) -> Finding:
    place = error.place if isinstance(error, YAMLError) and error.place else Place(file)
    return Finding(place, "", str(error))


def _line(finding: Finding) -> str:
    return str(finding) if finding.key else finding.message


def _as_json(finding: Finding) -> Mapping[str, Any]:
    place = finding.place
    return {
        "line": place.line,
        "column": place.column,
        "force_yml": place.entry,
        "key": finding.key,
        "message": finding.message,
    }
