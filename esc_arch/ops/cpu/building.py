"""Compiling the C++ operators: one shared library of every file in csrc, made once and kept in the user's cache.

The compiler is called directly, because torch.utils.cpp_extension wants ninja and includes every header of PyTorch.
For development, ESC_ARCH_NATIVE_SOURCES (file names with commas between) restricts the library to some of the files.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Recipe", "built_library", "cache_folder", "compile_library", "find_compiler", "recipe"]

CSRC = Path(__file__).parent / "csrc"

#: What the vectors of at::vec and the compiler's own are to use, by the name PyTorch gives to what this CPU has
#: (ATEN_CPU_CAPABILITY lowers it, for PyTorch and for us).
_INSTRUCTIONS = {
    "AVX512": ("-march=native", "-mprefer-vector-width=512", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    "AVX2": ("-march=native", "-mno-avx512f", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
}


class Recipe(NamedTuple):
    """The compiler's command, the files to compile, the flags without include paths, and the library to make."""

    compiler: tuple[str, ...]
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    library: Path


def cache_folder() -> Path:
    """Where libraries are kept: in the user's cache; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esc_arch"


def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command: CXX of the environment, g++ or clang++; None where there is none."""
    for command in (os.environ.get("CXX", ""), "g++", "clang++"):
        words = shlex.split(command)
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return (path, *words[1:])
    return None


def recipe() -> Recipe:
    """What would be compiled here now.

    Raises:
        RuntimeError: there is no compiler, or ESC_ARCH_NATIVE_SOURCES names a file that is not in csrc.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("there is no C++ compiler")
    sources, flags = _sources(), _flags()
    library = cache_folder() / f"native-{_key(compiler, flags, *sources)}" / "operators.so"
    return Recipe(compiler, sources, flags, library)


def built_library(wanted: Recipe) -> Path | None:
    """The library, where it was built before and is as it was written; None otherwise."""
    library = wanted.library
    try:
        # Loading half a file ends the process, so it is compared with what was noted when it was whole
        return library if library.with_suffix(".sha256").read_text() == _digest(library) else None
    except OSError:
        return None


def compile_library(wanted: Recipe) -> Path:
    """Compile the library, unless another process has just done so; several processes wait for one of them.

    Raises:
        RuntimeError: the compiler failed; the message begins with its first line about an error.
        OSError: the cache cannot be written.
    """
    import fcntl

    library, objects, installed = wanted.library, cache_folder() / "objects", Path(torch.__file__).parent
    objects.mkdir(parents=True, exist_ok=True)
    include = (f"-I{installed / 'include'}", f"-I{installed / 'include' / 'torch' / 'csrc' / 'api' / 'include'}")
    link = (f"-L{installed / 'lib'}", f"-Wl,-rpath,{installed / 'lib'}", "-ltorch_cpu", "-lc10")

    def compile_source(source: Path) -> str:
        output = objects / f"{source.stem}-{_key(wanted.compiler, wanted.flags, source)}.o"
        if not output.exists():
            _run((*wanted.compiler, *wanted.flags, *include, "-c", str(source)), output)
        for other in set(objects.glob(f"{source.stem}-*.o")) - {output}:
            other.unlink(missing_ok=True)
        return str(output)

    with open(cache_folder() / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if built_library(wanted) is None:
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                compiled = list(pool.map(compile_source, wanted.sources))
            library.parent.mkdir(exist_ok=True)
            _run((*wanted.compiler, "-shared", *compiled, *link, *_openmp_at_link(wanted)), library)
            library.with_suffix(".sha256").write_text(_digest(library))
    return library


def _key(compiler: tuple[str, ...], flags: tuple[str, ...], *sources: Path) -> str:
    """Differs whenever what is compiled from these sources might."""
    parts = (*compiler, _version_of(compiler), *flags, torch.__version__, _cpu())
    headers = "".join(map(_digest, sorted(CSRC.glob("*.h"))))
    return hashlib.sha256("\0".join((*parts, headers, *map(_digest, sources))).encode()).hexdigest()[:20]


def _run(command: Sequence[str], output: Path) -> None:
    """Run a command that writes `output`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        try:
            done = subprocess.run((*command, "-o", str(made)), capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise RuntimeError(f"{command[0]} cannot be run: {error}") from error
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            raise RuntimeError(f"{first} (from: {shlex.join(command)})")
        made.replace(output)


def _sources() -> tuple[Path, ...]:
    there = {path.name: path for path in sorted(CSRC.glob("*.cpp"))}
    chosen = os.environ.get("ESC_ARCH_NATIVE_SOURCES")
    if not chosen:
        return tuple(there.values())
    names = [name.strip() for name in chosen.split(",")]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise RuntimeError(f"ESC_ARCH_NATIVE_SOURCES names {', '.join(unknown)}; there are {', '.join(there)}.")
    return tuple(there[name] for name in names)


def _flags() -> tuple[str, ...]:
    instructions = _INSTRUCTIONS.get(
        torch.backends.cpu.get_cpu_capability(),
        ("-march=native", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"),
    )
    openmp = ("-Xclang", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
    # (Without signed zeros, traps and errno nothing that is computed changes)
    safe_maths = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ("-std=c++20", "-O3", "-fPIC", "-DNDEBUG", "-Wno-psabi", abi, *instructions, *openmp, *safe_maths)


def _openmp_at_link(wanted: Recipe) -> tuple[str, ...]:
    """PyTorch brings the runtime that g++'s code, and clang++'s on macOS, needs; a second one has its own threads."""
    if sys.platform == "darwin":
        return ("-undefined", "dynamic_lookup")
    return ("-fopenmp",) if "clang" in Path(wanted.compiler[0]).name else ()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _version_of(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run((*compiler, "--version"), capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout


@cache
def _cpu() -> str:
    """The CPU's own list of what it can do: a home directory, and so the cache, may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
