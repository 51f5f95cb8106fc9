"""Versions of Python, libraries and optional extras, and those that do not go together."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .context import Context
from .report import OK, PROBLEM, WARNING, Finding
from .subprocess_worker import JobFailed

__all__ = ["EXTRAS", "LIBRARIES", "examine"]

#: What esc_arch needs: the distribution, and the module to import.
LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "basicsr": "basicsr",
    "esc-arch": "esc_arch",
    "numpy": "numpy",
    "opencv-python": "cv2",
    "lmdb": "lmdb",
    "safetensors": "safetensors",
    "scikit-image": "skimage",
    "scipy": "scipy",
    "pillow": "PIL",
    "tifffile": "tifffile",
    "PyYAML": "yaml",
    "tqdm": "tqdm",
}
#: What more can be done with: the distribution, and the extra of setup.py that installs it; "" for what others bring.
EXTRAS = {
    "triton": "",
    "flash-attn": "flash-attn",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "huggingface-hub": "publish",
    "av": "video",
    "spandrel": "spandrel",
    "lpips": "lpips",
    "wandb": "wandb",
    "matplotlib": "plot",
    "openvino": "test",
}
#: What the doctor imports in a child process to see whether it can be.
_IMPORTED = ("torch", "torchvision", "numpy", "opencv-python", "lmdb", "safetensors", "scipy")
#: Other distributions that bring the same module.
_TWINS = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")

_CLONE_REQUIREMENTS = Path(__file__).parents[3] / "requirements.txt"
_NEWEST_PYTHON = (3, 13)
_OLDEST_PYTHON = (3, 10)
_HINTS = {
    "libGL": "OpenCV wants a library of displays: pip install opencv-python-headless in place of opencv-python.",
    "undefined symbol": "It was built for another version of PyTorch: reinstall torch and torchvision together.",
    "multiarray": "It was built for another NumPy: pip install --upgrade it.",
}


@dataclass(frozen=True)
class _Clash:
    """A distribution below a version cannot be used with another from a version on."""

    name: str
    below: str
    other: str
    since: str
    why: str


_CLASHES = (
    _Clash("opencv-python", "4.10", "numpy", "2", "it was built for NumPy 1"),
    _Clash("scipy", "1.13", "numpy", "2", "it was built for NumPy 1"),
    _Clash("scikit-image", "0.23", "numpy", "2", "it was built for NumPy 1"),
    _Clash("torch", "2.3", "numpy", "2", "it was built for NumPy 1"),
)


def examine(context: Context) -> Iterator[Finding]:
    """Versions, what cannot be imported, and requirements that are not met."""
    yield _python()
    yield Finding("system", f"{platform.platform()}, {platform.machine()}", data={"system": platform.system()})
    wanted = _requirements()
    for name in LIBRARIES:
        yield _library(name, wanted, context)
    yield from _torch_build(context)
    yield from _twins()
    for name, extra in EXTRAS.items():
        yield _extra(name, extra, wanted)


def _python() -> Finding:
    text = f"{platform.python_version()} ({platform.python_implementation()})"
    if sys.version_info[:2] > _NEWEST_PYTHON:
        advice = "esc_arch was not tried with it: use Python 3.10 to 3.13."
        return Finding("python", text, WARNING, advice)
    if sys.version_info[:2] < _OLDEST_PYTHON:
        return Finding("python", text, PROBLEM, "Use Python 3.10 to 3.13.")
    return Finding("python", text)


def _library(name: str, wanted: dict[str, list[str]], context: Context) -> Finding:
    version = _version(name)
    if name == "opencv-python" and version is None:
        version = next((found for twin in _TWINS if (found := _version(twin))), None)
    if version is None:
        return _without_metadata(name, context)
    problem, advice = _unmet(name, version, wanted) or ("", "")
    if name in _IMPORTED and (failure := _import_failure(LIBRARIES[name], context)):
        problem = f"cannot be imported: {failure}"
        advice = next((hint for sign, hint in _HINTS.items() if sign in failure), f"Reinstall {name}.")
    return Finding(name, f"{version}{', ' * bool(problem)}{problem}", PROBLEM if problem else OK, advice)


def _without_metadata(name: str, context: Context) -> Finding:
    """A library that pip does not know of: a folder on the path, or nothing."""
    if LIBRARIES[name] == "esc_arch":
        from esc_arch.version import __version__

        return Finding(name, f"{__version__}, a folder on the path and not installed")
    failure = _import_failure(LIBRARIES[name], context) if name != "basicsr" else ""
    if name == "basicsr" and not context.import_failure:
        from esc_arch.compat.duplicate_installs import find_distributions

        others = [f"{other} {distribution.version}" for other, distribution in find_distributions().items()]
        return Finding(name, f"installed as {', '.join(others)}" if others else "a folder on the path, not installed")
    if failure or name == "basicsr":
        return Finding(name, "not installed", PROBLEM, f"pip install {name}")
    return Finding(name, "there, but not installed by pip")


def _import_failure(module: str, context: Context) -> str:
    try:
        context.worker.call("esc_arch.tools.doctor.probes:import_module", module)
    except JobFailed as failure:
        return str(failure)
    return ""


def _torch_build(context: Context) -> Iterator[Finding]:
    try:
        build = context.worker.call("esc_arch.tools.doctor.probes:torch_build")
    except JobFailed as failure:
        yield Finding("torch build", str(failure), PROBLEM, "Reinstall torch.")
        return
    yield Finding("torch build", build["text"], data=build)


def _twins() -> Iterator[Finding]:
    there = [name for name in _TWINS if _version(name)]
    if len(there) > 1:
        advice = f"They overwrite each other's files: pip uninstall {' '.join(there)}, then install one of them."
        yield Finding("opencv", f"installed more than once: {', '.join(there)}", WARNING, advice)


def _extra(name: str, extra: str, wanted: dict[str, list[str]]) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, f"not installed{f' (extra {extra})' * bool(extra)}")
    unmet = _unmet(name, version, wanted)
    return Finding(name, f"{version}, {unmet[0]}", WARNING, unmet[1]) if unmet else Finding(name, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, list[str]]:
    """What esc_arch, BasicSR and torchvision ask of others: specifiers, such as >=2.7, by distribution."""
    found: dict[str, list[str]] = {}
    for distribution in ("esc-arch", "basicsr", "torchvision"):
        for line in _required_by(distribution):
            match = re.match(r"([A-Za-z0-9._-]+)\s*\(?([<>=!~][^;)]*)", line)
            # (Conditions of others are about systems and Pythons; ours name extras, which may be there anyway)
            if match and (distribution == "esc-arch" or ";" not in line):
                found.setdefault(_canonical(match[1]), []).append(f"{distribution} needs {match[2].strip()}")
    return found


def _required_by(distribution: str) -> list[str]:
    """What pip noted; for a clone of esc_arch what it says now, too, because it may have been changed since."""
    lines: list[str] = []
    if distribution == "esc-arch" and _CLONE_REQUIREMENTS.is_file():
        lines = _CLONE_REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    try:
        return lines + (importlib.metadata.requires(distribution) or [])
    except importlib.metadata.PackageNotFoundError:
        return lines


def _unmet(name: str, version: str, wanted: dict[str, list[str]]) -> tuple[str, str] | None:
    """What is wrong with a version, and what to do."""
    for needed in wanted.get(_canonical(name), []):
        if not _contains(needed.rpartition(" needs ")[2], version):
            specifier = needed.rpartition(" needs ")[2]
            return f"but {needed}", f'pip install "{name}{specifier}"'
    for clash in _CLASHES:
        other = _version(clash.other)
        if clash.name != name or other is None:
            continue
        if _release(version) < _release(clash.below) and _release(other) >= _release(clash.since):
            return f"{clash.why}, but {clash.other} is {other}", f'pip install "{name}>={clash.below}"'
    return None


def _contains(specifier: str, version: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(specifier).contains(version, prereleases=True)
    except Exception:  # without packaging, or with a specifier that it does not know, nothing is said
        return True


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))
