"""Versions of libraries, where BasicSR and esc_arch are imported from, and the names that they register."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import Distribution
from pathlib import Path

from esc_arch.errors import UserError
from esc_arch.project import import_modules
from esc_arch.version import __version__

from .report import PROBLEM, WARNING, Context, Finding, warn_if
from .subprocess_worker import JobFailed

__all__ = ["copies", "registered_names", "versions"]

_ROOT = Path(__file__).resolve().parents[3]
_NEWEST_PYTHON = (3, 13)
#: Modules to import, for distributions of another name.
_MODULES = {"opencv-python": "cv2", "pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage"}
#: Distributions that bring the same module.
_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
#: What to do about a failed import, by what its message contains.
_HINTS = {
    "No module named 'basicsr'": "Install it: pip install --no-build-isolation basicsr==1.4.2.",
    "No module named": "Install what is missing, or reinstall esc_arch: pip install --no-build-isolation -e .",
    "libGL": "OpenCV needs a display library: pip install opencv-python-headless in place of opencv-python.",
    "undefined symbol": "It was built for another version of PyTorch: reinstall torch and torchvision together.",
    "multiarray": "It was built for another NumPy: pip install --upgrade it.",
    "": "Reinstall it, or fix this first: the rest follows.",
}
_LISTED = 6


def versions(context: Context) -> Iterator[Finding]:
    """Of Python, required libraries and extras; what cannot be imported, and what pip finds at odds."""
    text = f"{platform.python_version()} ({platform.python_implementation()})"
    advice = "esc_arch was not tested with it: use Python 3.10 to 3.13."
    yield warn_if(sys.version_info[:2] > _NEWEST_PYTHON, "python", text, advice)
    yield Finding("system", f"{platform.platform()}, {platform.machine()}")
    yield Finding("esc-arch", _version("esc-arch") or f"{__version__}, a folder on the path, not installed")
    requirements = _requirements()
    for name, extra in requirements.items():
        yield _library(context, name, extra)
    yield Finding("triton", _version("triton") or "not installed")
    yield from context.in_child("torch build", "machine:torch_build", advice="Reinstall torch.")
    several = [name for name in _OPENCV if _version(name)]
    if len(several) > 1:
        advice = f"They overwrite each other's files: pip uninstall {' '.join(several)}, then install one of them."
        yield Finding("opencv", f"installed more than once: {', '.join(several)}", WARNING, advice)
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    for line in done.stdout.splitlines() if done.returncode else []:
        if not requirements.keys().isdisjoint(re.split(r"[^\w-]+", line.lower())):
            yield Finding(f"pip check, {line.partition(',')[0]}", line, PROBLEM, "Install versions that fit together.")


def _requirements() -> dict[str, str]:
    """The names of what esc_arch requires, and the extra for which; as a clone or pip's notes say."""
    lines = (_ROOT / "requirements.txt").read_text().splitlines() if (_ROOT / "requirements.txt").is_file() else []
    with suppress(importlib.metadata.PackageNotFoundError):
        lines += importlib.metadata.requires("esc-arch") or []
    found = [re.findall(r'^[\w-]+|(?<=extra == ").*(?=")', line) for line in lines]
    return {name: "".join(extra) for name, *extra in found if extra != ["test"]}


def _library(context: Context, name: str, extra: str) -> Finding:
    version = next(filter(None, map(_version, _OPENCV if name == "opencv-python" else [name])), None)
    if extra:
        return Finding(name, version or f"not installed (extra {extra})")
    failure = context.import_failure
    if name != "basicsr":  # which esc_arch makes importable, see `copies`
        failure = ""
        try:
            context.worker.call("importlib:import_module", _MODULES.get(name, name))
        except JobFailed as error:
            failure = str(error)
    if version is None:
        there = Finding(name, "not installed under this name, but can be imported")
        return Finding(name, "not installed", PROBLEM, f"pip install {name}") if failure else there
    if failure and name != "basicsr":
        return Finding(name, f"{version}, cannot be imported: {failure}", PROBLEM, _hint(failure))
    return Finding(name, version)


def _hint(failure: str) -> str:
    return next(hint for sign, hint in _HINTS.items() if sign in failure)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def copies(context: Context) -> Iterator[Finding]:
    """The import, where both packages are imported from, and what esc_arch fixes in BasicSR."""
    if failure := context.import_failure:
        yield Finding("import", f"esc_arch cannot be imported: {failure}", PROBLEM, _hint(failure))
    else:
        yield Finding("import", "esc_arch and BasicSR can be imported")
    yield Finding("esc_arch", f"{_ROOT / 'esc_arch'}, {__version__}")
    yield from _copies_of_basicsr()
    if failure:
        return
    from esc_arch.compat import PATCHES, SUPPORTED_VERSION, aliases, reason_against_patches

    yield Finding("missing modules", f"stand-ins for {', '.join(aliases.stand_ins_in_use()) or 'none'}")
    reason, names = reason_against_patches(), [f"{module}.{name}" for module, name, *_ in PATCHES]
    text = f"none of this BasicSR: {reason}" if reason else f"{len(names)} of BasicSR {SUPPORTED_VERSION}"
    advice = f"esc_arch patches BasicSR {SUPPORTED_VERSION} only: pip install basicsr=={SUPPORTED_VERSION}."
    yield warn_if(reason, "patched functions", text, advice, names)


def _copies_of_basicsr() -> Iterator[Finding]:
    from esc_arch.compat.duplicate_installs import find_copies, find_distributions, mixed

    found, installed = find_copies(), find_distributions()
    if not found:
        yield Finding("basicsr", "not on the path", PROBLEM, _HINTS["No module named 'basicsr'"])
        return
    yield _used_basicsr(found[0], list(installed.values()))
    if len(found) > 1:
        text = f"{len(found)} on the path; not used: {', '.join(map(str, found[1:]))}"
        advice = "Uninstall one of them, or start `basicsr` from another folder."
        yield Finding("copies of basicsr", text, WARNING, advice, [str(folder) for folder in found])
    if len(installed) > 1:
        text, advice = mixed(installed)
        yield Finding("distributions of basicsr", text, WARNING, advice, list(installed))


def _used_basicsr(folder: Path, installed: list[Distribution]) -> Finding:
    """Compare the files of a BasicSR with what pip noted of it, or else of another one."""
    installed.sort(key=lambda each: Path(str(each.locate_file("basicsr"))).resolve() != folder)
    published = next((each for each in installed if _digests(each)), None)
    if published is None:
        return Finding("basicsr", f"{folder}, nothing to compare its files with")
    noted = _digests(published)
    there = {path.relative_to(folder): _digest(path) for path in folder.rglob("*.py")}
    changes = [
        f"{path} ({'added' if path not in noted else 'changed' if path in there else 'missing'})"
        for path in sorted(there.keys() | noted.keys())
        if there.get(path) != noted.get(path) and path.name != "version.py"  # which differs from build to build
    ]
    name = f"{published.metadata['Name']} {published.version}"
    more = f" and {len(changes) - _LISTED} more" if len(changes) > _LISTED else ""
    told = f"{len(changes)} files differ from {name}: {', '.join(changes[:_LISTED])}{more}"
    advice = "esc_arch is made for BasicSR 1.4.2 as it was published: check the report with it."
    return warn_if(changes, "basicsr", f"{folder}, {told if changes else f'files as of {name}'}", advice, changes)


def _digests(distribution: Distribution) -> dict[Path, str]:
    """What pip noted of the Python files in `basicsr/`; of an editable installation nothing."""
    files = [file for file in distribution.files or [] if file.parts[0] == "basicsr" and file.suffix == ".py"]
    return {Path(*file.parts[1:]): file.hash.value for file in files if file.hash}


def _digest(path: Path) -> str:
    """As pip notes it: SHA-256 in URL-safe base64, without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def registered_names(context: Context) -> Iterator[Finding]:
    """What option files can name, with its files; names of ours that others have; modules that cannot be imported."""
    if context.import_failure:
        yield Finding("names", "not known: esc_arch cannot be imported", WARNING)
        return
    from basicsr.utils import registry

    from esc_arch.names import OWN, without_own
    from esc_arch.register import others_of_our_names

    named = {"--import": context.args.imports}
    if context.args.opt is not None:
        with suppress(JobFailed):  # the section of the option file says why
            named["import"] = context.worker.call("esc_arch.options.files:load_yaml", context.args.opt).get("import")
    for where, modules in named.items():
        try:
            import_modules(modules, where)
        except UserError as error:
            yield Finding(where, str(error).removeprefix(f"{where}: "), PROBLEM, "Its classes are not registered.")
    for kind in ("arch", "model", "dataset", "loss", "metric"):
        of_kind = getattr(registry, f"{kind.upper()}_REGISTRY")
        groups: dict[str, dict[str, str | None]] = {}
        for name, entry in sorted(without_own(of_kind._obj_map).items()):
            package = entry.__module__.partition(".")[0]
            group = package if package in ("esc_arch", "basicsr") else entry.__module__
            groups.setdefault(group, {})[name] = getattr(sys.modules.get(entry.__module__), "__file__", None)
        for group in sorted(groups, key=lambda group: (group != "esc_arch", group == "basicsr", group)):
            yield Finding(f"{kind} of {group}", ", ".join(groups[group]), data=groups[group])
        for name, entry in others_of_our_names(of_kind).items():
            advice = f"Write {OWN}{name} in option files where esc_arch's is meant."
            yield Finding(f"{kind} {name}", f"is {entry.__module__}'s", WARNING, advice)
