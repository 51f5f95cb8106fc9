"""What an option file says and names: the space to write to, and all that `basicsr check` finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import OK, PROBLEM, WARNING, Context, Finding, size_text
from .subprocess_worker import IMPORT_LIMIT, JobFailed, how_it_ended

__all__ = ["examine"]

#: With less space than this a training ends soon.
_LITTLE_SPACE, _NO_SPACE = 10 * 2**30, 500 * 2**20


def examine(context: Context) -> Iterator[Finding]:
    """Nothing without -opt."""
    file = context.args.opt
    if file is None:
        yield Finding("file", "none given: -opt FILE looks at its keys, data, weights and folders")
        return
    if context.import_failure:
        yield Finding("basicsr check", "not known: BasicSR cannot be imported", WARNING)
        return
    try:
        opt = context.worker.call("esc_arch.options.files:load_yaml", file)
    except JobFailed as failure:
        text = str(failure).removeprefix("UserError: ")
        yield Finding("file", text, PROBLEM, "Give an option file that can be read.")
        return
    yield Finding("file", file)
    yield from _check(context)
    yield from _outputs(opt)


def _check(context: Context) -> Iterator[Finding]:
    """What `basicsr check` says, in a process of its own."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from esc_arch.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "check", "--json", "-opt", context.args.opt]
    command += ["--import", *context.args.imports] if context.args.imports else []
    try:
        done = subprocess.run(command, capture_output=True, timeout=IMPORT_LIMIT + context.args.timeout)
        (result,) = json.loads(done.stdout)["files"]
    except subprocess.TimeoutExpired:
        text = f"not finished after {context.args.timeout:g} s of running"
        yield Finding("basicsr check", text, PROBLEM, "It may still be at work: try a longer --timeout.")
        return
    except ValueError:  # no JSON
        yield Finding("basicsr check", how_it_ended(done.returncode, done.stderr), PROBLEM, "Report this.")
        return
    found = [(each["key"], each["message"], PROBLEM, each["line"]) for each in result["errors"]]
    found += [(each["key"], each["message"], WARNING, each["line"]) for each in result["warnings"]]
    found += [(*each.split(": ", maxsplit=1), OK, None) for each in result["checked"]]
    numbers: Counter[str] = Counter()
    for key, message, status, line in found:
        numbers[key] += 1
        unique = f"{key} ({numbers[key]})" if numbers[key] > 1 else key
        yield Finding(unique, f"line {line}: {message}" if line else message, status)
    if result["ok"]:
        yield Finding("basicsr check", f"ready for basicsr {result['for']}")


def _outputs(opt: dict[str, Any]) -> Iterator[Finding]:
    """The folder that a run writes to, which may not exist yet: the space there, and a run of the same name."""
    verb, kind = ("train", "experiments") if opt.get("train") else ("test", "results")
    folder = Path(str((opt.get("path") or {}).get(f"{kind}_root") or kind)).expanduser().absolute()
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
