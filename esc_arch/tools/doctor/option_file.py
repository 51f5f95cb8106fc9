"""What an option file says and names: the space to write to, and all that `basicsr check` finds."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .report import OK, PROBLEM, WARNING, Context, Finding, size_text

__all__ = ["check", "examine"]

#: With less space than this a training ends soon.
_LITTLE_SPACE, _NO_SPACE = 10 * 2**30, 500 * 2**20
_STATUSES = {"error": PROBLEM, "warning": WARNING, "note": OK}


def examine(context: Context) -> Iterator[Finding]:
    """Nothing without -opt."""
    file = context.args.opt
    if file is None:
        yield Finding("file", "none given: -opt FILE looks at its keys, data, weights and folders")
    elif context.import_failure:
        yield Finding("basicsr check", "not known: BasicSR cannot be imported", WARNING)
    else:
        yield Finding("file", file)
        yield from context.in_child("basicsr check", "option_file:check", file, context.args.imports)


def check(file: str, modules: object) -> list[Finding]:
    """In the child process: what `basicsr check` says, and about what a run would write."""
    from esc_arch.errors import UserError
    from esc_arch.options import CheckScope, inspect_options, load_yaml
    from esc_arch.project import import_modules

    try:
        import_modules(modules, "--import")
        inspected = inspect_options(file, root_path=os.getcwd(), is_train=None, scope=CheckScope(thorough=True))
    except UserError as error:
        return [Finding("basicsr check", str(error), PROBLEM)]
    found, numbers = [], Counter[str]()
    for problem in inspected.problems:
        numbers[problem.path] += 1
        key = f"{problem.path} ({numbers[problem.path]})" if numbers[problem.path] > 1 else problem.path
        line = problem.place and problem.place.line
        text = f"line {line}: {problem.message}" if line and problem.severity != "note" else problem.message
        found.append(Finding(key, text, _STATUSES[problem.severity]))
    verb = "train" if inspected.is_train else "test"
    if all(finding.status != PROBLEM for finding in found):
        found.append(Finding("basicsr check", f"ready for basicsr {verb}"))
    return [*found, *_outputs(load_yaml(file), verb)]


def _outputs(opt: Mapping[str, Any], verb: str) -> Iterator[Finding]:
    """The folder that a run writes to, which may not exist yet: the space there, and a run of the same name."""
    kind = "experiments" if verb == "train" else "results"
    folder = Path(os.path.expanduser(str((opt.get("path") or {}).get(f"{kind}_root") or kind))).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(there)
    text = f"{folder}, {size_text(usage.free)} of {size_text(usage.total)} free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        advice = "Change its rights, or start elsewhere."
        yield Finding(f"{kind}_root", f"{text}; {there} cannot be written", PROBLEM, advice)
    else:
        status = PROBLEM if usage.free < _NO_SPACE else WARNING if usage.free < _LITTLE_SPACE else OK
        advice = "Checkpoints, states and images take space: logger: keep_last removes old checkpoints."
        yield Finding(f"{kind}_root", text, status, advice if status != OK else "", usage._asdict())
    run = folder / str(opt.get("name"))
    if run.exists():
        text = f"{run} exists: `basicsr {verb}` will rename it to {run.name}_archived_TIME"
        if verb == "train" and any((run / "training_states").glob("*.state")):
            text += "; with --auto_resume it continues there instead"
        yield Finding("same name", text, WARNING, "Change name: in the option file to leave it where it is.")
