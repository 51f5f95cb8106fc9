"""`basicsr check`: option files checked in full, without a run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from esc_arch.errors import USER_ERROR, UserError
from esc_arch.options import CheckScope, inspect_options, missing_data
from esc_arch.options.files import YAMLError
from esc_arch.options.schema import options_schema
from esc_arch.printing import shown
from esc_arch.problems import Problem, of_severity

__all__ = ["PURPOSES", "run"]

PURPOSES = {"train": True, "test": False, "auto": None}


def run(args: argparse.Namespace) -> int:
    """Check; returns the exit status: 0 if nothing has to be fixed, 2 otherwise."""
    if args.schema:
        print(json.dumps(options_schema(), indent=1))
        return 0
    if not (files := [*args.files, *args.opt]):
        raise UserError("name option files, as in basicsr check options/train_ESC_x2.yml, or give --schema.")
    with contextlib.redirect_stdout(sys.stderr):  # on which constructors may print
        results = [(file, *_check(file, args)) for file in files]
    if args.json:
        print(json.dumps({"files": [_as_json(*result) for result in results]}, indent=1))
    else:
        for result in results:
            _print(*result)
        for line in missing_data([problem for _, _, problems in results for problem in problems])[1]:
            print(shown(line), file=sys.stderr)
    return USER_ERROR if any(of_severity(problems, "error") for _, _, problems in results) else 0


def _check(file: str, args: argparse.Namespace) -> tuple[str | None, Sequence[Problem]]:
    """What the file is for, if it can be read, and what was found."""
    try:
        inspection = inspect_options(
            file,
            root_path=os.getcwd(),
            is_train=PURPOSES[args.purpose],
            force_yml=args.force_yml,
            auto_resume=args.auto_resume,
            scope=CheckScope(thorough=True, with_files=not args.no_data),
        )
    except UserError as error:
        return None, [Problem("", str(error), place=error.place if isinstance(error, YAMLError) else None)]
    return "train" if inspection.is_train else "test", inspection.problems


def _print(file: str, purpose: str | None, problems: Sequence[Problem]) -> None:
    for problem in of_severity(problems, "warning"):
        print(f"{problem} (warning)")
    errors = of_severity(problems, "error")
    for problem in missing_data(errors)[0]:
        print(problem if problem.path else problem.message, file=sys.stderr)
    for problem in of_severity(problems, "note"):
        print(shown(f"OK  {file}: {problem.path}: {problem.message}"))
    if errors:
        print(f"{shown(file)}: {len(errors)} problem(s)", file=sys.stderr)
    else:
        print(f"OK  {shown(file)}: ready for basicsr {purpose}")


def _as_json(file: str, purpose: str | None, problems: Sequence[Problem]) -> Mapping[str, Any]:
    errors = of_severity(problems, "error")
    return {
        "file": file,
        "for": purpose,
        "ok": not errors,
        "errors": list(map(_problem_as_json, errors)),
        "warnings": list(map(_problem_as_json, of_severity(problems, "warning"))),
        "checked": [f"{problem.path}: {problem.message}" for problem in of_severity(problems, "note")],
    }


def _problem_as_json(problem: Problem) -> Mapping[str, Any]:
    place = problem.place
    return {
        "line": place and place.line,
        "column": place and place.column,
        "force_yml": place and place.entry,
        "key": problem.path,
        "message": problem.message,
    }
