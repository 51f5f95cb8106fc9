"""Versions of libraries, where BasicSR and esc_arch are imported from, and the names that they register."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from esc_arch.errors import UserError
from esc_arch.project import import_modules
from esc_arch.version import __version__

from .report import PROBLEM, WARNING, Context, Finding, warn_if
from .subprocess_worker import JobFailed, Worker

__all__ = ["basicsr_failure", "copies", "import_library", "registered_names", "versions"]

_ROOT = Path(__file__).resolve().parents[3]
_NEWEST_PYTHON = (3, 13)
#: Modules to import, for distributions of another name.
_MODULES = {"opencv-python": "cv2", "pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage"}
#: Distributions that bring the same module.
_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
#: What to do about a failed import, by what its message contains.
_HINTS = {
    "No module named 'basicsr'": "Install it: basicsr setup-training.",
    "No module named": "Install what is missing, or reinstall esc_arch.",
    "libGL": "OpenCV needs a display library: pip install opencv-python-headless in place of opencv-python.",
    "undefined symbol": "It was built for another version of PyTorch: reinstall torch and torchvision together.",
    "multiarray": "It was built for another NumPy: pip install --upgrade it.",
    "": "Reinstall it, or fix this first: the rest follows.",
}


def basicsr_failure(worker: Worker) -> str:
    """Why BasicSR cannot be imported, found in a child process, which may crash; empty if it can."""
    try:
        worker.call(f"{__name__}:import_library", "basicsr")
    except JobFailed as failure:
        return str(failure)
    return ""


def import_library(name: str) -> None:
    """In the child process."""
    importlib.import_module(name)


def versions(context: Context) -> Iterator[Finding]:
    """Of Python, required libraries and extras; what cannot be imported, and what does not fit together."""
    text = f"{platform.python_version()} ({platform.python_implementation()})"
    advice = "esc_arch was not tested with it: use Python 3.10 to 3.13."
    yield warn_if(sys.version_info[:2] > _NEWEST_PYTHON, "python", text, advice)
    yield Finding("system", f"{platform.platform()}, {platform.machine()}")
    yield Finding("esc-arch", _version("esc-arch") or f"{__version__}, a folder on the path, not installed")
    extras = _requirements()
    for name, extra in extras.items():
        if extra and not (extra == "train" and _version(name)):
            yield Finding(name, _version(name) or f"not installed (extra {extra})")
        else:
            yield _library(context, name)
    yield Finding("triton", _version("triton") or "not installed")
    yield from context.in_child("torch build", "machine:torch_build", advice="Reinstall torch.")
    several = [name for name in _OPENCV if _version(name)]
    if len(several) > 1:
        advice = f"They overwrite each other's files: pip uninstall {' '.join(several)}, then install one of them."
        yield Finding("opencv", f"installed more than once: {', '.join(several)}", WARNING, advice)
    for number, text in enumerate(_conflicts(["esc-arch", *extras]), start=1):
        yield Finding(f"conflict {number}", text, PROBLEM, "Install versions that fit together.")


def _requirements() -> dict[str, str]:
    """What esc_arch requires, by name, and the extra for which, or nothing; as pip or a clone says."""
    try:
        lines = importlib.metadata.requires("esc-arch") or []
    except importlib.metadata.PackageNotFoundError:
        lines = (_ROOT / "requirements.txt").read_text().splitlines()
    found = [re.findall(r'^[\w-]+|(?<=extra == ").*(?=")', line) for line in lines]
    return {name: "".join(extra) for name, *extra in found if extra != ["test"]}


def _conflicts(names: Iterable[str]) -> Iterator[str]:
    """Which of these libraries require another version of a library than is installed."""
    from packaging.requirements import Requirement  # which scikit-image requires

    for name in filter(_version, names):
        for required in map(Requirement, importlib.metadata.requires(name) or []):
            there = _version(required.name)
            is_meant = required.marker is None or required.marker.evaluate({"extra": ""})
            if there and is_meant and not required.specifier.contains(there, prereleases=True):
                yield f"{name} {_version(name)} requires {required}, but {there} is installed"


def _library(context: Context, name: str) -> Finding:
    """Its version. If this process has it not yet, the child process imports it; but BasicSR, see `copies`."""
    version = next(filter(None, map(_version, _OPENCV if name == "opencv-python" else [name])), None)
    module = _MODULES.get(name, name)
    failure = ""
    if name != "basicsr" and module not in sys.modules:
        try:
            context.worker.call(f"{__name__}:import_library", module)
        except JobFailed as error:
            failure = str(error)
    if version and failure:
        return Finding(name, f"{version}, cannot be imported: {failure}", PROBLEM, _hint(failure))
    if failure or (name == "basicsr" and not version and context.import_failure):
        return Finding(name, "not installed", PROBLEM, f"pip install {name}")
    return Finding(name, version or "not installed under this name, but can be imported")


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
        yield Finding("import", f"BasicSR cannot be imported: {failure}", PROBLEM, _hint(failure))
    else:
        yield Finding("import", "esc_arch and BasicSR can be imported")
    yield Finding("esc_arch", f"{_ROOT / 'esc_arch'}, {__version__}")
    yield from _copies_of_basicsr()
    if failure:
        return
    import basicsr  # noqa: F401  so that it has been patched

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
    yield Finding("basicsr", str(found[0]))
    if len(found) > 1:
        text = f"{len(found)} on the path; not used: {', '.join(map(str, found[1:]))}"
        advice = "Uninstall one of them, or start `basicsr` from another folder."
        yield Finding("copies of basicsr", text, WARNING, advice, [str(folder) for folder in found])
    if len(installed) > 1:
        text, advice = mixed(installed)
        yield Finding("distributions of basicsr", text, WARNING, advice, list(installed))


def registered_names(context: Context) -> Iterator[Finding]:
    """What option files can name, with its files; names of ours that others have; modules that cannot be imported."""
    if context.import_failure:
        yield Finding("names", "not known: BasicSR cannot be imported", WARNING)
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
