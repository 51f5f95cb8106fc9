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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

__all__ = ["Recipe", "built_library", "cache_folder", "compile_library", "find_compiler", "recipe"]

CSRC = Path(__file__).parent / "csrc"

#: What the vectors of at::vec and the compiler's own are to use, by the name PyTorch gives to what this CPU has
#: (ATEN_CPU_CAPABILITY lowers it, for PyTorch and for us).
_INSTRUCTIONS = {
    "AVX512": ("-march=native", "-mprefer-vector-width=512", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    "AVX2": ("-march=native", "-mno-avx512f", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
}


@dataclass(frozen=True)
class Recipe:
    """All that the library depends on.

    Attributes:
        compiler: the command, its own arguments included.
        sources: the files to compile.
        flags: of the compiler, without the include paths.
        key: differs whenever the library might.
    """

    compiler: tuple[str, ...]
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    key: str


def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command: CXX of the environment, g++ or clang++; None where there is none."""
    for command in (os.environ.get("CXX", ""), "g++", "clang++"):
        words = shlex.split(command)
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return (path, *words[1:])
    return None


def recipe(compiler: tuple[str, ...]) -> Recipe:
    """What would be compiled here now.

    Raises:
        RuntimeError: ESC_ARCH_NATIVE_SOURCES names a file that is not in csrc.
    """
    sources, flags = _sources(), _flags()
    parts = (*compiler, _version_of(compiler), *flags, torch.__version__, _cpu(), *map(_digest, sources), _headers())
    names = (source.name for source in sources)
    return Recipe(compiler, sources, flags, hashlib.sha256("\0".join((*names, *parts)).encode()).hexdigest()[:20])


def built_library(wanted: Recipe) -> Path | None:
    """The library, where it was built before and is as it was written; None otherwise."""
    library = _folder(wanted) / "operators.so"
    try:
        # Loading half a file ends the process, so it is compared with what was noted when it was whole
        return library if library.with_suffix(".sha256").read_text() == _digest(library) else None
    except OSError:
        return None


def compile_library(wanted: Recipe) -> tuple[Path, list[str]]:
    """Compile the library, unless another process has just done so; several processes wait for one of them.

    Returns:
        Its path, and the commands that were run (none where another process was first).

    Raises:
        RuntimeError: the compiler failed; the message begins with its first line about an error.
        OSError: the cache cannot be written.
    """
    with _lock():
        library = built_library(wanted)
        if library is not None:
            return library, []
        objects = cache_folder() / "objects"
        objects.mkdir(exist_ok=True)
        jobs = [(source, objects / f"{source.stem}-{_object_key(wanted, source)}.o") for source in wanted.sources]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            commands = [command for command in pool.map(lambda job: _compile(wanted, *job), jobs) if command]
        library, command = _link(wanted, [output for _, output in jobs])
        _forget_older(jobs)
        return library, [*commands, command]


def _compile(wanted: Recipe, source: Path, output: Path) -> str:
    if output.exists():
        return ""
    return _run((*wanted.compiler, *wanted.flags, *_include_flags(), "-c", str(source)), output)


def _link(wanted: Recipe, objects: Sequence[Path]) -> tuple[Path, str]:
    folder = _folder(wanted)
    folder.mkdir(exist_ok=True)
    libraries = Path(torch.__file__).parent / "lib"
    where = (f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10")
    library = folder / "operators.so"
    command = _run((*wanted.compiler, "-shared", *map(str, objects), *where, *_openmp_at_link(wanted)), library)
    library.with_suffix(".sha256").write_text(_digest(library))
    return library, command


def _run(command: Sequence[str], output: Path) -> str:
    """Run a command that writes `output`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        try:
            done = subprocess.run((*command, "-o", str(made)), capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise RuntimeError(f"{command[0]} cannot be run: {error}") from error
        if done.returncode:
            raise RuntimeError(f"{_first_error(done.stderr)} (from: {shlex.join(command)})")
        made.replace(output)
    return shlex.join(command)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


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


def _include_flags() -> tuple[str, ...]:
    include = Path(torch.__file__).parent / "include"
    return (f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}")


def _object_key(wanted: Recipe, source: Path) -> str:
    parts = (*wanted.compiler, _version_of(wanted.compiler), *wanted.flags, torch.__version__, _cpu(), _headers())
    return hashlib.sha256("\0".join((*parts, _digest(source))).encode()).hexdigest()[:20]


def _forget_older(jobs: Sequence[tuple[Path, Path]]) -> None:
    for source, output in jobs:
        for other in output.parent.glob(f"{source.stem}-*.o"):
            if other != output:
                other.unlink(missing_ok=True)


def _headers() -> str:
    return "".join(map(_digest, sorted(CSRC.glob("*.h"))))


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


def cache_folder() -> Path:
    """Where libraries are kept: in the user's cache; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esc_arch"


def _folder(wanted: Recipe) -> Path:
    return cache_folder() / f"native-{wanted.key}"


@contextmanager
def _lock() -> Iterator[None]:
    import fcntl

    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / "build.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
