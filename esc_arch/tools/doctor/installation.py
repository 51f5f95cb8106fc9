"""Versions of libraries, where BasicSR and esc_arch are imported from, and the names that they register."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

from esc_arch.errors import UserError
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
    """Of Python, required libraries and extras; what cannot be imported, and requirements that are not met."""
    text = f"{platform.python_version()} ({platform.python_implementation()})"
    advice = "esc_arch was not tested with it: use Python 3.10 to 3.13."
    yield warn_if(sys.version_info[:2] > _NEWEST_PYTHON, "python", text, advice)
    yield Finding("system", f"{platform.platform()}, {platform.machine()}")
    yield Finding("esc-arch", _version("esc-arch") or f"{__version__}, a folder on the path, not installed")
    required = [(name, each) for name in ("esc-arch", "basicsr", "torchvision") for each in _requirements(name)]
    for requirement in {each.name: each for name, each in required if name == "esc-arch"}.values():
        yield _library(context, requirement, required)
    yield from context.in_child("torch build", "machine:torch_build", advice="Reinstall torch.")
    yield Finding("triton", _version("triton") or "not installed")
    several = [name for name in _OPENCV if _version(name)]
    if len(several) > 1:
        advice = f"They overwrite each other's files: pip uninstall {' '.join(several)}, then install one of them."
        yield Finding("opencv", f"installed more than once: {', '.join(several)}", WARNING, advice)


def _library(context: Context, requirement: Requirement, required: list[tuple[str, Requirement]]) -> Finding:
    name = requirement.name
    version = next(filter(None, map(_version, _OPENCV if name == "opencv-python" else [name])), None)
    if version is None and requirement.marker:
        return Finding(name, f"not installed ({requirement.marker})")
    failure = context.import_failure if name == "basicsr" else ""  # esc_arch makes it importable, see `copies`
    if name != "basicsr" and not requirement.marker:
        try:
            context.worker.call("importlib:import_module", _MODULES.get(name, name))
        except JobFailed as error:
            failure = str(error)
    if version is None and failure:
        return Finding(name, "not installed", PROBLEM, f"pip install {name}")
    if failure and name != "basicsr":
        return Finding(name, f"{version}, cannot be imported: {failure}", PROBLEM, _hint(failure))
    for other, needed in required:
        # Markers of others are about systems and Pythons; ours name extras, which may be installed anyway
        applies = needed.name.lower() == name and (needed.marker is None or other == "esc-arch")
        if applies and version and not needed.specifier.contains(version, prereleases=True):
            text, bad = f"{version}, but {other} needs {needed.specifier}", WARNING if requirement.marker else PROBLEM
            return Finding(name, text, bad, f'pip install "{name}{needed.specifier}"')
    return Finding(name, version or "not installed under this name, but can be imported")


def _hint(failure: str) -> str:
    return next(hint for sign, hint in _HINTS.items() if sign in failure)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(name: str) -> list[Requirement]:
    """What a distribution requires, without the extra `test`; of a clone of esc_arch what it says now, too."""
    lines: list[str] = []
    if name == "esc-arch" and (_ROOT / "requirements.txt").is_file():
        lines = (_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    with suppress(importlib.metadata.PackageNotFoundError):
        lines += importlib.metadata.requires(name) or []
    return [Requirement(line) for line in lines if not line.endswith('extra == "test"')]


def copies(context: Context) -> Iterator[Finding]:
    """The import, copies of both packages, and what esc_arch fixes in BasicSR."""
    if failure := context.import_failure:
        yield Finding("import", f"esc_arch cannot be imported: {failure}", PROBLEM, _hint(failure))
    else:
        yield Finding("import", "esc_arch and BasicSR can be imported")
    yield from _copies_of_basicsr()
    used = _ROOT / "esc_arch"
    yield Finding("esc_arch", f"{used}, {__version__}", data={"folder": str(used)})
    others = {(Path(entry) / "esc_arch").resolve() for entry in [*sys.path, "."]} - {used}
    if others := {folder for folder in others if (folder / "__init__.py").is_file()}:
        text = f"not used: {', '.join(map(str, sorted(others)))}"
        yield Finding("copies of esc_arch", text, WARNING, "Uninstall or remove what is not meant.")
    if not context.import_failure:
        yield from _fixes()


def _copies_of_basicsr() -> Iterator[Finding]:
    from esc_arch.compat.duplicate_installs import find_copies, find_distributions, how_to_separate, mixed

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
        advice = how_to_separate(installed)
        yield Finding("distributions of basicsr", mixed(installed), WARNING, advice, list(installed))


def _used_basicsr(folder: Path, installed: list[Distribution]) -> Finding:
    """Compare the files of a BasicSR with those that pip noted: of it, or else of another one."""
    noted = {each: digests for each in installed if (digests := _digests(each))}
    if not noted:
        return Finding("basicsr", f"{folder}, nothing to compare its files with", data={"folder": str(folder)})
    of_folder = [each for each in noted if Path(str(each.locate_file("basicsr"))).resolve() == folder]
    published = next(iter([*of_folder, *noted]))
    there, digests = {path.relative_to(folder.parent): _digest(path) for path in folder.rglob("*.py")}, noted[published]
    differing = sorted(path for path in there.keys() | digests.keys() if there.get(path) != digests.get(path))
    changes = [
        f"{'/'.join(path.parts[1:])} ({'added' if path not in digests else 'changed' if path in there else 'missing'})"
        for path in differing
        if path.name != "version.py"  # which differs from build to build
    ]
    name = f"{published.metadata['Name']} {published.version}"
    more = f" and {len(changes) - _LISTED} more" if len(changes) > _LISTED else ""
    told = f"{len(changes)} files differ from {name}: {', '.join(changes[:_LISTED])}{more}"
    advice = "esc_arch is made for BasicSR 1.4.2 as it was published: check the report with it."
    data = {"folder": str(folder), "changes": changes}
    return warn_if(changes, "basicsr", f"{folder}, {told if changes else f'files as of {name}'}", advice, data)


def _digests(distribution: Distribution) -> dict[Path, str]:
    """What pip noted of its Python files; of an editable installation nothing."""
    files = [file for file in distribution.files or [] if file.parts[0] == "basicsr" and file.suffix == ".py"]
    return {Path(file): file.hash.value for file in files if file.hash}


def _digest(path: Path) -> str:
    """As pip notes it: SHA-256 in URL-safe base64, without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def _fixes() -> Iterator[Finding]:
    from esc_arch.compat import PATCHES, aliases
    from esc_arch.compat.patches import SUPPORTED_VERSION, reason_against_patches

    stand_ins = aliases.stand_ins_in_use()
    text = f"stand-ins for {', '.join(stand_ins)}" if stand_ins else "nothing is missing"
    yield Finding("missing modules", text, data=stand_ins)
    reason, names = reason_against_patches(), [f"{module}.{name}" for module, name, *_ in PATCHES]
    text = f"none of this BasicSR: {reason}" if reason else f"{len(names)} of BasicSR {SUPPORTED_VERSION}"
    advice = f"esc_arch patches BasicSR {SUPPORTED_VERSION} only: pip install basicsr=={SUPPORTED_VERSION}."
    yield warn_if(reason, "patched functions", text, advice, names)


def registered_names(context: Context) -> Iterator[Finding]:
    """What option files can name, with its files; names of ours that others have; modules that cannot be imported."""
    if context.import_failure:
        yield Finding("names", "not known: esc_arch cannot be imported", WARNING)
        return
    from basicsr.utils import registry

    from esc_arch.register import OWN, others_of_our_names, without_own

    yield from _import_project(context)
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


def _import_project(context: Context) -> Iterator[Finding]:
    """Import what --import and the option file name."""
    from esc_arch.project import import_modules

    named = {"--import": context.args.imports}
    if context.args.opt is not None:
        with suppress(JobFailed):  # the section of the option file says why
            named["import"] = context.worker.call("esc_arch.options.files:load_yaml", context.args.opt).get("import")
    for where, modules in named.items():
        try:
            import_modules(modules, where)
        except UserError as error:
            yield Finding(where, str(error).removeprefix(f"{where}: "), PROBLEM, "Its classes are not registered.")
