"""Where BasicSR and esc_arch are imported from, whether that is what was meant, and what had to be fixed for it."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from .context import Context
from .report import OK, PROBLEM, WARNING, Finding

__all__ = ["examine"]

_LISTED = 6
_BASICSR = "Install it as the README says: pip install --no-build-isolation basicsr==1.4.2."
#: What to do about a failed import, by what its message has in it.
_HINTS = {
    "No module named 'basicsr'": _BASICSR,
    "No module named": "Install what is missing, or reinstall esc_arch: pip install --no-build-isolation -e .",
    "libGL": "pip install opencv-python-headless in place of opencv-python.",
    "torchvision": "What BasicSR misses there is fixed; this is another fault: reinstall torch and torchvision.",
}


@dataclass(frozen=True)
class _Published:
    """What pip noted when it installed a package: the digest of each file by its path below the package."""

    folder: Path
    digests: dict[str, str]


def examine(context: Context) -> Iterator[Finding]:
    """The import, copies of both packages, and stand-ins."""
    yield _import(context.import_failure)
    yield from _copies_of_basicsr()
    yield from _local_folder()
    yield from _copies_of_esc_arch()
    yield from _mended(context)


def _import(failure: str) -> Finding:
    if not failure:
        return Finding("import", "esc_arch and BasicSR can be imported")
    advice = next((hint for sign, hint in _HINTS.items() if sign in failure), "Fix this first; the rest follows.")
    return Finding("import", f"esc_arch cannot be imported: {failure}", PROBLEM, advice)


# --- BasicSR ------------------------------------------------------------------------------------------------------


def _copies_of_basicsr() -> Iterator[Finding]:
    from esc_arch.compat.duplicate_installs import find_copies, find_distributions, how_to_separate, mixed

    copies, installed = find_copies(), find_distributions()
    if not copies:
        yield Finding("basicsr", "not on the path", PROBLEM, _BASICSR)
        return
    used, *others = copies
    name, changes = _compared(used, installed)
    named = "" if name == "basicsr" else f", installed as {name}"
    text = f"{used}, {_version_in(used)}{_editable(name, used)}{named}: {_told(changes)}"
    if changes:
        advice = "esc_arch is made for BasicSR 1.4.2 as it was published: check the report with it."
        yield Finding("basicsr", text, WARNING, advice, data={"folder": str(used), "changes": changes})
    else:
        yield Finding("basicsr", text, data={"folder": str(used), "changes": changes})
    if others:
        text = f"{len(copies)} on the path; not used: {', '.join(map(str, others))}"
        advice = "Uninstall one of them, or start `basicsr` from another folder."
        yield Finding("copies of basicsr", text, WARNING, advice, data=[str(copy) for copy in copies])
    if len(installed) > 1:
        advice = how_to_separate(installed)
        yield Finding("distributions of basicsr", mixed(installed), WARNING, advice, data=list(installed))


def _compared(folder: Path, installed: dict[str, Distribution]) -> tuple[str, list[str] | None]:
    """The distribution that a copy is of, or else any, and how its files differ from those of that one."""
    published = {name: _published(distribution) for name, distribution in installed.items()}
    name = next((name for name, files in published.items() if files and files.folder == folder), "basicsr")
    return name, _changes(folder, published.get(name))


def _published(distribution: Distribution) -> _Published | None:
    """None where pip only put a link to a folder."""
    files = distribution.files or []
    below = [file for file in files if file.parts[0] == "basicsr" and file.suffix == ".py" and _has_digest(file)]
    if not below:
        return None
    digests = {str(Path(*file.parts[1:])): file.hash.value for file in below if file.hash}
    return _Published(Path(str(below[0].locate())).resolve().parents[len(below[0].parts) - 2], digests)


def _has_digest(file: importlib.metadata.PackagePath) -> bool:
    return file.hash is not None and file.hash.mode == "sha256"


def _changes(folder: Path, published: _Published | None) -> list[str] | None:
    """How the files of a copy differ from those that were installed; None where there is nothing to compare with."""
    if published is None:
        return None
    # version.py is rewritten whenever the package is built
    digests = {name: digest for name, digest in published.digests.items() if name != "version.py"}
    there = {str(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    there.pop("version.py", None)
    added = [f"{name} (added)" for name in there.keys() - digests.keys()]
    missing = [f"{name} (missing)" for name in digests.keys() - there.keys()]
    changed = [f"{name} (changed)" for name in digests.keys() & there.keys() if _digest(there[name]) != digests[name]]
    return sorted(added + missing + changed)


def _digest(path: Path) -> str:
    """As pip writes it: SHA-256, base64 for addresses, without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def _told(changes: list[str] | None) -> str:
    if changes is None:
        return "nothing to compare its files with"
    if not changes:
        return "its files are as installed"
    more = f" and {len(changes) - _LISTED} more" if len(changes) > _LISTED else ""
    return f"{len(changes)} files differ from the installed package: {', '.join(changes[:_LISTED])}{more}"


def _version_in(folder: Path) -> str:
    try:
        lines = (folder / "version.py").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "without a version"
    found = next((line for line in lines if line.startswith("__version__")), "")
    return found.partition("=")[2].strip(" '\"") or "without a version"


def _local_folder() -> Iterator[Finding]:
    """A clone's folder that `python -m` finds, and the command does not."""
    local = Path("basicsr").resolve()
    on_path = any(Path(entry or ".").resolve() == local.parent for entry in sys.path)
    if (local / "__init__.py").is_file() and not on_path:
        text = f"{local} is not used by `basicsr`, but by `python -m esc_arch` started in this folder"
        yield Finding("local basicsr", text, WARNING, "Start the command elsewhere, or remove the folder.")


# --- esc_arch -----------------------------------------------------------------------------------------------------


def _copies_of_esc_arch() -> Iterator[Finding]:
    from esc_arch.version import __version__

    used = Path(__file__).resolve().parents[2]
    installed = _installed_version()
    yield Finding("esc_arch", f"{used}, {__version__}{_editable('esc-arch', used)}", data={"folder": str(used)})
    source = _editable_source("esc-arch")
    if source is not None and source / "esc_arch" != used:
        text = f"installed (editable) from {source}, but used from {used.parent}"
        yield Finding("esc_arch source", text, WARNING, "Start elsewhere, or look at PYTHONPATH, if that is not meant.")
    if installed not in (None, __version__):
        text = f"{__version__} runs, but {installed} is installed"
        yield Finding("esc_arch version", text, WARNING, "Reinstall it: pip install --no-build-isolation -e .")
    others = {(Path(entry or ".") / "esc_arch").resolve() for entry in [*sys.path, "."]} - {used}
    others = {folder for folder in others if (folder / "__init__.py").is_file()}
    if others:
        text = f"not used: {', '.join(map(str, sorted(others)))}"
        yield Finding("copies of esc_arch", text, WARNING, "Uninstall or remove what is not meant.")


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("esc-arch")
    except importlib.metadata.PackageNotFoundError:
        return None


def _editable(distribution: str, folder: Path) -> str:
    source = _editable_source(distribution)
    return ", editable" if source is not None and folder.is_relative_to(source) else ""


def _editable_source(distribution: str) -> Path | None:
    """The folder of an editable installation."""
    try:
        text = importlib.metadata.distribution(distribution).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    noted = json.loads(text) if text else {}
    if not noted.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(noted["url"]).path)).resolve()


# --- mending ------------------------------------------------------------------------------------------------------


def _mended(context: Context) -> Iterator[Finding]:
    if context.import_failure:
        return
    from esc_arch.compat import PATCHES, aliases
    from esc_arch.compat.patches import SUPPORTED_VERSION, reason_against_patches

    stand_ins = aliases.stand_ins_in_use()
    text = f"stand-ins for {', '.join(stand_ins)}" if stand_ins else "nothing is missing"
    yield Finding("missing modules", text, data=stand_ins)
    if reason := reason_against_patches():
        advice = f"esc_arch patches BasicSR {SUPPORTED_VERSION} only: pip install basicsr=={SUPPORTED_VERSION}."
        yield Finding("patched functions", f"none of this BasicSR: {reason}", WARNING, advice)
    else:
        names = [f"{module}.{name}" for module, name, *_ in PATCHES]
        yield Finding("patched functions", f"{len(names)} of BasicSR {SUPPORTED_VERSION}", OK, data=names)
